"""How a persistent recurrent kernel is cut up on a GPU, as constraints.

One grid computes ``mh`` heads through all time steps. The recurrent matrix of a head is cut into ``rg`` blocks along
its gates and ``rh`` along the hidden dimension, the batch into ``bb``; inside a block, warps multiply tiles of tensor
cores and keep as many tiles of the matrix in registers as they can, the rest in shared memory. The constraints are
those of the kernels that FlashRNN's authors publish (appendix of arXiv:2412.07752 and ``NX-AI/flashrnn``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dynakern.checks import check_choice, check_positive
from dynakern.ops.constrint.language import parse
from dynakern.ops.constrint.solver import Infeasible, parse_order, search

__all__ = ["Tiling", "autotune", "largest_head", "tiling_problem"]

_GATES = {"elman": 1, "lstm": 4, "gru": 3, "slstm": 4}
_LIMITS = ("maxThreadsPerBlock", "regsPerMultiprocessor", "multiProcessorCount", "sharedMemPerBlockOptin")
_PADDING = 8  # elements between rows in shared memory, against bank conflicts
_MAX_STEPS = 2_000_000

# Names of the unknowns, and what the authors' kernels call them after FLASHRNN_FORWARD_ or FLASHRNN_BACKWARD_.
_SHARED_NAMES = {
    "bb": "BLOCK_TILING_COUNT_BATCH",
    "mh": "MULTIHEAD_TILING_COUNT",
    "rg": "RECURRENT_TILING_COUNT_GATE",
    "rh": "RECURRENT_TILING_COUNT_HIDDEN",
    "lb": "WARP_LOOPING_COUNT_BATCH",
    "wb": "WARP_TILING_COUNT_BATCH",
    "tb": "WARP_TILING_DIM_BATCH",
    "tg": "WARP_TILING_DIM_GATE",
    "th": "WARP_TILING_DIM_HIDDEN",
}
_OWN_NAMES = {
    "forward": {
        "lg": "WARP_LOOPING_COUNT_GATE", "ch": "WARP_RECURRENT_CACHED_HIDDEN", "wh": "WARP_TILING_COUNT_HIDDEN"
    },
    "backward": {
        "lh": "WARP_LOOPING_COUNT_HIDDEN", "cg": "WARP_RECURRENT_CACHED_GATE", "wg": "WARP_TILING_COUNT_GATE"
    },
}  # fmt: skip
_ORDER = {
    "forward": "tb- tg- mh- rg- rh bb- lb- lg wh- wb- ch-",  # a minus: largest first
    "backward": "tb- th- mh- rh- rg bb- lb- lh wg- wb- cg-",
}

_TEXT = {
    "forward": """
tb == {tiles}; tg == {tiles}; th == {depth}; tb * tg == 256;  # the tile that tensor cores multiply
{heads} % mh == 0;                                            # mh heads in a grid
wh * wb * {columns} == nw * rg * lg * tg;                     # warps cover the gates
{hidden} % rh * wh * th == 0;
{columns} % lg * rg * tg == 0;
{warp} * nw <= {threads};
{batch} % bb * wb * lb * tb == 0; lb <= 4;
NB == rg * rh * bb * mh; NB <= {processors};                  # all blocks are resident at once
th * tg * ch * nw == RM * wb;                                 # elements of R that a block keeps in registers
rh * ch * wh * th <= {hidden};
RM + nw * tb * tg * lb * {wide} + nw * tb * th <= {registers};
RS + {size} * RM * bb * rg * rh == {matrix} * bb + 64;        # bytes of R that all blocks keep in shared memory
ST == {four_gates} * wh * rh * bb * wb * lb * tb * {hidden} + 32 * wh * rg * rh * bb * wb * lb * tb;
mh * RS + mh * ST <= {shared} * NB;
""",
    "backward": """
tb == {tiles}; th == {tiles}; tg == {depth}; tb * th == 256;
{heads} % mh == 0;
wg * wb * {hidden} == nw * rh * lh * th;
{hidden} % rh * th * lh == 0;
{columns} % rg * wg * tg == 0;
{warp} * nw <= {threads};
{batch} % bb * wb * lb * tb == 0; lb <= 4;
NB == rg * rh * bb * mh; NB <= {processors};
th * tg * cg * nw == RM * wb;
rg * cg * wg * tg <= {columns};
RM + nw * tb * th * lb * {wide} + nw * tb * tg <= {registers};
RS + {size} * RM * bb * rg * rh == {matrix} * bb + 64;
ST == 4 * wg * bb * wb * lb * tb * {hidden} * rg + 32 * wg * rh * rg * bb * wb * lb * tb;
mh * RS + mh * ST <= {shared} * NB;
""",
}


@dataclass(frozen=True)
class Tiling:
    """Sizes and counts of the tiles of a kernel.

    Attributes:
        forward: The unknowns of the forward pass by their short names.
        backward: Those of the backward pass.
        num_heads: Heads of the network.
        head_dim: Width of a head.
    """

    forward: dict[str, int]
    backward: dict[str, int]
    num_heads: int
    head_dim: int

    def macros(self) -> dict[str, int]:
        """Return the values under the names that the authors' kernels are compiled with, sorted."""
        found = {"FLASHRNN_HIDDEN_DIM": self.num_heads * self.head_dim, "FLASHRNN_NUM_HEADS": self.num_heads}
        for direction, values in (("forward", self.forward), ("backward", self.backward)):
            prefix = f"FLASHRNN_{direction.upper()}_"
            found[prefix + "SHARED_MEMORY_PADDING"] = _PADDING
            for short, name in (_SHARED_NAMES | _OWN_NAMES[direction]).items():
                found[prefix + name] = values[short]
        return dict(sorted(found.items()))


