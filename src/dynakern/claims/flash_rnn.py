"""FlashRNN: recurrent networks track states, run fast on an ordinary CPU, and their GPU kernels tile themselves.

Claims of Pöppel, Beck & Hochreiter, 2024, arXiv:2412.07752, as far as they can be measured without the authors' GPUs:
(1) an integer constraint solver finds the tiling of a kernel for a device, here the authors' first solution in a
thousandth of their solver's time, and the widest heads that the fused kernels allow; (2) networks with hidden-to-hidden
mixing learn parity and extrapolate, a gated linear recurrence does not; (3) keeping the recurrent matrix in fast memory
beats the plain loop at least twice. The paper's speed-up of 50 over the plain loop is that of its CUDA
kernels and is not claimed here.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from dynakern.claims.run import Measurement, NotMeasurable, Progress
from dynakern.measure import time_interleaved
from dynakern.ops import flash_rnn
from dynakern.ops.constrint import Infeasible, largest_head, solve, tiling_problem
from dynakern.sequence import FlashRNN

__all__ = ["CLAIMS"]

_A100 = {
    "maxThreadsPerBlock": 1024, "regsPerMultiprocessor": 65536, "multiProcessorCount": 108,
    "sharedMemPerBlockOptin": 166912,
}  # fmt: skip
_GPUS = {
    "A100": _A100,
    "H100": _A100 | {"multiProcessorCount": 132, "sharedMemPerBlockOptin": 232448},
    "RTX3090": _A100 | {"multiProcessorCount": 82, "sharedMemPerBlockOptin": 101376},
}
# GPU, function, heads, width of a head, batch, dtype; the last one has no solution.
_PROBLEMS = (
    ("A100", "lstm", 1, 64, 8, "bfloat16"),
    ("A100", "slstm", 4, 64, 16, "bfloat16"),
    ("H100", "lstm", 1, 768, 16, "bfloat16"),
    ("A100", "elman", 1, 256, 16, "float32"),
    ("RTX3090", "elman", 6, 96, 24, "bfloat16"),
    ("A100", "lstm", 1, 1024, 8, "bfloat16"),
    ("H100", "slstm", 4, 256, 16, "bfloat16"),
    ("H100", "elman", 1, 2048, 8, "bfloat16"),
    ("RTX3090", "lstm", 12, 64, 16, "bfloat16"),
    ("A100", "gru", 2, 128, 20, "bfloat16"),
    ("H100", "lstm", 8, 128, 64, "bfloat16"),
    ("RTX3090", "slstm", 1, 512, 8, "bfloat16"),
    ("RTX3090", "lstm", 1, 2048, 8, "bfloat16"),
)


def widest_heads(progress: Progress) -> Iterator[Measurement]:
    """The widest LSTM and Elman heads that the fused kernels allow are those of the authors' device model."""
    wanted = {"H100": (2688, 5376), "A100": (2304, 4608), "RTX3090": (1728, 3648)}
    for gpu, widths in wanted.items():
        for function, width in zip(("lstm", "elman"), widths, strict=True):
            progress(f"{function} on {gpu}", 0.5)
            found = largest_head(device=_GPUS[gpu], function=function)
            yield Measurement(
                name=f"widest {function} head, {gpu}", value=found, unit="units", at_least=width, at_most=width
            )


