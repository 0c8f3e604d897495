"""The definition of kernel sums: all distances at once, logarithms of all terms, one sum after another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kernel_sums_reference"]


def _log_kernel(r: Tensor, h: Tensor, kernel: str) -> Tensor:
    u = r / h
    if kernel == "gaussian":
        return -0.5 * u.square()
    if kernel == "exponential":
        return -u
    inside = u < 1
    logarithm = torch.zeros_like(u) if kernel == "tophat" else torch.log1p(-torch.where(inside, u, 0.0).square())
    return torch.where(inside, logarithm, -torch.inf)


def kernel_sums_reference(
    x: Tensor,
    y: Tensor,
    bandwidths: Tensor,
    kernel: str,
    weights: Tensor | None,
    powers: Tensor,
    exclude_diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-sum, participation, entropy and nearest distance; see :func:`dynakern.ops.kernel_sums`."""
    r = torch.linalg.vector_norm(x[:, None] - y, dim=-1)  # (Q, N)
    out = torch.zeros_like(r, dtype=torch.bool) if weights is None else (weights == 0).expand_as(r)
    if exclude_diagonal:
        out = out | torch.eye(len(x), len(y), dtype=torch.bool, device=x.device)
    h = bandwidths[:, None, None]
    logarithms = _log_kernel(r, h, kernel).masked_fill(out, -torch.inf)  # (H, Q, N)
    v = 0.0 if weights is None else weights.log()
    log_sum = torch.logsumexp(logarithms + v, -1)
    participation = (2 * (logarithms + v) - 2 * log_sum[..., None]).exp().sum(-1)
    scaled = logarithms[:, None] * powers[:, None, None]  # (H, L, Q, N)
    p = torch.log_softmax(scaled + v, -1)
    entropy = -(p.exp() * p.masked_fill(p == -torch.inf, 0.0)).sum(-1)
    return log_sum, participation, entropy, r.masked_fill(out, torch.inf).amin(-1)
