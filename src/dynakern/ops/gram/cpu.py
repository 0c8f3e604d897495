"""Kernel products tile by tile: one matrix product for the distances, the profile in place, one for the sum.

A tile stays in the second-level cache, so that the kernel matrix never meets the memory. The same code serves a GPU,
with larger tiles. Rows are independent and columns are added in order: results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["backward", "forward"]

_TILE = {"cpu": (256, 1024)}  # rows and columns: 1 MB of float32
_TILE_ELSEWHERE = (4096, 16384)

# Each profile in place on a tile of squared distances, and -2 times its derivative by them, which the backward needs.


def _gaussian(t: Tensor) -> Tensor:
    return t.mul_(-0.5).exp_()


def _matern12(t: Tensor) -> Tensor:
    return t.sqrt_().neg_().exp_()


def _matern12_slope(t: Tensor) -> Tensor:
    d = t.sqrt_()
    return (-d).exp_().div_(d).nan_to_num_(posinf=0.0)  # equal points: the derivative counts as 0


def _matern32(t: Tensor) -> Tensor:
    d = t.mul_(3).sqrt_()
    return (-d).exp_().mul_(d.add_(1))


def _matern32_slope(t: Tensor) -> Tensor:
    return t.mul_(3).sqrt_().neg_().exp_().mul_(3)


def _matern52(t: Tensor) -> Tensor:
    d = t.mul_(5).sqrt_()
    return (-d).exp_().mul_(d.square().div_(3).add_(d).add_(1))


def _matern52_slope(t: Tensor) -> Tensor:
    d = t.mul_(5).sqrt_()
    return (-d).exp_().mul_(d.add_(1)).mul_(5 / 3)


def _cauchy(t: Tensor) -> Tensor:
    return t.add_(1).reciprocal_()


def _cauchy_slope(t: Tensor) -> Tensor:
    return t.add_(1).square_().reciprocal_().mul_(2)


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": _gaussian,
    "matern12": _matern12,
    "matern32": _matern32,
    "matern52": _matern52,
    "cauchy": _cauchy,
}
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": _gaussian,
    "matern12": _matern12_slope,
    "matern32": _matern32_slope,
    "matern52": _matern52_slope,
    "cauchy": _cauchy_slope,
}


def _augmented(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows whose inner products are the squared distances: ``[-2 x, |x|^2, 1]`` and ``[y, 1, |y|^2]``.

    Points are centred first: the difference of large numbers would lose the small ones.
    """
    centre = y.mean(0)
    x, y = x - centre, y - centre
    one = x.new_ones(1, 1)
    rows = torch.cat([-2 * x, x.square().sum(1, keepdim=True), one.expand(len(x), 1)], 1)
    columns = torch.cat([y, one.expand(len(y), 1), y.square().sum(1, keepdim=True)], 1)
    return rows, columns


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield row and column slices and their tile of squared distances, which may be overwritten."""
    rows, columns = _augmented(x, y)
    height, width = _TILE.get(x.device.type, _TILE_ELSEWHERE)
    height, width = min(height, len(x)), min(width, len(y))
    memory = x.new_empty(height * width)
    same = x.data_ptr() == y.data_ptr() and x.shape == y.shape
    for top in range(0, len(x), height):
        a = rows[top : top + height]
        for left in range(0, len(y), width):
            b = columns[left : left + width]
            tile = memory[: len(a) * len(b)].view(len(a), len(b))
            torch.mm(a, b.T, out=tile)
            i, j = slice(top, top + len(a)), slice(left, left + len(b))
            tile.clamp_min_(0)
            if same:
                _clear_diagonal(tile, i, j)
            yield i, j, tile


@torch.no_grad()
def forward(kernel: str, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Return ``K @ v``, ``(N, C)``."""
    out = x.new_zeros(len(x), v.shape[1])
    value = _VALUES[kernel]
    for i, j, tile in _tiles(x, y):
        out[i].addmm_(value(tile), v[j])
    return out


@torch.no_grad()
def backward(
    kernel: str, gradient: Tensor, x: Tensor, y: Tensor, v: Tensor, needs_points: bool, needs_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by ``x``, ``y`` and ``v``; those that are not needed are empty."""
    dx, dy = (torch.zeros_like(x), torch.zeros_like(y)) if needs_points else (x.new_empty(0), y.new_empty(0))
    dv = forward(kernel, y, x, gradient) if needs_v else v.new_empty(0)
    if needs_points:
        slope = _SLOPES[kernel]
        for i, j, tile in _tiles(x, y):
            weight = slope(tile).mul_(gradient[i] @ v[j].T)  # -2 k' of each pair, times how much the pair counts
            dx[i].add_(weight @ y[j]).sub_(weight.sum(1, keepdim=True) * x[i])
            dy[j].add_(weight.T @ x[i]).sub_(weight.sum(0).unsqueeze(1) * y[j])
    return dx, dy, dv


def _clear_diagonal(tile: Tensor, i: slice, j: slice) -> None:
    """Set the distance of each point to itself to exactly 0."""
    first, last = max(i.start, j.start), min(i.stop, j.stop)
    if first < last:
        tile[first - i.start : last - i.start, first - j.start : last - j.start].diagonal().zero_()
