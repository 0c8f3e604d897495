"""The selective state space over two axes, time and variates, whose coefficients are computed from the input."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_choice, check_floating, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend
from dynakern.ops.scan2d import gpu_refusal

__all__ = ["ssm2d"]

Coupling = Literal["half", "raw", "none"]
InputRule = Literal["zoh", "euler"]


@overload
def ssm2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    coupling: Coupling = "half",
    input_rule: InputRule = "zoh",
    return_state: Literal[False] = False,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def ssm2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    coupling: Coupling = "half",
    input_rule: InputRule = "zoh",
    return_state: Literal[True],
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...


def ssm2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    coupling: Coupling = "half",
    input_rule: InputRule = "zoh",
    return_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    r"""Run the selective two-dimensional state space.

    With :math:`\bar A_1 = \kappa e^{\delta_1 A_1}`, :math:`\bar A_2 = \kappa e^{\delta_1 A_2}`,
    :math:`\bar A_3 = \kappa e^{\delta_2 A_3}`, :math:`\bar A_4 = \kappa e^{\delta_2 A_4}`, and for each state
    :math:`\bar B = A^{-1}(e^{\delta A} - 1) B` (with :math:`A_1, \delta_1` and :math:`A_3, \delta_2`),

    .. math::
        h^1_{v,t} &= \bar A_1 h^1_{v,t-1} + \bar A_2 h^2_{v,t-1} + \bar B_1 x_{v,t}, \\
        h^2_{v,t} &= \bar A_3 h^1_{v-1,t} + \bar A_4 h^2_{v-1,t} + \bar B_2 x_{v,t}, \\
        y_{v,t} &= C_1 h^1_{v,t} + C_2 h^2_{v,t} + D x_{v,t}.

    O(B V T D N) time. The CPU engine computes coefficients and states where it needs them, in the forward and again in
    the backward pass, so that it takes no more memory than its inputs and outputs do; with ``return_state``, on a GPU
    and in the reference, where :func:`dynakern.ops.scan2d` runs the recurrence, all of them are held.

    Args:
        x: Input, ``(B, V, T, D)``.
        delta: Steps along time and across variates, ``(B, V, T, 2, D)``, positive.
        A: Rates A1 .. A4, ``(4, D, N)``, negative.
        B: Input maps of the two states, ``(B, V, T, 2, N)``.
        C: Output maps of the two states, ``(B, V, T, 2, N)``.
        D: Weight of the skip, ``(D,)``.
        coupling: :math:`\kappa`: ``"half"`` is 1/2, which keeps the response bounded; ``"raw"`` is 1; ``"none"`` drops
            A2, A3 and A4 from the recurrence, so that every variate runs alone with :math:`\kappa = 1`.
        input_rule: ``"zoh"`` as above, or ``"euler"``: :math:`\bar B = \delta B`, as in Mamba.
        return_state: Return both states too, ``(B, V, T, D, N)``.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"gpu"``.

    Returns:
        y ``(B, V, T, D)``, or ``(y, h1, h2)``, of the dtype of ``x``; 16-bit inputs are computed in float32.

    Raises:
        TypeError: An argument is not floating point.
        ValueError: Shapes do not fit, V or T is 0, a name is unknown, or devices differ.
        NotImplementedError: ``backend`` names an engine that cannot run.

    Example:
        >>> one = torch.ones(1, 2, 3, 1)  # 2 variates, 3 steps
        >>> steps, maps = torch.full((1, 2, 3, 2, 1), 0.1), torch.ones(1, 2, 3, 2, 1)
        >>> ssm2d(one, steps, -torch.ones(4, 1, 1), maps, maps).shape
        torch.Size([1, 2, 3, 1])

    Source: Behrouz et al., 2024, arXiv:2406.04320; one input map a state and the factor 1/2 are choices of ours.
    """
    tensors = (x, delta, A, B, C, D)
    _check(*tensors, coupling, input_rule)
    engine = resolve_backend(
        "ssm2d",
        backend,
        tensors,
        refusals={"cpu": None, "gpu": gpu_refusal()},
        small=x.shape[1] * x.shape[2] <= 2,
    )
    real = torch.float64 if any(v is not None and v.dtype == torch.float64 for v in tensors) else torch.float32
    wide = tuple(None if v is None else v.to(real) for v in tensors)
    if engine == "cpu" and not return_state:
        return torch.ops.dynakern.ssm2d(*wide, coupling, input_rule == "euler").to(x.dtype)
    from dynakern.ops.ssm2d.reference import ssm2d_reference

    found = tuple(v.to(x.dtype) for v in ssm2d_reference(*wide, coupling, input_rule, engine))  # pyright: ignore
    return found if return_state else found[0]  # pyright: ignore


def _check(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, coupling: str, input_rule: str
) -> None:
    check_choice("coupling", coupling, ("half", "raw", "none"))
    check_choice("input_rule", input_rule, ("zoh", "euler"))
    shapes = {"x": (x, "B V T D"), "A": (A, "4 D N"), "delta": (delta, "B V T 2 D")}
    shapes |= {"B": (B, "B V T 2 N"), "C": (C, "B V T 2 N")} | ({} if D is None else {"D": (D, "D")})
    dims: dict[str, int] = {}
    for name, (value, pattern) in shapes.items():
        dims = check_shape(name, value, pattern, dims)
        check_floating(name, value)
    if min(dims["V"], dims["T"]) == 0:
        raise ValueError(f"`x` must have V, T >= 1, got shape {tuple(x.shape)}.")
    check_same_device(**{name: value for name, (value, _) in shapes.items()})


@torch.library.custom_op("dynakern::ssm2d", mutates_args=())
def _ssm2d(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, coupling: str, euler: bool
) -> Tensor:
    from dynakern.ops.ssm2d import cpu

    return cpu.forward((x, delta, A, B, C, D), coupling, euler)


@_ssm2d.register_fake
def _(x, delta, A, B, C, D, coupling, euler):
    return x.new_empty(x.shape)


@torch.library.custom_op("dynakern::ssm2d_backward", mutates_args=())
def _ssm2d_backward(
    g: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, coupling: str, euler: bool
) -> list[Tensor]:
    from dynakern.ops.ssm2d import cpu

    return cpu.backward(g, (x, delta, A, B, C, D), coupling, euler)


@_ssm2d_backward.register_fake
def _(g, x, delta, A, B, C, D, coupling, euler):
    return [x.new_empty(0 if v is None else v.shape) for v in (x, delta, A, B, C, D)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _grad(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.dynakern.ssm2d_backward(g, *ctx.saved_tensors, *ctx.options)
    needed = zip(found, ctx.needs_input_grad, strict=False)
    return *(grad if wanted else None for grad, wanted in needed), None, None


def _refuse(ctx: Any, *grads: Any) -> None:
    refuse_double_backward("ssm2d")


_ssm2d.register_autograd(_grad, setup_context=_save)
_ssm2d_backward.register_autograd(_refuse)


@register_flop_formula(torch.ops.dynakern.ssm2d)
def _(x_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    """Count 32 operations a cell, feature and state: 12 for coefficients, 16 for the recurrence, 4 for the output."""
    return 32 * x_shape[0] * x_shape[1] * x_shape[2] * x_shape[3] * A_shape[2]


@register_flop_formula(torch.ops.dynakern.ssm2d_backward)
def _(g_shape, x_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    """Count 90 operations a cell, feature and state: 28 to recompute the state, 62 for the gradients."""
    return 90 * x_shape[0] * x_shape[1] * x_shape[2] * x_shape[3] * A_shape[2]
