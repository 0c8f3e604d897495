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
BASE = 64  # points of the innermost transform, whose sizes are known to the compiler
CHUNK = 256  # steps moved at a time between rows and lanes
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
def _descend(R, M, radices, starts, tw):
    """Go from the whole to segments that fit the first-level cache."""
    size, blocks = R.shape[0], 1
    for s in range(len(radices) - 4):
        for k in range(blocks):
            a, b = k * size, (k + 1) * size
            _stage_forward(R[a:b], M[a:b], radices[s], tw, starts[s] + k)
        size //= radices[s]
        blocks *= radices[s]


@njit(**_OPTIONS)
def _ascend(R, M, radices, starts, tw):
    """Undo :func:`_descend`."""
    size = R.shape[0]
    for s in range(len(radices) - 4):
        size //= radices[s]
    blocks = R.shape[0] // size
    for s in range(len(radices) - 5, -1, -1):
        size *= radices[s]
        blocks //= radices[s]
        for k in range(blocks):
            a, b = k * size, (k + 1) * size
            _stage_inverse(R[a:b], M[a:b], radices[s], tw, starts[s] + k)


@njit(**_OPTIONS)
def _segment_forward(R, M, radices, starts, tw, segment):
    """Do the last four stages on one segment (three if there are no more); here lengths are constants."""
    s, size = len(radices) - 3, BASE * LANES
    blocks = R.shape[0] // size
    if blocks > 1:
        _stage_forward(R, M, radices[s - 1], tw, starts[s - 1] + segment)
    for block in range(segment * blocks, (segment + 1) * blocks):
        base = (block - segment * blocks) * size
        r, m = R[base : base + size], M[base : base + size]
        _forward4(r, m, 16 * LANES, tw, starts[s] + block)
        for j in range(4):
            a, b = 16 * j * LANES, 16 * (j + 1) * LANES
            _forward4(r[a:b], m[a:b], 4 * LANES, tw, starts[s + 1] + 4 * block + j)
        for j in range(16):
            a, b = 4 * j * LANES, 4 * (j + 1) * LANES
            _forward4(r[a:b], m[a:b], LANES, tw, starts[s + 2] + 16 * block + j)


@njit(**_OPTIONS)
def _segment_inverse(R, M, radices, starts, tw, segment):
    """Undo :func:`_segment_forward`."""
    s, size = len(radices) - 3, BASE * LANES
    blocks = R.shape[0] // size
    for block in range(segment * blocks, (segment + 1) * blocks):
        base = (block - segment * blocks) * size
        r, m = R[base : base + size], M[base : base + size]
        for j in range(16):
            a, b = 4 * j * LANES, 4 * (j + 1) * LANES
            _inverse4(r[a:b], m[a:b], LANES, tw, starts[s + 2] + 16 * block + j)
        for j in range(4):
            a, b = 16 * j * LANES, 16 * (j + 1) * LANES
            _inverse4(r[a:b], m[a:b], 4 * LANES, tw, starts[s + 1] + 4 * block + j)
        _inverse4(r, m, 16 * LANES, tw, starts[s] + block)
    if blocks > 1:
        _stage_inverse(R, M, radices[s - 1], tw, starts[s - 1] + segment)


@njit(**_OPTIONS)
def _segment_size(radices):
    return BASE * LANES * (radices[-4] if len(radices) > 3 else 1)


@njit(inline="always", **_OPTIONS)
def _weave(out, a, b, c, d):
    for j in range(a.shape[0]):
        out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3] = a[j], b[j], c[j], d[j]


@njit(**_OPTIONS)
def _zero(R):
    for t in range(R.shape[0]):
        R[t] = 0


