"""Classifying series as a task: split, padding, scores, competitors and their costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from dynakern import train
from dynakern.checks import check_choice, check_positive, unknown_name
from dynakern.data.labelled import LabelledSeries, log_spectrogram
from dynakern.tasks.classification import (
    NetworkClassifier,
    draw_confusion,
    fit_and_score,
    measured_cost,
    stratified_quarter,
)
from dynakern.tasks.classify_series import SeriesClassifier
from dynakern.tasks.forecast import Cost, FitReport, Outcome, Progress
from dynakern.tasks.networks import systems_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClassifySeriesTask", "SeriesCompetitor"]


class SeriesCompetitor(Protocol):
    """What competes: fitted once on labelled series, then asked for class probabilities."""

    def fit(
        self,
        X: list[np.ndarray],
        y: np.ndarray,
        *,
        seed: int,
        budget: train.Budget,
        device: str | None,
        progress: Progress | None,
    ) -> FitReport:
        """Train on series ``(L_i, C)`` with class numbers ``(N,)``."""
        ...

    def predict_proba(self, X: list[np.ndarray]) -> np.ndarray:
        """Return class probabilities, ``(N, classes)``, columns in order of class number."""
        ...


@dataclass(frozen=True)
class ClassifySeriesTask:
    """One problem of classifying series.

    The published test part is used where the data has one, else a stratified quarter, the same for all competitors.
    Every channel is standardised by the training series.

    Attributes:
        data: The labelled series.
        features: ``"raw"``, or ``"spectrogram"``: the logarithm of the power in bands of short windows.
        max_length: Longer series are averaged over blocks of equal size until none is longer; off by default.
    """

    data: LabelledSeries
    features: Literal["raw", "spectrogram"] = "raw"
    max_length: int | None = None

    name = "classify-series"
    headline = "error"
    item = "series"

    def __post_init__(self) -> None:
        check_choice("features", self.features, ("raw", "spectrogram"))
        if self.max_length is not None:
            check_positive("max_length", self.max_length, integer=True)
        counts = {label: int((self.data.labels[~self.is_test] == label).sum()) for label in self.classes}
        rare = [label for label, count in counts.items() if count < 2]
        if rare:
            raise ValueError(
                f"{self.data.source}: every class needs at least 2 training series, too few of: {', '.join(rare)}."
            )

    @cached_property
    def classes(self) -> list[str]:
        """The class labels, sorted; a class number is a place in this list."""
        return sorted(set(self.data.labels.tolist()))

    @cached_property
    def is_test(self) -> np.ndarray:
        """Which series are the test part, ``(N,)``."""
        if self.data.is_test is not None:
            return self.data.is_test
        return stratified_quarter(self.data.labels)

    @cached_property
    def prepared(self) -> list[np.ndarray]:
        """The series as the competitors see them: features, blocks, standardised; ``(L_i, C)`` each."""
        rows = self.data.series
        if self.features == "spectrogram":
            rows = [log_spectrogram(row) for row in rows]
        longest = max(len(row) for row in rows)
        block = 1 if self.max_length is None else -(-longest // self.max_length)
        if block > 1:
            rows = [_block_means(row, block) for row in rows]
        train_rows = np.concatenate([row for row, test in zip(rows, self.is_test, strict=True) if not test])
        mean, std = train_rows.mean(0), train_rows.std(0)
        std = np.where(std > 0, std, 1.0)
        return [(row - mean) / std for row in rows]

    @property
    def longest(self) -> int:
        """Steps of the longest series, training and test."""
        return max(len(row) for row in self.prepared)

    def part(self, *, test: bool) -> tuple[list[np.ndarray], np.ndarray]:
        """Return series and class numbers of the training or the test part."""
        chosen = np.flatnonzero(self.is_test == test)
        numbers = np.array([self.classes.index(label) for label in self.data.labels])
        return [self.prepared[i] for i in chosen], numbers[chosen]

    # What `dynakern compare` asks of a task.

    def settings(self) -> dict[str, str]:
        """Return what makes two comparisons the same, as text."""
        digest = hashlib.sha256()
        for row, label in zip(self.data.series, self.data.labels, strict=True):
            digest.update(row.tobytes())
            digest.update(str(label).encode())
        return {
            "task": self.name,
            "data": digest.hexdigest()[:16],
            "classes": str(len(self.classes)),
            "features": self.features,
            "max_length": str(self.max_length),
        }

    def describe(self) -> str:
        """Return the problem in a sentence."""
        lengths, channels = [len(row) for row in self.prepared], self.prepared[0].shape[1]
        span = f"{min(lengths)}" if min(lengths) == max(lengths) else f"{min(lengths)} to {max(lengths)}"
        how = "published" if self.data.is_test is not None else "stratified"
        return (
            f"{len(self.classes)} classes of series of {span} steps and {channels} channel(s); "
            f"{int((~self.is_test).sum())} training and {int(self.is_test.sum())} test series ({how} split)"
        )

    def notes(self) -> str:
        """Return what the columns mean, for the report."""
        return (
            "error is the fraction of test series classified wrongly, balanced error its mean over classes, log loss "
            "the mean negative log-probability of the true class."
        )

    def competitors(self) -> list[str]:
        """Return the names of everything that can compete: baselines first, then systems of the catalogue."""
        return [*self.baselines(), *systems_for(self.name)]

    def baselines(self) -> list[str]:
        """Return the names of the baselines."""
        from dynakern.tasks.classify_series_baselines import BASELINES

        return list(BASELINES)

    def is_deterministic(self, name: str) -> bool:
        """Whether a competitor gives the same result for every seed, so that one job is enough."""
        return name == "dtw_1nn"

    def build(self, name: str) -> SeriesCompetitor:
        """Return an unfitted competitor.

        Raises:
            ValueError: Nothing of this name competes; the message suggests the nearest.
        """
        from dynakern.tasks.classify_series_baselines import BASELINES

        if name in BASELINES:
            return BASELINES[name](self.longest)
        if name not in self.competitors():
            raise ValueError(unknown_name("system", name, self.competitors()))
        return NetworkClassifier(SeriesClassifier(name, length=self.longest))

    def run(
        self, name: str, *, seed: int, budget: train.Budget, device: str | None = None, progress: Progress | None = None
    ) -> Outcome:
        """Train one competitor with one seed and score it on the test series."""
        return fit_and_score(self, name, seed=seed, budget=budget, device=device, progress=progress)

    def draw(self, predictions: dict[str, np.ndarray]) -> Figure:
        """Draw the confusion matrices of the best three competitors.

        Args:
            predictions: Competitor to its predicted class numbers of the test series.
        """
        return draw_confusion(predictions, self.part(test=True)[1], self.classes)

    def cost(self, name: str, *, seed: int, weights: bytes | None, device: str | None = None) -> Cost:
        """Measure what a trained competitor costs to use; baselines without a network are fitted again first."""
        return measured_cost(self, name, seed=seed, weights=weights, device=device)


def _block_means(row: np.ndarray, block: int) -> np.ndarray:
    """Return means over blocks of steps; the last block may be shorter."""
    starts = np.arange(0, len(row), block)
    sizes = np.diff(np.append(starts, len(row)))
    return np.add.reduceat(row, starts, axis=0) / sizes[:, None]


BaselineFactory = Callable[[int], SeriesCompetitor]
