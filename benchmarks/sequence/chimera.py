"""Chimera's recurrence beside the double loop over cells; its fused state space beside one that holds all states."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern.ops import scan2d, ssm2d
from dynakern.ops.ssm2d.reference import ssm2d_reference
from dynakern.testing import assert_same


def cases():
    torch.manual_seed(0)
    bandwidth = _bandwidth()
    yield from _scan2d_cases(bandwidth)
    yield from _ssm2d_cases("default size", (16, 7, 96, 128, 16), bandwidth)
    yield from _ssm2d_cases("small size", (32, 7, 96, 16, 4), bandwidth)


def _scan2d_cases(bandwidth):
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
        at_least=10,
        repeats=5,
    )


def _ssm2d_cases(name, sizes, bandwidth):
    """Compare the fused operator with the same equations as tensors of all cells around the fast recurrence."""
    B, V, T, D, N = sizes
    tensors = [torch.randn(B, V, T, D), torch.rand(B, V, T, 2, D) * 0.1 + 1e-3, -torch.rand(4, D, N) * N - 0.1]
    tensors += [torch.randn(B, V, T, 2, N), torch.randn(B, V, T, 2, N), torch.randn(D)]
    leaves = [x.clone().requires_grad_() for x in tensors]

    def fused(arguments):
        return ssm2d(*arguments)

    def unfused(arguments):
        return ssm2d_reference(*arguments, "half", "zoh", "cpu")[0]

    def both(function):
        return lambda: torch.autograd.grad(function(leaves).sum(), leaves)

    cells, weights = B * V * T, 4 * D * N + D
    read, written = cells * (3 * D + 4 * N) + weights, cells * D
    note = "inputs read and outputs written, in the backward pass again with their gradients; exponentials take longer"
    yield Case(
        name=f"state space, {name} {sizes}, forward",
        ours=lambda: fused(tensors),
        peers={"unfused": lambda: unfused(tensors)},
        check=lambda: assert_same(fused(tensors), unfused(tensors)),
        floor_seconds=4 * (read + written) / bandwidth,
        floor_note=note,
        repeats=5,
        memory=True,
    )
    yield Case(
        name=f"state space, {name} {sizes}, forward and backward",
        ours=both(fused),
        peers={"unfused": both(unfused)},
        check=lambda: assert_same(both(fused)(), both(unfused)(), rtol=1e-4),
        floor_seconds=4 * (3 * read + 2 * written) / bandwidth,
        floor_note=note,
        repeats=5,
        memory=True,
    )


def _bandwidth() -> float:
    """Return the bytes a second that a copy of 64 MB reads and writes."""
    from dynakern.measure import time_interleaved

    x = torch.zeros(16_000_000)
    y = torch.empty_like(x)
    return 2 * 4 * len(x) / time_interleaved({"copy": lambda: y.copy_(x)}, repeats=7)["copy"].median


if __name__ == "__main__":
    main("chimera", "Chimera: the two-dimensional recurrence and its state space", cases)
