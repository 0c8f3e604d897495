"""Tasks on tables: splits, scaling, scores by hand, and comparisons from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import norm

from dynakern.compare import run_comparison, write_report
from dynakern.data import sample
from dynakern.data.tables import SampleTable, read_sample_table
from dynakern.tasks.classify import ClassifyTask
from dynakern.tasks.density import DensityTask
from dynakern.tasks.regress import RegressTask
from dynakern.tasks.tabular import _pack, _spectrum, _unpack
from dynakern.train import Budget
from tests.test_cli import run, run_here

WINE = read_sample_table("sklearn:wine")


def table(n=60, target="numbers", seed=0):
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=(n, 3)), np.ones((n, 1))], 1)
    y = {"numbers": 5 + 2 * x[:, 0], "labels": np.where(x[:, 0] > 0, "yes", "no"), None: None}[target]
    return SampleTable(x, ("a", "b", "c", "one"), y, None, "toy")


def test_scaling_and_split_use_the_training_part_alone():
    task = RegressTask(table())
    x, rows = task.part(test=False)
    assert x.shape == (45, 3)  # the constant feature is gone
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(x.std(0), 1)
    assert not set(rows) & set(task.part(test=True)[1])
    capped = RegressTask(table(), max_rows=20)
    assert capped.is_train.sum() == 20
    assert (capped.is_test == task.is_test).all()
    assert capped.settings() != task.settings()


def test_regression_scores_by_hand():
    class Known:
        def fit(self, x, y):
            return self

        def predict(self, x, return_std=False):
            mean = np.zeros(len(x))
            return (mean, np.full(len(x), 0.5)) if return_std else mean

    task = RegressTask(table())
    x, rows = task.part(test=True)
    y = task.data.target[rows]
    mean, deviation = task.scale
    metrics, _ = task._score(Known(), x, rows)
    assert metrics["rmse"] == pytest.approx(np.sqrt(np.mean((y - mean) ** 2)))
    assert metrics["nll"] == pytest.approx(-norm(mean, 0.5 * deviation).logpdf(y).mean())
    inside = np.abs(y - mean) <= 1.959963984540054 * 0.5 * deviation
    assert metrics["coverage_gap"] == pytest.approx(abs(inside.mean() - 0.95))


def test_a_distribution_is_scored_by_itself():
    class Dist:
        mean = np.zeros(15)

        def log_prob(self, y):
            return norm(0, 2).logpdf(y)

        def interval(self, share):
            assert share == 0.95
            return np.full(15, -9.0), np.full(15, 9.0)

    class Estimator:
        def predict_dist(self, x):
            return Dist()

    task = RegressTask(table())
    x, rows = task.part(test=True)
    metrics, _ = task._score(Estimator(), x, rows)
    expected = -norm(0, 2).logpdf(task._targets(rows)).mean() + np.log(task.scale[1])
    assert metrics["nll"] == pytest.approx(expected)
    assert metrics["coverage_gap"] == pytest.approx(0.05)


def test_density_scores_by_hand():
    task = DensityTask(table(target=None))
    x, rows = task.part(test=True)
    metrics, drawn = task._score(task._fit("normal", 0, task.part(test=False)[1]), x, rows)
    assert metrics["nll_per_feature"] == pytest.approx(-drawn.mean() / 3)
    assert metrics["worst_tenth"] > metrics["nll_per_feature"]
    assert metrics["nll_per_feature"] == pytest.approx(0.5 * np.log(2 * np.pi * np.e), abs=0.4)


def test_classifiers_without_probabilities_are_calibrated_and_unseen_classes_get_none():
    task = ClassifyTask(WINE)
    svm = task._fit("rbf-svm", 0, task.part(test=False)[1])
    probabilities = task._predict(svm, task.part(test=True)[0])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    rows = task.part(test=False)[1]
    few = task._fit("logistic", 0, rows[task._targets(rows) > 0])
    assert (task._predict(few, task.scaled[:4])[:, 0] == 0).all()


def test_spectrum_and_packing():
    class Fitted:
        @staticmethod
        def kernel_(x):
            return x @ x.T

    values = _spectrum(Fitted(), np.eye(5))
    np.testing.assert_allclose(values, 0.2)
    assert len(_spectrum(object(), np.eye(5))) == 0
    parts = _unpack(_pack(np.arange(3), np.empty(0), np.ones((2, 2))))
    assert [len(part) for part in parts] == [3, 0, 4]
    np.testing.assert_array_equal(parts[0], [0, 1, 2])


@pytest.mark.parametrize("kind", ["classify", "regress", "density"])
def test_comparison_from_end_to_end(tmp_path, kind):
    task = {
        "classify": lambda: ClassifyTask(WINE),
        "regress": lambda: RegressTask(read_sample_table(sample("uci/yacht.txt"))),
        "density": lambda: DensityTask(read_sample_table("sklearn:iris", supervised=False)),
    }[kind]()
    comparison = run_comparison(task, out=tmp_path, systems=[], seeds=1, budget=Budget(epochs=1))
    assert not comparison.failed
    assert [s.competitor for s in comparison.summaries if s.is_baseline] == [s.competitor for s in comparison.summaries]
    text = write_report(comparison, tmp_path / "report.html", command="x").read_text()
    assert "learning curve" in text or "<svg" in text
    headline = task.headline
    best = min(s.metrics[headline][0] for s in comparison.summaries)
    limit = {"classify": 0.1, "regress": 2.0, "density": 1.2}[kind]  # yacht has a standard deviation of 15
    assert best < limit


def test_command_line(tmp_path, monkeypatch, capsys):
    tools = {"monkeypatch": monkeypatch, "capsys": capsys}
    done = run("compare", "classify", "sklearn:iris", "--seeds", 1, "--systems", "logistic", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["competitor"] for row in found["results"]} == {"logistic", "rbf-svm", "boosting"}
    assert (tmp_path / "dynakern-compare-iris" / "report.html").is_file()
    code, err = run_here("compare", "regress", "sklearn:iris", **tools)
    assert code == 2
    assert "a column of numbers to predict is needed" in err
    code, err = run_here("run", "s4d", **tools)
    assert code == 2
    assert "'s4d' has no use of its own on the command line" in err
    assert run_here("run", "no_such", **tools)[0] == 2


def test_refusals():
    with pytest.raises(ValueError, match="at least 8 training rows are needed, got 7"):
        RegressTask(table(n=9))
    with pytest.raises(ValueError, match=r"too few of: .*is a matter of `dynakern compare regress`"):
        ClassifyTask(table())
    with pytest.raises(ValueError, match="a column to predict is needed"):
        ClassifyTask(table(target=None))
    with pytest.raises(ValueError, match="`max_rows` must be a positive integer"):
        DensityTask(table(target=None), max_rows=0)
    constant = SampleTable(np.ones((20, 2)), ("a", "b"), np.arange(20.0), None, "toy")
    with pytest.raises(ValueError, match="every feature is constant"):
        RegressTask(constant)
    flat = SampleTable(table().features, ("a", "b", "c", "one"), np.ones(60), None, "toy")
    with pytest.raises(ValueError, match="the value to predict is constant"):
        RegressTask(flat)
    with pytest.raises(ValueError, match="at least 2 classes are needed, got 1"):
        ClassifyTask(flat)
    with pytest.raises(ValueError, match=r"Unknown system 'rigde'\. Did you mean 'ridge'"):
        RegressTask(table()).build("rigde", 0)
