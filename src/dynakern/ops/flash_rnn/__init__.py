r"""Multi-head recurrent networks: Elman, LSTM, GRU and sLSTM with real hidden-to-hidden mixing.

A recurrent network whose next state depends on the last one through a matrix and a nonlinearity can track states
(parity, brackets, a game's board) that linear recurrences and attention cannot. Its steps cannot be parallelised, so
its speed is a question of where the recurrent matrix lives between them: FlashRNN (Pöppel, Beck & Hochreiter, 2024,
arXiv:2412.07752) keeps it in registers and caches through all steps and splits the state into heads, each with a matrix
of its own.

Implemented: the four cells, initial and last states, the cut and the clip of the recurrent gradient; an engine for the
CPU and one for GPUs (Triton, heads of up to 128). Not implemented: the paper's hand-written CUDA kernels for larger
heads, though :mod:`dynakern.ops.constrint` finds their tilings.

Example:
    >>> import torch
    >>> from dynakern.ops import flash_rnn
    >>> Wx, R, b = torch.randn(2, 50, 4, 3, 8), torch.randn(4, 3, 8, 8) / 8, torch.zeros(4, 3, 8)
    >>> h, last = flash_rnn(Wx, R, b, function="slstm")
    >>> first, state = flash_rnn(Wx[:, :20], R, b, function="slstm")
    >>> rest, _ = flash_rnn(Wx[:, 20:], R, b, state, function="slstm")
    >>> torch.allclose(h, torch.cat([first, rest], 1), atol=1e-5)
    True
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_choice, check_floating, check_positive, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend
from dynakern.ops.flash_rnn.reference import CELLS, Cell, rnn_reference

__all__ = ["CELLS", "Cell", "flash_rnn"]

_MAX_HEAD_GPU = 128  # a GPU program keeps the matrices of its head on the chip


def flash_rnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor | None = None,
    states: Tensor | None = None,
    *,
    function: str = "lstm",
    return_states: bool = False,
    recurrent_gradient: bool = True,
    gradient_clip: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Run a recurrent network with heads over sequences whose input part is already computed.

    Head n sees only itself. With :math:`a = W x + R h + b` for each gate and :math:`\sigma` the logistic function,

    .. math::
        \text{elman:} \quad & h' = \tanh a \\
        \text{lstm:} \quad & c' = \sigma(f) c + \sigma(i) \tanh z, \quad h' = \sigma(o) \tanh c' \\
        \text{gru:} \quad & h' = \sigma(z) h + (1 - \sigma(z)) \tanh(n + \sigma(r) g) \\
        \text{slstm:} \quad & m' = \max(i, \log \sigma(f) + m), \quad
        \hat\imath = e^{i - m'}, \quad \hat f = e^{\log \sigma(f) + m - m'}, \\
        & c' = \hat f c + \hat\imath \tanh z, \quad n' = \max(\hat f n + \hat\imath, 1), \quad h' = \sigma(o) c' / n'

    with :math:`m' = i` where n is 0, as at the first step.

    ========== ================== ============== ============== =============
    function   gates of ``R``     of ``Wx``      of ``b``       states
    ========== ================== ============== ============== =============
    elman      a                  a              a              h
    lstm       i, f, z, o         i, f, z, o     i, f, z, o     h, c
    gru        g, r, z            r, z, n        g, r, z, n     h
    slstm      i, f, z, o         i, f, z, o     i, f, z, o     h, c, n, m
    ========== ================== ============== ============== =============

    O(B T NH D\ :sup:`2`) time.

    Args:
        Wx: Input part of the gates, ``(B, T, Gw, NH, D)``: batch, steps, gates, heads, width of a head.
        R: Recurrent matrices, ``(Gr, NH, D, D)``, outputs before inputs.
        b: Biases, ``(Gt, NH, D)``; zero by default.
        states: States before the first step, ``(S, B, 1, NH, D)``; zero by default.
        function: ``"elman"``, ``"lstm"``, ``"gru"`` or ``"slstm"``.
        return_states: Return the whole sequence of all states instead of that of h.
        recurrent_gradient: Whether gradients flow through ``R`` to the step before; through the states they always do.
        gradient_clip: Bound of the elements of the gradient that flows through ``R``; none by default.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"gpu"``.

    Returns:
        h of all steps, ``(B, T, NH, D)`` (all states, ``(S, B, T, NH, D)``, with ``return_states``), and the states
        after the last step, ``(S, B, 1, NH, D)``; dtype of ``Wx``. 16-bit numbers are computed in float32.

    Raises:
        TypeError: An argument is not of a real floating-point dtype.
        ValueError: ``function`` is unknown, a shape does not fit it, T is 0, or tensors are on several devices.
        NotImplementedError: The engine asked for by name cannot run here.

    Example:
        >>> Wx, R, b = torch.zeros(1, 3, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1)
        >>> h, last = flash_rnn(Wx, R, b, function="elman")
        >>> h.flatten()
        tensor([0.7616, 0.9427, 0.9597])

    Source: Pöppel, Beck & Hochreiter, 2024, arXiv:2412.07752, section 3; layouts and gate orders of ``NX-AI/flashrnn``.
    Differs from there: gradients are exact (its backward pass takes m as a constant and does not mask the max of n).
    What ``gradient_clip`` bounds, which the paper does not say, is the product of ``R`` with the gradient of the gates.
    """
    dims = _check(Wx, R, b, states, function)
    if gradient_clip is not None:
        check_positive("gradient_clip", gradient_clip)
    cell, real = CELLS[function], torch.promote_types(Wx.dtype, torch.float32)
    bias = R.new_zeros(cell.gates, dims["NH"], dims["D"]) if b is None else b
    if states is None:
        initial = Wx.new_zeros(cell.states, dims["B"], dims["NH"], dims["D"])
    else:
        initial = states.squeeze(2)
    refusals = {"cpu": None, "gpu": _gpu_refusal(Wx)}
    operands = (Wx, R, bias, initial)
    engine = resolve_backend("flash_rnn", backend, (Wx, R, b, states), refusals=refusals, small=dims["T"] == 1)
    if engine == "reference":
        wide = [x.to(real) for x in operands]
        settings = (function, recurrent_gradient, gradient_clip)
        found = rnn_reference(*wide, *settings).to(Wx.dtype)  # pyright: ignore[reportCallIssue]
        return (found if return_states else found[0]), found[:, :, -1:]
    narrow = Wx.dtype if engine == "gpu" else real  # the GPU reads 16-bit inputs and matrices as they are
    wide = [Wx.to(narrow), R.to(narrow), bias.to(real), initial.to(real)]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in wide)
    clip = 0.0 if gradient_clip is None else float(gradient_clip)
    h, cells, last, _ = _rnn(*wide, function, recurrent_gradient, clip, return_states, keep)
    out = torch.cat([h.unsqueeze(0), cells.to(h.dtype)]) if return_states else h
    return out.to(Wx.dtype), last.unsqueeze(2).to(Wx.dtype)


