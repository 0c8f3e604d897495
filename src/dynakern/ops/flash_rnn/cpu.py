"""The multi-head recurrent networks on the CPU: Numba kernels, forward and backward.

A work item is one head and up to ROWS sequences of the batch. It walks through all steps, so that the head's recurrent
matrix stays in the second-level cache and the states in the first. The recurrent product takes four rows and four
inputs at a time: sixteen multiply-adds for each four loads of the matrix. The gates are evaluated by polynomials of
2**r and one division, which vectorise where the library calls do not. The backward pass starts from the gates that the
forward pass kept, and gathers a few steps before each product that adds to the gradient of the recurrent matrix;
partial sums are added in a fixed order. Gradients that fade below 1e-30 (1e-290 in float64) are set to zero, since
arithmetic on subnormal numbers is many times slower.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core.extending import intrinsic, overload
from torch import Tensor

from dynakern.ops.dispatch import numba_threads
from dynakern.ops.flash_rnn.reference import CELLS

__all__ = ["backward", "forward"]

ROWS = 4  # sequences of a block
CHUNK = 8  # steps whose gradients are gathered for one product that adds to the gradient of R
WORK_ITEMS = 32  # that the backward pass aims at; more would only cost memory for partial sums

_CODES = {"elman": 0, "lstm": 1, "gru": 2, "slstm": 3}
ELMAN, LSTM, GRU = 0, 1, 2

_LOG2E = 1.4426950408889634
_f32 = np.float32

# 2**r = 1 + r * q(r) on [-1/2, 1/2], best relative error: 2e-9 (single) and 3e-18 (double); exact at r = 0.
_S0, _S1, _S2 = _f32(0.693147202855), _f32(0.240226479136), _f32(0.0555033247119)
_S3, _S4, _S5 = _f32(0.00961843735696), _f32(0.0013398874394), _f32(0.000153533620689)
_D0, _D1, _D2, _D3 = 0.69314718055994532581, 0.2402265069591013126, 0.055504108664820083227, 0.0096181291075942
_D4, _D5, _D6, _D7 = 0.0013333558146774620517, 0.0001540353045711209086, 1.5252733493127489347e-5, 1.32154352823e-6
_D8, _D9, _D10 = 1.0178199571842137974e-7, 7.0737832485031332991e-9, 4.4347712982003767083e-10
# log(1 + w) = s * q(s**2), s = w / (2 + w), on [0, 1], relative error 4e-9.
_L0, _L1, _L2 = _f32(2.00000000808), _f32(0.666663101449), _f32(0.400251143238)
_L3, _L4 = _f32(0.279576657946), _f32(0.281915472234)
_ONE, _TWO = _f32(1.0), _f32(2.0)
_LOW, _HIGH, _ROUND = _f32(-127.0), _f32(128.0), _f32(1.5 * 2**23)
_LOW64, _HIGH64, _ROUND64 = -1023.0, 1024.0, 1.5 * 2.0**52
# Beyond this 2**x - 1 is 2**x, and -1 on the other side, to all digits; tanh is 1.
_FAR, _FAR64 = _f32(40.0), 80.0


class _Operands(NamedTuple):
    """What the backward pass reads; empty arrays for absent ones."""

    initial: np.ndarray
    hidden: np.ndarray
    cells: np.ndarray
    gates: np.ndarray
    d_hidden: np.ndarray
    d_cells: np.ndarray
    d_last: np.ndarray


class _Gradients(NamedTuple):
    """What it fills: of the inputs, of R and b in partial sums ``(NH, slots, ...)``, of the initial states."""

    Wx: np.ndarray
    R: np.ndarray
    b: np.ndarray
    initial: np.ndarray


@intrinsic
def _scale(typing_context: Any, p: Any, shifted: Any) -> Any:
    """Give ``p * 2**k`` by adding k to the exponent bits; ``shifted`` is k + 1.5 * 2**23 (2**52): k in its low bits."""
    bits, mantissa = (32, 23) if p == types.float32 else (64, 52)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer = ir.IntType(bits)
        exponent = builder.shl(builder.bitcast(args[1], integer), ir.Constant(integer, mantissa))
        return builder.bitcast(builder.add(builder.bitcast(args[0], integer), exponent), args[0].type)

    return p(p, shifted), codegen


@intrinsic
def _disjoint(typing_context: Any) -> Any:
    """Promise that the arrays given to the calling function do not overlap, which lets its loops vectorise.

    It is LLVM's ``noalias``, set on the data pointers, the fifth field of an array argument; without it the loops are
    slower and compute the same.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for argument in builder.function.args:
            if argument.name.startswith("arg.") and argument.name.endswith(".4"):
                argument.add_attribute("noalias")
        return context.get_dummy_value()

    return types.void(), codegen


