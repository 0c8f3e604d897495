# pyright: reportCallIssue=false
# Numba's intrinsics are called without their first parameter, which Python's types do not know.
"""The Numba kernels of the multi-head recurrent networks, forward and backward, which :mod:`.cpu` calls.

A work item is one head and a block of four or eight sequences. It walks through all steps, so that the head's recurrent
matrix stays in the second-level cache and the states in the first. The recurrent product takes four rows and strips of
64 columns of a packed matrix, whose sums stay in registers. The gates are rational functions of a power of two and a
polynomial, which vectorise where library calls do not. The backward pass starts from the gates that the forward pass
kept, and gathers a few steps before each product that adds to the gradient of the recurrent matrix. Gradients that fade
below 1e-30 (1e-290 in float64) are set to zero, since arithmetic on subnormal numbers is many times slower.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.extending import intrinsic, overload

__all__ = ["CODES", "ROWS", "Gradients", "Operands", "backward", "forward"]

ROWS = 4  # rows that are multiplied at a time
GATHERED = 32  # rows of gradients that are gathered for one product that adds to the gradient of R

CODES = {"elman": 0, "lstm": 1, "gru": 2, "slstm": 3}
ELMAN, LSTM, GRU = 0, 1, 2

_f32 = np.float32
_ONE, _TWO = _f32(1.0), _f32(2.0)  # in float64 arithmetic they widen

# 2**r = 1 + r * q(r) on [-1/2, 1/2], best relative error: 2e-9 (single) and 3e-18 (double); exact at r = 0.
_S0, _S1, _S2 = _f32(0.693147202855), _f32(0.240226479136), _f32(0.0555033247119)
_S3, _S4, _S5 = _f32(0.00961843735696), _f32(0.0013398874394), _f32(0.000153533620689)
_D0, _D1, _D2, _D3 = 0.69314718055994532581, 0.2402265069591013126, 0.055504108664820083227, 0.0096181291075942
_D4, _D5, _D6, _D7 = 0.0013333558146774620517, 0.0001540353045711209086, 1.5252733493127489347e-5, 1.32154352823e-6
_D8, _D9, _D10 = 1.0178199571842137974e-7, 7.0737832485031332991e-9, 4.4347712982003767083e-10
_LOG2E, _ROUND, _TOP = _f32(1.4426950408889634), _f32(1.5 * 2**23), _f32(127.0)
_LOG2E64, _ROUND64, _TOP64 = 1.4426950408889634, 1.5 * 2.0**52, 1023.0
# log(1 + w) = s * q(s**2), s = w / (2 + w), on [0, 1], relative error 4e-9.
_L0, _L1, _L2 = _f32(2.00000000808), _f32(0.666663101449), _f32(0.400251143238)
_L3, _L4 = _f32(0.279576657946), _f32(0.281915472234)


# What the backward pass reads (empty arrays for absent gradients), and what it fills, R and b in partial sums.
Operands = namedtuple("Operands", "initial hidden kept d_hidden d_cells d_last")
Gradients = namedtuple("Gradients", "Wx R b initial")


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


def _split(x: float) -> tuple[float, float]:
    """Return a power of two p and a small m with ``exp(x) = p (1 + m)``, within the normal range. NaN stays NaN."""
    return 1.0, np.expm1(x)


def _split_single(x):
    x = _LOG2E * x
    x = -_TOP if x < -_TOP else x
    x = _TOP if x > _TOP else x
    shifted = x + _ROUND  # rounds to an integer
    r = x - (shifted - _ROUND)
    q = ((((_S5 * r + _S4) * r + _S3) * r + _S2) * r + _S1) * r + _S0
    return _scale(_ONE, shifted), q * r


def _split_double(x):
    x = _LOG2E64 * x
    x = -_TOP64 if x < -_TOP64 else x
    x = _TOP64 if x > _TOP64 else x
    shifted = x + _ROUND64
    r = x - (shifted - _ROUND64)
    q = ((((_D10 * r + _D9) * r + _D8) * r + _D7) * r + _D6) * r + _D5
    q = ((((q * r + _D4) * r + _D3) * r + _D2) * r + _D1) * r + _D0
    return _scale(1.0, shifted), q * r


@overload(_split, jit_options={"fastmath": {"contract"}})  # "reassoc" would undo the rounding
def _split_overload(x):
    return _split_single if x == types.float32 else _split_double


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
def _exp(x):
    """Return ``exp(x)``, 0 below the normal range; vectorises, unlike the library call."""
    p, m = _split(x)
    return p * m + p


@_kernel
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


@_kernel
def _tanh(x):
    """Return ``tanh(x)`` with a small relative error everywhere: e / (e + 2) with e = exp(2 x) - 1."""
    p, m = _split(_TWO * x)
    e = p * m + (p - _ONE)
    return e / (e + _TWO)


@_kernel
def _flush(x, tiny):
    """Return 0 for a number that is nearly subnormal, else the number."""
    return x * 0 if abs(x) < tiny else x


def _tile(vectors: int) -> Any:
    """Return a compiled product of ROWS rows with a strip of ``vectors`` vectors of 64 bytes.

    The sums stay in registers through the whole inner dimension, which no loop over arrays that Numba compiles
    achieves. In flat elements, ``out[out_at + i out_row + j] += x[x_at + i x_row + k x_step] w[w_at + k w_step + j]``
    summed over k < count.
    """

    @intrinsic
    def tile(typing, x, x_at, x_row, x_step, w, w_at, w_step, out, out_at, out_row, count):
        lanes, align = 512 // x.dtype.bitwidth, x.dtype.bitwidth // 8

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, w, out = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 4, 7))
            _, x_at, x_row, x_step, _, w_at, w_step, _, out_at, out_row, count = args
            vector, zero = ir.VectorType(x.type.pointee, lanes), ir.Constant(ir.IntType(32), 0)
            nothing = ir.Constant(vector, ir.Undefined)
            spread = ir.Constant(ir.VectorType(zero.type, lanes), [0] * lanes)
            rows, columns = [ir.Constant(count.type, r) for r in range(ROWS)], range(vectors)

            def vector_at(base: Any, offset: Any, v: int) -> Any:
                offset = builder.add(offset, ir.Constant(count.type, lanes * v))
                return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

            lines = [builder.add(out_at, builder.mul(out_row, r)) for r in rows]
            targets = [
                (vector_at(out, line, v), cgutils.alloca_once(builder, vector)) for line in lines for v in columns
            ]
            for target, total in targets:
                builder.store(builder.load(target, align=align), total)
            starts = [builder.gep(x, [builder.add(x_at, builder.mul(x_row, r))]) for r in rows]
            with cgutils.for_range(builder, count, intp=count.type) as loop:
                w_k = builder.add(w_at, builder.mul(loop.index, w_step))
                factors = [builder.load(vector_at(w, w_k, v), align=align) for v in columns]
                for r in range(ROWS):
                    number = builder.load(builder.gep(starts[r], [builder.mul(loop.index, x_step)]))
                    number = builder.shuffle_vector(builder.insert_element(nothing, number, zero), nothing, spread)
                    for v in columns:
                        total, product = (
                            targets[r * vectors + v][1],
                            builder.fmul(number, factors[v], flags=("contract",)),
                        )
                        builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            for target, total in targets:
                builder.store(builder.load(total), target, align=align)
            return context.get_dummy_value()

        return types.void(x, *[types.intp] * 3, w, *[types.intp] * 2, out, *[types.intp] * 3), codegen

    return tile


_tile_1, _tile_2, _tile_4 = _tile(1), _tile(2), _tile(4)


@_kernel
def _strip(x, x_at, x_row, x_step, w, w_at, w_step, out, out_at, out_row, inner, width):
    """Multiply ROWS rows with a strip of at most four vectors; see :func:`_tile`."""
    lanes, j = 64 // out.itemsize, 0
    if width == 4 * lanes:
        _tile_4(x, x_at, x_row, x_step, w, w_at, w_step, out, out_at, out_row, inner)
    else:
        if width >= 2 * lanes:
            _tile_2(x, x_at, x_row, x_step, w, w_at, w_step, out, out_at, out_row, inner)
            j = 2 * lanes
        if j < width:
            _tile_1(x, x_at, x_row, x_step, w, w_at + j, w_step, out, out_at + j, out_row, inner)


@_kernel
def _product(x, x_at, x_row, w, inner, columns, out):
    """Add the product of rows of ``x``, as many as ``out`` has, with a packed matrix to its first columns."""
    step, most = out.shape[1], 256 // out.itemsize
    for j in range(0, columns, most):
        width = min(most, columns - j)
        for i in range(0, out.shape[0], ROWS):
            _strip(x, x_at + i * x_row, x_row, 1, w, j * inner, width, out, i * step + j, step, inner, width)


@_kernel
def _outer(x, w, inner, out):
    """Add ``x[:inner].T @ w[:inner]`` to ``out``, ROWS rows of it at a time."""
    columns, most = out.shape[1], 256 // out.itemsize
    for i in range(0, out.shape[0], ROWS):
        for j in range(0, columns, most):
            width = min(most, columns - j)
            _strip(x, i, 1, x.shape[1], w, j, columns, out, i * columns + j, columns, inner, width)


@_kernel
def _load(Wx, b, n, first, t, rows, a):
    """Write the biases and inputs of a step into ``a``."""
    _disjoint()
    n, first, t = np.uint64(n), np.uint64(first), np.uint64(t)  # an unsigned index needs no test for a negative one
    count, D = np.uint64(b.shape[0]), np.uint64(b.shape[2])
    skipped = count - np.uint64(Wx.shape[2])
    for r in range(np.uint64(rows)):
        for k in range(skipped):
            for j in range(D):
                a[r, k * D + j] = b[k, n, j]
        for k in range(skipped, count):
            for j in range(D):
                a[r, k * D + j] = b[k, n, j] + Wx[first + r, t, k - skipped, n, j]


@_kernel
def _gather(source, n, first, t, rows, out):
    """Copy one head and step of ``(B, T, NH, D)`` into the rows of ``out``."""
    _disjoint()
    n, first, t = np.uint64(n), np.uint64(first), np.uint64(t)
    for r in range(np.uint64(rows)):
        for j in range(np.uint64(source.shape[3])):
            out[r, j] = source[first + r, t, n, j]


@_kernel
def _scatter(tile, n, first, t, rows, out):
    """Copy rows into one head and step of ``(B, T, NH, D)``."""
    _disjoint()
    n, first, t = np.uint64(n), np.uint64(first), np.uint64(t)
    for r in range(np.uint64(rows)):
        for j in range(tile.shape[1]):
            out[first + r, t, n, j] = tile[r, j]


@_kernel
def _copy(x, out):
    _disjoint()
    for j in range(out.shape[0]):
        out[j] = x[j]


@_kernel
def _split_states(states, n, first, rows, h, tile):
    """Copy states ``(S, B, NH, D)`` into ``h`` and, from the fifth place on, into ``tile``."""
    for r in range(rows):
        h[r] = states[0, first + r, n]
        for k in range(1, states.shape[0]):
            tile[3 + k, r] = states[k, first + r, n]


@_kernel
def _join_states(h, tile, n, first, rows, states):
    """Undo :func:`_split_states`."""
    for r in range(rows):
        states[0, first + r, n] = h[r]
        for k in range(1, states.shape[0]):
            states[k, first + r, n] = tile[3 + k, r]


@_kernel
def _elman(a, h):
    _disjoint()
    for r in range(h.shape[0]):
        for j in range(h.shape[1]):
            h[r, j] = _tanh(a[r, j])


@_kernel
def _lstm(a, h, c, g_i, g_f, g_z, g_o):
    """Step all rows; leave the activated gates in ``g``."""
    _disjoint()
    D = np.uint64(h.shape[1])
    for r in range(h.shape[0]):
        for j in range(D):
            i, f = _sigmoid(a[r, j]), _sigmoid(a[r, D + j])
            z, o = _tanh(a[r, D + D + j]), _sigmoid(a[r, D + D + D + j])
            after = f * c[r, j] + i * z
            c[r, j], h[r, j] = after, o * _tanh(after)
            g_i[r, j], g_f[r, j], g_z[r, j], g_o[r, j] = i, f, z, o


@_kernel
def _gru(a, h, g_g, g_r, g_z, g_n):
    """Step all rows; leave g and the activated gates r, z and candidate in ``g``."""
    _disjoint()
    D = np.uint64(h.shape[1])
    for row in range(h.shape[0]):
        for j in range(D):
            g, r, z = a[row, j], _sigmoid(a[row, D + j]), _sigmoid(a[row, D + D + j])
            n = _tanh(a[row, D + D + D + j] + r * g)
            h[row, j] = z * h[row, j] + (_ONE - z) * n
            g_g[row, j], g_r[row, j], g_z[row, j], g_n[row, j] = g, r, z, n


@_kernel
def _slstm(a, h, c, n, m, g_i, g_f, g_z, g_o):
    """Step all rows; leave the raw i and f and the activated z and o in ``g``."""
    _disjoint()
    D, zero, one = np.uint64(h.shape[1]), h.dtype.type(0), h.dtype.type(1)
    for r in range(h.shape[0]):
        for j in range(D):
            i, f = a[r, j], a[r, D + j]
            log_f = (zero if f > zero else f) - _log1p(_exp(-abs(f))) + m[r, j]
            top = i if (n[r, j] == zero or i > log_f) else log_f
            scaled_i, scaled_f = _exp(i - top), _exp(log_f - top)
            z, o = _tanh(a[r, D + D + j]), _sigmoid(a[r, D + D + D + j])
            cell, norm = scaled_f * c[r, j] + scaled_i * z, scaled_f * n[r, j] + scaled_i
            norm = one if norm < one else norm
            c[r, j], n[r, j], m[r, j], h[r, j] = cell, norm, top, o * cell / norm
            g_i[r, j], g_f[r, j], g_z[r, j], g_o[r, j] = i, f, z, o


@_kernel
def _forward_block(code, size, Wx, w, b, initial, n, first, hidden, cells, last, kept):
    """Run one head on a block of ``size`` sequences; ``kept`` ``(T, gates and states)`` may be empty."""
    steps, D, states, columns = Wx.shape[1], Wx.shape[4], initial.shape[0], w.shape[0] // Wx.shape[4]
    rows = min(size, Wx.shape[0] - first)
    h, tile = np.zeros((size, D), Wx.dtype), np.zeros((7, size, D), Wx.dtype)
    a = np.zeros((size, max(columns, b.shape[0] * D)), Wx.dtype)
    g0, g1, g2, g3, s1, s2, s3 = tile[0], tile[1], tile[2], tile[3], tile[4], tile[5], tile[6]
    flat = tile.reshape(-1)[: kept.shape[1]]
    _split_states(initial, n, first, rows, h, tile)
    for t in range(steps):
        _load(Wx, b, n, first, t, rows, a)
        _product(h, 0, D, w, D, columns, a)
        if code == ELMAN:
            _elman(a, h)
        elif code == LSTM:
            _lstm(a, h, s1, g0, g1, g2, g3)
        elif code == GRU:
            _gru(a, h, g0, g1, g2, g3)
        else:
            _slstm(a, h, s1, s2, s3, g0, g1, g2, g3)
        _scatter(h, n, first, t, rows, hidden)
        if kept.size:
            _copy(flat, kept[t])
        if cells.size:
            for k in range(1, states):
                _scatter(tile[3 + k], n, first, t, rows, cells[k - 1])
    _join_states(h, tile, n, first, rows, last)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def forward(code, size, Wx, w, b, initial, hidden, cells, last, kept):
    """Run all heads; see :func:`dynakern.ops.flash_rnn.cpu.forward`."""
    batch, heads = Wx.shape[0], Wx.shape[3]
    blocks = (batch + size - 1) // size
    for item in prange(heads * blocks):
        n, first = item // blocks, item % blocks * size
        _forward_block(code, size, Wx, w[n], b, initial, n, first, hidden, cells, last, kept[item])


@_kernel
def _elman_back(h, dh, d):
    """Turn the gradient of h into that of the pre-activation, and clear it."""
    _disjoint()
    for r in range(h.shape[0]):
        for j in range(h.shape[1]):
            d[r, j] = dh[r, j] * (_ONE - h[r, j] * h[r, j])
            dh[r, j] = 0


@_kernel
def _lstm_back(g_i, g_f, g_z, g_o, before, c, dh, dc, d):
    """``before`` and ``c`` are the cell before and after the step; ``dh``, ``dc`` become those of the step before."""
    _disjoint()
    D, one, tiny = np.uint64(dh.shape[1]), dh.dtype.type(1), dh.dtype.type(1e-30 if dh.itemsize == 4 else 1e-290)
    for r in range(dh.shape[0]):
        for j in range(D):
            i, f, z, o, u = g_i[r, j], g_f[r, j], g_z[r, j], g_o[r, j], _tanh(c[r, j])
            by_c = dc[r, j] + dh[r, j] * o * (one - u * u)
            by_o = dh[r, j] * u * o * (one - o)
            dc[r, j], dh[r, j] = _flush(by_c * f, tiny), 0
            d[r, j] = by_c * z * i * (one - i)
            d[r, D + j] = by_c * before[r, j] * f * (one - f)
            d[r, D + D + j] = by_c * i * (one - z * z)
            d[r, D + D + D + j] = by_o


@_kernel
def _gru_back(g_g, g_r, g_z, g_n, before, dh, d):
    _disjoint()
    D, one = np.uint64(dh.shape[1]), dh.dtype.type(1)
    for row in range(dh.shape[0]):
        for j in range(D):
            r, z, n, by_h = g_r[row, j], g_z[row, j], g_n[row, j], dh[row, j]
            by_n, by_z = by_h * (one - z) * (one - n * n), by_h * (before[row, j] - n) * z * (one - z)
            dh[row, j] = by_h * z
            d[row, j] = by_n * r
            d[row, D + j] = by_n * g_g[row, j] * r * (one - r)
            d[row, D + D + j] = by_z
            d[row, D + D + D + j] = by_n


@_kernel
def _slstm_back(g_i, g_f, g_z, g_o, c0, n0, m0, c, n, m, dh, dc, dn, dm, d):
    """``c0, n0, m0`` are the states before the step, ``c, n, m`` those after it."""
    _disjoint()
    D, real = np.uint64(dh.shape[1]), dh.dtype.type
    zero, half, one, tiny = real(0), real(0.5), real(1), real(1e-30 if dh.itemsize == 4 else 1e-290)
    for r in range(dh.shape[0]):
        for j in range(D):
            i, f, z, o, top, norm = g_i[r, j], g_f[r, j], g_z[r, j], g_o[r, j], m[r, j], n[r, j]
            small = _exp(-abs(f))
            log_f = (zero if f > zero else f) - _log1p(small) + m0[r, j]
            scaled_i, scaled_f = _exp(i - top), _exp(log_f - top)
            ratio, part = c[r, j] / norm, dh[r, j] * o / norm
            by_c, by_n = dc[r, j] + part, dn[r, j] - part * ratio
            raw = scaled_f * n0[r, j] + scaled_i
            by_n *= one if raw > one else (half if raw == one else zero)  # max(raw, 1)
            by_i, by_f = (by_c * z + by_n) * scaled_i, (by_c * c0[r, j] + by_n * n0[r, j]) * scaled_f
            by_m, chosen = dm[r, j] - by_i - by_f, one if i == top else zero  # m is i, else log_f
            by_f += by_m * (one - chosen)
            by_o = dh[r, j] * ratio * o * (one - o)
            dc[r, j], dn[r, j] = _flush(by_c * scaled_f, tiny), _flush(by_n * scaled_f, tiny)
            dm[r, j], dh[r, j] = _flush(by_f, tiny), zero
            d[r, j] = by_i + by_m * chosen
            d[r, D + j] = by_f * (small if f > zero else one) / (one + small)
            d[r, D + D + j] = by_c * scaled_i * (one - z * z)
            d[r, D + D + D + j] = by_o


@_kernel
def _add_gradients(source, n, first, t, rows, out):
    """Add one head and step of ``(B, T, NH, D)`` to the rows of ``out``."""
    _disjoint()
    n, first, t = np.uint64(n), np.uint64(first), np.uint64(t)
    for r in range(np.uint64(rows)):
        for j in range(out.shape[1]):
            out[r, j] += source[first + r, t, n, j]


@_kernel
def _store_gradients(d, n, first, t, rows, skipped, d_Wx, d_b):
    """Store the gradients of a step's gates and add them to those of the biases."""
    _disjoint()
    n, first, t, skipped = np.uint64(n), np.uint64(first), np.uint64(t), np.uint64(skipped)
    D = np.uint64(d_Wx.shape[4])
    for r in range(np.uint64(rows)):
        for j in range(np.uint64(d_b.shape[0])):
            d_b[j] += d[r, j]
        for k in range(np.uint64(d_Wx.shape[2])):
            for j in range(D):
                d_Wx[first + r, t, k, n, j] = d[r, (k + skipped) * D + j]