def _check(Wx: Tensor, R: Tensor, b: Tensor | None, states: Tensor | None, function: str) -> dict[str, int]:
    check_choice("function", function, tuple(CELLS))
    cell = CELLS[function]
    for name, x in (("Wx", Wx), ("R", R), ("b", b), ("states", states)):
        if x is not None:
            check_floating(name, x)
    dims = check_shape("Wx", Wx, f"B T {cell.inputs} NH D")
    check_shape("R", R, f"{cell.recurrent} NH D D", dims)
    if b is not None:
        check_shape("b", b, f"{cell.gates} NH D", dims)
    if states is not None:
        check_shape("states", states, f"{cell.states} B 1 NH D", dims)
    if 0 in Wx.shape[1:]:
        raise ValueError(f"`Wx` must have at least one step, head and unit, got shape {tuple(Wx.shape)}.")
    check_same_device(Wx=Wx, R=R, b=b, states=states)
    return dims


def _gpu_refusal(Wx: Tensor) -> str | None:
    width = Wx.shape[-1]
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'dynakern[gpu]'"
    if Wx.dtype == torch.float64:
        return "it computes in float32 and the input is float64"
    if 4 * Wx.shape[0] * Wx.shape[1] * Wx.shape[3] * width >= 2**31:
        return f"it counts elements in 32 bits, too few for the gates of `Wx` of shape {tuple(Wx.shape)}"
    return None if width <= _MAX_HEAD_GPU else f"it takes heads of at most {_MAX_HEAD_GPU}, got D = {width}"


