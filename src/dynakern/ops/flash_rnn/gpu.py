"""The multi-head recurrent networks on a GPU: persistent Triton kernels, forward and backward.

A program is one head and a block of the batch. It runs through all steps; the states stay in registers, and the head's
recurrent matrices on the chip where they fit, else they are read again from the cache at each step. The size of the
block, the number of warps and whether the matrices stay are the first solution of a text of constraints.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynakern.ops.constrint import solve
from dynakern.ops.flash_rnn.reference import CELLS

__all__ = ["backward", "forward"]

_CODES = {"elman": 0, "lstm": 1, "gru": 2, "slstm": 3}
ELMAN, LSTM, GRU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_TILING = """
rows == [16, 32, 64, 128]; warps == [4, 8]; stay == [1, 2];   # stay: 2 if the matrices stay on the chip
programs * rows == covered; {batch} <= covered; covered <= {batch} + 127;
programs * {heads} <= waves * {processors};
stay == 1 | {size} * {gates} * {width} * {width} + {size} * rows * {width} <= {shared};
rows * {width} * {tiles} <= 6400 * warps;                     # 200 of 255 registers of each thread
"""


@functools.lru_cache(maxsize=256)
def _tiling(
    batch: int, heads: int, width: int, gates: int, tiles: int, size: int, processors: int, shared: int
) -> tuple[int, int, bool]:
    """Return rows of the batch in a program, warps, and whether the matrices stay on the chip.

    In this order: few waves of programs, matrices that stay, small blocks, few warps.
    """
    text = _TILING.format(
        batch=max(1, batch),
        heads=heads,
        processors=processors,
        size=size,
        gates=gates,
        width=width,
        shared=shared,
        tiles=min(tiles, 3200 // width),  # where 16 rows are too many for the registers, the compiler spills
    )
    found = solve(text, order=["waves", "stay:largest", "rows", "warps"])
    return found["rows"], found["warps"], found["stay"] == 2


def _launch(Wx: Tensor, function: str) -> tuple[tuple[int, int], dict[str, object]]:
    batch, _, _, heads, D = Wx.shape
    width, cell = max(16, triton.next_power_of_2(D)), CELLS[function]
    if Wx.is_cuda:
        properties = torch.cuda.get_device_properties(Wx.device)
        processors, shared = properties.multi_processor_count, properties.shared_memory_per_block_optin
    else:  # Triton's interpreter
        processors, shared = 8, 100_000
    tiles = cell.gates + cell.states + 1
    rows, warps, stay = _tiling(
        batch, heads, width, cell.recurrent, tiles, Wx.element_size(), processors, shared - 8192
    )
    options = {
        "CELL": _CODES[function],
        "STATES": cell.states,
        "GATES": cell.gates,
        "INPUTS": cell.inputs,
        "ROWS": rows,
        "WIDTH": width,
        "STAY": stay,
        "num_warps": warps,
    }
    return (triton.cdiv(batch, rows), heads), options


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _matrix(R, gate, n, heads, D, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Load a recurrent matrix ``(Dout, Din)``, or its transpose."""
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (i < D) & (j < D)
    start = R + (gate * heads + n) * D * D
    if TRANSPOSED:
        return tl.load(start + j * D + i, mask=inside, other=0.0)
    return tl.load(start + i * D + j, mask=inside, other=0.0)


@triton.jit
def _times(x, kept, R, gate, n, heads, D, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, STAY: tl.constexpr):
    """Multiply by a recurrent matrix: the one kept on the chip, or a fresh copy."""
    matrix = kept
    if not STAY:
        matrix = _matrix(R, gate, n, heads, D, WIDTH, TRANSPOSED)
    return tl.dot(x.to(matrix.dtype), matrix, input_precision="ieee")


@triton.jit
def _gate(Wx, b, at, inside, gate: tl.constexpr, skipped: tl.constexpr, n, heads, D, column):
    """Return bias and input of a gate; ``at`` are the offsets of (sequence, step) in the input."""
    a = tl.load(b + (gate * heads + n) * D + column, mask=column < D, other=0.0).to(tl.float32)
    if gate >= skipped:
        a = a + tl.load(Wx + at + ((gate - skipped) * heads + n) * D + column, mask=inside, other=0.0).to(tl.float32)
    return a


