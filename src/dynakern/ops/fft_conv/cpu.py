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
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from dynakern.ops.dispatch import numba_threads
from dynakern.ops.fft_conv.reference import split_taps

__all__ = ["backward", "forward"]

LANES = 16  # rows side by side: two AVX2 vectors or one of AVX-512 in float32
BASE = 64  # points of the innermost transform, whose sizes are known to the compiler
CHUNK = 64  # steps moved at a time between rows and lanes
_OPTIONS = {"fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"}, "nogil": True, "cache": True}


@njit(inline="always", **_OPTIONS)
def _forward4(R, M, q, tw, k):
    """Reduce 4 q numbers modulo t^4q - c^4 to 4 x q numbers modulo t^q - c i^m; R real, M imaginary parts."""
    c1r, c1i, c2r, c2i, c3r, c3i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3], tw[k, 4], tw[k, 5]
    for t in range(q):
        x1r, x1i = R[t + q] * c1r - M[t + q] * c1i, R[t + q] * c1i + M[t + q] * c1r
        x2r, x2i = R[t + 2 * q] * c2r - M[t + 2 * q] * c2i, R[t + 2 * q] * c2i + M[t + 2 * q] * c2r
        x3r, x3i = R[t + 3 * q] * c3r - M[t + 3 * q] * c3i, R[t + 3 * q] * c3i + M[t + 3 * q] * c3r
        ar, ai, br, bi = R[t] + x2r, M[t] + x2i, R[t] - x2r, M[t] - x2i
        cr, ci, dr, di = x1r + x3r, x1i + x3i, x1r - x3r, x1i - x3i
        R[t], M[t] = ar + cr, ai + ci
        R[t + q], M[t + q] = br - di, bi + dr
        R[t + 2 * q], M[t + 2 * q] = ar - cr, ai - ci
        R[t + 3 * q], M[t + 3 * q] = br + di, bi - dr


@njit(inline="always", **_OPTIONS)
def _forward4_real(R, M, q, tw, k):
    """Do the same where the imaginary parts are zero; M need not be set."""
    c1r, c1i, c2r, c2i, c3r, c3i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3], tw[k, 4], tw[k, 5]
    for t in range(q):
        x1r, x1i = R[t + q] * c1r, R[t + q] * c1i
        x2r, x2i = R[t + 2 * q] * c2r, R[t + 2 * q] * c2i
        x3r, x3i = R[t + 3 * q] * c3r, R[t + 3 * q] * c3i
        ar, br = R[t] + x2r, R[t] - x2r
        cr, ci, dr, di = x1r + x3r, x1i + x3i, x1r - x3r, x1i - x3i
        R[t], M[t] = ar + cr, x2i + ci
        R[t + q], M[t + q] = br - di, dr - x2i
        R[t + 2 * q], M[t + 2 * q] = ar - cr, x2i - ci
        R[t + 3 * q], M[t + 3 * q] = br + di, -x2i - dr


@njit(inline="always", **_OPTIONS)
def _inverse4(R, M, q, tw, k):
    """Undo :func:`_forward4`, up to the factor 4."""
    c1r, c1i, c2r, c2i, c3r, c3i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3], tw[k, 4], tw[k, 5]
    for t in range(q):
        ar, ai, br, bi = R[t] + R[t + 2 * q], M[t] + M[t + 2 * q], R[t] - R[t + 2 * q], M[t] - M[t + 2 * q]
        cr, ci = R[t + q] + R[t + 3 * q], M[t + q] + M[t + 3 * q]
        dr, di = R[t + q] - R[t + 3 * q], M[t + q] - M[t + 3 * q]
        x1r, x1i, x2r, x2i, x3r, x3i = br + di, bi - dr, ar - cr, ai - ci, br - di, bi + dr
        R[t], M[t] = ar + cr, ai + ci
        R[t + q], M[t + q] = x1r * c1r + x1i * c1i, x1i * c1r - x1r * c1i
        R[t + 2 * q], M[t + 2 * q] = x2r * c2r + x2i * c2i, x2i * c2r - x2r * c2i
        R[t + 3 * q], M[t + 3 * q] = x3r * c3r + x3i * c3i, x3i * c3r - x3r * c3i


