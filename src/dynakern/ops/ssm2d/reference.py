"""The definition of the selective two-dimensional state space: the coefficients of all cells, then the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from dynakern.ops.dispatch import Backend
from dynakern.ops.scan2d import scan2d

__all__ = ["ssm2d_reference"]


def ssm2d_reference(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    coupling: str,
    input_rule: str,
    backend: Backend = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y ``(B, V, T, D)`` and both states ``(B, V, T, D, N)``; see :func:`dynakern.ops.ssm2d`.

    ``backend`` is the engine of the recurrence. All coefficients are held in memory, ``(V, T, B, D, N)`` six times.
    """
    d1, d2 = (delta[..., i, :].permute(1, 2, 0, 3).unsqueeze(-1) for i in range(2))  # (V, T, B, D, 1)
    e1, e3 = torch.exp(d1 * A[0]), torch.exp(d2 * A[2])
    if input_rule == "zoh":
        w1, w2 = torch.expm1(d1 * A[0]) / A[0], torch.expm1(d2 * A[2]) / A[2]
    else:
        w1, w2 = d1, d2
    u = x.permute(1, 2, 0, 3).unsqueeze(-1)
    b1, b2 = (B[..., i, :].permute(1, 2, 0, 3).unsqueeze(-2) * u for i in range(2))  # (V, T, B, D, N)
    if coupling == "none":
        zero = torch.zeros_like(e1)
        h1, h2 = scan2d(e1, zero, zero, zero, w1 * b1, w2 * b2, backend=backend)
    else:
        kappa = 0.5 if coupling == "half" else 1.0
        e2, e4 = torch.exp(d1 * A[1]), torch.exp(d2 * A[3])
        h1, h2 = scan2d(kappa * e1, kappa * e2, kappa * e3, kappa * e4, w1 * b1, w2 * b2, backend=backend)
    c1, c2 = (C[..., i, :].permute(1, 2, 0, 3).unsqueeze(-2) for i in range(2))
    y = (c1 * h1 + c2 * h2).sum(-1).permute(2, 0, 1, 3)  # (B, V, T, D)
    y = y if D is None else y + D * x
    return y, h1.permute(2, 0, 1, 3, 4), h2.permute(2, 0, 1, 3, 4)