@triton.jit
def _forward(
    Wx, R, b, initial, hidden, cells, last, gates, B, T, heads, D,
    CELL: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, STAY: tl.constexpr, KEEP_STATES: tl.constexpr, KEEP_GATES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1)
    row, column = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (row < B) & (column < D)
    total = B * heads * D
    state = (row * heads + n) * D + column  # in (B, NH, D)
    skipped: tl.constexpr = GATES - INPUTS
    h = tl.load(initial + state, mask=inside, other=0.0)
    c, norm, top = h, h, h
    if STATES > 1:
        c = tl.load(initial + total + state, mask=inside, other=0.0)
    if STATES > 2:
        norm = tl.load(initial + 2 * total + state, mask=inside, other=1.0)
        top = tl.load(initial + 3 * total + state, mask=inside, other=0.0)
    r0 = _matrix(R, 0, n, heads, D, WIDTH, True)
    r1, r2, r3 = r0, r0, r0
    if STAY and CELL != ELMAN:
        r1 = _matrix(R, 1, n, heads, D, WIDTH, True)
        r2 = _matrix(R, 2, n, heads, D, WIDTH, True)
        if CELL != GRU:
            r3 = _matrix(R, 3, n, heads, D, WIDTH, True)
    for t in range(T):
        step = (row * T + t) * heads * D
        at = step * INPUTS
        a0 = _gate(Wx, b, at, inside, 0, skipped, n, heads, D, column) + tl.zeros_like(h)
        a0 += _times(h, r0, R, 0, n, heads, D, WIDTH, True, STAY)
        g0, g1, g2, g3 = a0, a0, a0, a0
        if CELL == ELMAN:
            h = _tanh(a0)
        else:
            a1 = _gate(Wx, b, at, inside, 1, skipped, n, heads, D, column)
            a2 = _gate(Wx, b, at, inside, 2, skipped, n, heads, D, column)
            a3 = _gate(Wx, b, at, inside, 3, skipped, n, heads, D, column)
            a1 += _times(h, r1, R, 1, n, heads, D, WIDTH, True, STAY)
            a2 += _times(h, r2, R, 2, n, heads, D, WIDTH, True, STAY)
            if CELL == GRU:
                g1, g2 = tl.sigmoid(a1), tl.sigmoid(a2)
                g3 = _tanh(a3 + g1 * a0)
                h = g2 * h + (1.0 - g2) * g3
            else:
                a3 += _times(h, r3, R, 3, n, heads, D, WIDTH, True, STAY)
                g1, g2, g3 = a1, _tanh(a2), tl.sigmoid(a3)
                if CELL == LSTM:
                    g0, g1 = tl.sigmoid(a0), tl.sigmoid(a1)
                    c = g1 * c + g0 * g2
                    h = g3 * _tanh(c)
                else:
                    log_f = tl.minimum(a1, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(a1))) + top
                    top = tl.where((norm == 0.0) | (a0 > log_f), a0, log_f)
                    i, f = tl.exp(a0 - top), tl.exp(log_f - top)
                    c = f * c + i * g2
                    norm = tl.maximum(f * norm + i, 1.0)
                    h = g3 * c / norm
        out = step + n * D + column
        tl.store(hidden + out, h.to(hidden.dtype.element_ty), mask=inside)
        if KEEP_STATES and STATES > 1:
            tl.store(cells + out, c, mask=inside)
            if STATES > 2:
                tl.store(cells + total * T + out, norm, mask=inside)
                tl.store(cells + 2 * total * T + out, top, mask=inside)
        if KEEP_GATES:
            kept = gates + step * 4 + n * D + column
            tl.store(kept, g0, mask=inside)
            tl.store(kept + heads * D, g1, mask=inside)
            tl.store(kept + 2 * heads * D, g2, mask=inside)
            tl.store(kept + 3 * heads * D, g3, mask=inside)
    tl.store(last + state, h, mask=inside)
    if STATES > 1:
        tl.store(last + total + state, c, mask=inside)
    if STATES > 2:
        tl.store(last + 2 * total + state, norm, mask=inside)
        tl.store(last + 3 * total + state, top, mask=inside)


@triton.jit
def _before(initial, sequence, steps, state, out, total, index, inside, width):
    """Load a state as it was before a step from ``sequence``, the states after each; ``steps`` are before it."""
    first = tl.load(initial + index * total + state, mask=inside & (steps == 0), other=0.0)
    later = tl.load(sequence + out - width, mask=inside & (steps > 0), other=0.0)
    return first + later.to(tl.float32)


@triton.jit
def _slstm_back(a0, a1, g2, g3, c0, n0, m0, c, norm, top, dh, dc, dn, dm):
    small = tl.exp(-tl.abs(a1))
    log_f = tl.minimum(a1, 0.0) - tl.log(1.0 + small) + m0
    i, f = tl.exp(a0 - top), tl.exp(log_f - top)
    dc += dh * g3 / norm
    dn -= dh * g3 * c / (norm * norm)
    raw = f * n0 + i
    dn = tl.where(raw > 1.0, dn, tl.where(raw == 1.0, 0.5 * dn, 0.0))  # max(raw, 1)
    by_i, by_f = (dc * g2 + dn) * i, (dc * c0 + dn * n0) * f
    by_m = dm - by_i - by_f
    chosen = a0 == top  # m is i, else log_f
    by_f += tl.where(chosen, 0.0, by_m)
    d0 = by_i + tl.where(chosen, by_m, 0.0)
    d1 = by_f * tl.where(a1 > 0.0, small, 1.0) / (1.0 + small)
    d3 = dh * (c / norm) * g3 * (1.0 - g3)
    return d0, d1, dc * i * (1.0 - g2 * g2), d3, dc * f, dn * f, by_f


