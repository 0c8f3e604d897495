r"""Scores, losses and baselines of the time-series protocols: M4 (sMAPE, MASE, OWA, Naive2) and adjusted anomalies.

Scores take and return numpy arrays; losses are differentiable torch functions. Everything is written from the published
formulas: Makridakis, Spiliotis, Assimakopoulos, 2020, "The M4 Competition: 100,000 time series and 61 forecasting
methods" (doi:10.1016/j.ijforecast.2019.04.014); Hyndman and Koehler, 2006, for MASE
(doi:10.1016/j.ijforecast.2006.03.001); Xu et al., 2018, for the adjustment of anomalies (arXiv:1802.03903).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dynakern.checks import check_finite, check_positive, unknown_name

__all__ = [
    "M4_FREQUENCIES",
    "M4Frequency",
    "M4Score",
    "m4_summary",
    "mape_loss",
    "mase",
    "mase_loss",
    "naive2",
    "owa",
    "point_adjust",
    "smape",
    "smape_loss",
]


@dataclass(frozen=True)
class M4Frequency:
    """Steps to forecast, seasonal lag, and by how many horizons training cut points reach into the past."""

    horizon: int
    season: int
    history_size: float


M4_FREQUENCIES: dict[str, M4Frequency] = {
    "Yearly": M4Frequency(6, 1, 1.5),
    "Quarterly": M4Frequency(8, 4, 1.5),
    "Monthly": M4Frequency(18, 12, 1.5),
    "Weekly": M4Frequency(13, 1, 10),
    "Daily": M4Frequency(14, 1, 10),
    "Hourly": M4Frequency(48, 24, 10),
}
"""The six frequencies of M4."""


def smape(forecast: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    r"""Return the symmetric percentage error of each entry, :math:`200 |F - Y| / (|F| + |Y|)`, with 0/0 = 0.

    Args:
        forecast: F, any shape.
        target: Y, of the same shape.

    Returns:
        Errors in percent, in [0, 200], of the same shape; their mean is the score.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> smape([1.0, 0.0, 3.0], [3.0, 0.0, 3.0])
        array([100.,   0.,   0.])
    """
    forecast, target = _pair(forecast, target)
    return _ratio(200 * np.abs(forecast - target), np.abs(forecast) + np.abs(target))


def mase(forecast: ArrayLike, target: ArrayLike, insample: ArrayLike, *, season: int = 1) -> NDArray[np.float64]:
    r"""Return the mean absolute error of each series, scaled by that of the seasonal naive forecast in sample.

    .. math:: \mathrm{mean}_h |F_h - Y_h| \Big/ \mathrm{mean}_{t > m} |y_t - y_{t-m}|

    Args:
        forecast: F, ``(..., horizon)``.
        target: Y, ``(..., horizon)``.
        insample: The history y that the forecast saw, ``(..., L)`` with ``L > season``.
        season: Seasonal lag m.

    Returns:
        One error a series, ``(...)``; infinite for a wrong forecast of a history that the lag repeats exactly, 0 for a
        right one.

    Raises:
        ValueError: Shapes disagree, or the history is not longer than ``season``.

    Example:
        >>> float(mase([4.0, 6.0], [5.0, 5.0], [1.0, 3.0, 2.0, 4.0]).round(3))
        0.6
    """
    forecast, target = _pair(forecast, target)
    insample = np.asarray(insample, dtype=np.float64)
    check_positive("season", season, integer=True)
    if insample.shape[:-1] != forecast.shape[:-1] or insample.shape[-1] <= season:
        raise ValueError(
            f"`insample` must have shape {(*forecast.shape[:-1], 'L')} with L > {season}, got {insample.shape}."
        )
    scale = np.abs(insample[..., season:] - insample[..., :-season]).mean(-1)
    error = np.abs(forecast - target).mean(-1)
    with np.errstate(divide="ignore"):
        return np.divide(error, scale, out=np.zeros_like(error), where=(scale > 0) | (error > 0))


def owa(smape: float, mase: float, naive_smape: float, naive_mase: float) -> float:
    """Return the overall weighted average: the mean of the two scores, each relative to that of Naive2.

    Raises:
        ValueError: A score of Naive2 is not positive.

    Example:
        >>> owa(12.0, 1.5, 15.0, 2.0)
        0.775
    """
    check_positive("naive_smape", float(naive_smape))
    check_positive("naive_mase", float(naive_mase))
    return (mase / naive_mase + smape / naive_smape) / 2


@dataclass(frozen=True)
class M4Score:
    """Scores of one group of series: their number, sMAPE in percent, MASE and overall weighted average."""

    count: int
    smape: float
    mase: float
    owa: float


def m4_summary(
    forecasts: Mapping[str, Sequence[ArrayLike]],
    targets: Mapping[str, Sequence[ArrayLike]],
    insamples: Mapping[str, Sequence[ArrayLike]],
    naive: Mapping[str, Sequence[ArrayLike]] | None = None,
) -> dict[str, M4Score]:
    """Score forecasts as the M4 competition does.

    sMAPE and MASE are means over series within each frequency. Weekly, daily and hourly series are pooled as "Others",
    and all as "Average"; both weigh a frequency by its number of series. OWA is computed from these means.

    Args:
        forecasts: Frequency, a key of :data:`M4_FREQUENCIES`, to the forecast ``(horizon,)`` of each series.
        targets: The same for the true values.
        insamples: The same for the histories ``(L,)``, whose lengths may differ.
        naive: The same for the forecasts of Naive2; by default :func:`naive2` of the histories.

    Returns:
        Group to its :class:`M4Score`; groups: the frequencies that are present but the three pooled, "Others" if one of
        those is present, and "Average".

    Raises:
        ValueError: A frequency is unknown or its lists differ in length.

    Example:
        >>> history = {"Yearly": [[1.0, 3.0, 2.0, 4.0]]}
        >>> truth, guess = {"Yearly": [[5.0] * 6]}, {"Yearly": [[4.5] * 6]}
        >>> round(m4_summary(guess, truth, history)["Average"].owa, 3)
        0.487
    """
    if not forecasts:
        raise ValueError("`forecasts` holds no frequency.")
    rows: dict[str, list[NDArray]] = {}
    for name, found in forecasts.items():
        if name not in M4_FREQUENCIES:
            raise ValueError(unknown_name("M4 frequency", name, M4_FREQUENCIES))
        lists = [found, targets.get(name, ()), insamples.get(name, ())]
        if naive is not None:
            lists.append(naive.get(name, ()))
        if len(found) == 0 or len({len(values) for values in lists}) > 1:
            raise ValueError(f"{name}: needs one entry a series everywhere, got {[len(values) for values in lists]}.")
        scores = [_score_series(M4_FREQUENCIES[name], *series) for series in zip(*lists, strict=True)]
        rows.setdefault("Others" if name in ("Weekly", "Daily", "Hourly") else name, []).extend(scores)
    rows["Average"] = [row for group in rows.values() for row in group]
    result = {}
    for group, scores in rows.items():
        mean = np.mean(scores, axis=0)
        result[group] = M4Score(len(scores), float(mean[0]), float(mean[1]), owa(*map(float, mean)))
    return result


def _score_series(
    frequency: M4Frequency, forecast: ArrayLike, target: ArrayLike, history: ArrayLike, naive: ArrayLike | None = None
) -> NDArray[np.float64]:
    season = frequency.season
    naive = naive2(history, len(np.asarray(target)), season=season) if naive is None else naive
    ours, theirs = ((smape(f, target).mean(), mase(f, target, history, season=season)) for f in (forecast, naive))
    return np.array([*ours, *theirs])


def naive2(history: ArrayLike, horizon: int, *, season: int = 1) -> NDArray[np.float64]:
    r"""Forecast by the last value, seasonally adjusted if the series is seasonal: the benchmark Naive2 of M4.

    The series counts as seasonal when it covers three periods and its autocorrelation at lag m passes a 90 % test,
    :math:`|r_m| > 1.645 \sqrt{(1 + 2 \sum_{i<m} r_i^2) / L}`. Then it is divided by the seasonal indices of a classical
    multiplicative decomposition (mean ratio of each phase to the centred moving average, scaled to mean 1), its last
    value is repeated, and the forecast multiplied by the indices.

    Args:
        history: The series y, ``(L,)``, positive where it is seasonal.
        horizon: Steps to forecast.
        season: Seasonal lag m; 1 for none.

    Returns:
        ``(horizon,)``.

    Raises:
        ValueError: ``history`` is empty, not one-dimensional, not finite, or seasonal but not positive.

    Example:
        >>> naive2([1.0, 2.0, 3.0, 4.0] * 4, 4, season=4).round(6)
        array([1., 2., 3., 4.])
    """
    y = np.asarray(history, dtype=np.float64)
    if y.ndim != 1 or len(y) == 0:
        raise ValueError(f"`history` must have shape (L,) with L > 0, got {y.shape}.")
    check_finite("history", y)
    check_positive("horizon", horizon, integer=True)
    check_positive("season", season, integer=True)
    if not _is_seasonal(y, season):
        return np.full(horizon, y[-1])
    if y.min() <= 0:
        raise ValueError(f"`history` must be positive to be decomposed into factors, got {y.min()}; pass season=1.")
    index = _seasonal_indices(y, season)
    phases = np.arange(len(y), len(y) + horizon) % season
    return y[-1] / index[(len(y) - 1) % season] * index[phases]


def _is_seasonal(y: NDArray, season: int) -> bool:
    if season == 1 or len(y) < 3 * season:
        return False
    centred = y - y.mean()
    power = (centred**2).sum()
    if power <= 1e-24 * (y**2).sum():  # constant but for rounding
        return False
    r = np.array([(centred[lag:] * centred[:-lag]).sum() for lag in range(1, season + 1)]) / power
    return bool(abs(r[-1]) > 1.645 * np.sqrt((1 + 2 * (r[:-1] ** 2).sum()) / len(y)))


def _seasonal_indices(y: NDArray, season: int) -> NDArray:
    window = np.ones(season) if season % 2 else np.r_[0.5, np.ones(season - 1), 0.5]
    trend = np.convolve(y, window / season, mode="valid")
    first = len(window) // 2
    ratio = y[first : first + len(trend)] / trend
    phase = np.arange(first, first + len(trend)) % season
    index = np.array([ratio[phase == p].mean() for p in range(season)])
    return index / index.mean()


def point_adjust(flags: ArrayLike, truth: ArrayLike) -> NDArray[np.bool_]:
    """Return the flags after point adjustment: a true anomaly of which one point is flagged is flagged whole.

    This is the protocol of the published tables; it favours detectors that flag often, even at random, so report scores
    without it too.

    Args:
        flags: Flagged points, ``(L,)``, 0 or 1.
        truth: True anomalous points, ``(L,)``, 0 or 1.

    Returns:
        ``(L,)``, boolean.

    Raises:
        ValueError: The shapes differ or are not ``(L,)``, or a value is neither 0 nor 1.

    Example:
        >>> point_adjust([0, 0, 1, 0, 1], [0, 1, 1, 1, 0]).astype(int)
        array([0, 1, 1, 1, 1])
    """
    found, real = (_binary(name, values) for name, values in (("flags", flags), ("truth", truth)))
    if found.shape != real.shape:
        raise ValueError(f"`flags` and `truth` must have one shape (L,), got {found.shape} and {real.shape}.")
    # Number the segments of equal truth; a segment is hit if any of its points is flagged.
    segment = np.cumsum(np.diff(real.astype(np.int8), prepend=0) != 0)
    hit = np.bincount(segment, weights=found) > 0 if len(real) else np.zeros(0, dtype=bool)
    return found | (real & hit[segment])


def _binary(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"`{name}` must have shape (L,), got {array.shape}.")
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"`{name}` must hold only 0 and 1.")
    return array.astype(bool)


def smape_loss(forecast: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return the mean of :math:`200\, m\, |F - Y| / (|\mathrm{sg}(F)| + |Y|)`, with 0/0 = 0.

    No gradient flows through the forecast in the denominator (sg), or raising it would pay.

    Args:
        forecast: F, any shape.
        target: Y, of the same shape.
        mask: m, of the same shape, 0 where a target does not count; such entries still count in the mean's denominator.

    Returns:
        Scalar.

    Raises:
        ValueError: The shapes differ.
    """
    weight = _weights(forecast, target, mask)
    denominator = forecast.detach().abs() + target.abs()
    return (200 * _safe_inverse(denominator) * weight * (forecast - target).abs()).mean()


