"""The selective two-dimensional state space on the CPU: fused Numba kernels, forward and backward.

A work item is one sequence of the batch and a block of features, side by side in the vector lanes. It takes the states
one by one and walks the whole grid with each, so that what one state needs, a few numbers a cell and lane, stays in the
nearest caches. The forward pass holds two rows of states; the backward pass recomputes the grid of one state before it
walks back over it, so that nothing is kept between the two, and no array of all states exists. Sums over lanes, cells
and sequences run in a fixed order, whatever the number of threads.

A cell has records of LANES numbers a place, in four arrays: its input, steps, output and their gradients; the six
coefficients of the state at work; the two states, after one more record of zeros before each row's first step; and the
gradients that go on to the variate above. Places are fixed offsets, so that one address serves for all of a record.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import get_thread_id, njit, prange, types
from numba.core.extending import intrinsic, overload
from torch import Tensor

from dynakern.ops.dispatch import numba_threads

__all__ = ["backward", "forward"]

LANES = 32  # features of a block
STEPS = 16  # whose coefficients are computed at a time, so that they stay in the first-level cache
WORK_ITEMS = 32  # that the backward pass aims at; more would only cost memory for partial sums

_f32 = np.float32
_LOG2E = 1.4426950408889634
_LOW, _HIGH, _ROUND, _ONE = _f32(-127), _f32(128), _f32(1.5 * 2**23), _f32(1)
_LOW64, _HIGH64, _ROUND64 = -1023.0, 1024.0, 1.5 * 2.0**52
# 2**r = 1 + r * q(r) on [-1/2, 1/2] with least relative error: 2e-9 (single), 3e-18 (double); exact at r = 0.
_S0, _S1, _S2 = _f32(0.693147202855), _f32(0.240226479136), _f32(0.0555033247119)
_S3, _S4, _S5 = _f32(0.00961843735696), _f32(0.0013398874394), _f32(0.000153533620689)
_D0, _D1, _D2, _D3 = 0.69314718055994532581, 0.2402265069591013126, 0.055504108664820083227, 0.0096181291075942
_D4, _D5, _D6, _D7 = 0.0013333558146774620517, 0.0001540353045711209086, 1.5252733493127489347e-5, 1.32154352823e-6
_D8, _D9, _D10 = 1.0178199571842137974e-7, 7.0737832485031332991e-9, 4.4347712982003767083e-10

# Places in the records; unsigned, since an unsigned index needs no test for a negative one.
_u = np.uint64
_PLACES = [_u(LANES * k) for k in range(12)]
_X, _DT1, _DT2, _Y, _GY, _GX, _GDT1, _GDT2 = _PLACES[:8]  # of a cell
_E1, _E2, _E3, _E4, _W1, _W2 = _PLACES[:6]  # of its coefficients: exponentials, and weights of the input
_H1, _H2 = _PLACES[:2]  # of its states, and of gradients that go on to the variate above
_A1, _A2, _A3, _A4, _I1, _I3 = _PLACES[:6]  # of what is one for all cells: rates, two reciprocals,
_P1, _P2, _GA1, _GA2, _GA3, _GA4 = _PLACES[6:]  # what goes on along time, and gradients of the rates

# The operands: x (B, V T, D), delta (B, V T, 2 D), A (4, D, N), maps B1, B2, C1, C2 (B, N, V T, 4), D (D,) or empty;
# kappa of A1 and of the others; whether the input rule is Euler's; T.
_Operands = namedtuple("_Operands", "x delta A maps D kappa others euler T")
# Room for each thread: records of cells, coefficients, states, gradients for the variate above; what is one for all.
_Room = namedtuple("_Room", "cells e h go lanes")
# The gradients: one of A and D for each sequence, one of the maps (B, slots, N, V T, 4) for each slot.
_Gradients = namedtuple("_Gradients", "x delta A maps D")

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
_kernel = njit(fastmath={"contract"}, **_OPTIONS)
_reduction = njit(fastmath={"contract", "reassoc", "nsz"}, **_OPTIONS)


@intrinsic
def _disjoint(typing_context: Any) -> Any:
    """Promise that the arrays given to the calling function do not overlap, which lets its loops vectorise.

    It is LLVM's ``noalias``, set on the data pointers, the fifth field of an array argument. The function is also asked
    to use vectors of 512 bits where the processor has them. Without either the loops are slower and compute the same.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for argument in builder.function.args:
            if isinstance(argument.type, ir.PointerType) and argument.name.endswith(".4"):
                argument.add_attribute("noalias")
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # llvmlite's own add knows no such names
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _scale(typing_context: Any, p: Any, shifted: Any) -> Any:
    """Return ``p * 2**k`` by adding k to the exponent; ``shifted`` is k + 1.5 * 2**23 (2**52): k in its low bits."""
    bits, mantissa = (32, 23) if p == types.float32 else (64, 52)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(bits)
        exponent = builder.shl(builder.bitcast(args[1], integer), ir.Constant(integer, mantissa))
        return builder.bitcast(builder.add(builder.bitcast(args[0], integer), exponent), args[0].type)

    return p(p, shifted), codegen


