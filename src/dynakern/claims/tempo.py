"""TEMPO: splitting a series into parts that look like its STL components helps to forecast it.

Claims of Cao et al., 2024, arXiv:2310.04948. The zero-shot tables need pre-trained GPT-2 weights and six data sets, and
are not measured here. Measured, with a small network trained from scratch on ETTh1: (1) the decomposition with its loss
beats the same network without a decomposition; (2) predictions are equivariant; (3) the parts sum to the window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dynakern.claims.run import Measurement, Progress
from dynakern.data import sample
from dynakern.data.series import read_series_csv
from dynakern.ops import stl
from dynakern.sequence.tempo import TEMPO, SeriesParts, tempo_small
from dynakern.tasks.forecast import ForecastTask

__all__ = ["CLAIMS"]

STEPS, BATCH, RATE, CONTEXT, HORIZON = 250, 32, 2e-3, 336, 96


class _SingleStream(TEMPO):
    """The same network with the whole window as its trend and nothing in the other parts."""

    def _split(self, x: Tensor) -> SeriesParts:
        return SeriesParts(x, torch.zeros_like(x), torch.zeros_like(x))


def _samples(task: ForecastTask, windows: Tensor, channels: Tensor, parts: SeriesParts) -> list[Tensor]:
    """Return x, y and the three target parts of (window, channel) pairs, ``(B, steps, 1)`` each."""
    values = torch.from_numpy(task.values)
    index = windows[:, None] + torch.arange(CONTEXT)
    x = values[index, channels[:, None]].unsqueeze(-1)
    y = values[windows[:, None] + CONTEXT + torch.arange(HORIZON), channels[:, None]].unsqueeze(-1)
    return [x, y, *(part[index, channels[:, None]].unsqueeze(-1) for part in parts)]


def _train(kind: str, seed: int, task: ForecastTask, parts: SeriesParts, report: Progress, done: float) -> float:
    """Train one variant and return its MSE on every 32nd test window, all channels."""
    torch.manual_seed(seed)
    network = tempo_small(seq_len=CONTEXT, pred_len=HORIZON)
    if kind == "single stream":
        torch.manual_seed(seed)
        network = _SingleStream(
            seq_len=CONTEXT, pred_len=HORIZON, d_model=32, num_layers=1, num_heads=4, lora_rank=None, dropout=0.0
        )
        for part in (network.map_trend, network.map_season):
            part.requires_grad_(False)
    weight = 0.05 if kind == "with its loss" else 0.0
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.from_numpy(task.starts("train"))
    network.train()
    for step in range(STEPS):
        pick = torch.randint(len(starts) * task.channels, (BATCH,), generator=generator)
        x, y, *targets = _samples(task, starts[pick // task.channels], pick % task.channels, parts)
        loss = network.loss(x, y, SeriesParts(*targets) if weight else None, dec_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        report(f"{kind}, seed {seed}, loss {float(loss.detach()):.3f}", done + step / STEPS / 6)
    network.eval()

    def predict(rows: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(task.inputs(rows)[0])
        with torch.no_grad():
            flat = network(x.transpose(1, 2).reshape(-1, CONTEXT, 1))
        return flat.reshape(len(x), task.channels, HORIZON).transpose(1, 2).numpy()

    return task.score(predict, task.starts("test")[::32])["mse"]


def decomposition(progress: Progress) -> Iterator[Measurement]:
    """On ETTh1, decomposing with the decomposition loss beats not decomposing, and repeating the last day."""
    task = ForecastTask(read_series_csv(sample("ETTh1.csv")), context=CONTEXT, horizon=HORIZON, protocol="ett")
    start, stop = task.rows["train"]
    columns = torch.from_numpy(task.values[start:stop]).double().T
    parts = SeriesParts(*(part.T.float() for part in stl(columns, 24)))  # of the training rows only
    naive = task.score(
        lambda rows: task.inputs(rows)[0][:, -24:][:, np.arange(HORIZON) % 24], task.starts("test")[::32]
    )
    for seed in range(2):
        errors = {}
        for index, kind in enumerate(("with its loss", "without its loss", "single stream")):
            errors[kind] = _train(kind, seed, task, parts, progress, (3 * seed + index) / 6)
        for kind in ("without its loss", "single stream"):
            yield Measurement(name=f"MSE {kind}, seed {seed}", value=errors[kind], unit="MSE", baseline=naive["mse"])
        bound = min(0.43, errors["single stream"] - 0.01)
        yield Measurement(
            name=f"MSE with its loss, seed {seed}",
            value=errors["with its loss"],
            unit="MSE",
            at_most=bound,
            baseline=errors["single stream"],
        )


def equivariance(progress: Progress) -> Iterator[Measurement]:
    """``predict(a x + b) = a predict(x) + b``."""
    torch.manual_seed(0)
    model = tempo_small(seq_len=CONTEXT, pred_len=HORIZON)
    x = torch.from_numpy(read_series_csv(sample("ETTh1.csv")).values[:CONTEXT, 6]).float()
    base, worst = model.predict(x, 200), 0.0
    assert isinstance(base, Tensor)
    for a, b in ((1.0, 100.0), (10.0, 0.0), (0.1, -5.0)):
        shifted = model.predict(a * x + b, 200)
        assert isinstance(shifted, Tensor)
        worst = max(worst, float((shifted - (a * base + b)).norm() / (a * base).norm()))
    yield Measurement(name="largest relative error", value=worst, unit="relative", at_most=1e-4)


def parts_sum_to_the_window(progress: Progress) -> Iterator[Measurement]:
    """Trend, season and rest add up to the normalised window."""
    torch.manual_seed(0)
    model = tempo_small(seq_len=CONTEXT, pred_len=HORIZON)
    x = torch.from_numpy(read_series_csv(sample("ETTh1.csv")).values[:CONTEXT].T).float().unsqueeze(-1)
    with torch.no_grad():
        trend, season, rest = model.decompose(x)
        error = float((trend + season + rest - model.normalise(x)[0]).abs().max())
    yield Measurement(name="largest error", value=error, unit="absolute", at_most=1e-5)


CLAIMS = (decomposition, equivariance, parts_sum_to_the_window)
