"""Chimera: a state that also runs across variates carries what single series cannot.

Claims behind Behrouz et al., 2024, arXiv:2406.04320, at a size for a laptop: (1) information flows between variates;
(2) the row scan is exact and fast; (3) the closed-loop companion head expresses autoregressive processes. The tables of
the paper are not measured here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from dynakern.claims.run import Measurement, Progress
from dynakern.measure import time_interleaved
from dynakern.ops import scan2d
from dynakern.sequence.chimera import SSM2D, ClosedLoop

__all__ = ["CLAIMS"]


def _chain(batch: int, generator: torch.Generator, variates: int = 5, steps: int = 33) -> Tensor:
    """Return series in which each variate follows the one before it by a step: ``(B, V, T)``."""
    noise = torch.randn(batch, variates, steps + variates, generator=generator)
    x = noise.clone()
    for v in range(1, variates):
        x[:, v, 1:] = 0.9 * x[:, v - 1, :-1] + 0.44 * noise[:, v, 1:]
    return x[..., variates:]


class _TwoLayers(nn.Module):
    def __init__(self, coupling: Literal["half", "none"]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 1)
        self.layers = nn.ModuleList(SSM2D(8, 4, coupling=coupling, dt_range=(1e-2, 0.5)) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unsqueeze(-1))
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + layer(norm(h))
        return self.head(h).squeeze(-1)


def _next_step_error(coupling: Literal["half", "none"], seed: int, progress: Progress, done: float) -> float:
    torch.manual_seed(seed)
    network, generator = _TwoLayers(coupling), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for step in range(200):
        x = _chain(16, generator)
        loss = (network(x[..., :-1])[:, 1:] - x[:, 1:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(f"{coupling}, seed {seed}, loss {float(loss.detach()):.3f}", done + step / 800)
    with torch.no_grad():
        x = _chain(256, torch.Generator().manual_seed(999))
        return float((network(x[..., :-1])[:, 1:] - x[:, 1:, 1:]).square().mean())


def cross_variate_flow(progress: Progress) -> Iterator[Measurement]:
    """Predicting a chain of variates, coupled states beat the same net without coupling."""
    test = _chain(256, torch.Generator().manual_seed(999))
    variance = float(test[:, 1:, 1:].var())
    for seed in range(2):
        coupled = _next_step_error("half", seed, progress, seed / 2)
        alone = _next_step_error("none", seed, progress, seed / 2 + 0.25)
        yield Measurement(
            name=f"MSE coupled, seed {seed}", value=coupled, unit="MSE", at_most=0.6 * alone, baseline=alone
        )
        yield Measurement(
            name=f"MSE uncoupled, seed {seed}", value=alone, unit="MSE", at_least=0.9 * variance, baseline=variance
        )


def row_scan(progress: Progress) -> Iterator[Measurement]:
    """The fast scan equals the double loop over cells and is many times faster."""
    generator = torch.Generator().manual_seed(0)
    coefficients = [torch.rand(7, 1024, 256, generator=generator) * 0.5 for _ in range(4)]
    coefficients += [torch.randn(7, 1024, 256, generator=generator) for _ in range(2)]
    fast, slow = scan2d(*coefficients), scan2d(*coefficients, backend="reference")
    error = max(float((a - b).abs().max()) for a, b in zip(fast, slow, strict=True))
    yield Measurement(name="largest difference", value=error, unit="absolute", at_most=1e-6)
    times = time_interleaved(
        {"fast": lambda: scan2d(*coefficients), "loop": lambda: scan2d(*coefficients, backend="reference")}, repeats=5
    )
    ratio = times["loop"].median / times["fast"].median
    yield Measurement(name="double loop / row scan at (7, 1024, 256)", value=ratio, unit="x", at_least=5)


def autoregression(progress: Progress) -> Iterator[Measurement]:
    """The closed loop reproduces an AR(3) recursion for 100 steps."""
    phi = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
    loop = ClosedLoop(1, 3, normalise=False).double()
    with torch.no_grad():
        for name, value in (("a", torch.zeros(3)), ("b", torch.eye(3)[0]), ("c", phi), ("k", phi)):
            loop.get_parameter(name).copy_(value)
        u = torch.randn(1, 20, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y, _ = loop(u, 100)
    values = u[0, :, 0].tolist()
    for _ in itertools.repeat(None, 100):
        values.append(sum(p * v for p, v in zip(phi.tolist(), values[-1:-4:-1], strict=True)))
    error = float((y[0, :, 0] - torch.tensor(values[20:], dtype=torch.float64)).abs().max())
    yield Measurement(name="largest error over 100 steps", value=error, unit="absolute", at_most=1e-12)


CLAIMS = (cross_variate_flow, row_scan, autoregression)
