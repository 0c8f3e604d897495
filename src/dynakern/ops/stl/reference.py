"""The definition of STL in PyTorch: every regression as a row of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dynakern.ops.stl import STLParts, STLSettings

__all__ = ["stl_reference"]


def _loess(y: Tensor, span: int, at: Tensor, weights: Tensor | None) -> Tensor:
    """Return local linear regressions of ``y`` (at positions 1 .. n) evaluated at the positions ``at``.

    A window holds the ``span`` nearest points; its half width h is the distance to the farthest, and grows by half of
    what the span exceeds n by. Points nearer than h / 1000 have weight 1, points beyond 0.999 h weight 0.
    """
    n = len(y)
    x = torch.arange(1, n + 1, dtype=y.dtype)
    width = min(span, n)
    left = (at - (span + 1) // 2 + 1).clamp(1, n - width + 1) if span < n else torch.ones_like(at)
    right = left + width - 1
    h = torch.maximum(at - left, right - at) + max(0, (span - n) // 2)
    distance = (x - at[:, None]).abs()
    w = (1 - (distance / h[:, None]).pow(3)).pow(3)
    w = torch.where(distance <= 0.001 * h[:, None], torch.ones_like(w), w)
    inside = (x >= left[:, None]) & (x <= right[:, None]) & (distance <= 0.999 * h[:, None])
    w = torch.where(inside, w, torch.zeros_like(w))
    if weights is not None:
        w = w * weights
    total = w.sum(1, keepdim=True)
    w = torch.where(total > 0, w / torch.where(total > 0, total, 1.0), torch.zeros_like(w))
    mean = (w * x).sum(1, keepdim=True)
    spread = (w * (x - mean).square()).sum(1, keepdim=True)
    tilted = spread.sqrt() > 0.001 * (n - 1)  # else all the weight is on one point: a constant
    slope = torch.where(tilted, (at[:, None] - mean) / torch.where(tilted, spread, 1.0), 0.0)
    fitted = ((w * (slope * (x - mean) + 1)) * y).sum(1)
    nearest = y[(at.clamp(1, n) - 1).long()]
    return torch.where(total.squeeze(1) > 0, fitted, nearest)


def _moving_average(y: Tensor, width: int) -> Tensor:
    return y.unfold(0, width, 1).mean(-1)


def _one(y: Tensor, s: STLSettings) -> tuple[Tensor, Tensor]:
    n, p = len(y), s.period
    trend, season = torch.zeros_like(y), torch.zeros_like(y)
    weights: Tensor | None = None
    everywhere = torch.arange(1, n + 1, dtype=y.dtype)
    for outer in range(s.outer + 1):
        for _ in range(s.inner):
            cycle = y.new_empty(n + 2 * p)
            for phase in range(p):
                subseries = (y - trend)[phase::p]
                at = torch.arange(0, len(subseries) + 2, dtype=y.dtype)  # one period beyond each end
                cycle[phase::p] = _loess(subseries, s.seasonal, at, None if weights is None else weights[phase::p])
            low = _moving_average(_moving_average(_moving_average(cycle, p), p), 3)
            season = cycle[p : p + n] - _loess(low, s.low_pass, everywhere, None)
            trend = _loess(y - season, s.trend, everywhere, weights)
        if outer < s.outer:
            rest = (y - trend - season).abs()
            scale = 3 * (rest.sort().values[[(n - 1) // 2, n // 2]]).sum()  # six medians
            u = (rest / scale).clamp(max=1)
            weights = torch.where(rest <= 0.001 * scale, 1.0, (1 - u.square()).square())
            weights = torch.where(rest > 0.999 * scale, torch.zeros_like(weights), weights)
    return trend, season


def stl_reference(y: Tensor, settings: STLSettings) -> STLParts:
    """Decompose ``y`` ``(..., L)``; see :func:`dynakern.ops.stl`."""
    from dynakern.ops.stl import STLParts

    wide = y.detach().double().cpu().reshape(-1, y.shape[-1])
    trend, season = (torch.stack(part) for part in zip(*(_one(row, settings) for row in wide), strict=True))
    parts = trend, season, wide - trend - season
    return STLParts(*(part.reshape(y.shape).to(y) for part in parts))
