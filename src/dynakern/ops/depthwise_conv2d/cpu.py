"""The depthwise convolution on the CPU: layouts and calls of the Numba kernels.

Tensors are read and written where they lie, planes (NCHW) or channels last, and may be slices of channels of larger
ones. Kernels so large that it pays go through the FFT of :mod:`dynakern.ops.fft_conv`: with a few zeros between the
rows, an image and a kernel are one long series each. Work items release the interpreter's lock and run on a few threads
of their own; sums have a fixed order, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynakern.ops.depthwise_conv2d import kernels
from dynakern.ops.fft_conv import cpu as fft

__all__ = ["Plan", "backward", "convolve", "correlate", "forward"]

_STRIP_PIXELS = 800  # that are laid out and convolved at a time
_IMAGE_BYTES = 100_000  # of the padded image that is kept; what malloc() hands out again without fresh pages
_NEAR_BYTES = 28_000  # of the image of a strip that is gone over once for each tap: most of the first-level cache
_SET_BYTES = 1_000_000  # of the images and kernels of groups that are done together: half of the second-level cache
_PARTS = 8  # work items that the gradient of the weight aims at
_POINT_COST = 16.5  # taps that take as long as the FFTs do for a point and factor of two of their number, measured


class Plan(NamedTuple):
    """How an image is walked through.

    Attributes:
        band: Rows of a work item.
        strip: Rows that are laid out and convolved at a time.
        room: Rows of the padded image that are kept.
        groups: Groups of neighbouring channels that are done together, since their pixels lie side by side.
    """

    band: int
    strip: int
    room: int
    groups: int = 1


def _lanes(x: Tensor) -> int:
    return kernels.VECTOR_BYTES // x.element_size()


def _readable(x: Tensor) -> Tensor:
    """Return x, or a copy if neither the pixels of its rows nor its channels lie side by side."""
    x = x.detach()
    return x if x.stride(3) == 1 or x.stride(1) == 1 else x.contiguous()


def _flat(x: Tensor) -> np.ndarray:
    """Return the memory of x from its first element to its last."""
    (N, C, H, W), (n, c, h, w) = x.shape, x.stride()
    return x.as_strided((1 + (N - 1) * n + (C - 1) * c + (H - 1) * h + (W - 1) * w,), (1,)).numpy()


def _geometry(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Return (N, C, H, W, kh, kw, full kh, full kw): only 2 H - 1 rows and 2 W - 1 columns of taps can act."""
    (N, C, H, W), (full_h, full_w) = x.shape, weight.shape[2:]
    return N, C, H, W, min(full_h, 2 * H - 1), min(full_w, 2 * W - 1), full_h, full_w