def _exp2(x: float) -> float:
    """Return ``2**x``, 0 below the normal range; vectorises, unlike the library call. NaN stays NaN."""
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


def _tanh(x: float) -> float:
    """Return ``tanh(x)`` with a small relative error everywhere: e / (e + 2) with e = exp(2 x) - 1."""
    return np.tanh(x)


def _tanh_single(x):
    y = _f32(2 * _LOG2E) * x
    y = -_FAR if y < -_FAR else y
    y = _FAR if y > _FAR else y
    shifted = y + _ROUND
    r = y - (shifted - _ROUND)
    q = ((((_S5 * r + _S4) * r + _S3) * r + _S2) * r + _S1) * r + _S0
    power = _scale(_ONE, shifted)
    e = power * (q * r) + (power - _ONE)
    return e / (e + _TWO)


def _tanh_double(x):
    y = (2 * _LOG2E) * x
    y = -_FAR64 if y < -_FAR64 else y
    y = _FAR64 if y > _FAR64 else y
    shifted = y + _ROUND64
    r = y - (shifted - _ROUND64)
    q = ((((_D10 * r + _D9) * r + _D8) * r + _D7) * r + _D6) * r + _D5
    q = ((((q * r + _D4) * r + _D3) * r + _D2) * r + _D1) * r + _D0
    power = _scale(1.0, shifted)
    e = power * (q * r) + (power - 1.0)
    return e / (e + 2.0)


@overload(_tanh, jit_options={"fastmath": {"contract"}})
def _tanh_overload(x):
    return _tanh_single if x == types.float32 else _tanh_double


def _log1p(w: float) -> float:
    """Return ``log(1 + w)`` for w in [0, 1]."""
    return np.log1p(w)


def _log1p_single(w):
    s = w / (_TWO + w)
    v = s * s
    return s * ((((_L4 * v + _L3) * v + _L2) * v + _L1) * v + _L0)


@overload(_log1p, jit_options={"fastmath": {"contract"}})
def _log1p_overload(w):
    return _log1p_single if w == types.float32 else lambda w: np.log1p(w)


_kernel = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})


@_kernel
def _flush(x, tiny):
    """Return 0 for a number that is nearly subnormal, else the number."""
    return x * 0 if abs(x) < tiny else x


