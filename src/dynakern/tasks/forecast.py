"""Forecasting as a task: windows, splits, scaling, scores, competitors and their costs.

All competitors see the same windows, scaled by the same training statistics, and are scored on every test window with
stride 1; none is dropped. Errors are means over windows, steps and standardised series.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynakern import measure, train
from dynakern.checks import check_choice, check_positive, unknown_name
from dynakern.data.calendar import calendar_features, infer_frequency
from dynakern.data.series import SeriesTable
from dynakern.tasks.networks import Factory, batches, build_network, systems_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Cost",
    "FitReport",
    "ForecastCompetitor",
    "ForecastTask",
    "NetworkForecaster",
    "Outcome",
    "split_rows",
]

Split = Literal["train", "validation", "test"]
Protocols = Literal["ratio", "ett", "fit"]
Progress = Callable[[str, float], None]

# Seasonal period in steps for a step of so many seconds: a day for hours and minutes, a week for days, a year above.
_SEASONS = {60: 1440, 600: 144, 900: 96, 1800: 48, 3600: 24, 86400: 7, 604800: 52}
BATCH = 32  # windows in a training or scoring batch, as in the published protocols


def split_rows(
    num_rows: int, *, context: int, protocol: Protocols, step_seconds: float | None = None
) -> dict[Split, tuple[int, int]]:
    """Return the rows ``[start, stop)`` of each split; validation and test start ``context`` rows early.

    Args:
        num_rows: Rows of the table.
        context: Steps that a window sees before what it forecasts.
        protocol: ``"ratio"``: 70 % train, 20 % test, the rest between them validation, in order of time. ``"ett"``: 12,
            4 and 4 months of 30 days, the rest unused, as in the literature on the ETT data. ``"fit"``: 80 % train, the
            rest validation, no test, for an estimator that is to forecast what comes after the table.
        step_seconds: Sampling step, needed by ``"ett"``.

    Raises:
        ValueError: The table is too short, or the step does not divide a day.

    Source: Zhou et al., 2021, "Informer" (ETT); the 70/10/20 split of Wu et al., 2021, "Autoformer".
    """
    check_choice("protocol", protocol, ("ratio", "ett", "fit"))
    if protocol == "fit":
        first = int(num_rows * 0.8)
        return {"train": (0, first), "validation": (first - context, num_rows)}
    if protocol == "ett":
        if step_seconds is None or 86400 % step_seconds:
            raise ValueError(
                f"The ETT protocol needs timestamps whose step divides a day, got a step of {step_seconds} seconds."
            )
        month = 30 * round(86400 / step_seconds)
        ends = 12 * month, 16 * month, 20 * month
        if num_rows < ends[-1]:
            raise ValueError(f"The ETT protocol needs {ends[-1]} rows (20 months of 30 days), got {num_rows}.")
    else:
        first, last = int(num_rows * 0.7), int(num_rows * 0.2)
        ends = first, num_rows - last, num_rows
    return {"train": (0, ends[0]), "validation": (ends[0] - context, ends[1]), "test": (ends[1] - context, ends[2])}


@dataclass(frozen=True)
class FitReport:
    """What a competitor's training took: seconds, epochs and optimiser steps; None for what it has not."""

    seconds: float | None = None
    epochs: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Outcome:
    """Result of one job: scores, training effort, weights to keep, and forecasts to draw.

    Attributes:
        metrics: Name to value; lower is better.
        fit: What the training took.
        weights: The trained network as safetensors bytes; None for competitors without a network.
        drawn: Forecasts of the windows that the report draws, ``(W, horizon, C)``, standardised.
    """

    metrics: dict[str, float]
    fit: FitReport
    weights: bytes | None
    drawn: np.ndarray


@dataclass(frozen=True)
class Cost:
    """What a trained competitor costs to use; None where a figure has no meaning or cannot be counted.

    Attributes:
        parameters: Trainable numbers.
        flops: Floating-point operations to forecast one window.
        latency_ms: Milliseconds to forecast one window (median).
        peak_mb: Memory needed on top of the model while forecasting 32 windows, in MB.
    """

    parameters: int | None
    flops: int | None
    latency_ms: float
    peak_mb: float


class ForecastCompetitor(Protocol):
    """What competes: fitted once on a task, then asked for forecasts of windows."""

    def fit(
        self, task: ForecastTask, *, seed: int, budget: train.Budget, device: str | None, progress: Progress | None
    ) -> FitReport:
        """Train on the task's training and validation windows."""
        ...

    def predict(self, task: ForecastTask, starts: np.ndarray) -> np.ndarray:
        """Forecast the windows that start at these rows: ``(W, horizon, C)``, standardised."""
        ...


