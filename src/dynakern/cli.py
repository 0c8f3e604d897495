"""The command line: parses, calls, prints; nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from dynakern.catalog import System
    from dynakern.claims.run import ClaimResult
    from dynakern.compare import Comparison, JobRow

app = typer.Typer(
    name="dynakern",
    help="Dynamic kernels for Python: compare them on your own data and re-measure what their papers claim.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
compare_app = typer.Typer(
    help="Compare kernels and baselines on your own data: a table of scores and costs, database rows, an HTML report.",
    no_args_is_help=True,
)
app.add_typer(compare_app, name="compare")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


def main() -> None:
    """Run the command line: exit 0 done, 1 fell short or a job failed, 2 bad usage or input."""
    try:
        app()
    except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
        if os.environ.get("DYNAKERN_TRACEBACK"):
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, e.g. `dynakern list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _fail(message: str) -> None:
    print(f"dynakern: {message}", file=sys.stderr)
    sys.exit(2)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width of its own: wide enough that no cell of a table is cut there.
    width = None if stream.isatty() else 160
    return Console(stderr=stderr, highlight=False, width=width, no_color=None if stream.isatty() else True)


@app.command("list")
def list_command(
    wing: Annotated[str | None, typer.Option(help="Only the systems of one wing, e.g. sequence.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the systems: name, what it is, where it lives, what it can be compared on."""
    from dynakern.catalog import SYSTEMS
    from dynakern.checks import unknown_name

    wings = sorted({s.wing for s in SYSTEMS})
    if wing is not None and wing not in wings:
        raise ValueError(unknown_name("wing", wing, wings))
    chosen = [s for s in SYSTEMS if wing in (None, s.wing)]
    if as_json:
        print(json.dumps([_facts(s) for s in chosen], indent=1))
        return
    from rich.table import Table

    table = Table("name", "wing", "what it is", "compare", box=None, pad_edge=False, header_style="bold")
    for s in chosen:
        table.add_row(s.slug, s.wing, s.title, ", ".join(sorted(s.tasks)) or "-")
    console = _console()
    console.print(table)
    if console.is_terminal:
        console.print(f"\n{len(chosen)} systems. [dim]dynakern show NAME[/dim] tells more about one.")


def _facts(s: System) -> dict[str, Any]:
    return {
        "name": s.slug,
        "title": s.title,
        "paper": s.paper,
        "wing": s.wing,
        "kind": s.kind,
        "public names": [name.replace(":", ".") for name in s.names],
        "variants": list(s.variants),
        "compare": sorted(s.tasks),
        "claim": f"dynakern claim {s.slug}",
    }


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A system or a model variant, as `dynakern list` prints it.")],
    as_json: JsonOption = False,
) -> None:
    """Show one system: its paper, public names, variants and tasks; or one model variant and its arguments."""
    from dynakern.catalog import SYSTEMS, find_system
    from dynakern.models import list_models, model_info

    if name not in [s.slug for s in SYSTEMS] and name in list_models():
        facts: dict[str, Any] = dict(model_info(name))
    else:
        facts = _facts(find_system(name))
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in facts.items():
        table.add_row(f"[dim]{key}[/dim]", ", ".join(value) if isinstance(value, list) else str(value))
    _console().print(table)


