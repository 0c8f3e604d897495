"""How an operator chooses its engine, and how to ask why.

Every public operator stands in front of up to three engines: ``reference`` (plain PyTorch, the definition, any dtype,
any derivative), ``cpu`` (Numba or blocked library calls) and ``gpu`` (Triton). The fast engines are first-order reverse
mode only; where that is not enough the reference is taken.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dynakern.checks import check_choice
from dynakern.measure import is_counting_flops

__all__ = [
    "Backend",
    "Choice",
    "explain_backend",
    "numba_threads",
    "numba_vector_bytes",
    "refuse_double_backward",
    "resolve_backend",
]

Backend = Literal["auto", "reference", "cpu", "gpu"]

_log = logging.getLogger("dynakern.ops")


@dataclass(frozen=True)
class Choice:
    """What :func:`explain_backend` answers.

    Attributes:
        operator: Name of the operator.
        engine: The engine that would run: ``"reference"``, ``"cpu"`` or ``"gpu"``.
        reason: Why, in words.
    """

    operator: str
    engine: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.engine} ({self.reason})"


class _Explained(Exception):
    def __init__(self, choice: Choice) -> None:
        self.choice = choice


_explaining = threading.local()


def resolve_backend(
    operator: str,
    backend: Backend,
    tensors: Sequence[Tensor | None],
    *,
    refusals: Mapping[str, str | None],
    small: bool = False,
) -> str:
    """Return the engine that serves this call.

    Args:
        operator: Name of the operator, for messages.
        backend: What the caller asked for.
        tensors: The tensor arguments; the first one decides the device.
        refusals: For each fast engine that the operator has, why it cannot take these arguments (None if it can).
            Device, functorch transforms and forward-mode tangents are checked here and need no mention.
        small: The input is so small that ``auto`` does better with the reference. Ignored while compiling, since a
            choice by size would be frozen into the graph.

    Returns:
        ``"reference"``, ``"cpu"`` or ``"gpu"``.

    Raises:
        ValueError: ``backend`` is no known name.
        NotImplementedError: The engine asked for by name cannot run; the message says why.
    """
    check_choice("backend", backend, ("auto", "reference", "cpu", "gpu"))
    present = [x for x in tensors if x is not None]
    device = present[0].device.type
    native = {"cuda": "gpu", "xpu": "gpu"}.get(device, "cpu" if device in ("cpu", "meta") else "reference")
    if backend == "reference":
        choice = Choice(operator, "reference", "asked for")
    elif backend == "auto":
        if native not in refusals:
            choice = Choice(operator, "reference", f"there is no fast engine for {device!r} tensors")
        else:
            reason = _cannot(native, device, native, present, refusals)
            if reason is not None:
                choice = Choice(operator, "reference", f"the {native} engine cannot run: {reason}")
            elif small and not torch.compiler.is_compiling() and not is_counting_flops():
                choice = Choice(operator, "reference", "the input is small")
            else:
                choice = Choice(operator, native, f"the fast engine for {device!r} tensors")
    else:
        reason = _cannot(backend, device, native, present, refusals)
        if reason is not None:
            raise NotImplementedError(
                f"{operator}: the {backend} engine cannot run: {reason}. Pass backend='reference' or 'auto'."
            )
        choice = Choice(operator, backend, "asked for")
    if not torch.compiler.is_compiling():
        if getattr(_explaining, "active", False):
            raise _Explained(choice)
        _log.debug("%s", choice)
    return choice.engine


def _cannot(
    engine: str, device: str, native: str, tensors: Sequence[Tensor], refusals: Mapping[str, str | None]
) -> str | None:
    if engine not in refusals:
        return f"the operator has no {engine} engine"
    if engine != native:
        return f"it does not take tensors on {device!r}"
    if _transformed():
        return "a functorch transform (vmap, jvp, jacrev, ...) is active and fast engines know reverse mode only"
    if any(_has_tangent(x) for x in tensors):
        return "an input carries a forward-mode tangent and fast engines know reverse mode only"
    return refusals[engine]


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def _has_tangent(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def explain_backend(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Say which engine ``fn(*args, **kwargs)`` would use and why, without running it.

    Args:
        fn: A public operator, or any function or module that calls one; the first operator reached answers.
        *args: Its arguments.
        **kwargs: Its keyword arguments.

    Returns:
        The :class:`Choice`; print it.

    Raises:
        ValueError: No operator was reached.

    Example:
        >>> import torch
        >>> from dynakern.ops import fft_conv
        >>> print(explain_backend(fft_conv, torch.zeros(1, 2, 8), torch.zeros(2, 8), backend="reference"))
        fft_conv: reference (asked for)
    """
    _explaining.active = True
    try:
        fn(*args, **kwargs)
    except _Explained as explained:
        return explained.choice
    finally:
        _explaining.active = False
    raise ValueError(f"{getattr(fn, '__name__', fn)!r} called no operator of dynakern.ops.")


def refuse_double_backward(operator: str) -> NoReturn:
    """Raise the error of a second derivative through a fast engine."""
    raise NotImplementedError(
        f"{operator}: the fast engines give first derivatives only; pass backend='reference' for higher ones."
    )


_numba_lock = threading.RLock()


@contextlib.contextmanager
def numba_threads() -> Iterator[None]:
    """Run Numba kernels with as many threads as PyTorch uses, one kernel at a time in a process.

    The lock is there because Numba's default threading layer must not be entered by two threads at once.
    """
    import numba
    from numba.core import config

    with _numba_lock:
        # Numba's OpenMP layer shares its library with PyTorch and sets PyTorch's number of threads when it starts.
        threads = torch.get_num_threads()
        before = numba.get_num_threads()
        numba.set_num_threads(max(1, min(threads, config.NUMBA_NUM_THREADS)))  # pyright: ignore
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            numba.set_num_threads(before)


def numba_vector_bytes() -> int:
    """Return how wide a vector of the processor that Numba compiles for is: 64 bytes with AVX-512, else 32."""
    import llvmlite.binding as llvm
    from numba.core import config

    if config.CPU_FEATURES is not None:  # pyright: ignore[reportAttributeAccessIssue]
        wide = "+avx512f" in config.CPU_FEATURES  # pyright: ignore[reportAttributeAccessIssue]
    else:
        host = config.CPU_NAME in (None, "host")  # pyright: ignore[reportAttributeAccessIssue]
        wide = host and llvm.get_host_cpu_features().get("avx512f", False)
    return 64 if wide else 32
