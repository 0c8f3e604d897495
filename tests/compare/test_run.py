"""Comparing: rows as they arrive, resume after a kill, parallel workers, a real Dask cluster, failing jobs."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from dynakern.compare import Store, run_comparison, write_report
from dynakern.compare.report import format_row, pareto_front, table_columns
from dynakern.data.series import SeriesTable
from dynakern.tasks.forecast import ForecastTask
from dynakern.train import Budget


def small_table(rows=420):
    t = np.arange(rows)
    rng = np.random.default_rng(0)
    times = np.datetime64("2024-01-01", "s") + t * np.timedelta64(3600, "s")
    values = np.sin(2 * np.pi * t / 24)[:, None] + 0.2 * rng.standard_normal((rows, 1))
    return SeriesTable(values, ("x",), times, "test")


def small_task(rows=420):
    return ForecastTask(small_table(rows), context=48, horizon=12)


def write_csv(path, rows=420):
    table = small_table(rows)
    lines = [f"{str(t).replace('T', ' ')},{v:.6f}" for t, v in zip(table.timestamps, table.values[:, 0], strict=True)]
    path.write_text("date,x\n" + "\n".join(lines) + "\n")
    return path


def scores(comparison):
    return {(row.competitor, row.seed): row.metrics["mse"] for row in comparison.store.jobs() if row.metrics}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    return run_comparison(small_task(), out=out, systems=[], seeds=2, budget=Budget(epochs=2))


def test_every_competitor_and_seed_is_a_row(plain):
    assert set(scores(plain)) == {
        ("repeat_last", 0),
        ("seasonal_naive", 0),
        *(("linear", s) for s in (0, 1)),
        *(("gradient_boosting", s) for s in (0, 1)),
    }
    order = [s.metrics["mse"][0] for s in plain.summaries]
    assert order == sorted(order)
    linear = next(s for s in plain.summaries if s.competitor == "linear")
    values = [scores(plain)["linear", s] for s in (0, 1)]
    assert linear.metrics["mse"] == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert linear.parameters == 2 * (48 * 12 + 12)
    assert linear.repeatable
    assert not plain.failed


def test_the_database_can_be_asked_with_plain_sql(plain):
    with sqlite3.connect(plain.store.path) as db:
        rows = db.execute(
            "SELECT competitor, avg(value) FROM metrics WHERE name='mse' GROUP BY 1 ORDER BY 2"
        ).fetchall()
    assert [row[0] for row in rows] == [s.competitor for s in plain.summaries]


def test_rerun_keeps_finished_jobs_and_adds_new_ones(plain, tmp_path):
    called = []
    store = plain.store.path
    (tmp_path / "results.sqlite").write_bytes(store.read_bytes())
    again = run_comparison(
        small_task(),
        out=tmp_path,
        systems=[],
        seeds=3,
        budget=Budget(epochs=2),
        report_job=lambda name, seed, row, fraction: called.append((name, seed)),
    )
    assert sorted(called) == [("gradient_boosting", 2), ("linear", 2)]
    assert scores(plain).items() <= scores(again).items()


def test_another_comparison_in_the_same_folder_is_refused(plain):
    with pytest.raises(ValueError, match=r"another comparison \(budget: 2ep there, 3ep now\)"):
        run_comparison(small_task(), out=plain.store.path.parent, systems=[], seeds=1, budget=Budget(epochs=3))
    with pytest.raises(ValueError, match="data: "):
        run_comparison(small_task(430), out=plain.store.path.parent, systems=[], seeds=1, budget=Budget(epochs=2))


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "results.sqlite").write_text("not a database, but long enough to be read as one" * 50)
    with pytest.raises(ValueError, match="no results file of dynakern compare"):
        Store(tmp_path / "results.sqlite", {})


def test_a_failing_job_is_a_row_with_its_error(tmp_path):
    task = ForecastTask(small_table(), context=20, horizon=6)  # the season of 24 does not fit into 20
    comparison = run_comparison(task, out=tmp_path, systems=[], seeds=1, budget=Budget(epochs=1))
    failed = next(s for s in comparison.summaries if s.competitor == "seasonal_naive")
    assert "season of 24 steps is longer" in failed.errors[0]
    assert comparison.summaries[-1] is failed
    assert comparison.failed
    assert len([s for s in comparison.summaries if s.metrics]) == 3
    assert format_row(comparison, failed)[1:] == ["-"] * (len(table_columns(comparison)) - 1)
    html = write_report(comparison, tmp_path / "report.html", command="x").read_text()
    assert "season of 24 steps is longer" in html


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'linear'"):
        run_comparison(small_task(), out=tmp_path, systems=["linaer"])
    with pytest.raises(ValueError, match="`seeds` must be a positive integer"):
        run_comparison(small_task(), out=tmp_path, seeds=0)
    assert not list(tmp_path.iterdir())  # refused before anything is written


def test_local_processes_give_the_same_rows(plain, tmp_path):
    parallel = run_comparison(small_task(), out=tmp_path, systems=[], seeds=2, budget=Budget(epochs=2), jobs=2)
    assert scores(parallel) == pytest.approx(scores(plain), rel=1e-9)


class _Deadly(ForecastTask):
    """A task one of whose competitors takes its whole process down."""

    def run(self, name, **options):
        if name == "gradient_boosting":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(name, **options)


@pytest.mark.slow
def test_a_dying_worker_fails_its_own_job_only(plain, tmp_path):
    task = _Deadly(small_table(), context=48, horizon=12)
    comparison = run_comparison(task, out=tmp_path, systems=[], seeds=1, budget=Budget(epochs=2), jobs=2)
    failed = [s for s in comparison.summaries if s.errors]
    assert [s.competitor for s in failed] == ["gradient_boosting"]
    assert "The process of this job died" in failed[0].errors[0]
    assert scores(comparison)["linear", 0] == pytest.approx(scores(plain)["linear", 0])


@pytest.mark.slow
def test_dask_cluster_of_two_processes_gives_the_same_rows(plain, tmp_path):
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1", silence_logs=50
    )
    with cluster:
        address = cluster.scheduler_address
        assert len(cluster.workers) == 2
        comparison = run_comparison(
            small_task(), out=tmp_path, systems=[], seeds=2, budget=Budget(epochs=2), cluster=address
        )
    assert scores(comparison) == pytest.approx(scores(plain), rel=1e-9)


def test_no_cluster_at_the_address(tmp_path):
    pytest.importorskip("distributed")
    with pytest.raises(ValueError, match="No Dask scheduler answers"):
        run_comparison(
            small_task(), out=tmp_path, systems=[], seeds=1, budget=Budget(epochs=1), cluster="tcp://127.0.0.1:1"
        )


@pytest.mark.slow
def test_kill_in_the_middle_then_run_again(tmp_path):
    data = write_csv(tmp_path / "series.csv", rows=1500)
    base = [sys.executable, "-m", "dynakern", "compare", "forecast", str(data), "--context", "48", "--horizon", "12"]
    base += ["--systems", "linear", "--seeds", "4", "--budget", "12ep", "--quiet", "--out"]

    def rows(out, table="jobs"):
        path = out / "results.sqlite"
        if not path.is_file():
            return []
        with sqlite3.connect(path, timeout=30) as db:
            try:
                return db.execute(f"SELECT competitor, seed FROM {table}").fetchall()
            except sqlite3.OperationalError:  # the schema is not there yet
                return []

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*base, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(rows(killed)) < 4 and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = rows(killed)
    assert 4 <= len(kept) < 10, "the kill came too late to show anything"
    assert not (killed / "report.html").exists()
    with sqlite3.connect(killed / "results.sqlite") as db:
        finished = dict(db.execute("SELECT competitor || seed, finished FROM jobs"))
    for out in (killed, whole):
        subprocess.run([*base, str(out)], check=True, stdout=subprocess.DEVNULL, timeout=240)
    with sqlite3.connect(killed / "results.sqlite") as db:
        after = dict(db.execute("SELECT competitor || seed, finished FROM jobs"))
        resumed = db.execute("SELECT competitor, seed, name, value FROM metrics ORDER BY 1, 2, 3").fetchall()
    with sqlite3.connect(whole / "results.sqlite") as db:
        uninterrupted = db.execute("SELECT competitor, seed, name, value FROM metrics ORDER BY 1, 2, 3").fetchall()
    assert finished.items() <= after.items()  # kept, not trained again
    assert len(after) == 10
    assert resumed == uninterrupted
    assert (killed / "report.html").is_file()


def test_pareto_front():
    assert pareto_front([(1, 5), (2, 3), (3, 4), (4, 1), (1, 6)]) == [0, 1, 3]