@njit(inline="always", **_OPTIONS)
def _inverse4_real(R, M, q, tw, k):
    """Do the same where only the real parts are wanted; M is left as it is."""
    c1r, c1i, c2r, c2i, c3r, c3i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3], tw[k, 4], tw[k, 5]
    for t in range(q):
        ar, ai, br, bi = R[t] + R[t + 2 * q], M[t] + M[t + 2 * q], R[t] - R[t + 2 * q], M[t] - M[t + 2 * q]
        cr, ci = R[t + q] + R[t + 3 * q], M[t + q] + M[t + 3 * q]
        dr, di = R[t + q] - R[t + 3 * q], M[t + q] - M[t + 3 * q]
        R[t] = ar + cr
        R[t + q] = (br + di) * c1r + (bi - dr) * c1i
        R[t + 2 * q] = (ar - cr) * c2r + (ai - ci) * c2i
        R[t + 3 * q] = (br - di) * c3r + (bi + dr) * c3i


@njit(inline="always", **_OPTIONS)
def _forward3(R, M, q, tw, k):
    c1r, c1i, c2r, c2i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3]
    half, root = R.dtype.type(0.5), R.dtype.type(0.8660254037844386)  # -cos, sin of 2 pi / 3
    for t in range(q):
        x1r, x1i = R[t + q] * c1r - M[t + q] * c1i, R[t + q] * c1i + M[t + q] * c1r
        x2r, x2i = R[t + 2 * q] * c2r - M[t + 2 * q] * c2i, R[t + 2 * q] * c2i + M[t + 2 * q] * c2r
        sr, si, dr, di = x1r + x2r, x1i + x2i, root * (x1r - x2r), root * (x1i - x2i)
        ar, ai = R[t] - half * sr, M[t] - half * si
        R[t], M[t] = R[t] + sr, M[t] + si
        R[t + q], M[t + q] = ar - di, ai + dr
        R[t + 2 * q], M[t + 2 * q] = ar + di, ai - dr


@njit(inline="always", **_OPTIONS)
def _inverse3(R, M, q, tw, k):
    c1r, c1i, c2r, c2i = tw[k, 0], tw[k, 1], tw[k, 2], tw[k, 3]
    half, root = R.dtype.type(0.5), R.dtype.type(0.8660254037844386)
    for t in range(q):
        sr, si = R[t + q] + R[t + 2 * q], M[t + q] + M[t + 2 * q]
        dr, di = root * (R[t + q] - R[t + 2 * q]), root * (M[t + q] - M[t + 2 * q])
        ar, ai = R[t] - half * sr, M[t] - half * si
        x1r, x1i, x2r, x2i = ar + di, ai - dr, ar - di, ai + dr
        R[t], M[t] = R[t] + sr, M[t] + si
        R[t + q], M[t + q] = x1r * c1r + x1i * c1i, x1i * c1r - x1r * c1i
        R[t + 2 * q], M[t + 2 * q] = x2r * c2r + x2i * c2i, x2i * c2r - x2r * c2i


@njit(inline="always", **_OPTIONS)
def _forward2(R, M, q, tw, k):
    c1r, c1i = tw[k, 0], tw[k, 1]
    for t in range(q):
        x0r, x0i = R[t], M[t]
        x1r, x1i = R[t + q] * c1r - M[t + q] * c1i, R[t + q] * c1i + M[t + q] * c1r
        R[t], M[t] = x0r + x1r, x0i + x1i
        R[t + q], M[t + q] = x0r - x1r, x0i - x1i


