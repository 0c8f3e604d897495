"""STL in Numba: regressions over their windows only, series in parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch import Tensor

from dynakern.ops.dispatch import numba_threads

if TYPE_CHECKING:
    from dynakern.ops.stl import STLParts, STLSettings

__all__ = ["stl_cpu"]


@numba.njit(cache=True, nogil=True)
def _fit(y, span, at, left, right, weights, use_weights):  # pragma: no cover - compiled
    """Return the local regression at position ``at`` (from 1) over points left .. right, or NaN without any weight."""
    n = len(y)
    h = max(at - left, right - at) + max(0, (span - n) // 2)
    total = mean = 0.0
    for j in range(left, right + 1):
        w = _weight(abs(j - at), h)
        if use_weights:
            w *= weights[j - 1]
        total += w
        mean += w * j
    if total <= 0:
        return np.nan
    mean /= total
    spread = value = 0.0
    product = 0.0
    for j in range(left, right + 1):
        w = _weight(abs(j - at), h)
        if use_weights:
            w *= weights[j - 1]
        w /= total
        spread += w * (j - mean) ** 2
        value += w * y[j - 1]
        product += w * (j - mean) * y[j - 1]
    if np.sqrt(spread) > 0.001 * (n - 1):
        value += (at - mean) / spread * product
    return value


@numba.njit(cache=True, nogil=True, inline="always")
def _weight(distance, h):  # pragma: no cover - compiled
    if distance > 0.999 * h:
        return 0.0
    if distance <= 0.001 * h:
        return 1.0
    ratio = distance / h
    core = 1 - ratio * ratio * ratio
    return core * core * core


@numba.njit(cache=True, nogil=True)
def _smooth(y, span, weights, use_weights, first, last, out):  # pragma: no cover - compiled
    """Evaluate the regression at positions first .. last (from 1); a point without weight keeps its own value."""
    n = len(y)
    width = min(span, n)
    for at in range(first, last + 1):
        left = 1
        if span < n:
            left = min(max(at - (span + 1) // 2 + 1, 1), n - width + 1)
        value = _fit(y, span, at, left, left + width - 1, weights, use_weights)
        out[at - first] = y[min(max(at, 1), n) - 1] if np.isnan(value) else value


@numba.njit(cache=True, nogil=True)
def _average(y, width):  # pragma: no cover - compiled
    out = np.empty(len(y) - width + 1)
    total = 0.0
    for i in range(width):
        total += y[i]
    out[0] = total / width
    for i in range(width, len(y)):
        total += y[i] - y[i - width]
        out[i - width + 1] = total / width
    return out


@numba.njit(cache=True, nogil=True)
def _decompose(y, period, seasonal, span, low_pass, inner, outer, trend, season):  # pragma: no cover - compiled
    n = len(y)
    weights, use_weights = np.ones(n), False
    cycle = np.empty(n + 2 * period)
    low = np.empty(n)
    for repeat in range(outer + 1):
        for _ in range(inner):
            for phase in range(period):
                subseries = (y[phase::period] - trend[phase::period]).copy()
                piece = np.empty(len(subseries) + 2)
                _smooth(subseries, seasonal, weights[phase::period].copy(), use_weights, 0, len(subseries) + 1, piece)
                cycle[phase::period] = piece
            filtered = _average(_average(_average(cycle, period), period), 3)
            _smooth(filtered, low_pass, weights, False, 1, n, low)
            for i in range(n):
                season[i] = cycle[period + i] - low[i]
            _smooth(y - season, span, weights, use_weights, 1, n, trend)
        if repeat < outer:
            rest = np.abs(y - trend - season)
            ordered = np.sort(rest)
            scale = 3 * (ordered[(n - 1) // 2] + ordered[n // 2])  # six medians
            for i in range(n):
                if rest[i] <= 0.001 * scale:
                    weights[i] = 1.0
                elif rest[i] <= 0.999 * scale:
                    weights[i] = (1 - (rest[i] / scale) ** 2) ** 2
                else:
                    weights[i] = 0.0
            use_weights = True


@numba.njit(cache=True, nogil=True, parallel=True)
def _all(y, period, seasonal, span, low_pass, inner, outer, trend, season):  # pragma: no cover - compiled
    for row in numba.prange(len(y)):
        _decompose(y[row], period, seasonal, span, low_pass, inner, outer, trend[row], season[row])


def stl_cpu(y: Tensor, settings: STLSettings) -> STLParts:
    """Decompose ``y`` ``(..., L)``; see :func:`dynakern.ops.stl`."""
    from dynakern.ops.stl import STLParts

    wide = y.detach().double().reshape(-1, y.shape[-1]).contiguous().numpy()
    trend, season = np.zeros_like(wide), np.zeros_like(wide)
    with numba_threads():
        _all(wide, *settings, trend, season)
    parts = trend, season, wide - trend - season
    return STLParts(*(torch.from_numpy(part).reshape(y.shape).to(y) for part in parts))