@_kernel
def _product(x, w, out):
    """Add ``x @ w`` to the first columns of ``out``: four rows and four inputs at a time."""
    _disjoint()
    rows, inner, columns = np.uint64(x.shape[0]), np.uint64(w.shape[0]), np.uint64(w.shape[1])
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    tiled_rows, tiled_inner = rows - rows % four, inner - inner % four
    for i in range(np.uint64(0), tiled_rows, four):
        for k in range(np.uint64(0), tiled_inner, four):
            a0, a1, a2, a3 = x[i, k], x[i, k + one], x[i, k + two], x[i, k + three]
            b0, b1, b2, b3 = x[i + one, k], x[i + one, k + one], x[i + one, k + two], x[i + one, k + three]
            c0, c1, c2, c3 = x[i + two, k], x[i + two, k + one], x[i + two, k + two], x[i + two, k + three]
            d0, d1, d2, d3 = x[i + three, k], x[i + three, k + one], x[i + three, k + two], x[i + three, k + three]
            for j in range(columns):
                w0, w1, w2, w3 = w[k, j], w[k + one, j], w[k + two, j], w[k + three, j]
                a = out[i, j] + a0 * w0 + a1 * w1 + a2 * w2 + a3 * w3
                b = out[i + one, j] + b0 * w0 + b1 * w1 + b2 * w2 + b3 * w3
                c = out[i + two, j] + c0 * w0 + c1 * w1 + c2 * w2 + c3 * w3
                d = out[i + three, j] + d0 * w0 + d1 * w1 + d2 * w2 + d3 * w3
                out[i, j], out[i + one, j], out[i + two, j], out[i + three, j] = a, b, c, d
        for k in range(tiled_inner, inner):
            a0, b0, c0, d0 = x[i, k], x[i + one, k], x[i + two, k], x[i + three, k]
            for j in range(columns):
                a, b = out[i, j] + a0 * w[k, j], out[i + one, j] + b0 * w[k, j]
                c, d = out[i + two, j] + c0 * w[k, j], out[i + three, j] + d0 * w[k, j]
                out[i, j], out[i + one, j], out[i + two, j], out[i + three, j] = a, b, c, d
    for i in range(tiled_rows, rows):
        for k in range(np.uint64(0), tiled_inner, four):
            a0, a1, a2, a3 = x[i, k], x[i, k + one], x[i, k + two], x[i, k + three]
            for j in range(columns):
                out[i, j] = out[i, j] + a0 * w[k, j] + a1 * w[k + one, j] + a2 * w[k + two, j] + a3 * w[k + three, j]
        for k in range(tiled_inner, inner):
            a0 = x[i, k]
            for j in range(columns):
                out[i, j] = out[i, j] + a0 * w[k, j]


@_kernel
def _add(x, y, out):
    _disjoint()
    for j in range(out.shape[0]):
        out[j] = x[j] + y[j]


@_kernel
def _copy(x, out):
    _disjoint()
    for j in range(out.shape[0]):
        out[j] = x[j]


@_kernel
def _accumulate(x, out):
    _disjoint()
    for j in range(out.shape[0]):
        out[j] += x[j]


@_kernel
def _carry(x, bound, out):
    """Add ``x`` to ``out``, its elements clipped to ``bound`` if that is positive."""
    _disjoint()
    tiny = out.dtype.type(1e-30 if out.itemsize == 4 else 1e-290)
    if bound > 0:
        for j in range(out.shape[0]):
            v = x[j]
            v = -bound if v < -bound else v
            out[j] = _flush(out[j] + (bound if v > bound else v), tiny)
    else:
        for j in range(out.shape[0]):
            out[j] = _flush(out[j] + x[j], tiny)


@_kernel
def _elman(a, h):
    _disjoint()
    for j in range(h.shape[0]):
        h[j] = _tanh(a[j])


@_kernel
def _lstm(a_i, a_f, a_z, a_o, h, c, g_i, g_f, g_z, g_o):
    """Step one row; leave the activated gates in ``g``."""
    _disjoint()
    one, rate = h.dtype.type(1), h.dtype.type(-_LOG2E)
    for j in range(h.shape[0]):
        i, f = one / (one + _exp2(rate * a_i[j])), one / (one + _exp2(rate * a_f[j]))
        z, o = _tanh(a_z[j]), one / (one + _exp2(rate * a_o[j]))
        after = f * c[j] + i * z
        c[j], h[j] = after, o * _tanh(after)
        g_i[j], g_f[j], g_z[j], g_o[j] = i, f, z, o


@_kernel
def _gru(a_g, a_r, a_z, a_n, h, g_g, g_r, g_z, g_n):
    """Step one row; leave g and the activated gates r, z and candidate in ``g``."""
    _disjoint()
    one, rate = h.dtype.type(1), h.dtype.type(-_LOG2E)
    for j in range(h.shape[0]):
        r, z = one / (one + _exp2(rate * a_r[j])), one / (one + _exp2(rate * a_z[j]))
        n = _tanh(a_n[j] + r * a_g[j])
        h[j] = z * h[j] + (one - z) * n
        g_g[j], g_r[j], g_z[j], g_n[j] = a_g[j], r, z, n


