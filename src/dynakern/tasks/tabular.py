"""What the tasks on tables share: the split, the scaling, learning curves, spectra, and estimators as competitors."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dynakern import measure
from dynakern.catalog import find_system
from dynakern.checks import check_positive, unknown_name
from dynakern.data.tables import SampleTable
from dynakern.models import import_string
from dynakern.tasks.forecast import Cost, FitReport, Outcome, Progress
from dynakern.tasks.networks import systems_for
from dynakern.train import Budget

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Factory", "TableTask"]

Factory = Callable[..., Any]
CURVE = (1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of the training part that the learning curve is drawn through
_SPECTRUM_ROWS = 200
_MOST_SHOWN = 5


@dataclass(frozen=True)
class TableTask:
    """One problem on a table of samples.

    The published test part is used where the table has one, else a quarter of the rows, the same for all competitors.
    Features are standardised with the statistics of the training part; constant ones are left out.

    A child names its metrics and baselines and says how to split, to fit on numbers and to score.

    Attributes:
        data: The table.
        max_rows: Train on at most this many rows, drawn at random once for all competitors.
    """

    data: SampleTable
    max_rows: int | None = None

    name: ClassVar[str]
    headline: ClassVar[str]
    item: ClassVar[str] = "row"

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            check_positive("max_rows", self.max_rows, integer=True)
        if int(self.is_train.sum()) < 8:
            raise ValueError(
                f"{self.data.source}: at least 8 training rows are needed, got {int(self.is_train.sum())}."
            )
        if self.kept.sum() == 0:
            raise ValueError(f"{self.data.source}: every feature is constant in the training part.")

    # What a child says.

    def _split(self) -> np.ndarray:
        """Return which rows are the test part, ``(N,)``, where the table has none."""
        chosen = np.zeros(len(self.data.features), dtype=bool)
        rows = np.random.default_rng(0).permutation(len(chosen))
        chosen[rows[: max(1, round(0.25 * len(chosen)))]] = True
        return chosen

    def _targets(self, rows: np.ndarray) -> np.ndarray | None:
        """Return what an estimator is fitted to on these rows."""
        return None

    def _score(self, estimator: Any, x: np.ndarray, rows: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        """Return the metrics on ``x`` ``(M, P)``, the scaled features of ``rows``, and what the report draws."""
        raise NotImplementedError

    def _draw(self, axes: Axes, name: str, drawn: np.ndarray) -> None:
        """Draw what :meth:`_score` kept."""
        raise NotImplementedError

    def _baselines(self) -> Mapping[str, Factory]:
        raise NotImplementedError

    # Data.

    @cached_property
    def is_test(self) -> np.ndarray:
        """Which rows are the test part, ``(N,)``."""
        return self._split() if self.data.is_test is None else self.data.is_test

    @cached_property
    def is_train(self) -> np.ndarray:
        """Which rows are trained on, ``(N,)``."""
        chosen = np.flatnonzero(~self.is_test)
        if self.max_rows is not None and len(chosen) > self.max_rows:
            chosen = np.random.default_rng(1).permutation(chosen)[: self.max_rows]
        train = np.zeros(len(self.is_test), dtype=bool)
        train[chosen] = True
        return train

    @cached_property
    def kept(self) -> np.ndarray:
        """Which features vary in the training part, ``(P,)``."""
        return self.data.features[self.is_train].std(0) > 0

    @cached_property
    def scaled(self) -> np.ndarray:
        """The features as competitors see them, ``(N, P')``."""
        features = self.data.features[:, self.kept]
        train = features[self.is_train]
        return (features - train.mean(0)) / train.std(0)

    def part(self, *, test: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the scaled features and the row numbers of the training or the test part."""
        rows = np.flatnonzero(self.is_test if test else self.is_train)
        return self.scaled[rows], rows

    # What `dynakern compare` asks of a task.

    def settings(self) -> dict[str, str]:
        """Return what makes two comparisons the same, as text."""
        digest = hashlib.sha256(self.data.features.tobytes())
        digest.update("\n".join(map(str, [] if self.data.target is None else self.data.target.tolist())).encode())
        digest.update(self.is_train.tobytes())
        return {"task": self.name, "data": digest.hexdigest()[:16], "max_rows": str(self.max_rows)}

    def describe(self) -> str:
        """Return the problem in a sentence."""
        how = "published" if self.data.is_test is not None else "random"
        return (
            f"{int(self.kept.sum())} features; {int(self.is_train.sum())} training and {int(self.is_test.sum())} test "
            f"rows ({how} split)"
        )

    def competitors(self) -> list[str]:
        """Return the names of everything that can compete: baselines first, then systems of the catalogue."""
        return [*self.baselines(), *systems_for(self.name)]

    def baselines(self) -> list[str]:
        """Return the names of the baselines."""
        return list(self._baselines())

    def is_deterministic(self, name: str) -> bool:
        """Whether one seed is enough for a competitor."""
        return name in self.baselines() and not name.startswith("boosting")

    def build(self, name: str, seed: int) -> Any:
        """Return an unfitted estimator.

        Raises:
            ValueError: Nothing of this name competes; the message suggests the nearest.
        """
        if name not in self.competitors():
            raise ValueError(unknown_name("system", name, self.competitors()))
        known = self._baselines()
        factory = known[name] if name in known else import_string(find_system(name).tasks[self.name])
        return factory(features=int(self.kept.sum()), random_state=seed)

    def _fit(self, name: str, seed: int, rows: np.ndarray) -> Any:
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a competitor that stops early is scored as it is
            return self.build(name, seed).fit(self.scaled[rows], self._targets(rows))

    def run(
        self, name: str, *, seed: int, budget: Budget, device: str | None = None, progress: Progress | None = None
    ) -> Outcome:
        """Fit one competitor with one seed and score it on the test rows; estimators know no budget."""
        _, rows = self.part(test=False)
        x, test_rows = self.part(test=True)
        order = np.random.default_rng(seed).permutation(rows)
        curve = []
        for step, share in enumerate(CURVE[:-1]):
            if progress is not None:
                progress(f"{name}: {share:.0%} of the rows", step / len(CURVE))
            curve.append(self._partial_score(name, seed, order[: max(4, round(share * len(order)))], x, test_rows))
        began = time.perf_counter()
        estimator = self._fit(name, seed, rows)
        report = FitReport(time.perf_counter() - began)
        metrics, drawn = self._score(estimator, x, test_rows)
        curve.append(metrics[self.headline])
        spectrum = _spectrum(estimator, self.scaled[order[:_SPECTRUM_ROWS]])
        return Outcome(metrics, report, None, _pack(np.array(curve), spectrum, drawn))

    def _partial_score(self, name: str, seed: int, rows: np.ndarray, x: np.ndarray, test_rows: np.ndarray) -> float:
        """Return the headline score after training on some rows; NaN where these are too few for the competitor."""
        try:
            return self._score(self._fit(name, seed, rows), x, test_rows)[0][self.headline]
        except (ValueError, FloatingPointError):
            return float("nan")

    def cost(self, name: str, *, seed: int, weights: bytes | None, device: str | None = None) -> Cost:
        """Fit again and measure what the fitted estimator costs to use."""
        _, rows = self.part(test=False)
        estimator = self._fit(name, seed, rows)
        x, _ = self.part(test=True)
        use = self._predict
        timing = measure.time_interleaved({"one": lambda: use(estimator, x[:1])}, repeats=15, warmup=3)
        memory = measure.peak_memory(lambda: use(estimator, x[:32]))
        return Cost(None, None, timing["one"].median * 1e3, memory)

    def _predict(self, estimator: Any, x: np.ndarray) -> Any:
        return estimator.predict(x)

    def draw(self, predictions: dict[str, np.ndarray]) -> Figure:
        """Draw predictions of the best three, learning curves, and spectra where a competitor has a kernel.

        Args:
            predictions: Competitor to what :meth:`run` kept, best first.
        """
        from matplotlib.figure import Figure

        unpacked = {name: _unpack(packed) for name, packed in list(predictions.items())[:_MOST_SHOWN]}
        figure = Figure(figsize=(11, 7.6), layout="constrained")
        grid = figure.add_gridspec(2, 6)
        for column, (name, (_, _, drawn)) in enumerate(list(unpacked.items())[:3]):
            axes = figure.add_subplot(grid[0, 2 * column : 2 * column + 2])
            self._draw(axes, name, drawn)
            axes.set_title(name, fontsize=10)
        axes = figure.add_subplot(grid[1, :3])
        sizes = [max(4, round(share * int(self.is_train.sum()))) for share in CURVE]
        for name, (curve, _, _) in unpacked.items():
            axes.plot(sizes, curve, "o-", label=name, lw=1.3, ms=3.5)
        axes.set(xscale="log", xlabel="training rows", ylabel=self.headline.replace("_", " "), title="learning curve")
        axes.legend(fontsize=8)
        axes = figure.add_subplot(grid[1, 3:])
        spectra = {name: spectrum for name, (_, spectrum, _) in unpacked.items() if len(spectrum)}
        for name, spectrum in spectra.items():
            axes.plot(np.arange(1, len(spectrum) + 1), spectrum, label=name, lw=1.3)
        axes.set(xscale="log", xlabel="eigenvalue", ylabel="share of the trace", title="spectrum of the kernel matrix")
        if spectra:
            axes.set_yscale("log")
            axes.set_ylim(bottom=1e-8)
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "none of these has a kernel", ha="center", transform=axes.transAxes, color="0.5")
        return figure


def _spectrum(estimator: Any, x: np.ndarray) -> np.ndarray:
    """Return the eigenvalues of the fitted kernel's matrix over the trace, largest first; empty without ``kernel_``."""
    kernel = getattr(estimator, "kernel_", None)
    if not callable(kernel):
        return np.empty(0)
    values = np.linalg.eigvalsh(np.asarray(kernel(x), dtype=np.float64))[::-1]
    return values.clip(0) / values.clip(0).sum()


def _pack(*parts: np.ndarray) -> np.ndarray:
    """Join arrays into one that a results file can hold: the lengths first."""
    flat = [np.asarray(part, dtype=np.float64).ravel() for part in parts]
    return np.concatenate([np.array([len(parts), *map(len, flat)], dtype=np.float64), *flat])


def _unpack(packed: np.ndarray) -> list[np.ndarray]:
    count = int(packed[0])
    ends = np.cumsum(packed[1 : 1 + count]).astype(int)
    return np.split(packed[1 + count :], ends[:-1])
