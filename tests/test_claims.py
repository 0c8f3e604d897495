"""The claim runner: verdicts are computed, can fail, and what cannot be measured is said so."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from dynakern.catalog import SYSTEMS, System
from dynakern.claims import run as runner
from dynakern.claims.run import Measurement, NotMeasurable, run_claim


@pytest.mark.parametrize(
    ("bounds", "value", "holds"),
    [
        ({"at_least": 2.0}, 2.0, True),
        ({"at_least": 2.0}, 1.9, False),
        ({"at_most": 2.0}, 2.0, True),
        ({"at_most": 2.0}, 2.1, False),
        ({"at_least": 1.0, "at_most": 2.0}, 2.5, False),
        ({"at_least": 1.0}, float("nan"), False),
        ({}, 5.0, None),
    ],
)
def test_verdict_of_a_measurement(bounds, value, holds):
    assert Measurement(name="x", value=value, unit="", **bounds).holds is holds


def fake(monkeypatch, *parts):
    system = System(slug="fake", title="", paper="", wing="ops", kind="operator", names=())
    monkeypatch.setattr(runner, "find_system", lambda slug: system)
    module = types.ModuleType("dynakern.claims.fake")
    module.CLAIMS = parts
    monkeypatch.setitem(sys.modules, "dynakern.claims.fake", module)


def test_runner_reports_each_part(monkeypatch):
    def good(progress):
        """A part that holds."""
        progress("working", 0.5)
        yield Measurement(name="a", value=3, unit="x", at_least=2, baseline=1)

    def bad(progress):
        yield Measurement(name="b", value=1, unit="x", at_least=2)
        yield Measurement(name="c", value=1, unit="x")

    def absent(progress):
        raise NotMeasurable("needs the file some.bin")
        yield

    def extra(progress):
        from dynakern.checks import require

        require("no_such_package_anywhere", extra="hf")
        yield

    fake(monkeypatch, good, bad, absent, extra)
    seen = []
    results = list(run_claim("fake", progress=lambda text, fraction: seen.append((text, fraction))))
    assert [r.verdict for r in results] == ["holds", "falls short", "not measurable", "not measurable"]
    assert seen == [("working", 0.5)]
    assert results[0].description == "A part that holds."
    assert results[2].not_measurable == "needs the file some.bin"
    assert "pip install 'dynakern[hf]'" in results[3].not_measurable
    assert results[0].as_dict()["measurements"][0]["bound"] == ">= 2"
    assert [r.part for r in run_claim("fake", only="bad")] == ["bad"]
    with pytest.raises(ValueError, match=r"no part 'worse'\. Parts: good, bad, absent, extra"):
        list(run_claim("fake", only="worse"))


@pytest.mark.parametrize("system", SYSTEMS, ids=[s.slug for s in SYSTEMS])
def test_every_claim_has_a_bound_that_can_fail(system):
    import inspect

    source = inspect.getsource(importlib.import_module(f"dynakern.claims.{system.slug}"))
    assert "at_least=" in source or "at_most=" in source
