"""What tasks that classify share: the split, the scores, the picture, and a network as a competitor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dynakern import measure, train
from dynakern.tasks.forecast import Cost, FitReport, Outcome, Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "NetworkClassifier",
    "classification_scores",
    "draw_confusion",
    "fit_and_score",
    "held_out",
    "measured_cost",
    "stratified_quarter",
]


def stratified_quarter(labels: np.ndarray) -> np.ndarray:
    """Return which samples, about a quarter of each class, are the test part where none is published: ``(N,)``."""
    rng, chosen = np.random.default_rng(0), np.zeros(len(labels), dtype=bool)
    for label in sorted(set(labels.tolist())):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: max(1, round(0.25 * len(members)))]] = True
    return chosen


def held_out(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which samples, a fraction of each class rounded down, are held out for validation: ``(N,)``."""
    held, rng = np.zeros(len(targets), dtype=bool), np.random.default_rng(seed)
    for label in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == label))
        held[members[: int(fraction * len(members))]] = True
    return held


def classification_scores(probabilities: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Return error, balanced error and log loss.

    Args:
        probabilities: ``(N, classes)``.
        y: Class numbers, ``(N,)``.

    Raises:
        FloatingPointError: A probability is not finite.
    """
    if not np.isfinite(probabilities).all():
        raise FloatingPointError("The probabilities are not finite.")
    predicted = probabilities.argmax(1)
    per_class = [float((predicted[y == c] != c).mean()) for c in np.unique(y)]
    return {
        "error": float((predicted != y).mean()),
        "balanced error": float(np.mean(per_class)),
        "log_loss": float(-np.log(probabilities[np.arange(len(y)), y].clip(1e-12)).mean()),
    }


def draw_confusion(predictions: dict[str, np.ndarray], y: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw the confusion matrices of the first three competitors.

    Args:
        predictions: Competitor to its predicted class numbers ``(N,)``.
        y: True class numbers, ``(N,)``.
        classes: Names of the classes.
    """
    from matplotlib.figure import Figure

    shown = dict(list(predictions.items())[:3])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    size = len(classes)
    for axis, (name, predicted) in zip(axes, shown.items(), strict=True):
        matrix = np.zeros((size, size))
        np.add.at(matrix, (y, predicted), 1)
        share = matrix / matrix.sum(1, keepdims=True).clip(1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("predicted")
        axis.set_xticks(range(size), classes, rotation=45 if size > 6 else 0, fontsize=8)
        axis.set_yticks(range(size), classes, fontsize=8)
        if size <= 12:
            for i, j in np.ndindex(size, size):
                color = "white" if share[i, j] > 0.5 else "0.2"
                axis.text(j, i, f"{int(matrix[i, j])}", ha="center", va="center", fontsize=8, color=color)
    axes[0].set_ylabel("true")
    return figure


class _Task(Protocol):
    def part(self, *, test: bool) -> tuple[Any, np.ndarray]: ...

    def build(self, name: str) -> Any: ...


class NetworkClassifier:
    """A deep network as a competitor, trained by one of the estimators of classification.

    Args:
        estimator: Unfitted :class:`~dynakern.tasks.SeriesClassifier` or :class:`~dynakern.tasks.ImageClassifier`.
    """

    def __init__(self, estimator: Any) -> None:
        self.model = estimator

    def fit(
        self,
        X: Any,
        y: np.ndarray,
        *,
        seed: int,
        budget: train.Budget,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> FitReport:
        """Train a network built from ``seed``; returns what it took."""
        started = time.perf_counter()
        self.model.set_params(budget=str(budget), device=device, random_state=seed)
        self.model._fit(X, y, progress)
        history = self.model.history_
        return FitReport(time.perf_counter() - started, len(history.epochs), history.steps)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return class probabilities, ``(N, classes)``."""
        return self.model.predict_proba(X)

    def to_bytes(self) -> bytes:
        """Return the network's weights as the content of a safetensors file."""
        from safetensors.torch import save

        return save({k: v.detach().cpu().contiguous() for k, v in self.model.network_.state_dict().items()})

    def load_bytes(self, task: _Task, weights: bytes, *, device: str | None = None) -> None:
        """Build the network for a task and load weights from :meth:`to_bytes`."""
        from safetensors.torch import load

        self.model._prepare(*task.part(test=False))
        self.model.network_ = self.model._build()
        self.model.network_.load_state_dict(load(weights))
        self.model.network_.to(device or "cpu").eval()


def fit_and_score(
    task: _Task, name: str, *, seed: int, budget: train.Budget, device: str | None, progress: Progress | None
) -> Outcome:
    """Train one competitor of a task with one seed and score it on the test part."""
    competitor = task.build(name)
    x, y = task.part(test=False)
    report = competitor.fit(x, y, seed=seed, budget=budget, device=device, progress=progress)
    x, y = task.part(test=True)
    probabilities = competitor.predict_proba(x)
    weights = competitor.to_bytes() if isinstance(competitor, NetworkClassifier) else None
    return Outcome(classification_scores(probabilities, y), report, weights, probabilities.argmax(1).astype(np.int64))


def measured_cost(task: _Task, name: str, *, seed: int, weights: bytes | None, device: str | None) -> Cost:
    """Measure what a trained competitor costs to use; baselines without a network are fitted again first."""
    competitor = task.build(name)
    if isinstance(competitor, NetworkClassifier) and weights is not None:
        competitor.load_bytes(task, weights, device=device)
    else:
        x, y = task.part(test=False)
        competitor.fit(x, y, seed=seed, budget=train.Budget(epochs=1), device=device, progress=None)
    test, _ = task.part(test=True)
    one, batch = test[:1], test[:32]
    timing = measure.time_interleaved({"predict": lambda: competitor.predict_proba(one)}, repeats=15, warmup=3)
    competitor.predict_proba(batch)
    memory_device = "cuda" if device and device.startswith("cuda") else "cpu"
    memory = measure.peak_memory(lambda: competitor.predict_proba(batch), device=memory_device)
    parameters = flops = None
    if isinstance(competitor, NetworkClassifier):
        parameters = measure.count_parameters(competitor.model.network_)
        flops = measure.count_flops(lambda: competitor.predict_proba(one))
    return Cost(parameters, flops, timing["predict"].median * 1e3, memory)