@triton.jit
def _backward(
    R, initial, hidden, cells, gates, d_hidden, d_cells, d_last, d_gates, d_initial, clip, B, T, heads, D,
    CELL: tl.constexpr, STATES: tl.constexpr, GATES: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, STAY: tl.constexpr, FROM_HIDDEN: tl.constexpr, FROM_CELLS: tl.constexpr, FOLLOW: tl.constexpr,
    CLIP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1)
    row, column = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (row < B) & (column < D)
    total, width = B * heads * D, heads * D
    state = (row * heads + n) * D + column
    dh = tl.load(d_last + state, mask=inside, other=0.0)
    dc, dn, dm = tl.zeros_like(dh), tl.zeros_like(dh), tl.zeros_like(dh)
    if STATES > 1:
        dc = tl.load(d_last + total + state, mask=inside, other=0.0)
    if STATES > 2:
        dn = tl.load(d_last + 2 * total + state, mask=inside, other=0.0)
        dm = tl.load(d_last + 3 * total + state, mask=inside, other=0.0)
    r0 = _matrix(R, 0, n, heads, D, WIDTH, False)
    r1, r2, r3 = r0, r0, r0
    if STAY and CELL != ELMAN:
        r1 = _matrix(R, 1, n, heads, D, WIDTH, False)
        r2 = _matrix(R, 2, n, heads, D, WIDTH, False)
        if CELL != GRU:
            r3 = _matrix(R, 3, n, heads, D, WIDTH, False)
    for back in range(T):
        t = T - 1 - back
        step = (row * T + t) * width
        out = step + n * D + column
        stride = total * T
        steps = t + tl.zeros_like(row)
        if FROM_HIDDEN:
            dh += tl.load(d_hidden + out, mask=inside, other=0.0).to(tl.float32)
        if FROM_CELLS:
            dc += tl.load(d_cells + out, mask=inside, other=0.0)
            if STATES > 2:
                dn += tl.load(d_cells + stride + out, mask=inside, other=0.0)
                dm += tl.load(d_cells + 2 * stride + out, mask=inside, other=0.0)
        kept, target = gates + step * 4 + n * D + column, d_gates + step * GATES + n * D + column
        if CELL == ELMAN:
            h = tl.load(hidden + out, mask=inside, other=0.0).to(tl.float32)
            d0 = dh * (1.0 - h * h)
            dh = tl.zeros_like(dh)
            if FOLLOW:
                back_h = _times(d0, r0, R, 0, n, heads, D, WIDTH, False, STAY)
        else:
            g0, g1 = tl.load(kept, mask=inside, other=0.0), tl.load(kept + width, mask=inside, other=0.0)
            g2 = tl.load(kept + 2 * width, mask=inside, other=0.0)
            g3 = tl.load(kept + 3 * width, mask=inside, other=0.0)
            if CELL == GRU:
                before = _before(initial, hidden, steps, state, out, total, 0, inside, width)
                d3 = dh * (1.0 - g2) * (1.0 - g3 * g3)
                d0, d1 = d3 * g1, d3 * g0 * g1 * (1.0 - g1)
                d2 = dh * (before - g3) * g2 * (1.0 - g2)
                dh = dh * g2
            elif CELL == LSTM:
                before = _before(initial, cells, steps, state, out, total, 1, inside, width)
                u = _tanh(tl.load(cells + out, mask=inside, other=0.0))
                d = dc + dh * g3 * (1.0 - u * u)
                d0, d1 = d * g2 * g0 * (1.0 - g0), d * before * g1 * (1.0 - g1)
                d2, d3 = d * g0 * (1.0 - g2 * g2), dh * u * g3 * (1.0 - g3)
                dc, dh = d * g1, tl.zeros_like(dh)
            else:
                c0 = _before(initial, cells, steps, state, out, total, 1, inside, width)
                n0 = _before(initial, cells + stride, steps, state, out, total, 2, inside, width)
                m0 = _before(initial, cells + 2 * stride, steps, state, out, total, 3, inside, width)
                c = tl.load(cells + out, mask=inside, other=0.0)
                norm = tl.load(cells + stride + out, mask=inside, other=1.0)
                top = tl.load(cells + 2 * stride + out, mask=inside, other=0.0)
                d0, d1, d2, d3, dc, dn, dm = _slstm_back(g0, g1, g2, g3, c0, n0, m0, c, norm, top, dh, dc, dn, dm)
                dh = tl.zeros_like(dh)
            tl.store(target + width, d1.to(d_gates.dtype.element_ty), mask=inside)
            tl.store(target + 2 * width, d2.to(d_gates.dtype.element_ty), mask=inside)
            tl.store(target + 3 * width, d3.to(d_gates.dtype.element_ty), mask=inside)
            if FOLLOW:
                back_h = _times(d0, r0, R, 0, n, heads, D, WIDTH, False, STAY)
                back_h += _times(d1, r1, R, 1, n, heads, D, WIDTH, False, STAY)
                back_h += _times(d2, r2, R, 2, n, heads, D, WIDTH, False, STAY)
                if CELL != GRU:
                    back_h += _times(d3, r3, R, 3, n, heads, D, WIDTH, False, STAY)
        tl.store(target, d0.to(d_gates.dtype.element_ty), mask=inside)
        if FOLLOW:
            if CLIP:
                back_h = tl.minimum(tl.maximum(back_h, -clip), clip)
            dh += back_h
    tl.store(d_initial + state, dh, mask=inside)
    if STATES > 1:
        tl.store(d_initial + total + state, dc, mask=inside)
    if STATES > 2:
        tl.store(d_initial + 2 * total + state, dn, mask=inside)
        tl.store(d_initial + 3 * total + state, dm, mask=inside)


