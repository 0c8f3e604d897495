r"""STL: split a series into trend, season and rest by local regressions (loess)."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from dynakern.checks import check_floating, check_positive
from dynakern.ops.dispatch import Backend, resolve_backend

__all__ = ["STLParts", "STLSettings", "stl"]


class STLParts(NamedTuple):
    """Trend, season and rest of a series, each ``(..., L)``; they sum to the series."""

    trend: Tensor
    season: Tensor
    residual: Tensor


class STLSettings(NamedTuple):
    """Spans and iterations of a decomposition: odd spans of the three regressions, inner and outer iterations."""

    period: int
    seasonal: int
    trend: int
    low_pass: int
    inner: int
    outer: int


def stl(
    y: Tensor,
    period: int,
    *,
    seasonal: int = 7,
    trend: int | None = None,
    low_pass: int | None = None,
    robust: bool = False,
    inner: int | None = None,
    outer: int | None = None,
    backend: Backend = "auto",
) -> STLParts:
    r"""Decompose series into trend, season and rest.

    Each inner iteration smooths the cycle subseries (same phase of every period) of the detrended series by loess,
    removes from them what a low-pass filter keeps, and smooths the deseasonalised series into the trend. Each outer
    iteration downweights points with a large rest, :math:`(1 - (r / 6\,\mathrm{median}|r|)^2)^2`. All regressions are
    of degree 1 with tricube weights, at every point. O(L) regressions of the spans' sizes an iteration.

    Args:
        y: Series, ``(..., L)``, floating point, at least two periods long.
        period: Steps of a period, at least 2.
        seasonal: Span of the regression over periods, odd, at least 3.
        trend: Span of the trend's regression, odd, greater than the period; by default the smallest odd number of at
            least ``1.5 period / (1 - 1.5 / seasonal)``.
        low_pass: Span of the low-pass regression, odd, greater than the period; the smallest such number by default.
        robust: Downweight outliers: 2 inner and 15 outer iterations, instead of 5 and 0.
        inner: Inner iterations.
        outer: Outer iterations.
        backend: ``"auto"``, ``"reference"`` or ``"cpu"``. Neither gives a gradient.

    Returns:
        :class:`STLParts`, dtype of ``y``; computed in float64.

    Raises:
        TypeError: ``y`` is not floating point.
        ValueError: A span is even or too small, or the series is shorter than two periods.

    Example:
        >>> import torch
        >>> t = torch.arange(96, dtype=torch.float64)
        >>> parts = stl(0.1 * t + torch.sin(2 * torch.pi * t / 24), period=24)
        >>> bool(parts.residual.abs().max() < 0.05)
        True

    Source: Cleveland, Cleveland, McRae and Terpenning, 1990, "STL: A Seasonal-Trend Decomposition Procedure Based on
    Loess", Journal of Official Statistics 6.
    """
    check_floating("y", y)
    check_positive("period", period, integer=True)
    if period < 2:
        raise ValueError(f"`period` must be at least 2, got {period}.")
    if y.ndim == 0 or y.shape[-1] < 2 * period:
        raise ValueError(f"`y` must hold at least two periods of {period} steps, got shape {tuple(y.shape)}.")
    trend = _odd(1.5 * period / (1 - 1.5 / seasonal)) if trend is None and seasonal >= 2 else trend
    low_pass = _odd(period + 1) if low_pass is None else low_pass
    for name, span, least in (
        ("seasonal", seasonal, 3),
        ("trend", trend, period + 1),
        ("low_pass", low_pass, period + 1),
    ):
        if span is None or span % 2 == 0 or span < least:
            raise ValueError(f"`{name}` must be odd and at least {least}, got {span}.")
    counts = (2, 15) if robust else (5, 0)
    inner, outer = counts[0] if inner is None else inner, counts[1] if outer is None else outer
    check_positive("inner", inner, integer=True)
    check_positive("outer", outer, integer=True, zero=True)
    assert trend is not None
    settings = STLSettings(period, seasonal, trend, low_pass, inner, outer)
    if resolve_backend("stl", backend, (y,), refusals={"cpu": None}) == "cpu":
        from dynakern.ops.stl.cpu import stl_cpu as engine
    else:
        from dynakern.ops.stl.reference import stl_reference as engine
    return engine(y, settings)


def _odd(least: float) -> int:
    """Return the smallest odd integer that is at least ``least``."""
    number = math.ceil(least)
    return number + 1 - number % 2
