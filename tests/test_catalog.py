"""Walk the catalogue: every row must be whole."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import dynakern
from dynakern.catalog import SYSTEMS, find_system
from dynakern.models import create_model, import_string, list_models, model_info

ROOT = Path(__file__).parent.parent
SHAPE_HINTS = ("``(", "(B", "(N", "shape", "Shape")


@pytest.fixture(params=SYSTEMS, ids=[s.slug for s in SYSTEMS])
def system(request):
    return request.param


def test_slugs_and_variants_are_unique():
    slugs = [s.slug for s in SYSTEMS]
    variants = [v for s in SYSTEMS for v in s.variants]
    assert len(set(slugs)) == len(slugs)
    assert len(set(variants)) == len(variants)


def test_public_names_import_and_are_documented(system):
    assert system.names
    for string in system.names:
        thing = import_string(string)
        doc = inspect.getdoc(thing) or ""
        init = inspect.getdoc(getattr(thing, "forward", None)) or "" if inspect.isclass(thing) else ""
        assert len(doc) > 80, f"{string} lacks a docstring"
        if system.kind in ("operator", "network") and not string.rpartition(":")[2].isupper():
            assert any(hint in doc + init for hint in SHAPE_HINTS), f"{string}: the docstring gives no shapes"


def test_variants_are_functions_of_the_module(system):
    module = importlib.import_module(system.module)
    for variant in system.variants:
        assert inspect.isfunction(getattr(module, variant))
        assert model_info(variant)["system"] == system.slug


def test_tasks_and_entries_import(system):
    for string in [*system.tasks.values(), *filter(None, (system.cli, system.lens))]:
        assert callable(import_string(string))


def test_has_docs_claim_golden_and_tests(system):
    assert (ROOT / "docs" / "systems" / f"{system.slug}.rst").is_file()
    claim = importlib.import_module(f"dynakern.claims.{system.slug}")
    assert len(claim.CLAIMS) > 0
    assert inspect.getdoc(claim)
    for part in claim.CLAIMS:
        assert inspect.isgeneratorfunction(part), f"{part.__name__} must yield Measurements"
        assert inspect.getdoc(part)
    if system.golden:
        assert (ROOT / "tests" / "goldens" / f"{system.golden.replace('-', '_')}.py").is_file()
        assert list((ROOT / "tests" / "goldens" / "data" / system.golden).glob("*.safetensors"))
    assert (ROOT / "tests" / system.wing / f"test_{system.slug}.py").is_file()
    if system.kind == "network":
        assert (ROOT / "tests" / "conformance" / f"{system.slug}.py").is_file()
    assert list((ROOT / "benchmarks").rglob(f"{system.slug}.py"))


def test_module_docstring_names_the_paper(system):
    doc = importlib.import_module(system.module).__doc__ or ""
    assert "arXiv:" in doc or "doi:" in doc


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 's4d'"):
        find_system("s4dd")
    with pytest.raises(ValueError, match="Unknown model"):
        create_model("timesnett")
    assert set(list_models()) == {v for s in SYSTEMS for v in s.variants}
    assert dynakern.list_models("no_such*") == []
