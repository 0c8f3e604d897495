"""The README's table of systems is that of the catalogue, and the Python it shows runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_table_is_up_to_date():
    assert subprocess.run([sys.executable, ROOT / "docs" / "readme.py", "--check"]).returncode == 0


def test_picture_is_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_examples_run(index, tmp_path, monkeypatch):
    assert len(BLOCKS) == 3
    code = BLOCKS[index].replace('budget="60s"', 'budget="2s"')
    code = code.replace('AnomalyDetector("timesnet")', 'AnomalyDetector("timesnet", budget="1s")')
    monkeypatch.chdir(tmp_path)
    if "checkpoint.safetensors" in code:
        import torch
        from safetensors.torch import save_file

        from dynakern import create_model

        torch.manual_seed(0)
        save_file(create_model("s4d_scifar", num_classes=10).state_dict(), tmp_path / "checkpoint.safetensors")
    exec(compile(code, "README.md", "exec"), {})
