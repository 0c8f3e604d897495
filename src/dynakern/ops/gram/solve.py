"""Solve with a kernel matrix by conjugate gradients, preconditioned by its Nystroem approximation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dynakern.checks import check_positive, check_shape
from dynakern.ops.gram.features import nystroem

__all__ = ["GramSolution", "gram_solve"]


class GramSolution(NamedTuple):
    """What :func:`gram_solve` returns.

    Attributes:
        solution: ``(N, C)`` or ``(N,)``.
        iterations: Products with K that were needed.
        residual: Largest relative residual of a column.
    """

    solution: Tensor
    iterations: int
    residual: float


@torch.no_grad()
def gram_solve(
    kernel: str | Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    b: Tensor,
    *,
    noise: float,
    length_scale: float | Tensor = 1.0,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
    landmarks: int | None = None,
    generator: torch.Generator | None = None,
    jobs: int = 1,
) -> GramSolution:
    r"""Solve :math:`(K + \sigma I)\, a = b` without writing K down.

    Conjugate gradients, preconditioned by :math:`F F^\top + \sigma I` with Nystroem features F (applied by the Woodbury
    identity). Each iteration is one :func:`~dynakern.ops.gram_product`.

    Args:
        kernel: As in :func:`~dynakern.ops.gram_product`.
        x: Points, ``(N, P)``; use float64 unless ``noise`` is large.
        b: Right-hand sides, ``(N, C)`` or ``(N,)``.
        noise: :math:`\sigma > 0`, added to the diagonal.
        length_scale: As in :func:`~dynakern.ops.gram_product`.
        tolerance: Stop when every column's residual is below this share of its right-hand side.
        max_iterations: Stop there with a warning.
        landmarks: Rank of the preconditioner; about :math:`5 \sqrt N` by default, from 1 to 1000; 0 for none.
        generator: Draws the landmarks.
        jobs: As in :func:`~dynakern.ops.gram_product`.

    Returns:
        A :class:`GramSolution`.

    Raises:
        ValueError: ``noise`` or ``tolerance`` is not positive, or shapes do not fit.

    Warns:
        RuntimeWarning: The tolerance was not reached; ``residual`` says how far it came.
    """
    from dynakern.ops.gram import gram_product

    dims = check_shape("x", x, "N P")
    rhs = b.unsqueeze(1) if b.ndim == 1 else b
    check_shape("b", rhs, "N C", {"N": dims["N"]})
    check_positive("noise", noise)
    check_positive("tolerance", tolerance)
    check_positive("max_iterations", max_iterations, integer=True)
    if landmarks is None:
        landmarks = min(1000, dims["N"], max(1, round(5 * dims["N"] ** 0.5)))
    check_positive("landmarks", landmarks, integer=True, zero=True)
    precondition = _woodbury(kernel, x, landmarks, noise, length_scale, generator)
    scale = rhs.norm(dim=0).clamp_min(torch.finfo(rhs.dtype).tiny)
    a, r = torch.zeros_like(rhs), rhs.clone()
    z = precondition(r)
    p, rz = z.clone(), (r * z).sum(0)
    residual, done = float((r.norm(dim=0) / scale).max()), 0
    while residual > tolerance and done < max_iterations:
        q = gram_product(kernel, x, p, length_scale=length_scale, jobs=jobs) + noise * p
        step = rz / (p * q).sum(0).clamp_min(torch.finfo(rhs.dtype).tiny)
        a += step * p
        r -= step * q
        z = precondition(r)
        before, rz = rz, (r * z).sum(0)
        p = z + rz / before.clamp_min(torch.finfo(rhs.dtype).tiny) * p
        residual, done = float((r.norm(dim=0) / scale).max()), done + 1
    if residual > tolerance:
        warnings.warn(
            f"gram_solve: the relative residual is {residual:.2e} after {done} iterations, asked for {tolerance:.1e}; "
            "raise `noise`, `landmarks` or `max_iterations`.",
            RuntimeWarning,
            stacklevel=2,
        )
    return GramSolution(a.squeeze(1) if b.ndim == 1 else a, done, residual)


def _woodbury(
    kernel: str | Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    landmarks: int,
    noise: float,
    length_scale: float | Tensor,
    generator: torch.Generator | None,
) -> Callable[[Tensor], Tensor]:
    """Return the inverse of ``F F^T + noise I`` as a function of ``(N, C)``."""
    if landmarks == 0:
        return torch.clone
    features = nystroem(kernel, x, landmarks, length_scale=length_scale, generator=generator)  # (N, R)
    inner = features.T @ features
    inner.diagonal().add_(noise)
    factor = torch.linalg.cholesky(inner)
    return lambda r: (r - features @ torch.cholesky_solve(features.T @ r, factor)) / noise
