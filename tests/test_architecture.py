"""Imports only go down the house: read from the syntax trees, so that lazy imports count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "dynakern"
WINGS = ("similarity", "vision", "sequence", "dynamics", "adaptive", "serving", "rendering")
# From top to bottom; a layer may import what is strictly below it. Names on one line are siblings.
ORDER = [
    {"__main__"},
    {"cli"},
    {"compare", "claims"},
    {"tasks", "lens"},
    {"theory"},
    set(WINGS),
    {"layers"},
    {"ops", "train", "data"},
    {"measure"},
    {"testing"},
    {"checks"},
    {"models"},
    {"catalog"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# Messages name the nearest known name everywhere, so the two modules at the bottom may use the argument checks.
ALSO_ALLOWED = {("models", "checks"), ("catalog", "checks")}


def _part(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def _imports(path: Path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "dynakern":
                names = [f"dynakern.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("dynakern."):
                yield node.lineno, name.split(".")[1]


def forbidden(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in ALSO_ALLOWED:
        return False
    return LEVEL[imported] <= LEVEL[importer]


FILES = [path for path in sorted(SRC.rglob("*.py")) if path.parent != SRC or path.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_go_down(path):
    importer = _part(path)
    assert importer in LEVEL, f"{path}: unknown part of the house"
    wrong = [f"line {line}: {importer} imports {part}" for line, part in _imports(path) if forbidden(importer, part)]
    assert not wrong, f"{path}: " + "; ".join(wrong)


def test_the_rule_itself_can_fail():
    assert forbidden("sequence", "vision")
    assert forbidden("ops", "layers")
    assert forbidden("claims", "compare")
    assert not forbidden("theory", "similarity")
    assert not forbidden("compare", "tasks")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 600
