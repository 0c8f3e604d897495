"""Classifying images as a task: split, scores, competitors at equal size, and their costs."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from dynakern import measure, train
from dynakern.catalog import find_system
from dynakern.checks import check_choice, unknown_name
from dynakern.data.images import LabelledImages
from dynakern.models import import_string
from dynakern.tasks.classification import (
    NetworkClassifier,
    draw_confusion,
    fit_and_score,
    measured_cost,
    stratified_quarter,
)
from dynakern.tasks.classify_images import Augment, ImageClassifier
from dynakern.tasks.forecast import Cost, FitReport, Outcome, Progress
from dynakern.tasks.networks import Factory, systems_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClassifyImagesTask", "ImageCompetitor", "Match", "matched_width"]


class ImageCompetitor(Protocol):
    """What competes: fitted once on labelled images, then asked for class probabilities."""

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        *,
        seed: int,
        budget: train.Budget,
        device: str | None,
        progress: Progress | None,
    ) -> FitReport:
        """Train on images ``(N, C, H, W)`` with class numbers ``(N,)``."""
        ...

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return class probabilities, ``(N, classes)``, columns in order of class number."""
        ...


class Match(NamedTuple):
    """A size that all networks are brought to.

    Attributes:
        quantity: ``"parameters"``, or ``"flops"`` of one image.
        target: How many.
    """

    quantity: Literal["parameters", "flops"]
    target: float

    @classmethod
    def parse(cls, text: str) -> Match:
        """Read ``"parameters:300k"`` or ``"flops:20M"``.

        Raises:
            ValueError: The text is neither.
        """
        found = re.fullmatch(r"(parameters|flops):([0-9.]+)([kMG]?)", text)
        if found is None:
            raise ValueError(f"`match` must read like parameters:300k or flops:20M, got {text!r}.")
        quantity, number, unit = found.groups()
        target = float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit]
        if target <= 0:
            raise ValueError(f"`match` must be positive, got {text!r}.")
        return cls("flops" if quantity == "flops" else "parameters", target)


def matched_width(factory: Factory, match: Match, *, in_chans: int, img_size: int, num_classes: int) -> float:
    """Return the factor on a network's channels that brings it closest to a size.

    Args:
        factory: ``f(*, in_chans, img_size, num_classes, width) -> Module``.
        match: The size.
        in_chans: Channels of the images.
        img_size: Side of the images.
        num_classes: Number of classes.

    Raises:
        ValueError: The factory takes no ``width``.
    """
    if "width" not in inspect.signature(factory).parameters:
        raise ValueError(f"{getattr(factory, '__module__', factory)} has no width to match sizes by.")

    def size(width: float) -> float:
        with torch.random.fork_rng():
            network = factory(in_chans=in_chans, img_size=img_size, num_classes=num_classes, width=width).eval()
        if match.quantity == "parameters":
            return measure.count_parameters(network)
        with torch.no_grad():
            return measure.count_flops(lambda: network(torch.zeros(1, in_chans, img_size, img_size))) or math.nan

    low, high, tried = math.log(1 / 8), math.log(8), {}
    for _ in range(10):  # channels are whole numbers, so that a finer search finds nothing new
        middle = (low + high) / 2
        tried[middle] = size(math.exp(middle))
        low, high = (middle, high) if tried[middle] < match.target else (low, middle)
    return math.exp(min(tried, key=lambda w: abs(math.log(tried[w] / match.target))))


