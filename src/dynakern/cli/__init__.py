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

from dynakern.cli.compare import compare_app
from dynakern.cli.console import JsonOption, make_console

if TYPE_CHECKING:
    from dynakern.catalog import System
    from dynakern.claims.run import ClaimResult

app = typer.Typer(
    name="dynakern",
    help="Dynamic kernels for Python: compare them on your own data and re-measure what their papers claim.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(compare_app, name="compare")


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
    console = make_console()
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
    make_console().print(table)


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
    console = make_console()
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A system with a use of its own; `--help` after it tells its options.")],
) -> None:
    """Run a system's own use that is no comparison, with its own options.

    [bold]Example[/bold]

    dynakern run density table.csv
    """
    from dynakern.catalog import SYSTEMS, find_system
    from dynakern.models import import_string

    if name in ("--help", "-h"):
        print(context.get_help())
        return
    system = find_system(name)
    if system.cli is None:
        able = ", ".join(s.slug for s in SYSTEMS if s.cli) or "none yet"
        raise ValueError(f"{name!r} has no use of its own on the command line. Systems that have: {able}.")
    raise typer.Exit(import_string(system.cli)(list(context.args)) or 0)


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
    console = make_console(stderr=True)
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

    console = make_console()
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
