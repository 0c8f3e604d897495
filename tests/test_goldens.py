"""Replay the numbers that the authors' own code computed: every file below --goldens, through the public API."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ADAPTERS = Path(__file__).parent / "goldens"


def _adapter_path(folder: str) -> Path:
    return ADAPTERS / f"{folder.replace('-', '_')}.py"


def pytest_generate_tests(metafunc):
    root = Path(metafunc.config.getoption("--goldens"))
    files = sorted(root.rglob("*.safetensors"))
    if metafunc.config.getoption("--goldens-with-adapter"):
        files = [file for file in files if _adapter_path(file.parent.name).is_file()]
    metafunc.parametrize("path", files, ids=[f"{file.parent.name}/{file.stem}" for file in files])


def _load_adapter(folder: str):
    path = _adapter_path(folder)
    if not path.is_file():
        pytest.fail(f"No adapter for the golden folder {folder!r}: write {path.relative_to(ADAPTERS.parent)}.")
    spec = importlib.util.spec_from_file_location(f"golden_adapter_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(path: Path) -> tuple[dict, dict[str, dict[str, torch.Tensor]]]:
    groups: dict[str, dict[str, torch.Tensor]] = {"param": {}, "in": {}, "out": {}}
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            group, _, name = key.partition(".")
            groups[group][name] = file.get_tensor(key)
    return config, groups


def test_golden(path):
    """Each output of the file must come out of our code within the adapter's tolerance.

    An adapter has ``replay(case, config, params, inputs) -> dict`` and ``tolerance(key) -> (rtol, scale, atol)``:
    ``|ours - golden| <= rtol * |golden| + scale * max|golden| + atol``, elementwise.
    """
    adapter = _load_adapter(path.parent.name)
    config, groups = _read(path)
    assert groups["out"], f"{path} holds no outputs"
    outputs = adapter.replay(path.stem, config, groups["param"], groups["in"])
    problems = []
    for key, golden in groups["out"].items():
        if key not in outputs:
            problems.append(f"{key}: not replayed")
            continue
        ours = torch.as_tensor(outputs[key]).detach()
        if ours.shape != golden.shape:
            problems.append(f"{key}: shape {tuple(ours.shape)}, golden {tuple(golden.shape)}")
            continue
        if golden.numel() == 0:
            continue
        rtol, scale, atol = adapter.tolerance(key)
        ours, golden = ours.to(torch.float64), golden.to(torch.float64)
        finite = golden.isfinite()  # an infinite number must come out as it is
        if not torch.equal(ours[~finite], golden[~finite]):
            problems.append(f"{key}: {int((ours[~finite] != golden[~finite]).sum())} infinite element(s) differ")
        ours, golden = ours[finite], golden[finite]
        if golden.numel() == 0:
            continue
        allowed = rtol * golden.abs() + scale * golden.abs().max() + atol
        excess = (ours - golden).abs() - allowed
        if not bool((excess <= 0).all()):
            error = float((ours - golden).abs().max() / golden.abs().max().clamp_min(1e-300))
            problems.append(f"{key}: max error {error:.2e} of max|golden|, {int((~(excess <= 0)).sum())} elements out")
    assert not problems, f"{path.parent.name}/{path.stem}: " + "; ".join(problems)
