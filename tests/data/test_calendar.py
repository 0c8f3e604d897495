from __future__ import annotations

import datetime

import numpy as np
import pytest

from dynakern.data.calendar import FREQUENCIES, calendar_columns, calendar_features, infer_frequency, parse_frequency


def stamps(step, count=400, start="2015-12-20T21:37:11"):
    return np.datetime64(start, "s") + np.arange(count) * np.timedelta64(*step)


def by_hand(moment, name):
    """Each feature from the standard library's calendar."""
    values = {
        "second": moment.second / 59,
        "minute": moment.minute / 59,
        "hour": moment.hour / 23,
        "weekday": moment.weekday() / 6,
        "day": (moment.day - 1) / 30,
        "day_of_year": (moment.timetuple().tm_yday - 1) / 365,
        "week": (moment.isocalendar().week - 1) / 52,
        "month": (moment.month - 1) / 11,
    }
    return values[name] - 0.5


@pytest.mark.parametrize(
    ("freq", "step", "names"),
    [
        ("h", (7, "h"), ("hour", "weekday", "day", "day_of_year")),
        ("15min", (95, "m"), ("minute", "hour", "weekday", "day", "day_of_year")),
        ("s", (7001, "s"), ("second", "minute", "hour", "weekday", "day", "day_of_year")),
        ("D", (1, "D"), ("weekday", "day", "day_of_year")),
        ("B", (1, "D"), ("weekday", "day", "day_of_year")),
        ("W-SUN", (7, "D"), ("day", "week")),
        ("MS", (31, "D"), ("month",)),
        ("Y", (365, "D"), ("month",)),
    ],
)
def test_features_agree_with_the_standard_library(freq, step, names):
    times = stamps(step)
    expected = [[by_hand(moment, name) for name in names] for moment in times.tolist()]
    found = calendar_features(times, freq)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert found.shape[1] == FREQUENCIES[parse_frequency(freq)]
    assert np.abs(found).max() <= 0.5


def test_dates_before_1970_and_leap_days():
    times = [datetime.datetime(1969, 12, 31, 23), datetime.datetime(1904, 2, 29, 1), datetime.datetime(2000, 2, 29)]
    expected = [[by_hand(t, name) for name in ("hour", "weekday", "day", "day_of_year")] for t in times]
    np.testing.assert_allclose(calendar_features(times, "h"), expected, rtol=0, atol=1e-12)


def test_columns():
    times = ["2016-12-31T23:59", "2017-01-02T00:14", "2017-01-02T00:15"]
    assert calendar_columns(times, "h").tolist() == [[12, 31, 5, 23], [1, 2, 0, 0], [1, 2, 0, 0]]
    assert calendar_columns(times, "t")[:, 4].tolist() == [3, 0, 1]


@pytest.mark.parametrize(
    ("step", "letter"),
    [
        ((10, "s"), "s"),
        ((1, "m"), "t"),
        ((15, "m"), "t"),
        ((1, "h"), "h"),
        ((6, "h"), "h"),
        ((1, "D"), "d"),
        ((7, "D"), "w"),
        ((30, "D"), "m"),
        ((91, "D"), "m"),
        ((365, "D"), "a"),
    ],
)
def test_inferred_frequency(step, letter):
    times = stamps(step, count=12)
    assert infer_frequency(times) == letter
    np.testing.assert_array_equal(calendar_features(times), calendar_features(times, letter))
    np.testing.assert_array_equal(calendar_columns(times), calendar_columns(times, letter))


def test_business_days_have_no_weekend():
    days = stamps((1, "D"), count=28, start="2024-01-01")
    weekday = (days.astype("datetime64[D]").astype(int) + 3) % 7
    assert infer_frequency(days[weekday < 5]) == "b"
    assert infer_frequency(days) == "d"
    assert infer_frequency(days[:5]) == "d"  # Monday to Friday shows nothing


def test_one_missing_row_does_not_change_the_frequency():
    assert infer_frequency(np.delete(stamps((1, "h"), count=20), 7)) == "h"


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (["2024-01-02", "2024-01-02"], "`times` must increase, got 2024-01-02T00:00:00 before .* at index 1"),
        (["2024-01-01"], "needs at least two time stamps"),
        (["2024-01-01", "NaT"], "no missing value, got NaT at index 1"),
        (["2024-01-01", "yesterday"], "must hold dates that numpy.datetime64 reads"),
        ([["2024-01-01"]], r"must have shape \(L,\), got \(1, 1\)"),
    ],
)
def test_refusals(times, message):
    with pytest.raises(ValueError, match=message):
        infer_frequency(times)


def test_unknown_frequency_suggests():
    with pytest.raises(ValueError, match=r"Unknown frequency 'minn'\. Did you mean"):
        calendar_features(["2024-01-01"], "minn")
