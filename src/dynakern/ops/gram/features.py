"""Thin matrices whose product stands for a kernel matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dynakern.checks import check_choice, check_positive, check_shape
from dynakern.ops.gram.reference import PROFILES

__all__ = ["nystroem", "random_features"]


def kernel_function(kernel: str | Callable[[Tensor, Tensor], Tensor], length_scale: float | Tensor) -> Callable:
    """Return a function of two blocks ``(n, P)``, ``(m, P)`` to ``(n, m)`` for a name or such a function."""
    if callable(kernel):
        return kernel
    check_choice("kernel", kernel, tuple(PROFILES))
    return lambda a, b: PROFILES[kernel](torch.cdist(a / length_scale, b / length_scale).square())


def nystroem(
    kernel: str | Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    landmarks: Tensor | int,
    *,
    length_scale: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return features :math:`F` with :math:`F F^\top = K_{xz} K_{zz}^{+} K_{zx}`, the Nystroem approximation of K.

    O(N L^2 + L^3) time, O(N L) memory. Directions in which the landmarks' matrix is singular to rounding are left out.

    Args:
        kernel: As in :func:`~dynakern.ops.gram_product`.
        x: Points, ``(N, P)``.
        landmarks: The points z, ``(L, P)``, or their number: rows of ``x`` drawn without replacement.
        length_scale: As in :func:`~dynakern.ops.gram_product`.
        generator: Draws the landmarks.

    Returns:
        ``(N, R)`` with R <= L.

    Raises:
        ValueError: More landmarks than points are asked for, or shapes do not fit.

    Source: Williams and Seeger, 2001, "Using the Nystroem method to speed up kernel machines".
    """
    dims = check_shape("x", x, "N P")
    if isinstance(landmarks, int):
        check_positive("landmarks", landmarks, integer=True)
        if landmarks > dims["N"]:
            raise ValueError(f"`landmarks` must be at most the number of points {dims['N']}, got {landmarks}.")
        z = x[torch.randperm(len(x), generator=generator)[:landmarks]]
    else:
        check_shape("landmarks", landmarks, "L P", {"P": dims["P"]})
        z = landmarks
    function = kernel_function(kernel, length_scale)
    values, vectors = torch.linalg.eigh(function(z, z))
    kept = values > values[-1] * len(z) * torch.finfo(x.dtype).eps
    return function(x, z) @ (vectors[:, kept] / values[kept].sqrt())


def random_features(
    kernel: str,
    x: Tensor,
    num_features: int,
    *,
    length_scale: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return random Fourier features :math:`\phi` with :math:`E\, \phi(x) \cdot \phi(y) = k(x, y)`.

    .. math:: \phi(x) = \sqrt{2 / F}\, [\cos(\Omega x), \sin(\Omega x)]

    with F/2 frequencies from the kernel's spectrum: normal for ``"gaussian"``, Student-t with 1, 3 and 5 degrees of
    freedom for the Matern kernels, and for ``"cauchy"`` a normal times the root of an exponential. Unbiased; the
    variance falls as 1/F.

    Args:
        kernel: A name, as in :func:`~dynakern.ops.gram_product`.
        x: Points, ``(N, P)``. Features of two sets agree when both are drawn from a generator of one state.
        num_features: F, even.
        length_scale: As in :func:`~dynakern.ops.gram_product`.
        generator: Draws the frequencies.

    Returns:
        ``(N, F)``.

    Raises:
        ValueError: The kernel is unknown or F is odd.
    """
    check_choice("kernel", kernel, tuple(PROFILES))
    check_positive("num_features", num_features, integer=True)
    if num_features % 2:
        raise ValueError(f"`num_features` must be even, got {num_features}.")
    half, width = num_features // 2, check_shape("x", x, "N P")["P"]
    draw = {"generator": generator, "dtype": x.dtype, "device": x.device}
    omega = torch.randn(half, width, **draw)
    if kernel.startswith("matern"):
        freedom = int(kernel[-2])  # 2 nu
        chi2 = torch.randn(half, freedom, **draw).square().sum(1, keepdim=True)
        omega = omega * (freedom / chi2).sqrt()
    elif kernel == "cauchy":  # 1 / (1 + d^2) = E_t exp(-t d^2), t exponential
        t = torch.empty(half, 1, dtype=x.dtype, device=x.device).exponential_(generator=generator)
        omega = omega * (2 * t).sqrt()
    angle = (x / length_scale) @ omega.T
    return torch.cat([angle.cos(), angle.sin()], 1) * math.sqrt(2 / num_features)
