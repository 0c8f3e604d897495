"""The handwritten digits that claims at a laptop's scale train on, and the one way to divide them."""

from __future__ import annotations

import torch
from torch import Tensor

from dynakern.data.images import load_digits

__all__ = ["divide", "read_digits"]


def read_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, ``(1797, 1, 8, 8)`` in [0, 1], and their labels, ``(1797,)``."""
    digits = load_digits()
    return torch.from_numpy(digits.images), torch.from_numpy(digits.labels.astype(int))


def divide(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1,200 images and labels to train on, and the other 597 to test, drawn with seed 0."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]
