"""Render recorded claims and benchmarks, and the catalogue, as tables: no number on these pages is typed by hand.

Directives: ``.. claim:: SLUG``, ``.. benchmark:: SLUG``, ``.. systems::``.
"""

from __future__ import annotations

import json
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive

from dynakern.catalog import SYSTEMS

RESULTS = Path(__file__).parent.parent / "results"


def _table(header: list[str], rows: list[list[str]]) -> nodes.table:
    table = nodes.table()
    group = nodes.tgroup(cols=len(header))
    table += group
    for _ in header:
        group += nodes.colspec(colwidth=1)
    head, body = nodes.thead(), nodes.tbody()
    group += head
    group += body
    for part, lines in ((head, [header]), (body, rows)):
        for line in lines:
            row = nodes.row()
            part += row
            for text in line:
                entry = nodes.entry()
                entry += nodes.paragraph(text=text)
                row += entry
    return table


def _missing(kind: str, slug: str, command: str) -> list[nodes.Node]:
    return [nodes.paragraph(text=f"No {kind} of {slug} is recorded yet; run {command}.")]


def _note(record: dict) -> nodes.paragraph:
    environment = record["environment"]
    text = (
        f"Recorded {record['date']}: {environment['cpu']}, {environment['threads']} thread(s), "
        f"GPU {environment['gpu']}, torch {environment['torch']}, Python {environment['python']}."
    )
    return nodes.paragraph(text=text)


class Claim(Directive):
    """Table of a recorded claim."""

    required_arguments = 1

    def run(self):
        slug = self.arguments[0]
        path = RESULTS / f"claim_{slug}.json"
        if not path.is_file():
            return _missing("claim", slug, f"dynakern claim {slug} --record docs/results")
        record = json.loads(path.read_text())
        rows = [
            [
                part["part"].replace("_", " "),
                m["name"],
                f"{m['value']:.4g} {m['unit']}",
                "-" if m["baseline"] is None else f"{m['baseline']:.4g}",
                m["bound"],
                {True: "holds", False: "falls short", None: "reported"}[m["holds"]],
            ]
            for part in record["parts"]
            for m in part["measurements"]
        ]
        rows += [
            [part["part"].replace("_", " "), part["not_measurable"], "-", "-", "-", "not measurable"]
            for part in record["parts"]
            if part["not_measurable"]
        ]
        return [_table(["part", "figure", "measured", "baseline", "bound", "verdict"], rows), _note(record)]


class Benchmark(Directive):
    """Table of a recorded benchmark."""

    required_arguments = 1

    def run(self):
        slug = self.arguments[0]
        path = RESULTS / f"bench_{slug}.json"
        if not path.is_file():
            return _missing("benchmark", slug, "the file of that name in benchmarks/ with --record docs/results")
        record = json.loads(path.read_text())
        rows = []
        for row in record["rows"]:
            for label, t in row["times_ms"].items():
                mine = label == "dynakern"
                rows.append(
                    [
                        row["case"] if mine else "",
                        label,
                        f"{t['median']:.3f} ({t['lower']:.3f} - {t['upper']:.3f})",
                        f"{row['ratio']:.2f} x" if mine else "",
                        f"{row['floor_ms']:.3f}" if mine and row["floor_ms"] is not None else "",
                        f"{row['peak_mb'][label]:.1f}" if label in row["peak_mb"] else "",
                    ]
                )
        notes = {row["floor_note"] for row in record["rows"] if row["floor_note"]}
        header = ["case", "competitor", "median ms (quartiles)", "first peer / ours", "floor ms", "peak MB"]
        result = [_table(header, rows), _note(record)]
        return result + [nodes.paragraph(text=f"Floor: {note}.") for note in sorted(notes)]


class Systems(Directive):
    """Table of all systems."""

    def run(self):
        rows = [[s.slug, s.title, s.paper, s.wing, ", ".join(sorted(s.tasks)) or "-"] for s in SYSTEMS]
        return [_table(["name", "what it is", "paper", "wing", "compare"], rows)]


def setup(app):
    """Register the directives."""
    app.add_directive("claim", Claim)
    app.add_directive("benchmark", Benchmark)
    app.add_directive("systems", Systems)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
