from __future__ import annotations

import numpy as np
import pytest
import torch

from dynakern.tasks.series_metrics import (
    M4_FREQUENCIES,
    m4_summary,
    mape_loss,
    mase,
    mase_loss,
    naive2,
    owa,
    point_adjust,
    smape,
    smape_loss,
)
from dynakern.testing import assert_same, rand, randn


def series(length, season, *, slope=0.0, noise=0.0, seed=0):
    generator = np.random.default_rng(seed)
    pattern = 1 + 0.5 * np.sin(2 * np.pi * np.arange(season) / season)
    t = np.arange(length)
    return (10 + slope * t) * pattern[t % season] * np.exp(noise * generator.standard_normal(length))


# Scores


def test_smape_by_hand():
    assert smape([[2.0, 0.0, -1.0]], [[1.0, 0.0, 1.0]]).tolist() == [[200 / 3, 0.0, 200.0]]


def test_mase_of_the_seasonal_naive_forecast_is_the_ratio_of_seasonal_changes():
    y = series(40, 4, slope=0.3)
    history, future = y[:36], y[36:]
    expected = np.abs(future - history[-4:]).mean() / np.abs(history[4:] - history[:-4]).mean()
    assert mase(history[-4:], future, history, season=4) == pytest.approx(expected)
    stacked = mase(np.stack([history[-4:]] * 2), np.stack([future] * 2), np.stack([history, 3 * history]), season=4)
    np.testing.assert_allclose(stacked, [expected, expected / 3])


def test_mase_of_a_constant_history():
    assert mase([1.0], [1.0], [1.0, 1.0]) == 0
    assert mase([2.0], [1.0], [1.0, 1.0]) == np.inf


def test_owa_of_the_baseline_itself_is_one():
    assert owa(13.0, 1.9, 13.0, 1.9) == 1
    assert owa(6.5, 1.9, 13.0, 1.9) == 0.75


def test_m4_summary_pools_and_weighs_by_counts():
    generator = np.random.default_rng(0)
    counts = {"Yearly": 3, "Weekly": 1, "Daily": 4}
    insamples = {name: [generator.uniform(1, 9, 40) for _ in range(n)] for name, n in counts.items()}
    targets, forecasts = (
        {name: [generator.uniform(1, 9, M4_FREQUENCIES[name].horizon) for _ in range(n)] for name, n in counts.items()}
        for _ in range(2)
    )
    table = m4_summary(forecasts, targets, insamples)
    assert {group: score.count for group, score in table.items()} == {"Yearly": 3, "Others": 5, "Average": 8}

    def mean(score, names):
        return np.mean([score(name, i) for name in names for i in range(counts[name])])

    def smape_of(name, i):
        return smape(forecasts[name][i], targets[name][i]).mean()

    def mase_of(name, i):
        return mase(forecasts[name][i], targets[name][i], insamples[name][i])

    def naive_smape(name, i):
        return smape(np.full_like(targets[name][i], insamples[name][i][-1]), targets[name][i]).mean()

    def naive_mase(name, i):
        return mase(np.full_like(targets[name][i], insamples[name][i][-1]), targets[name][i], insamples[name][i])

    for group, names in (("Others", ("Weekly", "Daily")), ("Average", tuple(counts))):
        assert table[group].smape == pytest.approx(mean(smape_of, names))
        assert table[group].mase == pytest.approx(mean(mase_of, names))
        expected = (
            mean(smape_of, names) / mean(naive_smape, names) + mean(mase_of, names) / mean(naive_mase, names)
        ) / 2
        assert table[group].owa == pytest.approx(expected)
    naive = {name: [np.full_like(t, h[-1]) for t, h in zip(targets[name], insamples[name])] for name in counts}  # noqa: B905
    assert m4_summary(forecasts, targets, insamples, naive) == table
    assert m4_summary(naive, targets, insamples)["Average"].owa == 1


# Naive2


def test_naive2_continues_a_multiplicative_season():
    y = series(120, 12)
    np.testing.assert_allclose(naive2(y[:113], 7, season=12), y[113:], rtol=1e-12)
    np.testing.assert_allclose(naive2(series(90, 5)[:73], 9, season=5), series(90, 5)[73:82], rtol=1e-12)


def test_naive2_keeps_the_level_of_the_last_step():
    y = series(120, 12, slope=0.05)
    forecast = naive2(y, 12, season=12)
    np.testing.assert_allclose(forecast / series(12, 12), (10 + 0.05 * 119) / 10, rtol=0.01)


@pytest.mark.parametrize("case", ["noise", "short", "no season", "constant"])
def test_naive2_without_a_season_repeats_the_last_value(case):
    y = {
        "noise": np.random.default_rng(0).uniform(1, 2, 100),
        "short": series(35, 12),
        "no season": series(48, 12),
        "constant": np.full(48, 0.1),
    }[case]
    assert naive2(y, 3, season=1 if case == "no season" else 12).tolist() == [y[-1]] * 3


def test_naive2_tests_the_season_at_90_percent():
    rejected = [
        len(set(naive2(np.random.default_rng(seed).uniform(1, 2, 1200), 12, season=12))) > 1 for seed in range(300)
    ]
    # 10 % of noise passes for seasonal; three standard errors of 300 trials are 5.2 %.
    assert 0.048 < np.mean(rejected) < 0.152


