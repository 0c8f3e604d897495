"""Recurrent networks with heads beside one of torch a head and the plain loop; ConstrINT beside the authors' solver.

The networks of torch also do an input projection, which ours expect to be done; it is a small part of their time. The
authors' solver is measured if their package is there (``pip install --no-deps flashrnn``).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main
from torch import nn

from dynakern.measure import time_interleaved
from dynakern.ops import flash_rnn
from dynakern.ops.constrint import solve, tiling_problem
from dynakern.ops.flash_rnn import CELLS
from dynakern.testing import assert_same

SHAPES = ((8, 256, 4, 64), (8, 256, 12, 64), (16, 256, 1, 256), (8, 1024, 4, 32))
PEERS = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN, "slstm": nn.LSTM}
H100 = {
    "maxThreadsPerBlock": 1024,
    "regsPerMultiprocessor": 65536,
    "multiProcessorCount": 132,
    "sharedMemPerBlockOptin": 232448,
}


def _matrix_rate() -> float:
    """Return the FLOP/s of a 1024^3 matrix product on this machine."""
    a = torch.randn(1024, 1024)
    return 2 * 1024**3 / time_interleaved({"mm": lambda: a @ a}, repeats=9)["mm"].median


def _network_cases(function: str, B: int, T: int, NH: int, D: int, rate: float):
    torch.manual_seed(0)
    cell = CELLS[function]
    Wx = torch.randn(B, T, cell.inputs, NH, D, requires_grad=True)
    R = (torch.randn(cell.recurrent, NH, D, D) / D**0.5).requires_grad_()
    b = torch.randn(cell.gates, NH, D, requires_grad=True)
    heads = [PEERS[function](D, D, batch_first=True) for _ in range(NH)]
    x = torch.randn(NH, B, T, D, requires_grad=True)

    def run(backend="auto"):
        return flash_rnn(Wx, R, b, function=function, backend=backend)[0]

    def torch_heads():
        return torch.stack([head(y)[0] for head, y in zip(heads, x.unbind(0), strict=True)])

    def forward(build):
        def timed():
            with torch.no_grad():
                return build()

        return timed

    def both(build, parameters):
        return lambda: torch.autograd.grad(build().sum(), parameters)

    theirs = [x, *(p for head in heads for p in head.parameters())]
    label, shape = f"{PEERS[function].__name__} of torch a head", f"{function} {(B, T, NH, D)}"
    aim = 1.0 if function != "slstm" else 0.77  # 1.3 times the LSTM's time
    floor = 2 * B * T * NH * D * D * cell.recurrent / rate
    note = "the recurrent products (three times them for forward and backward) at the measured rate of a large product"
    loop = lambda: run("reference")  # noqa: E731
    yield Case(
        name=f"{shape}, forward",
        ours=forward(run),
        peers={label: forward(torch_heads), "plain loop": forward(loop)},
        check=lambda: assert_same(forward(run)(), forward(loop)(), rtol=1e-5),
        floor_seconds=floor,
        floor_note=note,
        at_least=aim,
    )
    yield Case(
        name=f"{shape}, forward and backward",
        ours=both(run, (Wx, R, b)),
        peers={label: both(torch_heads, theirs), "plain loop": both(loop, (Wx, R, b))},
        check=lambda: assert_same(both(run, (Wx, R, b))(), both(loop, (Wx, R, b))(), rtol=1e-5),
        floor_seconds=3 * floor,
        floor_note=note,
        at_least=aim,
        repeats=5,
    )


def _official_solver():
    """Load the solver alone out of the authors' package; None if it is not installed."""
    package = importlib.util.find_spec("flashrnn")
    if package is None:
        return None
    path = Path(next(iter(package.submodule_search_locations))) / "autotune" / "constrint.py"
    spec = importlib.util.spec_from_file_location("flashrnn_constrint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _solver_case():
    module = _official_solver()
    if module is None:
        return
    text, order = tiling_problem("forward", device=H100, function="lstm", num_heads=1, head_dim=768, batch=16)
    plain = "\n".join(line.partition("#")[0] for line in text.splitlines())
    kinds = module.ValueHeuristic
    refinements = tuple(
        module.ValueRefinement(name.partition(":")[0], kinds.LARGEST_FIRST if ":l" in name else kinds.SMALLEST_FIRST)
        for name in order
    )

    def official():
        constraint, variables = module.parse_expression(plain)
        # __wrapped__: without the wrapper that keeps solutions in files between runs
        return module.solve_constrint.__wrapped__(constraint, variables, refinements, 1)[0]

    def check():
        ours, theirs = solve(text, order=order), official()
        assert all(ours[name.partition(":")[0]] == theirs[name.partition(":")[0]] for name in order)

    yield Case(
        name="ConstrINT, forward tiling of LSTM 1 x 768, H100",
        ours=lambda: solve(text, order=order),
        peers={"the authors' solver": official},
        check=check,
        at_least=1000,
        repeats=5,
    )


def cases():
    rate = _matrix_rate()
    for function in CELLS:
        for shape in SHAPES:
            yield from _network_cases(function, *shape, rate)
    yield from _solver_case()


if __name__ == "__main__":
    main("flash_rnn", "FlashRNN: recurrent networks with heads, and the solver of their tilings", cases)
