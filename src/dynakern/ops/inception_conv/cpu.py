"""The inception convolution on the CPU: three stencils that read and write where the tensors lie.

Channels that pass are copied once, and nothing is split, joined or padded. A vector is a stretch of a row where images
lie as planes, and neighbouring channels where they lie channels last; a *line* is what a vector makes when it moves
along the columns or the rows. Sums of up to eight places of a line stay in registers through all taps. Near the ends of
a line the taps beyond it are left out, and a mask covers what a vector reaches beyond a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynakern.ops.depthwise_conv2d.layout import is_channels_last
from dynakern.ops.inception_conv import kernels

__all__ = ["backward", "forward"]

_LIKE = {torch.float32: np.empty(0, np.float32), torch.float64: np.empty(0, np.float64)}


def _readable(x: Tensor, last: bool) -> Tensor:
    """Return x, or a copy if its channels, if ``last``, or the pixels of its rows do not lie side by side."""
    if x.stride(1 if last else 3) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _addresses(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in tensors)


def _run(tasks: Callable[[int, int], Any], count: int, work: int) -> None:
    """Do tasks 0 .. count - 1 in ranges on PyTorch's number of threads; starting them takes 0.1 ms."""
    threads = min(torch.get_num_threads(), count) if work >= 2**23 else 1
    if threads == 1:
        tasks(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(tasks, bounds[:-1], bounds[1:]):
            pass


def _layout(x: Tensor, weights: Sequence[Tensor]) -> tuple[bool, tuple[int, ...], tuple[tuple[int, int], ...], int]:
    """Return whether channels lie last, (N, C, H, W, g), the sizes of the kernels and the number of products."""
    sizes = tuple((w.shape[2], w.shape[3]) for w in weights)
    g, taps = weights[0].shape[0], sum(kh * kw for kh, kw in sizes)
    return is_channels_last(x), (*x.shape, g), sizes, x[:, :g].numel() * taps


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], y: Tensor, *, flip: bool = False
) -> None:
    """Write the convolution of x into ``y``, whose layout is that of planes or channels last.

    ``flip`` reverses the kernels: that makes the gradient of the input from that of the output.
    """
    if y.numel() == 0:
        return
    last, shape, sizes, work = _layout(y, weights)
    x, (N, C, H, _, g) = _readable(x, last), shape
    weights, biases = [w.contiguous() for w in weights], [None if b is None else b.contiguous() for b in biases]
    images = _LIKE[x.dtype], x.data_ptr(), x.stride(), y.data_ptr(), y.stride()
    options = *images, _addresses(weights), _addresses(biases), sizes, shape, flip
    if last:
        _run(lambda begin, end: kernels.convolve_last(*options, begin, end), N * H, work)
        return
    passing = C - 3 * g
    if passing:
        y[:, :passing].copy_(x[:, :passing])
    _run(lambda begin, end: kernels.convolve_planes(*options, begin, end), N * 3 * g, work)


def backward(
    dy: Tensor, x: Tensor, weights: Sequence[Tensor], dx: Tensor | None, needs_parameters: bool
) -> list[tuple[Tensor, Tensor]]:
    """Write the gradient of the input into dx, if given; return those of each branch's weight and bias, if needed."""
    if dx is not None:
        forward(dy, weights, (None, None, None), dx, flip=True)
    if not needs_parameters:
        return []
    dw = [torch.zeros_like(w, memory_format=torch.contiguous_format) for w in weights]
    db = [w.new_zeros(w.shape[0]) for w in weights]
    if x.numel() == 0:
        return list(zip(dw, db, strict=True))
    last, shape, sizes, work = _layout(x, weights)
    x, dy, N, g = _readable(x, last), _readable(dy, last), shape[0], shape[4]
    options = _LIKE[x.dtype], x.data_ptr(), x.stride(), dy.data_ptr(), dy.stride()
    found = _addresses(dw), _addresses(db)
    if last:
        lanes = kernels.VECTOR_BYTES // x.element_size()
        tasks = N * -(-g // lanes)
        parts = x.new_empty(tasks, (3 + sum(kh * kw for kh, kw in sizes)) * lanes).numpy()
        _run(lambda begin, end: kernels.correlate_last(*options, parts, sizes, shape, begin, end), tasks, work)
        kernels.fold(parts, N, g, *found, sizes)
    else:
        options = *options, *found, sizes, shape
        _run(lambda begin, end: kernels.correlate_planes(*options, begin, end), 3 * g, work)
    return list(zip(dw, db, strict=True))
