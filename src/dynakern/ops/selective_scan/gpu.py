"""The selective scan on a GPU: Triton kernels, forward and backward.

A program takes one sequence and a block of channels of one group, keeps their states in registers and walks over the
steps; tensors are brought to ``(b, L, D)`` first, so that the channels of a step lie side by side. The backward pass
starts each chunk from the state that the forward pass kept, writes the chunk's states to a scratch buffer that is
reused by all chunks, and walks back over it. Sums over blocks of channels are left to a sum in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["scan_backward", "scan_forward"]

_TILE = 256  # channels times states of a program, one warp: many small programs, since one sequence must fill the GPU
_MAX_CHANNELS = 64


@triton.jit
def _softplus(v):
    e = tl.exp(-tl.abs(v))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * e / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.where(v > 20.0, v, tl.maximum(v, 0.0) + log1p)


@triton.jit
def _channels_of(block, H, BLOCK_D: tl.constexpr):
    """Return the group of a block, its channels, and which of them exist."""
    blocks = tl.cdiv(H, BLOCK_D)
    d = (block % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    return block // blocks, (block // blocks) * H + d, d < H


@triton.jit
def _coefficients(pointer, fixed, row, n, ok_n, STATIC: tl.constexpr):
    """Return the coefficients of a step as ``(1, N)``, or the static ones ``(D, N)``."""
    if STATIC:
        value = fixed
    else:
        value = tl.load(pointer + row + n, mask=ok_n, other=0.0)[None, :]
    return value


@triton.jit
def _step_size(delta, bias, at, ok_d, SOFTPLUS: tl.constexpr):
    raw = tl.load(delta + at, mask=ok_d, other=0.0) + bias
    return raw, _softplus(raw) if SOFTPLUS else raw


@triton.jit
def _forward_kernel(
    u, delta, A, B, C, D, z, bias, initial, y, last, states,
    L, channels, H, N, chunk,
    SOFTPLUS: tl.constexpr, STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, KEEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    group, d, ok_d = _channels_of(tl.program_id(1), H, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    ok_n = n < N
    ok = ok_d[:, None] & ok_n[None, :]
    dn = d[:, None] * N + n[None, :]
    rate = tl.load(A + dn, mask=ok, other=0.0) * 1.4426950408889634
    fixed_b = tl.load(B + dn, mask=ok, other=0.0) if STATIC_B else rate
    fixed_c = tl.load(C + dn, mask=ok, other=0.0) if STATIC_C else rate
    skip = tl.load(D + d, mask=ok_d, other=0.0) if HAS_D else tl.zeros([BLOCK_D], tl.float32)
    shift = tl.load(bias + d, mask=ok_d, other=0.0) if HAS_BIAS else tl.zeros([BLOCK_D], tl.float32)
    h = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if HAS_INITIAL:
        h = tl.load(initial + i * channels * N + dn, mask=ok, other=0.0)
    groups, chunks = channels // H, tl.cdiv(L, chunk)
    for l in range(0, L):
        if KEEP:  # noqa: SIM102 - known at compile time, unlike the test of l
            if l % chunk == 0:
                tl.store(states + (i * chunks + l // chunk) * channels * N + dn, h, mask=ok)
        at, row = (i * L + l) * channels + d, ((i * groups + group) * L + l) * N
        _, dt = _step_size(delta, shift, at, ok_d, SOFTPLUS)
        u_l = tl.load(u + at, mask=ok_d, other=0.0)
        b = _coefficients(B, fixed_b, row, n, ok_n, STATIC_B)
        c = _coefficients(C, fixed_c, row, n, ok_n, STATIC_C)
        h = tl.exp2(dt[:, None] * rate) * h + (dt * u_l)[:, None] * b
        out = tl.sum(h * c, axis=1) + skip * u_l
        if HAS_Z:
            z_l = tl.load(z + at, mask=ok_d, other=0.0)
            out = out * z_l / (1.0 + tl.exp(-z_l))
        tl.store(y + at, out, mask=ok_d)
    tl.store(last + i * channels * N + dn, h, mask=ok)


@triton.jit
def _backward_kernel(
    u, delta, A, B, C, D, z, bias, states, grad_y, grad_last, history,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial,
    L, channels, H, N, chunk,
    SOFTPLUS: tl.constexpr, STATIC_B: tl.constexpr, STATIC_C: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    group, d, ok_d = _channels_of(tl.program_id(1), H, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    ok_n = n < N
    ok = ok_d[:, None] & ok_n[None, :]
    dn = d[:, None] * N + n[None, :]
    rate = tl.load(A + dn, mask=ok, other=0.0)
    fixed_b = tl.load(B + dn, mask=ok, other=0.0) if STATIC_B else rate
    fixed_c = tl.load(C + dn, mask=ok, other=0.0) if STATIC_C else rate
    skip = tl.load(D + d, mask=ok_d, other=0.0) if HAS_D else tl.zeros([BLOCK_D], tl.float32)
    shift = tl.load(bias + d, mask=ok_d, other=0.0) if HAS_BIAS else tl.zeros([BLOCK_D], tl.float32)
    carry = tl.load(grad_last + i * channels * N + dn, mask=ok, other=0.0)
    sum_rate, sum_b, sum_c = tl.zeros_like(rate), tl.zeros_like(rate), tl.zeros_like(rate)
    sum_skip, sum_bias = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    groups, chunks, blocks = channels // H, tl.cdiv(L, chunk), tl.cdiv(H, BLOCK_D)
    tile = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    scratch = history + (i * tl.num_programs(1) + tl.program_id(1)) * chunk * BLOCK_D * BLOCK_N + tile
    for turn in range(0, chunks):
        start = (chunks - 1 - turn) * chunk
        steps = tl.minimum(chunk, L - start)
        h = tl.load(states + (i * chunks + start // chunk) * channels * N + dn, mask=ok, other=0.0)
        tl.debug_barrier()
        for t in range(0, steps):
            tl.store(scratch + t * BLOCK_D * BLOCK_N, h)
            at, row = (i * L + start + t) * channels + d, ((i * groups + group) * L + start + t) * N
            _, dt = _step_size(delta, shift, at, ok_d, SOFTPLUS)
            x = dt * tl.load(u + at, mask=ok_d, other=0.0)
            h = tl.exp(dt[:, None] * rate) * h + x[:, None] * _coefficients(B, fixed_b, row, n, ok_n, STATIC_B)
        tl.debug_barrier()
        for back in range(0, steps):
            t = steps - 1 - back
            at, row = (i * L + start + t) * channels + d, ((i * groups + group) * L + start + t) * N
            before = tl.load(scratch + t * BLOCK_D * BLOCK_N)
            raw, dt = _step_size(delta, shift, at, ok_d, SOFTPLUS)
            u_l = tl.load(u + at, mask=ok_d, other=0.0)
            b = _coefficients(B, fixed_b, row, n, ok_n, STATIC_B)
            c = _coefficients(C, fixed_c, row, n, ok_n, STATIC_C)
            a, x = tl.exp(dt[:, None] * rate), dt * u_l
            g = tl.load(grad_y + at, mask=ok_d, other=0.0)
            if HAS_Z:
                z_l = tl.load(z + at, mask=ok_d, other=0.0)
                sigmoid = 1.0 / (1.0 + tl.exp(-z_l))
                total = tl.sum(h * c, axis=1) + skip * u_l
                tl.store(grad_z + at, g * total * sigmoid * (1.0 + z_l * (1.0 - sigmoid)), mask=ok_d)
                g = g * z_l * sigmoid
            q = c * g[:, None] + carry
            carry = q * a
            partial = (((i * groups + group) * blocks + tl.program_id(1) % blocks) * L + start + t) * N
            if STATIC_C:
                sum_c += g[:, None] * h
            else:
                tl.store(grad_C + partial + n, tl.sum(g[:, None] * h, axis=0), mask=ok_n)
            if STATIC_B:
                sum_b += q * x[:, None]
            else:
                tl.store(grad_B + partial + n, tl.sum(q * x[:, None], axis=0), mask=ok_n)
            from_x, slope = tl.sum(q * b, axis=1), carry * before
            sum_rate += dt[:, None] * slope
            from_raw = u_l * from_x + tl.sum(rate * slope, axis=1)
            if SOFTPLUS:
                from_raw = tl.where(raw > 20.0, from_raw, from_raw / (1.0 + tl.exp(-raw)))
            sum_bias += from_raw
            sum_skip += g * u_l
            tl.store(grad_u + at, dt * from_x + skip * g, mask=ok_d)
            tl.store(grad_delta + at, from_raw, mask=ok_d)
            h = before
    lanes = i * channels * N + dn
    tl.store(grad_A + lanes, sum_rate, mask=ok)
    tl.store(grad_initial + lanes, carry, mask=ok)
    if STATIC_B:
        tl.store(grad_B + lanes, sum_b, mask=ok)
    if STATIC_C:
        tl.store(grad_C + lanes, sum_c, mask=ok)
    tl.store(grad_D + i * channels + d, sum_skip, mask=ok_d)
    tl.store(grad_bias + i * channels + d, sum_bias, mask=ok_d)


def _prepare(operands: tuple[Tensor | None, ...]) -> tuple[list[Tensor | None], dict[str, int], dict[str, object]]:
    """Bring the operands to the kernels' layout; return them, the sizes, and the constants of compilation."""
    u, _, A, B, C, D, z, delta_bias, initial = operands
    groups = max(x.shape[1] if x.ndim == 4 else 1 for x in (B, C))
    channels, N = A.shape
    laid = [
        None
        if x is None
        else (x.transpose(-1, -2) if x is not A and x.ndim > 2 and x is not initial else x).contiguous()
        for x in operands
    ]
    block_n = triton.next_power_of_2(N)
    H = channels // groups
    block_d = max(1, min(_MAX_CHANNELS, triton.next_power_of_2(H), _TILE // block_n))
    sizes = {"L": u.shape[2], "channels": channels, "H": H, "N": N}
    constants = {
        "STATIC_B": B.ndim == 2,
        "STATIC_C": C.ndim == 2,
        "HAS_D": D is not None,
        "HAS_Z": z is not None,
        "HAS_BIAS": delta_bias is not None,
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "num_warps": 1,
    }
    return laid, sizes, constants


def scan_forward(
    operands: tuple[Tensor | None, ...], softplus: bool, chunk: int, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``y`` and the last state; fill ``states`` with the state before each chunk unless it is empty.

    Args:
        operands: u, delta, A, B, C, D, z, delta_bias, initial_state, all float32.
        softplus: Whether the steps pass through a softplus.
        chunk: Steps between two kept states.
        states: ``(b, chunks, D, N)``, or empty.
    """
    laid, sizes, constants = _prepare(operands)
    u, A = laid[0], laid[2]
    y, last = torch.empty_like(u), u.new_empty(u.shape[0], *A.shape)
    grid = (u.shape[0], sizes["channels"] // sizes["H"] * triton.cdiv(sizes["H"], constants["BLOCK_D"]))
    _forward_kernel[grid](
        *(u if x is None else x for x in laid), y, last, states, **sizes, chunk=chunk, SOFTPLUS=softplus,
        HAS_INITIAL=laid[8] is not None, KEEP=states.numel() > 0, **constants,
    )  # fmt: skip
    return y.transpose(1, 2).contiguous(), last


def scan_backward(
    operands: tuple[Tensor | None, ...], softplus: bool, chunk: int, states: Tensor, grad_y: Tensor, grad_last: Tensor
) -> list[Tensor]:
    """Return the gradients of all operands in their order; an empty tensor for an absent one.

    The first four arguments are those of :func:`scan_forward`, which filled ``states``; ``grad_y`` ``(b, D, L)`` and
    ``grad_last`` ``(b, D, N)`` are the gradients of its results.
    """
    laid, sizes, constants = _prepare(operands)
    u, _, _, B, C, _, z = laid[:7]
    batch, channels, L, N = u.shape[0], sizes["channels"], sizes["L"], sizes["N"]
    groups, blocks = channels // sizes["H"], triton.cdiv(sizes["H"], constants["BLOCK_D"])
    history = u.new_empty(batch, groups * blocks, chunk, constants["BLOCK_D"], constants["BLOCK_N"])
    lanes, rows = (batch, channels, N), (batch, groups, blocks, L, N)
    found = {
        "grad_u": torch.empty_like(u),
        "grad_delta": torch.empty_like(u),
        "grad_A": u.new_empty(lanes),
        "grad_B": u.new_empty(rows if B.ndim == 4 else lanes),
        "grad_C": u.new_empty(rows if C.ndim == 4 else lanes),
        "grad_D": u.new_empty(batch, channels),
        "grad_z": u.new_empty(0) if z is None else torch.empty_like(u),
        "grad_bias": u.new_empty(batch, channels),
        "grad_initial": u.new_empty(lanes),
    }
    cotangents = grad_y.transpose(1, 2).contiguous(), grad_last.contiguous()
    _backward_kernel[batch, groups * blocks](
        *(u if x is None else x for x in laid[:8]), states, *cotangents, history, **found, **sizes, chunk=chunk,
        SOFTPLUS=softplus, **constants,
    )  # fmt: skip
    for name in ("grad_u", "grad_delta", *(["grad_z"] if z is not None else [])):
        found[name] = found[name].transpose(1, 2).contiguous()
    for name, x in (("grad_B", B), ("grad_C", C)):
        found[name] = found[name].sum(2).transpose(2, 3).contiguous() if x.ndim == 4 else found[name].sum(0)
    for name in ("grad_A", "grad_D", "grad_bias"):
        found[name] = found[name].sum(0)
    return [u.new_empty(0) if x is None else g for g, x in zip(found.values(), operands, strict=True)]