def _engine(x: Tensor) -> Any:
    if x.device.type == "cpu":
        from dynakern.ops.flash_rnn import cpu

        return cpu
    from dynakern.ops.flash_rnn import gpu

    return gpu


def _outputs(Wx: Tensor, initial: Tensor, function: str, return_states: bool, keep: bool) -> tuple[Tensor, ...]:
    """Return fresh tensors for h, the other states and what the backward pass needs; empty where not wanted."""
    batch, steps, _, heads, width = Wx.shape
    others = CELLS[function].states - 1
    hidden = Wx.new_empty(batch, steps, heads, width)
    cells = initial.new_empty((others, batch, steps, heads, width) if return_states else (others, 0, 0, 0, 0))
    slots = 4 + others if keep and function != "elman" else 0
    padded = (batch + 7) // 8 * 8  # the CPU engine keeps whole blocks of up to 8 sequences
    return hidden, cells, initial.new_empty(slots * padded * steps * heads * width)


@torch.library.custom_op("dynakern::flash_rnn", mutates_args=())
def _rnn(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    initial: Tensor,
    function: str,
    follow: bool,
    clip: float,
    return_states: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, cells, kept = _outputs(Wx, initial, function, return_states, keep)
    last = _engine(Wx).forward(Wx, R, b, initial, function, hidden, cells, kept)
    return hidden, cells, last, kept


@_rnn.register_fake
def _(Wx, R, b, initial, function, follow, clip, return_states, keep):
    hidden, cells, kept = _outputs(Wx, initial, function, return_states, keep)
    return hidden, cells, torch.empty_like(initial, memory_format=torch.contiguous_format), kept


@torch.library.custom_op("dynakern::flash_rnn_backward", mutates_args=())
def _rnn_backward(
    d_hidden: Tensor | None,
    d_cells: Tensor | None,
    d_last: Tensor | None,
    hidden: Tensor,
    kept: Tensor,
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    initial: Tensor,
    function: str,
    follow: bool,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    engine = _engine(Wx)
    if kept.numel() == 0 and function != "elman":
        hidden, cells, kept = _outputs(Wx, initial, function, False, True)
        engine.forward(Wx, R, b, initial, function, hidden, cells, kept)
    grads = (d_hidden, d_cells if d_cells is not None and d_cells.numel() else None, d_last)
    return engine.backward(R, initial, hidden, kept, grads, function, follow, clip)


@_rnn_backward.register_fake
def _(d_hidden, d_cells, d_last, hidden, kept, Wx, R, b, initial, function, follow, clip):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (Wx, R, b, initial))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, _, _, kept = output
    ctx.options = inputs[4:7]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, kept, *inputs[:4])


def _backward(ctx: Any, d_hidden: Any, d_cells: Any, d_last: Any, _: Any) -> tuple[Tensor | None, ...]:
    found = _rnn_backward(d_hidden, d_cells, d_last, *ctx.saved_tensors, *ctx.options)
    grads = [g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False)]
    return *grads, None, None, None, None, None


_rnn.register_autograd(_backward, setup_context=_setup_context)
_rnn_backward.register_autograd(lambda ctx, *grads: refuse_double_backward("flash_rnn"))


@register_flop_formula(torch.ops.dynakern.flash_rnn)
def _flops(Wx_shape, R_shape, *args, out_shape=None, **kwargs) -> int:
    """Count the recurrent products: 2 B T NH D^2 Gr."""
    return 2 * Wx_shape[0] * Wx_shape[1] * R_shape[0] * R_shape[1] * R_shape[2] * R_shape[3]


@register_flop_formula(torch.ops.dynakern.flash_rnn_backward)
def _backward_flops(d_hidden, d_cells, d_last, hidden, kept, Wx_shape, R_shape, *args, **kwargs) -> int:
    """Count two products of the size of the forward pass: for the states and for R."""
    return 2 * _flops(Wx_shape, R_shape)
