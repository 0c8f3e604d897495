"""S4D's kernel beside the two-line Vandermonde product of the paper, and its recurrence beside a GRU of equal width."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern.sequence import S4D
from dynakern.sequence.s4d import S4DKernel, vandermonde_naive
from dynakern.testing import assert_same

H, N = 64, 64


def _kernel_cases(length: int):
    torch.manual_seed(0)
    kernel = S4DKernel(H, N, init="lin")

    def ours():
        with torch.no_grad():
            return kernel(length)

    def minimal_kernel():
        """The kernel as the minimal layer computes it: complex float32 powers of every step."""
        dt, a, b, c = kernel.continuous()
        z = dt * a
        weights = c * b * (torch.exp(z) - 1) / a
        return vandermonde_naive(weights[0], z, length).unsqueeze(0)

    def minimal():
        with torch.no_grad():
            return minimal_kernel()

    def check():
        log_a, b, c = kernel.discretise()
        with torch.no_grad():
            exact = vandermonde_naive((c * b)[0].to(torch.complex128), log_a.to(torch.complex128), length)
            assert_same(ours()[0].double(), exact, rtol=1e-3)
            assert_same(minimal()[0].double(), exact, rtol=1e-2)

    def both(function):
        def run():
            kernel.zero_grad(set_to_none=True)
            function().square().sum().backward()

        return run

    flops = 8 * H * (N // 2) * length
    note = "8 H M L multiply-adds and additions of the products at the measured rate of a large matrix product"
    floor = flops / _matrix_rate()
    shape = f"H = N = {H}, L = {length}"
    yield Case(
        name=f"kernel, forward, {shape}",
        ours=ours,
        peers={"minimal S4D kernel": minimal},
        check=check,
        floor_seconds=floor,
        floor_note=note,
        at_least=10 if length == 16384 else None,
    )
    yield Case(
        name=f"kernel, forward and backward, {shape}",
        ours=both(lambda: kernel(length)),
        peers={"minimal S4D kernel": both(minimal_kernel)},
        check=lambda: None,
        floor_seconds=3 * floor,
        floor_note=note,
        repeats=5,
    )


def _matrix_rate() -> float:
    """Return the FLOP/s of a 1024^3 matrix product on this machine."""
    from dynakern.measure import time_interleaved

    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / time_interleaved({"mm": lambda: a @ a}, repeats=9)["mm"].median


def _recurrence_case():
    torch.manual_seed(0)
    layer, gru = S4D(128, 64).eval(), torch.nn.GRU(128, 128, batch_first=True).eval()
    recurrence = layer.recurrent()
    x, state, hidden = torch.randn(8, 128), layer.initial_state(8), torch.zeros(1, 8, 128)

    def ours():
        with torch.no_grad():
            s = state
            for _ in range(64):
                _, s = recurrence.step(x, s)

    def peer():
        with torch.no_grad():
            h = hidden
            for _ in range(64):
                _, h = gru(x.unsqueeze(1), h)

    def check():
        assert recurrence.step(x, state)[0].shape == (8, 128)

    yield Case(name="64 recurrent steps, B = 8, H = 128", ours=ours, peers={"torch.nn.GRU": peer}, check=check)


def cases():
    for length in (1024, 16384):
        yield from _kernel_cases(length)
    yield from _recurrence_case()


if __name__ == "__main__":
    main("s4d", "S4D: kernel generation and recurrence", cases)
