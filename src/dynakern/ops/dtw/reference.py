"""The definition of dynamic time warping: one pair after another, one cell after another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dtw_reference"]


def _pair(x: Tensor, y: Tensor, window: float) -> Tensor:
    rows, columns = len(x), len(y)
    band = max(int(window * max(rows, columns)), abs(rows - columns))
    d = (x[:, None] - y[None]).square().sum(-1)  # (L, K)
    cost: dict[tuple[int, int], Tensor] = {}
    for i in range(rows):
        for j in range(max(0, i - band), min(columns, i + band + 1)):
            before = [cost[p] for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if p in cost]
            cost[i, j] = d[i, j] + torch.stack(before).min() if before else d[i, j]
    return cost[rows - 1, columns - 1].sqrt()


def dtw_reference(x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, window: float) -> Tensor:
    """Return ``(N, M)`` from ``x`` ``(N, L, C)`` and ``y`` ``(M, K, C)``; see :func:`dynakern.ops.dtw`."""
    a = [len(row) for row in x] if x_lengths is None else x_lengths.tolist()
    b = [len(row) for row in y] if y_lengths is None else y_lengths.tolist()
    rows = [
        torch.stack([_pair(u[:m], v[:n], window) for v, n in zip(y, b, strict=True)]) for u, m in zip(x, a, strict=True)
    ]
    return torch.stack(rows) if rows and len(y) else x.new_zeros(len(x), len(y))
