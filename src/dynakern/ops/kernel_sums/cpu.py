"""Kernel sums in tiles: a matrix product gives distances that stay in cache, one Numba pass adds what they say.

A Gaussian or exponential kernel is :math:`w = e^{-s g}` with :math:`g = r^2, s = 1/2h^2` or :math:`g = r, s = 1/h`, so
a power of it is the kernel of another scale, and the largest term of every scale is at the nearest point. One running
minimum of g therefore serves all scales, and a scale that is twice another costs a square, not an exponential.
Distances that are small beside the norms they are differences of, or that decide on which side of an edge a point
lies, are computed again from the coordinates.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic
from torch import Tensor

from dynakern.ops.dispatch import numba_threads

__all__ = ["kernel_sums_cpu"]

_SUM = {"reassoc", "contract", "nsz", "arcp"}
_ROWS, _COLUMNS, _BLOCK = 64, 2048, 256  # a tile (1 MB) fits the second cache, a block of a row the first
_FAR = 1e300  # the energy of a pair that is left out
_MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to an integer, which then stands in the lowest bits


@intrinsic
def _as_float(typing, bits):  # pragma: no cover - compiled
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def _as_int(typing, x):  # pragma: no cover - compiled
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _exp(x):  # pragma: no cover - compiled
    """Return exp(x) for x <= 0 without a branch, to 2 ulp; 0 below -708.

    x = k ln 2 + r, and a polynomial through the Chebyshev nodes of [-ln 2 / 2, ln 2 / 2] (relative error 2e-17) for r.
    """
    z = x if x > -708.0 else -708.0
    shifted = z * 1.4426950408889634 + _MAGIC
    k = shifted - _MAGIC
    r = z - k * 0.693147180369123816490  # ln 2 in two parts, the first of 33 bits
    r = r - k * 1.90821492927058770002e-10
    p = 2.5110049204818658e-08
    p = p * r + 2.763265472252779e-07
    p = p * r + 2.755724088722987e-06
    p = p * r + 2.4801485441561313e-05
    p = p * r + 0.00019841269890076403
    p = p * r + 0.0013888888952352863
    p = p * r + 0.008333333333319589
    p = p * r + 0.04166666666648795
    p = p * r + 0.1666666666666668
    p = p * r + 0.5000000000000019
    p = p * r + 1.0
    p = p * r + 1.0
    power = _as_float((_as_int(shifted) + 1023) << 52)
    return p * power if x > -708.0 else 0.0


@numba.njit(cache=True, nogil=True)
def _exact(x, y):  # pragma: no cover - compiled
    """Return the squared distance of two points from their coordinates, in their order."""
    total = 0.0
    for k in range(x.shape[0]):
        step = x[k] - y[k]
        total += step * step
    return total


@numba.njit(cache=True, nogil=True)
def _least(g, first, last):  # pragma: no cover - compiled
    """Return the least entry of a block, or a negative one: floats >= 0 have the order of their bits as integers."""
    least = np.int64(0x7FEFFFFFFFFFFFFF)
    for j in range(first, last):
        bits = _as_int(g[j])
        least = bits if bits < least else least
    return _as_float(least)


@numba.njit(cache=True, nogil=True, fastmath=_SUM)
def _distances(g, first, last, i, xn, yn, largest, x, y, v, weighted, rooted, left_out):  # pragma: no cover - compiled
    """Turn a block of squared distances into energies in place and return the least one."""
    least = _least(g, first, last)
    changed = weighted or rooted or first <= left_out < last
    if least < 1e-5 * (xn + largest):
        changed = True
        for j in range(first, last):
            if g[j] < 1e-5 * (xn + yn[j]):
                g[j] = _exact(x[i], y[j])
    if rooted:
        for j in range(first, last):
            g[j] = math.sqrt(g[j])
    if weighted:
        for j in range(first, last):
            g[j] = g[j] if v[j, 0] > 0.0 else _FAR
    if first <= left_out < last:
        g[left_out] = _FAR
    return _least(g, first, last) if changed else least


@numba.njit(cache=True, nogil=True, fastmath=_SUM)
def _exponentials(g, e, first, last, m, s):  # pragma: no cover - compiled
    """Write e^(-s (g - m)) and return the sums of that and of its square."""
    a = 0.0
    b = 0.0
    for j in range(first, last):
        u = _exp((m - g[j]) * s)
        e[j - first] = u
        a += u
        b += u * u
    return a, b


@numba.njit(cache=True, nogil=True, fastmath=_SUM)
def _square(e, count):  # pragma: no cover - compiled
    """Square e in place and return the sums of that and of its square."""
    a = 0.0
    b = 0.0
    for j in range(count):
        u = e[j]
        u = u * u if u > 1e-150 else 0.0  # the square would be denormal, and slow
        e[j] = u
        a += u
        b += u * u
    return a, b


@numba.njit(cache=True, nogil=True, fastmath=_SUM)
def _energies(g, e, first, last, m):  # pragma: no cover - compiled
    """Return the sum of e (g - m)."""
    c = 0.0
    for j in range(first, last):
        c += e[j - first] * (g[j] - m)
    return c


@numba.njit(cache=True, nogil=True, fastmath=_SUM)
def _weighed(g, e, first, last, m, v):  # pragma: no cover - compiled
    """Return the sums of u, u^2, u (g - m) and u ln v for u = v e."""
    a = 0.0
    b = 0.0
    c = 0.0
    d = 0.0
    for j in range(first, last):
        u = e[j - first] * v[j, 0]
        a += u
        b += u * u
        c += u * (g[j] - m)
        d += u * v[j, 1]
    return a, b, c, d


@numba.njit(cache=True, nogil=True, parallel=True, fastmath=_SUM)
def _smooth_tile(  # pragma: no cover - compiled
    g, x, y, xn, yn, largest, v, weighted, entropy, rooted, scales, squared, cut, diagonal, nearest, sums
):
    """Add a tile: g ``(R, C)`` squared distances; nearest ``(R,)`` and sums ``(R, S, 4)`` go on from earlier tiles."""
    rows, columns = g.shape
    for i in numba.prange(rows):
        e = np.empty(_BLOCK)
        row = g[i]
        m = nearest[i]
        for first in range(0, columns, _BLOCK):
            last = min(first + _BLOCK, columns)
            least = _distances(row, first, last, i, xn[i], yn, largest, x, y, v, weighted, rooted, i + diagonal)
            if least < m:
                for k in range(scales.shape[0]):
                    if sums[i, k, 0] > 0.0:
                        f = _exp((least - m) * scales[k])
                        sums[i, k, 2] = f * (sums[i, k, 2] + (m - least) * sums[i, k, 0])
                        sums[i, k, 0] *= f
                        sums[i, k, 1] *= f * f
                        sums[i, k, 3] *= f
                m = least
            alive = True
            for k in range(scales.shape[0]):
                if not squared[k]:
                    alive = True
                if not alive or (least - m) * scales[k] > cut:
                    alive = False  # all of the block is below rounding, and so it is for larger scales of the chain
                    continue
                if squared[k]:
                    a, b = _square(e, last - first)
                else:
                    a, b = _exponentials(row, e, first, last, m, scales[k])
                if weighted:
                    a, b, c, d = _weighed(row, e, first, last, m, v)
                    sums[i, k, 2] += c
                    sums[i, k, 3] += d
                elif entropy:
                    sums[i, k, 2] += _energies(row, e, first, last, m)
                sums[i, k, 0] += a
                sums[i, k, 1] += b
        nearest[i] = m


@numba.njit(cache=True, nogil=True, fastmath=_SUM)
def _edge(r, first, last, h, scale, yn):  # pragma: no cover - compiled
    """Count the pairs whose side of the edge h rounding might decide."""
    close = 0
    for j in range(first, last):
        close += 1 if abs(r[j] * r[j] - h * h) < 1e-6 * (scale + yn[j]) else 0
    return close


@numba.njit(cache=True, nogil=True, fastmath=_SUM)
def _inside(r, first, last, h, flat, v, weighted):  # pragma: no cover - compiled
    a = 0.0
    b = 0.0
    for j in range(first, last):
        u = r[j] / h
        w = 1.0 if flat else 1.0 - u * u
        w = w if r[j] < h else 0.0
        w = w * v[j, 0] if weighted else w
        a += w
        b += w * w
    return a, b


@numba.njit(cache=True, nogil=True, fastmath=_SUM)
def _inside_powers(r, first, last, h, flat, v, weighted, powers, out):  # pragma: no cover - compiled
    """Add, for each power, the sums of p = v w^power, p ln w^power and p ln v over the points inside."""
    for j in range(first, last):
        if r[j] < h:
            u = r[j] / h
            logarithm = 0.0 if flat else math.log(1.0 - u * u)
            for k in range(powers.shape[0]):
                p = math.exp(powers[k] * logarithm)
                p = p * v[j, 0] if weighted else p
                out[k, 0] += p
                out[k, 1] += p * powers[k] * logarithm
                out[k, 2] += p * v[j, 1] if weighted else 0.0


@numba.njit(cache=True, nogil=True, parallel=True, fastmath=_SUM)
def _compact_tile(  # pragma: no cover - compiled
    g, x, y, xn, yn, largest, v, weighted, flat, bandwidths, powers, diagonal, nearest, sums, power_sums
):
    """Add a tile of a kernel that ends at h: sums ``(R, H, 2)``, power_sums ``(R, H, L, 3)``."""
    rows, columns = g.shape
    for i in numba.prange(rows):
        row = g[i]
        for first in range(0, columns, _BLOCK):
            last = min(first + _BLOCK, columns)
            least = _distances(row, first, last, i, xn[i], yn, largest, x, y, v, weighted, True, i + diagonal)
            nearest[i] = min(nearest[i], least)
            for k in range(bandwidths.shape[0]):
                h = bandwidths[k]
                if least * least > h * h + 4e-6 * (xn[i] + h * h):
                    continue
                if _edge(row, first, last, h, xn[i], yn) > 0:
                    for j in range(first, last):
                        if abs(row[j] * row[j] - h * h) < 1e-6 * (xn[i] + yn[j]):
                            row[j] = math.sqrt(_exact(x[i], y[j]))
                a, b = _inside(row, first, last, h, flat, v, weighted)
                sums[i, k, 0] += a
                sums[i, k, 1] += b
                if powers.shape[0] > 0 and a > 0.0:
                    _inside_powers(row, first, last, h, flat, v, weighted, powers, power_sums[i, k])


def _chains(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order scales so that a scale follows its half wherever there is one; return the order and where it does so."""
    order: list[int] = []
    squared: list[bool] = []
    waiting = list(np.argsort(scales, kind="stable"))
    while waiting:
        current = waiting.pop(0)
        order.append(current)
        squared.append(False)
        while True:
            double = 2.0 * scales[current]
            near = [k for k in waiting if abs(scales[k] - double) <= 1e-15 * double]
            if not near:
                break
            current = near[0]
            waiting.remove(current)
            order.append(current)
            squared.append(True)
    return np.array(order), np.array(squared)


