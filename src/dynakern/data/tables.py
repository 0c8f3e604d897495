"""Read a table of samples: CSV, the whitespace files of the UCI benchmarks, and the tables of scikit-learn."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynakern.checks import check_choice, unknown_name

__all__ = ["SampleTable", "read_sample_table"]

_BUNDLED = {"breast_cancer": "target", "diabetes": "target", "digits": "target", "iris": "target", "wine": "target"}
_LEVELS = 50  # a text column with more values is no category


@dataclass(frozen=True)
class SampleTable:
    """Samples in rows.

    Attributes:
        features: ``(N, P)``, float64, finite. Text columns of the file are here as one 0/1 column a value.
        columns: Names of the P features.
        target: ``(N,)``: numbers where all are, else strings; None if no column was chosen.
        is_test: ``(N,)``, whether a row belongs to the published test part; None where there is no such part.
        source: Where it came from, for messages.
    """

    features: np.ndarray
    columns: tuple[str, ...]
    target: np.ndarray | None
    is_test: np.ndarray | None
    source: str


def read_sample_table(
    path: str | os.PathLike[str], *, target: str | None = None, supervised: bool = True
) -> SampleTable:
    """Read a table of samples.

    A file without a header, numbers between blanks or commas, has columns ``x0``, ``x1``, ...; with its row numbers in
    ``NAME_test_0.txt`` beside ``NAME.txt`` (the layout of the UCI regression benchmarks) these rows are the test part.

    Args:
        path: A CSV file with a header, a file of numbers, or ``sklearn:NAME`` with NAME breast_cancer, diabetes,
            digits, iris or wine.
        target: The column to predict; the last one by default.
        supervised: Whether there is a column to predict; if not, all columns but ``target`` are features.

    Returns:
        A :class:`SampleTable`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing or double, a field is empty or not finite, a line is short, or a text column has
            too many values. The message names the file, the line (the header being line 1) and the column.

    Example:
        >>> table = read_sample_table("sklearn:iris")
        >>> table.features.shape, sorted(set(table.target.tolist()))
        ((150, 4), ['setosa', 'versicolor', 'virginica'])
    """
    if str(path).startswith("sklearn:"):
        return _from_sklearn(str(path).removeprefix("sklearn:"), supervised=supervised)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    header, rows, first = _read_rows(path)
    if target is not None and target not in header:
        raise ValueError(f"{path}: {unknown_name('column', target, header)}")
    chosen = header.index(target) if target is not None else len(header) - 1 if supervised else None
    names, parts = [], []
    for index, name in enumerate(header):
        if index != chosen:
            for label, values in _feature(path, name, [row[index] for row in rows], first):
                names.append(label)
                parts.append(values)
    if not parts:
        raise ValueError(f"{path} has no column beside {header[0]!r}: nothing to learn from.")
    values = None
    if supervised and chosen is not None:
        values = _target(path, header[chosen], [row[chosen] for row in rows], first)
    return SampleTable(np.stack(parts, 1), tuple(names), values, _published_test(path, len(rows)), str(path))


def _from_sklearn(name: str, *, supervised: bool) -> SampleTable:
    from sklearn import datasets

    check_choice("data", f"sklearn:{name}", [f"sklearn:{known}" for known in _BUNDLED])
    data: Any = getattr(datasets, f"load_{name}")()
    target = (
        data.target.astype(np.float64) if name == "diabetes" else np.asarray(data.target_names)[data.target].astype(str)
    )
    columns = tuple(str(column) for column in data.feature_names)
    return SampleTable(
        data.data.astype(np.float64), columns, target if supervised else None, None, f"scikit-learn {name}"
    )


def _read_rows(path: Path) -> tuple[list[str], list[list[str]], int]:
    """Return the column names, the fields, and the number of the first line of data."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path} is empty.")
        blanks = "," not in lines[0] and ";" not in lines[0] and _all_numbers(lines[0].split())
        delimiter = ";" if lines[0].count(";") > lines[0].count(",") else ","
        rows = [line.split() for line in lines] if blanks else list(csv.reader(lines, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a text file of a table: {error}.") from error
    if _all_numbers(rows[0]):
        header, body, first = [*(f"x{i}" for i in range(len(rows[0])))], rows, 1
    else:
        header, body, first = [name.strip() for name in rows[0]], rows[1:], 2
    double = {name for name in header if header.count(name) > 1}
    if double:
        raise ValueError(f"{path}, line 1: column name(s) used twice: {', '.join(sorted(double))}.")
    if len(body) < 2:
        raise ValueError(f"{path} must have at least 2 rows of data, got {len(body)}.")
    for number, row in enumerate(body, first):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {number}: {len(row)} field(s), expected {len(header)}.")
    return header, body, first


def _all_numbers(fields: list[str]) -> bool:
    return bool(fields) and all(_number(field) is not None for field in fields)


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _feature(path: Path, name: str, fields: list[str], first: int) -> list[tuple[str, np.ndarray]]:
    """Return a number column as it is, a text column as one 0/1 column a value."""
    numbers = [_number(field) for field in fields]
    share = sum(number is not None for number in numbers) / len(numbers)
    if share == 1:
        values = np.array(numbers, dtype=np.float64)
        _refuse_infinite(path, name, values, fields, first)
        return [(name, values)]
    levels = sorted({field.strip() for field in fields})
    odd = next(i for i, number in enumerate(numbers) if number is None)
    if "" in levels or share > 0.5 or len(levels) > _LEVELS:
        found = repr(fields[odd]) if fields[odd].strip() else "an empty field"
        raise ValueError(
            f"{path}, line {odd + first}, column {name!r}: {found} is no number, and the column is no category either "
            f"({len(levels)} different values; a category has at most {_LEVELS} and no gaps)."
        )
    texts = np.array([field.strip() for field in fields])
    return [(f"{name}={level}", (texts == level).astype(np.float64)) for level in levels]


def _target(path: Path, name: str, fields: list[str], first: int) -> np.ndarray:
    numbers = [_number(field) for field in fields]
    if all(number is not None for number in numbers):
        values = np.array(numbers, dtype=np.float64)
        _refuse_infinite(path, name, values, fields, first)
        return values
    for index, field in enumerate(fields):
        if not field.strip():
            raise ValueError(f"{path}, line {index + first}, column {name!r}: the value to predict is missing.")
    return np.array([field.strip() for field in fields])


def _refuse_infinite(path: Path, name: str, values: np.ndarray, fields: list[str], first: int) -> None:
    for index in np.flatnonzero(~np.isfinite(values)):
        raise ValueError(
            f"{path}, line {int(index) + first}, column {name!r}: {fields[int(index)]!r} is not a finite number."
        )


def _published_test(path: Path, rows: int) -> np.ndarray | None:
    beside = path.with_name(f"{path.stem}_test_0{path.suffix}")
    if not beside.is_file():
        return None
    numbers = [_number(field) for field in beside.read_text(encoding="utf-8").split()]
    if any(number is None or math.isnan(number) or not 0 <= number < rows for number in numbers):
        raise ValueError(f"{beside} must hold row numbers from 0 to {rows - 1}, one a line.")
    is_test = np.zeros(rows, dtype=bool)
    is_test[np.array(numbers, dtype=np.int64)] = True
    return is_test