def tiling_problem(
    direction: Literal["forward", "backward"],
    *,
    device: Mapping[str, int],
    function: str,
    num_heads: int,
    head_dim: int,
    batch: int,
    dtype: str = "bfloat16",
) -> tuple[str, list[str]]:
    """Write the tiling of a persistent kernel as a text of constraints.

    Args:
        direction: ``"forward"`` or ``"backward"``.
        device: Limits of the GPU: ``maxThreadsPerBlock``, ``regsPerMultiprocessor``, ``multiProcessorCount`` and
            ``sharedMemPerBlockOptin`` (bytes).
        function: ``"elman"``, ``"lstm"``, ``"gru"`` or ``"slstm"``.
        num_heads: Number of heads.
        head_dim: Width of a head.
        batch: Sequences; rounded up to a multiple of 8, or of 16 in float32.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.

    Returns:
        The text and the order of its variables, for :func:`~dynakern.ops.constrint.solve`.

    Raises:
        ValueError: An argument is out of range, or a limit of the device is missing.
    """
    check_choice("direction", direction, ("forward", "backward"))
    check_choice("function", function, tuple(_GATES))
    check_choice("dtype", dtype, ("bfloat16", "float16", "float32"))
    for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("batch", batch)):
        check_positive(name, value, integer=True)
    missing = [name for name in _LIMITS if name not in device]
    if missing:
        raise ValueError(f"`device` lacks {', '.join(missing)}.")
    single, gates = dtype == "float32", _GATES[function]
    size, unit = (4, 16) if single else (2, 8)
    text = _TEXT[direction].format(
        tiles="[16]" if single else "[8, 16, 32]",
        depth=8 if single else 16,
        heads=num_heads,
        hidden=head_dim,
        columns=gates * head_dim,
        warp=32,
        threads=device["maxThreadsPerBlock"] // 4,
        batch=-(-batch // unit) * unit,
        processors=device["multiProcessorCount"],
        wide=4 // size,
        registers=device["regsPerMultiprocessor"] * 4 // size,
        size=size,
        matrix=size * gates * head_dim**2 + size * head_dim * _PADDING * (gates if direction == "forward" else 1),
        four_gates=4 * gates,
        shared=min(device["sharedMemPerBlockOptin"] - 1024, 227_000),
    )
    return text, _ORDER[direction].replace("-", ":largest").split()


def _solve(direction: Literal["forward", "backward"], **problem: object) -> dict[str, int]:
    text, order = tiling_problem(direction, **problem)  # pyright: ignore[reportArgumentType]
    program = parse(text)
    for solution in search(program, parse_order(program, order), _MAX_STEPS):
        return solution
    raise Infeasible(program)


def autotune(
    *,
    device: Mapping[str, int],
    function: str,
    num_heads: int,
    head_dim: int,
    batch: int,
    dtype: str = "bfloat16",
) -> Tiling:
    """Return the preferred tiling of the persistent kernels of a recurrent network on a GPU.

    Args:
        device: As for :func:`tiling_problem`.
        function: As for :func:`tiling_problem`.
        num_heads: As for :func:`tiling_problem`.
        head_dim: As for :func:`tiling_problem`.
        batch: As for :func:`tiling_problem`.
        dtype: As for :func:`tiling_problem`.

    Returns:
        The :class:`Tiling`.

    Raises:
        Infeasible: The network does not fit the device; the error names the constraints that contradict each other.
        ValueError: An argument is out of range.

    Example:
        >>> h100 = dict(maxThreadsPerBlock=1024, regsPerMultiprocessor=65536, multiProcessorCount=132,
        ...             sharedMemPerBlockOptin=232448)
        >>> tiling = autotune(device=h100, function="lstm", num_heads=1, head_dim=768, batch=16)
        >>> tiling.forward["rg"], tiling.forward["rh"]  # blocks along the gates and along the hidden dimension
        (96, 1)
    """
    problem = {
        "device": device, "function": function, "num_heads": num_heads, "head_dim": head_dim, "batch": batch,
        "dtype": dtype,
    }  # fmt: skip
    return Tiling(_solve("forward", **problem), _solve("backward", **problem), num_heads, head_dim)


def largest_head(
    *, device: Mapping[str, int], function: str, num_heads: int = 1, batch: int = 8, dtype: str = "bfloat16",
    multiple: int = 64,
) -> int:  # fmt: skip
    """Return the widest head, a multiple of ``multiple``, whose kernels fit a GPU; 0 if none does.

    Args:
        device: As for :func:`tiling_problem`.
        function: As for :func:`tiling_problem`.
        num_heads: As for :func:`tiling_problem`.
        batch: As for :func:`tiling_problem`.
        dtype: As for :func:`tiling_problem`.
        multiple: What the width must be a multiple of.

    Raises:
        ValueError: An argument is out of range.
    """
    check_positive("multiple", multiple, integer=True)
    tiling_problem(
        "forward", device=device, function=function, num_heads=num_heads, head_dim=multiple, batch=batch, dtype=dtype
    )
    size = 4 if dtype == "float32" else 2
    chip = device["multiProcessorCount"] * (4 * device["regsPerMultiprocessor"] + device["sharedMemPerBlockOptin"])
    width = int((chip / size / _GATES[function]) ** 0.5) // multiple * multiple  # R alone would fill the chip
    for head_dim in range(width, 0, -multiple):
        try:
            autotune(device=device, function=function, num_heads=num_heads, head_dim=head_dim, batch=batch, dtype=dtype)
        except Infeasible:
            continue
        return head_dim
    return 0
