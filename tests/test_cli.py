"""The command line as a user types it: real processes, real files, exit codes, refusals before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dynakern.catalog import SYSTEMS
from dynakern.cli import main
from tests.compare.test_run import write_csv


def run(*argv, cwd=None, env=None):
    return subprocess.run(
        [sys.executable, "-m", "dynakern", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )


def run_here(*argv, monkeypatch, capsys):
    """Run the command line in this process, where starting another would only repeat slow imports."""
    monkeypatch.setattr(sys, "argv", ["dynakern", *map(str, argv)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code, capsys.readouterr().err


def test_list_names_every_system():
    result = run("list")
    assert result.returncode == 0
    for system in SYSTEMS:
        assert system.slug in result.stdout
    assert "\x1b[" not in result.stdout  # no colour when piped
    rows = json.loads(run("list", "--json").stdout)
    assert [row["name"] for row in rows] == [s.slug for s in SYSTEMS]
    assert json.loads(run("list", "--wing", "sequence", "--json").stdout)[0]["wing"] == "sequence"


def test_show_tells_of_systems_and_variants():
    assert "arXiv:2206.11893" in run("show", "s4d").stdout
    facts = json.loads(run("show", "s4d_scifar", "--json").stdout)
    assert facts["system"] == "s4d"
    assert "bidirectional" in facts["description"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "s4dd"], "Did you mean 's4d'"),
        (["list", "--wing", "sequnce"], "Did you mean 'sequence'"),
        (["claim", "s4dd"], "Did you mean 's4d'"),
        (["claim", "s4d", "--part", "nothing"], "has no part 'nothing'. Parts: theorem_three"),
        (["compare", "forecast", "nothing.csv"], "No file nothing.csv"),
        (["compare", "forecast", "x.csv", "--target", "OT", "--multivariate"], "exclude each other"),
        (["compare", "forecast", "x.csv", "--budget", "soon"], "`budget` must look like"),
        (["compare", "forecast", "x.csv", "--device", "tpu"], "must be cpu or cuda"),
    ],
)
def test_refusals(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, err = run_here(*argv, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_compare_refuses_bad_data_before_anything_is_written(tmp_path, monkeypatch, capsys):
    data = write_csv(tmp_path / "series.csv")
    broken = tmp_path / "broken.csv"
    broken.write_text(data.read_text().replace("2024-01-05 00:00:00,", "2024-01-05 00:00:00,oops "))
    cases = [
        ([broken], r"broken.csv, line 98, column 'x': 'oops"),
        ([data, "--target", "y"], "Unknown column 'y'"),
        (
            [data, "--horizon", "500"],
            "too short: the train part has 294 of 420 rows, one window needs context + horizon = 596",
        ),
        ([data, "--context", "24", "--horizon", "4", "--systems", "tmesnet"], "Did you mean 'timesnet'"),
        ([data, "--protocol", "ett"], "needs 14400 rows"),
        ([data, "--context", "24", "--horizon", "4", "--seeds", "0"], "`seeds` must be a positive integer"),
    ]
    for argv, message in cases:
        argv = ["compare", "forecast", *argv, "--out", tmp_path / "out"]
        code, err = run_here(*argv, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2
        assert message in err
        assert not (tmp_path / "out").exists()


def test_compare_writes_report_and_rows(tmp_path):
    data = write_csv(tmp_path / "series.csv")
    argv = ["compare", "forecast", data, "--context", 48, "--horizon", 12, "--seeds", 1, "--budget", "1ep"]
    result = run(*argv, "--systems", "s4d", "--out", tmp_path / "out", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert {row["competitor"] for row in document["results"]} == {
        *("repeat_last", "seasonal_naive", "linear", "gradient_boosting", "s4d")
    }
    assert document["settings"]["horizon"] == "12"
    html = (tmp_path / "out" / "report.html").read_text()
    assert "--systems s4d" in html
    again = run(*argv, "--systems", "s4d", "--out", tmp_path / "out", "--quiet")
    assert again.stderr == ""
    assert "s4d" in again.stdout
    assert "Report:" not in again.stdout


def test_compare_with_a_failing_job_says_so(tmp_path):
    data = write_csv(tmp_path / "series.csv")
    argv = ["--context", 20, "--horizon", 4, "--seeds", 1, "--budget", "1ep", "--systems", "linear"]
    result = run("compare", "forecast", data, *argv, cwd=tmp_path)
    assert result.returncode == 1
    assert "seasonal_naive failed" in result.stderr
    assert (tmp_path / "dynakern-compare-series" / "report.html").is_file()


def test_help_teaches():
    result = run("compare", "forecast", "--help")
    assert "Killed in the middle?" in result.stdout
    assert "--protocol ett" in result.stdout
    assert run().returncode == 2 or "Usage" in run().stdout


@pytest.mark.slow
def test_claim_runs_records_and_exits_zero(tmp_path):
    result = run("claim", "s4d", "--part", "theorem_three", "--record", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "claim_s4d.json").read_text())
    assert document == json.loads(result.stdout)
    assert document["parts"][0]["verdict"] == "holds"
    assert document["environment"]["torch"]