@dataclass(frozen=True)
class ForecastTask:
    """One forecasting problem.

    Attributes:
        table: The series.
        context: Steps seen.
        horizon: Steps forecast.
        protocol: How the rows are split, see :func:`split_rows`.
    """

    table: SeriesTable
    context: int = 96
    horizon: int = 96
    protocol: Protocols = "ratio"

    name = "forecast"
    headline = "mse"
    item = "window"

    def __post_init__(self) -> None:
        check_positive("context", self.context, integer=True)
        check_positive("horizon", self.horizon, integer=True)
        need = self.context + self.horizon
        for split, (start, stop) in self.rows.items():
            if stop - max(start, 0) < need or start < 0:
                raise ValueError(
                    f"{self.table.source}: too short: the {split} part has {max(0, stop - max(start, 0))} of "
                    f"{len(self.table.values)} rows, one window needs context + horizon = {need}. "
                    "Choose a smaller --context or --horizon."
                )

    @cached_property
    def rows(self) -> dict[Split, tuple[int, int]]:
        """Rows ``[start, stop)`` of each split."""
        step = self.table.step_seconds
        return split_rows(len(self.table.values), context=self.context, protocol=self.protocol, step_seconds=step)

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean of each series over the training rows, ``(C,)``."""
        return self.table.values[slice(*self.rows["train"])].mean(0)

    @cached_property
    def std(self) -> np.ndarray:
        """Biased standard deviation of each series over the training rows, ``(C,)``; 1 for a constant series."""
        std = self.table.values[slice(*self.rows["train"])].std(0)
        return np.where(std > 0, std, 1.0)

    @cached_property
    def values(self) -> np.ndarray:
        """The standardised series, ``(L, C)``, float32."""
        return ((self.table.values - self.mean) / self.std).astype(np.float32)

    @cached_property
    def marks(self) -> np.ndarray | None:
        """Calendar features of each row, ``(L, F)``, float32, in [-0.5, 0.5]; None without timestamps."""
        if self.table.timestamps is None:
            return None
        return calendar_features(self.table.timestamps, infer_frequency(self.table.timestamps)).astype(np.float32)

    @property
    def season(self) -> int:
        """Seasonal period in steps: a day for sub-daily data, a week for days; 24 where the step is unknown."""
        return _SEASONS.get(round(self.table.step_seconds or 3600), 12 if self.table.step_seconds else 24)

    @property
    def channels(self) -> int:
        """Number of series C."""
        return self.table.values.shape[1]

    def starts(self, split: Split) -> np.ndarray:
        """Return the first row of every window of a split, stride 1."""
        start, stop = self.rows[split]
        return np.arange(start, stop - self.context - self.horizon + 1)

    def inputs(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return windows ``(W, context, C)`` and marks ``(W, context + horizon, F)`` (None without timestamps)."""
        x = self.values[starts[:, None] + np.arange(self.context)]
        if self.marks is None:
            return x, None
        return x, self.marks[starts[:, None] + np.arange(self.context + self.horizon)]

    def targets(self, starts: np.ndarray) -> np.ndarray:
        """Return what follows the windows, ``(W, horizon, C)``, standardised."""
        return self.values[starts[:, None] + self.context + np.arange(self.horizon)]

    def score(self, predict: Callable[[np.ndarray], np.ndarray], starts: np.ndarray | None = None) -> dict[str, float]:
        """Return MSE and MAE of ``predict(starts) -> (W, horizon, C)`` over the test windows (or those given)."""
        starts = self.starts("test") if starts is None else starts
        squared, absolute = 0.0, 0.0
        for part in batches(starts, 8 * BATCH):
            error = predict(part).astype(np.float64) - self.targets(part)
            squared += float(np.square(error).mean(axis=(1, 2)).sum())
            absolute += float(np.abs(error).mean(axis=(1, 2)).sum())
        return {"mse": squared / len(starts), "mae": absolute / len(starts)}

    # What `dynakern compare` asks of a task.

    def settings(self) -> dict[str, str]:
        """Return what makes two comparisons the same, as text."""
        digest = hashlib.sha256(self.table.values.tobytes())
        if self.table.timestamps is not None:
            digest.update(self.table.timestamps.tobytes())
        return {
            "task": self.name,
            "data": digest.hexdigest()[:16],
            "columns": ", ".join(self.table.columns),
            "context": str(self.context),
            "horizon": str(self.horizon),
            "protocol": self.protocol,
        }

    def describe(self) -> str:
        """Return the problem in a sentence."""
        counts = {split: len(self.starts(split)) for split in ("train", "validation", "test")}  # type: ignore[arg-type]
        return (
            f"forecast {self.horizon} steps of {self.channels} series from the {self.context} before; "
            f"{counts['train']} / {counts['validation']} / {counts['test']} training, validation and test windows, "
            f"protocol {self.protocol}"
        )

    def notes(self) -> str:
        """Return what the columns mean, for the report."""
        return "mse and mae are means over windows, steps and standardised series."

    def competitors(self) -> list[str]:
        """Return the names of everything that can compete: baselines first, then systems of the catalogue."""
        from dynakern.tasks.forecast_baselines import BASELINES

        return [*BASELINES, *systems_for(self.name)]

    def baselines(self) -> list[str]:
        """Return the names of the baselines."""
        from dynakern.tasks.forecast_baselines import BASELINES

        return list(BASELINES)

    def is_deterministic(self, name: str) -> bool:
        """Whether a competitor gives the same result for every seed, so that one job is enough."""
        return name in ("repeat_last", "seasonal_naive")

    def build(self, name: str) -> ForecastCompetitor:
        """Return an unfitted competitor.

        Raises:
            ValueError: Nothing of this name competes; the message suggests the nearest.
        """
        from dynakern.tasks.forecast_baselines import BASELINES

        if name in BASELINES:
            return BASELINES[name]()
        if name not in self.competitors():
            raise ValueError(unknown_name("system", name, self.competitors()))
        return NetworkForecaster(name)

    def run(
        self, name: str, *, seed: int, budget: train.Budget, device: str | None = None, progress: Progress | None = None
    ) -> Outcome:
        """Train one competitor with one seed and score it on all test windows."""
        competitor = self.build(name)
        report = competitor.fit(self, seed=seed, budget=budget, device=device, progress=progress)
        metrics = self.score(lambda starts: competitor.predict(self, starts))
        if not all(np.isfinite(value) for value in metrics.values()):
            raise FloatingPointError(f"The forecasts of {name} are not finite.")
        weights = competitor.to_bytes() if isinstance(competitor, NetworkForecaster) else None
        return Outcome(metrics, report, weights, competitor.predict(self, self.drawn_windows()))

    def drawn_windows(self) -> np.ndarray:
        """Return the test windows that the report draws: three, evenly spread."""
        starts = self.starts("test")
        return starts[np.linspace(0, len(starts) - 1, 5).astype(int)[1:4]]

    def draw(self, predictions: dict[str, np.ndarray]) -> Figure:
        """Draw forecasts over the truth, in the units of the data: three test windows of the last series.

        Args:
            predictions: Competitor to its forecasts of :meth:`drawn_windows`, ``(3, horizon, C)``, standardised.
        """
        from matplotlib.figure import Figure

        starts, channel = self.drawn_windows(), self.channels - 1
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        shown = min(self.context, 2 * self.horizon)
        for row, (axes, start) in enumerate(zip(figure.subplots(len(starts), 1), starts, strict=True)):
            steps = np.arange(self.context - shown, self.context + self.horizon)
            axes.plot(
                steps - self.context, self.table.values[start + steps, channel], color="0.15", lw=1.6, label="truth"
            )
            for rank, (name, forecast) in enumerate(predictions.items()):
                values = forecast[row, :, channel] * self.std[channel] + self.mean[channel]
                axes.plot(np.arange(self.horizon), values, color=f"C{rank}", lw=1.2, label=name)
            axes.axvline(-0.5, color="0.7", lw=0.8)
            axes.set_ylabel(self.table.columns[channel])
            begin = self.table.timestamps
            axes.set_title(
                f"test window at row {start}" if begin is None else str(begin[start + self.context]).replace("T", " "),
                fontsize=9,
                loc="left",
            )
        axes.set_xlabel("steps ahead")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
        return figure

    def cost(self, name: str, *, seed: int, weights: bytes | None, device: str | None = None) -> Cost:
        """Measure what a trained competitor costs to use; baselines without a network are fitted again first."""
        competitor = self.build(name)
        if isinstance(competitor, NetworkForecaster) and weights is not None:
            competitor.load_bytes(self, weights, device=device)
        else:
            competitor.fit(self, seed=seed, budget=train.Budget(epochs=1), device=device, progress=None)
        starts = self.starts("test")
        one, batch = starts[:1], starts[:BATCH]
        timing = measure.time_interleaved({"predict": lambda: competitor.predict(self, one)}, repeats=15, warmup=3)
        memory_device = "cuda" if device and device.startswith("cuda") else "cpu"
        competitor.predict(self, batch)
        memory = measure.peak_memory(lambda: competitor.predict(self, batch), device=memory_device)
        parameters = flops = None
        if isinstance(competitor, NetworkForecaster):
            parameters = measure.count_parameters(competitor.network)
            flops = measure.count_flops(lambda: competitor.predict(self, one))
        return Cost(parameters, flops, timing["predict"].median * 1e3, memory)