@_kernel
def _slstm(a_i, a_f, a_z, a_o, h, c, n, m, g_i, g_f, g_z, g_o):
    """Step one row; leave the raw i and f and the activated z and o in ``g``."""
    _disjoint()
    real = h.dtype.type
    zero, one, rate = real(0), real(1), real(_LOG2E)
    for j in range(h.shape[0]):
        i, f = a_i[j], a_f[j]
        log_f = (zero if f > zero else f) - _log1p(_exp2(-rate * abs(f))) + m[j]
        top = i if (n[j] == zero or i > log_f) else log_f
        scaled_i, scaled_f = _exp2(rate * (i - top)), _exp2(rate * (log_f - top))
        z, o = _tanh(a_z[j]), one / (one + _exp2(-rate * a_o[j]))
        cell, norm = scaled_f * c[j] + scaled_i * z, scaled_f * n[j] + scaled_i
        norm = one if norm < one else norm
        c[j], n[j], m[j], h[j] = cell, norm, top, o * cell / norm
        g_i[j], g_f[j], g_z[j], g_o[j] = i, f, z, o


@_kernel
def _step(code, a, s, g, r):
    """Step row r of a work item: pre-activations ``a``, states ``s``, gates ``g``."""
    D, x = s.shape[2], a[r]
    x0, x1, x2, x3, h = x[:D], x[D : 2 * D], x[2 * D : 3 * D], x[3 * D :], s[0, r]
    g0, g1, g2, g3 = g[0, r], g[1, r], g[2, r], g[3, r]
    if code == ELMAN:
        _elman(x0, h)
    elif code == LSTM:
        _lstm(x0, x1, x2, x3, h, s[1, r], g0, g1, g2, g3)
    elif code == GRU:
        _gru(x0, x1, x2, x3, h, g0, g1, g2, g3)
    else:
        _slstm(x0, x1, x2, x3, h, s[1, r], s[2, r], s[3, r], g0, g1, g2, g3)


@_kernel
def _forward_block(code, Wx, w, b, initial, n, first, rows, hidden, cells, last, gates):
    """Run one head on ``rows`` sequences."""
    steps, inputs, D = Wx.shape[1], Wx.shape[2], Wx.shape[4]
    count, states = b.shape[0], initial.shape[0]
    s, a = np.empty((states, rows, D), Wx.dtype), np.empty((rows, count * D), Wx.dtype)
    g = np.empty((4, rows, D), Wx.dtype)
    for k in range(states):
        for r in range(rows):
            _copy(initial[k, first + r, n], s[k, r])
    for t in range(steps):
        for r in range(rows):
            for k in range(count - inputs):
                _copy(b[k, n], a[r, k * D : (k + 1) * D])
            for k in range(count - inputs, count):
                _add(b[k, n], Wx[first + r, t, k - count + inputs, n], a[r, k * D : (k + 1) * D])
        _product(s[0], w, a)
        for r in range(rows):
            _step(code, a, s, g, r)
            _copy(s[0, r], hidden[first + r, t, n])
            if cells.size:
                for k in range(1, states):
                    _copy(s[k, r], cells[k - 1, first + r, t, n])
            if gates.size:
                for k in range(4):
                    _copy(g[k, r], gates[first + r, t, k, n])
    for k in range(states):
        for r in range(rows):
            _copy(s[k, r], last[k, first + r, n])


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _forward(code, Wx, w, b, initial, hidden, cells, last, gates):
    batch, heads = Wx.shape[0], Wx.shape[3]
    blocks = (batch + ROWS - 1) // ROWS
    for item in prange(heads * blocks):
        n, first = item // blocks, item % blocks * ROWS
        rows = min(ROWS, batch - first)
        _forward_block(code, Wx, w[n], b, initial, n, first, rows, hidden, cells, last, gates)


