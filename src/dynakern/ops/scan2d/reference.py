"""The definition of the two-dimensional recurrence: one cell after another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scan2d_reference"]


def scan2d_reference(a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Return both states ``(V, T, ...)``; see :func:`dynakern.ops.scan2d`."""
    variates, steps = a1.shape[:2]
    cells = [x.flatten(0, 1).unbind(0) for x in (a1, a2, a3, a4, b1, b2)]  # one view a cell, one gradient for all
    rows1: list[list[Tensor]] = []
    rows2: list[list[Tensor]] = []
    for v in range(variates):
        row1: list[Tensor] = []
        row2: list[Tensor] = []
        for t in range(steps):
            k1, k2, k3, k4, h1, h2 = (x[v * steps + t] for x in cells)
            if t > 0:
                h1 = h1 + k1 * row1[t - 1] + k2 * row2[t - 1]
            if v > 0:
                h2 = h2 + k3 * rows1[v - 1][t] + k4 * rows2[v - 1][t]
            row1.append(h1)
            row2.append(h2)
        rows1.append(row1)
        rows2.append(row2)
    return tuple(torch.stack([h for row in rows for h in row]).reshape(a1.shape) for rows in (rows1, rows2))  # pyright: ignore