def kernel_sums_cpu(
    x: Tensor,
    y: Tensor,
    bandwidths: np.ndarray,
    kernel: str,
    weights: Tensor | None,
    powers: np.ndarray,
    exclude_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-sum, participation, entropy and nearest distance; see :func:`dynakern.ops.kernel_sums`."""
    x64, y64 = (t.detach().double().contiguous() for t in (x, y))
    center = y64.mean(0)
    a, b = x64 - center, y64 - center  # small norms: less is lost in |x|^2 + |y|^2 - 2 x.y
    norms = [t.square().sum(1) for t in (a, b)]
    a = torch.cat([-2.0 * a, norms[0][:, None], torch.ones(len(a), 1, dtype=a.dtype)], 1)
    b = torch.cat([b.T, torch.ones(1, len(b), dtype=b.dtype), norms[1][None]])  # (P + 2, N): a @ b is |x - y|^2
    xn, yn = (t.numpy() for t in norms)
    v = np.zeros((len(y), 2))
    if weights is not None:
        v[:, 0] = weights.detach().double().numpy()
        v[:, 1] = np.log(v[:, 0], out=np.zeros(len(y)), where=v[:, 0] > 0)
    smooth = kernel in ("gaussian", "exponential")
    nearest = np.full(len(x), _FAR)
    if smooth:
        scales = 0.5 / bandwidths**2 if kernel == "gaussian" else 1.0 / bandwidths
        wanted = np.concatenate([scales, np.outer(scales, powers).ravel()])
        found, which = np.unique(wanted, return_inverse=True)
        order, squared = _chains(found)
        sums = np.zeros((len(x), len(found), 4))
        cut = 45.0 + math.log(len(y)) + (0.0 if weights is None else _weight_spread(v))
    else:
        sums = np.zeros((len(x), len(bandwidths), 2))
        power_sums = np.zeros((len(x), len(bandwidths), len(powers), 3))
    tile = torch.empty(_ROWS * _COLUMNS, dtype=torch.float64)
    rows_x, rows_y = x64.numpy(), y64.numpy()
    with numba_threads():
        for i in range(0, len(x), _ROWS):
            r = slice(i, min(i + _ROWS, len(x)))
            for j in range(0, len(y), _COLUMNS):
                c = slice(j, min(j + _COLUMNS, len(y)))
                shape = (r.stop - r.start, c.stop - c.start)
                product = tile[: shape[0] * shape[1]].view(shape)
                torch.mm(a[r], b[:, c], out=product)
                first = (
                    product.numpy(),
                    rows_x[r],
                    rows_y[c],
                    xn[r],
                    yn[c],
                    float(yn[c].max()),
                    v[c],
                    weights is not None,
                )
                diagonal = i - j if exclude_diagonal else -(2**40)
                if smooth:
                    settings = (len(powers) > 0, kernel == "exponential", found[order], squared, cut)
                    _smooth_tile(*first, *settings, diagonal, nearest[r], sums[r])
                else:
                    settings = (kernel == "tophat", bandwidths, powers, diagonal)
                    _compact_tile(*first, *settings, nearest[r], sums[r], power_sums[r])
    with np.errstate(divide="ignore", invalid="ignore"):
        if smooth:
            columns = np.argsort(order)[which]  # a wanted scale's place in the order of computation
            nearest = np.where(nearest < _FAR, nearest, np.inf)
            results = _smooth_results(sums[:, columns], wanted, nearest, len(bandwidths))
            nearest = np.sqrt(nearest) if kernel == "gaussian" else nearest
        else:
            nearest = np.where(nearest < _FAR, nearest, np.inf)
            results = _compact_results(sums, power_sums)
    return tuple(torch.from_numpy(np.ascontiguousarray(t)).to(x.dtype) for t in (*results, nearest))


def _weight_spread(v: np.ndarray) -> float:
    """Return how much a far point can gain on a near one by its weight, in nats."""
    used = v[v[:, 0] > 0, 1]
    return float(np.ptp(used)) if len(used) else 0.0


def _smooth_results(
    sums: np.ndarray, scales: np.ndarray, nearest: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b, c, d = np.moveaxis(sums, (2, 1), (0, 1))  # (H + H L, Q) each
    logarithm = np.log(a)
    entropy = (logarithm + scales[:, None] * c / a - d / a)[count:]
    log_sum = logarithm[:count] - scales[:count, None] * nearest
    return log_sum, (b / a**2)[:count], entropy.reshape(count, -1, len(nearest))


def _compact_results(sums: np.ndarray, power_sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = np.moveaxis(sums, (2, 1), (0, 1))
    p, q, d = np.moveaxis(power_sums, (3, 1, 2), (0, 1, 2))  # (H, L, Q) each
    return np.log(a), b / a**2, np.log(p) - (q + d) / p