@_kernel
def _elman_back(h, dh, da):
    """Turn the gradient of h into that of the pre-activation, and clear it."""
    _disjoint()
    one = h.dtype.type(1)
    for j in range(h.shape[0]):
        da[j] = dh[j] * (one - h[j] * h[j])
        dh[j] = h.dtype.type(0)


@_kernel
def _lstm_back(g_i, g_f, g_z, g_o, before, c, dh, dc, d_i, d_f, d_z, d_o):
    """``before`` and ``c`` are the cell before and after the step; ``dh``, ``dc`` become those of the step before."""
    _disjoint()
    zero, one, tiny = dh.dtype.type(0), dh.dtype.type(1), dh.dtype.type(1e-30 if dh.itemsize == 4 else 1e-290)
    for j in range(dh.shape[0]):
        i, f, z, o, u = g_i[j], g_f[j], g_z[j], g_o[j], _tanh(c[j])
        d = dc[j] + dh[j] * o * (one - u * u)
        d_i[j], d_f[j] = d * z * i * (one - i), d * before[j] * f * (one - f)
        d_z[j], d_o[j] = d * i * (one - z * z), dh[j] * u * o * (one - o)
        dc[j], dh[j] = _flush(d * f, tiny), zero


@_kernel
def _gru_back(g_g, g_r, g_z, g_n, before, dh, d_g, d_r, d_z, d_n):
    _disjoint()
    one = dh.dtype.type(1)
    for j in range(dh.shape[0]):
        r, z, n, d = g_r[j], g_z[j], g_n[j], dh[j]
        dn = d * (one - z) * (one - n * n)
        d_n[j], d_g[j], d_r[j] = dn, dn * r, dn * g_g[j] * r * (one - r)
        d_z[j], dh[j] = d * (before[j] - n) * z * (one - z), d * z


@_kernel
def _slstm_back(
    g_i, g_f, g_z, g_o, c0, n0, m0, c, n, m, dh, dc, dn, dm, d_i, d_f, d_z, d_o
):  # fmt: skip
    """``c0, n0, m0`` are the states before the step, ``c, n, m`` those after it."""
    _disjoint()
    real = dh.dtype.type
    zero, half, one, rate = real(0), real(0.5), real(1), real(_LOG2E)
    tiny = real(1e-30 if dh.itemsize == 4 else 1e-290)
    for j in range(dh.shape[0]):
        i, f, z, o, top = g_i[j], g_f[j], g_z[j], g_o[j], m[j]
        small = _exp2(-rate * abs(f))
        log_f = (zero if f > zero else f) - _log1p(small) + m0[j]
        scaled_i, scaled_f = _exp2(rate * (i - top)), _exp2(rate * (log_f - top))
        ratio = c[j] / n[j]
        cell, norm = dc[j] + dh[j] * o / n[j], dn[j] - dh[j] * o * ratio / n[j]
        raw = scaled_f * n0[j] + scaled_i
        norm *= one if raw > one else (half if raw == one else zero)  # max(raw, 1)
        by_i, by_f = (cell * z + norm) * scaled_i, (cell * c0[j] + norm * n0[j]) * scaled_f
        by_m = dm[j] - by_i - by_f
        chosen = one if i == top else zero  # m is i, else log_f
        by_f += by_m * (one - chosen)
        d_i[j], d_f[j] = by_i + by_m * chosen, by_f * (small if f > zero else one) / (one + small)
        d_z[j], d_o[j] = cell * scaled_i * (one - z * z), dh[j] * ratio * o * (one - o)
        dc[j], dn[j], dm[j] = _flush(cell * scaled_f, tiny), _flush(norm * scaled_f, tiny), _flush(by_f, tiny)
        dh[j] = zero