# Losses


def test_losses_agree_with_the_scores():
    forecast, target, history = (4 * rand(5, 8, seed=s) + 0.1 for s in range(3))
    f, t, h = (x.detach().numpy() for x in (forecast, target, history))
    assert smape_loss(forecast, target).item() == pytest.approx(smape(f, t).mean())
    assert mase_loss(forecast, target, history, season=2).item() == pytest.approx(mase(f, t, h, season=2).mean())
    assert mape_loss(forecast, target).item() == pytest.approx(np.mean(np.abs(f - t) / t))


def test_masked_entries_count_only_in_the_number_of_entries():
    forecast, target, history = (4 * rand(2, 6, seed=s) + 0.1 for s in range(3))
    mask = torch.ones(2, 6)
    mask[:, 3:] = 0
    cut = slice(None), slice(3)
    assert_same(smape_loss(forecast, target, mask), smape_loss(forecast[cut], target[cut]) / 2)
    assert_same(mape_loss(forecast, target, mask), mape_loss(forecast[cut], target[cut]) / 2)
    assert_same(mase_loss(forecast, target, history, mask), mase_loss(forecast[cut], target[cut], history) / 2)


def test_smape_loss_gives_no_gain_for_a_large_denominator():
    forecast = torch.tensor([3.0, -3.0], requires_grad=True)
    smape_loss(forecast, torch.tensor([1.0, 1.0])).backward()
    assert_same(forecast.grad, torch.tensor([25.0, -25.0]))  # 200 sign(F - Y) / (|F| + |Y|) / 2 entries


def test_losses_and_gradients_are_finite_at_zero():
    zero = torch.zeros(2, 3, requires_grad=True)
    total = smape_loss(zero, torch.zeros(2, 3)) + mape_loss(zero, torch.zeros(2, 3))
    total = total + mase_loss(zero, torch.zeros(2, 3), torch.ones(2, 5))
    total.backward()
    assert total.item() == 0
    assert zero.grad.isfinite().all()


def test_gradcheck_of_losses():
    forecast, target, history = randn(2, 4, seed=1), randn(2, 4, seed=2), randn(2, 9, seed=3)
    assert torch.autograd.gradcheck(lambda f, t: mape_loss(f, t), (forecast, target))
    assert torch.autograd.gradcheck(lambda f, t, h: mase_loss(f, t, h, season=2), (forecast, target, history))


# Anomalies


def loop(flags, truth):
    """Walk each true segment and flag it whole if it has a flag."""
    flags, start = list(flags), 0
    while start < len(truth):
        stop = start
        while stop < len(truth) and truth[stop]:
            stop += 1
        if any(flags[start:stop]):
            flags[start:stop] = [1] * (stop - start)
        start = max(stop, start + 1)
    return flags


@pytest.mark.parametrize("seed", range(20))
def test_point_adjustment_agrees_with_a_loop(seed):
    generator = np.random.default_rng(seed)
    truth = np.repeat(generator.random(30) < 0.4, generator.integers(1, 5, 30)).astype(int)
    flags = (generator.random(len(truth)) < 0.15).astype(int)
    assert point_adjust(flags, truth).astype(int).tolist() == loop(flags, truth)


def test_point_adjustment_at_the_edges():
    assert point_adjust([1, 0, 0, 0, 1], [1, 1, 0, 1, 1]).tolist() == [True, True, False, True, True]
    assert point_adjust([0, 0], [1, 1]).tolist() == [False, False]
    assert point_adjust([], []).tolist() == []


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smape([1.0], [1.0, 2.0]), r"must have one shape, got \(1,\) and \(2,\)"),
        (
            lambda: mase([1.0], [1.0], [1.0, 2.0], season=2),
            "L > 2",
        ),
        (lambda: owa(1.0, 1.0, 0.0, 1.0), "`naive_smape` must be a positive number"),
        (lambda: m4_summary({}, {}, {}), "`forecasts` holds no frequency"),
        (lambda: m4_summary({"Yearli": [[1.0]]}, {}, {}), "Unknown M4 frequency 'Yearli'. Did you mean 'Yearly'"),
        (
            lambda: m4_summary({"Yearly": [[1.0]]}, {}, {}),
            r"Yearly: needs one entry a series everywhere, got \[1, 0, 0\]",
        ),
        (lambda: naive2([], 3), r"`history` must have shape \(L,\) with L > 0, got \(0,\)"),
        (lambda: naive2([1.0, np.nan], 3), "`history` must be finite"),
        (lambda: naive2(series(48, 12) - 8, 3, season=12), "`history` must be positive to be decomposed"),
        (lambda: naive2([1.0], 0), "`horizon` must be a positive integer"),
        (lambda: smape_loss(torch.ones(2), torch.ones(3)), "`forecast`, `target` and `mask` must have one shape"),
        (lambda: mase_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1)), "`insample` must have shape"),
        (lambda: point_adjust([0, 1], [0]), r"must have one shape \(L,\), got \(2,\) and \(1,\)"),
        (lambda: point_adjust([0, 2], [0, 1]), "`flags` must hold only 0 and 1"),
        (lambda: point_adjust([0, 1], [[0, 1]]), r"`truth` must have shape \(L,\), got \(1, 2\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
