"""Depthwise convolutions with large kernels beside PyTorch's own, in both memory formats: forward and each gradient."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main
from torch.nn import functional as F

from dynakern.measure import time_interleaved
from dynakern.ops import depthwise_conv2d
from dynakern.testing import assert_same

SHAPES = ((1, 64, 28, 28), (8, 64, 28, 28), (2, 96, 56, 56), (1, 256, 14, 14))
KERNELS = (7, 13, 17, 31)
FORMATS = {"planes": torch.contiguous_format, "channels last": torch.channels_last}


def _multiplication_rate() -> float:
    """Return the multiply-adds a second of a 1024^3 matrix product on this machine."""
    a = torch.randn(1024, 1024)
    return 1024**3 / time_interleaved({"mm": lambda: a @ a}, repeats=9)["mm"].median


def _cases(shape: tuple[int, ...], size: int, form: str, rate: float):
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=FORMATS[form])
    weight, dy = torch.randn(shape[1], 1, size, size) / size, torch.randn_like(x)
    x_leaf, weight_leaf = x.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()

    def ours(x, weight):
        return depthwise_conv2d(x, weight, backend="cpu")

    def torchs(x, weight):
        return F.conv2d(x, weight, padding=size // 2, groups=shape[1])

    def gradient(build, x, weight):
        leaf = x if x.requires_grad else weight
        y = build(x, weight)
        return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

    def both(build):
        return lambda: torch.autograd.grad(build(x_leaf, weight_leaf), (x_leaf, weight_leaf), dy)

    pairs = {
        "forward": (lambda: ours(x, weight), lambda: torchs(x, weight)),
        "gradient of the input": (gradient(ours, x_leaf, weight), gradient(torchs, x_leaf, weight)),
        "gradient of the weight": (gradient(ours, x, weight_leaf), gradient(torchs, x, weight_leaf)),
        "forward and both gradients": (both(ours), both(torchs)),
    }
    macs = x.numel() * size * size
    for name, (mine, theirs) in pairs.items():
        times = 3 if "and" in name else 1
        yield Case(
            name=f"{size} x {size}, {shape}, {form}, {name}",
            ours=mine,
            peers={"conv2d of torch": theirs},
            check=lambda mine=mine, theirs=theirs: assert_same(mine(), theirs(), rtol=2e-5),
            floor_seconds=times * macs / rate,
            floor_note="all taps, those on the border included, at the measured rate of a large matrix product",
            at_least=1.5,
            repeats=3 if macs > 1e8 else 15,
        )


def cases():
    rate = _multiplication_rate()
    for size in KERNELS:
        for shape in SHAPES:
            for form in FORMATS:
                yield from _cases(shape, size, form, rate)


if __name__ == "__main__":
    main("depthwise_conv2d", "Depthwise convolution with large kernels", cases)