@_kernel
def _carry(x, bound, out):
    """Add ``x`` to ``out`` and clear it; its elements are clipped to ``bound`` if that is positive."""
    _disjoint()
    tiny = out.dtype.type(1e-30 if out.itemsize == 4 else 1e-290)
    for r in range(out.shape[0]):
        for j in range(out.shape[1]):
            v = x[r, j]
            if bound > 0:
                v = -bound if v < -bound else v
                v = bound if v > bound else v
            out[r, j], x[r, j] = _flush(out[r, j] + v, tiny), 0


@_kernel
def _backward_block(p, d, code, size, w, follow, clip, n, first, kept, d_R, d_b):
    """Take one head back over a block of sequences and add to the gradients of its matrix and biases."""
    steps, skipped, D, dtype = d.Wx.shape[1], d_b.shape[0] // d.Wx.shape[4] - d.Wx.shape[2], d.Wx.shape[4], d.Wx.dtype
    states, width, height, saved = p.initial.shape[0], d_R.shape[1], w.shape[0] // d_R.shape[1], kept.shape[1]
    rows = min(size, p.hidden.shape[0] - first)
    ds, dh = np.zeros((7, size, D), dtype), np.zeros((size, D), dtype)
    x, y = np.ones((7, size, D), dtype), np.ones((7, size, D), dtype)  # before and after the step
    recurrent, inner = np.zeros((size, width), dtype), np.zeros((GATHERED, width), dtype)
    d_gates, h = np.zeros((GATHERED, max(d_R.shape[0], d_b.shape[0])), dtype), np.zeros((size, D), dtype)
    _split_states(p.d_last, n, first, rows, dh, ds)
    if saved:
        _copy(kept[steps - 1], y.reshape(-1)[:saved])
    filled = 0
    for t in range(steps - 1, -1, -1):
        before, da = inner[filled : filled + size], d_gates[filled : filled + size]
        if t == 0:
            _split_states(p.initial, n, first, rows, before[:, :D], x)
        else:
            _gather(p.hidden, n, first, t - 1, rows, before)
            if saved:
                _copy(kept[t - 1], x.reshape(-1)[:saved])
        if p.d_hidden.size:
            _add_gradients(p.d_hidden, n, first, t, rows, dh)
        if p.d_cells.size:
            for k in range(1, states):
                _add_gradients(p.d_cells[k - 1], n, first, t, rows, ds[3 + k])
        if code == ELMAN:
            _gather(p.hidden, n, first, t, rows, h)
            _elman_back(h, dh, da)
        elif code == LSTM:
            _lstm_back(y[0], y[1], y[2], y[3], x[4], y[4], dh, ds[4], da)
        elif code == GRU:
            _gru_back(y[0], y[1], y[2], y[3], before, dh, da)
        else:
            _slstm_back(y[0], y[1], y[2], y[3], x[4], x[5], x[6], y[4], y[5], y[6], dh, ds[4], ds[5], ds[6], da)
        _store_gradients(da, n, first, t, rows, skipped, d.Wx, d_b)
        if follow:
            _product(d_gates, filled * d_gates.shape[1], d_gates.shape[1], w, height, width, recurrent)
            _carry(recurrent, clip, dh)
        filled += size
        if t == 0 or filled == GATHERED:
            _outer(d_gates, inner, filled, d_R)
            filled = 0
        x, y = y, x
    _join_states(dh, ds, n, first, rows, d.initial)


@njit(cache=True, nogil=True, parallel=True, error_model="numpy")
def backward(p, d, code, size, w, follow, clip):
    """Take all heads back; see :func:`dynakern.ops.flash_rnn.cpu.backward`."""
    batch, heads, slots = p.hidden.shape[0], p.hidden.shape[2], d.R.shape[1]
    blocks = (batch + size - 1) // size
    for item in prange(heads * slots):
        n, slot = item // slots, item % slots
        for block in range(blocks * slot // slots, blocks * (slot + 1) // slots):
            kept, d_R, d_b = p.kept[n * blocks + block], d.R[n, slot], d.b[n, slot]
            _backward_block(p, d, code, size, w[n], follow, clip, n, block * size, kept, d_R, d_b)