def mape_loss(forecast: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return the mean of :math:`m\, |F - Y| / |Y|`, a fraction; entries with Y = 0 count as 0.

    Arguments, result and errors as for :func:`smape_loss`.
    """
    weight = _weights(forecast, target, mask)
    return (_safe_inverse(target.abs()) * weight * (forecast - target).abs()).mean()


def mase_loss(
    forecast: Tensor, target: Tensor, insample: Tensor, mask: Tensor | None = None, *, season: int = 1
) -> Tensor:
    r"""Return the mean of :math:`m\, |F - Y|`, each series divided by its :math:`\mathrm{mean}_t |y_t - y_{t-s}|`.

    Args:
        forecast: F, ``(B, horizon)``.
        target: Y, ``(B, horizon)``.
        insample: History y, ``(B, L)`` with ``L > season``; a series that the lag repeats exactly counts as 0.
        mask: m, ``(B, horizon)``, 0 where a target does not count; such entries still count in the mean's denominator.
        season: Seasonal lag s.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes disagree, or the history is not longer than ``season``.
    """
    weight = _weights(forecast, target, mask)
    check_positive("season", season, integer=True)
    if insample.shape[:-1] != forecast.shape[:-1] or insample.shape[-1] <= season:
        shape = (*forecast.shape[:-1], "L")
        raise ValueError(f"`insample` must have shape {shape} with L > {season}, got {tuple(insample.shape)}.")
    scale = (insample[..., season:] - insample[..., :-season]).abs().mean(-1, keepdim=True)
    return (_safe_inverse(scale) * weight * (forecast - target).abs()).mean()


def _safe_inverse(x: Tensor) -> Tensor:
    zero = x == 0
    return torch.where(zero, 0, 1 / torch.where(zero, 1, x))


def _weights(forecast: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    mask = torch.ones_like(target) if mask is None else mask
    if not forecast.shape == target.shape == mask.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (forecast, target, mask))
        raise ValueError(f"`forecast`, `target` and `mask` must have one shape, got {shapes}.")
    return mask.to(forecast.dtype)


def _pair(forecast: ArrayLike, target: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    forecast, target = np.asarray(forecast, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if forecast.shape != target.shape:
        raise ValueError(f"`forecast` and `target` must have one shape, got {forecast.shape} and {target.shape}.")
    return forecast, target


def _ratio(numerator: NDArray, denominator: NDArray) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