@njit(inline="always", **_OPTIONS)
def _inverse2(R, M, q, tw, k):
    c1r, c1i = tw[k, 0], tw[k, 1]
    for t in range(q):
        x1r, x1i = R[t] - R[t + q], M[t] - M[t + q]
        R[t], M[t] = R[t] + R[t + q], M[t] + M[t + q]
        R[t + q], M[t + q] = x1r * c1r + x1i * c1i, x1i * c1r - x1r * c1i


@njit(**_OPTIONS)
def _stage_forward(R, M, radix, tw, k):
    q = R.shape[0] // radix
    if radix == 4:
        _forward4(R, M, q, tw, k)
    elif radix == 3:
        _forward3(R, M, q, tw, k)
    else:
        _forward2(R, M, q, tw, k)


@njit(**_OPTIONS)
def _stage_inverse(R, M, radix, tw, k):
    q = R.shape[0] // radix
    if radix == 4:
        _inverse4(R, M, q, tw, k)
    elif radix == 3:
        _inverse3(R, M, q, tw, k)
    else:
        _inverse2(R, M, q, tw, k)


@njit(**_OPTIONS)
def _base_forward(R, M, tw, starts, block):
    s = len(starts) - 3
    _forward4(R, M, 16 * LANES, tw, starts[s] + block)
    for j in range(4):
        a, b = 16 * j * LANES, 16 * (j + 1) * LANES
        _forward4(R[a:b], M[a:b], 4 * LANES, tw, starts[s + 1] + 4 * block + j)
    for j in range(16):
        a, b = 4 * j * LANES, 4 * (j + 1) * LANES
        _forward4(R[a:b], M[a:b], LANES, tw, starts[s + 2] + 16 * block + j)


@njit(**_OPTIONS)
def _base_inverse(R, M, tw, starts, block):
    s = len(starts) - 3
    for j in range(16):
        a, b = 4 * j * LANES, 4 * (j + 1) * LANES
        _inverse4(R[a:b], M[a:b], LANES, tw, starts[s + 2] + 16 * block + j)
    for j in range(4):
        a, b = 16 * j * LANES, 16 * (j + 1) * LANES
        _inverse4(R[a:b], M[a:b], 4 * LANES, tw, starts[s + 1] + 4 * block + j)
    _inverse4(R, M, 16 * LANES, tw, starts[s] + block)


