"""Classifying series as a task: splits, preparation, scores, baselines, and the comparison from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dynakern.compare import run_comparison, write_report
from dynakern.data.labelled import LabelledSeries
from dynakern.tasks.classify_series_baselines import BASELINES, RandomKernels
from dynakern.tasks.classify_series_task import ClassifySeriesTask
from dynakern.train import Budget
from tests.test_cli import run


def toy(n=60, seed=0, test=20):
    """Slow and fast waves of unequal length, two channels."""
    rng = np.random.default_rng(seed)
    labels = np.array(["slow", "fast"])[np.arange(n) % 2]
    series = []
    for label in labels:
        length, phase = int(rng.integers(30, 40)), rng.uniform(0, 6)
        speed = 0.3 if label == "slow" else 0.9
        wave = np.sin(speed * np.arange(length) + phase)
        series.append(
            np.stack([wave, 5 + 0.5 * rng.standard_normal(length)], 1) + 0.2 * rng.standard_normal((length, 2))
        )
    is_test = None if test is None else np.arange(n) >= n - test
    return LabelledSeries(series, labels, is_test, "toy")


def test_published_and_stratified_split():
    task = ClassifySeriesTask(toy())
    assert task.classes == ["fast", "slow"]
    assert [len(task.part(test=t)[0]) for t in (False, True)] == [40, 20]
    task = ClassifySeriesTask(toy(test=None))
    _, y = task.part(test=True)
    assert np.bincount(y).tolist() == [8, 8]  # a rounded quarter of 30 each
    assert (ClassifySeriesTask(toy(test=None)).is_test == task.is_test).all()


def test_channels_are_standardised_by_the_training_part():
    task = ClassifySeriesTask(toy())
    rows = np.concatenate(task.part(test=False)[0])
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(rows.std(0), 1, rtol=1e-9)
    assert abs(np.concatenate(task.part(test=True)[0]).mean(0)).max() > 1e-6


def test_blocks_shorten_by_averaging():
    short = ClassifySeriesTask(toy(), max_length=20)
    assert max(len(row) for row in short.prepared) == 20
    constant = LabelledSeries([np.arange(5.0)[:, None]] * 8, np.array(["a", "b"] * 4), None, "x")
    assert len(ClassifySeriesTask(constant, max_length=2).prepared[0]) == 2
    assert ClassifySeriesTask(toy(), features="spectrogram").prepared[0].shape == (1, 48)


@pytest.mark.parametrize("name", [*BASELINES, "s4d"])
def test_every_kind_of_competitor_learns_the_toy(name):
    outcome = ClassifySeriesTask(toy()).run(name, seed=0, budget=Budget(epochs=40 if name == "lstm" else 10))
    assert outcome.metrics["error"] <= 0.15
    assert outcome.metrics["balanced error"] == pytest.approx(outcome.metrics["error"])  # equal classes
    assert outcome.drawn.shape == (20,)
    assert (outcome.weights is None) == (name in ("dtw_1nn", "random_kernels"))


def test_weights_travel_to_the_cost_measurement():
    task = ClassifySeriesTask(toy())
    outcome = task.run("lstm", seed=0, budget=Budget(epochs=2))
    copy = task.build("lstm")
    copy.load_bytes(task, outcome.weights)
    assert (copy.predict_proba(task.part(test=True)[0]).argmax(1) == outcome.drawn).all()
    cost = task.cost("lstm", seed=0, weights=outcome.weights)
    assert cost.parameters == 2 * 4 * 64 * (2 + 64 + 2) + 2 * (128 + 1)
    assert cost.flops > 2 * 30 * 2 * 4 * 64 * (2 + 64)
    assert task.cost("dtw_1nn", seed=0, weights=None).flops is None


def test_random_kernels_follow_their_definition():
    model = RandomKernels(kernels=50)
    series = [np.random.default_rng(i).standard_normal((25, 2)) for i in range(3)]
    model._draw(25, 2, np.random.default_rng(0))
    features = model._features(series)
    assert features.shape == (3, 100)
    column = 0
    for (size, dilation, padded), (weight, bias) in model.groups.items():
        pad = (size - 1) * dilation // 2 if padded else 0
        x = np.pad(series[1], ((pad, pad), (0, 0)))
        steps = len(x) - (size - 1) * dilation
        for w, b in zip(weight.numpy(), bias.numpy(), strict=True):
            y = [b + sum(w[c, j] * x[t + j * dilation, c] for c in range(2) for j in range(size)) for t in range(steps)]
            assert features[1, column] == pytest.approx(max(y), rel=1e-4)
            column += 1
        share = column + len(weight) - 1
        assert features[1, share] == pytest.approx(np.mean(np.array(y) > 0))
        column = share + 1
    assert abs(np.concatenate([w.numpy().sum(-1).ravel() for w, _ in model.groups.values()])).max() < 1e-4


def test_refusals():
    data = toy(4, test=2)
    with pytest.raises(ValueError, match="at least 2 training series, too few of: fast, slow"):
        ClassifySeriesTask(data)
    with pytest.raises(ValueError, match="Did you mean 'spectrogram'"):
        ClassifySeriesTask(toy(), features="spectogram")
    with pytest.raises(ValueError, match="`max_length` must be a positive"):
        ClassifySeriesTask(toy(), max_length=0)
    with pytest.raises(ValueError, match="Did you mean 'lstm'"):
        ClassifySeriesTask(toy()).build("lsmt")


def test_comparison_and_report(tmp_path):
    comparison = run_comparison(ClassifySeriesTask(toy()), out=tmp_path, systems=[], seeds=1, budget=Budget(epochs=3))
    assert {s.competitor for s in comparison.summaries} == set(BASELINES)
    html = write_report(comparison, tmp_path / "report.html", command="x").read_text()
    assert "balanced error" in html
    assert "latency of one series" not in html.split("<svg")[0]
    assert html.count("<svg") == 2


def test_from_the_command_line(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    X = np.sin(np.arange(30) * (0.3 + 0.6 * y[:, None]) + rng.uniform(0, 6, (40, 1)))
    np.savez(tmp_path / "toy.npz", X=X, y=y)
    argv = [
        "compare",
        "classify-series",
        tmp_path / "toy.npz",
        "--systems",
        "timesnet",
        "--budget",
        "2ep",
        "--seeds",
        1,
    ]
    result = run(*argv, "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert {row["competitor"] for row in document["results"]} == {*BASELINES, "timesnet"}
    assert document["results"][0]["metrics"]["error"]["mean"] <= 0.5
    refused = run("compare", "classify-series", tmp_path / "nothing.ts")
    assert refused.returncode == 2
    assert "No file or folder" in refused.stderr
