"""Initial state matrices: HiPPO's dense ones, their diagonal part, and S4D's closed forms."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dynakern.checks import check_choice, check_positive

__all__ = ["INITS", "hippo", "hippo_diagonal", "ssm_init"]

INITS = ("lin", "inv", "inv2", "quad", "legs", "real", "rand")


def hippo(measure: str, state_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Return HiPPO's dense system and the low-rank term that makes it normal.

    - ``"legs"``: :math:`A_{nk} = -\sqrt{2n+1}\sqrt{2k+1}` for n > k, :math:`-(n+1)` for n = k, else 0;
      :math:`B_n = \sqrt{2n+1}`, :math:`P_n = \sqrt{n + 1/2}`.
    - ``"legt"``: :math:`A_{nk} = -\tfrac12 \sqrt{2n+1}\sqrt{2k+1}`, times :math:`(-1)^{n-k}` for n < k;
      :math:`B_n = \tfrac12 \sqrt{2n+1}`, P of rank 2 (even and odd n apart).

    :math:`A + P P^T` is normal: a multiple of the identity plus a skew-symmetric matrix.

    Args:
        measure: ``"legs"`` or ``"legt"``.
        state_size: N.

    Returns:
        A ``(N, N)``, B ``(N,)``, P ``(N, rank)``, float64.

    Raises:
        ValueError: ``measure`` is unknown, or ``state_size`` is not positive.

    Source: Gu et al., 2020, "HiPPO", arXiv:2008.07669; the low-rank terms from Gu et al., 2022, arXiv:2111.00396.
    """
    check_choice("measure", measure, ("legs", "legt"))
    check_positive("state_size", state_size, integer=True)
    n = np.arange(state_size)
    root = np.sqrt(2 * n + 1.0)
    product = root[:, None] * root[None, :]
    if measure == "legs":
        a = -np.tril(product, -1) - np.diag(n + 1.0)
        return a, root, np.sqrt(n + 0.5)[:, None]
    sign = np.where(n[:, None] >= n[None, :], 1.0, (-1.0) ** (n[:, None] - n[None, :]))
    # Above the diagonal A is product/2 where n - k is odd and -product/2 where it is even; P P^T = product/2 on equal
    # parity cancels the symmetric part.
    parity = np.stack([n % 2 == 0, n % 2 == 1], axis=1)
    return -0.5 * product * sign, 0.5 * root, np.where(parity, root[:, None] / math.sqrt(2.0), 0.0)


def hippo_diagonal(measure: str, state_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Diagonalise the normal part :math:`A + P P^T = V \Lambda V^*` of a HiPPO system.

    Args:
        measure: ``"legs"`` or ``"legt"``.
        state_size: N, even.

    Returns:
        The eigenvalues with negative imaginary part, ``(N/2,)``, most negative first; :math:`V^* B` ``(N/2,)``;
        :math:`V^* P` ``(N/2, rank)``; complex128. The phases of eigenvectors are arbitrary: only moduli of the last two
        mean anything.

    Raises:
        ValueError: ``measure`` is unknown, or ``state_size`` is odd or not positive.
    """
    if state_size % 2:
        raise ValueError(f"`state_size` must be even, got {state_size}.")
    a, b, p = hippo(measure, state_size)
    normal = a + p @ p.T
    real = float(np.mean(np.diag(normal)))
    # The rest is skew-symmetric S; -iS is Hermitian, so that eigh gives orthonormal eigenvectors.
    values, vectors = np.linalg.eigh(-1j * (normal - real * np.eye(state_size)))
    half = state_size // 2
    v = vectors[:, :half].conj().T
    return real + 1j * values[:half], v @ b, v @ p


def ssm_init(
    init: str,
    state_size: int,
    *,
    real_scale: float = 1.0,
    imag_scale: float = 1.0,
    real_random: bool = False,
    imag_random: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return the initial diagonal A and B of one system, one of each conjugate pair, n = 0 .. N/2 - 1.

    - ``"lin"``: :math:`-\tfrac12 - i \pi n`
    - ``"inv"``: :math:`-\tfrac12 - i \tfrac N\pi (\tfrac{N}{2n+1} - 1)`
    - ``"inv2"``: :math:`-\tfrac12 - i \tfrac N\pi (\tfrac{N}{n+1} - 1)`
    - ``"quad"``: :math:`-\tfrac12 - i \tfrac{(2n+1)^2}{\pi}`
    - ``"legs"``: eigenvalues of the normal part of HiPPO-LegS, with :math:`B = V^* B_{legs}`, imaginary part clamped to
      [-2, 2]. Theory wants half of that B; the authors' code leaves the half out, and so does this.
    - ``"real"``: :math:`-(n + 1)`
    - ``"rand"``: :math:`-\tfrac12 - i e^{\mathcal N(0, 1)}`

    Imaginary parts are negative, as the authors store them; their sign does not matter. B is 1 except for ``"legs"``.

    Args:
        init: One of the above.
        state_size: N, even.
        real_scale: Factor of the real parts.
        imag_scale: Factor of the imaginary parts.
        real_random: Draw the real parts from U(-1, 0) instead.
        imag_random: Draw the imaginary parts from U(-N/2, 0) instead.
        generator: Source of random numbers.

    Returns:
        A and B, ``(N/2,)``, complex64.

    Raises:
        ValueError: ``init`` is unknown, or ``state_size`` is odd or not positive.

    Source: Gu et al., 2022, arXiv:2206.11893, section 4; inv2 and quad from the authors' code.
    """
    check_choice("init", init, INITS)
    check_positive("d_state", state_size, integer=True)
    if state_size % 2:
        raise ValueError(f"`d_state` must be even, since states come in conjugate pairs, got {state_size}.")
    half, size = state_size // 2, state_size
    n = torch.arange(half, dtype=torch.float64)
    real, b = torch.full((half,), -0.5, dtype=torch.float64), torch.ones(half, dtype=torch.complex128)
    if init == "lin":
        imag = -math.pi * n
    elif init == "inv":
        imag = -size / math.pi * (size / (2 * n + 1) - 1)
    elif init == "inv2":
        imag = -size / math.pi * (size / (n + 1) - 1)
    elif init == "quad":
        imag = -((2 * n + 1) ** 2) / math.pi
    elif init == "real":
        real, imag = -(n + 1), torch.zeros_like(n)
    elif init == "rand":
        imag = -torch.exp(torch.randn(half, generator=generator, dtype=torch.float64))
    else:
        values, vb, _ = hippo_diagonal("legs", state_size)
        a = torch.from_numpy(values.copy())
        real, imag, b = a.real, a.imag, torch.from_numpy(vb.copy())
        b = torch.complex(b.real, b.imag.clamp(-2.0, 2.0))
    if real_random:
        real = -torch.rand(half, generator=generator, dtype=torch.float64)
    if imag_random:
        imag = -half * torch.rand(half, generator=generator, dtype=torch.float64)
    return torch.complex(real_scale * real, imag_scale * imag).to(torch.complex64), b.to(torch.complex64)