@njit(**_OPTIONS)
def _open(R, M, tw, real):
    """Do the first stage; ``real`` says that M is zero (and not set)."""
    if real:
        _forward4_real(R, M, R.shape[0] // 4, tw, 0)
    else:
        _forward4(R, M, R.shape[0] // 4, tw, 0)


@njit(**_OPTIONS)
def _close(R, M, tw, real):
    """Undo :func:`_open`; ``real`` says that only R is wanted."""
    if real:
        _inverse4_real(R, M, R.shape[0] // 4, tw, 0)
    else:
        _inverse4(R, M, R.shape[0] // 4, tw, 0)


@njit(**_OPTIONS)
def _outer_forward(R, M, radices, starts, tw):
    """Go from a quarter of the whole to blocks of BASE points."""
    size, blocks = R.shape[0] // 4, 4
    for s in range(1, len(radices) - 3):
        for k in range(blocks):
            a, b = k * size, (k + 1) * size
            _stage_forward(R[a:b], M[a:b], radices[s], tw, starts[s] + k)
        size //= radices[s]
        blocks *= radices[s]


@njit(**_OPTIONS)
def _outer_inverse(R, M, radices, starts, tw):
    size = BASE * LANES
    blocks = R.shape[0] // size
    for s in range(len(radices) - 4, 0, -1):
        size *= radices[s]
        blocks //= radices[s]
        for k in range(blocks):
            a, b = k * size, (k + 1) * size
            _stage_inverse(R[a:b], M[a:b], radices[s], tw, starts[s] + k)


@njit(inline="always", **_OPTIONS)
def _weave(out, a, b, c, d):
    for j in range(a.shape[0]):
        out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3] = a[j], b[j], c[j], d[j]


@njit(inline="always", **_OPTIONS)
def _row(r, H, C, c):
    """Return where row r of (B, H) lies in a flattened (B, C, H) for channel c."""
    return (r // H * C + c) * H + r % H


@njit(**_OPTIONS)
def _load(x, L, H, C, c, first, count, R):
    """Lay L steps of ``count`` rows side by side in R, zeros in the other lanes and after the last step."""
    if count == LANES:
        s = np.empty((4, 4 * CHUNK), x.dtype)
        for l in range(0, L, CHUNK):
            n = min(L - l, CHUNK)
            for w in range(4):
                _weave(
                    s[w],
                    x[_row(first + w, H, C, c), l : l + n],
                    x[_row(first + 4 + w, H, C, c), l : l + n],
                    x[_row(first + 8 + w, H, C, c), l : l + n],
                    x[_row(first + 12 + w, H, C, c), l : l + n],
                )
            _weave(R[LANES * l : LANES * (l + n)], s[0, : 4 * n], s[1, : 4 * n], s[2, : 4 * n], s[3, : 4 * n])
    else:
        R[: LANES * L] = 0
        for w in range(count):
            row = x[_row(first + w, H, C, c)]
            for l in range(L):
                R[LANES * l + w] = row[l]
    R[LANES * L :] = 0


@njit(**_OPTIONS)
def _store(R, y, L, H, C, c, first, count):
    """Write L steps of the first ``count`` lanes of R back into rows."""
    for w in range(0, count - count % 4, 4):
        a, b = y[_row(first + w, H, C, c)], y[_row(first + w + 1, H, C, c)]
        e, f = y[_row(first + w + 2, H, C, c)], y[_row(first + w + 3, H, C, c)]
        for l in range(L):
            a[l], b[l], e[l], f[l] = R[LANES * l + w], R[LANES * l + w + 1], R[LANES * l + w + 2], R[LANES * l + w + 3]
    for w in range(count - count % 4, count):
        row = y[_row(first + w, H, C, c)]
        for l in range(L):
            row[l] = R[LANES * l + w]


@njit(**_OPTIONS)
def _multiply(R, M, Kr, Ki):
    for t in range(R.shape[0]):
        r, m = R[t], M[t]
        R[t], M[t] = r * Kr[t] - m * Ki[t], r * Ki[t] + m * Kr[t]


@njit(**_OPTIONS)
def _multiply_into(R, M, Kr, Ki, Yr, Yi):
    for t in range(R.shape[0]):
        Yr[t], Yi[t] = R[t] * Kr[t] - M[t] * Ki[t], R[t] * Ki[t] + M[t] * Kr[t]


@njit(**_OPTIONS)
def _add_correlation(Yr, Yi, Kr, Ki, R, M):
    for t in range(R.shape[0]):
        R[t] += Yr[t] * Kr[t] + Yi[t] * Ki[t]
        M[t] += Yi[t] * Kr[t] - Yr[t] * Ki[t]


@njit(parallel=True, **_OPTIONS)
def _spectra(k, width, past, future, radices, starts, tw, scale, K):
    """Transform the kernels (C * width, T), times ``scale``, into K (groups, C, 2, points * LANES)."""
    C, T, n = k.shape[0] // width, k.shape[1], K.shape[3]
    for task in prange(K.shape[0] * C):
        g, c = task // C, task % C
        first, count = c * width + g * LANES, min(LANES, width - g * LANES)
        R, M = K[g, c, 0], K[g, c, 1]
        _load(k, past, width, 1, 0, first, count, R)
        R[: past * LANES] *= scale
        if future > 0:
            M[:] = 0
            for i in range(1, future + 1):
                for w in range(count):
                    M[n - i * LANES + w] = -scale * k[first + w, T - i]
        _outer_forward(R, M, radices, starts, tw, future == 0)
        for block in range(n // (BASE * LANES)):
            a, b = block * BASE * LANES, (block + 1) * BASE * LANES
            _base_forward(R[a:b], M[a:b], tw, starts, block)


@njit(parallel=True, **_OPTIONS)
def _convolve(u, K, y, H, width, parts, radices, starts, tw):
    """Fill y (B * C * H, L) from u (B * H, L) and the spectra; each group's batch is cut into ``parts`` tasks."""
    rows, L = u.shape
    C, n = K.shape[1], K.shape[3]
    steps = (rows + width - 1) // width
    for task in prange(K.shape[0] * parts):
        g, part = task // parts, task % parts
        z = np.empty((C, 2, n), u.dtype)
        R, M = z[C - 1, 0], z[C - 1, 1]
        for step in range(steps * part // parts, steps * (part + 1) // parts):
            first = step * width + g * LANES
            count = min(LANES, width - g * LANES, rows - first)
            _load(u, L, H, 1, 0, first, count, R)
            _outer_forward(R, M, radices, starts, tw, True)
            for block in range(n // (BASE * LANES)):
                a, b = block * BASE * LANES, (block + 1) * BASE * LANES
                _base_forward(R[a:b], M[a:b], tw, starts, block)
                for c in range(C - 1):
                    _multiply_into(R[a:b], M[a:b], K[g, c, 0, a:b], K[g, c, 1, a:b], z[c, 0, a:b], z[c, 1, a:b])
                    _base_inverse(z[c, 0, a:b], z[c, 1, a:b], tw, starts, block)
                _multiply(R[a:b], M[a:b], K[g, C - 1, 0, a:b], K[g, C - 1, 1, a:b])
                _base_inverse(R[a:b], M[a:b], tw, starts, block)
            for c in range(C):
                _outer_inverse(z[c, 0], z[c, 1], radices, starts, tw, True)
                _store(z[c, 0], y, L, H, C, c, first, count)


@njit(parallel=True, **_OPTIONS)
def _correlate(dy, u, K, du, dk, H, width, past, future, radices, starts, tw, scale):
    """Fill du (B * H, L) and dk (C * width, T) from dy (B * C * H, L), u (B * H, L) and the spectra."""
    rows, L = u.shape
    T, C, n = dk.shape[1], K.shape[1], K.shape[3]
    for g in prange(K.shape[0]):
        z, dK = np.empty((C, 2, n), u.dtype), np.zeros((C, 2, n), u.dtype)
        U, dU = np.empty((2, n), u.dtype), np.empty((2, BASE * LANES), u.dtype)
        for step in range((rows + width - 1) // width):
            first = step * width + g * LANES
            count = min(LANES, width - g * LANES, rows - first)
            _load(u, L, H, 1, 0, first, count, U[0])
            _outer_forward(U[0], U[1], radices, starts, tw, True)
            for c in range(C):
                _load(dy, L, H, C, c, first, count, z[c, 0])
                _outer_forward(z[c, 0], z[c, 1], radices, starts, tw, True)
            for block in range(n // (BASE * LANES)):
                a, b = block * BASE * LANES, (block + 1) * BASE * LANES
                _base_forward(U[0, a:b], U[1, a:b], tw, starts, block)
                dU[:] = 0
                for c in range(C):
                    Yr, Yi = z[c, 0, a:b], z[c, 1, a:b]
                    _base_forward(Yr, Yi, tw, starts, block)
                    _add_correlation(Yr, Yi, U[0, a:b], U[1, a:b], dK[c, 0, a:b], dK[c, 1, a:b])
                    _add_correlation(Yr, Yi, K[g, c, 0, a:b], K[g, c, 1, a:b], dU[0], dU[1])
                _base_inverse(dU[0], dU[1], tw, starts, block)
                U[:, a:b] = dU
            _outer_inverse(U[0], U[1], radices, starts, tw, True)
            _store(U[0], du, L, H, 1, 0, first, count)
        for c in range(C):
            R, M = dK[c, 0], dK[c, 1]
            for block in range(n // (BASE * LANES)):
                a, b = block * BASE * LANES, (block + 1) * BASE * LANES
                _base_inverse(R[a:b], M[a:b], tw, starts, block)
            _outer_inverse(R, M, radices, starts, tw, future == 0)
            R[: past * LANES] *= scale
            first, count = c * width + g * LANES, min(LANES, width - g * LANES)
            _store(R, dk, past, width, 1, 0, first, count)
            for i in range(1, future + 1):
                for w in range(count):
                    dk[first + w, T - i] = -scale * M[n - i * LANES + w]


@lru_cache(maxsize=32)
def _plan(length: int, dtype: torch.dtype) -> tuple:
    """Return points N >= length, the radix and first twiddle of each stage, the twiddles, and 1 / N."""
    sizes = (4 * BASE * 2**a * 3**b for a in range(26) for b in range(17))
    points = min(size for size in sizes if size >= length)
    rest = points // (4 * BASE)
    radices = [4]
    for radix in (4, 3, 2):
        while rest % radix == 0:
            radices.append(radix)
            rest //= radix
    radices += [4, 4, 4]
    angles, stages = np.array([np.pi / 2]), []
    for radix in radices:
        stages.append(angles / radix)
        angles = ((angles[:, None] + 2 * np.pi * np.arange(radix)) / radix).reshape(-1)
    starts = np.cumsum([0] + [len(stage) for stage in stages[:-1]])
    roots = np.concatenate(stages)
    dtype_of = np.float64 if dtype == torch.float64 else np.float32
    twiddles = np.stack([f(m * roots) for m in (1, 2, 3) for f in (np.cos, np.sin)], 1).astype(dtype_of)
    return points, np.array(radices), starts, twiddles, dtype_of(1 / points)


def _spectra_of(k: Tensor, batch: int, length: int, causal: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the kernels as an array of rows, their spectra, and the number of lanes' rows that use one kernel each."""
    C, H, T = k.shape
    if H < LANES:  # several series share the lanes, each with a copy of the kernels
        k = k.repeat(1, min(LANES // H, max(batch, 1)), 1)
    width = k.shape[1]
    points, radices, starts, tw, scale = _plan(length, k.dtype)
    rows = k.reshape(C * width, T).detach().numpy()
    K = np.empty((-(-width // LANES), C, 2, points * LANES), tw.dtype)
    _spectra(rows, width, *split_taps(length, T, causal), radices, starts, tw, scale, K)
    return rows, K, width


def forward(u: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Return y ``(B, C, H, L)`` from u ``(B, H, L)`` and k ``(C, H, T)``, both float32 or both float64."""
    (B, H, L), C = u.shape, k.shape[0]
    u, k = u.contiguous(), k.contiguous()
    y = u.new_empty(B, C, H, L)
    _, radices, starts, tw, _ = _plan(L, u.dtype)
    with numba_threads():
        _, K, width = _spectra_of(k, B, L, causal)
        steps = -(-B * H // width)
        parts = max(1, min(steps, 2 * torch.get_num_threads() // K.shape[0]))
        arrays = u.detach().view(B * H, L).numpy(), K, y.view(B * C * H, L).numpy()
        _convolve(*arrays, H, width, parts, radices, starts, tw)
    return y


def backward(dy: Tensor, u: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of u and k: dy correlated with the kernels and with the signal."""
    (B, H, L), (C, _, T) = u.shape, k.shape
    dy, u, k = dy.contiguous(), u.contiguous(), k.contiguous()
    du = torch.empty_like(u)
    _, radices, starts, tw, scale = _plan(L, u.dtype)
    with numba_threads():
        _, K, width = _spectra_of(k, B, L, causal)
        dk = u.new_zeros(C, width, T)  # taps that cannot act have gradient zero
        arrays = dy.detach().view(B * C * H, L).numpy(), u.detach().view(B * H, L).numpy(), K
        outputs = du.view(B * H, L).numpy(), dk.view(C * width, T).numpy()
        _correlate(*arrays, *outputs, H, width, *split_taps(L, T, causal), radices, starts, tw, scale)
    return du, dk.view(C, width // H, H, T).sum(1)
