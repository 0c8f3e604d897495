"""Assertions on tensors and small helpers for tests, in the manner of ``numpy.testing``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["assert_same", "available_backends", "grads", "rand", "randn", "relative_error"]

# Relative RMS error that two computations of one quantity may differ by, for each dtype.
_RTOL = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ``||actual - expected|| / ||expected||`` (the plain norm of the difference where ``expected`` is zero)."""
    dtype = torch.complex128 if actual.is_complex() or expected.is_complex() else torch.float64
    difference, scale = (
        (actual.detach().to(dtype) - expected.detach().to(dtype)).norm(),
        expected.detach().to(dtype).norm(),
    )
    return float(difference / scale) if scale > 0 else float(difference)


def assert_same(
    actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], *, rtol: float | None = None, name: str = ""
) -> None:
    """Assert that two tensors, or two sequences of tensors, agree in shape and in relative RMS error.

    Args:
        actual: What was computed.
        expected: What it must be.
        rtol: Largest relative RMS error; by default 1e-10 in float64, 1e-5 in float32, 2e-3 in float16, 1e-2 in
            bfloat16 (the lower precision of the two counts).
        name: Label for the message.

    Raises:
        AssertionError: Shapes differ, a value is not finite on one side only, or the error exceeds ``rtol``; the
            message gives the worst index.
    """
    if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
        assert len(actual) == len(expected), f"{name}: {len(actual)} tensors, expected {len(expected)}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, rtol=rtol, name=f"{name}[{i}]")
        return
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    if rtol is None:
        rtol = max(_RTOL.get(x.real.dtype if x.is_complex() else x.dtype, 0.0) for x in (actual, expected))
    error = relative_error(actual, expected)
    if not error <= rtol:
        difference = (actual.detach() - expected.detach()).abs().nan_to_num(nan=float("inf"))
        worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(
            f"{name}: relative RMS error {error:.3e} > {rtol:.1e}; worst at {worst}: "
            f"{actual[worst].item()!r}, expected {expected[worst].item()!r}"
        )


def grads(output: Tensor | Sequence[Tensor], inputs: Sequence[Tensor], *, seed: int = 0) -> list[Tensor]:
    """Return the gradients of a fixed random projection of ``output`` with respect to ``inputs`` (zeros if unused)."""
    outputs = [output] if isinstance(output, torch.Tensor) else [o for o in output if o.requires_grad]
    cotangents = [
        randn(*o.shape, seed=seed + i, dtype=o.dtype, requires_grad=False).to(o.device) for i, o in enumerate(outputs)
    ]
    found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> Tensor:
    """Return standard normal values from a fixed seed, float64 and differentiable by default."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(*shape, generator=generator, dtype=wide).to(dtype).requires_grad_(requires_grad)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> Tensor:
    """Return uniform values in [0, 1) from a fixed seed, float64 and differentiable by default."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def available_backends() -> list[str]:
    """Return the engines that tests can run here: ``reference``, ``cpu`` and, with a GPU, ``gpu``."""
    return ["reference", "cpu", *(["gpu"] if torch.cuda.is_available() else [])]
