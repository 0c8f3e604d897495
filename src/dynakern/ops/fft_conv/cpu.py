r"""CPU engine: blocks of 16 rows, whose spectra stay in the cache, transformed together by a Numba FFT.

The library path transforms everything at once: every pass over the data goes to memory. Here 16 rows (16 features of
one series) are laid out side by side, so that one vector instruction handles one step of 16 rows, and go through load,
FFT, product, inverse FFT and store before the next 16 begin; the kernels' spectra are computed once for the batch.

Polynomials stand behind the transform. Two real rows of degree < N multiply to a real row of degree < 2N. Modulo
:math:`t^N - i` that product folds into N complex numbers :math:`y_j + i y_{j+N}`: nothing is lost, no zeros are padded
and no real-to-complex step is needed. The transform splits :math:`t^N - e^{i\theta}` into r factors
:math:`t^{N/r} - c_m, \; c_m = e^{i(\theta + 2\pi m)/r}`, and so on down to N numbers; its twiddle factors are constant
over a whole block, so all inner loops run along memory. Values come out in a permuted order that the inverse undoes.
A tap at lag -i is :math:`t^{-i} = -t^{2N-i}`, and the conjugate spectrum belongs to the kernel reversed in time, which
gives the gradients.

The 16 rows lie in memory as blocks of 64 points: first the real parts of a block, 16 lanes a point, then the imaginary
parts. Whatever happens within a block has distances that are constants, so the compiler needs no checks for overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dynakern.ops.fft_conv.reference import split_taps

__all__ = ["backward", "forward"]

LANES = 16  # rows side by side: two AVX2 vectors or one of AVX-512 in float32
POINTS = 64  # of a block: the innermost transform, whose sizes are known to the compiler
BLOCK = POINTS * LANES  # numbers of a block's real part; its imaginary part follows
PAIR = 2 * BLOCK
_ROW = 4 * POINTS
_OPTIONS = {"fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"}, "nogil": True, "cache": True}


@njit(inline="always", **_OPTIONS)
def _forward4(x, run, q, tw, k):
    """Reduce four pieces q apart modulo t^4m - c^4 to four modulo t^m - c i^j; imaginary parts lie BLOCK further."""
    c1r, c1i, c2r, c2i, c3r, c3i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3], tw[k, 4], tw[k, 5]
    for t in range(run):
        m = t + BLOCK
        x1r, x1i = x[t + q] * c1r - x[m + q] * c1i, x[t + q] * c1i + x[m + q] * c1r
        x2r, x2i = x[t + 2 * q] * c2r - x[m + 2 * q] * c2i, x[t + 2 * q] * c2i + x[m + 2 * q] * c2r
        x3r, x3i = x[t + 3 * q] * c3r - x[m + 3 * q] * c3i, x[t + 3 * q] * c3i + x[m + 3 * q] * c3r
        ar, ai, br, bi = x[t] + x2r, x[m] + x2i, x[t] - x2r, x[m] - x2i
        cr, ci, dr, di = x1r + x3r, x1i + x3i, x1r - x3r, x1i - x3i
        x[t], x[m] = ar + cr, ai + ci
        x[t + q], x[m + q] = br - di, bi + dr
        x[t + 2 * q], x[m + 2 * q] = ar - cr, ai - ci
        x[t + 3 * q], x[m + 3 * q] = br + di, bi - dr


@njit(inline="always", **_OPTIONS)
def _inverse4(x, run, q, tw, k):
    """Undo :func:`_forward4`, up to the factor 4."""
    c1r, c1i, c2r, c2i, c3r, c3i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3], tw[k, 4], tw[k, 5]
    for t in range(run):
        m = t + BLOCK
        ar, ai, br, bi = x[t] + x[t + 2 * q], x[m] + x[m + 2 * q], x[t] - x[t + 2 * q], x[m] - x[m + 2 * q]
        cr, ci = x[t + q] + x[t + 3 * q], x[m + q] + x[m + 3 * q]
        dr, di = x[t + q] - x[t + 3 * q], x[m + q] - x[m + 3 * q]
        x1r, x1i, x2r, x2i, x3r, x3i = br + di, bi - dr, ar - cr, ai - ci, br - di, bi + dr
        x[t], x[m] = ar + cr, ai + ci
        x[t + q], x[m + q] = x1r * c1r + x1i * c1i, x1i * c1r - x1r * c1i
        x[t + 2 * q], x[m + 2 * q] = x2r * c2r + x2i * c2i, x2i * c2r - x2r * c2i
        x[t + 3 * q], x[m + 3 * q] = x3r * c3r + x3i * c3i, x3i * c3r - x3r * c3i


@njit(inline="always", **_OPTIONS)
def _meet4(x, K, q, tw, k):
    """Do :func:`_forward4`, multiply by K and undo it, in registers."""
    c1r, c1i, c2r, c2i, c3r, c3i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3], tw[k, 4], tw[k, 5]
    for t in range(q):
        m = t + BLOCK
        x1r, x1i = x[t + q] * c1r - x[m + q] * c1i, x[t + q] * c1i + x[m + q] * c1r
        x2r, x2i = x[t + 2 * q] * c2r - x[m + 2 * q] * c2i, x[t + 2 * q] * c2i + x[m + 2 * q] * c2r
        x3r, x3i = x[t + 3 * q] * c3r - x[m + 3 * q] * c3i, x[t + 3 * q] * c3i + x[m + 3 * q] * c3r
        ar, ai, br, bi = x[t] + x2r, x[m] + x2i, x[t] - x2r, x[m] - x2i
        cr, ci, dr, di = x1r + x3r, x1i + x3i, x1r - x3r, x1i - x3i
        y0r, y0i, y1r, y1i, y2r, y2i, y3r, y3i = ar + cr, ai + ci, br - di, bi + dr, ar - cr, ai - ci, br + di, bi - dr
        z0r, z0i = y0r * K[t] - y0i * K[m], y0r * K[m] + y0i * K[t]
        z1r, z1i = y1r * K[t + q] - y1i * K[m + q], y1r * K[m + q] + y1i * K[t + q]
        z2r, z2i = y2r * K[t + 2 * q] - y2i * K[m + 2 * q], y2r * K[m + 2 * q] + y2i * K[t + 2 * q]
        z3r, z3i = y3r * K[t + 3 * q] - y3i * K[m + 3 * q], y3r * K[m + 3 * q] + y3i * K[t + 3 * q]
        ar, ai, br, bi = z0r + z2r, z0i + z2i, z0r - z2r, z0i - z2i
        cr, ci, dr, di = z1r + z3r, z1i + z3i, z1r - z3r, z1i - z3i
        x1r, x1i, x2r, x2i, x3r, x3i = br + di, bi - dr, ar - cr, ai - ci, br - di, bi + dr
        x[t], x[m] = ar + cr, ai + ci
        x[t + q], x[m + q] = x1r * c1r + x1i * c1i, x1i * c1r - x1r * c1i
        x[t + 2 * q], x[m + 2 * q] = x2r * c2r + x2i * c2i, x2i * c2r - x2r * c2i
        x[t + 3 * q], x[m + 3 * q] = x3r * c3r + x3i * c3i, x3i * c3r - x3r * c3i


@njit(inline="always", **_OPTIONS)
def _forward3(x, run, q, tw, k):
    c1r, c1i, c2r, c2i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3]
    half, root = x.dtype.type(0.5), x.dtype.type(0.8660254037844386)  # -cos, sin of 2 pi / 3
    for t in range(run):
        m = t + BLOCK
        x1r, x1i = x[t + q] * c1r - x[m + q] * c1i, x[t + q] * c1i + x[m + q] * c1r
        x2r, x2i = x[t + 2 * q] * c2r - x[m + 2 * q] * c2i, x[t + 2 * q] * c2i + x[m + 2 * q] * c2r
        sr, si, dr, di = x1r + x2r, x1i + x2i, root * (x1r - x2r), root * (x1i - x2i)
        ar, ai = x[t] - half * sr, x[m] - half * si
        x[t], x[m] = x[t] + sr, x[m] + si
        x[t + q], x[m + q] = ar - di, ai + dr
        x[t + 2 * q], x[m + 2 * q] = ar + di, ai - dr


@njit(inline="always", **_OPTIONS)
def _inverse3(x, run, q, tw, k):
    c1r, c1i, c2r, c2i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3]
    half, root = x.dtype.type(0.5), x.dtype.type(0.8660254037844386)
    for t in range(run):
        m = t + BLOCK
        sr, si = x[t + q] + x[t + 2 * q], x[m + q] + x[m + 2 * q]
        dr, di = root * (x[t + q] - x[t + 2 * q]), root * (x[m + q] - x[m + 2 * q])
        ar, ai = x[t] - half * sr, x[m] - half * si
        x1r, x1i, x2r, x2i = ar + di, ai - dr, ar - di, ai + dr
        x[t], x[m] = x[t] + sr, x[m] + si
        x[t + q], x[m + q] = x1r * c1r + x1i * c1i, x1i * c1r - x1r * c1i
        x[t + 2 * q], x[m + 2 * q] = x2r * c2r + x2i * c2i, x2i * c2r - x2r * c2i


@njit(inline="always", **_OPTIONS)
def _forward2(x, run, q, tw, k):
    c1r, c1i = tw[k, 0], tw[k, 1]
    for t in range(run):
        m = t + BLOCK
        x0r, x0i = x[t], x[m]
        x1r, x1i = x[t + q] * c1r - x[m + q] * c1i, x[t + q] * c1i + x[m + q] * c1r
        x[t], x[m] = x0r + x1r, x0i + x1i
        x[t + q], x[m + q] = x0r - x1r, x0i - x1i


@njit(inline="always", **_OPTIONS)
def _inverse2(x, run, q, tw, k):
    c1r, c1i = tw[k, 0], tw[k, 1]
    for t in range(run):
        m = t + BLOCK
        x1r, x1i = x[t] - x[t + q], x[m] - x[m + q]
        x[t], x[m] = x[t] + x[t + q], x[m] + x[m + q]
        x[t + q], x[m + q] = x1r * c1r + x1i * c1i, x1i * c1r - x1r * c1i


@njit(**_OPTIONS)
def _stage_forward(x, radix, tw, k):
    q = x.shape[0] // radix
    for b in range(0, q, PAIR):
        if radix == 4:
            _forward4(x[b:], BLOCK, q, tw, k)
        elif radix == 3:
            _forward3(x[b:], BLOCK, q, tw, k)
        else:
            _forward2(x[b:], BLOCK, q, tw, k)


@njit(**_OPTIONS)
def _stage_inverse(x, radix, tw, k):
    q = x.shape[0] // radix
    for b in range(0, q, PAIR):
        if radix == 4:
            _inverse4(x[b:], BLOCK, q, tw, k)
        elif radix == 3:
            _inverse3(x[b:], BLOCK, q, tw, k)
        else:
            _inverse2(x[b:], BLOCK, q, tw, k)


@njit(**_OPTIONS)
def _segment_size(radices):
    """Return the numbers that the stage before the blocks works on together; they fit the first-level cache."""
    return PAIR * (radices[-4] if len(radices) > 3 else 1)


@njit(**_OPTIONS)
def _descend(x, radices, starts, tw):
    """Go from the whole to segments."""
    size, pieces = x.shape[0], 1
    for s in range(len(radices) - 4):
        for k in range(pieces):
            _stage_forward(x[k * size : (k + 1) * size], radices[s], tw, starts[s] + k)
        size //= radices[s]
        pieces *= radices[s]


@njit(**_OPTIONS)
def _ascend(x, radices, starts, tw):
    """Undo :func:`_descend`."""
    size = _segment_size(radices)
    pieces = x.shape[0] // size
    for s in range(len(radices) - 5, -1, -1):
        size *= radices[s]
        pieces //= radices[s]
        for k in range(pieces):
            _stage_inverse(x[k * size : (k + 1) * size], radices[s], tw, starts[s] + k)


@njit(**_OPTIONS)
def _segment_forward(x, radices, starts, tw, segment):
    """Do the stages of one segment but the last."""
    s, blocks = len(radices) - 3, x.shape[0] // PAIR
    if blocks > 1:
        _stage_forward(x, radices[s - 1], tw, starts[s - 1] + segment)
    for b in range(blocks):
        block, y = segment * blocks + b, x[b * PAIR : (b + 1) * PAIR]
        _forward4(y, 16 * LANES, 16 * LANES, tw, starts[s] + block)
        for j in range(4):
            _forward4(y[16 * j * LANES :], 4 * LANES, 4 * LANES, tw, starts[s + 1] + 4 * block + j)


@njit(**_OPTIONS)
def _segment_finish(x, starts, tw, segment):
    """Do the last stage of one segment."""
    blocks = x.shape[0] // PAIR
    for b in range(blocks):
        first, y = starts[-1] + 16 * (segment * blocks + b), x[b * PAIR : (b + 1) * PAIR]
        for j in range(16):
            _forward4(y[4 * j * LANES :], LANES, LANES, tw, first + j)


@njit(**_OPTIONS)
def _segment_product(x, K, starts, tw, segment):
    """Do the last stage of one segment, multiply by K, and undo the stage."""
    blocks = x.shape[0] // PAIR
    for b in range(blocks):
        first, y, z = (
            starts[-1] + 16 * (segment * blocks + b),
            x[b * PAIR : (b + 1) * PAIR],
            K[b * PAIR : (b + 1) * PAIR],
        )
        for j in range(16):
            _meet4(y[4 * j * LANES :], z[4 * j * LANES :], LANES, tw, first + j)


@njit(**_OPTIONS)
def _segment_start(x, starts, tw, segment):
    """Undo :func:`_segment_finish`."""
    blocks = x.shape[0] // PAIR
    for b in range(blocks):
        first, y = starts[-1] + 16 * (segment * blocks + b), x[b * PAIR : (b + 1) * PAIR]
        for j in range(16):
            _inverse4(y[4 * j * LANES :], LANES, LANES, tw, first + j)


@njit(**_OPTIONS)
def _segment_inverse(x, radices, starts, tw, segment):
    """Undo :func:`_segment_forward`."""
    s, blocks = len(radices) - 3, x.shape[0] // PAIR
    for b in range(blocks):
        block, y = segment * blocks + b, x[b * PAIR : (b + 1) * PAIR]
        for j in range(4):
            _inverse4(y[16 * j * LANES :], 4 * LANES, 4 * LANES, tw, starts[s + 1] + 4 * block + j)
        _inverse4(y, 16 * LANES, 16 * LANES, tw, starts[s] + block)
    if blocks > 1:
        _stage_inverse(x, radices[s - 1], tw, starts[s - 1] + segment)


@njit(inline="always", **_OPTIONS)
def _weave(out, a, b, c, d):
    for j in range(a.shape[0]):
        out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3] = a[j], b[j], c[j], d[j]


@njit(**_OPTIONS)
def _zero(x):
    for t in range(x.shape[0]):
        x[t] = 0


@njit(**_OPTIONS)
def _find_rows(first, count, H, C, c, rows):
    """Set rows to where rows first ... of a flattened (B, H) lie in a flattened (B, C, H), channel c."""
    for w in range(count):
        rows[w] = ((first + w) // H * C + c) * H + (first + w) % H


@njit(**_OPTIONS)
def _load(x, L, rows, count, out):
    """Lay L steps of ``count`` rows of x side by side in the real parts of out, zeros everywhere else."""
    s = np.empty((4, 4 * POINTS), x.dtype)
    for block in range(out.shape[0] // PAIR):
        l, y = block * POINTS, out[block * PAIR : (block + 1) * PAIR]
        n = max(0, min(L - l, POINTS))
        e = l + n
        if count == LANES and n > 0:
            for w in range(4):
                _weave(s[w], x[rows[w], l:e], x[rows[w + 4], l:e], x[rows[w + 8], l:e], x[rows[w + 12], l:e])
            _weave(y, s[0, : 4 * n], s[1, : 4 * n], s[2, : 4 * n], s[3, : 4 * n])
            _zero(y[n * LANES :])
        else:
            _zero(y)
            for w in range(count):
                row = x[rows[w]]
                for t in range(n):
                    y[t * LANES + w] = row[l + t]


@njit(**_OPTIONS)
def _copy(x, out):
    for t in range(x.shape[0]):
        out[t] = x[t]


@njit(**_OPTIONS)
def _unweave(x, y):
    """Undo :func:`_weave`: deal x out to four rows of y, 4 * POINTS apart."""
    for j in range(x.shape[0] // 4):
        y[j], y[j + _ROW], y[j + 2 * _ROW], y[j + 3 * _ROW] = x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]


@njit(**_OPTIONS)
def _store(x, y, L, rows, count):
    """Write L steps of the real parts of the first ``count`` lanes of x into rows of y."""
    s, rest = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    for l in range(0, L, POINTS):
        o, n = l // POINTS * PAIR, min(L - l, POINTS)
        _unweave(x[o : o + BLOCK], s)  # lanes 0, 4, 8, 12 of all points, then 1, 5, 9, 13, ...
        for w in range(4):
            _unweave(s[_ROW * w : _ROW * (w + 1)], rest[POINTS * w :])
        for w in range(count):
            _copy(rest[POINTS * w : POINTS * w + n], y[rows[w], l : l + n])


@njit(**_OPTIONS)
def _add_correlation(Y, K, out):
    """Add Y conj(K) to out."""
    for b in range(0, Y.shape[0], PAIR):
        y, k, o = Y[b : b + PAIR], K[b : b + PAIR], out[b : b + PAIR]
        for t in range(BLOCK):
            m = t + BLOCK
            o[t] += y[t] * k[t] + y[m] * k[m]
            o[m] += y[m] * k[t] - y[t] * k[m]


@njit(inline="always", **_OPTIONS)
def _imaginary(point):
    """Return where the imaginary part of a point begins."""
    return point // POINTS * PAIR + BLOCK + point % POINTS * LANES


@njit(**_OPTIONS)
def _transform_kernels(k, g, width, past, future, radices, starts, tw, scale, K):
    """Fill K (C, numbers) with the spectra, times ``scale``, of the kernels (C * width, T) of group g."""
    T, size, points = k.shape[1], _segment_size(radices), K.shape[1] // (2 * LANES)
    count = min(LANES, width - g * LANES)
    for c in range(K.shape[0]):
        first, x = c * width + g * LANES, K[c]
        _load(k, past, np.arange(first, first + LANES), count, x)
        for i in range(1, future + 1):
            o = _imaginary(points - i)
            for w in range(count):
                x[o + w] = -k[first + w, T - i]
        _descend(x, radices, starts, tw)
        for segment in range(x.shape[0] // size):
            y = x[segment * size : (segment + 1) * size]
            _segment_forward(y, radices, starts, tw, segment)
            _segment_finish(y, starts, tw, segment)
        for t in range(x.shape[0]):
            x[t] *= scale


@njit(**_OPTIONS)
def _convolve(u, k, y, begin, end, parts, H, width, past, future, radices, starts, tw, scale, numbers):
    """Do tasks begin .. end - 1: one of ``parts`` parts of the batch for the features of one group each."""
    rows, L = u.shape
    C, size, steps = k.shape[0] // width, _segment_size(radices), (rows + width - 1) // width
    K, z, lanes = np.empty((C, numbers), u.dtype), np.empty((C, numbers), u.dtype), np.empty(LANES, np.int64)
    x = z[C - 1]  # the last channel's product takes the place of the signal's spectrum
    for task in range(begin, end):
        g, part = task // parts, task % parts
        _transform_kernels(k, g, width, past, future, radices, starts, tw, scale, K)
        for step in range(steps * part // parts, steps * (part + 1) // parts):
            first = step * width + g * LANES
            count = min(LANES, width - g * LANES, rows - first)
            _find_rows(first, count, H, C // C, C - C, lanes)
            _load(u, L, lanes, count, x)
            _descend(x, radices, starts, tw)
            for segment in range(numbers // size):
                a, b = segment * size, (segment + 1) * size
                _segment_forward(x[a:b], radices, starts, tw, segment)
                for c in range(C):
                    if c < C - 1:
                        _copy(x[a:b], z[c, a:b])
                    _segment_product(z[c, a:b], K[c, a:b], starts, tw, segment)
                    _segment_inverse(z[c, a:b], radices, starts, tw, segment)
            for c in range(C):
                _ascend(z[c], radices, starts, tw)
                _find_rows(first, count, H, C, c, lanes)
                _store(z[c], y, L, lanes, count)


@njit(**_OPTIONS)
def _store_kernel_gradients(dK, dk, g, width, past, future, radices, starts, tw, scale):
    T, size, points = dk.shape[1], _segment_size(radices), dK.shape[1] // (2 * LANES)
    count = min(LANES, width - g * LANES)
    for c in range(dK.shape[0]):
        first, x = c * width + g * LANES, dK[c]
        for segment in range(x.shape[0] // size):
            y = x[segment * size : (segment + 1) * size]
            _segment_start(y, starts, tw, segment)
            _segment_inverse(y, radices, starts, tw, segment)
        _ascend(x, radices, starts, tw)
        for t in range(x.shape[0]):
            x[t] *= scale
        _store(x, dk, past, np.arange(first, first + LANES), count)
        for i in range(1, future + 1):
            o = _imaginary(points - i)
            for w in range(count):
                dk[first + w, T - i] = -x[o + w]


@njit(**_OPTIONS)
def _correlate(dy, u, k, du, dk, begin, end, H, width, past, future, radices, starts, tw, scale, numbers):
    """Do the gradients for groups begin .. end - 1: over the batch in order, so that sums have one result."""
    rows, L = u.shape
    C, size = k.shape[0] // width, _segment_size(radices)
    K, z, dK = np.empty((C, numbers), u.dtype), np.empty((C, numbers), u.dtype), np.empty((C, numbers), u.dtype)
    x, dx, lanes = np.empty(numbers, u.dtype), np.empty(size, u.dtype), np.empty(LANES, np.int64)
    for g in range(begin, end):
        _transform_kernels(k, g, width, past, future, radices, starts, tw, scale, K)
        _zero(dK.reshape(-1))
        for step in range((rows + width - 1) // width):
            first = step * width + g * LANES
            count = min(LANES, width - g * LANES, rows - first)
            _find_rows(first, count, H, C // C, C - C, lanes)
            _load(u, L, lanes, count, x)
            _descend(x, radices, starts, tw)
            for c in range(C):
                _find_rows(first, count, H, C, c, lanes)
                _load(dy, L, lanes, count, z[c])
                _descend(z[c], radices, starts, tw)
            for segment in range(numbers // size):
                a, b = segment * size, (segment + 1) * size
                _segment_forward(x[a:b], radices, starts, tw, segment)
                _segment_finish(x[a:b], starts, tw, segment)
                _zero(dx)
                for c in range(C):
                    _segment_forward(z[c, a:b], radices, starts, tw, segment)
                    _segment_finish(z[c, a:b], starts, tw, segment)
                    _add_correlation(z[c, a:b], x[a:b], dK[c, a:b])
                    _add_correlation(z[c, a:b], K[c, a:b], dx)
                _segment_start(dx, starts, tw, segment)
                _segment_inverse(dx, radices, starts, tw, segment)
                _copy(dx, x[a:b])
            _ascend(x, radices, starts, tw)
            _find_rows(first, count, H, C // C, C - C, lanes)
            _store(x, du, L, lanes, count)
        _store_kernel_gradients(dK, dk, g, width, past, future, radices, starts, tw, scale)


@lru_cache(maxsize=32)
def _plan(length: int, dtype: torch.dtype) -> tuple:
    """Return each stage's radix and first twiddle, the twiddles, 1 / N, and the numbers of N >= length points."""
    points, threes, twos = min(
        (POINTS * 3**threes * 2**twos, threes, twos)
        for threes in range(17)
        for twos in range(27)
        if POINTS * 3**threes * 2**twos >= length
    )
    radices = [3] * threes + [2] * (twos % 2) + [4] * (twos // 2) + [4, 4, 4]
    angles, stages = np.array([np.pi / 2]), []
    for radix in radices:
        stages.append(angles / radix)
        angles = ((angles[:, None] + 2 * np.pi * np.arange(radix)) / radix).reshape(-1)
    starts = np.cumsum([0] + [len(stage) for stage in stages[:-1]])
    roots = np.concatenate(stages)
    real = np.float64 if dtype == torch.float64 else np.float32
    twiddles = np.stack([f(m * roots) for m in (1, 2, 3) for f in (np.cos, np.sin)], 1).astype(real)
    return np.array(radices), starts, twiddles, real(1 / points), 2 * points * LANES


def _share_lanes(k: Tensor, batch: int) -> Tensor:
    """Repeat the kernels of fewer than LANES features, so that several series fill the lanes together."""
    H = k.shape[1]
    return k.repeat(1, max(1, min(LANES // H, batch)), 1) if H < LANES else k.contiguous()


def _run(tasks: Callable[[int, int], None], count: int, numbers: int) -> None:
    """Do tasks 0 .. count - 1 in ranges on PyTorch's number of threads; the kernels release the interpreter's lock.

    These are threads outside of Numba's layer: a kernel with ``parallel=True`` takes three times as long to compile.
    They take 0.1 ms to start, about as long as 2 ** 15 numbers take to convolve.
    """
    threads = min(torch.get_num_threads(), count) if numbers >= 2**19 else 1
    if threads == 1:
        tasks(0, count)
    else:
        bounds = [count * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(tasks, bounds[:-1], bounds[1:]):
                pass


def forward(u: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Return y ``(B, C, H, L)`` from u ``(B, H, L)`` and k ``(C, H, T)``, both float32 or both float64."""
    (B, H, L), (C, _, T) = u.shape, k.shape
    y = u.new_empty(B, C, H, L)
    lanes_k = _share_lanes(k.detach(), B)
    width = lanes_k.shape[1]
    groups, steps = -(-width // LANES), -(-B * H // width)
    parts = max(1, min(steps // 2, torch.get_num_threads() // groups))  # each part transforms the kernels anew
    arrays = [x.reshape(-1, x.shape[-1]).numpy() for x in (u.detach().contiguous(), lanes_k, y)]
    options = H, width, *split_taps(L, T, causal), *_plan(L, u.dtype)
    _run(lambda begin, end: _convolve(*arrays, begin, end, parts, *options), groups * parts, y.numel())
    return y


def backward(dy: Tensor, u: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and k: dy correlated with the kernels and with the signal."""
    (B, H, L), (C, _, T) = u.shape, k.shape
    lanes_k = _share_lanes(k.detach(), B)
    width = lanes_k.shape[1]
    du, dk = u.new_empty(B, H, L), u.new_zeros(C, width, T)  # taps that cannot act keep the gradient zero
    inputs = dy.detach().contiguous(), u.detach().contiguous(), lanes_k
    arrays = [x.reshape(-1, x.shape[-1]).numpy() for x in (*inputs, du, dk)]
    options = H, width, *split_taps(L, T, causal), *_plan(L, u.dtype)
    _run(lambda begin, end: _correlate(*arrays, begin, end, *options), -(-width // LANES), dy.numel())
    return du, dk.view(C, width // H, H, T).sum(1)
