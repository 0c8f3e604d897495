"""Results of a comparison in an SQLite file: one row a job, one row a metric, one row a cost; only the parent writes.

A killed run leaves whole rows or none. Read it with any SQLite client, e.g.
``SELECT competitor, avg(value) FROM metrics WHERE name = 'mse' GROUP BY competitor ORDER BY 2``.
"""

from __future__ import annotations

import contextlib
import io
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

__all__ = ["JobRow", "Store"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    competitor TEXT NOT NULL, seed INTEGER NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')),
    error TEXT, train_seconds REAL, epochs INTEGER, steps INTEGER, repeatable INTEGER NOT NULL, finished TEXT NOT NULL,
    weights BLOB, drawn BLOB, PRIMARY KEY (competitor, seed));
CREATE TABLE IF NOT EXISTS metrics (
    competitor TEXT NOT NULL, seed INTEGER NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (competitor, seed, name));
CREATE TABLE IF NOT EXISTS costs (
    competitor TEXT PRIMARY KEY, parameters INTEGER, flops INTEGER, latency_ms REAL, peak_mb REAL, error TEXT);
"""


@dataclass(frozen=True)
class JobRow:
    """A finished job: a competitor with a seed, its scores or its error."""

    competitor: str
    seed: int
    status: str
    error: str | None
    train_seconds: float | None
    epochs: int | None
    steps: int | None
    repeatable: bool
    metrics: dict[str, float]


class Store:
    """The results file of one comparison.

    Args:
        path: The SQLite file; made if it does not exist.
        settings: What the comparison is. If the file exists, its settings must be the same.

    Raises:
        ValueError: The file holds another comparison, or is no results file.
    """

    def __init__(self, path: Path, settings: Mapping[str, str]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._connect() as db:
                db.executescript(_SCHEMA)
                found = dict(db.execute("SELECT name, value FROM settings"))
                if not found:
                    db.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no results file of dynakern compare: {error}.") from error
        different = {k: (found.get(k), v) for k, v in settings.items() if found and found.get(k) != v}
        if different:
            listing = "; ".join(f"{name}: {there} there, {here} now" for name, (there, here) in different.items())
            raise ValueError(f"{path} holds the results of another comparison ({listing}). Choose another --out.")

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=30)
        try:
            with db:  # one transaction: all or nothing
                yield db
        finally:
            db.close()

    def finished(self) -> set[tuple[str, int]]:
        """Return (competitor, seed) of all jobs that are done; failed ones are tried again."""
        with self._connect() as db:
            return set(db.execute("SELECT competitor, seed FROM jobs WHERE status = 'done'"))

    def add(self, row: JobRow, *, weights: bytes | None = None, drawn: np.ndarray | None = None) -> None:
        """Write a finished job in one transaction; a new result of a job makes its competitor's costs unknown."""
        import datetime

        blob = None
        if drawn is not None:
            buffer = io.BytesIO()
            np.save(buffer, drawn, allow_pickle=False)
            blob = buffer.getvalue()
        fields = asdict(row)
        metrics = fields.pop("metrics")
        finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._connect() as db:
            db.execute("DELETE FROM metrics WHERE competitor = ? AND seed = ?", (row.competitor, row.seed))
            db.execute(
                "INSERT OR REPLACE INTO jobs VALUES (:competitor, :seed, :status, :error, :train_seconds, :epochs,"
                " :steps, :repeatable, :finished, :weights, :drawn)",
                {**fields, "finished": finished, "weights": weights, "drawn": blob},
            )
            db.executemany(
                "INSERT INTO metrics VALUES (?, ?, ?, ?)",
                [(row.competitor, row.seed, name, value) for name, value in metrics.items()],
            )
            db.execute("DELETE FROM costs WHERE competitor = ? AND latency_ms IS NULL", (row.competitor,))

    def jobs(self) -> list[JobRow]:
        """Return all jobs, in order of competitor and seed."""
        columns = "competitor, seed, status, error, train_seconds, epochs, steps, repeatable"
        with self._connect() as db:
            rows = db.execute(f"SELECT {columns} FROM jobs ORDER BY competitor, seed").fetchall()
            metrics: dict[tuple[str, int], dict[str, float]] = {}
            for competitor, seed, name, value in db.execute("SELECT competitor, seed, name, value FROM metrics"):
                metrics.setdefault((competitor, seed), {})[name] = value
        names = columns.split(", ")
        return [
            JobRow(**dict(zip(names, row[:7], strict=False)), repeatable=bool(row[7]), metrics=metrics.get(row[:2], {}))
            for row in rows
        ]

    def weights(self, competitor: str, seed: int) -> bytes | None:
        """Return the trained weights of a job (content of a safetensors file), or None."""
        with self._connect() as db:
            found = db.execute(
                "SELECT weights FROM jobs WHERE competitor = ? AND seed = ?", (competitor, seed)
            ).fetchone()
        return None if found is None else found[0]

    def drawn(self, competitor: str, seed: int) -> np.ndarray | None:
        """Return the predictions of a job that the report draws, or None."""
        with self._connect() as db:
            found = db.execute(
                "SELECT drawn FROM jobs WHERE competitor = ? AND seed = ?", (competitor, seed)
            ).fetchone()
        return None if found is None or found[0] is None else np.load(io.BytesIO(found[0]), allow_pickle=False)

    def add_cost(self, competitor: str, cost: Mapping[str, float | int | None], error: str | None = None) -> None:
        """Write what a competitor costs to use."""
        with self._connect() as db:
            db.execute(
                "INSERT OR REPLACE INTO costs VALUES (:competitor, :parameters, :flops, :latency_ms, :peak_mb, :error)",
                {"parameters": None, "flops": None, "latency_ms": None, "peak_mb": None}
                | dict(cost)
                | {"competitor": competitor, "error": error},
            )

    def costs(self) -> dict[str, dict[str, float | int | None]]:
        """Return the costs of each competitor that were measured."""
        names = ("parameters", "flops", "latency_ms", "peak_mb")
        with self._connect() as db:
            rows = db.execute("SELECT competitor, parameters, flops, latency_ms, peak_mb FROM costs").fetchall()
        return {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}
