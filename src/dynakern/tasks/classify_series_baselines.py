"""What every classifier of series must beat: nearest neighbour under warping, random kernels, an LSTM."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor, nn

from dynakern.ops import dtw
from dynakern.tasks.classification import NetworkClassifier
from dynakern.tasks.classify_series import SeriesClassifier
from dynakern.tasks.classify_series_task import BaselineFactory
from dynakern.tasks.forecast import FitReport, Progress
from dynakern.train import Budget

__all__ = ["BASELINES", "NearestNeighbourDTW", "RandomKernels", "RecurrentClassifier"]


def _pad(series: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Return series padded at the end, ``(N, L, C)``, float32, and their lengths ``(N,)``."""
    lengths = torch.tensor([len(row) for row in series])
    x = torch.zeros(len(series), int(lengths.max()), series[0].shape[1])
    for index, row in enumerate(series):
        x[index, : len(row)] = torch.from_numpy(row)
    return x, lengths


class NearestNeighbourDTW:
    """The class of the nearest training series under dynamic time warping within a band of 10 % of the length."""

    def fit(
        self,
        X: list[np.ndarray],
        y: np.ndarray,
        *,
        seed: int,
        budget: Budget,
        device: str | None,
        progress: Progress | None,
    ) -> FitReport:
        """Keep the training series."""
        self.x, self.lengths = _pad(X)
        self.y, self.classes = y, int(y.max()) + 1
        return FitReport()

    def predict_proba(self, X: list[np.ndarray]) -> np.ndarray:
        """Return 0 or 1 a class, smoothed to 0.9 and the rest, ``(N, classes)``: a neighbour knows no probability."""
        x, lengths = _pad(X)
        distances = dtw(x, self.x, x_lengths=lengths, y_lengths=self.lengths, window=0.1)
        nearest = self.y[distances.argmin(1).numpy()]
        probabilities = np.full((len(X), self.classes), 0.1 / max(1, self.classes - 1))
        probabilities[np.arange(len(X)), nearest] = 0.9
        return probabilities


class RandomKernels:
    """Random convolution kernels and a ridge classifier (ROCKET).

    Each kernel has length 7, 9 or 11, centred normal weights, a bias from U(-1, 1), a random dilation, padding or none
    and, of several channels, a random subset; its two features are the maximum and the share of positive values.

    Args:
        kernels: Number of kernels.

    Source: Dempster, Petitjean and Webb, 2020, "ROCKET", arXiv:1910.13051.
    """

    def __init__(self, kernels: int = 5000) -> None:
        self.kernels = kernels

    def fit(
        self,
        X: list[np.ndarray],
        y: np.ndarray,
        *,
        seed: int,
        budget: Budget,
        device: str | None,
        progress: Progress | None,
    ) -> FitReport:
        """Draw the kernels from ``seed`` and fit the ridge classifier."""
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        began = time.perf_counter()
        self._draw(min(len(row) for row in X), X[0].shape[1], np.random.default_rng(seed))
        self.model = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-3, 3, 10)))
        self.model.fit(self._features(X), y)
        self.classes = int(y.max()) + 1
        return FitReport(time.perf_counter() - began)

    def _draw(self, shortest: int, channels: int, rng: np.random.Generator) -> None:
        """Draw kernels, grouped by (length, dilation, padding) so that each group is one convolution."""
        members: dict[tuple[int, int, bool], list[tuple[np.ndarray, float]]] = {}
        for _ in range(self.kernels):
            size = int(rng.choice([7, 9, 11]))
            reach = math.log2(max(1.0, (shortest - 1) / (size - 1)))
            dilation = int(2 ** rng.uniform(0, reach))
            weight = rng.standard_normal((channels, size))
            weight -= weight.mean(1, keepdims=True)
            used = rng.permutation(channels)[: int(2 ** rng.uniform(0, math.log2(channels + 1)))]
            weight[np.setdiff1d(np.arange(channels), used)] = 0
            padded = bool(rng.integers(2)) or (size - 1) * dilation >= shortest
            members.setdefault((size, dilation, padded), []).append((weight, rng.uniform(-1, 1)))
        self.groups = {
            key: (
                torch.from_numpy(np.stack([w for w, _ in drawn])).float(),
                torch.tensor([b for _, b in drawn]).float(),
            )
            for key, drawn in sorted(members.items())
        }

    def _features(self, series: list[np.ndarray]) -> np.ndarray:
        """Return maximum and share of positive values of every kernel, ``(N, 2 kernels)``."""
        lengths = np.array([len(row) for row in series])
        features = np.empty((len(series), 2 * self.kernels), dtype=np.float32)
        for length in np.unique(lengths):  # series of one length together, so that no padding is counted
            rows = np.flatnonzero(lengths == length)
            x = torch.from_numpy(np.stack([series[i] for i in rows])).float().transpose(1, 2)  # (N, C, L)
            parts = []
            for (size, dilation, padded), (weight, bias) in self.groups.items():
                padding = (size - 1) * dilation // 2 if padded else 0
                for chunk in x.split(64):
                    y = nn.functional.conv1d(chunk, weight, bias, dilation=dilation, padding=padding)
                    parts.append(torch.cat([y.amax(-1), (y > 0).float().mean(-1)], 1))
            chunks = -(-len(rows) // 64)
            columns = [torch.cat(parts[i : i + chunks]) for i in range(0, len(parts), chunks)]
            features[rows] = torch.cat(columns, 1).numpy()
        return features

    def predict_proba(self, X: list[np.ndarray]) -> np.ndarray:
        """Return the softmax of the ridge classifier's decision values, ``(N, classes)``; they are not calibrated."""
        decision = self.model.decision_function(self._features(X))
        decision = np.stack([-decision, decision], 1) if decision.ndim == 1 else decision
        known = np.full((len(X), self.classes), -np.inf)
        known[:, self.model[-1].classes_] = decision
        shifted = np.exp(known - known.max(1, keepdims=True))
        return shifted / shifted.sum(1, keepdims=True)


class RecurrentClassifier(nn.Module):
    """PyTorch's LSTM, two directions, the mean over valid steps, a linear map.

    Args:
        channels: Number of channels C.
        classes: Number of classes.
        width: Width of a direction.
    """

    def __init__(self, *, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map ``x`` ``(B, L, C)`` and ``lengths`` ``(B,)`` to logits ``(B, classes)``."""
        lengths = torch.full((len(x),), x.shape[1]) if lengths is None else lengths.cpu()
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(h.sum(1) / lengths.to(h.device)[:, None])


def _lstm(*, channels: int, length: int, classes: int) -> RecurrentClassifier:
    return RecurrentClassifier(channels=channels, classes=classes)


BASELINES: dict[str, BaselineFactory] = {
    "dtw_1nn": lambda longest: NearestNeighbourDTW(),
    "random_kernels": lambda longest: RandomKernels(),
    "lstm": lambda longest: NetworkClassifier(SeriesClassifier(_lstm, length=longest)),
}
