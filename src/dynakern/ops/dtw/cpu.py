"""Dynamic time warping in Numba: two rows of the table a pair, pairs in parallel."""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from dynakern.ops.dispatch import numba_threads

__all__ = ["dtw_cpu"]


@numba.njit(cache=True, nogil=True, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def _distances(x, y, x_lengths, y_lengths, window, out):  # pragma: no cover - compiled
    n, m, channels = x.shape[0], y.shape[0], x.shape[2]
    for pair in numba.prange(n * m):
        a, b = pair // m, pair % m
        rows, columns = x_lengths[a], y_lengths[b]
        band = max(int(window * max(rows, columns)), abs(rows - columns))
        above = np.full(columns + 1, np.inf)
        row = np.full(columns + 1, np.inf)
        above[0] = 0.0  # the corner before (0, 0)
        for i in range(rows):
            first, last = max(0, i - band), min(columns, i + band + 1)
            row[first] = np.inf  # left of the band
            for j in range(first, last):
                d = 0.0
                for c in range(channels):
                    step = x[a, i, c] - y[b, j, c]
                    d += step * step
                row[j + 1] = d + min(above[j + 1], row[j], above[j])
            if last < columns:
                row[last + 1] = np.inf  # right of the band, read by the next row
            above[0] = np.inf
            above, row = row, above
        out[a, b] = math.sqrt(above[columns])


def dtw_cpu(x: Tensor, y: Tensor, x_lengths: Tensor | None, y_lengths: Tensor | None, window: float) -> Tensor:
    """Return ``(N, M)`` from ``x`` ``(N, L, C)`` and ``y`` ``(M, K, C)``; see :func:`dynakern.ops.dtw`."""
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    arrays = [t.detach().to(wide).contiguous().numpy() for t in (x, y)]
    lengths = [
        np.full(len(t), t.shape[1], dtype=np.int64) if given is None else given.to(torch.int64).numpy()
        for t, given in ((x, x_lengths), (y, y_lengths))
    ]
    out = np.empty((len(x), len(y)), dtype=np.float64)
    with numba_threads():
        _distances(*arrays, *lengths, float(window), out)
    return torch.from_numpy(out).to(x.dtype)
