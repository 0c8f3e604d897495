"""TimesNet: one merged and cropped convolution against six parallel ones as the paper writes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from harness import Case, main
from torch import Tensor, nn

from dynakern.measure import time_interleaved
from dynakern.sequence.timesnet import InceptionConv2d, TimesBlock, dominant_periods
from dynakern.testing import assert_same

B, NARROW, WIDE, KERNELS = 32, 16, 32, 6


class PaperInception(nn.Module):
    """Mean of K convolutions, each computed: the equation as printed."""

    def __init__(self, in_channels: int, out_channels: int, num_kernels: int) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, 2 * j + 1, padding=j) for j in range(num_kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_channels, H, W)``."""
        return torch.stack([kernel(x) for kernel in self.kernels], dim=-1).mean(-1)


class PaperBlock(nn.Module):
    """TimesBlock as printed: each of the k periods is folded in (B, C, H, W) memory and convolved."""

    def __init__(self, d_model: int, d_ff: int, top_k: int, num_kernels: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.conv = nn.Sequential(
            PaperInception(d_model, d_ff, num_kernels), nn.GELU(), PaperInception(d_ff, d_model, num_kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, L, d_model)``."""
        length = x.shape[1]
        amplitude = torch.fft.rfft(x, dim=1).abs()
        score = amplitude.mean((0, 2)).detach()
        score[0] = 0
        frequencies = score.topk(self.top_k).indices
        results = []
        for f in frequencies.tolist():
            period = length // f
            padded = F.pad(x, (0, 0, 0, -length % period))
            folded = padded.unflatten(1, (-1, period)).permute(0, 3, 1, 2).contiguous()
            results.append(self.conv(folded).permute(0, 2, 3, 1).flatten(1, 2)[:, :length])
        weights = amplitude.mean(-1)[:, frequencies].softmax(1)  # (B, k)
        return (torch.stack(results, dim=-1) * weights[:, None, None]).sum(-1) + x


def train_step(module: nn.Module, x: Tensor) -> Tensor:
    """Run forward and backward once; return the output."""
    for parameter in module.parameters():
        parameter.grad = None
    x.grad = None
    y = module(x)
    y.square().mean().backward()
    return y


def check(ours: nn.Module, peer: nn.Module, x: Tensor) -> None:
    """Compare outputs and all gradients."""
    found = train_step(ours, x), x.grad, *(p.grad for p in ours.parameters())
    expected = train_step(peer, x), x.grad, *(p.grad for p in peer.parameters())
    assert_same(found, expected, rtol=2e-5)


def peak_flops() -> float:
    """Return the FLOP/s of a large matrix product: the machine's practical peak."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / time_interleaved({"matmul": lambda: a @ a})["matmul"].median


def case(
    name: str, labels: tuple[str, str], modules: list[nn.Module], inputs: list[Tensor], positions: int, peak: float
) -> Case:
    """Build a case of our module and two labelled peers, each with its own input.

    ``positions`` counts the (place, kernel tap) pairs of all convolutions of one sample.
    """
    ours, *peers = modules
    for peer in peers:
        peer.load_state_dict(ours.state_dict())
    flops = 3 * 2 * B * NARROW * WIDE * positions  # forward, gradient of the input, gradient of the kernel
    steps = [partial(train_step, module, x) for module, x in zip(modules, inputs, strict=True)]
    return Case(
        name=f"forward + backward, {name}",
        ours=steps[0],
        peers=dict(zip(labels, steps[1:], strict=True)),
        check=lambda: [check(ours, peer, inputs[0]) for peer in peers],
        floor_seconds=flops / peak,
        floor_note="multiply-adds of the merged kernel on data, without padding, at the speed of a matrix product",
        at_least=2.5,
        repeats=5,
    )


def taps(rows: int, columns: int) -> int:
    """Count pairs of a place and a kernel tap that meet inside a picture."""
    reach = KERNELS - 1
    along = [sum(min(reach, i) + min(reach, n - 1 - i) + 1 for i in range(n)) for n in (rows, columns)]
    return along[0] * along[1]


def cases() -> Iterator[Case]:
    """Yield single convolutions at four foldings of 192 steps, then a whole block of the ETTh1 network."""
    peak = peak_flops()
    for rows, columns in ((8, 24), (2, 96), (1, 192), (24, 8)):
        torch.manual_seed(0)
        modules = [InceptionConv2d(NARROW, WIDE, KERNELS), *(PaperInception(NARROW, WIDE, KERNELS) for _ in range(2))]
        last = torch.randn(B, NARROW, rows, columns).to(memory_format=torch.channels_last).requires_grad_()
        first = last.detach().contiguous().requires_grad_()
        name = f"Inception 16 -> 32 on {rows} x {columns}, B {B}"
        labels = "six convolutions", "six convolutions, channels last"
        yield case(name, labels, modules, [last, first, last], taps(rows, columns), peak)
    hours = torch.arange(192.0)[None, :, None]
    torch.manual_seed(0)
    noise = torch.randn(B, 192, NARROW)
    inputs = {
        "all periods weigh": 0.1 * noise + sum(0.05 * torch.sin(2 * torch.pi * hours / p) for p in (96, 48, 24, 12)),
        "a weak period underflows": noise
        + sum(h * torch.sin(2 * torch.pi * hours / p) for p, h in ((24, 1.05), (12, 1.03), (8, 1.01), (6, 1.0))),
    }
    for name, x in inputs.items():
        x.requires_grad_()
        separate = TimesBlock(NARROW, WIDE, top_k=5, num_kernels=KERNELS, inception="separate")
        modules = [TimesBlock(NARROW, WIDE, num_kernels=KERNELS), PaperBlock(NARROW, WIDE, 5, KERNELS), separate]
        periods, strength = dominant_periods(x.detach(), 5)
        share = strength.softmax(1)
        counted = {p: int((share[:, periods == p].sum(1) > 1e-14).sum()) for p in periods.tolist()}
        total = 2 * sum(n * taps(-(-192 // p), p) for p, n in counted.items()) // B
        listing = ", ".join(str(p) for p in counted)
        title = f"TimesBlock 16/32, L 192, B {B}, periods {listing}, {name}"
        yield case(title, ("six convolutions", "six convolutions, our folding"), modules, [x] * 3, total, peak)


if __name__ == "__main__":
    main("timesnet", "TimesNet's convolutions", cases)
