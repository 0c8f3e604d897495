"""The inception convolution beside split, convolve and join of torch and beside torch's 7x7 depthwise convolution.

Each layout of split, convolve and join is measured; the 7x7 convolution comes in its better one, in which ours is then
compared with it, too, in its own better layout.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from harness import Case, main

from dynakern.measure import time_interleaved
from dynakern.ops import inception_conv
from dynakern.testing import assert_same

SHAPES = ((2, 96, 56, 56, 12, 11), (2, 384, 14, 14, 48, 11), (2, 40, 32, 32, 10, 9))  # N, C, H, W, g, b
LAYOUTS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
PASSES = ("forward", "forward and backward")


def _better(functions):
    """Return the label of the fastest."""
    times = time_interleaved(functions, repeats=7)
    return min(times, key=lambda label: times[label].median)


def _passes(function, leaves, cotangent):
    """Return the two things that are timed: the output, and the output with all gradients."""

    def forward():
        with torch.no_grad():
            return [function(*leaves)]

    def both():
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, cotangent)]

    return dict(zip(PASSES, (forward, both), strict=True))


def _competitors(N, C, H, W, g, b, memory):
    """Return ours, split-convolve-join and the 7x7 convolution on one input, for each pass."""
    torch.manual_seed(0)
    x = torch.randn(N, C, H, W).contiguous(memory_format=memory)
    sizes = ((3, 3), (1, b), (b, 1))
    stencils = [t for kh, kw in sizes for t in (torch.randn(g, 1, kh, kw), torch.randn(g))]
    leaves = [t.requires_grad_() for t in (x, *stencils)]
    large = [x, torch.randn(C, 1, 7, 7, requires_grad=True), torch.randn(C, requires_grad=True)]
    cotangent = torch.randn_like(x)
    return (
        _passes(inception_conv, leaves, cotangent),
        _passes(functools.partial(inception_conv, backend="reference"), leaves, cotangent),
        _passes(lambda x, w, b: F.conv2d(x, w, b, padding=3, groups=C), large, cotangent),
    )


def cases():
    for shape in SHAPES:
        found = {layout: _competitors(*shape, memory) for layout, memory in LAYOUTS.items()}
        N, C, H, W, _, b = shape
        for what in PASSES:
            for layout, (ours, joined, _) in found.items():
                yield Case(
                    name=f"{what}, {(N, C, H, W)}, b = {b}, {layout}",
                    ours=ours[what],
                    peers={"split, convolve, join": joined[what]},
                    check=lambda ours=ours[what], joined=joined[what]: assert_same(ours(), joined()),
                    at_least=1.0,
                    repeats=15,
                )
            mine = _better({layout: each[0][what] for layout, each in found.items()})
            theirs = _better({layout: each[2][what] for layout, each in found.items()})
            ours, joined, _ = found[mine]
            yield Case(
                name=f"{what}, {(N, C, H, W)}, b = {b}, better layout ({mine})",
                ours=ours[what],
                peers={f"7x7 depthwise of torch, {theirs}": found[theirs][2][what]},
                check=lambda ours=ours[what], joined=joined[what]: assert_same(ours(), joined()),
                at_least=2.0 if what != "forward" and H == 56 else None,
                repeats=9,
            )


if __name__ == "__main__":
    main("inception_conv", "The inception convolution, split-convolve-join and a 7x7 depthwise convolution", cases)
