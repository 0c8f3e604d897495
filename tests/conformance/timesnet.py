"""TimesNet: each task; periods of the batch, of each sample, and given ones."""

from __future__ import annotations

from functools import partial

import torch

from dynakern.sequence.timesnet import TimesNet, detector, imputer, series_classifier
from tests.conformance.example import Example

# Periods that are found in the data decide how often and in which shape the block convolves, so such a network is no
# single graph; with given periods it is.
FOUND, GIVEN = {"export": False, "batch_independent": False}, {"period": (4, 6)}
SMALL = {"n_channels": 3, "d_model": 4, "d_ff": 6, "num_kernels": 2, "top_k": 2}
UNUSED_MARKS = ("enc_embedding.temporal_embedding",)  # no time marks are given


def series(dtype: torch.dtype, length: int = 24) -> torch.Tensor:
    """Two series of different rhythm."""
    t, generator = torch.arange(length, dtype=torch.float64)[:, None], torch.Generator().manual_seed(0)
    rhythm = [torch.sin(2 * torch.pi * t / p + torch.arange(3)) for p in (12, 4)]
    noise = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    return (torch.stack(rhythm) + 0.1 * noise).to(dtype)


def with_marks(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Series and calendar features."""
    return series(dtype), torch.linspace(-0.5, 0.5, 2 * 24 * 4).reshape(2, 24, 4).to(dtype)


def with_mask(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Series and which entries are observed."""
    mask = (torch.arange(2 * 24 * 3).reshape(2, 24, 3) % 5 > 0).to(dtype)
    return series(dtype) * mask, mask


def alone(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Only the series."""
    return (series(dtype),)


def with_lengths(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Series and their lengths."""
    return series(dtype), torch.tensor([20, 24])


forecast = partial(TimesNet, "forecast", seq_len=24, pred_len=12, **SMALL)
EXAMPLES = [
    Example(name="forecast", build=forecast, inputs=with_marks, **FOUND),
    Example(name="forecast-sample", build=partial(forecast, period="sample"), inputs=with_marks, export=False),
    Example(name="forecast-given", build=partial(forecast, **GIVEN), inputs=with_marks),
    Example(
        name="forecast-tables",
        build=partial(forecast, embed="learned", **GIVEN),
        inputs=lambda d: (series(d), torch.ones(2, 24, 4)),
    ),
    Example(
        name="anomaly",
        build=partial(TimesNet, "anomaly", seq_len=24, **SMALL, **GIVEN),
        inputs=alone,
        unused=UNUSED_MARKS,
    ),
    Example(name="detector", build=partial(detector, channels=3, length=24), inputs=alone, **FOUND),
    Example(name="imputer", build=partial(imputer, channels=3, length=24), inputs=with_mask, **FOUND),
    Example(
        name="classifier",
        build=partial(series_classifier, channels=3, length=24, classes=4),
        inputs=with_lengths,
        **FOUND,
    ),
]