@njit(**_OPTIONS)
def _find_rows(first, count, H, C, c, rows):
    """Set rows to where rows first ... of a flattened (B, H) lie in a flattened (B, C, H), channel c."""
    for w in range(count):
        rows[w] = ((first + w) // H * C + c) * H + (first + w) % H


@njit(**_OPTIONS)
def _load(x, L, rows, count, R, M):
    """Lay L steps of ``count`` rows of x side by side in R, zeros in the rest of R and in M."""
    if count == LANES:
        s = np.empty((4, 4 * CHUNK), x.dtype)
        for l in range(0, L, CHUNK):
            n, e = min(L - l, CHUNK), min(L, l + CHUNK)
            for w in range(4):
                _weave(s[w], x[rows[w], l:e], x[rows[w + 4], l:e], x[rows[w + 8], l:e], x[rows[w + 12], l:e])
            _weave(R[LANES * l : LANES * e], s[0, : 4 * n], s[1, : 4 * n], s[2, : 4 * n], s[3, : 4 * n])
        _zero(R[LANES * L :])
    else:
        _zero(R)
        for w in range(count):
            row = x[rows[w]]
            for l in range(L):
                R[LANES * l + w] = row[l]
    _zero(M)


@njit(**_OPTIONS)
def _store(R, y, L, rows, count):
    """Write L steps of the first ``count`` lanes of R into rows of y."""
    fours = count - count % 4
    for w in range(0, fours, 4):
        a, b, c, d = y[rows[w]], y[rows[w + 1]], y[rows[w + 2]], y[rows[w + 3]]
        for l in range(L):
            a[l], b[l], c[l], d[l] = R[LANES * l + w], R[LANES * l + w + 1], R[LANES * l + w + 2], R[LANES * l + w + 3]
    for w in range(fours, count):
        row = y[rows[w]]
        for l in range(L):
            row[l] = R[LANES * l + w]


@njit(**_OPTIONS)
def _copy(R, out):
    for t in range(R.shape[0]):
        out[t] = R[t]


@njit(**_OPTIONS)
def _multiply(R, M, Kr, Ki):
    for t in range(R.shape[0]):
        r, m = R[t], M[t]
        R[t], M[t] = r * Kr[t] - m * Ki[t], r * Ki[t] + m * Kr[t]


@njit(**_OPTIONS)
def _add_correlation(Yr, Yi, Kr, Ki, R, M):
    """Add Y conj(K) to R + i M."""
    for t in range(R.shape[0]):
        R[t] += Yr[t] * Kr[t] + Yi[t] * Ki[t]
        M[t] += Yi[t] * Kr[t] - Yr[t] * Ki[t]


@njit(**_OPTIONS)
def _transform_kernels(k, g, width, past, future, radices, starts, tw, scale, K):
    """Fill K (C, 2, n) with the spectra, times ``scale``, of the kernels (C * width, T) of group g."""
    T, n, size = k.shape[1], K.shape[2], _segment_size(radices)
    count = min(LANES, width - g * LANES)
    for c in range(K.shape[0]):
        first, R, M = c * width + g * LANES, K[c, 0], K[c, 1]
        _load(k, past, np.arange(first, first + LANES), count, R, M)
        for i in range(1, future + 1):
            for w in range(count):
                M[n - i * LANES + w] = -k[first + w, T - i]
        _descend(R, M, radices, starts, tw)
        for segment in range(n // size):
            a, b = segment * size, (segment + 1) * size
            _segment_forward(R[a:b], M[a:b], radices, starts, tw, segment)
        for t in range(n):
            R[t], M[t] = scale * R[t], scale * M[t]


@njit(**_OPTIONS)
def _convolve(u, k, y, begin, end, parts, H, width, past, future, radices, starts, tw, scale, n):
    """Do tasks begin .. end - 1: one of ``parts`` parts of the batch for the features of one group each."""
    rows, L = u.shape
    C = k.shape[0] // width
    size, steps = _segment_size(radices), (rows + width - 1) // width
    K, z, lanes = np.empty((C, 2, n), u.dtype), np.empty((C, 2, n), u.dtype), np.empty(LANES, np.int64)
    R, M = z[C - 1, 0], z[C - 1, 1]  # the last channel's product takes the place of the signal's spectrum
    for task in range(begin, end):
        g, part = task // parts, task % parts
        _transform_kernels(k, g, width, past, future, radices, starts, tw, scale, K)
        for step in range(steps * part // parts, steps * (part + 1) // parts):
            first = step * width + g * LANES
            count = min(LANES, width - g * LANES, rows - first)
            _find_rows(first, count, H, C // C, C - C, lanes)
            _load(u, L, lanes, count, R, M)
            _descend(R, M, radices, starts, tw)
            for segment in range(n // size):
                a, b = segment * size, (segment + 1) * size
                _segment_forward(R[a:b], M[a:b], radices, starts, tw, segment)
                for c in range(C):
                    Yr, Yi = z[c, 0, a:b], z[c, 1, a:b]
                    if c < C - 1:
                        _copy(R[a:b], Yr)
                        _copy(M[a:b], Yi)
                    _multiply(Yr, Yi, K[c, 0, a:b], K[c, 1, a:b])
                    _segment_inverse(Yr, Yi, radices, starts, tw, segment)
            for c in range(C):
                _ascend(z[c, 0], z[c, 1], radices, starts, tw)
                _find_rows(first, count, H, C, c, lanes)
                _store(z[c, 0], y, L, lanes, count)


@njit(**_OPTIONS)
def _store_kernel_gradients(dK, dk, g, width, past, future, radices, starts, tw, scale):
    T, n, size = dk.shape[1], dK.shape[2], _segment_size(radices)
    count = min(LANES, width - g * LANES)
    for c in range(dK.shape[0]):
        first, R, M = c * width + g * LANES, dK[c, 0], dK[c, 1]
        for t in range(n):
            R[t], M[t] = scale * R[t], scale * M[t]
        for segment in range(n // size):
            a, b = segment * size, (segment + 1) * size
            _segment_inverse(R[a:b], M[a:b], radices, starts, tw, segment)
        _ascend(R, M, radices, starts, tw)
        _store(R, dk, past, np.arange(first, first + LANES), count)
        for i in range(1, future + 1):
            for w in range(count):
                dk[first + w, T - i] = -M[n - i * LANES + w]


@njit(**_OPTIONS)
def _correlate(dy, u, k, du, dk, begin, end, H, width, past, future, radices, starts, tw, scale, n):
    """Do the gradients for groups begin .. end - 1: over the batch in order, so that sums have one result."""
    rows, L = u.shape
    C, size = k.shape[0] // width, _segment_size(radices)
    K, z, dK = np.empty((C, 2, n), u.dtype), np.empty((C, 2, n), u.dtype), np.empty((C, 2, n), u.dtype)
    U, dU, lanes = np.empty((2, n), u.dtype), np.empty((2, size), u.dtype), np.empty(LANES, np.int64)
    for g in range(begin, end):
        _transform_kernels(k, g, width, past, future, radices, starts, tw, scale, K)
        _zero(dK.reshape(-1))
        for step in range((rows + width - 1) // width):
            first = step * width + g * LANES
            count = min(LANES, width - g * LANES, rows - first)
            _find_rows(first, count, H, C // C, C - C, lanes)
            _load(u, L, lanes, count, U[0], U[1])
            _descend(U[0], U[1], radices, starts, tw)
            for c in range(C):
                _find_rows(first, count, H, C, c, lanes)
                _load(dy, L, lanes, count, z[c, 0], z[c, 1])
                _descend(z[c, 0], z[c, 1], radices, starts, tw)
            for segment in range(n // size):
                a, b = segment * size, (segment + 1) * size
                _segment_forward(U[0, a:b], U[1, a:b], radices, starts, tw, segment)
                _zero(dU.reshape(-1))
                for c in range(C):
                    Yr, Yi = z[c, 0, a:b], z[c, 1, a:b]
                    _segment_forward(Yr, Yi, radices, starts, tw, segment)
                    _add_correlation(Yr, Yi, U[0, a:b], U[1, a:b], dK[c, 0, a:b], dK[c, 1, a:b])
                    _add_correlation(Yr, Yi, K[c, 0, a:b], K[c, 1, a:b], dU[0], dU[1])
                _segment_inverse(dU[0], dU[1], radices, starts, tw, segment)
                _copy(dU[0], U[0, a:b])
                _copy(dU[1], U[1, a:b])
            _ascend(U[0], U[1], radices, starts, tw)
            _find_rows(first, count, H, C // C, C - C, lanes)
            _store(U[0], du, L, lanes, count)
        _store_kernel_gradients(dK, dk, g, width, past, future, radices, starts, tw, scale)


@lru_cache(maxsize=32)
def _plan(length: int, dtype: torch.dtype) -> tuple:
    """Return the radix and the first twiddle of each stage, the twiddles, 1 / N and N * LANES for N >= length."""
    points, threes, twos = min(
        (BASE * 3**threes * 2**twos, threes, twos)
        for threes in range(17)
        for twos in range(27)
        if BASE * 3**threes * 2**twos >= length
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
    return np.array(radices), starts, twiddles, real(1 / points), points * LANES


def _share_lanes(k: Tensor, batch: int) -> Tensor:
    """Repeat the kernels of fewer than LANES features, so that several series fill the lanes together."""
    H = k.shape[1]
    return k.repeat(1, max(1, min(LANES // H, batch)), 1) if H < LANES else k.contiguous()


def _run(tasks: Callable[[int, int], None], count: int) -> None:
    """Do tasks 0 .. count - 1 in ranges on PyTorch's number of threads; the kernels release the interpreter's lock.

    These are threads outside of Numba's layer: a kernel with ``parallel=True`` takes three times as long to compile.
    """
    threads = min(torch.get_num_threads(), count)
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
    _run(lambda begin, end: _convolve(*arrays, begin, end, parts, *options), groups * parts)
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
    _run(lambda begin, end: _correlate(*arrays, begin, end, *options), -(-width // LANES))
    return du, dk.view(C, width // H, H, T).sum(1)