@compare_app.command("forecast")
def compare_forecast(
    data: Annotated[Path, typer.Argument(help="CSV file: a header, one time column (optional), number columns.")],
    target: Annotated[str | None, typer.Option(help="Forecast this column alone, from its own past.")] = None,
    multivariate: Annotated[
        bool, typer.Option("--multivariate", help="Forecast all columns together (default).")
    ] = False,
    horizon: Annotated[int, typer.Option(help="Steps to forecast.")] = 96,
    context: Annotated[int, typer.Option(help="Steps a forecast may see.")] = 96,
    systems: Annotated[str | None, typer.Option(help="Comma-separated names; all that forecast by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each competitor, for the spread.")] = 3,
    budget: Annotated[
        str, typer.Option(help="Training of one job: 60s, 5m or 10ep. Only epochs are repeatable.")
    ] = "60s",
    protocol: Annotated[
        str, typer.Option(help="Split: 'ratio' 70/10/20 %, or 'ett' 12/4/4 months of 30 days.")
    ] = "ratio",
    time_column: Annotated[
        str | None, typer.Option(help="Name of the time column, where it is not found by itself.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results and report; run again to resume there.")] = None,
    jobs: Annotated[int, typer.Option(help="Local processes that train at the same time; -1 for one a core.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="Dask scheduler tcp://host:port, or 'ray'.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the table only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which kernels forecast these series best, and at what cost?

    Trains every system and four baselines (repeat the last value, repeat the last season, a linear map, boosted trees
    on lags) on the same windows, scores them on all test windows, measures what each costs to use, and writes
    OUT/report.html and OUT/results.sqlite. Killed in the middle? The same command goes on where it stopped.

    [bold]Examples[/bold]

    dynakern compare forecast ETTh1.csv --protocol ett --budget 3ep --seeds 1

    dynakern compare forecast load.csv --target OT --horizon 24 --systems s4d,timesnet --jobs 4
    """
    if target is not None and multivariate:
        raise ValueError("--target and --multivariate exclude each other.")
    _check_budget_and_device(budget, device)
    from dynakern.data.series import read_series_csv
    from dynakern.tasks.forecast import ForecastTask

    table = read_series_csv(data, time_column=time_column)
    table = table if target is None else table.select(target)
    task = ForecastTask(table, context=context, horizon=horizon, protocol=protocol)  # pyright: ignore
    _compare(task, data, systems, seeds, budget, out, jobs, cluster, device, quiet, as_json)


@compare_app.command("classify-series")
def compare_classify_series(
    data: Annotated[Path, typer.Argument(help="NAME.ts, UCR .txt/.tsv, .npz (X, y), .hea, or a folder or zip of WAV.")],
    features: Annotated[str, typer.Option(help="'raw' values, or 'spectrogram' for recordings.")] = "raw",
    max_length: Annotated[int | None, typer.Option(help="Average longer series over blocks until they fit.")] = None,
    systems: Annotated[str | None, typer.Option(help="Comma-separated names; all that classify by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each competitor, for the spread.")] = 3,
    budget: Annotated[
        str, typer.Option(help="Training of one job: 60s, 5m or 30ep. Only epochs are repeatable.")
    ] = "60s",
    out: Annotated[Path | None, typer.Option(help="Folder of results and report; run again to resume there.")] = None,
    jobs: Annotated[int, typer.Option(help="Local processes that train at the same time; -1 for one a core.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="Dask scheduler tcp://host:port, or 'ray'.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the table only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which kernels classify these series best, and at what cost?

    Series may have unequal lengths and several channels. NAME_TRAIN.ts brings NAME_TEST.ts as its test part; other data
    is split 75/25, stratified. Baselines: nearest neighbour under time warping, random convolution kernels with a ridge
    classifier, and PyTorch's LSTM.

    [bold]Examples[/bold]

    dynakern compare classify-series ArrowHead_TRAIN.ts --budget 30ep

    dynakern compare classify-series recordings.zip --features spectrogram --jobs 2
    """
    _check_budget_and_device(budget, device)
    from dynakern.data.labelled import read_labelled_series
    from dynakern.tasks.classify_series_task import ClassifySeriesTask

    task = ClassifySeriesTask(read_labelled_series(data), features=features, max_length=max_length)  # pyright: ignore
    _compare(task, data, systems, seeds, budget, out, jobs, cluster, device, quiet, as_json)


@compare_app.command("classify-images")
def compare_classify_images(
    data: Annotated[
        Path | None, typer.Argument(help="Folder or .zip with one folder a class, or .npz (X, y); digits by default.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Bring pictures to squares of this side first.")] = None,
    augment: Annotated[str, typer.Option(help="'none', 'shift' or 'shift-flip', in training.")] = "none",
    match: Annotated[
        str | None, typer.Option(help="Bring all networks to one size: parameters:300k or flops:20M.")
    ] = None,
    systems: Annotated[str | None, typer.Option(help="Comma-separated names; all that classify by default.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each competitor, for the spread.")] = 3,
    budget: Annotated[
        str, typer.Option(help="Training of one job: 60s, 5m or 30ep. Only epochs are repeatable.")
    ] = "60s",
    out: Annotated[Path | None, typer.Option(help="Folder of results and report; run again to resume there.")] = None,
    jobs: Annotated[int, typer.Option(help="Local processes that train at the same time; -1 for one a core.")] = 1,
    cluster: Annotated[str | None, typer.Option(help="Dask scheduler tcp://host:port, or 'ray'.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the table only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which kernels classify these images best, and at what cost?

    Folders train and test (or val) are the published parts; other data is split 75/25, stratified. Without DATA the
    1,797 digits of scikit-learn are taken. Baselines: logistic regression on pixels, a ResNet and a ConvNeXt.

    [bold]Examples[/bold]

    dynakern compare classify-images --budget 10ep --seeds 1

    dynakern compare classify-images photos/ --size 64 --augment shift-flip --match parameters:300k --jobs 2
    """
    _check_budget_and_device(budget, device)
    from dynakern.data.images import load_digits, read_labelled_images
    from dynakern.tasks.classify_images_task import ClassifyImagesTask, Match

    images = load_digits() if data is None else read_labelled_images(data, size=size)
    wanted = None if match is None else Match.parse(match)
    task = ClassifyImagesTask(images, augment=augment, match=wanted)  # pyright: ignore
    _compare(task, data or Path("digits"), systems, seeds, budget, out, jobs, cluster, device, quiet, as_json)


def _check_budget_and_device(budget: str, device: str | None) -> None:
    import torch

    from dynakern.train import Budget

    Budget.parse(budget)
    if device is not None and device not in ("cpu", "cuda") and not device.startswith("cuda:"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}.")
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here.")


def _compare(
    task: Any,
    data: Path,
    systems: str | None,
    seeds: int,
    budget: str,
    out: Path | None,
    jobs: int,
    cluster: str | None,
    device: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    from dynakern.compare import run_comparison, write_report
    from dynakern.train import Budget

    folder = out or Path(f"dynakern-compare-{data.stem}")
    chosen = None if systems is None else [name.strip() for name in systems.split(",") if name.strip()]
    silent = quiet or as_json
    if not silent:
        _console(stderr=True).print(task.describe())
    with _job_progress(silent) as (report_job, progress):
        comparison = run_comparison(
            task,
            out=folder,
            systems=chosen,
            seeds=seeds,
            budget=Budget.parse(budget),
            jobs=jobs,
            cluster=cluster,
            device=device,
            report_job=report_job,
            progress=progress,
        )
    report = write_report(comparison, folder / "report.html", command=_command_line())
    if as_json:
        print(json.dumps(_comparison_as_dict(comparison, report), indent=1))
    else:
        _print_comparison(comparison, report, quiet)
    if comparison.failed:
        raise typer.Exit(1)


def _command_line() -> str:
    import shlex

    return shlex.join(["dynakern", *sys.argv[1:]])


@contextlib.contextmanager
def _job_progress(silent: bool) -> Iterator[tuple[Any, Any]]:
    """Give callbacks that draw a progress bar on a terminal and print one line a job elsewhere."""
    if silent:
        yield None, None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = _console(stderr=True)

    def job_text(name: str, seed: int, row: JobRow | None) -> str:
        assert row is not None
        if row.status == "failed":
            return f"{name} (seed {seed}) failed: {row.error}"
        scores = ", ".join(f"{metric} {value:.4f}" for metric, value in row.metrics.items())
        took = "" if row.train_seconds is None else f", {row.train_seconds:.1f} s"
        return f"{name} (seed {seed}): {scores}{took}"

    if not console.is_terminal:
        yield lambda name, seed, row, fraction: print(job_text(name, seed, row), file=sys.stderr, flush=True), None
        return
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        whole, current = bars.add_task("all jobs", total=1.0), bars.add_task("", total=1.0)

        def report_job(name: str, seed: int, row: JobRow | None, fraction: float) -> None:
            bars.console.print(job_text(name, seed, row))
            bars.update(whole, completed=fraction)

        yield report_job, lambda text, fraction: bars.update(current, completed=fraction, description=text)


def _print_comparison(comparison: Comparison, report: Path, quiet: bool) -> None:
    from rich.table import Table

    from dynakern.compare.report import format_row, table_columns

    columns = table_columns(comparison)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for index, summary in enumerate(comparison.summaries):
        cells = format_row(comparison, summary)
        cells[0] += " *" if summary.is_baseline else ""
        table.add_row(*cells, style="bold" if index == 0 else None)
    console = _console()
    console.print(table)
    for summary in comparison.summaries:
        for error in summary.errors:
            _console(stderr=True).print(f"{summary.competitor} failed, {error}", style="red", markup=False)
    if not quiet:
        console.print("\n* baseline. Best first; mean ± spread over seeds on the whole test part, lower is better.")
        console.print(f"Report: {report}\nRows:   {comparison.store.path}", soft_wrap=True)


def _comparison_as_dict(comparison: Comparison, report: Path) -> dict[str, Any]:
    from dataclasses import asdict

    rows = [asdict(summary) for summary in comparison.summaries]
    for row in rows:
        row["metrics"] = {k: {"mean": mean, "std": std} for k, (mean, std) in row["metrics"].items()}
    settings = {**comparison.task.settings(), "budget": str(comparison.budget), "seeds": comparison.seeds}
    return {"settings": settings, "results": rows, "report": str(report), "database": str(comparison.store.path)}


@app.command()
def lens(
    name: Annotated[str | None, typer.Argument(help="A model variant, as `dynakern show SYSTEM` lists them.")] = None,
    model: Annotated[str | None, typer.Option(help="Your own: file.py:function, which returns a torch module.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Checkpoint to load; random weights without.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--input", help="Picture to crop inputs from; two photographs.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Random inputs of this shape instead: 96,7 or 3,64,64.")] = None,
    size: Annotated[int, typer.Option(help="Side of the crops.")] = 128,
    inputs: Annotated[int, typer.Option(help="Number of inputs, at least 2.")] = 6,
    out: Annotated[Path | None, typer.Option(help="Picture to write: .png, .svg or .pdf.")] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and inputs.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw the kernel that a network applies: how far it sees, how it changes with the input, what it costs.

    [bold]Examples[/bold]

    dynakern lens unireplknet_a --input photo.jpg

    dynakern lens --model mine.py:network --shape 3,64,64
    """
    import torch

    from dynakern.data.images import read_image
    from dynakern.lens import look
    from dynakern.lens.look import load_function, sample_crops
    from dynakern.models import create_model, load_official

    if (name is None) == (model is None):
        raise ValueError("Name one of the library's models, or give --model file.py:function.")
    if inputs < 2:
        raise ValueError(f"--inputs must be at least 2, got {inputs}.")
    if shape is not None and picture is not None:
        raise ValueError("--shape and --input exclude each other.")
    torch.manual_seed(seed)
    network = create_model(name) if name is not None else load_function(str(model))()
    if not isinstance(network, torch.nn.Module):
        raise TypeError(f"{model} must return a torch.nn.Module, got {type(network).__name__}.")
    if weights is not None:
        load_official(network, weights)
    if shape is not None:
        sizes = _shape(shape)
        x = torch.randn(inputs, *sizes, generator=torch.Generator().manual_seed(seed))
    else:
        x = sample_crops(size, inputs, picture=None if picture is None else read_image(picture), seed=seed)
    result = look(network, x, name=name or str(model))
    target = result.save(out or Path(f"dynakern-lens-{name or Path(str(model)).stem.partition(':')[0]}.png"))
    if as_json:
        print(json.dumps({**result.summary(), "picture": str(target)}, indent=1))
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in result.summary().items():
        table.add_row(
            f"[dim]{key}[/dim]", "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
        )
    console = _console()
    console.print(table)
    console.print(f"Picture: {target}", soft_wrap=True)


def _shape(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--shape must be whole numbers with commas, like 3,64,64, got {text!r}.") from error
    if min(sizes) < 1:
        raise ValueError(f"--shape must be positive, got {text!r}.")
    return sizes


@app.command()
def claim(
    name: Annotated[str, typer.Argument(help="The system whose paper's claim is measured.")],
    part: Annotated[str | None, typer.Option(help="Only this part of the claim.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write claim_NAME.json into this folder.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what a paper claims, beside a baseline, on this machine: it holds or it falls short.

    Exit 0: holds. 1: falls short. 2: bad usage. 3: not measurable here (data, an extra or a device is missing).
    """
    from dynakern.claims.run import run_claim

    results = []
    with _claim_progress(quiet or as_json) as progress:
        for result in run_claim(name, only=part, progress=progress):
            results.append(result)
            if not as_json:
                _print_claim(result)
    document = _claim_record(name, results)
    if as_json:
        print(json.dumps(document, indent=1))
    if record is not None:
        record.mkdir(parents=True, exist_ok=True)
        temporary = record / f"claim_{name}.json.tmp"
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(record / f"claim_{name}.json")
    verdicts = {result.verdict for result in results}
    raise typer.Exit(1 if "falls short" in verdicts else 3 if "not measurable" in verdicts else 0)


def _claim_record(name: str, results: list[ClaimResult]) -> dict[str, Any]:
    import datetime

    from dynakern.measure import describe_environment

    return {
        "slug": name,
        "date": datetime.date.today().isoformat(),
        "environment": describe_environment(),
        "parts": [result.as_dict() for result in results],
    }


@contextlib.contextmanager
def _claim_progress(silent: bool) -> Iterator[Any]:
    console = _console(stderr=True)
    if silent or not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("measuring", total=1.0)
        yield lambda text, fraction: bars.update(task, description=text, completed=fraction)


def _print_claim(result: ClaimResult) -> None:
    from rich.table import Table

    console = _console()
    style = {"holds": "green", "falls short": "red"}.get(result.verdict, "yellow")
    title = f"{result.part.replace('_', ' ')}: [{style}]{result.verdict}[/{style}] ({result.seconds:.0f} s)"
    console.print(title)
    if result.description:
        console.print(f"  {result.description}", style="dim", markup=False)
    if result.not_measurable:
        console.print(f"  {result.not_measurable}", markup=False)
    table = Table("figure", "measured", "baseline", "bound", "", box=None, header_style="dim", padding=(0, 2))
    for m in result.measurements:
        verdict = {True: "holds", False: "falls short", None: ""}[m.holds]
        baseline = "-" if m.baseline is None else f"{m.baseline:.4g}"
        table.add_row(m.name, f"{m.value:.4g} {m.unit}", baseline, m.bound, verdict)
    console.print(table)


if __name__ == "__main__":
    main()
