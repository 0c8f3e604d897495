"""The forecasting task: splits, scaling, windows, scores, baselines, costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynakern.data import sample
from dynakern.data.series import SeriesTable, read_series_csv
from dynakern.tasks.forecast import ForecastTask, NetworkForecaster, split_rows
from dynakern.tasks.forecast_baselines import BASELINES, DecompositionLinear
from dynakern.train import Budget


@pytest.fixture(scope="module")
def ett():
    return ForecastTask(read_series_csv(sample("ETTh1.csv")), context=96, horizon=96, protocol="ett")


def hourly(rows=600, channels=2, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(rows)
    values = np.stack([np.sin(2 * np.pi * t / 24 + c) + 0.1 * rng.standard_normal(rows) for c in range(channels)], 1)
    times = np.datetime64("2024-01-01", "s") + t * np.timedelta64(3600, "s")
    return SeriesTable(values, tuple("abcdef"[:channels]), times, "test")


def test_ett_protocol_is_that_of_the_literature(ett):
    assert ett.rows == {"train": (0, 8640), "validation": (8544, 11520), "test": (11424, 14400)}
    # No window is dropped, the last incomplete batch of the published runs included.
    assert [len(ett.starts(s)) for s in ("train", "validation", "test")] == [8449, 2785, 2785]
    np.testing.assert_allclose(ett.mean, [7.9377, 2.021, 5.0798, 0.7462, 2.7818, 0.7885, 17.1283], rtol=1e-4)
    np.testing.assert_allclose(ett.std, [5.8127, 2.0901, 5.5188, 1.9264, 1.0235, 0.6302, 9.1765], rtol=1e-4)
    last = ett.starts("test")[-1]
    assert last + 96 + 96 == 14400
    np.testing.assert_allclose(
        ett.targets(np.array([last]))[0, -1] * ett.std + ett.mean, ett.table.values[14399], rtol=1e-5
    )
    quarter = split_rows(70000, context=96, protocol="ett", step_seconds=900)
    assert quarter["test"] == (4 * 11520 - 96, 4 * 14400)


def test_ratio_split():
    assert split_rows(1000, context=10, protocol="ratio") == {
        "train": (0, 700),
        "validation": (690, 800),
        "test": (790, 1000),
    }


def test_windows_targets_and_marks_are_aligned():
    task = ForecastTask(hourly(), context=48, horizon=24)
    starts = task.starts("test")[[0, 5]]
    x, marks = task.inputs(starts)
    assert x.shape == (2, 48, 2)
    assert marks.shape == (2, 72, 4)
    np.testing.assert_array_equal(x[1, 0], task.values[starts[0] + 5])
    np.testing.assert_array_equal(task.targets(starts)[0, 0], task.values[starts[0] + 48])
    hour = (marks[0, 1:, 0] - marks[0, :-1, 0]) * 23
    assert set(np.round(hour).astype(int)) == {1, -23}


def test_score_of_known_forecasts():
    task = ForecastTask(hourly(), context=48, horizon=24)
    assert task.score(task.targets) == {"mse": 0.0, "mae": 0.0}
    assert task.score(lambda starts: task.targets(starts) + 2.0) == pytest.approx({"mse": 4.0, "mae": 2.0}, rel=1e-6)


def test_seasonal_naive_is_exact_on_a_period():
    t = np.arange(600)
    times = np.datetime64("2024-01-01", "s") + t * np.timedelta64(3600, "s")
    task = ForecastTask(SeriesTable(np.sin(2 * np.pi * t / 24)[:, None], ("x",), times, "t"), context=48, horizon=60)
    assert task.season == 24
    assert task.run("seasonal_naive", seed=0, budget=Budget(epochs=1)).metrics["mse"] < 1e-10
    assert task.run("repeat_last", seed=0, budget=Budget(epochs=1)).metrics["mse"] > 0.5


def test_seasonal_naive_needs_its_season():
    task = ForecastTask(hourly(), context=20, horizon=8)
    with pytest.raises(ValueError, match="season of 24 steps is longer than the context of 20"):
        task.run("seasonal_naive", seed=0, budget=Budget(epochs=1))


def test_learned_baselines_beat_the_naive_ones():
    task = ForecastTask(hourly(900), context=48, horizon=24)
    scores = {name: task.run(name, seed=0, budget=Budget(epochs=8)).metrics["mse"] for name in BASELINES}
    assert scores["linear"] < scores["seasonal_naive"] < scores["repeat_last"]
    assert scores["gradient_boosting"] < scores["repeat_last"]


def test_decomposition_linear_formula():
    torch.manual_seed(0)
    model, x = DecompositionLinear(context=30, horizon=5, window=5), torch.randn(2, 30, 3)
    padded = np.pad(x.numpy(), ((0, 0), (2, 2), (0, 0)), mode="edge")
    trend = np.stack([padded[:, i : i + 30] for i in range(5)]).mean(0)
    with torch.no_grad():
        for linear in (model.trend, model.rest):
            torch.nn.init.normal_(linear.weight)
        want = np.einsum("hl,blc->bhc", model.trend.weight.numpy(), trend)
        want += np.einsum("hl,blc->bhc", model.rest.weight.numpy(), x.numpy() - trend)
        want += (model.trend.bias + model.rest.bias).numpy()[None, :, None]
        np.testing.assert_allclose(model(x).numpy(), want, rtol=1e-4, atol=1e-5)


def test_weights_travel_and_costs_are_measured():
    task = ForecastTask(hourly(), context=48, horizon=24)
    outcome = task.run("linear", seed=0, budget=Budget(epochs=1))
    copy = NetworkForecaster(BASELINES["linear"]().system)
    copy.load_bytes(task, outcome.weights)
    np.testing.assert_array_equal(copy.predict(task, task.drawn_windows()), outcome.drawn)
    cost = task.cost("linear", seed=0, weights=outcome.weights)
    assert cost.parameters == 2 * (48 * 24 + 24)
    assert cost.flops == 2 * 2 * 48 * 24 * 2  # two maps, multiply and add, two series
    assert cost.latency_ms > 0
    naive = task.cost("repeat_last", seed=0, weights=None)
    assert naive.parameters is None
    assert naive.flops is None


def test_same_seed_same_scores_other_seed_other_scores():
    task = ForecastTask(hourly(), context=48, horizon=24)
    runs = [task.run("gradient_boosting", seed=s, budget=Budget(epochs=1)).metrics["mse"] for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_refusals():
    with pytest.raises(ValueError, match=r"too short: the validation part has 108 of 600 rows.*= 150"):
        ForecastTask(hourly(), context=48, horizon=102)
    with pytest.raises(ValueError, match="needs 14400 rows"):
        ForecastTask(hourly(), context=48, horizon=24, protocol="ett")
    with pytest.raises(ValueError, match="needs timestamps"):
        ForecastTask(SeriesTable(np.zeros((20000, 1)), ("x",), None, "t"), protocol="ett")
    with pytest.raises(ValueError, match="Did you mean 'ratio'"):
        ForecastTask(hourly(), protocol="ration")
    with pytest.raises(ValueError, match="`horizon` must be a positive integer, got 0"):
        ForecastTask(hourly(), horizon=0)
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        ForecastTask(hourly(), context=48, horizon=24).build("liner")
