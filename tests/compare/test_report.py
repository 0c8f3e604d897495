"""The report: self-contained, complete, and it renders in a real browser without a console error."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from dynakern.compare import run_comparison, write_report
from dynakern.train import Budget
from tests.compare.test_run import small_task

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    comparison = run_comparison(small_task(), out=out, systems=[], seeds=2, budget=Budget(epochs=1))
    return comparison, write_report(comparison, out / "report.html", command="dynakern compare forecast 'a & b.csv'")


def test_is_one_file_that_fetches_nothing(report):
    html = report[1].read_text()
    body = re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>|<!DOCTYPE[^>]*>', "", html, flags=re.DOTALL)
    assert "http" not in body
    assert not re.search(r'\b(src|href)="(?!data:,|#)', body)
    assert not list(report[1].parent.glob("*.tmp"))


def test_holds_what_it_must(report):
    comparison, path = report
    html = path.read_text()
    for summary in comparison.summaries:
        assert summary.competitor in html
        assert f"{summary.metrics['mse'][0]:.4f}" in html
    assert html.count("<svg") == 2
    assert "dynakern compare forecast &#39;a &amp; b.csv&#39;" in html
    for word in ("torch", "cpu", "threads", "Table", "Predictions", "Error against cost"):
        assert word in html
    assert "not exactly repeatable" not in html


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_renders_and_sorts_in_a_browser_without_console_errors(report, tmp_path):
    probe = tmp_path / "probe.html"
    # The page reports its own errors, then a click on a column title must reorder the rows.
    script = """<script>
      const problems = [];
      window.addEventListener("error", (event) => problems.push(event.message));
      window.addEventListener("load", () => {
        const names = () => [...document.querySelectorAll("#results tbody tr")].map((row) => row.cells[0].innerText);
        const before = names().join("|");
        document.querySelector("#results th button").click();
        const after = names();
        const figures = [...document.querySelectorAll("figure svg")].map((svg) => svg.clientHeight);
        const width = document.documentElement.scrollWidth;
        document.title = JSON.stringify({ problems, before, after, figures, width });
      });
    </script></head>"""
    probe.write_text(report[1].read_text().replace("</head>", script))
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1180,1600", "--virtual-time-budget=3000",
         "--dump-dom", f"file://{probe}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    import html
    import json

    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", result.stdout, re.DOTALL).group(1)))
    assert found["problems"] == []
    assert ":CONSOLE" not in result.stderr
    assert found["after"] == sorted(found["after"])
    assert found["before"] != "|".join(found["after"])
    assert len(found["figures"]) == 2
    assert min(found["figures"]) > 150
    assert found["width"] <= 1180
