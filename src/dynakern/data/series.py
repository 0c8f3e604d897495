"""Read a table of regularly sampled series, and refuse what cannot be forecast, naming line and column."""

from __future__ import annotations

import csv
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynakern.checks import unknown_name

__all__ = ["SeriesTable", "as_series_table", "read_series_csv"]

_TIME_NAMES = ("date", "datetime", "time", "timestamp", "ds")


@dataclass(frozen=True)
class SeriesTable:
    """Several series on one clock.

    Attributes:
        values: ``(L, C)``, float64, finite unless ``allow_missing`` was set.
        columns: Names of the C series.
        timestamps: ``(L,)``, ``datetime64[s]``, strictly increasing; None if the table has no time.
        source: Where it came from, for messages.
    """

    values: np.ndarray
    columns: tuple[str, ...]
    timestamps: np.ndarray | None
    source: str

    def select(self, column: str) -> SeriesTable:
        """Return the table with only ``column``.

        Raises:
            ValueError: There is no such column; the message suggests the nearest.
        """
        if column not in self.columns:
            raise ValueError(f"{self.source}: {unknown_name('column', column, self.columns)}")
        index = self.columns.index(column)
        return SeriesTable(self.values[:, index : index + 1], (column,), self.timestamps, self.source)

    @property
    def step_seconds(self) -> float | None:
        """Median step between timestamps in seconds, or None without time."""
        if self.timestamps is None or len(self.timestamps) < 2:
            return None
        return float(np.median(np.diff(self.timestamps).astype("timedelta64[s]").astype(np.int64)))


