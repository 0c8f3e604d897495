"""The forecasting estimator: one class for every network that forecasts, in scikit-learn's protocol."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from dynakern import train
from dynakern.checks import check_positive
from dynakern.data.calendar import calendar_features, infer_frequency
from dynakern.data.series import SeriesTable, as_series_table
from dynakern.tasks.forecast import BATCH, ForecastTask, NetworkForecaster
from dynakern.tasks.networks import Factory, seed_from

__all__ = ["Forecaster"]


class Forecaster(BaseEstimator):
    """Forecast the continuation of one table of series by any network that forecasts.

    Args:
        system: Slug, or factory ``f(*, channels, context, horizon, time_features) -> Module``.
        context: Steps that a forecast sees.
        horizon: Steps that the network forecasts at once.
        budget: Training budget: ``"10ep"``, ``"60s"``, ``"5m"``.
        lr: Learning rate.
        batch_size: Windows a step.
        patience: Epochs without a better validation error (last 20 % of the rows) before training stops.
        device: ``"cpu"`` (default) or ``"cuda"``.
        random_state: Seed of initial weights and shuffling.

    Attributes:
        network_: The trained module.
        history_: What happened in training, :class:`dynakern.train.History`.
        columns_: Names of the series.

    Example:
        >>> import numpy as np
        >>> x = np.sin(np.arange(400) * 2 * np.pi / 24)
        >>> model = Forecaster("long_conv", context=48, horizon=12, budget="1ep", random_state=0).fit(x)
        >>> model.predict(24).shape
        (24, 1)
    """

    def __init__(
        self,
        system: str | Factory = "timesnet",
        *,
        context: int = 96,
        horizon: int = 96,
        budget: str = "10ep",
        lr: float = 1e-3,
        batch_size: int = BATCH,
        patience: int | None = 3,
        device: str | None = None,
        random_state: int | None = None,
    ) -> None:
        self.system = system
        self.context = context
        self.horizon = horizon
        self.budget = budget
        self.lr = lr
        self.batch_size = batch_size
        self.patience = patience
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> Forecaster:
        """Train on a table of series.

        Args:
            X: ``(L,)`` or ``(L, C)`` array, or a data frame with a ``DatetimeIndex`` or a datetime column. With time,
                calendar features are used.
            y: Ignored.

        Raises:
            ValueError: The table is too short, not finite, or its time does not increase.
        """
        budget = train.Budget.parse(self.budget)
        table = as_series_table(X, source="X")
        task = ForecastTask(table, context=self.context, horizon=self.horizon, protocol="fit")
        competitor = NetworkForecaster(self.system, lr=self.lr, patience=self.patience, batch_size=self.batch_size)
        competitor.fit(task, seed=seed_from(self.random_state), budget=budget, device=self.device)
        self.network_, self.history_ = competitor.network, competitor.history
        self.columns_, self.n_features_in_ = table.columns, task.channels
        self._task, self._frame = task, X if hasattr(X, "iloc") else None
        return self

    def predict(self, horizon: int | None = None, X: Any = None) -> Any:
        """Forecast the steps after the table that was fitted, or after ``X``.

        Args:
            horizon: Steps to forecast, the network's own horizon by default. A longer one is rolled out: forecasts are
                fed back as context.
            X: Recent rows of the same series, at least ``context`` of them; the end of the fitted table by default.

        Returns:
            ``(horizon, C)`` in the units of the data; a data frame with the times of the forecasts if one was fitted.

        Raises:
            ValueError: ``X`` is too short or has other series.
        """
        check_is_fitted(self, "network_")
        horizon = self.horizon if horizon is None else horizon
        check_positive("horizon", horizon, integer=True)
        task = self._task
        table = task.table if X is None else as_series_table(X, source="X")
        if table.values.shape[1] != task.channels:
            raise ValueError(f"`X` must have the {task.channels} fitted series, got {table.values.shape[1]}.")
        if len(table.values) < self.context:
            raise ValueError(f"`X` must have at least context = {self.context} rows, got {len(table.values)}.")
        if task.table.timestamps is not None and table.timestamps is None:
            raise ValueError("`X` must have timestamps, since the fitted table has them.")
        steps = -(-horizon // self.horizon)
        times = _extend_time(table.timestamps, steps * self.horizon)
        values = table.values
        for _ in range(steps):
            known = None if times is None else times[: len(values) + self.horizon]
            values = np.concatenate([values, self._one_window(values, known)])
        forecast = values[len(table.values) : len(table.values) + horizon]
        return self._framed(forecast, None if times is None else times[len(table.values) :][:horizon])

    def _one_window(self, values: np.ndarray, times: np.ndarray | None) -> np.ndarray:
        task, rows = self._task, self.context + self.horizon
        padded = np.concatenate([values[-self.context :], np.repeat(values[-1:], self.horizon, axis=0)])
        table = SeriesTable(padded, self.columns_, None if times is None else times[-rows:], "X")
        window = _Window(table, task)
        device = next(self.network_.parameters()).device
        marks = None if window.marks is None else torch.from_numpy(window.marks[None]).to(device)
        with torch.no_grad():
            y = self.network_(torch.from_numpy(window.x[None]).to(device), marks)[0]
        return y.double().cpu().numpy() * task.std + task.mean

    def _framed(self, forecast: np.ndarray, times: np.ndarray | None) -> Any:
        if self._frame is None:
            return forecast
        import pandas as pd

        return pd.DataFrame(
            forecast, columns=list(self.columns_), index=None if times is None else pd.DatetimeIndex(times)
        )


class _Window:
    """One standardised context with the marks of context and horizon, float32."""

    def __init__(self, table: SeriesTable, task: ForecastTask) -> None:
        self.x = ((table.values[: task.context] - task.mean) / task.std).astype(np.float32)
        fitted = task.table.timestamps
        self.marks = None
        if fitted is not None and table.timestamps is not None:
            self.marks = calendar_features(table.timestamps, infer_frequency(fitted)).astype(np.float32)


def _extend_time(times: np.ndarray | None, steps: int) -> np.ndarray | None:
    """Continue timestamps: by equal steps, or by months where all steps are whole months."""
    if times is None:
        return None
    months = times.astype("datetime64[M]")
    offset = times - months
    if len(times) > 1 and (np.diff(times) >= np.timedelta64(28, "D")).all() and (offset == offset[0]).all():
        step = np.median(np.diff(months).astype(int)).astype(int)
        ahead = (months[-1] + step * np.arange(1, steps + 1)).astype("datetime64[s]") + offset[0]
    else:
        step = np.median(np.diff(times).astype(np.int64)).astype(np.int64)
        ahead = times[-1] + (step * np.arange(1, steps + 1)).astype("timedelta64[s]")
    return np.concatenate([times, ahead])