def _powers(x: float) -> tuple[float, float]:
    """Return ``2**x`` and ``2**x - 1``, both with small relative errors; they vectorise, unlike library calls.

    Below the normal range they are 0 and -1. NaN stays NaN.
    """
    return 2.0**x, np.expm1(x * np.log(2.0))


def _powers_single(x):
    x = _LOW if x < _LOW else x
    x = _HIGH if x > _HIGH else x
    shifted = x + _ROUND  # rounds to an integer
    whole = shifted - _ROUND
    r = x - whole
    m = r * (((((_S5 * r + _S4) * r + _S3) * r + _S2) * r + _S1) * r + _S0)
    e = _scale(m + _ONE, shifted)
    return e, m if whole == 0 else e - _ONE


def _powers_double(x):
    x = _LOW64 if x < _LOW64 else x
    x = _HIGH64 if x > _HIGH64 else x
    shifted = x + _ROUND64
    whole = shifted - _ROUND64
    r = x - whole
    q = ((((_D10 * r + _D9) * r + _D8) * r + _D7) * r + _D6) * r + _D5
    m = r * (((((q * r + _D4) * r + _D3) * r + _D2) * r + _D1) * r + _D0)
    e = _scale(m + 1.0, shifted)
    return e, m if whole == 0 else e - 1.0


@overload(_powers, jit_options={"fastmath": {"contract"}})  # "reassoc" would undo the rounding
def _powers_overload(x):
    return _powers_single if x == types.float32 else _powers_double


@_kernel
def _load(source, first, count, cells, place):
    """Copy columns ``first : first + count`` to a place of the cells, zeros beside them."""
    for i in range(source.shape[0]):
        for j in range(LANES):
            cells[i, place + _u(j)] = source[i, first + j] if j < count else 0


@_kernel
def _store(cells, place, first, count, target):
    """Copy a place of the cells back; the inverse of :func:`_load`."""
    for i in range(target.shape[0]):
        for j in range(count):
            target[i, first + j] = cells[i, place + _u(j)]


@_kernel
def _skip(cells, place, D, first, count, target):
    """Write D times one place of the cells to another, or zeros without a skip."""
    for i in range(cells.shape[0]):
        for j in range(LANES):
            cells[i, target + _u(j)] = D[first + j] * cells[i, place + _u(j)] if D.size and j < count else 0


@_kernel
def _rates(p, first, count, n, lanes):
    """Write the rates of state n and their reciprocals; without coupling A2 and A4 are 0."""
    for j in range(count):
        lanes[_A1 + _u(j)], lanes[_A3 + _u(j)] = p.A[0, first + j, n], p.A[2, first + j, n]
        lanes[_I1 + _u(j)], lanes[_I3 + _u(j)] = _ONE / p.A[0, first + j, n], _ONE / p.A[2, first + j, n]
        if p.others != 0:
            lanes[_A2 + _u(j)], lanes[_A4 + _u(j)] = p.A[1, first + j, n], p.A[3, first + j, n]


@_kernel
def _clear(values):
    for i in range(values.size):
        values[i] = 0


