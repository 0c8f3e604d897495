"""The blocked convolution beside the FFT library on everything at once, and SciPy's convolutions."""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import scipy.signal
import torch
from harness import Case, main

from dynakern.measure import time_interleaved
from dynakern.ops import fft_conv, three_pass_conv
from dynakern.testing import assert_same


def library_conv(u, k):
    n = 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n), n=n)[..., : u.shape[-1]]


def _copy_rate() -> float:
    """Return the bytes a second, read and written, of copying 256 MB."""
    source = torch.zeros(64 * 2**20)
    target = torch.empty_like(source)
    return 8 * source.numel() / time_interleaved({"copy": lambda: target.copy_(source)}, repeats=5)["copy"].median


def _gradients(function, u, k, g):
    return lambda: torch.autograd.grad(function(u, k), (u, k), g)


def _cases_of(B, H, L, rate, *, aim=None, repeats=11):
    torch.manual_seed(0)
    u, k, g = torch.randn(B, H, L), torch.randn(H, L) / math.sqrt(L), torch.randn(B, H, L)
    u_np, k_np = u.numpy(), k.numpy()[None]
    scipy_peers = {
        "scipy.signal.fftconvolve": lambda: scipy.signal.fftconvolve(u_np, k_np, axes=-1)[..., :L],
        "scipy.signal.oaconvolve": lambda: scipy.signal.oaconvolve(u_np, k_np, axes=-1)[..., :L],
    }

    def check():
        expected = library_conv(u.double(), k.double())
        assert_same(fft_conv(u, k), expected, rtol=1e-6)
        assert_same(library_conv(u, k), expected, rtol=1e-6)
        for peer in scipy_peers.values():
            assert_same(torch.from_numpy(peer()), expected, rtol=1e-5)

    note = "u, k and y (and their gradients) moved once at the measured rate of a copy"
    moved = 4 * (2 * u.numel() + k.numel())
    yield Case(
        name=f"forward ({B}, {H}, {L})",
        ours=lambda: fft_conv(u, k),
        peers={"torch.fft": lambda: library_conv(u, k), **scipy_peers},
        check=check,
        floor_seconds=moved / rate,
        floor_note=note,
        at_least=aim,
        repeats=repeats,
        memory=True,
    )
    leaves = u.clone().requires_grad_(), k.clone().requires_grad_()

    def check_gradients():
        ours, library = _gradients(fft_conv, *leaves, g)(), _gradients(library_conv, *leaves, g)()
        assert_same(ours, library, rtol=1e-5)

    yield Case(
        name=f"forward and backward ({B}, {H}, {L})",
        ours=_gradients(fft_conv, *leaves, g),
        peers={"torch.fft": _gradients(library_conv, *leaves, g)},
        check=check_gradients,
        floor_seconds=2 * moved / rate,
        floor_note=note,
        repeats=max(5, repeats // 2),
        memory=True,
    )


def _three_pass_case(length):
    torch.manual_seed(0)
    u, k = torch.randn(1, 4, length), torch.randn(4, length) / math.sqrt(length)

    def check():
        assert_same(three_pass_conv(u, k), library_conv(u, k), rtol=1e-5)

    yield Case(
        name=f"three passes, blocks of 65536, (1, 4, {length})",
        ours=lambda: three_pass_conv(u, k),
        peers={"torch.fft": lambda: library_conv(u, k)},
        check=check,
        repeats=3,
        memory=True,
    )


def cases():
    rate = _copy_rate()
    for shape in ((8, 128, 1024), (8, 128, 4096), (4, 64, 16384)):
        yield from _cases_of(*shape, rate, aim=1.8)
    for shape in ((32, 128, 128), (8, 128, 1000), (2, 64, 131072)):
        yield from _cases_of(*shape, rate, repeats=7)
    yield from _three_pass_case(2**22)


if __name__ == "__main__":
    main("fft_conv", "Long convolution", cases)
