"""Selective scan: a state space that chooses by the input copies what matters, and its scan is fast and lean.

Claims of Gu & Dao, 2023, arXiv:2312.00752: (1) table 1, selection solves selective copying, which a system constant in
time (S4) does not; (2) section 4.5 and figure 8, the fused scan is up to 40 times faster than a scan written in
PyTorch; (3) section 3.3.2, it never holds the expanded states ``(b, D, L, N)``. The bounds are ours, for a laptop: a
small copying task, and the CPU engine against the step-by-step reference. How well a system constant in time copies
depends on its parameterisation; the second part reports the best that we found, beside the plain one of the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynakern.claims.run import Measurement, Progress
from dynakern.layers import MambaStack
from dynakern.measure import peak_memory, time_interleaved
from dynakern.ops import Backend, selective_scan

__all__ = ["CLAIMS"]

_TOKENS, _CONTEXT, _COPIED, _STEPS = 6, 32, 4, 800
_NOISE, _QUERY = _TOKENS, _TOKENS + 1


def _copying(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sequences of noise with 4 data tokens at random places, then 4 queries; and the data tokens in order."""
    targets = torch.randint(_TOKENS, (count, _COPIED), generator=generator)
    places = torch.rand(count, _CONTEXT, generator=generator).argsort(1)[:, :_COPIED].sort(1).values
    x = torch.full((count, _CONTEXT + _COPIED), _NOISE)
    x[:, _CONTEXT:] = _QUERY
    return x.scatter(1, places, targets), targets


class _ConstantMaps(nn.Module):
    """Constant B and C, started as S4D's (ones and standard normal), and no input to the step but its bias."""

    def __init__(self, x_proj: nn.Linear, dt_rank: int) -> None:
        super().__init__()
        states = (x_proj.out_features - dt_rank) // 2
        self.dt_rank = dt_rank
        self.maps = nn.Parameter(torch.cat([torch.ones(states), torch.randn(states)]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(self.maps, (self.dt_rank, 0)).expand(*x.shape[:-1], -1)


class _ConstantInput(nn.Module):
    """The selective maps, of a learned constant vector instead of the input."""

    def __init__(self, x_proj: nn.Linear, dt_rank: int) -> None:
        super().__init__()
        self.x_proj = x_proj
        self.vector = nn.Parameter(torch.ones(x_proj.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.x_proj(self.vector).expand(*x.shape[:-1], -1)


def _accuracy(constant: type[nn.Module] | None, seed: int, progress: Progress, done: float, share: float) -> float:
    """Train two Mamba blocks to copy, selective or with ``constant`` steps and maps; score fresh sequences."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    body = MambaStack(32, 2, d_state=16)
    if constant is not None:
        mixers: list[Any] = [layer.mixer for layer in body.layers]
        for mixer in mixers:
            mixer.x_proj = constant(mixer.x_proj, mixer.dt_rank)
    model = nn.Sequential(nn.Embedding(_TOKENS + 2, 32), body, nn.Linear(32, _TOKENS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=_STEPS)
    for step in range(_STEPS):
        x, targets = _copying(32, generator)
        loss = nn.functional.cross_entropy(model(x)[:, -_COPIED:].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            name = "selective" if constant is None else "constant in time"
            progress(f"{name}, seed {seed}, loss {loss.item():.2f}", done + share * step / _STEPS)
    x, targets = _copying(1000, generator)
    with torch.no_grad():
        return float((model(x)[:, -_COPIED:].argmax(-1) == targets).double().mean())


def selectivity(progress: Progress) -> Iterator[Measurement]:
    """Two blocks of width 32 learn selective copying if steps and maps depend on the input; constant ones do worse."""
    found: dict[str, float] = {}
    for index, (name, constant) in enumerate((("constant", _ConstantMaps), ("selective", None))):
        scores = [_accuracy(constant, seed, progress, 0.5 * index + 0.25 * seed, 0.25) for seed in (0, 1)]
        found[name] = sum(scores) / 2
    yield Measurement(
        name="tokens copied with selection, mean of 2 seeds",
        value=found["selective"],
        unit="accuracy",
        at_least=0.90,
        baseline=found["constant"],
    )
    yield Measurement(
        name="tokens copied with constant maps, mean of 2 seeds", value=found["constant"], unit="accuracy", at_most=0.80
    )


def stronger_baseline(progress: Progress) -> Iterator[Measurement]:
    """Constant steps and maps that are parameterised as the selective ones do better, short of selection."""
    scores = [_accuracy(_ConstantInput, seed, progress, 0.5 * seed, 0.5) for seed in (0, 1)]
    yield Measurement(
        name="tokens copied with maps of a constant input, mean of 2 seeds", value=sum(scores) / 2, unit="accuracy"
    )


def _operands(channels: int, states: int, length: int) -> dict[str, Any]:
    """Return operands of one sequence as a Mamba block at its start would give them."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "u": randn(1, channels, length),
        "delta": 0.5 * randn(1, channels, length),
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": randn(1, states, length),
        "C": randn(1, states, length),
        "D": torch.ones(channels),
        "delta_bias": randn(channels) - 4,
    }


def speed(progress: Progress) -> Iterator[Measurement]:
    """The fused CPU scan is at least 10 times faster than the step-by-step reference and agrees with it."""
    x = _operands(192, 16, 3136)
    progress("forward of (1, 192, 16, 3136)", 0.1)
    engines: tuple[Backend, ...] = ("cpu", "reference")
    runs = {e: partial(selective_scan, **x, delta_softplus=True, backend=e) for e in engines}
    error = float((runs["cpu"]() - runs["reference"]()).abs().max())
    with torch.no_grad():
        times = time_interleaved(runs, repeats=7)
    ratio = times["reference"].median / times["cpu"].median
    yield Measurement(name="reference / fused, forward", value=ratio, unit="x", at_least=10)
    yield Measurement(name="largest difference from the reference", value=error, unit="", at_most=1e-4)
    progress("forward and backward", 0.5)
    leaves = {k: v.clone().requires_grad_() for k, v in x.items()}
    both = {e: partial(_backward, leaves, e) for e in engines}
    times = time_interleaved(both, repeats=5)
    ratio = times["reference"].median / times["cpu"].median
    yield Measurement(name="reference / fused, forward and backward", value=ratio, unit="x")


def _backward(leaves: dict[str, Any], backend: Backend) -> None:
    y = selective_scan(**leaves, delta_softplus=True, backend=backend)
    torch.autograd.grad(y.sum(), list(leaves.values()))


def memory(progress: Progress) -> Iterator[Measurement]:
    """Forward and backward of (1, 256, 16, 8192) need far less than the expanded states, 134 MB in single precision."""
    leaves = {k: v.requires_grad_() for k, v in _operands(256, 16, 8192).items()}
    progress("compilation", 0.1)
    _backward(leaves, "cpu")
    progress("measurement", 0.7)
    peak = peak_memory(lambda: _backward(leaves, "cpu"))
    expanded = 4 * 256 * 16 * 8192 / 1e6
    yield Measurement(name="peak beyond the operands", value=peak, unit="MB", at_most=60, baseline=expanded)


CLAIMS = (selectivity, stronger_baseline, speed, memory)