def _official_solver() -> ModuleType:
    """Load the solver alone out of the authors' package, whose own import compiles CUDA sources."""
    package = importlib.util.find_spec("flashrnn")
    if package is None or not package.submodule_search_locations:
        raise NotMeasurable("the authors' solver is missing: pip install --no-deps flashrnn")
    path = Path(next(iter(package.submodule_search_locations))) / "autotune" / "constrint.py"
    spec = importlib.util.spec_from_file_location("flashrnn_constrint", path)
    if spec is None or spec.loader is None:
        raise NotMeasurable(f"the authors' solver is not at {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _official(module: ModuleType, text: str, order: list[str]) -> dict[str, int] | None:
    plain = "\n".join(line.partition("#")[0] for line in text.splitlines())
    heuristic = module.ValueHeuristic
    refinements = tuple(
        module.ValueRefinement(
            name.partition(":")[0], heuristic.LARGEST_FIRST if ":l" in name else heuristic.SMALLEST_FIRST
        )
        for name in order
    )
    constraint, variables = module.parse_expression(plain)
    # __wrapped__: without the wrapper that keeps solutions in files between runs
    found = module.solve_constrint.__wrapped__(constraint, variables, refinements, 1)
    return dict(found[0]) if found else None


def _ours(text: str, order: list[str]) -> dict[str, int] | None:
    try:
        return solve(text, order=order)
    except Infeasible:
        return None


def solver(progress: Progress) -> Iterator[Measurement]:
    """On 12 device problems and an infeasible one: the authors' first solution, at least 1000 times as fast."""
    module = _official_solver()
    same, ratios = 0, []
    for index, (gpu, function, heads, width, batch, dtype) in enumerate(_PROBLEMS):
        progress(f"{function}, {heads} x {width}, {gpu}", index / len(_PROBLEMS))
        agree, theirs_s, ours_s = True, 0.0, 0.0
        for direction in ("forward", "backward"):
            text, order = tiling_problem(
                direction,
                device=_GPUS[gpu],
                function=function,
                num_heads=heads,
                head_dim=width,
                batch=batch,
                dtype=dtype,
            )
            timing = time_interleaved({"ours": lambda text=text, order=order: _ours(text, order)}, repeats=9)
            start = time.perf_counter()  # seconds to minutes: once
            theirs = _official(module, text, order)
            theirs_s, ours_s = theirs_s + time.perf_counter() - start, ours_s + timing["ours"].median
            ours = _ours(text, order)
            names = [name.partition(":")[0] for name in order]
            agree &= (theirs is None) == (ours is None)
            if theirs is not None and ours is not None:
                agree &= all(theirs[name] == ours[name] for name in names)
        same += agree
        ratios.append(theirs_s / ours_s)
    yield Measurement(name="problems with the same first solution", value=same, unit="of 13", at_least=13)
    yield Measurement(name="authors' time / ours, smallest of 13", value=min(ratios), unit="x", at_least=1000)
    yield Measurement(name="authors' time / ours, largest of 13", value=max(ratios), unit="x")


class _LinearRecurrence(nn.Module):
    """Gated diagonal linear recurrence: h = a h + (1 - a) v with a and v functions of the input alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        a, v, gate = self.maps(x).chunk(3, -1)
        a, h, states = torch.sigmoid(a), x.new_zeros(x.shape[0], x.shape[2]), []
        for a_t, v_t in zip(a.unbind(1), v.unbind(1), strict=True):
            h = a_t * h + (1 - a_t) * v_t
            states.append(h)
        return x + self.out(torch.stack(states, 1) * nn.functional.silu(gate))


class _Tracker(nn.Module):
    """Read bits, say at each step whether their number so far is odd."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(2, 32), nn.Linear(32, 2)
        if kind == "linear":
            self.body = nn.Sequential(_LinearRecurrence(32), _LinearRecurrence(32))
        else:
            self.body = FlashRNN(32, 32, batch_first=True, num_heads=2, cell=kind)

    def forward(self, bits: Tensor) -> Tensor:
        found = self.body(self.embedding(bits))
        return self.head(found if isinstance(found, Tensor) else found[0])


def _parity_accuracy(kind: str, progress: Callable[[float], None], *, steps: int = 700) -> dict[int, float]:
    """Train on lengths up to 32, rising; return the accuracy at the last step of longer sequences."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = _Tracker(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        length = int(torch.randint(2, min(32, 2 + step // 12) + 1, (), generator=generator))
        bits = torch.randint(0, 2, (64, length), generator=generator)
        loss = nn.functional.cross_entropy(model(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step / steps)
    found = {}
    with torch.no_grad():
        for length in (128, 256):
            bits = torch.randint(0, 2, (1000, length), generator=generator)
            found[length] = float((model(bits)[:, -1].argmax(-1) == bits.sum(1) % 2).float().mean())
    return found


def state_tracking(progress: Progress) -> Iterator[Measurement]:
    """Running parity, trained on lengths of 2 to 32: recurrent networks extrapolate, a linear recurrence does not."""
    kinds = ("linear", "lstm", "slstm", "elman")
    found = {}
    for index, kind in enumerate(kinds):
        found[kind] = _parity_accuracy(
            kind, lambda done, kind=kind, index=index: progress(kind, (index + done) / len(kinds))
        )
    for length in (128, 256):
        baseline, bounded = found["linear"][length], length == 128
        for kind in kinds[1:]:
            yield Measurement(
                name=f"{kind}, accuracy at step {length}",
                value=found[kind][length],
                unit="accuracy",
                at_least=0.95 if bounded else None,
                baseline=baseline,
            )
        yield Measurement(
            name=f"gated linear recurrence, accuracy at step {length}",
            value=baseline,
            unit="accuracy",
            at_most=0.7 if bounded else None,
        )


def cpu_speed(progress: Progress) -> Iterator[Measurement]:
    """LSTM inference on one core: at least twice the plain loop, and no slower than one torch.nn.LSTM a head."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index, (B, T, NH, D) in enumerate(((8, 256, 4, 64), (8, 256, 12, 64), (16, 256, 1, 256), (8, 1024, 4, 32))):
            progress(f"({B}, {T}, {NH}, {D})", index / 4)
            torch.manual_seed(0)
            Wx, R, b = torch.randn(B, T, 4, NH, D), torch.randn(4, NH, D, D) / D**0.5, torch.randn(4, NH, D)
            heads, x = [nn.LSTM(D, D, batch_first=True) for _ in range(NH)], torch.randn(NH, B, T, D)
            with torch.no_grad():
                times = time_interleaved(
                    {
                        "ours": lambda Wx=Wx, R=R, b=b: flash_rnn(Wx, R, b),
                        "loop": lambda Wx=Wx, R=R, b=b: flash_rnn(Wx, R, b, backend="reference"),
                        "torch": lambda heads=heads, x=x: [head(y) for head, y in zip(heads, x, strict=True)],
                    },
                    repeats=7,
                )
            ours, shape = times["ours"].median, f"(B, T, NH, D) = ({B}, {T}, {NH}, {D})"
            yield Measurement(
                name=f"plain loop / ours, {shape}", value=times["loop"].median / ours, unit="x", at_least=2
            )
            yield Measurement(
                name=f"torch.nn.LSTM a head / ours, {shape}", value=times["torch"].median / ours, unit="x", at_least=1
            )
    finally:
        torch.set_num_threads(before)


CLAIMS = (widest_heads, solver, state_tracking, cpu_speed)
