"""Measure all claims into one HTML page: ``python -m dynakern.claims [--record DIR] [--html FILE] [NAME ...]``."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from dynakern.catalog import SYSTEMS, find_system

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>dynakern claims</title><link rel="icon" href="data:,"><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 32px 24px; color: #1c2330; }
table { border-collapse: collapse; width: 100%; margin: 8px 0 28px; } td, th { padding: 6px 10px; text-align: left;
border-bottom: 1px solid #e3e7ee; } .holds { color: #1d6b35; } .falls { color: #a3261b; } .not { color: #8a6100; }
</style></head><body><h1>dynakern claims</h1><p>Measured {{ date }}. {{ counts }}</p>
{% for record in records %}<h2>{{ record.slug }}</h2>
{% for part in record.parts %}
<h3 class="{{ part.verdict.split()[0] }}">
{{ part.part.replace("_", " ") }}: {{ part.verdict }} ({{ part.seconds }} s)</h3>
<p>{{ part.not_measurable or part.description }}</p>
{% if part.measurements %}<table><tr><th>figure</th><th>measured</th><th>baseline</th><th>bound</th></tr>
{% for m in part.measurements %}<tr><td>{{ m.name }}</td><td>{{ "%.4g"|format(m.value) }} {{ m.unit }}</td>
<td>{{ "-" if m.baseline is none else "%.4g"|format(m.baseline) }}</td><td>{{ m.bound }}</td></tr>
{% endfor %}</table>{% endif %}{% endfor %}{% endfor %}</body></html>
"""


def main() -> int:
    """Run the claims one after another, each in a process of its own; returns the worst exit code."""
    parser = argparse.ArgumentParser(prog="python -m dynakern.claims", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="systems; all by default")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write claim_NAME.json into this folder")
    parser.add_argument("--html", type=Path, default=Path("dynakern-claims.html"), help="the page to write")
    arguments = parser.parse_args()
    try:
        names = [find_system(name).slug for name in arguments.names] or [system.slug for system in SYSTEMS]
    except ValueError as error:
        parser.error(str(error))
    records, worst = [], 0
    for name in names:
        command = [sys.executable, "-m", "dynakern", "claim", name, "--json"]
        command += ["--record", str(arguments.record)] if arguments.record else []
        result = subprocess.run(command, capture_output=True, text=True)
        if not result.stdout:
            sys.stderr.write(result.stderr)
            return 2
        record = json.loads(result.stdout)
        records.append(record)
        worst = max(worst, {0: 0, 3: 1, 1: 2}.get(result.returncode, 3))
        for part in record["parts"]:
            sys.stdout.write(f"{name:24} {part['part']:32} {part['verdict']:16} {part['seconds']:>8} s\n")
            sys.stdout.flush()
    _write(arguments.html, records)
    return {0: 0, 1: 3, 2: 1}.get(worst, 2)


def _write(path: Path, records: list[dict]) -> None:
    from jinja2 import Environment

    verdicts = [part["verdict"] for record in records for part in record["parts"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("holds", "falls short", "not measurable")) + "."
    page = Environment(autoescape=True).from_string(_PAGE)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page.render(records=records, counts=counts, date=datetime.date.today().isoformat()))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