@_kernel
def _step_back(code, g, before, after, ds, da, r):
    """Take row r back over one step: states ``before``, ``after`` it, gradients of states ``ds`` and gates ``da``."""
    D, x = ds.shape[2], da[r]
    x0, x1, x2, x3, dh = x[:D], x[D : 2 * D], x[2 * D : 3 * D], x[3 * D :], ds[0, r]
    g0, g1, g2, g3 = g[0, r], g[1, r], g[2, r], g[3, r]
    if code == ELMAN:
        _elman_back(after[0, r], dh, x0)
    elif code == LSTM:
        _lstm_back(g0, g1, g2, g3, before[1, r], after[1, r], dh, ds[1, r], x0, x1, x2, x3)
    elif code == GRU:
        _gru_back(g0, g1, g2, g3, before[0, r], dh, x0, x1, x2, x3)
    else:
        c0, n0, m0, c, n, m = before[1, r], before[2, r], before[3, r], after[1, r], after[2, r], after[3, r]
        _slstm_back(
            g0, g1, g2, g3, c0, n0, m0, c, n, m, dh, ds[1, r], ds[2, r], ds[3, r], x0, x1, x2, x3
        )  # fmt: skip


@_kernel
def _load_states(p, n, first, t, s):
    """Copy the states after step t (before the first step for t = -1) into ``s``."""
    for k in range(s.shape[0]):
        for r in range(s.shape[1]):
            if t < 0:
                _copy(p.initial[k, first + r, n], s[k, r])
            elif k == 0:
                _copy(p.hidden[first + r, t, n], s[k, r])
            else:
                _copy(p.cells[k - 1, first + r, t, n], s[k, r])


@_kernel
def _load_gradients(p, n, first, t, g, ds):
    """Copy the gates of step t into ``g``; add the gradients of its outputs to ``ds``."""
    for r in range(ds.shape[1]):
        if p.d_hidden.size:
            _accumulate(p.d_hidden[first + r, t, n], ds[0, r])
        if p.d_cells.size:
            for k in range(1, ds.shape[0]):
                _accumulate(p.d_cells[k - 1, first + r, t, n], ds[k, r])
        if p.gates.size:
            for k in range(4):
                _copy(p.gates[first + r, t, k, n], g[k, r])


