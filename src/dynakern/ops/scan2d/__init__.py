r"""The two-dimensional linear recurrence: one state that runs along time, one that runs across variates."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_floating, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend

__all__ = ["gpu_refusal", "scan2d"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def scan2d(
    a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, b1: Tensor, b2: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Run a Roesser recurrence with coefficients of their own in every cell.

    .. math::
        h^1_{v,t} &= a^1_{v,t} h^1_{v,t-1} + a^2_{v,t} h^2_{v,t-1} + b^1_{v,t}, \\
        h^2_{v,t} &= a^3_{v,t} h^1_{v-1,t} + a^4_{v,t} h^2_{v-1,t} + b^2_{v,t},

    elementwise, with zero states outside the grid. O(V T F) time; the fast engines walk the rows, the lanes F side by
    side, and their backward passes walk them back.

    Args:
        a1: Transition along time of the first state, ``(V, T, ...)``.
        a2: From the second state to the first, along time.
        a3: From the first state to the second, across variates.
        a4: Transition across variates of the second state.
        b1: Input of the first state.
        b2: Input of the second state; all six of one shape.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"gpu"``.

    Returns:
        :math:`h^1` and :math:`h^2`, ``(V, T, ...)``; 16-bit inputs are computed in float32.

    Raises:
        TypeError: An argument is not floating point.
        ValueError: Shapes differ, there are fewer than two axes, V or T is 0, or devices differ.
        NotImplementedError: ``backend`` names an engine that cannot run.

    Example:
        >>> ones, half = torch.ones(2, 3), torch.full((2, 3), 0.5)
        >>> h1, h2 = scan2d(half, half, half, half, ones, 0 * ones)
        >>> h1
        tensor([[1.0000, 1.5000, 1.7500],
                [1.0000, 1.7500, 2.2500]])

    Source: Roesser, 1975, doi:10.1109/TAC.1975.1100844; in Behrouz et al., 2024, arXiv:2406.04320.
    """
    named = {"a1": a1, "a2": a2, "a3": a3, "a4": a4, "b1": b1, "b2": b2}
    if a1.ndim < 2 or min(a1.shape[:2]) == 0:
        raise ValueError(f"`a1` must have shape (V, T, ...) with V, T >= 1, got {tuple(a1.shape)}.")
    for name, x in named.items():
        check_floating(name, x)
        check_shape(name, x, " ".join(map(str, a1.shape)))
    check_same_device(**named)
    refusals = {"cpu": None, "gpu": gpu_refusal()}
    engine = resolve_backend("scan2d", backend, tuple(named.values()), refusals=refusals)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in named.values()) else torch.float32
    wide = [x.to(dtype) for x in named.values()]
    if engine != "reference":
        flat = [x.reshape(*a1.shape[:2], -1) for x in wide]
        h1, h2 = (h.reshape(a1.shape) for h in torch.ops.dynakern.scan2d(*flat))
    else:
        from dynakern.ops.scan2d.reference import scan2d_reference

        h1, h2 = scan2d_reference(*wide)
    return h1.to(a1.dtype), h2.to(a1.dtype)


def gpu_refusal() -> str | None:
    """Return why the GPU engine cannot run, or None."""
    return None if _HAS_TRITON else "Triton is not installed: pip install 'dynakern[gpu]'"


def _engine(x: Tensor) -> Any:
    if x.device.type == "cpu":
        from dynakern.ops.scan2d import cpu

        return cpu
    from dynakern.ops.scan2d import gpu

    return gpu


@torch.library.custom_op("dynakern::scan2d", mutates_args=())
def _scan2d(a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    return _engine(a1).forward(a1, a2, a3, a4, b1, b2)


@_scan2d.register_fake
def _(a1, a2, a3, a4, b1, b2):
    return a1.new_empty(a1.shape), a1.new_empty(a1.shape)


@torch.library.custom_op("dynakern::scan2d_backward", mutates_args=())
def _scan2d_backward(
    g1: Tensor, g2: Tensor, a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, h1: Tensor, h2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _engine(a1).backward(g1, g2, a1, a2, a3, a4, h1, h2)


@_scan2d_backward.register_fake
def _(g1, g2, a1, a2, a3, a4, h1, h2):
    return tuple(a1.new_empty(a1.shape) for _ in range(6))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4], *output)


def _grad(ctx, g1: Tensor, g2: Tensor):
    return torch.ops.dynakern.scan2d_backward(g1, g2, *ctx.saved_tensors)


_scan2d.register_autograd(_grad, setup_context=_save)
_scan2d_backward.register_autograd(lambda ctx, *grads: refuse_double_backward("scan2d"))


@register_flop_formula(torch.ops.dynakern.scan2d)
def _(a1_shape, *args, **kwargs) -> int:
    """Count four multiply-adds a cell and lane."""
    return 8 * a1_shape[0] * a1_shape[1] * a1_shape[2]


@register_flop_formula(torch.ops.dynakern.scan2d_backward)
def _(g1_shape, *args, **kwargs) -> int:
    return 16 * g1_shape[0] * g1_shape[1] * g1_shape[2]
