"""The two-dimensional recurrence in Numba: blocks of lanes in parallel, cells in order, lanes vectorised."""

from __future__ import annotations

import numba
import torch
from torch import Tensor

from dynakern.ops.dispatch import numba_threads

__all__ = ["backward", "forward"]

_BLOCK = 256  # lanes of a block: its cells' eight arrays of float32 stay in the first-level cache
_FAST = {"reassoc", "contract", "nsz", "arcp"}


@numba.njit(cache=True, nogil=True, parallel=True, fastmath=_FAST)
def _forward(a1, a2, a3, a4, b1, b2, h1, h2, block):  # pragma: no cover - compiled
    variates, steps, lanes = a1.shape
    for part in numba.prange((lanes + block - 1) // block):
        low, high = part * block, min(lanes, (part + 1) * block)
        for v in range(variates):
            for t in range(steps):
                if t > 0:
                    for f in range(low, high):
                        h1[v, t, f] = b1[v, t, f] + a1[v, t, f] * h1[v, t - 1, f] + a2[v, t, f] * h2[v, t - 1, f]
                else:
                    for f in range(low, high):
                        h1[v, t, f] = b1[v, t, f]
                if v > 0:
                    for f in range(low, high):
                        h2[v, t, f] = b2[v, t, f] + a3[v, t, f] * h1[v - 1, t, f] + a4[v, t, f] * h2[v - 1, t, f]
                else:
                    for f in range(low, high):
                        h2[v, t, f] = b2[v, t, f]


@numba.njit(cache=True, nogil=True, parallel=True, fastmath=_FAST)
def _backward(g1, g2, a1, a2, a3, a4, h1, h2, d1, d2, d3, d4, q1, q2, block):  # pragma: no cover - compiled
    """Walk back: q = g + what later cells ask for; the gradient of b is q, that of a is q times the earlier state."""
    variates, steps, lanes = a1.shape
    for part in numba.prange((lanes + block - 1) // block):
        low, high = part * block, min(lanes, (part + 1) * block)
        for v in range(variates - 1, -1, -1):
            for t in range(steps - 1, -1, -1):
                for f in range(low, high):
                    q1[v, t, f] = g1[v, t, f]
                    q2[v, t, f] = g2[v, t, f]
                if t + 1 < steps:
                    for f in range(low, high):
                        q1[v, t, f] += a1[v, t + 1, f] * q1[v, t + 1, f]
                        q2[v, t, f] += a2[v, t + 1, f] * q1[v, t + 1, f]
                if v + 1 < variates:
                    for f in range(low, high):
                        q1[v, t, f] += a3[v + 1, t, f] * q2[v + 1, t, f]
                        q2[v, t, f] += a4[v + 1, t, f] * q2[v + 1, t, f]
                if t > 0:
                    for f in range(low, high):
                        d1[v, t, f] = q1[v, t, f] * h1[v, t - 1, f]
                        d2[v, t, f] = q1[v, t, f] * h2[v, t - 1, f]
                else:
                    for f in range(low, high):
                        d1[v, t, f] = 0
                        d2[v, t, f] = 0
                if v > 0:
                    for f in range(low, high):
                        d3[v, t, f] = q2[v, t, f] * h1[v - 1, t, f]
                        d4[v, t, f] = q2[v, t, f] * h2[v - 1, t, f]
                else:
                    for f in range(low, high):
                        d3[v, t, f] = 0
                        d4[v, t, f] = 0


def forward(*coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return both states ``(V, T, F)`` of six coefficients of that shape."""
    arrays = [x.detach().contiguous() for x in coefficients]
    h1, h2 = torch.empty_like(arrays[0]), torch.empty_like(arrays[0])
    with numba_threads():
        _forward(*(x.numpy() for x in (*arrays, h1, h2)), _BLOCK)
    return h1, h2


def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of a1 .. a4, b1 and b2 from those of the states, a1 .. a4 and the states."""
    arrays = [x.detach().contiguous() for x in tensors]
    out = tuple(torch.empty_like(arrays[2]) for _ in range(6))
    with numba_threads():
        _backward(*(x.numpy() for x in (*arrays, *out)), _BLOCK)
    return out  # pyright: ignore[reportReturnType]
