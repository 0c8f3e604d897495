"""Selective scan: the input-dependent linear recurrence of Mamba and of VMamba's 2-D scans.

A state-space model remembers a sequence in a state of fixed size. When the step size and the input and output maps
depend on the input, it can choose what to keep and what to forget (Gu & Dao, 2023, arXiv:2312.00752); the price is
that it is no convolution any more and has to be computed as a scan, in O(L) time and O(1) memory a step. Groups of
channels with maps of their own serve the four scan directions of SS2D (Liu et al., 2024, arXiv:2401.10166).

Implemented: real A; static or variable B and C, each on its own; groups; skip; gate; step bias and softplus; an initial
state; the last state with its gradient. Not implemented: complex A and packing of sequences of several lengths.

Example:
    >>> import torch
    >>> u, delta = torch.randn(2, 6, 50), torch.rand(2, 6, 50)
    >>> A, B, C = -torch.rand(6, 4), torch.randn(2, 4, 50), torch.randn(2, 4, 50)
    >>> y = selective_scan(u, delta, A, B, C)
    >>> first, state = selective_scan(u[..., :20], delta[..., :20], A, B[..., :20], C[..., :20], return_last_state=True)
    >>> rest = selective_scan(u[..., 20:], delta[..., 20:], A, B[..., 20:], C[..., 20:], initial_state=state)
    >>> torch.allclose(y, torch.cat([first, rest], -1), atol=1e-5)
    True
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_floating, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend

__all__ = ["selective_scan"]

_CHUNK = 64  # steps between two states that the forward pass keeps for the backward pass
_MAX_STATE_GPU = 256  # a GPU program holds the states of its channels in registers
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
    *,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Scan a sequence with a diagonal state-space model whose step size and maps change with the input.

    With :math:`\Delta` = ``delta + delta_bias``, through a softplus if ``delta_softplus``, and g the group of d,

    .. math::
        h_{dn}[l] &= e^{\Delta_d[l] A_{dn}} h_{dn}[l-1] + \Delta_d[l] B_{gn}[l] u_d[l], \\
        y_d[l] &= \Bigl(\sum_n C_{gn}[l] h_{dn}[l] + D_d u_d[l]\Bigr) \operatorname{silu}(z_d[l]).

    O(b D N L) time; the fast engines keep one state in 64 steps for the backward pass and never hold the
    ``(b, D, L, N)`` states.

    Args:
        u: Input, ``(b, D, L)``: batch, channels, steps.
        delta: Raw step sizes, ``(b, D, L)``.
        A: Rates of the states, ``(D, N)``, real, in practice negative.
        B: Input map: static ``(D, N)``, or variable ``(b, N, L)`` or ``(b, G, N, L)``. G divides D, and channel d
            belongs to group ``d // (D / G)``.
        C: Output map, of any of these shapes, independently of ``B``.
        D: Weight of the skip, ``(D,)``.
        z: Gate, ``(b, D, L)``; applied after the skip.
        delta_bias: Added to ``delta`` before the softplus, ``(D,)``.
        delta_softplus: Pass the steps through a softplus (the identity above 20, as ``torch.nn.functional.softplus``).
        return_last_state: Also return the state after the last step.
        initial_state: State before the first step, ``(b, D, N)``; zero by default.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"gpu"``.

    Returns:
        ``y``, ``(b, D, L)``, of the dtype of ``u``; with ``return_last_state`` also the state ``(b, D, N)``. All
        arithmetic and the state are float64 if ``u`` is, else float32.

    Raises:
        TypeError: An argument is no tensor, or is not of a real floating-point dtype.
        ValueError: A shape does not fit, D is not divisible by G, L is 0, or tensors are on several devices.
        NotImplementedError: The engine asked for by name cannot run here.

    Example:
        >>> y, h = selective_scan(torch.ones(1, 1, 3), torch.ones(1, 1, 3), torch.zeros(1, 1),
        ...                       torch.ones(1, 1), torch.ones(1, 1), return_last_state=True)
        >>> y, h
        (tensor([[[1., 2., 3.]]]), tensor([[[3.]]]))

    Source: Gu & Dao, 2023, arXiv:2312.00752, algorithm 2; ``selective_scan_ref`` of ``state-spaces/mamba``. As there,
    B is discretised by :math:`\Delta B` (Euler), not by the zero-order hold of the paper's eq. 4. Differs from there:
    float64 stays float64, the last state has a gradient, and there is an initial state.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    B, C = _same_groups(B, C)
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    operands: list[Any] = [None if x is None else x.to(real) for x in given]
    engine = resolve_backend(
        "selective_scan",
        backend,
        operands,
        refusals={"cpu": None, "gpu": _gpu_refusal(real, A.shape[1])},
        small=u.shape[2] <= 2,
    )
    if engine == "reference":
        from dynakern.ops.selective_scan.reference import scan_reference

        y, last = scan_reference(*operands, delta_softplus=delta_softplus)
    else:
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands)
        y, last, _ = _scan(*operands, delta_softplus=delta_softplus, keep=keep)
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, delta_bias: Any, h: Any) -> None:
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    tensors["initial_state"] = h
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.is_complex():
            raise TypeError(f"`{name}` must be real, got {x.dtype}: complex state spaces are not supported.")
        if x is not None:
            check_floating(name, x)
    dims = check_shape("u", u, "b D L")
    if dims["L"] == 0:
        raise ValueError("`u` must have at least one step, got L = 0.")
    check_shape("delta", delta, "b D L", dims)
    dims = check_shape("A", A, "D N", dims)
    for name, x in (("B", B), ("C", C)):
        if x.ndim not in (2, 3, 4):
            raise ValueError(f"`{name}` must have shape (D, N), (b, N, L) or (b, G, N, L), got {tuple(x.shape)}.")
        check_shape(name, x, {2: "D N", 3: "b N L", 4: "b G N L"}[x.ndim], dims)
        if x.ndim == 4 and (x.shape[1] == 0 or dims["D"] % x.shape[1]):
            raise ValueError(
                f"The channels D = {dims['D']} must be divisible by the groups of `{name}`, got G = {x.shape[1]}."
            )
    for name, x, pattern in (("D", D, "D"), ("z", z, "b D L"), ("delta_bias", delta_bias, "D")):
        if x is not None:
            check_shape(name, x, pattern, dims)
    if h is not None:
        check_shape("initial_state", h, "b D N", dims)
    check_same_device(**tensors)


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Bring variable coefficients to ``(b, G, N, L)`` with one G for both."""
    B, C = (x.unsqueeze(1) if x.ndim == 3 else x for x in (B, C))
    if B.ndim == C.ndim == 4 and B.shape[1] != C.shape[1]:
        groups = math.lcm(B.shape[1], C.shape[1])  # divides D, since both do
        B, C = (x.repeat_interleave(groups // x.shape[1], dim=1) for x in (B, C))
    return B, C


def _gpu_refusal(real: torch.dtype, states: int) -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed: pip install 'dynakern[gpu]'"
    if real == torch.float64:
        return "it computes in float32 and the input is float64"
    return None if states <= _MAX_STATE_GPU else f"it takes at most {_MAX_STATE_GPU} states, got N = {states}"


def _engine(u: Tensor) -> Any:
    if u.device.type == "cpu":
        from dynakern.ops.selective_scan import cpu

        return cpu
    from dynakern.ops.selective_scan import gpu

    return gpu


def _no_states(u: Tensor, A: Tensor, keep: bool) -> Tensor:
    chunks = (u.shape[2] + _CHUNK - 1) // _CHUNK
    return u.new_empty((u.shape[0], chunks, *A.shape) if keep else (0, 0, 0, 0))


@torch.library.custom_op("dynakern::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    states = _no_states(u, A, keep)
    operands = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    y, last = _engine(u).scan_forward(operands, delta_softplus, _CHUNK, states)
    return y, last, states


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, keep):
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, u.new_empty(u.shape[0], *A.shape), _no_states(u, A, keep)


@torch.library.custom_op("dynakern::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    operands = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    engine = _engine(u)
    if states.numel() == 0:
        states = _no_states(u, A, True)
        engine.scan_forward(operands, delta_softplus, _CHUNK, states)
    return engine.scan_backward(operands, delta_softplus, _CHUNK, states, grad_y, grad_last)


@_scan_backward.register_fake
def _(grad_y, grad_last, states, *operands_and_softplus):
    u = operands_and_softplus[0]
    return [
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in operands_and_softplus[:9]
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(output[2], *operands)


def _backward(ctx: Any, grad_y: Tensor, grad_last: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    states, *operands = ctx.saved_tensors
    found = _scan_backward(grad_y, grad_last, states, *operands, delta_softplus=ctx.delta_softplus)
    grads = [
        g if needed and x is not None else None
        for g, x, needed in zip(found, operands, ctx.needs_input_grad, strict=False)
    ]
    return *grads, None, None


def _refuse(ctx: Any, *grads: Any) -> None:
    refuse_double_backward("selective_scan")


_scan.register_autograd(_backward, setup_context=_setup_context)
_scan_backward.register_autograd(_refuse)


@register_flop_formula(torch.ops.dynakern.selective_scan)
def _flops(u_shape, delta_shape, A_shape, B_shape, C_shape, D_shape, z_shape, *args, out_shape=None, **kwargs) -> int:
    """Count 9 operations for a channel, state and step (one of them the exponential), and the skip and gate."""
    batch, channels, length = u_shape
    extra = sum(2 for shape in (D_shape, z_shape) if shape is not None)
    return batch * channels * length * (9 * A_shape[1] + extra)


@register_flop_formula(torch.ops.dynakern.selective_scan_backward)
def _backward_flops(y_shape, last_shape, states_shape, u_shape, delta_shape, A_shape, *args, out_shape=None, **kwargs):
    """Count 21 operations for a channel, state and step: 7 to recompute the state, 14 for the gradients."""
    batch, channels, length = u_shape
    return 21 * batch * channels * length * A_shape[1]
