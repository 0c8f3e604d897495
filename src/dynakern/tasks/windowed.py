"""Estimators that read a table of series window by window: fill missing values, find abnormal steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, OutlierMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynakern import train
from dynakern.checks import check_positive
from dynakern.data.series import as_series_table
from dynakern.tasks.networks import Factory, batches, build_network, seed_from

__all__ = ["AnomalyDetector", "Imputer"]


class _Slices(Dataset[Tensor]):
    """Windows of consecutive rows of one array, as whole batches."""

    def __init__(self, values: np.ndarray, length: int, starts: np.ndarray) -> None:
        self.values, self.length, self.starts = values, length, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.values[self.starts[np.asarray(indices)][:, None] + np.arange(self.length)])


class _WindowModel(BaseEstimator):
    """What imputer and detector share: scaling, training windows, and covering a table by windows."""

    _task: str
    system: str | Factory
    window: int
    budget: str
    lr: float
    batch_size: int
    patience: int | None
    device: str | None
    random_state: int | None

    def _train(self, values: np.ndarray, loss: train.LossFunction) -> None:
        check_positive("window", self.window, integer=True)
        rows, cut = len(values), int(0.8 * len(values))
        if rows - cut < self.window:
            raise ValueError(
                f"`X` must have at least {5 * self.window} rows: its last 20 % must hold one window of {self.window}, "
                f"got {rows}."
            )
        self.mean_ = np.nanmean(values[:cut], axis=0)
        std = np.nanstd(values[:cut], axis=0)
        self.scale_ = np.where(std > 0, std, 1.0)
        scaled = ((values - self.mean_) / self.scale_).astype(np.float32)
        seed = seed_from(self.random_state)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network_: nn.Module = build_network(
                self._task, self.system, channels=values.shape[1], length=self.window
            )
        self.history_ = train.fit(
            self.network_,
            _Slices(scaled, self.window, np.arange(cut - self.window + 1)),
            loss=loss,
            budget=train.Budget.parse(self.budget),
            validation=_Slices(scaled, self.window, np.arange(cut, rows - self.window + 1)),
            batch_size=self.batch_size,
            lr=self.lr,
            patience=self.patience,
            device=self.device,
            seed=seed,
        )
        self.n_features_in_ = values.shape[1]

    def _scaled(self, X: Any, *, allow_missing: bool) -> np.ndarray:
        check_is_fitted(self, "network_")
        values = as_series_table(X, source="X", allow_missing=allow_missing).values
        if values.shape[1] != self.n_features_in_:
            raise ValueError(
                f"`X` has {values.shape[1]} features, but this estimator was fitted with {self.n_features_in_}."
            )
        if len(values) < self.window:
            raise ValueError(f"`X` must have at least one window of {self.window} rows, got {len(values)}.")
        return ((values - self.mean_) / self.scale_).astype(np.float32)

    def _covering(self, rows: int) -> np.ndarray:
        """Return starts of windows side by side; the last is moved back to end with the table."""
        starts = np.arange(0, rows - self.window + 1, self.window)
        return starts if starts[-1] + self.window == rows else np.append(starts, rows - self.window)

    def _forward(self, *inputs: np.ndarray) -> np.ndarray:
        device = next(self.network_.parameters()).device
        with torch.no_grad():
            return self.network_(*(torch.from_numpy(x).to(device) for x in inputs)).float().cpu().numpy()


class Imputer(TransformerMixin, _WindowModel):
    """Fill missing values (NaN) of a table of series by any network that imputes.

    Training hides observed entries at random and learns to restore them; observed values are never changed.

    Args:
        system: Slug, or factory ``f(*, channels, length) -> Module`` whose module maps ``x (B, L, C)``, zero where
            missing, and ``mask (B, L, C)``, 1 where observed, to ``(B, L, C)``.
        window: Length L of a window.
        mask_rate: Fraction of observed entries that training hides, in (0, 1).
        budget: Training budget: ``"10ep"``, ``"60s"``, ``"5m"``.
        lr: Learning rate.
        batch_size: Windows a step.
        patience: Epochs without a better validation error before training stops.
        device: ``"cpu"`` (default) or ``"cuda"``.
        random_state: Seed of weights, shuffling and hidden entries.

    Attributes:
        network_: The trained module.
        history_: What happened in training.
    """

    _task = "impute"

    def __init__(
        self,
        system: str | Factory = "timesnet",
        *,
        window: int = 96,
        mask_rate: float = 0.25,
        budget: str = "10ep",
        lr: float = 1e-3,
        batch_size: int = 16,
        patience: int | None = 3,
        device: str | None = None,
        random_state: int | None = None,
    ) -> None:
        self.system = system
        self.window = window
        self.mask_rate = mask_rate
        self.budget = budget
        self.lr = lr
        self.batch_size = batch_size
        self.patience = patience
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> Imputer:
        """Train on a table ``(L,)`` or ``(L, C)``, which may itself hold NaN.

        Raises:
            ValueError: ``mask_rate`` is out of range, the table is too short, or a series has no value at all.
        """
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"`mask_rate` must be in (0, 1), got {self.mask_rate!r}.")
        values = as_series_table(X, source="X", allow_missing=True).values
        empty = np.flatnonzero(np.isnan(values[: int(0.8 * len(values))]).all(0))
        if len(empty):
            raise ValueError(
                f"`X` must have observed values in every series, series {int(empty[0])} has none to learn from."
            )
        rate = self.mask_rate

        def loss(network: nn.Module, x: Tensor) -> Tensor:
            observed = ~x.isnan()
            hidden = (torch.rand_like(x) < rate) & observed
            shown = observed & ~hidden
            restored = network(torch.where(shown, x, 0.0), shown.to(x.dtype))
            error = torch.where(hidden, restored - torch.where(observed, x, 0.0), 0.0)
            return error.square().sum() / hidden.sum().clamp_min(1)

        self._train(values, loss)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return the table ``(L, C)`` with every NaN filled, in the units of the data."""
        x = self._scaled(X, allow_missing=True)
        filled = as_series_table(X, source="X", allow_missing=True).values.copy()
        for part in batches(self._covering(len(x)), self.batch_size):
            index = part[:, None] + np.arange(self.window)
            window = x[index]
            mask = (~np.isnan(window)).astype(np.float32)
            restored = self._forward(np.nan_to_num(window), mask) * self.scale_ + self.mean_
            for rows, values in zip(index, restored, strict=True):
                filled[rows] = np.where(np.isnan(filled[rows]), values, filled[rows])
        return filled


