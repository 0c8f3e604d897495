"""The two-dimensional recurrence on a GPU: Triton kernels, forward and backward.

A program takes a block of lanes and walks over the cells in order. What moves along time stays in registers; what moves
across variates comes back from where the program wrote it a row before, each thread reading its own lanes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]

_LANES = 32  # of a program: one warp, since the lanes have to fill the GPU


@triton.jit
def _forward_kernel(a1, a2, a3, a4, b1, b2, h1, h2, V, T, F, row, LANES: tl.constexpr):
    f = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = f < F
    zero = tl.zeros([LANES], a1.dtype.element_ty)
    at = f
    for v in range(0, V):
        x1, x2 = zero, zero
        inner = ok & (v > 0)
        for _ in range(0, T):
            y1 = tl.load(b1 + at, mask=ok, other=0.0)
            y1 += tl.load(a1 + at, mask=ok, other=0.0) * x1 + tl.load(a2 + at, mask=ok, other=0.0) * x2
            y2 = tl.load(b2 + at, mask=ok, other=0.0)
            y2 += tl.load(a3 + at, mask=inner, other=0.0) * tl.load(h1 + at - row, mask=inner, other=0.0)
            y2 += tl.load(a4 + at, mask=inner, other=0.0) * tl.load(h2 + at - row, mask=inner, other=0.0)
            x1, x2 = y1, y2
            tl.store(h1 + at, x1, mask=ok)
            tl.store(h2 + at, x2, mask=ok)
            at += F
        tl.debug_barrier()


@triton.jit
def _backward_kernel(
    g1, g2, a1, a2, a3, a4, h1, h2, d1, d2, d3, d4, q1, q2, V, T, F, row, end, LANES: tl.constexpr
):  # fmt: skip
    """Walk back: q = g + what later cells ask for; the gradient of b is q, that of a is q times the earlier state."""
    f = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    ok = f < F
    zero = tl.zeros([LANES], a1.dtype.element_ty)
    at = end + f
    for v in range(V - 1, -1, -1):
        s1, s2 = zero, zero  # what the step after asks for
        below, inner = ok & (at + row <= end + f), ok & (v > 0)
        for t in range(T - 1, -1, -1):
            later = ok & (t > 0)
            asked = tl.load(q2 + at + row, mask=below, other=0.0)
            x1 = tl.load(g1 + at, mask=ok, other=0.0) + s1
            x1 += tl.load(a3 + at + row, mask=below, other=0.0) * asked
            x2 = tl.load(g2 + at, mask=ok, other=0.0) + s2
            x2 += tl.load(a4 + at + row, mask=below, other=0.0) * asked
            s1, s2 = tl.load(a1 + at, mask=ok, other=0.0) * x1, tl.load(a2 + at, mask=ok, other=0.0) * x1
            tl.store(q1 + at, x1, mask=ok)
            tl.store(q2 + at, x2, mask=ok)
            tl.store(d1 + at, x1 * tl.load(h1 + at - F, mask=later, other=0.0), mask=ok)
            tl.store(d2 + at, x1 * tl.load(h2 + at - F, mask=later, other=0.0), mask=ok)
            tl.store(d3 + at, x2 * tl.load(h1 + at - row, mask=inner, other=0.0), mask=ok)
            tl.store(d4 + at, x2 * tl.load(h2 + at - row, mask=inner, other=0.0), mask=ok)
            at -= F
        tl.debug_barrier()


def forward(*coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return both states ``(V, T, F)`` of six coefficients of that shape."""
    arrays = [x.contiguous() for x in coefficients]
    h1, h2 = torch.empty_like(arrays[0]), torch.empty_like(arrays[0])
    V, T, F = h1.shape
    if F:
        _forward_kernel[triton.cdiv(F, _LANES),](*arrays, h1, h2, V, T, F, T * F, LANES=_LANES, num_warps=1)
    return h1, h2


def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of a1 .. a4, b1 and b2 from those of the states, a1 .. a4 and the states."""
    arrays = [x.contiguous() for x in tensors]
    out = tuple(torch.empty_like(arrays[2]) for _ in range(6))
    V, T, F = out[0].shape
    if F:
        sizes = V, T, F, T * F, (V * T - 1) * F
        _backward_kernel[triton.cdiv(F, _LANES),](*arrays, *out, *sizes, LANES=_LANES, num_warps=1)
    return out  # pyright: ignore[reportReturnType]
