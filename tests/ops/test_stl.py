"""STL: the engines agree, parts sum to the series, and known structure is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynakern.ops import stl
from dynakern.testing import assert_same, randn


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize(
    ("length", "period", "seasonal"), [(50, 7, 7), (75, 24, 7), (61, 12, 35), (9, 4, 3), (90, 3, 9)]
)
def test_engines_agree(length, period, seasonal, robust):
    # Robust weights jump to 0 at the edge of their range, so that roundings may part two engines after many iterations.
    y = randn(2, length, requires_grad=False).cumsum(-1)
    fast = stl(y, period, seasonal=seasonal, outer=3 * robust, backend="cpu")
    slow = stl(y, period, seasonal=seasonal, outer=3 * robust, backend="reference")
    for a, b in zip(fast, slow, strict=True):
        assert_same(a, b, rtol=1e-9)
    assert_same(fast.trend + fast.season + fast.residual, y)


def test_finds_trend_and_season_under_an_outlier():
    t = torch.arange(240, dtype=torch.float64)
    clean = 0.05 * t + 2 * torch.sin(2 * torch.pi * t / 12)
    y = clean + 0.2 * randn(240, requires_grad=False)
    y[100] += 30
    plain, robust = stl(y, 12), stl(y, 12, robust=True)
    error = [float((p.trend + p.season - clean).abs().max()) for p in (plain, robust)]
    assert error[1] < 0.6
    assert error[0] > 10 * error[1]
    assert float(robust.residual[100]) == pytest.approx(30, abs=0.6)


def test_one_series_equals_its_row_in_a_batch():
    y = randn(3, 40, requires_grad=False)
    assert_same(stl(y, 5).trend[1], stl(y[1], 5).trend)
    assert stl(y.float(), 5).trend.dtype == torch.float32


def test_seasons_of_a_pure_period_are_exact():
    y = torch.from_numpy(np.tile([3.0, -1.0, -2.0], 20))
    parts = stl(y, 3)
    np.testing.assert_allclose(parts.season, y, atol=1e-9)
    np.testing.assert_allclose(parts.trend, 0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 1}, "`period` must be at least 2"),
        ({"period": 30}, r"two periods of 30 steps, got shape \(40,\)"),
        ({"period": 5, "seasonal": 4}, "`seasonal` must be odd and at least 3, got 4"),
        ({"period": 5, "trend": 5}, "`trend` must be odd and at least 6, got 5"),
        ({"period": 5, "low_pass": 8}, "`low_pass` must be odd"),
        ({"period": 5, "inner": 0}, "`inner` must be a positive integer"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        stl(torch.zeros(40), **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        stl(torch.arange(40), 5)
