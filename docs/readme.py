"""Write the README's table of systems from the catalogue; ``--check`` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from dynakern.catalog import SYSTEMS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- systems: begin (make readme) -->", "<!-- systems: end -->"


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| name | what it is | paper | compare |", "| --- | --- | --- | --- |"]
    for s in SYSTEMS:
        lines.append(f"| `{s.slug}` | {s.title} | {s.paper} | {', '.join(sorted(s.tasks)) or '-'} |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite or check the part of the README between the two marks."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        return int(wanted != text)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
