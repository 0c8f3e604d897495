"""What every forecaster must beat: the last value, the last season, a linear map, boosted trees on lags."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dynakern.tasks.forecast import FitReport, ForecastCompetitor, ForecastTask, NetworkForecaster, Progress
from dynakern.train import Budget

__all__ = ["BASELINES", "DecompositionLinear", "GradientBoosting", "RepeatLast", "SeasonalNaive"]


class RepeatLast:
    """Forecast the last value: :math:`y_h = x_L`."""

    def fit(
        self, task: ForecastTask, *, seed: int, budget: Budget, device: str | None, progress: Progress | None
    ) -> FitReport:
        """Nothing to learn."""
        return FitReport()

    def predict(self, task: ForecastTask, starts: np.ndarray) -> np.ndarray:
        """Forecast the windows that start at these rows: ``(W, horizon, C)``, standardised."""
        x, _ = task.inputs(starts)
        return np.repeat(x[:, -1:], task.horizon, axis=1)


class SeasonalNaive:
    r"""Forecast the last season: :math:`y_h = x_{L - m + (h \bmod m)}` with the season m of the sampling step."""

    def fit(
        self, task: ForecastTask, *, seed: int, budget: Budget, device: str | None, progress: Progress | None
    ) -> FitReport:
        """Nothing to learn; the season must fit into the context.

        Raises:
            ValueError: It does not.
        """
        if task.season > task.context:
            raise ValueError(f"The season of {task.season} steps is longer than the context of {task.context}.")
        return FitReport()

    def predict(self, task: ForecastTask, starts: np.ndarray) -> np.ndarray:
        """Forecast the windows that start at these rows: ``(W, horizon, C)``, standardised."""
        x, _ = task.inputs(starts)
        return x[:, task.context - task.season + np.arange(task.horizon) % task.season]


class DecompositionLinear(nn.Module):
    """Linear maps over time of a moving average and of the rest, shared by all series (DLinear).

    Args:
        context: Steps seen.
        horizon: Steps forecast.
        window: Width of the moving average, odd.

    Source: Zeng et al., 2023, "Are Transformers Effective for Time Series Forecasting?", arXiv:2205.13504.
    """

    def __init__(self, *, context: int, horizon: int, window: int = 25) -> None:
        super().__init__()
        self.window = window
        self.trend = nn.Linear(context, horizon)
        self.rest = nn.Linear(context, horizon)
        for linear in (self.trend, self.rest):
            nn.init.constant_(linear.weight, 1 / context)

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Map ``x`` ``(B, context, C)`` to ``(B, horizon, C)``; ``marks`` are not used."""
        x = x.transpose(1, 2)  # (B, C, context)
        half = self.window // 2
        padded = torch.cat([x[..., :1].expand(-1, -1, half), x, x[..., -1:].expand(-1, -1, half)], -1)
        trend = torch.nn.functional.avg_pool1d(padded, self.window, stride=1)
        return (self.trend(trend) + self.rest(x - trend)).transpose(1, 2)


def _linear(*, channels: int, context: int, horizon: int, time_features: int) -> DecompositionLinear:
    return DecompositionLinear(context=context, horizon=horizon)


class GradientBoosting:
    """Boosted trees on lags: one model for all series and all steps ahead, the step being a feature.

    Features of (window, series, step h): the last 24 values, the values of the same phase in up to four earlier
    seasons, h and the series' number; values are normalised by the window's mean and standard deviation.

    Args:
        max_rows: Training rows drawn from all (window, series, step) triples.
    """

    def __init__(self, max_rows: int = 40_000) -> None:
        self.max_rows = max_rows

    def fit(
        self, task: ForecastTask, *, seed: int, budget: Budget, device: str | None, progress: Progress | None
    ) -> FitReport:
        """Fit scikit-learn's histogram gradient boosting with 200 trees."""
        from sklearn.ensemble import HistGradientBoostingRegressor

        began = time.perf_counter()
        rng = np.random.default_rng(seed)
        starts = task.starts("train")
        per_window = task.channels * task.horizon
        windows = rng.choice(starts, size=min(len(starts), max(1, self.max_rows // 8)), replace=False)
        x, y = task.inputs(windows)[0], task.targets(windows)
        rows = rng.choice(len(windows) * per_window, size=min(self.max_rows, len(windows) * per_window), replace=False)
        w, rest = np.divmod(rows, per_window)
        h, c = np.divmod(rest, task.channels)
        features, mean, scale = self._features(task, x, w, h, c)
        self.model = HistGradientBoostingRegressor(max_iter=200, random_state=seed)
        self.model.fit(features, (y[w, h, c] - mean) / scale)
        return FitReport(time.perf_counter() - began)

    def _features(
        self, task: ForecastTask, x: np.ndarray, w: np.ndarray, h: np.ndarray, c: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean, scale = x.mean(1), x.std(1) + 1e-3
        normal = (x - mean[:, None]) / scale[:, None]
        lags = normal[w, task.context - min(24, task.context) :, c]
        seasons = min(4, task.context // task.season)
        back = task.context - task.season * np.arange(1, seasons + 1)[:, None] + (h % task.season)  # (seasons, rows)
        phase = normal[w, back, c].T
        features = np.concatenate([lags, phase, h[:, None], c[:, None]], axis=1).astype(np.float32)
        return features, mean[w, c], scale[w, c]

    def predict(self, task: ForecastTask, starts: np.ndarray) -> np.ndarray:
        """Forecast the windows that start at these rows: ``(W, horizon, C)``, standardised."""
        x, _ = task.inputs(starts)
        shape = (len(starts), task.horizon, task.channels)
        w, h, c = (index.ravel() for index in np.indices(shape))
        features, mean, scale = self._features(task, x, w, h, c)
        return (self.model.predict(features) * scale + mean).reshape(shape).astype(np.float32)


BASELINES: dict[str, Callable[[], ForecastCompetitor]] = {
    "repeat_last": RepeatLast,
    "seasonal_naive": SeasonalNaive,
    "linear": lambda: NetworkForecaster(_linear),
    "gradient_boosting": GradientBoosting,
}
