"""Importing the package must stay cheap, and the list must not need torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numba", "sklearn", "matplotlib", "scipy", "numpy", "pandas", "triton")


def loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(result.stderr.split())


def test_import_loads_nothing_heavy():
    assert loaded_after("import dynakern") == set()


def test_the_probe_sees_a_heavy_import():
    assert "numpy" in loaded_after("import dynakern, numpy")


@pytest.mark.parametrize("argv", [["list"], ["--help"], ["compare", "--help"]])
def test_light_commands_load_nothing_heavy(argv):
    code = f"import sys\nsys.argv = ['dynakern', *{argv!r}]\nfrom dynakern.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass"
    assert loaded_after(code) & {"torch", "numba", "sklearn", "matplotlib"} == set()


def test_every_public_module_is_reachable():
    import dynakern

    for name in dynakern.__all__:
        assert getattr(dynakern, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dynakern.nonsense
