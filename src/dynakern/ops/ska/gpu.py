"""Small-kernel aggregation on a GPU: Triton kernels, forward and backward.

A program takes one kernel of one sample and a tile of pixels: each tap is loaded once and reused for all channels that
share the kernel, which are a block of rows of the tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward_input", "backward_kernels", "forward"]

_TILE = 1024  # pixels times channels of a program's block
_MAX_CHANNELS = 32  # of a block; more are done in turn


@triton.jit
def _pixels(H, W, BLOCK: tl.constexpr):
    """Return the rows and columns of a program's pixels and which of them exist."""
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return pixel // W, pixel % W, pixel < H * W


@triton.jit
def _mix_kernel(
    x, w, out, channels, kernels, H, W,
    SIZE: tl.constexpr, BACK: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    task, plane = tl.program_id(0).to(tl.int64), H * W
    i, j, exists = _pixels(H, W, BLOCK)
    first = (task // kernels * channels * kernels + task % kernels) * plane
    for start in range(0, channels, CHANNELS):
        s = start + tl.arange(0, CHANNELS)
        places = first + s.to(tl.int64)[:, None] * kernels * plane
        total = tl.zeros([CHANNELS, BLOCK], WIDE)
        for tap in tl.static_range(SIZE * SIZE):
            up, aside = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
            if BACK:
                row, column = i - up, j - aside
            else:
                row, column = i + up, j + aside
            inside = exists & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            there = row * W + column
            at = there if BACK else i * W + j
            factor = tl.load(w + (task * SIZE * SIZE + tap) * plane + at, mask=inside, other=0.0)
            mask = (s < channels)[:, None] & inside[None, :]
            value = tl.load(x + places + there[None, :], mask=mask, other=0.0)
            total += value.to(WIDE) * factor.to(WIDE)[None, :]
        mask = (s < channels)[:, None] & exists[None, :]
        tl.store(out + places + (i * W + j)[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _compare_kernel(
    x, dy, out, channels, kernels, H, W,
    SIZE: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    task, plane = tl.program_id(0).to(tl.int64), H * W
    i, j, exists = _pixels(H, W, BLOCK)
    first = (task // kernels * channels * kernels + task % kernels) * plane
    for tap in tl.static_range(SIZE * SIZE):
        row, column = i + tap // SIZE - SIZE // 2, j + tap % SIZE - SIZE // 2
        inside = exists & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        total = tl.zeros([BLOCK], WIDE)
        for start in range(0, channels, CHANNELS):
            s = start + tl.arange(0, CHANNELS)
            places = first + s.to(tl.int64)[:, None] * kernels * plane
            mask = (s < channels)[:, None] & inside[None, :]
            value = tl.load(x + places + (row * W + column)[None, :], mask=mask, other=0.0).to(WIDE)
            slope = tl.load(dy + places + (i * W + j)[None, :], mask=mask, other=0.0).to(WIDE)
            total += tl.sum(value * slope, axis=0)
        to = out + (task * SIZE * SIZE + tap) * plane + i * W + j
        tl.store(to, total.to(out.dtype.element_ty), mask=exists)


def _launch(x: Tensor, kernels: int, taps: int) -> tuple[tuple[int, int], dict[str, object]]:
    """Return the grid and the arguments that all kernels share."""
    N, C, H, W = x.shape
    channels = min(_MAX_CHANNELS, triton.next_power_of_2(C // kernels))
    block = min(_TILE // channels, max(16, triton.next_power_of_2(H * W)))
    arguments = {
        "channels": C // kernels,
        "kernels": kernels,
        "H": H,
        "W": W,
        "SIZE": math.isqrt(taps),
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "CHANNELS": channels,
        "BLOCK": block,
    }
    return (N * kernels, triton.cdiv(H * W, block)), arguments


def _mixed(x: Tensor, w: Tensor, back: bool) -> Tensor:
    x, w = x.contiguous(), w.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        grid, arguments = _launch(x, *w.shape[1:3])
        _mix_kernel[grid](x, w, out, BACK=back, **arguments)
    return out


def forward(x: Tensor, w: Tensor) -> Tensor:
    """Return y ``(N, C, H, W)`` from x ``(N, C, H, W)`` and w ``(N, kernels, taps, H, W)``."""
    return _mixed(x, w, False)


def backward_input(dy: Tensor, w: Tensor) -> Tensor:
    """Return the gradient of x from that of y."""
    return _mixed(dy, w, True)


def backward_kernels(dy: Tensor, x: Tensor, kernels: int, taps: int) -> Tensor:
    """Return the gradient of w ``(N, kernels, taps, H, W)``."""
    dy, x = dy.contiguous(), x.contiguous()
    out = x.new_empty(x.shape[0], kernels, taps, *x.shape[2:])
    if out.numel():
        grid, arguments = _launch(x, kernels, taps)
        _compare_kernel[grid](x, dy, out, **arguments)
    return out