@dataclass(frozen=True)
class ClassifyImagesTask:
    """One problem of classifying images.

    The published test part is used where the data has one, else a stratified quarter, the same for all competitors.

    Attributes:
        data: The labelled images.
        augment: See :class:`~dynakern.tasks.ImageClassifier`.
        match: Bring all networks to this size; each as it comes by default.
    """

    data: LabelledImages
    augment: Augment = "none"
    match: Match | None = None

    name = "classify-images"
    headline = "error"
    item = "image"

    def __post_init__(self) -> None:
        check_choice("augment", self.augment, ("none", "shift", "shift-flip"))
        counts = {label: int((self.data.labels[~self.is_test] == label).sum()) for label in self.classes}
        rare = [label for label, count in counts.items() if count < 2]
        if rare:
            raise ValueError(
                f"{self.data.source}: every class needs at least 2 training images, too few of: {', '.join(rare)}."
            )

    @cached_property
    def classes(self) -> list[str]:
        """The class labels, sorted; a class number is a place in this list."""
        return sorted(set(self.data.labels.tolist()))

    @cached_property
    def is_test(self) -> np.ndarray:
        """Which images are the test part, ``(N,)``."""
        return stratified_quarter(self.data.labels) if self.data.is_test is None else self.data.is_test

    def part(self, *, test: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return images ``(N, C, H, W)`` and class numbers of the training or the test part."""
        chosen = self.is_test == test
        return self.data.images[chosen], np.searchsorted(self.classes, self.data.labels[chosen])

    # What `dynakern compare` asks of a task.

    def settings(self) -> dict[str, str]:
        """Return what makes two comparisons the same, as text."""
        digest = hashlib.sha256(self.data.images.tobytes())
        digest.update("\n".join(self.data.labels.tolist()).encode())
        return {
            "task": self.name,
            "data": digest.hexdigest()[:16],
            "classes": str(len(self.classes)),
            "augment": self.augment,
            "match": "none" if self.match is None else f"{self.match.quantity} {self.match.target:g}",
        }

    def describe(self) -> str:
        """Return the problem in a sentence."""
        _, channels, height, width = self.data.images.shape
        how = "published" if self.data.is_test is not None else "stratified"
        return (
            f"{len(self.classes)} classes of images of {height} x {width} pixels and {channels} channel(s); "
            f"{int((~self.is_test).sum())} training and {int(self.is_test.sum())} test images ({how} split)"
        )

    def notes(self) -> str:
        """Return what the columns mean, for the report."""
        sizes = ""
        if self.match is not None:
            sizes = f" All networks were brought to about {self.match.target:g} {self.match.quantity}."
        return (
            "error is the fraction of test images classified wrongly, balanced error its mean over classes, log loss "
            f"the mean negative log-probability of the true class.{sizes}"
        )

    def competitors(self) -> list[str]:
        """Return the names of everything that can compete: baselines first, then systems of the catalogue."""
        return [*self.baselines(), *systems_for(self.name)]

    def baselines(self) -> list[str]:
        """Return the names of the baselines."""
        from dynakern.tasks.classify_images_baselines import BASELINES

        return list(BASELINES)

    def is_deterministic(self, name: str) -> bool:
        """Whether a competitor gives the same result for every seed, so that one job is enough."""
        return name == "logistic"

    def build(self, name: str) -> Any:
        """Return an unfitted competitor.

        Raises:
            ValueError: Nothing of this name competes; the message suggests the nearest.
        """
        from dynakern.tasks.classify_images_baselines import BASELINES, LogisticPixels

        if name not in self.competitors():
            raise ValueError(unknown_name("system", name, self.competitors()))
        factory = BASELINES[name] if name in BASELINES else import_string(find_system(name).tasks[self.name])
        if factory is LogisticPixels:
            return LogisticPixels()
        classifier = ImageClassifier(factory, augment=self.augment)
        if self.match is not None:
            classifier._shape = self.data.images.shape[1:]
            sizes = {"in_chans": self.data.images.shape[1], "img_size": classifier._side()}
            classifier.width = matched_width(factory, self.match, **sizes, num_classes=len(self.classes))
        return NetworkClassifier(classifier)

    def run(
        self, name: str, *, seed: int, budget: train.Budget, device: str | None = None, progress: Progress | None = None
    ) -> Outcome:
        """Train one competitor with one seed and score it on the test images."""
        return fit_and_score(self, name, seed=seed, budget=budget, device=device, progress=progress)

    def draw(self, predictions: dict[str, np.ndarray]) -> Figure:
        """Draw the confusion matrices of the best three competitors.

        Args:
            predictions: Competitor to its predicted class numbers of the test images.
        """
        return draw_confusion(predictions, self.part(test=True)[1], self.classes)

    def cost(self, name: str, *, seed: int, weights: bytes | None, device: str | None = None) -> Cost:
        """Measure what a trained competitor costs to use; baselines without a network are fitted again first."""
        return measured_cost(self, name, seed=seed, weights=weights, device=device)
