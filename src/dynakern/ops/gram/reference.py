"""The definition of kernels of a distance and of their products: the whole matrix, any derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PROFILES", "gram_reference", "profile"]


def _matern12(squared: Tensor) -> Tensor:
    return (-_root(squared)).exp()


def _matern32(squared: Tensor) -> Tensor:
    d = math.sqrt(3) * _root(squared)
    return (1 + d) * (-d).exp()


def _matern52(squared: Tensor) -> Tensor:
    d = math.sqrt(5) * _root(squared)
    return (1 + d + d.square() / 3) * (-d).exp()


def _root(squared: Tensor) -> Tensor:
    """Square root whose derivative at 0 counts as 0: two equal points pull each other nowhere."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


# k as a function of the squared distance, in units of the length scale.
PROFILES: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda squared: (-squared / 2).exp(),
    "matern12": _matern12,
    "matern32": _matern32,
    "matern52": _matern52,
    "cauchy": lambda squared: 1 / (1 + squared),
}


def profile(kernel: str, x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel matrix ``(N, M)`` of ``x`` ``(N, P)`` and ``y`` ``(M, P)``."""
    return PROFILES[kernel]((x[:, None] - y).square().sum(-1))


def gram_reference(kernel: str, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Return ``K @ v``, ``(N, C)``; see :func:`dynakern.ops.gram_product`."""
    return profile(kernel, x, y) @ v
