"""Settings of the whole suite: one thread a worker, NaN in fresh memory, no network."""

from __future__ import annotations

import os

# One thread a worker: pytest-xdist runs one worker a core, and results must not depend on the number of threads anyway.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--goldens",
        default=str(Path(__file__).parent / "goldens" / "data"),
        help="folder below which every .safetensors file is replayed (tests/test_goldens.py)",
    )
    parser.addoption(
        "--goldens-with-adapter",
        action="store_true",
        help="with --goldens: leave out folders that have no adapter yet, instead of failing",
    )


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    """Fill ``torch.empty`` with NaN, so that an output that was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