def _kept(kept: Tensor, hidden: Tensor, states: int) -> tuple[Tensor, Tensor]:
    """View what is kept as states ``(S - 1, B, T, NH, D)`` and gates ``(B, T, 4, NH, D)``; both empty if nothing is."""
    batch, steps, heads, D = hidden.shape
    parts = (states - 1) * hidden.numel(), 4 * hidden.numel()
    if kept.numel() == 0:
        return kept, kept
    cells, gates = kept[: sum(parts)].split(parts)
    return cells.view(states - 1, batch, steps, heads, D), gates.view(batch, steps, 4, heads, D)


def forward(
    Wx: Tensor, R: Tensor, b: Tensor, initial: Tensor, function: str, hidden: Tensor, cells: Tensor, kept: Tensor
) -> Tensor:
    """Run the network; the arguments are those of the CPU engine, ``b`` and states in float32."""
    last = torch.empty_like(initial, memory_format=torch.contiguous_format)
    batch, steps, _, heads, D = Wx.shape
    if batch == 0:
        return last
    grid, options = _launch(Wx, function)
    operands = [x.contiguous() for x in (Wx, R, b, initial)]
    kept_cells, gates = _kept(kept, hidden, CELLS[function].states)
    kept[kept_cells.numel() + gates.numel() :].zero_()
    target = cells if kept_cells.numel() == 0 else kept_cells
    _forward[grid](
        *operands, hidden, target, last, gates, batch, steps, heads, D,
        KEEP_STATES=target.numel() > 0, KEEP_GATES=gates.numel() > 0, **options,
    )  # fmt: skip
    if cells.numel() and target is not cells:
        cells.copy_(target)
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
    """Return the gradients of ``Wx``, ``R``, ``b`` and the initial states; arguments as for the CPU engine."""
    cell, (batch, steps, heads, D) = CELLS[function], hidden.shape
    d_hidden, d_cells, d_last = (None if x is None else x.contiguous() for x in grads)
    d_gates = hidden.new_empty(batch, steps, cell.gates, heads, D)
    d_initial = torch.empty_like(initial, memory_format=torch.contiguous_format)
    if batch:
        cells, gates = _kept(kept, hidden, cell.states)
        grid, options = _launch(d_gates, function)
        _backward[grid](
            R.contiguous(), initial.contiguous(), hidden, cells, gates,
            hidden if d_hidden is None else d_hidden, initial if d_cells is None else d_cells,
            torch.zeros_like(d_initial) if d_last is None else d_last,
            d_gates, d_initial, float(clip), batch, steps, heads, D,
            FROM_HIDDEN=d_hidden is not None, FROM_CELLS=d_cells is not None, FOLLOW=follow, CLIP=clip > 0, **options,
        )  # fmt: skip
    before = torch.cat([initial[:1].transpose(0, 1).to(hidden.dtype), hidden[:, :-1]], 1)  # (B, T, NH, D)
    rows = d_gates[:, :, : cell.recurrent].permute(3, 2, 4, 0, 1).flatten(3).flatten(1, 2)  # (NH, Gr D, B T)
    d_R = torch.bmm(rows, before.permute(2, 0, 1, 3).flatten(1, 2))
    d_R = d_R.unflatten(1, (cell.recurrent, D)).transpose(0, 1).contiguous()
    d_Wx = d_gates if cell.inputs == cell.gates else d_gates[:, :, cell.gates - cell.inputs :].contiguous()
    return d_Wx, d_R.to(R.dtype), d_gates.float().sum((0, 1)), d_initial
