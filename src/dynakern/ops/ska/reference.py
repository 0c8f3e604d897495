"""The definition of small-kernel aggregation: one shifted product a tap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ska_reference"]


def ska_reference(x: Tensor, w: Tensor) -> Tensor:
    """Return ``(N, C, H, W)`` from ``x`` ``(N, C, H, W)`` and ``w`` ``(N, C_w, k k, H, W)``; see :func:`ska`."""
    kernels, size = w.shape[1], math.isqrt(w.shape[2])
    H, W = x.shape[2:]
    groups = x.unflatten(1, (x.shape[1] // kernels, kernels))  # channel c = s C_w + q: (N, s, q, H, W)
    padded = torch.nn.functional.pad(groups, (size // 2,) * 4)
    y = torch.zeros_like(groups)
    for tap in range(size * size):
        i, j = divmod(tap, size)
        y = y + padded[..., i : i + H, j : j + W] * w[:, None, :, tap]
    return y.flatten(1, 2)
