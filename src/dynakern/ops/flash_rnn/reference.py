"""The definition of the multi-head recurrent networks: a plain loop over the steps, any floating dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CELLS", "Cell", "rnn_reference"]


class Cell(NamedTuple):
    """How many gates and states a cell has.

    Attributes:
        recurrent: Gates with a recurrent matrix.
        inputs: Gates with an input.
        gates: Gates with a bias. Of these, the first ``recurrent`` see h and the last ``inputs`` see the input.
        states: States that are carried on; the first is always h.
    """

    recurrent: int
    inputs: int
    gates: int
    states: int


CELLS = {
    "elman": Cell(1, 1, 1, 1),
    "lstm": Cell(4, 4, 4, 2),
    "gru": Cell(3, 3, 4, 1),
    "slstm": Cell(4, 4, 4, 4),
}


def elman_cell(a: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Return ``[h]`` from the pre-activation ``a`` ``(B, 1, NH, D)``."""
    return [torch.tanh(a[:, 0])]


def lstm_cell(a: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Return ``[h, c]``; the gates are i, f, z, o."""
    i, f, z, o = a.unbind(1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(z)
    return [torch.sigmoid(o) * torch.tanh(c), c]


def gru_cell(a: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Return ``[h]``; the gates are g (recurrent part of the candidate), r, z, n (its input part)."""
    g, r, z, n = a.unbind(1)
    r, z = torch.sigmoid(r), torch.sigmoid(z)
    return [z * states[0] + (1 - z) * torch.tanh(n + r * g)]


def slstm_cell(a: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Return ``[h, c, n, m]``; the gates are i, f, z, o, and m keeps the exponentials in range."""
    i, f, z, o = a.unbind(1)
    _, c, n, m = states
    log_f = F.logsigmoid(f) + m
    m_next = torch.where(n == 0, i, torch.maximum(i, log_f))
    i, f = torch.exp(i - m_next), torch.exp(log_f - m_next)
    c = f * c + i * torch.tanh(z)
    n = torch.clamp_min(f * n + i, 1.0)
    return [torch.sigmoid(o) * c / n, c, n, m_next]


_STEPS = {"elman": elman_cell, "lstm": lstm_cell, "gru": gru_cell, "slstm": slstm_cell}


class _ClipGradient(torch.autograd.Function):
    """The identity, whose backward pass clips the gradient elementwise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.bound, ctx.bound), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def rnn_reference(
    Wx: Tensor,
    R: Tensor,
    b: Tensor,
    initial: Tensor,
    function: str,
    recurrent_gradient: bool = True,
    gradient_clip: float | None = None,
) -> Tensor:
    """Return all states ``(S, B, T, NH, D)``.

    Args:
        Wx: Input part of the gates, ``(B, T, Gw, NH, D)``.
        R: Recurrent matrices, ``(Gr, NH, Dout, Din)``.
        b: Biases, ``(Gt, NH, D)``.
        initial: States before the first step, ``(S, B, NH, D)``.
        function: Name of the cell.
        recurrent_gradient: Whether gradients flow through the recurrent product to the step before.
        gradient_clip: Bound of the elements of that gradient.
    """
    cell, step = CELLS[function], _STEPS[function]
    states, found = list(initial.unbind(0)), []
    for t in range(Wx.shape[1]):
        h = states[0] if recurrent_gradient else states[0].detach()
        if gradient_clip is not None:
            h = _ClipGradient.apply(h, gradient_clip)
        recurrent = torch.einsum("gnoi,bni->bgno", R, h)
        a = F.pad(recurrent, (0, 0, 0, 0, 0, cell.gates - cell.recurrent)) + b
        a = a + F.pad(Wx[:, t], (0, 0, 0, 0, cell.gates - cell.inputs, 0))  # (B, Gt, NH, D)
        states = step(a, states)
        found.append(torch.stack(states))
    return torch.stack(found, dim=2)
