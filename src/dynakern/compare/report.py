"""Turn a comparison into one self-contained HTML file: table, Pareto plot, predictions, environment, command."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynakern.compare.run import Comparison, Summary
from dynakern.measure import describe_environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["format_row", "table_columns", "write_report"]


def table_columns(comparison: Comparison) -> list[str]:
    """Return the column titles of the table, in order."""
    metrics = _metric_names(comparison)
    return ["system", *map(_title, metrics), "parameters", "FLOPs", "train s", "latency ms", "peak MB"]


def _title(metric: str) -> str:
    return metric.upper() if len(metric) <= 4 else metric.replace("_", " ")


def _metric_names(comparison: Comparison) -> list[str]:
    """All metrics in order of first appearance: not every competitor has every one."""
    found = dict.fromkeys(metric for s in comparison.summaries for metric in s.metrics)
    return list(found) or [comparison.task.headline]


def format_row(comparison: Comparison, summary: Summary) -> list[str]:
    """Return one line of the table as text; what is not known is "-", never 0."""
    cells = [summary.competitor]
    for metric in _metric_names(comparison):
        if metric not in summary.metrics:
            cells.append("-")
            continue
        mean, spread = summary.metrics[metric]
        cells.append(f"{mean:.4f} ± {spread:.4f}" if summary.seeds > 1 else f"{mean:.4f}")
    return [
        *cells,
        "-" if summary.parameters is None else _short(summary.parameters),
        "-" if summary.flops is None else _short(summary.flops),
        "-" if summary.train_seconds is None else f"{summary.train_seconds:.1f}",
        "-" if summary.latency_ms is None else f"{summary.latency_ms:.3g}",
        "-" if summary.peak_mb is None else "< 0.1" if summary.peak_mb < 0.1 else f"{summary.peak_mb:.1f}",
    ]


def _short(number: float) -> str:
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= bound:
            return f"{number / bound:.3g} {letter}"
    return str(int(number))


def write_report(comparison: Comparison, path: Path, *, command: str) -> Path:
    """Write the report of a comparison; the file appears whole or not at all.

    Args:
        comparison: What :func:`run_comparison` returned.
        path: The HTML file.
        command: The command line that repeats the comparison.

    Returns:
        ``path``.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("dynakern.compare").joinpath("report.html.j2").read_text(encoding="utf-8"))
    done = [s for s in comparison.summaries if s.metrics]
    predictions = {}
    for summary in done[:5]:
        drawn = comparison.store.drawn(summary.competitor, 0)
        if drawn is not None:
            predictions[summary.competitor] = drawn
    systems = [s for s in done if not s.is_baseline]
    html = template.render(
        title=comparison.task.name,
        item=comparison.task.item,
        notes=comparison.task.notes(),
        description=comparison.task.describe(),
        budget=str(comparison.budget),
        seeds=comparison.seeds,
        columns=table_columns(comparison),
        rows=[(s, format_row(comparison, s), _sort_keys(comparison, s)) for s in comparison.summaries],
        best=done[0] if done else None,
        best_system=systems[0] if systems else None,
        headline=comparison.task.headline,
        headline_title=_title(comparison.task.headline),
        pareto=_svg(_pareto(comparison)) if done else "",
        drawn=_svg(comparison.task.draw(predictions)) if predictions else "",
        errors=[(s.competitor, e) for s in comparison.summaries for e in s.errors],
        repeatable=all(s.repeatable for s in comparison.summaries),
        environment=describe_environment(),
        command=command,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(html, encoding="utf-8")
    temporary.replace(path)
    return path


def _sort_keys(comparison: Comparison, s: Summary) -> list[Any]:
    metrics = [s.metrics.get(m, (float("inf"),))[0] for m in _metric_names(comparison)]
    numbers = [*metrics, s.parameters, s.flops, s.train_seconds, s.latency_ms, s.peak_mb]
    return [s.competitor, *(1e300 if n is None or n == float("inf") else n for n in numbers)]


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point beats in both coordinates (smaller is better), by x."""
    front, lowest = [], float("inf")
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < lowest:
            front.append(index)
            lowest = points[index][1]
    return front


def _pareto(comparison: Comparison) -> Figure:
    from matplotlib.figure import Figure

    metric = comparison.task.headline
    shown = [s for s in comparison.summaries if s.metrics and s.latency_ms]
    # A hopeless competitor must not press all others into one line: it is drawn at the upper edge, with its figure.
    scores = np.array([s.metrics[metric][0] for s in shown] or [1.0])
    ceiling = max(scores.min() + 3 * (np.median(scores) - scores.min()), 1.05 * scores.min(), 1e-12)
    figure, named = Figure(figsize=(11, 4.6), layout="constrained"), []
    for axes, field, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("latency_ms", "train_seconds"),
        (f"latency of one {comparison.task.item}, ms", "training, s"),
        strict=True,
    ):
        usable = [s for s in shown if (getattr(s, field) or 0) > 0]
        points = [(float(getattr(s, field)), s.metrics[metric][0]) for s in usable]
        front = [points[i] for i in pareto_front(points)]
        axes.plot([x for x, _ in front], [min(y, ceiling) for _, y in front], color="0.75", lw=1.2, zorder=1)
        labels = [_mark(axes, s, x, y, s.metrics[metric][1], ceiling) for s, (x, y) in zip(usable, points, strict=True)]
        named.append((axes, labels))
        axes.set_xscale("log")
        axes.margins(x=0.18, y=0.12)
        axes.set_xlabel(label)
        axes.grid(True, color="0.93")
    figure.axes[0].set_ylabel(_title(metric))
    figure.draw_without_rendering()  # only now are places on the paper known
    for axes, labels in named:
        _write_labels(axes, labels)
    return figure


Label = tuple[float, float, str, str]  # place, text, colour


def _mark(axes: Axes, s: Summary, x: float, y: float, spread: float, ceiling: float) -> Label:
    """Draw one competitor; return the label that belongs there."""
    color = "0.45" if s.is_baseline else "C0"
    if y > ceiling:
        axes.plot(x, ceiling, marker="^", color=color)
        text, y = f"{s.competitor} ({y:.2f})", ceiling
    else:
        axes.errorbar(x, y, yerr=spread, fmt="s" if s.is_baseline else "o", color=color, capsize=2, zorder=2)
        text = s.competitor
    return x, y, text, color


def _write_labels(axes: Axes, labels: list[Label]) -> None:
    """Write labels beside their points, from the lowest on, each above those that it would cover."""
    points_per_pixel = 72 / axes.get_figure(root=True).dpi  # pyright: ignore[reportOptionalMemberAccess]
    taken: list[tuple[float, float, float]] = []  # left, right, height, in points
    for x, y, text, color in sorted(labels, key=lambda label: label[1]):
        px, py = axes.transData.transform((x, y)) * points_per_pixel
        left, right, up = px + 6, px + 6 + 5.2 * len(text), 3.0
        while any(abs(py + up - height) < 11 and left < r and l < right for l, r, height in taken):
            up += 2
        taken.append((left, right, py + up))
        line = {"arrowstyle": "-", "color": "0.8", "lw": 0.7} if up > 12 else None
        place: Any = {"textcoords": "offset points", "xytext": (6, up), "arrowprops": line}
        axes.annotate(text, (x, y), fontsize=8.5, color=color, **place)


def _svg(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "dynakern"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
