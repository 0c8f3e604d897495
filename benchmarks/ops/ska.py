"""Small-kernel aggregation beside shifted products and beside an unfolded product."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main
from torch.nn import functional as F

from dynakern.measure import time_interleaved
from dynakern.ops import ska
from dynakern.testing import assert_same

SHAPES = ((8, 128, 14, 14), (1, 128, 28, 28))
CHANNELS = 8  # that share a kernel


def unfolded(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Gather every 3 x 3 neighbourhood, multiply and sum."""
    (N, C, H, W), kernels = x.shape, w.shape[1]
    patches = F.unfold(x, 3, padding=1).view(N, C // kernels, kernels, 9, H, W)
    return (patches * w[:, None]).sum(3).flatten(1, 2)


def _bandwidth() -> float:
    """Return the bytes a second of a copy of 2 MB."""
    a = torch.randn(2**19)
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / time_interleaved({"copy": lambda: b.copy_(a)}, repeats=99)["copy"].median


def cases():
    rate = _bandwidth()
    for shape in SHAPES:
        N, C, H, W = shape
        torch.manual_seed(0)
        x = torch.randn(shape, requires_grad=True)
        w = torch.randn(N, C // CHANNELS, 9, H, W, requires_grad=True)
        dy = torch.randn(shape)
        builds = {
            "dynakern": lambda x=x, w=w: ska(x, w, backend="cpu"),
            "shifted products": lambda x=x, w=w: ska(x, w, backend="reference"),
            "unfold": lambda x=x, w=w: unfolded(x, w),
        }

        def forward(build):
            def timed():
                with torch.no_grad():
                    return build()

            return timed

        def both(build, x=x, w=w, dy=dy):
            return lambda: torch.autograd.grad(build(), (x, w), dy)

        moved = 4 * (2 * x.numel() + w.numel())
        for name, run, passes in (("forward", forward, 1), ("forward and backward", both, 3)):
            mine, shifted, unfold = (run(build) for build in builds.values())
            yield Case(
                name=f"{shape}, {name}",
                ours=mine,
                peers={"shifted products": shifted, "unfold": unfold},
                check=lambda mine=mine, shifted=shifted: assert_same(mine(), shifted(), rtol=1e-5),
                floor_seconds=passes * moved / rate,
                floor_note="x and w read and y written once (in each of three passes), at the rate of a copy in cache",
                at_least=1.5,
                repeats=25,
            )


if __name__ == "__main__":
    main("ska", "Small-kernel aggregation", cases)