class _Windows(Dataset[tuple[Tensor, Tensor, Tensor | None]]):
    """Training windows as whole batches: x, y and marks."""

    def __init__(self, task: ForecastTask, split: Split) -> None:
        self.task, self.starts = task, task.starts(split)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
        starts = self.starts[np.asarray(indices)]
        x, marks = self.task.inputs(starts)
        y = torch.from_numpy(self.task.targets(starts))
        return torch.from_numpy(x), y, None if marks is None else torch.from_numpy(marks)


def mean_squared_error(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """Return the mean squared error of a batch of windows ``(x, y, marks)``."""
    x, y, marks = batch
    return torch.nn.functional.mse_loss(network(x, marks), y)


class NetworkForecaster:
    """A deep network as a competitor, trained by the library's one loop.

    Args:
        system: Slug, or factory ``f(*, channels, context, horizon, time_features) -> Module`` whose module maps
            ``x (B, context, C)`` and ``marks (B, context + horizon, F) | None`` to ``(B, horizon, C)``.
        lr: Learning rate of parameters without a rate of their own.
        patience: Epochs without a better validation error before training stops.
        batch_size: Windows a step.
        schedule: Learning-rate schedule, see :func:`dynakern.train.fit`.
    """

    def __init__(
        self,
        system: str | Factory,
        *,
        lr: float = 1e-3,
        patience: int | None = 3,
        batch_size: int = BATCH,
        schedule: Literal["constant", "halving", "cosine"] = "constant",
    ) -> None:
        self.system, self.lr, self.patience, self.batch_size = system, lr, patience, batch_size
        self.schedule: Literal["constant", "halving", "cosine"] = schedule
        self.network: nn.Module = nn.Identity()
        self.history = train.History()

    def _build(self, task: ForecastTask) -> None:
        features = 0 if task.marks is None else task.marks.shape[1]
        self.network = build_network(
            "forecast",
            self.system,
            channels=task.channels,
            context=task.context,
            horizon=task.horizon,
            time_features=features,
        )

    def fit(
        self,
        task: ForecastTask,
        *,
        seed: int,
        budget: train.Budget,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> FitReport:
        """Build the network from ``seed`` and train it; returns what it took."""
        started = time.perf_counter()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._build(task)
        self.history = train.fit(
            self.network,
            _Windows(task, "train"),
            loss=mean_squared_error,
            budget=budget,
            validation=_Windows(task, "validation"),
            batch_size=self.batch_size,
            lr=self.lr,
            schedule=self.schedule,
            patience=self.patience,
            device=device,
            seed=seed,
            progress=progress,
        )
        return FitReport(time.perf_counter() - started, len(self.history.epochs), self.history.steps)

    def predict(self, task: ForecastTask, starts: np.ndarray) -> np.ndarray:
        """Forecast the windows that start at these rows: ``(W, horizon, C)``, standardised."""
        device = next(self.network.parameters()).device
        parts = []
        self.network.eval()
        with torch.no_grad():
            for part in batches(starts, BATCH):
                x, marks = task.inputs(part)
                marks_ = None if marks is None else torch.from_numpy(marks).to(device)
                parts.append(self.network(torch.from_numpy(x).to(device), marks_).float().cpu().numpy())
        return np.concatenate(parts)

    def to_bytes(self) -> bytes:
        """Return the network's weights as the content of a safetensors file."""
        from safetensors.torch import save

        return save({k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()})

    def load_bytes(self, task: ForecastTask, weights: bytes, *, device: str | None = None) -> None:
        """Build the network for a task and load weights from :meth:`to_bytes`."""
        from safetensors.torch import load

        self._build(task)
        self.network.load_state_dict(load(weights))
        self.network.to(device or "cpu").eval()
