"""The selective scan on the CPU: fused Numba kernels, forward and backward.

A work item is one sequence of the batch and a block of LANES channels of one group. It walks over the steps in tiles:
a tile of ``delta`` and ``u`` is turned so that the channels lie side by side, which makes them the vector axis of every
inner loop whatever the number of states, and it stays in the nearest caches while the states pass over it one by one.
The backward pass starts each tile from the state that the forward pass kept at its first row, recomputes the others,
and walks the tile backwards. Sums over channels and sequences run in a fixed order, whatever the number of threads.

Names: a *tile* is ``(steps, LANES)``, *lanes* are ``(N, LANES)``, *rows* are ``(N, steps)``; ``first``, ``lanes`` are
the first channel of a block and their number, ``start`` the first step of a tile. Loops run over the stored width of a
tile: LLVM would unroll a constant one instead of vectorising it. No slice is assigned: that takes seconds to compile.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core.extending import intrinsic, overload
from torch import Tensor

from dynakern.ops.dispatch import numba_threads

__all__ = ["scan_backward", "scan_forward"]

LANES = 32  # channels of a block
WORK_ITEMS = 64  # that the backward pass aims at; more would only cost memory for partial sums
ONE_THREAD = 1 << 20  # states times steps, under half a millisecond, below which one thread does all

_LOG2E = 1.4426950408889634
_f32 = np.float32
_LOW, _HIGH, _ROUND, _ONE, _TWO = _f32(-127), _f32(128), _f32(1.5 * 2**23), _f32(1), _f32(2)
_LOW64, _HIGH64, _ROUND64 = -1023.0, 1024.0, 1.5 * 2.0**52
# 2**r = 1 + r * q(r) on [-1/2, 1/2] with least relative error: 2e-9 (single), 3e-18 (double); exact at r = 0.
_S0, _S1, _S2 = _f32(0.693147202855), _f32(0.240226479136), _f32(0.0555033247119)
_S3, _S4, _S5 = _f32(0.00961843735696), _f32(0.0013398874394), _f32(0.000153533620689)
_D0, _D1, _D2, _D3 = 0.69314718055994532581, 0.2402265069591013126, 0.055504108664820083227, 0.0096181291075942
_D4, _D5, _D6, _D7 = 0.0013333558146774620517, 0.0001540353045711209086, 1.5252733493127489347e-5, 1.32154352823e-6
_D8, _D9, _D10 = 1.0178199571842137974e-7, 7.0737832485031332991e-9, 4.4347712982003767083e-10
# log(1 + w) = s * q(s**2), s = w / (2 + w), on [0, 1], relative error 4e-9.
_L0, _L1, _L2 = _f32(2.00000000808), _f32(0.666663101449), _f32(0.400251143238)
_L3, _L4 = _f32(0.279576657946), _f32(0.281915472234)

_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
_kernel = njit(fastmath={"contract"}, **_OPTIONS)
_reduction = njit(fastmath={"contract", "reassoc", "nsz"}, **_OPTIONS)


@intrinsic
def _disjoint(typing_context: Any) -> Any:
    """Promise that the arrays given to the calling function do not overlap, which lets its loops vectorise.

    Numba makes this promise for its own parallel loops only. It is LLVM's ``noalias``, set on the data pointers, the
    fifth field of an array argument; without it the loops are slower and compute the same.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for argument in builder.function.args:
            if argument.name.startswith("arg.") and argument.name.endswith(".4"):
                argument.add_attribute("noalias")
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


def _exp2(x: float) -> float:
    """Return ``2**x``, 0 below the normal range; it vectorises, unlike the library call. NaN stays NaN."""
    return 2.0**x


def _exp2_single(x):
    x = _LOW if x < _LOW else x
    x = _HIGH if x > _HIGH else x
    shifted = x + _ROUND  # rounds to an integer
    r = x - (shifted - _ROUND)
    q = ((((_S5 * r + _S4) * r + _S3) * r + _S2) * r + _S1) * r + _S0
    return _scale(q * r + _ONE, shifted)