class AnomalyDetector(OutlierMixin, _WindowModel):
    """Find steps of a table of series that a network trained on normal data cannot reconstruct.

    Args:
        system: Slug, or factory ``f(*, channels, length) -> Module`` whose module maps ``(B, L, C)`` to ``(B, L, C)``.
        window: Length L of a window.
        contamination: Fraction of the fitted steps that counts as abnormal; sets the threshold.
        budget: Training budget: ``"10ep"``, ``"60s"``, ``"5m"``.
        lr: Learning rate.
        batch_size: Windows a step.
        patience: Epochs without a better validation error before training stops.
        device: ``"cpu"`` (default) or ``"cuda"``.
        random_state: Seed of weights and shuffling.

    Attributes:
        network_: The trained module.
        history_: What happened in training.
        offset_: Threshold of :meth:`score_samples`.
    """

    _task = "detect"

    def __init__(
        self,
        system: str | Factory = "timesnet",
        *,
        window: int = 100,
        contamination: float = 0.01,
        budget: str = "10ep",
        lr: float = 1e-3,
        batch_size: int = 32,
        patience: int | None = 3,
        device: str | None = None,
        random_state: int | None = None,
    ) -> None:
        self.system = system
        self.window = window
        self.contamination = contamination
        self.budget = budget
        self.lr = lr
        self.batch_size = batch_size
        self.patience = patience
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: None = None) -> AnomalyDetector:
        """Train on a table ``(L,)`` or ``(L, C)`` of mostly normal steps.

        Raises:
            ValueError: ``contamination`` is out of range, or the table is too short or not finite.
        """
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"`contamination` must be in (0, 0.5], got {self.contamination!r}.")
        values = as_series_table(X, source="X").values
        self._train(values, lambda network, x: torch.nn.functional.mse_loss(network(x), x))
        self.offset_ = float(np.quantile(self.score_samples(values), self.contamination))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Return minus the mean squared reconstruction error of each step, ``(L,)``: low is abnormal."""
        x = self._scaled(X, allow_missing=False)
        scores = np.empty(len(x))
        for part in batches(self._covering(len(x)), self.batch_size):
            index = part[:, None] + np.arange(self.window)
            scores[index] = -np.square(self._forward(x[index]) - x[index]).mean(-1)
        return scores

    def decision_function(self, X: Any) -> np.ndarray:
        """Return ``score_samples(X) - offset_``, ``(L,)``: negative is abnormal."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """Return 1 for normal and -1 for abnormal steps, ``(L,)``."""
        return np.where(self.decision_function(X) < 0, -1, 1)
