"""Pauli rotations in Numba: eight samples side by side, so that every step is a loop over whole vectors.

A group of neighbouring rotations about words of Z is a diagonal. Its phases are the Walsh-Hadamard transform of the
angles put at the places of their words, and it is kept for later layers that repeat it.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic
from torch import Tensor

from dynakern.ops.dispatch import numba_threads

__all__ = ["pauli_states_cpu"]

_LANES = 8
_MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to an integer, which then stands in the lowest bits
_FAST = {"contract", "nsz", "arcp"}


@intrinsic
def _as_int(typing, x):  # pragma: no cover - compiled
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(64))

    return types.int64(types.float64), generate


@numba.njit(cache=True, nogil=True, fastmath={"contract"})
def _diagonal(phase, cosine, sine):  # pragma: no cover - compiled
    """Write cos and -sin of phases ``(K, 8)``, which may be where the cosines go, without a branch.

    x = k pi / 2 + r with pi / 2 in three parts, Taylor polynomials for r in [-pi / 4, pi / 4]; good to 1 ulp below 1e6.
    """
    for i in range(phase.shape[0]):
        for lane in range(_LANES):
            x = phase[i, lane]
            shifted = x * 0.6366197723675814 + _MAGIC
            k = shifted - _MAGIC
            r = x - k * 1.5707963267341256
            r = r - k * 6.077100506303966e-11
            r = r - k * 2.0222662487959506e-21
            r2 = r * r
            s = -7.647163731819816e-13
            s = s * r2 + 1.6059043836821613e-10
            s = s * r2 - 2.505210838544172e-08
            s = s * r2 + 2.7557319223985893e-06
            s = s * r2 - 0.0001984126984126984
            s = s * r2 + 0.008333333333333333
            s = s * r2 - 0.16666666666666666
            s = r + r * r2 * s
            c = 4.779477332387385e-14
            c = c * r2 - 1.1470745597729725e-11
            c = c * r2 + 2.08767569878681e-09
            c = c * r2 - 2.755731922398589e-07
            c = c * r2 + 2.48015873015873e-05
            c = c * r2 - 0.001388888888888889
            c = c * r2 + 0.041666666666666664
            c = c * r2 - 0.5
            c = c * r2 + 1.0
            quarter = _as_int(shifted)
            a = s if quarter & 1 else c
            b = c if quarter & 1 else s
            cosine[i, lane] = -a if (quarter + 1) & 2 else a
            sine[i, lane] = b if quarter & 2 else -b


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _walsh(x):  # pragma: no cover - compiled
    """Transform ``(2^n, 8)`` in place, unnormalised, two bits a pass."""
    size = x.shape[0]
    h = 1
    if (size & 0x5555555555555555) == 0:  # 2 to an odd power
        for i in range(0, size, 2):
            for lane in range(_LANES):
                a, b = x[i, lane], x[i + 1, lane]
                x[i, lane] = a + b
                x[i + 1, lane] = a - b
        h = 2
    while h < size:
        for i in range(0, size, 4 * h):
            for j in range(i, i + h):
                for lane in range(_LANES):
                    a = x[j, lane]
                    b = x[j + h, lane]
                    c = x[j + 2 * h, lane]
                    d = x[j + 3 * h, lane]
                    p, q, r, s = a + b, a - b, c + d, c - d
                    x[j, lane] = p + r
                    x[j + h, lane] = q + s
                    x[j + 2 * h, lane] = p - r
                    x[j + 3 * h, lane] = q - s
        h *= 4


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _multiply(re, im, cosine, sine, scale):  # pragma: no cover - compiled
    for i in range(re.shape[0]):
        for lane in range(_LANES):
            a, b = re[i, lane] * scale, im[i, lane] * scale
            re[i, lane] = a * cosine[i, lane] - b * sine[i, lane]
            im[i, lane] = a * sine[i, lane] + b * cosine[i, lane]


@numba.njit(cache=True, nogil=True)
def _odd(bits):  # pragma: no cover - compiled
    """Return whether an odd number of bits is set."""
    for shift in (32, 16, 8, 4, 2, 1):
        bits ^= bits >> shift
    return bits & 1


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _rotate(re, im, cosine, sine, x, z):  # pragma: no cover - compiled
    """Apply cos - i sin P to the pairs (k, k ^ x) of amplitudes; cosine and sine ``(8,)``."""
    top = 1
    while 2 * top <= x:
        top *= 2
    odd = _odd(x & z) == 1  # i^(number of Y) is real or imaginary
    power = 0
    bits = x & z
    while bits:
        power += bits & 1
        bits >>= 1
    sign = 1.0 if power % 4 < 2 else -1.0
    for k in range(re.shape[0]):
        if k & top:
            continue
        m = k ^ x
        first = sign if _odd(m & z) == 0 else -sign  # <k| P |m>, without the factor i
        second = sign if _odd(k & z) == 0 else -sign
        for lane in range(_LANES):
            c, s = cosine[lane], sine[lane]
            a, b, p, q = re[k, lane], im[k, lane], re[m, lane], im[m, lane]
            if odd:  # -i * i = 1
                re[k, lane] = c * a + s * first * p
                im[k, lane] = c * b + s * first * q
                re[m, lane] = c * p + s * second * a
                im[m, lane] = c * q + s * second * b
            else:
                re[k, lane] = c * a + s * first * q
                im[k, lane] = c * b - s * first * p
                re[m, lane] = c * p + s * second * b
                im[m, lane] = c * q - s * second * a


@numba.njit(cache=True, nogil=True, parallel=True, fastmath=_FAST)
def _states(angles, groups, diagonals, columns, x_masks, z_masks, starts, out):  # pragma: no cover - compiled
    """Write the states of angles ``(N, R)`` to out ``(N, 2, 2^n)``.

    A group ``(G, 2)`` is a range of rotations: with a number >= 0 in diagonals they are that diagonal, with -1 there is
    one, of another kind. A layer starts at each group whose starts is 1.
    """
    count, size = out.shape[0], out.shape[2]
    scale = 1.0 / np.sqrt(size)
    for batch in numba.prange((count + _LANES - 1) // _LANES):
        re = np.full((size, _LANES), scale)
        im = np.zeros((size, _LANES))
        cosine = np.empty((size, _LANES))
        sine = np.empty((size, _LANES))
        lanes = min(_LANES, count - batch * _LANES)
        held = -1
        pending = 1.0
        for g in range(groups.shape[0]):
            if starts[g] == 1 and g > 0:
                _walsh(re)
                _walsh(im)
                pending = scale
            first, last = groups[g]
            if diagonals[g] >= 0:
                if diagonals[g] != held:
                    cosine[:] = 0.0
                    for r in range(first, last):
                        for lane in range(lanes):
                            cosine[z_masks[r], lane] += angles[batch * _LANES + lane, columns[r]]
                    _walsh(cosine)
                    _diagonal(cosine, cosine, sine)
                    held = diagonals[g]
                _multiply(re, im, cosine, sine, pending)
            else:
                c = np.empty(_LANES)
                s = np.empty(_LANES)
                for lane in range(_LANES):
                    theta = angles[batch * _LANES + min(lane, lanes - 1), columns[first]]
                    c[lane] = np.cos(theta) * pending
                    s[lane] = np.sin(theta) * pending
                _rotate(re, im, c, s, x_masks[first], z_masks[first])
            pending = 1.0
        for lane in range(lanes):
            for k in range(size):
                out[batch * _LANES + lane, 0, k] = re[k, lane]
                out[batch * _LANES + lane, 1, k] = im[k, lane]


def _groups(layers: list[list[tuple[int, int, int]]]) -> tuple[np.ndarray, ...]:
    """Return groups, their diagonals (or -1), columns, x and z bits of the rotations, and where layers start."""
    rotations: list[tuple[int, int, int]] = []
    groups: list[tuple[int, int]] = []
    diagonals: list[int] = []
    starts: list[int] = []
    known: dict[tuple[tuple[int, int, int], ...], int] = {}
    for layer in layers:
        parts: list[list[tuple[int, int, int]]] = []
        for rotation in layer:
            if parts and rotation[1] == 0 and parts[-1][-1][1] == 0:
                parts[-1].append(rotation)
            else:
                parts.append([rotation])
        for position, part in enumerate(parts or [[]]):
            groups.append((len(rotations), len(rotations) + len(part)))
            rotations += part
            starts.append(int(position == 0))
            is_diagonal = not part or part[0][1] == 0
            diagonals.append(known.setdefault(tuple(sorted(part)), len(known)) if is_diagonal else -1)
    columns, x, z = np.array(rotations, dtype=np.int64).reshape(-1, 3).T.copy()
    pairs = np.array(groups, dtype=np.int64).reshape(-1, 2)
    return pairs, np.array(diagonals, dtype=np.int64), columns, x, z, np.array(starts, dtype=np.int64)


def pauli_states_cpu(angles: Tensor, layers: list[list[tuple[int, int, int]]], n_qubits: int) -> Tensor:
    """Return ``(N, 2, 2^n)``; see :func:`dynakern.ops.pauli_states`."""
    theta = np.ascontiguousarray(angles.detach().double().numpy())
    theta = np.where(np.abs(theta) > 1e3, np.remainder(theta, 2 * np.pi), theta)  # rotations have period 2 pi
    out = np.zeros((len(theta), 2, 2**n_qubits))
    if not layers:
        out[:, 0, 0] = 1.0
    elif len(theta):
        with numba_threads():
            groups, diagonals, columns, x, z, starts = _groups(layers)
            _states(theta, groups, diagonals, columns, x, z, starts, out)
    return torch.from_numpy(out)
