"""Argument checks with messages that name the argument, what came and what is needed.

Operators and ``Module.forward`` check metadata only (shape, dtype, device): checks of values would break
``torch.compile`` and ``torch.export``. Values are checked where data enters: readers, estimators, tasks, the command
line and the training loop.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = [
    "check_choice",
    "check_finite",
    "check_floating",
    "check_positive",
    "check_same_device",
    "check_shape",
    "require",
    "unknown_name",
]


def check_shape(name: str, x: Tensor, pattern: str, dims: dict[str, int] | None = None) -> dict[str, int]:
    """Check ``x`` against ``pattern`` and return the sizes bound so far.

    Args:
        name: The argument's name, for the message.
        x: Tensor to check.
        pattern: One word an axis, e.g. ``"B L D"`` or ``"B 4 D"``; a word that is an integer is a fixed size.
        dims: Sizes already bound by earlier checks; not modified.

    Returns:
        ``dims`` with the letters of ``pattern`` added.

    Raises:
        TypeError: ``x`` is not a tensor.
        ValueError: ``x`` has another number of axes, or an axis has another size.

    Example:
        >>> import torch
        >>> check_shape("x", torch.zeros(2, 5), "B L")
        {'B': 2, 'L': 5}
    """
    if not hasattr(x, "ndim") or not hasattr(x, "shape"):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}.")
    dims, letters = dict(dims or {}), pattern.split()
    if x.ndim != len(letters):
        raise ValueError(f"`{name}` must have shape ({', '.join(letters)}), got {tuple(x.shape)}.")
    for axis, (letter, size) in enumerate(zip(letters, x.shape, strict=True)):
        want = int(letter) if letter.isdigit() else dims.setdefault(letter, size)
        if size != want:
            rule = f"size {want}" if letter.isdigit() else f"{letter} = {want}"
            raise ValueError(f"`{name}` must have {rule} on axis {axis}, got shape {tuple(x.shape)}.")
    return dims


def check_floating(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` unless ``x`` is a tensor of a real floating-point dtype."""
    if not hasattr(x, "is_floating_point"):
        raise TypeError(f"`{name}` must be a tensor, got {type(x).__name__}.")
    if not x.is_floating_point():
        raise TypeError(f"`{name}` must have a floating-point dtype, got {x.dtype}.")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all given tensors live on one device."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"`{name}` on {device}" for name, device in devices.items())
        raise ValueError(f"All tensors must be on one device, got {listing}.")


def check_positive(name: str, value: float, *, integer: bool = False, zero: bool = False) -> None:
    """Raise unless ``value`` is a positive (or, with ``zero``, non-negative) finite number.

    Raises:
        TypeError: ``integer`` is set and ``value`` is no ``int``, or ``value`` is no number.
        ValueError: ``value`` is out of range.
    """
    kind = "integer" if integer else "number"
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(f"`{name}` must be a{'n' if integer else ''} {kind}, got {value!r}.")
    if not (value >= 0 if zero else value > 0) or value == float("inf"):
        rule = "non-negative" if zero else "positive"
        raise ValueError(f"`{name}` must be a {rule} {kind}, got {value!r}.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``; the message lists them and the nearest."""
    if value not in choices:
        listing = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listing}, got {value!r}.{_suggestion(str(value), choices)}")


def check_finite(name: str, values: np.ndarray | Tensor) -> None:
    """Raise ``ValueError`` if ``values`` holds NaN or infinity, saying how many and where the first is.

    This reads the data: call it where data enters, never in ``Module.forward``.
    """
    import numpy as np

    array = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"`{name}` must be finite, got {int(bad.sum())} NaN or infinite value(s), the first at index {first}."
        )


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name, with the nearest known ones."""
    known = sorted(known)
    suggestion = _suggestion(name, known)
    listed = ", ".join(known) if len(known) <= 25 else f"{len(known)} names, from {known[0]} to {known[-1]}"
    return f"Unknown {kind} {name!r}.{suggestion}" + ("" if suggestion else f" Known: {listed}.")


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: It is not installed; the message gives the pip line of the ``extra`` that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This needs the optional package {module!r}: pip install 'dynakern[{extra}]' ({error})."
        ) from error
