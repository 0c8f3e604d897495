"""The selective scan beside the loop as published, our own step-by-step reference, and the parallel scan of mambapy."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from harness import Case, main

from dynakern.ops import selective_scan
from dynakern.testing import assert_same

try:
    from mambapy.pscan import pscan
except ImportError:  # the extra `bench` is not installed
    pscan = None


def operands(b, D, N, L, G, requires_grad):
    """Return u, delta, A, B, C, the skip and the bias of the steps, as a Mamba block or SS2D at its start has them."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = (
        randn(b, D, L),
        0.5 * randn(b, D, L),
        -torch.arange(1.0, N + 1).repeat(D, 1),
        randn(b, G, N, L),
        randn(b, G, N, L),
        torch.ones(D),
        randn(D) - 4,
    )
    return [x.requires_grad_(requires_grad) for x in tensors]


def scan(engine):
    def run(u, delta, A, B, C, skip, bias):
        return selective_scan(u, delta, A, B, C, skip, delta_bias=bias, delta_softplus=True, backend=engine)

    return run


def expanded(u, delta, A, B, C):
    """Return the decays and inputs of all states and steps, ``(b, D, L, N)``."""
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1).transpose(2, 3) for x in (B, C))  # (b, D, L, N)
    return torch.exp(delta[..., None] * A[:, None]), (delta * u)[..., None] * B, C


def published_loop(u, delta, A, B, C, skip, bias):
    """The loop of the published reference: expand everything, then step through it."""
    a, x, C = expanded(u, F.softplus(delta + bias[:, None]), A, B, C)
    h, ys = torch.zeros_like(a[:, :, 0]), []
    for t in range(u.shape[2]):
        h = a[:, :, t] * h + x[:, :, t]
        ys.append((h * C[:, :, t]).sum(-1))
    return torch.stack(ys, -1) + skip[:, None] * u


def parallel_scan(u, delta, A, B, C, skip, bias):
    a, x, C = expanded(u, F.softplus(delta + bias[:, None]), A, B, C)
    h = pscan(a.transpose(1, 2).contiguous(), x.transpose(1, 2).contiguous()).transpose(1, 2)
    return (h * C).sum(-1) + skip[:, None] * u


def rates():
    """Return the FLOPs of a large matrix product and the bytes of a large copy that this machine does in a second."""
    a, b, c = torch.rand(1024, 1024), torch.rand(1024, 1024), torch.rand(64_000_000 // 4)
    best = [float("inf"), float("inf")]
    for _ in range(5):
        for k, work in enumerate((lambda: a @ b, lambda: c.clone())):
            start = time.perf_counter()
            work()
            best[k] = min(best[k], time.perf_counter() - start)
    return 2 * 1024**3 / best[0], 2 * c.numel() * 4 / best[1]


def floor(b, D, N, L, G):
    flops, bandwidth = rates()
    return max(9 * b * D * L * N / flops, 4 * (3 * b * D * L + 2 * b * G * N * L) / bandwidth)


NOTE = (
    "9 operations for a channel, state and step at the rate of a large matrix product, or 3 b D L + 2 b G N L numbers "
    "at the rate of a large copy, whichever takes longer"
)


def forward_case(shape, peers, at_least=None):
    x = operands(*shape, requires_grad=False)

    def check():
        for peer in peers.values():
            assert_same(scan("cpu")(*x), peer(*x), rtol=1e-5)

    def bind(function):
        def run():
            with torch.no_grad():
                return function(*x)

        return run

    return Case(
        name=f"forward, (b, D, N, L, G) = {shape}",
        ours=bind(scan("cpu")),
        peers={label: bind(peer) for label, peer in peers.items()},
        check=check,
        floor_seconds=floor(*shape),
        floor_note=NOTE,
        at_least=at_least,
    )


def backward_case(shape, peers, *, repeats=5, memory=False):
    x = operands(*shape, requires_grad=True)

    def bind(function):
        return lambda: torch.autograd.grad(function(*x).sum(), x)

    def check():
        for peer in peers.values():
            assert_same(bind(scan("cpu"))(), bind(peer)(), rtol=1e-4)

    return Case(
        name=f"forward and backward, (b, D, N, L, G) = {shape}",
        ours=bind(scan("cpu")),
        peers={label: bind(peer) for label, peer in peers.items()},
        check=check,
        repeats=repeats,
        memory=memory,
    )


def cases():
    reference = {"step-by-step reference": scan("reference")}
    loop = {"loop as published": published_loop}
    parallel = {} if pscan is None else {"mambapy pscan": parallel_scan}
    mamba, ss2d, long = (1, 192, 16, 3136, 1), (1, 256, 1, 4096, 4), (1, 256, 16, 8192, 1)
    yield forward_case(mamba, loop | reference | parallel, at_least=40)
    yield forward_case(ss2d, loop | reference | parallel)
    yield backward_case(mamba, reference | parallel)
    yield backward_case(ss2d, reference | parallel)
    yield backward_case(long, reference | parallel, repeats=2, memory=True)


if __name__ == "__main__":
    main("selective_scan", "Selective scan", cases)
