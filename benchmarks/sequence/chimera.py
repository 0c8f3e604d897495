"""Chimera's recurrence beside the double loop over cells."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern.ops import scan2d
from dynakern.testing import assert_same


def cases():
    torch.manual_seed(0)
    shape = (7, 1024, 256)
    coefficients = [torch.rand(shape) * 0.5 for _ in range(4)] + [torch.randn(shape) for _ in range(2)]
    copies = {backend: [c.clone().requires_grad_() for c in coefficients] for backend in ("auto", "reference")}

    def forward(backend):
        return lambda: scan2d(*coefficients, backend=backend)

    def both(backend):
        def run():
            h1, h2 = scan2d(*copies[backend], backend=backend)
            return torch.autograd.grad(h1.sum() + h2.sum(), copies[backend])

        return run

    bytes_moved = 8 * 4 * shape[0] * shape[1] * shape[2]
    bandwidth = _bandwidth()
    note = "six arrays read and two written, or eleven and eight, at the measured bandwidth of a large copy"
    yield Case(
        name=f"forward {shape}",
        ours=forward("auto"),
        peers={"double loop": forward("reference")},
        check=lambda: assert_same(forward("auto")(), forward("reference")()),
        floor_seconds=bytes_moved / bandwidth,
        floor_note=note,
        at_least=10,
        repeats=5,
    )
    yield Case(
        name=f"forward and backward {shape}",
        ours=both("auto"),
        peers={"double loop": both("reference")},
        check=lambda: assert_same(both("auto")(), both("reference")(), rtol=1e-4),
        floor_seconds=19 / 8 * bytes_moved / bandwidth,
        floor_note=note,
        repeats=5,
    )


def _bandwidth() -> float:
    """Return the bytes a second that a copy of 64 MB reads and writes."""
    from dynakern.measure import time_interleaved

    x = torch.zeros(16_000_000)
    y = torch.empty_like(x)
    return 2 * 4 * len(x) / time_interleaved({"copy": lambda: y.copy_(x)}, repeats=7)["copy"].median


if __name__ == "__main__":
    main("chimera", "Chimera: the two-dimensional recurrence", cases)