def _exp2_double(x):
    x = _LOW64 if x < _LOW64 else x
    x = _HIGH64 if x > _HIGH64 else x
    shifted = x + _ROUND64
    r = x - (shifted - _ROUND64)
    q = ((((_D10 * r + _D9) * r + _D8) * r + _D7) * r + _D6) * r + _D5
    q = ((((q * r + _D4) * r + _D3) * r + _D2) * r + _D1) * r + _D0
    return _scale(q * r + 1.0, shifted)


@overload(_exp2, jit_options={"fastmath": {"contract"}})  # "reassoc" would undo the rounding
def _exp2_overload(x):
    return _exp2_single if x == types.float32 else _exp2_double


def _log1p(w: float) -> float:
    """Return ``log(1 + w)`` for w in [0, 1]."""
    return np.log1p(w)


def _log1p_single(w):
    s = w / (_TWO + w)
    v = s * s
    return s * ((((_L4 * v + _L3) * v + _L2) * v + _L1) * v + _L0)


@overload(_log1p, jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _log1p_overload(w):
    return _log1p_single if w == types.float32 else lambda w: np.log1p(w)


@_kernel
def _sigmoid(v, one, minus_log2e):
    """Return ``1 / (1 + exp(-v))``, accurate for either sign; the constants come in the type of v."""
    e = _exp2(abs(v) * minus_log2e)
    return (one if v > 0 else e) / (one + e)


class _Arrays(NamedTuple):
    """The operands as arrays of one dtype; an absent one has size 0. Static coefficients are ``(D, N)``."""

    u: np.ndarray  # (b, D, L)
    delta: np.ndarray  # (b, D, L)
    A: np.ndarray  # (D, N)
    B: np.ndarray  # (b, G, N, L)
    C: np.ndarray  # (b, G, N, L)
    B_static: np.ndarray  # (D, N)
    C_static: np.ndarray  # (D, N)
    D: np.ndarray  # (D,)
    z: np.ndarray  # (b, D, L)
    bias: np.ndarray  # (D,)
    initial: np.ndarray  # (b, D, N)


# What the backward pass fills, field by field; one of A, D, the bias and static coefficients for each sequence, and one
# of variable coefficients, (b, G, slots, N, L), for each slot: the sums over them are left to the caller.
_Gradients = namedtuple("_Gradients", _Arrays._fields)


@_kernel
def _load(source, first, lanes, start, steps, tile):
    """Turn ``source[first : first + lanes, start : start + steps]`` into ``tile[:steps, :lanes]``."""
    _disjoint()
    first, start = np.uint64(first), np.uint64(start)  # an unsigned index needs no test for a negative one
    for j in range(np.uint64(lanes)):
        for t in range(np.uint64(steps)):
            tile[t, j] = source[first + j, start + t]


@_kernel
def _store(tile, first, lanes, start, steps, target):
    """Turn a tile back into ``target``; the inverse of :func:`_load`."""
    _disjoint()
    first, start = np.uint64(first), np.uint64(start)
    for j in range(np.uint64(lanes)):
        for t in range(np.uint64(steps)):
            target[first + j, start + t] = tile[t, j]


@_kernel
def _load_rows(variable, i, group, start, steps, rows):
    """Copy a tile's variable coefficients; static ones belong to the lanes and leave the ones that are here."""
    if variable.size:
        start = np.uint64(start)
        for n in range(variable.shape[2]):
            for t in range(np.uint64(steps)):
                rows[n, t] = variable[i, group, n, start + t]


@_kernel
def _add_rows(rows, steps, start, target):
    _disjoint()
    start = np.uint64(start)
    for n in range(rows.shape[0]):
        for t in range(np.uint64(steps)):
            target[n, start + t] += rows[n, t]


@_kernel
def _zeros(N, dtype):
    return np.zeros((N, LANES), dtype)


@_kernel
def _lanes_of(parameter, first, lanes, factor):
    """Return ``factor * parameter[first : first + lanes]``, ``(D, N)``, as ``(N, LANES)``, zero beyond ``lanes``."""
    out = _zeros(parameter.shape[1], parameter.dtype)
    for n in range(parameter.shape[1]):
        for j in range(lanes):
            out[n, j] = parameter[first + j, n] * parameter.dtype.type(factor)
    return out


@_kernel
def _store_lanes(values, first, lanes, parameter):
    """Write ``(N, LANES)`` into ``parameter[first : first + lanes]``, ``(D, N)``."""
    for n in range(parameter.shape[1]):
        for j in range(lanes):
            parameter[first + j, n] = values[n, j]


@_kernel
def _lane_of(parameter, first, lanes):
    """Return ``parameter[first : first + lanes]``, ``(D,)`` or empty, as ``(1, LANES)``, zero beyond ``lanes``."""
    out = _zeros(1, parameter.dtype)
    if parameter.size:
        for j in range(lanes):
            out[0, j] = parameter[first + j]
    return out


@_kernel
def _clear(tile):
    for t in range(tile.shape[0]):
        for j in range(tile.shape[1]):
            tile[t, j] = 0


@_kernel
def _scaled(tile, n, lanes, steps, out):
    """Write ``tile * lanes[n]``, one factor a lane."""
    _disjoint()
    for t in range(steps):
        for j in range(tile.shape[1]):
            out[t, j] = tile[t, j] * lanes[n, j]


@_kernel
def _add_scaled(tile, n, lanes, steps, out):
    """Add ``tile * lanes[n]``, one factor a lane."""
    _disjoint()
    for t in range(steps):
        for j in range(tile.shape[1]):
            out[t, j] += tile[t, j] * lanes[n, j]


@_kernel
def _add_outer(tile, n, rows, steps, out):
    """Add ``tile * rows[n]``, one factor a step."""
    _disjoint()
    for t in range(steps):
        factor = rows[n, t]
        for j in range(tile.shape[1]):
            out[t, j] += factor * tile[t, j]


@_reduction
def _sum_lanes(left, right, shift, n, steps, rows):
    """Write ``sum_j left[t, j] * right[t + shift, j]`` into ``rows[n]``."""
    _disjoint()
    for t in range(steps):
        total = left.dtype.type(0)
        for j in range(left.shape[1]):
            total += left[t, j] * right[t + shift, j]
        rows[n, t] = total


@_kernel
def _sum_steps(left, right, shift, n, steps, lanes):
    """Add ``sum_t left[t, j] * right[t + shift, j]`` to ``lanes[n]``."""
    _disjoint()
    for t in range(steps):
        for j in range(left.shape[1]):
            lanes[n, j] += left[t, j] * right[t + shift, j]


@_kernel
def _prepare(raw, bias, softplus, inputs, steps, dt, x):
    """Add the bias to the raw steps; write the steps and ``dt * u``. The softplus is the identity above 20."""
    _disjoint()
    zero, threshold, minus_log2e = raw.dtype.type(0), raw.dtype.type(20), raw.dtype.type(-_LOG2E)
    for t in range(steps):
        for j in range(raw.shape[1]):
            v = raw[t, j] + bias[0, j]
            raw[t, j] = v
            if softplus and not v > threshold:
                v = max(v, zero) + _log1p(_exp2(abs(v) * minus_log2e))
            dt[t, j] = v
            x[t, j] = v * inputs[t, j]


@_kernel
def _gate(z, steps, total):
    """Multiply by ``silu(z)``."""
    _disjoint()
    one, minus_log2e = z.dtype.type(1), z.dtype.type(-_LOG2E)
    for t in range(steps):
        for j in range(z.shape[1]):
            total[t, j] *= z[t, j] * _sigmoid(z[t, j], one, minus_log2e)


@_kernel
def _ungate(z, steps, g, slope):
    """Turn ``g``, the gradient of ``total * silu(z)``, into that of ``total``; write ``g * silu'(z)``."""
    _disjoint()
    one, minus_log2e = z.dtype.type(1), z.dtype.type(-_LOG2E)
    for t in range(steps):
        for j in range(z.shape[1]):
            s = _sigmoid(z[t, j], one, minus_log2e)
            slope[t, j] = g[t, j] * s * (one + z[t, j] * (one - s))
            g[t, j] *= z[t, j] * s


@_kernel
def _advance(n, dt, x, decay, b, c, steps, h, y):
    """Walk state n of all lanes over a tile: the recurrence, and its share of the output."""
    _disjoint()
    for t in range(steps):
        b_t, c_t = b[n, t], c[n, t]
        for j in range(dt.shape[1]):
            state = _exp2(dt[t, j] * decay[n, j]) * h[n, j] + x[t, j] * b_t
            h[n, j] = state
            y[t, j] += c_t * state


@_kernel
def _replay(n, dt, x, decay, b, entry, steps, a, h):
    """Recompute the decays and states of a tile; ``h[0]`` is the state before it, ``h[t + 1]`` that after step t."""
    _disjoint()
    for j in range(dt.shape[1]):
        h[0, j] = entry[n, j]
    for t in range(steps):
        b_t = b[n, t]
        for j in range(dt.shape[1]):
            a_t = _exp2(dt[t, j] * decay[n, j])
            a[t, j] = a_t
            h[t + 1, j] = a_t * h[t, j] + x[t, j] * b_t


@_kernel
def _walk_back(n, dt, g, rate, c, h, steps, a, carry, grad_rate, grad_dt):
    """Run the recurrence of the gradient, ``q[t] = c[t] g[t] + a[t + 1] q[t + 1]``; leave q in the place of a."""
    _disjoint()
    for back in range(steps):
        t = steps - 1 - back
        c_t = c[n, t]
        for j in range(dt.shape[1]):
            q = c_t * g[t, j] + carry[n, j]
            s = q * a[t, j]
            a[t, j] = q
            carry[n, j] = s
            s *= h[t, j]
            grad_rate[n, j] += dt[t, j] * s
            grad_dt[t, j] += rate[n, j] * s


@_kernel
def _finish(raw, inputs, dt, g, skip, softplus, total, steps, grad_x, grad_dt, grad_z, grad_bias, grad_skip):
    """Turn the gradients of ``dt * u``, of the decays and of the gate into those of u, of the raw steps and of z."""
    _disjoint()
    threshold, one, minus_log2e = raw.dtype.type(20), raw.dtype.type(1), raw.dtype.type(-_LOG2E)
    for t in range(steps):
        for j in range(raw.shape[1]):
            d = grad_dt[t, j] + inputs[t, j] * grad_x[t, j]
            if softplus and not raw[t, j] > threshold:
                d *= _sigmoid(raw[t, j], one, minus_log2e)
            grad_dt[t, j] = d
            grad_bias[0, j] += d
            grad_skip[0, j] += g[t, j] * inputs[t, j]
            grad_z[t, j] *= total[t, j]
            grad_x[t, j] = dt[t, j] * grad_x[t, j] + skip[0, j] * g[t, j]


@_kernel
def _forward_tile(dt, x, decay, b, c, b_lanes, c_lanes, steps, xb, share, h, total):
    """Add the output of all states over a tile to ``total``."""
    static_b, static_c = b_lanes.size > 0, c_lanes.size > 0
    for n in range(h.shape[0]):
        if static_b:
            _scaled(x, n, b_lanes, steps, xb)
        if static_c:
            _clear(share)
        _advance(n, dt, xb if static_b else x, decay, b, c, steps, h, share if static_c else total)
        if static_c:
            _add_scaled(share, n, c_lanes, steps, total)


@_kernel
def _forward_block(p, softplus, chunk, i, first, lanes, group, y, last, states):
    """Scan a block of channels of sequence i."""
    dtype, length, N = p.u.dtype, p.u.shape[2], p.A.shape[1]
    decay, skip, bias = (
        _lanes_of(p.A, first, lanes, _LOG2E),
        _lane_of(p.D, first, lanes),
        _lane_of(p.bias, first, lanes),
    )
    b_lanes, c_lanes = _lanes_of(p.B_static, first, lanes, 1.0), _lanes_of(p.C_static, first, lanes, 1.0)
    h = _lanes_of(p.initial[i], first, lanes, 1.0) if p.initial.size else _zeros(N, dtype)
    tiles, b, c = np.zeros((7, chunk, LANES), dtype), np.ones((N, chunk), dtype), np.ones((N, chunk), dtype)
    raw, dt, inputs, x, total, xb, share = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5], tiles[6]
    for start in range(0, length, chunk):
        steps = min(chunk, length - start)
        if states.size:
            _store_lanes(h, first, lanes, states[i, start // chunk])
        _load(p.delta[i], first, lanes, start, steps, raw)
        _load(p.u[i], first, lanes, start, steps, inputs)
        _load_rows(p.B, i, group, start, steps, b)
        _load_rows(p.C, i, group, start, steps, c)
        _prepare(raw, bias, softplus, inputs, steps, dt, x)
        _scaled(inputs, 0, skip, steps, total)
        _forward_tile(dt, x, decay, b, c, b_lanes, c_lanes, steps, xb, share, h, total)
        if p.z.size:
            _load(p.z[i], first, lanes, start, steps, raw)
            _gate(raw, steps, total)
        _store(total, first, lanes, start, steps, y[i])
    _store_lanes(h, first, lanes, last[i])


@njit(parallel=True, **_OPTIONS)
def _forward(p, softplus, chunk, groups, y, last, states):
    channels = p.u.shape[1] // groups
    blocks = (channels + LANES - 1) // LANES
    for item in prange(p.u.shape[0] * groups * blocks):
        i, group, block = item // (groups * blocks), item // blocks % groups, item % blocks
        lanes = min(LANES, channels - block * LANES)
        _forward_block(p, softplus, chunk, i, group * channels + block * LANES, lanes, group, y, last, states)


@_kernel
def _backward_tile(dt, x, g, decay, rate, b, c, b_lanes, c_lanes, entry, gated, steps, a, h, spare, carry, total, sums):
    """Take all states back over a tile; ``sums`` are the gradients it adds to."""
    grad_x, grad_dt, grad_rate, grad_b_lanes, grad_c_lanes, grad_b, grad_c = sums
    static_b, static_c = b_lanes.size > 0, c_lanes.size > 0
    for n in range(carry.shape[0]):
        if static_b:
            _scaled(x, n, b_lanes, steps, spare)
        _replay(n, dt, spare if static_b else x, decay, b, entry, steps, a, h)
        if static_c:
            if gated:
                _add_scaled(h[1:], n, c_lanes, steps, total)
            _sum_steps(g, h, 1, n, steps, grad_c_lanes)
            _scaled(g, n, c_lanes, steps, spare)
        else:
            if gated:
                _add_outer(h[1:], n, c, steps, total)
            _sum_lanes(g, h, 1, n, steps, grad_c)
        _walk_back(n, dt, spare if static_c else g, rate, c, h, steps, a, carry, grad_rate, grad_dt)
        if static_b:
            _sum_steps(a, x, 0, n, steps, grad_b_lanes)
            _add_scaled(a, n, b_lanes, steps, grad_x)
        else:
            _sum_lanes(a, x, 0, n, steps, grad_b)
            _add_outer(a, n, b, steps, grad_x)


@_kernel
def _backward_block(p, softplus, chunk, states, grad_y, grad_last, i, first, lanes, group, slot, grad):
    """Take a block of channels of sequence i back from its last step to its first."""
    dtype, length, N, gated = p.u.dtype, p.u.shape[2], p.A.shape[1], p.z.size > 0
    rate, decay = _lanes_of(p.A, first, lanes, 1.0), _lanes_of(p.A, first, lanes, _LOG2E)
    b_lanes, c_lanes = _lanes_of(p.B_static, first, lanes, 1.0), _lanes_of(p.C_static, first, lanes, 1.0)
    skip, bias = _lane_of(p.D, first, lanes), _lane_of(p.bias, first, lanes)
    carry, grad_rate = _lanes_of(grad_last[i], first, lanes, 1.0), _zeros(N, dtype)
    grad_b_lanes, grad_c_lanes = _zeros(N, dtype), _zeros(N, dtype)
    grad_skip, grad_bias = _zeros(1, dtype), _zeros(1, dtype)
    b, c = np.ones((N, chunk), dtype), np.ones((N, chunk), dtype)
    grad_b, grad_c = np.ones((N, chunk), dtype), np.ones((N, chunk), dtype)
    tiles, h = np.zeros((12, chunk, LANES), dtype), np.zeros((chunk + 1, LANES), dtype)
    raw, inputs, z, slope, total, dt = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5]
    x, g, a, grad_x, grad_dt, spare = tiles[6], tiles[7], tiles[8], tiles[9], tiles[10], tiles[11]
    sums = grad_x, grad_dt, grad_rate, grad_b_lanes, grad_c_lanes, grad_b, grad_c
    for start in range((length - 1) // chunk * chunk, -1, -chunk):
        steps = min(chunk, length - start)
        _load(p.delta[i], first, lanes, start, steps, raw)
        _load(p.u[i], first, lanes, start, steps, inputs)
        _load_rows(p.B, i, group, start, steps, b)
        _load_rows(p.C, i, group, start, steps, c)
        _prepare(raw, bias, softplus, inputs, steps, dt, x)
        _load(grad_y[i], first, lanes, start, steps, g)
        if gated:
            _load(p.z[i], first, lanes, start, steps, z)
            _ungate(z, steps, g, slope)
            _scaled(inputs, 0, skip, steps, total)
        _clear(grad_x)
        _clear(grad_dt)
        entry = _lanes_of(states[i, start // chunk], first, lanes, 1.0)
        _backward_tile(
            dt, x, g, decay, rate, b, c, b_lanes, c_lanes, entry, gated, steps, a, h, spare, carry, total, sums
        )  # fmt: skip
        if p.B.size:
            _add_rows(grad_b, steps, start, grad.B[i, group, slot])
        if p.C.size:
            _add_rows(grad_c, steps, start, grad.C[i, group, slot])
        _finish(raw, inputs, dt, g, skip, softplus, total, steps, grad_x, grad_dt, slope, grad_bias, grad_skip)
        if gated:
            _store(slope, first, lanes, start, steps, grad.z[i])
        _store(grad_x, first, lanes, start, steps, grad.u[i])
        _store(grad_dt, first, lanes, start, steps, grad.delta[i])
    for j in range(lanes):
        grad.D[i, first + j], grad.bias[i, first + j] = grad_skip[0, j], grad_bias[0, j]
    _store_lanes(grad_rate, first, lanes, grad.A[i])
    _store_lanes(carry, first, lanes, grad.initial[i])
    _store_lanes(grad_b_lanes, first, lanes, grad.B_static[i])
    _store_lanes(grad_c_lanes, first, lanes, grad.C_static[i])


@njit(parallel=True, **_OPTIONS)
def _backward(p, softplus, chunk, groups, slots, states, grad_y, grad_last, grad):
    channels = p.u.shape[1] // groups
    blocks = (channels + LANES - 1) // LANES
    for item in prange(p.u.shape[0] * groups * slots):
        i, group, slot = item // (groups * slots), item // slots % groups, item % slots
        for block in range(blocks * slot // slots, blocks * (slot + 1) // slots):
            lanes = min(LANES, channels - block * LANES)
            first = group * channels + block * LANES
            _backward_block(p, softplus, chunk, states, grad_y, grad_last, i, first, lanes, group, slot, grad)


def _arrays(operands: tuple[Tensor | None, ...]) -> _Arrays:
    u, delta, A, B, C, *rest = operands
    split = [None if x.ndim != ndim else x for ndim in (4, 2) for x in (B, C)]
    ndims = (3, 3, 2, 4, 4, 2, 2, 1, 3, 1, 3)
    empty = u.new_empty(0)
    return _Arrays(
        *(
            empty.reshape((0,) * ndim).numpy() if x is None else x.detach().contiguous().numpy()
            for x, ndim in zip((u, delta, A, *split, *rest), ndims, strict=True)
        )
    )


def _run(kernel: Any, operands: tuple[Tensor | None, ...], *arguments: Any) -> None:
    with numba_threads():
        if operands[0].numel() * operands[2].shape[1] < ONE_THREAD:
            numba.set_num_threads(1)  # numba_threads puts the old number back
        kernel(_arrays(operands), *arguments)


def _groups(B: Tensor, C: Tensor) -> int:
    return max(x.shape[1] if x.ndim == 4 else 1 for x in (B, C))


def scan_forward(
    operands: tuple[Tensor | None, ...], softplus: bool, chunk: int, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the last state; fill ``states`` with the state before each chunk unless it is empty.

    Args:
        operands: u, delta, A, B, C, D, z, delta_bias, initial_state, of one dtype (float32 or float64).
        softplus: Whether the steps pass through a softplus.
        chunk: Steps of a tile.
        states: ``(b, chunks, D, N)``, or empty.
    """
    u, _, A, B, C = operands[:5]
    y, last = torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(u.shape[0], *A.shape)
    _run(_forward, operands, softplus, chunk, _groups(B, C), y.numpy(), last.numpy(), states.numpy())
    return y, last


def scan_backward(
    operands: tuple[Tensor | None, ...], softplus: bool, chunk: int, states: Tensor, grad_y: Tensor, grad_last: Tensor
) -> list[Tensor]:
    """Return the gradients of all operands in their order; an empty tensor for an absent one.

    The first four arguments are those of :func:`scan_forward`, which filled ``states``; ``grad_y`` ``(b, D, L)`` and
    ``grad_last`` ``(b, D, N)`` are the gradients of its results.
    """
    u, _, A, B, C, _, z = operands[:7]
    batch, channels, length = u.shape
    groups = _groups(B, C)
    slots = min(-(-channels // groups // LANES), -(-WORK_ITEMS // max(1, batch * groups)))
    rows, lanes = (batch, groups, slots, A.shape[1], length), (batch, *A.shape)
    found = _Gradients(
        u=u.new_empty(u.shape),
        delta=u.new_empty(u.shape),
        A=u.new_empty(lanes),
        B=u.new_zeros(rows if B.ndim == 4 else (0,) * 5),
        C=u.new_zeros(rows if C.ndim == 4 else (0,) * 5),
        B_static=u.new_empty(lanes),
        C_static=u.new_empty(lanes),
        D=u.new_empty(batch, channels),
        z=u.new_empty((0,) * 3 if z is None else u.shape),
        bias=u.new_empty(batch, channels),
        initial=u.new_empty(lanes),
    )
    arrays = grad_y.contiguous().numpy(), grad_last.contiguous().numpy(), _Gradients(*(x.numpy() for x in found))
    _run(_backward, operands, softplus, chunk, groups, slots, states.numpy(), *arrays)
    grad_b = found.B.sum(2) if B.ndim == 4 else found.B_static.sum(0)
    grad_c = found.C.sum(2) if C.ndim == 4 else found.C_static.sum(0)
    shared = [x.sum(0) for x in (found.A, found.D, found.bias)]
    grads = [found.u, found.delta, shared[0], grad_b, grad_c, shared[1], found.z, shared[2], found.initial]
    return [u.new_empty(0) if x is None else g for g, x in zip(grads, operands, strict=True)]