def read_series_csv(
    path: str | os.PathLike[str], *, time_column: str | None = None, allow_missing: bool = False
) -> SeriesTable:
    """Read a CSV file with a header line, one optional time column and number columns.

    Args:
        path: The file, UTF-8, comma separated.
        time_column: Name of the time column; by default one called date, datetime, time, timestamp or ds, or a first
            column that reads as ISO dates.
        allow_missing: Accept empty and NaN fields (they become NaN), for imputation.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing or double, a field is no number or empty, a line is short, or time does not
            increase. The message names the file, the line (from 1, the header being line 1) and the column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV text file: {error}.") from error
    if len(rows) < 2:
        raise ValueError(f"{path} must have a header line and data, got {len(rows)} line(s).")
    header, body = [name.strip() for name in rows[0]], rows[1:]
    double = {name for name in header if header.count(name) > 1}
    if double:
        raise ValueError(f"{path}, line 1: column name(s) used twice: {', '.join(sorted(double))}.")
    if all(_is_number(name) for name in header):
        raise ValueError(f"{path}, line 1: a header with column names is needed, got numbers only.")
    for number, row in enumerate(body, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} field(s), the header has {len(header)}.")
    time_index = _find_time(path, header, body[0], time_column)
    timestamps = None if time_index is None else _read_times(path, header[time_index], [r[time_index] for r in body])
    indices = [i for i in range(len(header)) if i != time_index]
    if not indices:
        raise ValueError(f"{path} has no number column beside the time column {header[time_index or 0]!r}.")
    columns = [_read_numbers(path, header[i], [row[i] for row in body], allow_missing) for i in indices]
    return SeriesTable(np.stack(columns, axis=1), tuple(header[i] for i in indices), timestamps, str(path))


def as_series_table(data: Any, *, source: str = "data", allow_missing: bool = False) -> SeriesTable:
    """Return a :class:`SeriesTable` from an array ``(L,)`` or ``(L, C)``, a data frame, or a table.

    A data frame (pandas or alike) may carry its time in a ``DatetimeIndex`` or in a datetime column.

    Raises:
        TypeError: The data is none of these.
        ValueError: Values are not finite (and ``allow_missing`` is not set), or time does not increase.
    """
    if isinstance(data, SeriesTable):
        return data
    timestamps = None
    if hasattr(data, "columns") and hasattr(data, "to_numpy"):
        times = [c for c in data.columns if np.issubdtype(np.asarray(data[c]).dtype, np.datetime64)]
        if times:
            timestamps = np.asarray(data[times[0]]).astype("datetime64[s]")
        elif np.issubdtype(np.asarray(getattr(data, "index", ())).dtype, np.datetime64):
            timestamps = np.asarray(data.index).astype("datetime64[s]")
        columns = tuple(str(c) for c in data.columns if c not in times)
        parts = [np.asarray(data[c]) for c in data.columns if c not in times]
        for name, part in zip(columns, parts, strict=True):
            if not (np.issubdtype(part.dtype, np.number) or part.dtype == bool):
                raise TypeError(f"Column {name!r} of `{source}` must hold numbers, got dtype {part.dtype}.")
        values = np.stack([part.astype(np.float64) for part in parts], axis=1)
    else:
        values = np.asarray(data)
        if not np.issubdtype(values.dtype, np.number):
            raise TypeError(f"`{source}` must hold numbers, got dtype {values.dtype}.")
        values = values.astype(np.float64)
        values = values[:, None] if values.ndim == 1 else values
        columns = tuple(f"x{i}" for i in range(values.shape[-1]))
    if values.ndim != 2 or values.shape[0] == 0:
        raise ValueError(f"`{source}` must have shape (L,) or (L, C) with L >= 1, got {values.shape}.")
    bad = np.isinf(values) if allow_missing else ~np.isfinite(values)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"`{source}` must be finite, got {values[row, column]} in row {row}, column {columns[column]!r}."
        )
    if timestamps is not None:
        _check_increasing(source, "the time", timestamps, first_line=0, unit="row")
    return SeriesTable(values, columns, timestamps, source)


def _find_time(path: Path, header: list[str], first: list[str], wanted: str | None) -> int | None:
    if wanted is not None:
        if wanted not in header:
            raise ValueError(f"{path}: {unknown_name('column', wanted, header)}")
        return header.index(wanted)
    named = [i for i, name in enumerate(header) if name.lower() in _TIME_NAMES and not _is_number(first[i])]
    if named:
        return named[0]
    return 0 if not _is_number(first[0]) and _parse_time(first[0]) is not None else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_time(text: str) -> np.datetime64 | None:
    cleaned = text.strip().replace("/", "-")
    if not cleaned[:4].isdigit():
        return None
    try:
        time = np.datetime64(cleaned, "s")
    except ValueError:
        return None
    return None if np.isnat(time) else time


def _read_times(path: Path, name: str, texts: list[str]) -> np.ndarray:
    times = np.empty(len(texts), dtype="datetime64[s]")
    for number, text in enumerate(texts, 2):
        time = _parse_time(text)
        if time is None:
            raise ValueError(
                f"{path}, line {number}, column {name!r}: {text!r} is no ISO time such as 2016-07-01 00:00:00."
            )
        times[number - 2] = time
    _check_increasing(str(path), f"column {name!r}", times, first_line=2, unit="line")
    return times


def _check_increasing(source: str, where: str, times: np.ndarray, *, first_line: int, unit: str) -> None:
    steps = np.diff(times).astype("timedelta64[s]").astype(np.int64)
    if (steps <= 0).any():
        index = int(np.argmax(steps <= 0)) + 1
        raise ValueError(
            f"{source}, {unit} {index + first_line}, {where}: time must increase, "
            f"got {times[index]} after {times[index - 1]}. Sort the rows and drop repeated times."
        )
    # Calendar steps (months, years) differ by some days; anything past that is a gap.
    usual = float(np.median(steps)) if len(steps) else 0.0
    gaps = np.flatnonzero(steps > 1.5 * usual)
    if len(gaps):
        index = int(gaps[0]) + 1
        warnings.warn(
            f"{source}: the sampling is irregular, {len(gaps)} gap(s), the first at {unit} {index + first_line} "
            f"({times[index - 1]} to {times[index]}). The systems assume equal steps.",
            UserWarning,
            stacklevel=4,
        )


def _read_numbers(path: Path, name: str, texts: list[str], allow_missing: bool) -> np.ndarray:
    try:
        values = np.array(texts, dtype=np.float64)
    except ValueError:
        values = np.array([_number(path, name, number, text, allow_missing) for number, text in enumerate(texts, 2)])
    bad = np.isinf(values) if allow_missing else ~np.isfinite(values)
    if bad.any():
        index = int(np.argmax(bad))
        raise ValueError(
            f"{path}, line {index + 2}, column {name!r}: {texts[index]!r} is not a finite number. "
            "Fill missing values first (dynakern.tasks.Imputer can)."
        )
    return values


def _number(path: Path, name: str, line: int, text: str, allow_missing: bool) -> float:
    if text.strip().lower() in ("", "na", "nan", "null", "none"):
        if allow_missing:
            return math.nan
        raise ValueError(
            f"{path}, line {line}, column {name!r}: the value is missing. "
            "Fill missing values first (dynakern.tasks.Imputer can)."
        )
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}, line {line}, column {name!r}: {text!r} is no number.") from None
