"""Calendar features of time stamps: where in the minute, hour, day, week, month and year each one falls.

Two encodings that forecasting networks of the Informer family share: real features, each linear in [-0.5, 0.5]
(:func:`calendar_features`), and integer columns that index embedding tables (:func:`calendar_columns`). Everything is
``datetime64`` arithmetic on whole arrays. A frequency is one letter: ``s`` seconds, ``t`` minutes, ``h`` hours, ``d``
days, ``b`` business days, ``w`` weeks, ``m`` months (and quarters), ``a`` years.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynakern.checks import unknown_name

__all__ = ["FREQUENCIES", "calendar_columns", "calendar_features", "infer_frequency", "parse_frequency"]

# Frequency letter to its features, in order.
_FEATURES = {
    "a": ("month",),
    "m": ("month",),
    "w": ("day", "week"),
    "b": ("weekday", "day", "day_of_year"),
    "d": ("weekday", "day", "day_of_year"),
    "h": ("hour", "weekday", "day", "day_of_year"),
    "t": ("minute", "hour", "weekday", "day", "day_of_year"),
    "s": ("second", "minute", "hour", "weekday", "day", "day_of_year"),
}
# Feature to (smallest value, largest value minus smallest).
_RANGES = {
    "second": (0, 59),
    "minute": (0, 59),
    "hour": (0, 23),
    "weekday": (0, 6),
    "day": (1, 30),
    "day_of_year": (1, 365),
    "week": (1, 52),
    "month": (1, 11),
}
# Spellings of pandas, old and new, to the letter. "m" alone is a month, as in the Informer family, and never a minute.
_SPELLINGS = {
    **{letter: letter for letter in _FEATURES},
    **dict.fromkeys(("S", "sec"), "s"),
    **dict.fromkeys(("T", "min", "Min"), "t"),
    "H": "h",
    "D": "d",
    "B": "b",
    "W": "w",
    **dict.fromkeys(("M", "ME", "MS", "Q", "QE", "QS"), "m"),
    **dict.fromkeys(("A", "Y", "y", "YE", "YS"), "a"),
}

FREQUENCIES: dict[str, int] = {letter: len(features) for letter, features in _FEATURES.items()}
"""Frequency letter to the number of its calendar features."""


def parse_frequency(freq: str) -> str:
    """Return the letter of a frequency; multiples (``"15min"``) and anchors (``"W-SUN"``) are dropped.

    Args:
        freq: A letter (see the module) or a pandas spelling such as ``"15min"``, ``"3h"``, ``"D"``, ``"W-SUN"``,
            ``"MS"``.

    Raises:
        ValueError: The spelling is unknown.

    Example:
        >>> parse_frequency("15min"), parse_frequency("W-SUN"), parse_frequency("QE-DEC")
        ('t', 'w', 'm')
    """
    stem = re.sub(r"^\d+", "", freq.strip()).partition("-")[0]
    if stem not in _SPELLINGS:
        raise ValueError(unknown_name("frequency", freq, _SPELLINGS))
    return _SPELLINGS[stem]


def calendar_features(times: ArrayLike, freq: str | None = None) -> NDArray[np.float64]:
    """Encode each time stamp by its place in the cycles of the calendar, each in [-0.5, 0.5].

    A feature is ``(value - smallest) / (largest - smallest) - 0.5``: second/59, minute/59, hour/23, weekday/6 (Monday
    is 0), (day - 1)/30, (day of year - 1)/365, (ISO week - 1)/52, (month - 1)/11, each minus 0.5.

    Args:
        times: Time stamps, ``(L,)``: ``datetime64``, ISO strings or ``datetime`` objects. Seconds are the finest unit.
        freq: Which features; by default :func:`infer_frequency` of ``times``.

    Returns:
        ``(L, F)``. Columns: ``h`` hour, weekday, day, day of year; ``t`` those after minute; ``s`` those after second
        and minute; ``d`` and ``b`` weekday, day, day of year; ``w`` day, week; ``m`` and ``a`` month.

    Raises:
        ValueError: A time stamp is missing or unreadable, or ``freq`` is unknown.

    Example:
        >>> calendar_features(["2016-07-01 00:00", "2016-07-01 23:00"], "h").round(3)
        array([[-0.5  ,  0.167, -0.5  , -0.001],
               [ 0.5  ,  0.167, -0.5  , -0.001]])

    Source: the time features of GluonTS and the Informer family (Zhou et al., 2021, arXiv:2012.07436). They give a
    yearly series no feature; here it has the month, so that its width is the 1 that their embedding expects.
    """
    stamps = _seconds(times)
    letter = infer_frequency(stamps) if freq is None else parse_frequency(freq)
    parts = _parts(stamps)
    scaled = [(parts[name] - _RANGES[name][0]) / _RANGES[name][1] - 0.5 for name in _FEATURES[letter]]
    return np.stack(scaled, axis=-1)


def calendar_columns(times: ArrayLike, freq: str | None = None) -> NDArray[np.int64]:
    """Return the integer columns that index embedding tables.

    Args:
        times: Time stamps, ``(L,)``, as for :func:`calendar_features`.
        freq: Frequency; by default :func:`infer_frequency` of ``times``.

    Returns:
        ``(L, 4)``: month 1-12, day 1-31, weekday 0-6 (Monday is 0), hour 0-23; for minutes ``(L, 5)`` with the
        quarter of the hour 0-3 last.

    Raises:
        ValueError: A time stamp is missing or unreadable, or ``freq`` is unknown.

    Example:
        >>> calendar_columns(["2016-07-01 05:30"], "15min")
        array([[7, 1, 4, 5, 2]])
    """
    stamps = _seconds(times)
    letter = infer_frequency(stamps) if freq is None else parse_frequency(freq)
    parts = _parts(stamps)
    columns = [parts[name] for name in ("month", "day", "weekday", "hour")]
    if letter == "t":
        columns.append(parts["minute"] // 15)
    return np.stack(columns, axis=-1)


def infer_frequency(times: ArrayLike) -> str:
    """Return the frequency letter of increasing time stamps, from the median gap between them.

    Args:
        times: At least two strictly increasing time stamps, ``(L,)``. Gaps need not be equal.

    Returns:
        The letter whose features tell neighbours apart: ``s`` below a minute, ``t`` below an hour, ``h`` below a day,
        ``d`` below a week (``b`` when steps are days and none falls on a weekend), ``w`` below 28 days, ``m`` below
        365, else ``a``.

    Raises:
        ValueError: There are fewer than two time stamps, or they do not increase; the message says where.

    Example:
        >>> infer_frequency(["2024-01-01 00:00", "2024-01-01 00:15", "2024-01-01 00:30"])
        't'
    """
    stamps = _seconds(times)
    if len(stamps) < 2:
        raise ValueError(
            f"`times` needs at least two time stamps to infer a frequency, got {len(stamps)}; pass `freq`."
        )
    gaps = np.diff(stamps).astype(np.int64)
    if (gaps <= 0).any():
        at = int(np.argmax(gaps <= 0))
        raise ValueError(f"`times` must increase, got {stamps[at]} before {stamps[at + 1]} at index {at + 1}.")
    gap, day = float(np.median(gaps)), 86400
    bounds = {"s": 60, "t": 3600, "h": day, "d": 7 * day, "w": 28 * day, "m": 365 * day}
    letter = next((letter for letter, bound in bounds.items() if gap < bound), "a")
    # Six daily steps in a row always meet a weekend.
    if letter == "d" and gap == day and len(stamps) > 5 and int(_parts(stamps)["weekday"].max()) < 5:
        letter = "b"
    return letter


def _seconds(times: ArrayLike) -> NDArray[np.datetime64]:
    try:
        stamps = np.asarray(times).astype("datetime64[s]")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`times` must hold dates that numpy.datetime64 reads, without a time zone: {error}."
        ) from error
    if stamps.ndim != 1:
        raise ValueError(f"`times` must have shape (L,), got {stamps.shape}.")
    if np.isnat(stamps).any():
        raise ValueError(f"`times` must have no missing value, got NaT at index {int(np.argmax(np.isnat(stamps)))}.")
    return stamps


def _parts(stamps: NDArray[np.datetime64]) -> dict[str, NDArray[np.int64]]:
    days, months, years = (stamps.astype(f"datetime64[{unit}]") for unit in "DMY")
    second = (stamps - days).astype(np.int64)  # of the day
    weekday = (days.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday
    thursday = days + (3 - weekday)  # an ISO week belongs to the year of its Thursday
    return {
        "second": second % 60,
        "minute": second // 60 % 60,
        "hour": second // 3600,
        "weekday": weekday,
        "day": (days - months.astype("datetime64[D]")).astype(np.int64) + 1,
        "day_of_year": (days - years.astype("datetime64[D]")).astype(np.int64) + 1,
        "week": (thursday - thursday.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64) // 7 + 1,
        "month": months.astype(np.int64) % 12 + 1,
    }