@_kernel
def _coefficients(cells, lanes, euler, width, e):
    """Write the exponentials of some cells, and the weights of their inputs."""
    _disjoint()
    log2e = cells.dtype.type(_LOG2E)
    for t in range(cells.shape[0]):
        for j in range(_u(width)):
            dt1, dt2 = cells[t, j + _DT1], cells[t, j + _DT2]
            s1, s2 = dt1 * log2e, dt2 * log2e
            e[t, j + _E1], m1 = _powers(s1 * lanes[j + _A1])
            e[t, j + _E2], _ = _powers(s1 * lanes[j + _A2])
            e[t, j + _E3], m3 = _powers(s2 * lanes[j + _A3])
            e[t, j + _E4], _ = _powers(s2 * lanes[j + _A4])
            e[t, j + _W1] = dt1 if euler else m1 * lanes[j + _I1]
            e[t, j + _W2] = dt2 if euler else m3 * lanes[j + _I3]


@_kernel
def _advance(cells, e, maps, kappa, others, width, above, lanes, here):
    """Walk one state of all lanes along some cells of a row; add its share to the output."""
    _disjoint()
    for t in range(cells.shape[0]):
        b1, b2, c1, c2 = maps[t, 0], maps[t, 1], maps[t, 2], maps[t, 3]
        for j in range(_u(width)):
            x = cells[t, j + _X]
            before1, before2 = lanes[j + _P1], lanes[j + _P2]
            h1 = kappa * e[t, j + _E1] * before1 + others * e[t, j + _E2] * before2 + e[t, j + _W1] * (b1 * x)
            from_above = e[t, j + _E3] * above[t + 1, j + _H1] + e[t, j + _E4] * above[t + 1, j + _H2]
            h2 = others * from_above + e[t, j + _W2] * (b2 * x)
            lanes[j + _P1], lanes[j + _P2] = h1, h2
            here[t + 1, j + _H1], here[t + 1, j + _H2] = h1, h2
            cells[t, j + _Y] += c1 * h1 + c2 * h2


@_reduction
def _retreat(cells, e, maps, kappa, others, euler, width, above, here, lanes, go, grad_maps):
    """Walk one state of all lanes back along a row, with q the gradients of its two states.

    ``go`` holds what the row below hands to this one, and then what this one hands to the row above.
    """
    _disjoint()
    zero = cells.dtype.type(0)
    for back in range(cells.shape[0]):
        t = cells.shape[0] - 1 - back
        b1, b2, c1, c2 = maps[t, 0], maps[t, 1], maps[t, 2], maps[t, 3]
        to_b1, to_b2, to_c1, to_c2 = zero, zero, zero, zero
        for j in range(_u(width)):
            x, g, dt1, dt2 = cells[t, j + _X], cells[t, j + _GY], cells[t, j + _DT1], cells[t, j + _DT2]
            e1, e3, w1, w2 = e[t, j + _E1], e[t, j + _E3], e[t, j + _W1], e[t, j + _W2]
            q1 = c1 * g + (lanes[j + _P1] + go[t, j + _H1])
            q2 = c2 * g + (lanes[j + _P2] + go[t, j + _H2])
            r1, r2 = kappa * e1 * q1, others * e[t, j + _E2] * q1
            r3, r4 = others * e3 * q2, others * e[t, j + _E4] * q2
            lanes[j + _P1], lanes[j + _P2], go[t, j + _H1], go[t, j + _H2] = r1, r2, r3, r4
            r1, r2 = r1 * here[t, j + _H1], r2 * here[t, j + _H2]
            r3, r4 = r3 * above[t + 1, j + _H1], r4 * above[t + 1, j + _H2]
            u1, u2 = b1 * q1, b2 * q2
            to_dt1, to_dt2, to_a1, to_a3 = u1 * x, u2 * x, zero, zero
            if not euler:  # the weights depend on rates too
                v1, v2 = to_dt1 * lanes[j + _I1], to_dt2 * lanes[j + _I3]
                r1, r3 = r1 + v1 * e1, r3 + v2 * e3
                to_dt1, to_dt2, to_a1, to_a3 = zero, zero, v1 * w1, v2 * w2
            to_b1 += q1 * w1 * x
            to_b2 += q2 * w2 * x
            to_c1 += g * here[t + 1, j + _H1]
            to_c2 += g * here[t + 1, j + _H2]
            cells[t, j + _GX] += u1 * w1 + u2 * w2
            cells[t, j + _GDT1] += lanes[j + _A1] * r1 + lanes[j + _A2] * r2 + to_dt1
            cells[t, j + _GDT2] += lanes[j + _A3] * r3 + lanes[j + _A4] * r4 + to_dt2
            lanes[j + _GA1] += dt1 * r1 - to_a1
            lanes[j + _GA2] += dt1 * r2
            lanes[j + _GA3] += dt2 * r3 - to_a3
            lanes[j + _GA4] += dt2 * r4
        grad_maps[t, 0] += to_b1
        grad_maps[t, 1] += to_b2
        grad_maps[t, 2] += to_c1
        grad_maps[t, 3] += to_c2


