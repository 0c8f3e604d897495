"""ConstrINT: a small solver of constraints over positive integers, and the tilings of recurrent kernels it finds.

How a kernel is cut into blocks, warps and cached tiles is a question about integers: sizes must divide each other, and
products of them must fit a device's threads, registers and shared memory. FlashRNN (Pöppel, Beck & Hochreiter, 2024,
arXiv:2412.07752, section 4) writes these rules as a text and takes the first solution in a stated order of preference.

The language: clauses end with ``;`` and all must hold; ``|`` separates alternatives; a relation is ``a <= b``,
``a == b`` or ``a % b == 0``; its sides are made of ``+``, ``*``, ``^ integer``, parentheses, names of letters and
underscores, positive integers, and lists ``[2, 4, 8]`` of which one value is taken; ``#`` starts a comment. Variables
are integers from 1 to 2**30.

Example:
    >>> from dynakern.ops.constrint import solve
    >>> solve("N == 48; N % (A * B) == 0; A == [2, 4, 8]; B == [3, 6, 12];", order=["A:largest", "B"])
    {'N': 48, 'A': 8, 'B': 3}
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

from dynakern.checks import check_positive
from dynakern.ops.constrint.language import ConstraintSyntaxError, Program, parse
from dynakern.ops.constrint.solver import Infeasible, Undecided, parse_order, search
from dynakern.ops.constrint.tiling import Tiling, autotune, largest_head, tiling_problem

__all__ = [
    "ConstraintSyntaxError",
    "Infeasible",
    "Tiling",
    "Undecided",
    "autotune",
    "largest_head",
    "solutions",
    "solve",
    "tiling_problem",
]


def _program(text: str, parentheses: Literal["honour", "strip"]) -> Program:
    program = parse(text, parentheses=parentheses)
    if program.ambiguous and parentheses == "honour":
        warnings.warn(
            "The parentheses of this text change its meaning; the authors' solver ignores them "
            "(parentheses='strip' does too).",
            UserWarning,
            stacklevel=3,
        )
    return program


def solve(
    text: str,
    *,
    order: Sequence[str] | None = None,
    parentheses: Literal["honour", "strip"] = "honour",
    max_steps: int = 1_000_000,
) -> dict[str, int]:
    """Return the first solution of a text of constraints.

    Solutions are ordered like words: by the first variable of ``order``, then by the second, and so on.

    Args:
        text: The constraints; see :mod:`dynakern.ops.constrint`.
        order: Variables by falling importance, each ``"NAME"`` or ``"NAME:smallest"`` (small values first) or
            ``"NAME:largest"``. By default all, as they appear. Other variables take the smallest values that fit.
        parentheses: ``"honour"`` them, with a warning if they change the meaning, or ``"strip"`` them, as the authors'
            solver does.
        max_steps: Constraints propagated before the search is given up.

    Returns:
        The value of every variable.

    Raises:
        ConstraintSyntaxError: The text is malformed; a ``ValueError`` that gives line and column.
        Infeasible: There is no solution; a ``ValueError`` that names clauses that contradict each other.
        Undecided: ``max_steps`` were not enough.
        ValueError: ``order`` does not fit the text.

    Example:
        >>> solve("X * Y == 24; X <= 6; Y <= 12;", order=["X:largest", "Y"])
        {'X': 6, 'Y': 4}
    """
    program = _program(text, parentheses)
    check_positive("max_steps", max_steps, integer=True)
    for solution in search(program, parse_order(program, order), max_steps):
        return solution
    raise Infeasible(program)


def solutions(
    text: str,
    *,
    order: Sequence[str] | None = None,
    parentheses: Literal["honour", "strip"] = "honour",
    max_steps: int = 10_000_000,
) -> Iterator[dict[str, int]]:
    """Yield all solutions in order, one for each choice of the variables of ``order``.

    Args:
        text: As for :func:`solve`.
        order: As for :func:`solve`.
        parentheses: As for :func:`solve`.
        max_steps: As for :func:`solve`.

    Yields:
        The value of every variable.

    Raises:
        ConstraintSyntaxError: The text is malformed.
        Undecided: ``max_steps`` were not enough.
        ValueError: ``order`` does not fit the text.

    Example:
        >>> [s["X"] for s in solutions("X * Y == 24; X <= 6; Y <= 12;")]
        [2, 3, 4, 6]
    """
    program = _program(text, parentheses)
    check_positive("max_steps", max_steps, integer=True)
    return search(program, parse_order(program, order), max_steps)