@lru_cache(maxsize=256)
def _plan_forward(shape: tuple[int, ...], lanes: int, neighbours: bool, threads: int) -> Plan:
    N, C, H, W, kh, kw, _, _ = shape
    bands = max(1, min(-(-2 * threads * lanes // (N * C)), H // (2 * kh))) if threads > 1 else 1
    band, line = -(-H // bands), (W + kw - 1) * kernels.VECTOR_BYTES
    strip = min(band, -(-_STRIP_PIXELS // W))
    room, groups = min(band + kh - 1, max(strip + 2 * (kh - 1), _IMAGE_BYTES // line)), 1
    if neighbours and C % lanes == 0:
        fit = max(1, _SET_BYTES // (room * line + kh * kw * kernels.VECTOR_BYTES))
        groups = max(n for n in range(1, C // lanes + 1) if C // lanes % n == 0 and n <= fit)
    return Plan(band, strip, room, groups)


@lru_cache(maxsize=256)
def _plan_backward(shape: tuple[int, ...]) -> Plan:
    H, W, kh, kw = shape[2:6]
    line = (W + kw - 1) * kernels.VECTOR_BYTES
    strip = min(H, max(1, -(-112 // W), _NEAR_BYTES // line - kh + 1))
    return Plan(H, strip, min(H + kh - 1, max(strip + 2 * (kh - 1), _IMAGE_BYTES // line)))


def _run(tasks: Callable[[int, int], None], count: int, work: int) -> None:
    """Do tasks 0 .. count - 1 in ranges on PyTorch's number of threads; starting them takes 0.1 ms."""
    threads = min(torch.get_num_threads(), count) if work >= 2**24 else 1
    if threads == 1:
        tasks(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(tasks, bounds[:-1], bounds[1:]):
            pass


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, *, flip: bool = False) -> None:
    """Write the convolution of x ``(N, C, H, W)`` into ``y``, whose layout is that of planes or channels last.

    ``flip`` reverses the kernels: that makes the gradient of the input from that of the output.
    """
    if y.numel() == 0:
        return
    x, shape = _readable(x), _geometry(x, weight)
    (N, C, H), (kh, kw) = shape[:3], shape[4:6]
    lanes = _lanes(x)
    plan, groups = _plan_forward(shape, lanes, x.stride(3) != 1, torch.get_num_threads()), -(-N * C // lanes)
    prepared = x.new_empty(min(groups, C // math.gcd(C, lanes)), (1 + kh * kw) * lanes).numpy()
    w = weight.detach().contiguous().view(-1).numpy()
    kernels.prepare(w, w[:0] if bias is None else bias.detach().contiguous().numpy(), shape, flip, prepared)
    options = _flat(x), x.stride(), prepared, _flat(y), y.stride(), shape, plan
    count = groups // plan.groups * -(-H // plan.band)
    _run(lambda begin, end: kernels.convolve(*options, begin, end), count, y.numel() * kh * kw)


def correlate(x: Tensor, dy: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the weight and of the bias from x and the gradient of the output."""
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    db = weight.new_zeros(weight.shape[0])
    if x.numel() == 0:
        return dw, db
    x, dy, shape = _readable(x), _readable(dy), _geometry(x, weight)
    x_strides, dy_strides = x.stride(), dy.stride()
    N, C, H, W, kh, kw, full_h, full_w = shape
    if kh > kw:  # sums are kept for the taps of a row: take columns as rows
        shape = N, C, W, H, kw, kh, full_w, full_h
        x_strides, dy_strides = ((n, c, w, h) for n, c, h, w in (x_strides, dy_strides))
    lanes = _lanes(x)
    groups, classes = -(-N * C // lanes), C // math.gcd(C, lanes)
    parts = min(-(-groups // classes), -(-_PARTS // classes))
    sums = x.new_empty(classes * parts, kh * kw, lanes)
    bias_sums = x.new_empty(classes * parts, 1, lanes)
    arrays = sums.view(-1, kh * kw * lanes).numpy(), bias_sums.view(-1, lanes).numpy()
    options = _flat(x), x_strides, _flat(dy), dy_strides, shape, classes, _plan_backward(shape), *arrays
    _run(lambda begin, end: kernels.correlate(*options, begin, end), classes * parts, x.numel() * kh * kw)
    found = weight.new_empty(C, kh * kw)
    kernels.fold(sums.numpy(), classes, C, found.numpy())
    kernels.fold(bias_sums.numpy(), classes, C, db.view(C, 1).numpy())
    found = found.view(C, kw, kh).transpose(1, 2) if kh > kw else found.view(C, kh, kw)
    a, b = (full_h - kh) // 2, (full_w - kw) // 2
    dw[:, 0, a : a + kh, b : b + kw] = found
    return dw, db


@lru_cache(maxsize=256)
def _fft_pays(shape: tuple[int, ...], inverses: int, passes: int) -> bool:
    """Whether FFTs that make up ``inverses`` convolutions take less time than ``passes`` through all taps that act."""
    N, _, H, W, kh, kw, _, _ = shape
    reach = kh // 2
    rows = sum(min(h, reach) + min(H - 1 - h, reach) + 1 for h in range(H))
    points = (H + reach) * (W + kw // 2)
    return passes * N * rows * W * kw > inverses * _POINT_COST * points * math.log2(2 * points) * (N + 1.7)


def _copy(x: Tensor, y: Tensor) -> None:
    """Copy x to y, planes or channels last both."""
    x, N, C = _readable(x), *x.shape[:2]
    if x.stride(3) == y.stride(3) == 1:
        y.copy_(x)
        return
    options = _flat(x), x.stride(), _flat(y), y.stride(), tuple(x.shape)
    _run(lambda begin, end: kernels.relayout(*options, begin, end), -(-N * C // _lanes(x)), 8 * x.numel())


class _Series:
    """Images and kernels of one shape as series for a two-sided convolution: rows with kw // 2 zeros between them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.pitch = shape, shape[3] + shape[5] // 2

    def signal(self, x: Tensor) -> Tensor:
        """Return ``(N, C, L)`` of x ``(N, C, H, W)``."""
        N, C, H, W = x.shape
        u = x.new_zeros(N, C, H, self.pitch)
        _copy(x, u[..., :W])
        return u.view(N, C, -1)

    def image(self, u: Tensor, y: Tensor) -> None:
        """Undo :meth:`signal` into ``y``."""
        N, C, H, W = y.shape
        _copy(u.view(N, C, H, self.pitch)[..., :W], y)

    def _taps(self, series: Tensor) -> Tensor:
        C, kh, kw = series.shape[1], *self.shape[4:6]
        return series.as_strided((C, kh, kw), (series.stride(1), self.pitch, 1), series.storage_offset())

    def kernel(self, weight: Tensor) -> Tensor:
        """Return ``(1, C, T)`` of the weight ``(C, 1, KH, KW)``, lags in the order of ``torch.fft.fftfreq``."""
        kh, kw, full_h, full_w = self.shape[4:]
        half = kh // 2 * self.pitch + kw // 2
        series = weight.new_zeros(1, weight.shape[0], 2 * half + 1)
        a, b = (full_h - kh) // 2, (full_w - kw) // 2
        self._taps(series).copy_(weight.detach()[:, 0, a : a + kh, b : b + kw].flip(1, 2))  # a correlation
        return series.roll(-half, 2)

    def weight(self, series: Tensor) -> Tensor:
        """Undo :meth:`kernel`."""
        kh, kw, full_h, full_w = self.shape[4:]
        taps = self._taps(series.roll(series.shape[2] // 2, 2)).flip(1, 2)
        a, b = (full_h - kh) // 2, (full_w - kw) // 2
        return torch.nn.functional.pad(taps, (b, b, a, a)).unsqueeze(1)


def _convolve_series(x: Tensor, weight: Tensor, y: Tensor) -> None:
    """Do :func:`convolve` by FFTs."""
    series = _Series(_geometry(x, weight))
    series.image(fft.forward(series.signal(x), series.kernel(weight), False), y)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Write the convolution of x into y."""
    if y.numel() == 0 or not _fft_pays(_geometry(x, weight), 1, 1):
        convolve(x, weight, bias, y)
        return
    _convolve_series(x, weight, y)
    if bias is not None:
        y += bias.detach().view(-1, 1, 1)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, dx: Tensor | None, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the input into dx, if given; return those of the weight and the bias, if needed."""
    dw, db, shape = weight.new_empty(0), weight.new_empty(0), _geometry(x, weight)
    if x.numel() > 0 and needs_weight and _fft_pays(shape, 2, 1 if dx is None else 2):
        series = _Series(shape)
        slopes = series.signal(dy).unsqueeze(1)
        du, dk = fft.backward(slopes, series.signal(x), series.kernel(weight), False)
        dw = series.weight(dk)
        if dx is not None:
            series.image(du, dx)
    else:
        if needs_weight:
            dw, db = correlate(x, dy, weight)
        if dx is not None and x.numel() > 0 and _fft_pays(shape, 1, 1):
            _convolve_series(dy, weight.detach().flip(2, 3), dx)
        elif dx is not None:
            convolve(dy, weight, None, dx, flip=True)
    if needs_bias and db.numel() == 0:
        _, db = correlate(x, dy, weight[..., :1, :1])
    return dw, db if needs_bias else weight.new_empty(0)
