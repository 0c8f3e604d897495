"""Run a benchmark: check that all competitors agree, time them in turn, print a table, record it as JSON.

A benchmark file builds :class:`Case` objects and calls :func:`main`; run it as ``python benchmarks/.../NAME.py
[--record docs/results] [--threads N] [--only TEXT]``. A case whose competitors disagree prints no time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dynakern.measure import describe_environment, peak_memory, time_interleaved


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape and its competitors.

    Attributes:
        name: Shape and what is timed, e.g. ``"forward (1, 192, 16, 3136)"``.
        ours: Our function.
        peers: Label to the function of a competitor on the same input; the first is the one that ratios refer to.
        check: Raises AssertionError if the competitors disagree.
        floor_seconds: Least time that the bytes or FLOPs allow on this machine, or None.
        floor_note: How the floor was computed.
        at_least: The ratio that is aimed at, shown beside the measured one.
        repeats: Counted runs of each competitor.
        memory: Whether to measure peak memory too.
    """

    name: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    check: Callable[[], None]
    floor_seconds: float | None = None
    floor_note: str = ""
    at_least: float | None = None
    repeats: int = 7
    memory: bool = False


def _run(case: Case) -> dict:
    case.check()
    functions = {"dynakern": case.ours, **case.peers}
    times = time_interleaved(functions, repeats=case.repeats)
    memory = {label: peak_memory(function) for label, function in functions.items()} if case.memory else {}
    ours, peer = times["dynakern"].median, times[next(iter(case.peers))].median
    return {
        "case": case.name,
        "times_ms": {
            k: {"median": t.median * 1e3, "lower": t.lower * 1e3, "upper": t.upper * 1e3} for k, t in times.items()
        },
        "peer": next(iter(case.peers)),
        "ratio": peer / ours,
        "at_least": case.at_least,
        "floor_ms": None if case.floor_seconds is None else case.floor_seconds * 1e3,
        "floor_note": case.floor_note,
        "peak_mb": memory,
        "runs": case.repeats,
    }


def main(slug: str, title: str, cases: Callable[[], Iterable[Case]]) -> None:
    """Parse the command line, run the cases, print the table and record it if asked."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--record", type=Path, metavar="DIR", help="write bench_<slug>.json into this folder")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads (default 1)")
    parser.add_argument("--only", default="", help="run only the cases whose name contains this text")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    chosen = [case for case in cases() if arguments.only in case.name]
    rows = [_run(case) for case in track(chosen, description=slug, console=console, transient=True)]
    table = Table("case", "competitor", "median ms", "quartiles", "peer / ours", "floor ms", "peak MB", title=title)
    for row in rows:
        for label, t in row["times_ms"].items():
            mine = label == "dynakern"
            aim = f" (aim {row['at_least']:g})" if row["at_least"] else ""
            table.add_row(
                row["case"] if mine else "",
                label,
                f"{t['median']:.3f}",
                f"{t['lower']:.3f} - {t['upper']:.3f}",
                f"{row['ratio']:.2f}{aim}" if mine else "",
                f"{row['floor_ms']:.3f}" if mine and row["floor_ms"] is not None else "",
                f"{row['peak_mb'][label]:.1f}" if label in row["peak_mb"] else "",
            )
    console.print(table)
    if arguments.record:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {
            "slug": slug,
            "title": title,
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "environment": describe_environment(),
            "rows": rows,
        }
        arguments.record.mkdir(parents=True, exist_ok=True)
        target = arguments.record / f"bench_{slug}.json"
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(target)
        console.print(f"recorded {target}")
