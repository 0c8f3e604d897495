"""The definition of the selective scan: a plain loop over the steps, any floating dtype, any derivative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["scan_reference"]


def scan_reference(
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
) -> tuple[Tensor, Tensor]:
    """Return ``y`` ``(b, D, L)`` and the state after the last step ``(b, D, N)``.

    ``B`` and ``C`` are static ``(D, N)`` or variable ``(b, G, N, L)``; all tensors share one dtype.
    """
    batch, channels, length = u.shape
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    if delta_softplus:
        dt = F.softplus(dt)  # beta 1, the identity above 20
    h = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    ys = []
    for u_l, dt_l, B_l, C_l in zip(
        u.unbind(-1), dt.unbind(-1), _steps(B, length, channels), _steps(C, length, channels), strict=True
    ):
        h = torch.exp(dt_l[..., None] * A) * h + (dt_l * u_l)[..., None] * B_l  # (b, D, N)
        ys.append((h * C_l).sum(-1))
    y = torch.stack(ys, dim=-1)  # (b, D, L)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y, h


def _steps(x: Tensor, length: int, channels: int) -> list[Tensor]:
    """Return the coefficients of each step for every channel: ``(D, N)`` if static, else ``(b, D, N)``."""
    if x.ndim == 2:
        return [x] * length
    return [x_l.repeat_interleave(channels // x.shape[1], dim=1) for x_l in x.unbind(-1)]