@_kernel
def _backward_block(p, d, code, w, follow, clip, n, first, rows, d_R, d_b):
    """Take one head back over ``rows`` sequences and add to the gradients of its matrix and biases."""
    steps, inputs, D = d.Wx.shape[1], d.Wx.shape[2], d.Wx.shape[4]
    states, dtype, count, height = p.initial.shape[0], d.Wx.dtype, d_b.shape[0] // D, d_R.shape[0]
    ds, g = np.empty((states, rows, D), dtype), np.empty((4, rows, D), dtype)
    before, after = np.empty((states, rows, D), dtype), np.empty((states, rows, D), dtype)
    recurrent = np.empty((rows, D), dtype)
    d_gates, inner = np.empty((CHUNK * rows, count * D), dtype), np.empty((CHUNK * rows, D), dtype)
    for k in range(states):
        for r in range(rows):
            _copy(p.d_last[k, first + r, n], ds[k, r])
    _load_states(p, n, first, steps - 1, after)
    filled = 0
    for t in range(steps - 1, -1, -1):
        _load_states(p, n, first, t - 1, before)
        _load_gradients(p, n, first, t, g, ds)
        da = d_gates[filled : filled + rows]
        for r in range(rows):
            _step_back(code, g, before, after, ds, da, r)
            _copy(before[0, r], inner[filled + r])
            _accumulate(da[r], d_b)
            for k in range(inputs):
                _copy(da[r, (k + count - inputs) * D : (k + count - inputs + 1) * D], d.Wx[first + r, t, k, n])
        if follow:
            recurrent[:] = 0
            _product(da[:, :height], w, recurrent)
            for r in range(rows):
                _carry(recurrent[r], clip, ds[0, r])
        filled += rows
        if t == 0 or filled == CHUNK * rows:
            _product(d_gates[:filled, :height].T, inner[:filled], d_R)
            filled = 0
        before, after = after, before
    for k in range(states):
        for r in range(rows):
            _copy(ds[k, r], d.initial[k, first + r, n])


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def _backward(p, d, code, w, follow, clip):
    batch, heads, slots = p.hidden.shape[0], p.hidden.shape[2], d.R.shape[1]
    blocks = (batch + ROWS - 1) // ROWS
    for item in prange(heads * slots):
        n, slot = item // slots, item % slots
        for block in range(blocks * slot // slots, blocks * (slot + 1) // slots):
            first, rows = block * ROWS, min(ROWS, batch - block * ROWS)
            _backward_block(p, d, code, w[n], follow, clip, n, first, rows, d.R[n, slot], d.b[n, slot])


def forward(
    Wx: Tensor, R: Tensor, b: Tensor, initial: Tensor, function: str, hidden: Tensor, cells: Tensor, gates: Tensor
) -> Tensor:
    """Run the network; fill ``hidden``, and ``cells`` and ``gates`` unless they are empty.

    Args:
        Wx: ``(B, T, Gw, NH, D)``.
        R: ``(Gr, NH, Dout, Din)``.
        b: ``(Gt, NH, D)``.
        initial: ``(S, B, NH, D)``.
        function: Name of the cell.
        hidden: Output, ``(B, T, NH, D)``.
        cells: Output, the other states, ``(S - 1, B, T, NH, D)``, or empty.
        gates: Output, what the backward pass needs, ``(B, T, 4, NH, D)``, or empty.

    Returns:
        The states after the last step, ``(S, B, NH, D)``.
    """
    last = torch.empty_like(initial, memory_format=torch.contiguous_format)
    packed = R.permute(1, 3, 0, 2).flatten(2).contiguous()  # (NH, Din, Gr Dout)
    arrays = [x.detach().contiguous().numpy() for x in (Wx, packed, b, initial)]
    with numba_threads():
        _forward(_CODES[function], *arrays, hidden.numpy(), cells.numpy(), last.numpy(), gates.numpy())
    return last


def backward(
    R: Tensor,
    initial: Tensor,
    hidden: Tensor,
    cells: Tensor,
    gates: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    function: str,
    follow: bool,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``Wx``, ``R``, ``b`` and the initial states.

    Args:
        R: As for :func:`forward`.
        initial: As for :func:`forward`.
        hidden: What the forward pass returned.
        cells: What the forward pass returned.
        gates: What the forward pass returned.
        grads: Gradients of ``hidden``, ``cells`` and the last states; None where there is none.
        function: Name of the cell.
        follow: Whether gradients pass the recurrent product.
        clip: Bound of the elements of the gradient that passes it; 0 for none.
    """
    cell, (batch, steps, heads, D) = CELLS[function], hidden.shape
    slots = max(1, min(-(-batch // ROWS), -(-WORK_ITEMS // heads)))
    packed = R.transpose(0, 1).flatten(1, 2).contiguous()  # (NH, Gr Dout, Din)
    d_hidden, d_cells, d_last = grads
    d_hidden = hidden.new_empty(0, 0, 0, 0) if d_hidden is None else d_hidden
    d_cells = hidden.new_empty(0, 0, 0, 0, 0) if d_cells is None else d_cells
    d_last = torch.zeros_like(initial) if d_last is None else d_last
    operands = (initial, hidden, cells, gates, d_hidden, d_cells, d_last)
    p = _Operands(*(x.detach().contiguous().numpy() for x in operands))
    d_Wx, d_initial = hidden.new_empty(batch, steps, cell.inputs, heads, D), hidden.new_empty(initial.shape)
    d_R = hidden.new_zeros(heads, slots, cell.recurrent * D, D)
    d_b = hidden.new_zeros(heads, slots, cell.gates * D)
    found = _Gradients(d_Wx.numpy(), d_R.numpy(), d_b.numpy(), d_initial.numpy())
    with numba_threads():
        _backward(p, found, _CODES[function], packed.detach().numpy(), follow, p.hidden.dtype.type(clip))
    d_R = d_R.sum(1).unflatten(1, (cell.recurrent, D)).transpose(0, 1).contiguous()
    return d_Wx, d_R, d_b.sum(1).unflatten(1, (cell.gates, D)).transpose(0, 1).contiguous(), d_initial