@_kernel
def _replay(p, maps, width, cells, e, h, lanes, keep):
    """Walk one state over the grid. All coefficients and rows of states are kept, or those of some steps and two rows.

    The state's share of the output is added to it.
    """
    rows = maps.shape[0] // p.T + 1 if keep else 2
    _clear(h[: p.T + 1].reshape(-1))
    for v in range(maps.shape[0] // p.T):
        above, here = h[v % rows * (p.T + 1) :], h[(v + 1) % rows * (p.T + 1) :]
        _clear(lanes[_P1:_GA1])
        for start in range(0, p.T, STEPS):
            low, high = v * p.T + start, v * p.T + min(p.T, start + STEPS)
            part = e[low:high] if keep else e[: high - low]
            _coefficients(cells[low:high], lanes, p.euler, width, part)
            _advance(
                cells[low:high], part, maps[low:high], p.kappa, p.others, width, above[start:], lanes, here[start:]
            )  # fmt: skip


@_kernel
def _begin(p, i, first, count, cells):
    """Load the input and the steps of a block; return the width of its loops, whole vectors of 64 bytes."""
    _load(p.x[i], first, count, cells, _X)
    _load(p.delta[i], first, count, cells, _DT1)
    _load(p.delta[i], p.x.shape[2] + first, count, cells, _DT2)
    return min(LANES, (count + 15) // 16 * 16)


@_kernel
def _forward_block(p, room, thread, i, first, count, y):
    cells, e, h, lanes = room.cells[thread], room.e[thread], room.h[thread], room.lanes[thread]
    width = _begin(p, i, first, count, cells)
    _skip(cells, _X, p.D, first, count, _Y)
    for n in range(p.A.shape[2]):
        _rates(p, first, count, n, lanes)
        _replay(p, p.maps[i, n], width, cells, e, h, lanes, False)
    _store(cells, _Y, first, count, y[i])


@njit(parallel=True, **_OPTIONS)
def _forward(p, room, y):
    features = p.x.shape[2]
    blocks = (features + LANES - 1) // LANES
    for item in prange(p.x.shape[0] * blocks):
        first = item % blocks * LANES
        _forward_block(p, room, get_thread_id(), item // blocks, first, min(LANES, features - first), y)


@_kernel
def _walk_back(p, maps, width, cells, e, h, go, lanes, grad_maps):
    """Walk one state back over the grid."""
    _clear(go.reshape(-1))
    _clear(lanes[_GA1:])
    rows = maps.shape[0] // p.T
    for back in range(rows):
        v = rows - 1 - back
        low, high = v * p.T, (v + 1) * p.T
        _clear(lanes[_P1:_GA1])
        _retreat(
            cells[low:high], e[low:high], maps[low:high], p.kappa, p.others, p.euler, width,
            h[v * (p.T + 1) :], h[(v + 1) * (p.T + 1) :], lanes, go, grad_maps[low:high],
        )  # fmt: skip


@_kernel
def _backward_block(p, room, thread, g, i, slot, first, count, grad):
    """Take a block of features of sequence i back."""
    features = p.x.shape[2]
    cells, e, h, lanes = room.cells[thread], room.e[thread], room.h[thread], room.lanes[thread]
    width = _begin(p, i, first, count, cells)
    _load(g[i], first, count, cells, _GY)
    _skip(cells, _GY, p.D, first, count, _GX)
    _skip(cells, _GY, p.D[:0], first, count, _GDT1)  # zeros
    _skip(cells, _GY, p.D[:0], first, count, _GDT2)
    for n in range(p.A.shape[2]):
        _rates(p, first, count, n, lanes)
        _replay(p, p.maps[i, n], width, cells, e, h, lanes, True)
        _walk_back(p, p.maps[i, n], width, cells, e, h, room.go[thread], lanes, grad.maps[i, slot, n])
        for j in range(count):
            for k in range(4):
                grad.A[i, k, first + j, n] = lanes[_GA1 + _u(k * LANES + j)]
    _store(cells, _GX, first, count, grad.x[i])
    _store(cells, _GDT1, first, count, grad.delta[i])
    _store(cells, _GDT2, features + first, count, grad.delta[i])
    for c in range(cells.shape[0]):
        for j in range(count):
            grad.D[i, first + j] += cells[c, _X + _u(j)] * cells[c, _GY + _u(j)]


@njit(parallel=True, **_OPTIONS)
def _backward(p, room, g, slots, grad):
    features = p.x.shape[2]
    blocks = (features + LANES - 1) // LANES
    for item in prange(p.x.shape[0] * slots):
        i, slot, thread = item // slots, item % slots, get_thread_id()
        for block in range(blocks * slot // slots, blocks * (slot + 1) // slots):
            first = block * LANES
            _backward_block(p, room, thread, g, i, slot, first, min(LANES, features - first), grad)


def _operands(tensors: tuple[Tensor | None, ...], coupling: str, euler: bool) -> _Operands:
    x, delta, A, B, C, D = tensors
    maps = torch.cat([B, C], 3).flatten(1, 2).permute(0, 3, 1, 2)  # (B, N, V T, 4)
    laid = x.flatten(1, 2), delta.flatten(3).flatten(1, 2), A, maps, x.new_empty(0) if D is None else D
    real = np.float64 if x.dtype == torch.float64 else np.float32
    kappa = {"half": (0.5, 0.5), "raw": (1, 1), "none": (1, 0)}[coupling]
    return _Operands(*(v.detach().contiguous().numpy() for v in laid), *map(real, kappa), euler, x.shape[2])


def _room(x: Tensor, keep: bool) -> _Room:
    """Return room for one block of one sequence a thread; ``keep`` as the backward pass does."""
    threads, (V, T) = numba.get_num_threads(), x.shape[1:3]
    states = (V + 1) * (T + 1) if keep else 2 * (T + 1)
    rows = {"cells": (V * T, 8), "e": (V * T if keep else STEPS, 6), "h": (states, 2), "go": (T, 2)}
    records = {name: x.new_zeros(threads, count, LANES * places) for name, (count, places) in rows.items()}
    return _Room(**{name: v.numpy() for name, v in records.items()}, lanes=x.new_zeros(threads, LANES * 12).numpy())


def forward(tensors: tuple[Tensor | None, ...], coupling: str, euler: bool) -> Tensor:
    """Return y ``(B, V, T, D)``; ``tensors`` are x, delta, A, B, C and D, of one dtype (float32 or float64)."""
    y = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    with numba_threads():
        _forward(_operands(tensors, coupling, euler), _room(y, False), y.flatten(1, 2).numpy())
    return y


def backward(g: Tensor, tensors: tuple[Tensor | None, ...], coupling: str, euler: bool) -> list[Tensor]:
    """Return the gradients of the six tensors, an empty one for an absent D, from that of y."""
    x, delta, A, _, _, D = tensors
    p = _operands(tensors, coupling, euler)
    batch, cells, features = p.x.shape
    slots = min(-(-features // LANES), -(-WORK_ITEMS // max(1, batch)))
    found = _Gradients(
        x=x.new_empty(p.x.shape),
        delta=x.new_empty(p.delta.shape),
        A=x.new_empty(batch, *A.shape),
        maps=x.new_zeros(batch, slots, A.shape[2], cells, 4),
        D=x.new_zeros(batch, features),
    )
    arrays = g.flatten(1, 2).contiguous().numpy(), slots, _Gradients(*(v.numpy() for v in found))
    with numba_threads():
        _backward(p, _room(x, True), *arrays)
    maps = found.maps.sum(1).permute(0, 2, 3, 1).unflatten(1, x.shape[1:3])  # (B, V, T, 4, N)
    grad_b, grad_c = (v.clone(memory_format=torch.contiguous_format) for v in maps.split(2, 3))
    grad_d = x.new_empty(0) if D is None else found.D.sum(0)
    return [found.x.view(x.shape), found.delta.view(delta.shape), found.A.sum(0), grad_b, grad_c, grad_d]
