"""The series classifier: one class for every network that classifies series, in scikit-learn's protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynakern import train
from dynakern.checks import check_finite
from dynakern.tasks.classification import held_out
from dynakern.tasks.networks import Factory, batches, build_network, seed_from

__all__ = ["SeriesClassifier"]


class _Labelled(Dataset[tuple[Tensor, Tensor, Tensor]]):
    def __init__(self, x: np.ndarray, lengths: np.ndarray, y: np.ndarray) -> None:
        self.x, self.lengths, self.y = torch.from_numpy(x), torch.from_numpy(lengths), torch.from_numpy(y)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.as_tensor(indices)
        return self.x[rows], self.lengths[rows], self.y[rows]


class SeriesClassifier(ClassifierMixin, BaseEstimator):
    """Classify series by any network that classifies series.

    Args:
        system: Slug, or factory ``f(*, channels, length, classes) -> Module`` whose module maps ``x (B, L, C)`` and
            ``lengths (B,) | None`` to logits ``(B, classes)``.
        budget: Training budget: ``"30ep"``, ``"60s"``, ``"5m"``.
        lr: Learning rate.
        batch_size: Series a step.
        patience: Epochs without a better validation loss before training stops.
        validation_fraction: Part of the training series held out, stratified; 0 trains on all for the whole budget.
        length: Steps that series are padded to; the longest of ``fit`` by default. Longer ones cannot be predicted.
        device: ``"cpu"`` (default) or ``"cuda"``.
        random_state: Seed of weights, shuffling and the held-out part.

    Attributes:
        classes_: The class labels.
        network_: The trained module.
        history_: What happened in training.
    """

    def __init__(
        self,
        system: str | Factory = "s4d",
        *,
        budget: str = "30ep",
        lr: float = 3e-3,
        batch_size: int = 16,
        patience: int | None = 10,
        validation_fraction: float = 0.2,
        length: int | None = None,
        device: str | None = None,
        random_state: int | None = None,
    ) -> None:
        self.system = system
        self.budget = budget
        self.lr = lr
        self.batch_size = batch_size
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.length = length
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SeriesClassifier:
        """Train.

        Args:
            X: ``(N, L)``, ``(N, L, C)``, or a list of N arrays ``(L_i,)`` or ``(L_i, C)`` of unequal lengths.
            y: N labels.

        Raises:
            ValueError: Values are not finite, sizes differ, or there is only one class.
        """
        return self._fit(X, y, None)

    def _prepare(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Check and scale the training data: series ``(N, L, C)``, lengths ``(N,)`` and class numbers ``(N,)``."""
        x, lengths = self._series(X, reset=True)
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None.")
        y = column_or_1d(y, warn=True)
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        if len(y) != len(x):
            raise ValueError(f"`X` and `y` must have equal lengths, got {len(x)} and {len(y)} samples.")
        self.classes_, targets = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"`y` must hold at least two classes, got one class: {self.classes_[0]!r}.")
        valid = np.arange(x.shape[1]) < lengths[:, None]
        self.mean_, std = x[valid].mean(0), x[valid].std(0)
        self.scale_ = np.where(std > 0, std, 1.0)
        return self._scaled(x, valid), lengths, targets.astype(np.int64)

    def _build(self) -> nn.Module:
        classes = len(self.classes_)
        return build_network(
            "classify-series", self.system, channels=self._channels, length=self._length, classes=classes
        )

    def _fit(self, X: Any, y: Any, progress: Callable[[str, float], None] | None) -> SeriesClassifier:
        budget = train.Budget.parse(self.budget)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in [0, 1), got {self.validation_fraction!r}.")
        data = self._prepare(X, y)
        seed = seed_from(self.random_state)
        held = held_out(data[2], self.validation_fraction, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network_: nn.Module = self._build()
        self.history_ = train.fit(
            self.network_,
            _Labelled(*(part[~held] for part in data)),
            loss=lambda network, batch: torch.nn.functional.cross_entropy(network(batch[0], batch[1]), batch[2]),
            budget=budget,
            validation=_Labelled(*(part[held] for part in data)) if held.any() else None,
            batch_size=self.batch_size,
            lr=self.lr,
            patience=self.patience if held.any() else None,
            clip=4.0,
            device=self.device,
            seed=seed,
            progress=progress,
        )
        return self

    def _series(self, X: Any, *, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return padded series ``(N, L, C)``, float64, and their lengths ``(N,)``."""
        axes = np.ndim(X[0]) if isinstance(X, list) and len(X) > 0 else 0  # of the first series of a list
        ragged = axes >= 1 and len({len(row) for row in X}) > 1
        if ragged or axes == 2 or getattr(X, "ndim", None) == 3:
            rows = [np.asarray(row, dtype=np.float64) for row in X]
            rows = [row[:, None] if row.ndim == 1 else row for row in rows]
            if any(row.ndim != 2 or len(row) == 0 for row in rows) or len({row.shape[1] for row in rows}) != 1:
                raise ValueError("`X` must hold series of shape (L_i,) or (L_i, C) with one C and L_i >= 1.")
            for index, row in enumerate(rows):
                check_finite(f"X[{index}]", row)
            lengths = np.array([len(row) for row in rows])
            longest = max(int(lengths.max()), (self.length or 0) if reset else self._length)
            x = np.zeros((len(rows), longest, rows[0].shape[1]))
            for index, row in enumerate(rows):
                x[index, : len(row)] = row
        else:
            x = np.asarray(validate_data(self, X, dtype=np.float64, reset=reset))[:, :, None]  # pyright: ignore
            lengths = np.full(len(x), x.shape[1])
        if reset:
            self._length, self._channels = x.shape[1], x.shape[2]
            self.n_features_in_ = x.shape[1]
        elif x.shape[2] != self._channels:
            raise ValueError(f"`X` must have {self._channels} channels as in fit, got {x.shape[2]}.")
        elif x.shape[1] > self._length:
            raise ValueError(f"`X` must not be longer than the {self._length} steps seen in fit, got {x.shape[1]}.")
        return x, lengths

    def _scaled(self, x: np.ndarray, valid: np.ndarray) -> np.ndarray:
        return np.where(valid[..., None], (x - self.mean_) / self.scale_, 0.0).astype(np.float32)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return class probabilities, ``(N, classes)``."""
        check_is_fitted(self, "network_")
        x, lengths = self._series(X, reset=False)
        x = self._scaled(x, np.arange(x.shape[1]) < lengths[:, None])
        device = next(self.network_.parameters()).device
        parts = []
        with torch.no_grad():
            for part in batches(np.arange(len(x)), 4 * self.batch_size):
                logits = self.network_(torch.from_numpy(x[part]).to(device), torch.from_numpy(lengths[part]).to(device))
                parts.append(logits.double().softmax(-1).cpu().numpy())
        return np.concatenate(parts)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each series, ``(N,)``."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]
