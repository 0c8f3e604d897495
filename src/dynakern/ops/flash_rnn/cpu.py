"""The multi-head recurrent networks on the CPU: layouts and calls of the Numba kernels.

Recurrent matrices are packed for the kernels once a call. Partial sums of the gradients are added in a fixed order, so
that results do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dynakern.ops.dispatch import numba_threads
from dynakern.ops.flash_rnn import kernels
from dynakern.ops.flash_rnn.kernels import CODES, ROWS
from dynakern.ops.flash_rnn.reference import CELLS

__all__ = ["backward", "forward"]

WORK_ITEMS = 32  # that the backward pass aims at; more would only cost memory for partial sums


def _padded(size: int, x: Tensor) -> int:
    """Return ``size`` rounded up to whole vectors of 64 bytes."""
    lanes = 64 // x.element_size()
    return -(-size // lanes) * lanes


def _packed(w: Tensor) -> Tensor:
    """Lay matrices ``(NH, K, N)`` out in strips of four vectors, ``(NH, K N)``, their columns padded with zeros."""
    w = F.pad(w.detach(), (0, _padded(w.shape[2], w) - w.shape[2]))
    return torch.cat([strip.flatten(1) for strip in w.split(256 // w.element_size(), dim=2)], 1)


def _size(batch: int, heads: int) -> int:
    """Return the sequences of a block: eight cost less a sequence, four make more blocks for several threads."""
    return 2 * ROWS if batch > ROWS and heads * -(-batch // (2 * ROWS)) >= 4 else ROWS


def _blocks(kept: Tensor, hidden: Tensor, size: int) -> np.ndarray:
    """View what is kept as ``(work items, T, gates and states of a block)``."""
    batch, steps, heads, D = hidden.shape
    items, slots = heads * -(-batch // size), kept.numel() // max(1, -(-batch // 8) * 8 * steps * heads * D)
    return kept.detach()[: items * steps * slots * size * D].view(items, steps, slots * size * D).numpy()


def forward(
    Wx: Tensor, R: Tensor, b: Tensor, initial: Tensor, function: str, hidden: Tensor, cells: Tensor, kept: Tensor
) -> Tensor:
    """Run the network from ``initial`` ``(S, B, NH, D)``; return the states after the last step.

    It fills ``hidden`` ``(B, T, NH, D)`` and, unless they are empty, ``cells`` ``(S - 1, B, T, NH, D)`` with the other
    states and ``kept``, in a layout of its own, with what the backward pass needs.
    """
    last = torch.empty_like(initial, memory_format=torch.contiguous_format)
    packed = _packed(R.permute(1, 3, 0, 2).flatten(2))  # (NH, Din, Gr Dout)
    arrays = [x.detach().contiguous().numpy() for x in (Wx, packed, b, initial)]
    size = _size(hidden.shape[0], hidden.shape[2])
    blocks = _blocks(kept, hidden, size)
    kept[blocks.size :].zero_()  # room for a batch that fills its last block
    with numba_threads():
        kernels.forward(CODES[function], size, *arrays, hidden.numpy(), cells.numpy(), last.numpy(), blocks)
    return last


def backward(
    R: Tensor,
    initial: Tensor,
    hidden: Tensor,
    kept: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    function: str,
    follow: bool,
    clip: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``Wx``, ``R``, ``b`` and the initial states.

    ``grads`` are those of h, the other states and the last states, None where there is none. ``follow`` says whether
    gradients pass the recurrent product, where they are clipped to ``clip`` if it is positive.
    """
    cell, (batch, steps, heads, D) = CELLS[function], hidden.shape
    size = _size(batch, heads)
    slots = max(1, min(-(-batch // size), -(-WORK_ITEMS // heads)))
    packed = _packed(R.transpose(0, 1).flatten(1, 2))  # (NH, Gr Dout, Din)
    d_hidden, d_cells, d_last = grads
    d_hidden = hidden.new_empty(0, 0, 0, 0) if d_hidden is None else d_hidden
    d_cells = hidden.new_empty(0, 0, 0, 0, 0) if d_cells is None else d_cells
    d_last = torch.zeros_like(initial) if d_last is None else d_last
    arrays = [x.detach().contiguous().numpy() for x in (initial, hidden, d_hidden, d_cells, d_last)]
    p = kernels.Operands(*arrays[:2], _blocks(kept, hidden, size), *arrays[2:])
    d_Wx, d_initial = hidden.new_empty(batch, steps, cell.inputs, heads, D), hidden.new_empty(initial.shape)
    height = cell.recurrent * D
    d_R = hidden.new_zeros(heads, slots, -(-height // ROWS) * ROWS, _padded(D, hidden))
    d_b = hidden.new_zeros(heads, slots, cell.gates * D)
    found = kernels.Gradients(d_Wx.numpy(), d_R.numpy(), d_b.numpy(), d_initial.numpy())
    with numba_threads():
        kernels.backward(p, found, CODES[function], size, packed.numpy(), follow, p.hidden.dtype.type(clip))
    d_R = d_R.sum(1)[:, :height, :D].unflatten(1, (cell.recurrent, D)).transpose(0, 1).contiguous()
    return d_Wx, d_R, d_b.sum(1).unflatten(1, (cell.gates, D)).transpose(0, 1).contiguous(), d_initial
