"""``dynakern compare``: one command a task, one way to run and print a comparison."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynakern.cli.console import JsonOption, make_console

if TYPE_CHECKING:
    from dynakern.compare import Comparison, JobRow

__all__ = ["compare_app"]

compare_app = typer.Typer(
    help="Compare kernels and baselines on your own data: a table of scores and costs, database rows, an HTML report.",
    no_args_is_help=True,
)


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


TableArgument = Annotated[str, typer.Argument(help="CSV with a header, file of numbers, or sklearn:NAME.")]
SystemsOption = Annotated[str | None, typer.Option(help="Comma-separated names; all that can by default.")]
SeedsOption = Annotated[int, typer.Option(help="Runs of each competitor, for the spread.")]
RowsOption = Annotated[int | None, typer.Option(help="Train on at most so many rows, drawn at random.")]
OutOption = Annotated[Path | None, typer.Option(help="Folder of results and report; run again to resume there.")]
JobsOption = Annotated[int, typer.Option(help="Local processes that train at the same time; -1 for one a core.")]
ClusterOption = Annotated[str | None, typer.Option(help="Dask scheduler tcp://host:port, or 'ray'.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the table only.")]
TargetOption = Annotated[str | None, typer.Option(help="Column to predict; the last one by default.")]


@compare_app.command("classify")
def compare_classify(
    data: TableArgument,
    target: TargetOption = None,
    rows: RowsOption = None,
    systems: SystemsOption = None,
    seeds: SeedsOption = 3,
    out: OutOption = None,
    jobs: JobsOption = 1,
    cluster: ClusterOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which kernels classify the rows of this table best, and at what cost?

    NAME_test_0.txt beside NAME.txt holds the numbers of the test rows; other tables are split 75/25, stratified.
    Baselines: logistic regression, an RBF support vector machine, gradient boosting.

    [bold]Examples[/bold]

    dynakern compare classify sklearn:wine --seeds 1

    dynakern compare classify patients.csv --target diagnosis
    """
    from dynakern.data.tables import read_sample_table
    from dynakern.tasks.classify import ClassifyTask

    task = ClassifyTask(read_sample_table(data, target=target), max_rows=rows)
    _compare(task, _stem(data), systems, seeds, _ONE_FIT, out, jobs, cluster, None, quiet, as_json)


@compare_app.command("regress")
def compare_regress(
    data: TableArgument,
    target: TargetOption = None,
    rows: RowsOption = None,
    systems: SystemsOption = None,
    seeds: SeedsOption = 3,
    out: OutOption = None,
    jobs: JobsOption = 1,
    cluster: ClusterOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which kernels predict a number from the rows of this table best, how sure are they, and at what cost?

    Scores are in the units of the table; NLL and coverage where a competitor knows its uncertainty. Baselines: Bayesian
    ridge, an RBF support vector machine, gradient boosting.

    [bold]Examples[/bold]

    dynakern compare regress sklearn:diabetes --seeds 1

    dynakern compare regress houses.csv --target price --rows 2000
    """
    from dynakern.data.tables import read_sample_table
    from dynakern.tasks.regress import RegressTask

    task = RegressTask(read_sample_table(data, target=target), max_rows=rows)
    _compare(task, _stem(data), systems, seeds, _ONE_FIT, out, jobs, cluster, None, quiet, as_json)


@compare_app.command("density")
def compare_density(
    data: TableArgument,
    target: Annotated[str | None, typer.Option(help="Column to leave out, such as a label.")] = None,
    rows: RowsOption = None,
    systems: SystemsOption = None,
    seeds: SeedsOption = 3,
    out: OutOption = None,
    jobs: JobsOption = 1,
    cluster: ClusterOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Which kernels say best how probable a row is, and at what cost?

    Baselines: a normal distribution, a mixture of four, and scikit-learn's kernel density with the bandwidth of Scott's
    rule or by cross-validation.

    [bold]Example[/bold]

    dynakern compare density sklearn:digits --seeds 1
    """
    from dynakern.data.tables import read_sample_table
    from dynakern.tasks.density import DensityTask

    task = DensityTask(read_sample_table(data, target=target, supervised=False), max_rows=rows)
    _compare(task, _stem(data), systems, seeds, _ONE_FIT, out, jobs, cluster, None, quiet, as_json)


_ONE_FIT = "1ep"  # estimators are fitted once: they know no budget


def _stem(data: str) -> Path:
    return Path(data.removeprefix("sklearn:"))


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
        make_console(stderr=True).print(task.describe())
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

    console = make_console(stderr=True)

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
    console = make_console()
    console.print(table)
    for summary in comparison.summaries:
        for error in summary.errors:
            make_console(stderr=True).print(f"{summary.competitor} failed, {error}", style="red", markup=False)
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
