"""Run a comparison: every competitor with every seed is a job; results are written as they arrive; a rerun resumes."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import joblib
import numpy as np
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import TerminatedWorkerError

from dynakern.checks import check_positive, require, unknown_name
from dynakern.compare.store import JobRow, Store
from dynakern.train import Budget

__all__ = ["Comparison", "Summary", "Task", "run_comparison"]


class Task(Protocol):
    """What can be compared on: a problem that trains, scores and measures its competitors by name.

    ``dynakern.tasks.ForecastTask`` is one. Objects must be picklable, since jobs may run in other processes.
    """

    name: str
    headline: str
    item: str

    def settings(self) -> dict[str, str]:
        """Return what makes two comparisons the same, as text."""
        ...

    def describe(self) -> str:
        """Return the problem in a sentence."""
        ...

    def notes(self) -> str:
        """Return what the columns mean, for the report."""
        ...

    def competitors(self) -> list[str]:
        """Return the names of everything that can compete."""
        ...

    def baselines(self) -> list[str]:
        """Return the names of the baselines, which always compete."""
        ...

    def is_deterministic(self, name: str) -> bool:
        """Whether one seed is enough for a competitor."""
        ...

    def run(self, name: str, *, seed: int, budget: Budget, device: str | None, progress: Any) -> Any:
        """Train and score a competitor; returns metrics, fit, weights and drawn predictions."""
        ...

    def cost(self, name: str, *, seed: int, weights: bytes | None, device: str | None) -> Any:
        """Measure what a trained competitor costs to use."""
        ...

    def draw(self, predictions: dict[str, np.ndarray]) -> Any:
        """Return a matplotlib figure of drawn predictions over the truth, best competitor first."""
        ...


@dataclass(frozen=True)
class Summary:
    """One line of the table: a competitor's scores over its seeds and its costs; None is "not known"."""

    competitor: str
    is_baseline: bool
    seeds: int
    metrics: dict[str, tuple[float, float]]
    train_seconds: float | None
    epochs: float | None
    parameters: int | None
    flops: int | None
    latency_ms: float | None
    peak_mb: float | None
    errors: tuple[str, ...]
    repeatable: bool


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: the task, the results file and the table, best first."""

    task: Task
    store: Store
    budget: Budget
    seeds: int
    summaries: tuple[Summary, ...]

    @property
    def failed(self) -> bool:
        """Whether any job failed."""
        return any(summary.errors for summary in self.summaries)


def run_comparison(
    task: Task,
    *,
    out: Path,
    systems: Sequence[str] | None = None,
    seeds: int = 3,
    budget: Budget | None = None,
    jobs: int = 1,
    cluster: str | None = None,
    device: str | None = None,
    report_job: Callable[[str, int, JobRow | None, float], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """Compare systems and baselines on a task.

    Args:
        task: The problem.
        out: Folder of the results file; a comparison that was interrupted there is resumed.
        systems: Names of the systems; all by default. Baselines always compete.
        seeds: Number of seeds 0, 1, ... of each competitor.
        budget: Training budget of a job; 10 epochs by default. Budgets in seconds are marked not repeatable.
        jobs: Local processes; 1 runs the jobs one after another here.
        cluster: Address of a Dask scheduler (``tcp://host:port``), or ``"ray"`` for a running Ray cluster.
        device: Device of the networks.
        report_job: Called as ``(competitor, seed, row, fraction)`` after every job.
        progress: Called with a text and a fraction inside a job, where jobs run one after another.

    Raises:
        ValueError: A system is unknown, a count is out of range, or ``out`` holds another comparison.
    """
    check_positive("seeds", seeds, integer=True)
    if jobs != -1:
        check_positive("jobs", jobs, integer=True)
    budget = budget or Budget(epochs=10)
    known = task.competitors()
    chosen = [name for name in known if name not in task.baselines()] if systems is None else list(systems)
    for name in chosen:
        if name not in known:
            raise ValueError(unknown_name("system", name, known))
    names = list(dict.fromkeys([*task.baselines(), *chosen]))
    store = Store(out / "results.sqlite", {**task.settings(), "budget": str(budget)})
    todo = [(n, s) for n in names for s in range(1 if task.is_deterministic(n) else seeds)]
    missing = [job for job in todo if job not in store.finished()]
    repeatable = budget.epochs is not None
    parallel = cluster is not None or jobs != 1
    for done, (name, seed, outcome, error) in enumerate(
        _run_jobs(task, missing, budget, jobs, cluster, device, None if parallel else progress), 1
    ):
        row = _row(name, seed, outcome, error, repeatable or task.is_deterministic(name))
        weights, drawn = (None, None) if outcome is None else (outcome.weights, outcome.drawn)
        store.add(row, weights=weights, drawn=drawn)
        if report_job is not None:
            report_job(name, seed, row, done / len(missing))
    _measure_costs(task, store, names, device, progress)
    return Comparison(task, store, budget, seeds, tuple(_summarise(task, store, names, seeds)))


def _run_jobs(
    task: Task,
    todo: Sequence[tuple[str, int]],
    budget: Budget,
    jobs: int,
    cluster: str | None,
    device: str | None,
    progress: Callable[[str, float], None] | None,
) -> Iterator[tuple[str, int, Any, str | None]]:
    if not todo:
        return
    if cluster is None and jobs == 1:
        for name, seed in todo:
            yield _one_job(task, name, seed, budget, device, progress)
        return
    left = dict.fromkeys(todo)
    try:
        with _backend(jobs, cluster), warnings.catch_warnings():
            # A worker that grew is replaced by a fresh one, which is no concern of who waits for results.
            warnings.filterwarnings(
                "ignore", message="A worker stopped while some jobs were given", category=UserWarning
            )
            parallel: Any = joblib.Parallel(n_jobs=-1 if cluster else jobs, return_as="generator_unordered")
            for result in parallel(joblib.delayed(_one_job)(task, *job, budget, device, None) for job in todo):
                del left[result[:2]]
                yield result
    except TerminatedWorkerError:
        # A worker died (out of memory, a crash), and nobody knows of which job: give each that is left its own process.
        for job in left:
            yield _isolated_job(task, *job, budget, device)


def _isolated_job(
    task: Task, name: str, seed: int, budget: Budget, device: str | None
) -> tuple[str, int, Any, str | None]:
    """Run one job in a process of its own; if that dies, the job has failed and nothing else has."""
    with ProcessPoolExecutor(max_workers=1) as executor:
        try:
            return executor.submit(_one_job, task, name, seed, budget, device, None).result()
        except TerminatedWorkerError as error:
            return name, seed, None, f"The process of this job died: {str(error).splitlines()[0]}"


@contextlib.contextmanager
def _backend(jobs: int, cluster: str | None) -> Iterator[None]:
    if cluster is None:
        with joblib.parallel_config(backend="loky", n_jobs=jobs):
            yield
    elif cluster == "ray":
        require("ray.util.joblib", extra="cluster").register_ray()
        with joblib.parallel_config(backend="ray"):
            yield
    else:
        distributed = require("distributed", extra="cluster")
        try:
            client = distributed.Client(cluster, timeout="10s", set_as_default=True)
        except OSError as error:
            raise ValueError(f"No Dask scheduler answers at {cluster!r}: {error}.") from error
        with client, joblib.parallel_config(backend="dask"):
            yield


def _one_job(
    task: Task, name: str, seed: int, budget: Budget, device: str | None, progress: Any
) -> tuple[str, int, Any, str | None]:
    try:
        return name, seed, task.run(name, seed=seed, budget=budget, device=device, progress=progress), None
    except Exception as error:  # a failing job is a row with its error, and the others go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        return name, seed, None, f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"


def _row(name: str, seed: int, outcome: Any, error: str | None, repeatable: bool) -> JobRow:
    if outcome is None:
        return JobRow(name, seed, "failed", error, None, None, None, repeatable, {})
    fit = outcome.fit
    return JobRow(name, seed, "done", None, fit.seconds, fit.epochs, fit.steps, repeatable, outcome.metrics)


def _measure_costs(
    task: Task, store: Store, names: Iterable[str], device: str | None, progress: Callable[[str, float], None] | None
) -> None:
    """Measure each competitor once, one at a time, after all training."""
    known, done = store.costs(), store.finished()
    names = [name for name in names if name not in known and any(job[0] == name for job in done)]
    for index, name in enumerate(names):
        if progress is not None:
            progress(f"measuring {name}", index / len(names))
        seed = min(seed for job, seed in done if job == name)
        try:
            cost = asdict(task.cost(name, seed=seed, weights=store.weights(name, seed), device=device))
        except Exception as error:  # costs that cannot be measured leave a gap in the table, with their reason
            store.add_cost(name, {}, error=f"{type(error).__name__}: {error}")
        else:
            store.add_cost(name, cost)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _summarise(task: Task, store: Store, names: Sequence[str], seeds: int) -> list[Summary]:
    costs, rows = store.costs(), [row for row in store.jobs() if row.seed < seeds]
    summaries = []
    for name in names:
        mine = [row for row in rows if row.competitor == name]
        done = [row for row in mine if row.status == "done"]
        metrics = {}
        for metric in done[0].metrics if done else ():
            values = np.array([row.metrics[metric] for row in done])
            metrics[metric] = (float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0)
        cost = costs.get(name, {})
        summaries.append(
            Summary(
                competitor=name,
                is_baseline=name in task.baselines(),
                seeds=len(done),
                metrics=metrics,
                train_seconds=_mean([row.train_seconds for row in done]),
                epochs=_mean([row.epochs for row in done]),
                parameters=cost.get("parameters"),  # pyright: ignore[reportArgumentType]
                flops=cost.get("flops"),  # pyright: ignore[reportArgumentType]
                latency_ms=cost.get("latency_ms"),
                peak_mb=cost.get("peak_mb"),
                errors=tuple(f"seed {row.seed}: {row.error}" for row in mine if row.status == "failed"),
                repeatable=all(row.repeatable for row in mine),
            )
        )
    return sorted(summaries, key=lambda s: s.metrics.get(task.headline, (float("inf"), 0.0))[0])
