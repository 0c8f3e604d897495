r"""Theory of kernel densities in many dimensions: the phases of Gaussian data, and exact means at finite n.

For a query x the Gaussian kernel's terms :math:`w_i = e^{-|x - y_i|^2 / 2 h^2}` are the Boltzmann weights of a random
energy model with :math:`n = e^{\alpha d}` levels. All that the phases depend on is
:math:`\phi(\lambda) = \lim \tfrac1d \ln E[w^\lambda]`, a function of :math:`t = \lambda / h^2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import ncx2

from dynakern.checks import check_finite, check_positive

__all__ = ["KDEPhases", "expected_log_partition", "expected_participation", "kde_phases"]

Floats = NDArray[Any]


@dataclass(frozen=True, eq=False)
class KDEPhases:
    r"""Where the estimate of a density changes its nature; see :func:`kde_phases`.

    Attributes:
        alpha: :math:`\alpha = \ln n / d`.
        spectrum: Eigenvalues :math:`s_k^2` of the covariance, ``(d,)`` (or one for isotropic data).
        t: The solution :math:`t_*` of :math:`F(t) = \alpha`.
        h_g: Condensation: below it a handful of points dominate the estimate at a typical point.
        h_clt: Below it fluctuations are heavy-tailed, above it Gaussian.
        h_opt: The bandwidth of least Kullback-Leibler divergence from the true density; always below ``h_g``.
    """

    alpha: float
    spectrum: Floats
    t: float
    h_g: float
    h_clt: float
    h_opt: float

    def mu(self, h: ArrayLike) -> Floats:
        r"""Return the stable index :math:`\mu = (h / h_G)^2` of the terms: :math:`P(w > W) \sim W^{-\mu}`.

        Above 2 the central limit theorem holds, between 1 and 2 only the law of large numbers, below 1 neither.

        Args:
            h: Bandwidths, any shape.

        Returns:
            Array of that shape.
        """
        return (_bandwidths(h) / self.h_g) ** 2

    def participation(self, h: ArrayLike) -> Floats:
        r"""Return :math:`E\,Y_2 \to \max(0, 1 - \mu)`, for large d; its inverse is the number of points that matter."""
        return np.maximum(0.0, 1.0 - self.mu(h))

    def log_partition(self, h: ArrayLike) -> Floats:
        r"""Return :math:`\tfrac1d \ln Z` at a typical point, for large d, at each bandwidth of ``h`` (any shape)."""
        h = _bandwidths(h)
        u = h[..., None] ** 2 / self.spectrum
        free = self.alpha - 0.5 * (np.log1p(1 / u) + 1 / (1 + u)).mean(-1)
        return np.where(h >= self.h_g, free, -self._frozen / h**2)

    def kl(self, h: ArrayLike) -> Floats:
        r"""Return the Kullback-Leibler divergence of the estimate from the true density, in nats per dimension.

        .. math:: D = \tfrac12 \langle \ln(1 + u) - \tfrac{u}{1 + u} \rangle, \; u = h^2 / s^2 \quad (h \ge h_G),
           \qquad D = \alpha + \ln h - \tfrac12 \langle \ln s^2 \rangle - \tfrac12 + c / h^2 \quad (h < h_G).

        Args:
            h: Bandwidths, any shape.

        Returns:
            Array of that shape.
        """
        h = _bandwidths(h)
        u = h[..., None] ** 2 / self.spectrum
        free = 0.5 * (np.log1p(u) - u / (1 + u)).mean(-1)
        frozen = self.alpha + np.log(h) - 0.5 * np.log(self.spectrum).mean() - 0.5 + self._frozen / h**2
        return np.where(h >= self.h_g, free, frozen)

    @property
    def _frozen(self) -> float:
        """The energy c of the lowest levels times h^2."""
        return 0.5 * self.h_opt**2


def _bandwidths(h: ArrayLike) -> Floats:
    values = np.asarray(h, dtype=np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"`h` must be positive numbers, got {h!r}.")
    return values


def kde_phases(alpha: float, spectrum: ArrayLike | Sequence[float] = (1.0,)) -> KDEPhases:
    r"""Return the phases of a Gaussian kernel density of Gaussian data, for d and n large at fixed :math:`\ln n / d`.

    With :math:`\langle\cdot\rangle` the mean over the eigenvalues :math:`s^2` and

    .. math:: F(t) = \tfrac12 \Big\langle \ln(1 + t s^2) - \frac{t s^2}{(1 + t s^2)^2} \Big\rangle, \qquad
       F(t_*) = \alpha,

    :math:`h_G = t_*^{-1/2}`, :math:`h_{CLT} = \sqrt 2\, h_G` and
    :math:`h_{opt}^2 = \langle s^2 (2 + t_* s^2) / (1 + t_* s^2)^2 \rangle`.

    Args:
        alpha: :math:`\alpha = \ln n / d`, positive.
        spectrum: Eigenvalues of the covariance, positive; one number for isotropic data.

    Returns:
        :class:`KDEPhases`.

    Raises:
        ValueError: ``alpha`` is not positive, or ``spectrum`` is empty or holds a number that is not positive.

    Example:
        >>> phases = kde_phases(np.log(20_000) / 50)
        >>> print(f"{phases.h_opt:.3f} < {phases.h_g:.3f} < {phases.h_clt:.3f}")
        0.894 < 1.050 < 1.485

    Source: Biroli and Mézard, 2024, arXiv:2408.05807; the formulas are derived from the abstract's setting.
    """
    check_positive("alpha", float(alpha))
    s2 = np.atleast_1d(np.asarray(spectrum, dtype=np.float64))
    if s2.ndim != 1 or not len(s2) or not (np.isfinite(s2) & (s2 > 0)).all():
        raise ValueError(
            f"`spectrum` must be one or more positive eigenvalues, got {np.array2string(s2, threshold=8)}."
        )

    def excess(log_t: float) -> float:
        z = np.exp(log_t) * s2
        return float(0.5 * (np.log1p(z) - 1 / ((1 + z) * (1 + 1 / z))).mean() - alpha)

    scale = np.log(s2.mean())  # F depends on t s^2
    t = float(np.exp(brentq(excess, -30.0 - scale, 600.0 - scale, xtol=1e-14, rtol=1e-15)))  # pyright: ignore
    z = t * s2
    h_g, h_opt = t**-0.5, float(np.sqrt((s2 * (2 + z) / (1 + z) ** 2).mean()))
    return KDEPhases(float(alpha), s2, t, h_g, float(np.sqrt(2.0) * h_g), h_opt)


def _levels(h: float, d: int, x_norm2: float, sigma2: float) -> tuple[Floats, Floats]:
    """Return nodes of ln w and the probability that each stands for (trapezoids over the squared distance)."""
    offset = x_norm2 / sigma2
    low, high = 0.3 * ncx2.ppf(1e-16, d, offset), 1.05 * ncx2.isf(1e-16, d, offset)
    distance = np.linspace(low, high, 6000)
    weight = np.full(6000, distance[1] - distance[0])
    weight[[0, -1]] /= 2
    return -sigma2 * distance / (2 * h**2), ncx2.pdf(distance, d, offset) * weight


def _check_setting(h: float, n: int, d: int, x_norm2: float, sigma2: float) -> None:
    check_positive("h", float(h))
    check_positive("sigma2", float(sigma2))
    check_positive("x_norm2", float(x_norm2), zero=True)
    for name, value in (("n", n), ("d", d)):
        check_positive(name, value, integer=True)


def _log_times(log_w: Floats) -> Floats:
    return np.linspace(-log_w.max() - 30, -log_w.min() + 20, 1800)


def expected_log_partition(h: float, *, n: int, d: int, x_norm2: float, sigma2: float = 1.0) -> float:
    r"""Return :math:`E \ln Z` exactly, over data sets of n points from :math:`N(0, \sigma^2 I_d)`, at a fixed point x.

    .. math:: E \ln Z = \int_0^\infty \big(e^{-t} - (1 - a(t))^n\big) \frac{dt}{t}, \qquad
       a(t) = E[1 - e^{-t w}],

    by trapezoids in :math:`\ln t` and the squared distance, whose law is a noncentral chi squared; relative error below
    1e-4. Mean of :math:`\ln\hat\rho` is this less :math:`\ln n + d \ln h + \tfrac d2 \ln 2 \pi`.

    Args:
        h: Bandwidth.
        n: Number of points.
        d: Number of dimensions.
        x_norm2: :math:`|x|^2`.
        sigma2: Variance of each coordinate of the data.

    Raises:
        TypeError: ``n`` or ``d`` is no integer.
        ValueError: An argument is out of range.

    Source: derived here; exact where :func:`kde_phases` is a limit.
    """
    _check_setting(h, n, d, x_norm2, sigma2)
    log_w, probability = _levels(h, d, x_norm2, sigma2)
    log_t = _log_times(log_w)
    a = -np.expm1(-np.exp(np.minimum(log_t[:, None] + log_w, 700.0))) @ probability
    survival = np.exp(n * np.log1p(-np.minimum(a, 1 - 1e-16)))
    return float(np.trapezoid(np.exp(-np.exp(log_t)) - survival, log_t))


def expected_participation(h: float, *, n: int, d: int, x_norm2: float, sigma2: float = 1.0) -> float:
    r"""Return :math:`E\,Y_2` exactly, over data sets as in :func:`expected_log_partition` (whose arguments it takes).

    .. math:: E\,Y_2 = n \int_0^\infty t\, E[w^2 e^{-t w}]\, (1 - a(t))^{n - 1}\, dt .

    Args:
        h: Bandwidth.
        n: Number of points.
        d: Number of dimensions.
        x_norm2: :math:`|x|^2`.
        sigma2: Variance of each coordinate of the data.

    Raises:
        TypeError: ``n`` or ``d`` is no integer.
        ValueError: An argument is out of range.
    """
    _check_setting(h, n, d, x_norm2, sigma2)
    log_w, probability = _levels(h, d, x_norm2, sigma2)
    log_t = _log_times(log_w)
    log_tw = log_t[:, None] + log_w
    tw = np.exp(np.minimum(log_tw, 700.0))
    a = np.minimum((-np.expm1(-tw)) @ probability, 1 - 1e-16)
    squares = np.exp(2 * log_tw - tw) @ probability  # t^2 E[w^2 e^(-tw)], as dt = t d ln t
    integrand = squares * np.exp((n - 1) * np.log1p(-a))
    return float(n * np.trapezoid(integrand, log_t))


def sample_spectrum(data: Floats, weights: Floats) -> Floats:
    """Return eigenvalues of the covariance of ``data`` ``(n, d)`` for the rule "rem".

    Eigenvalues below 1e-6 of the largest are dropped; with fewer than 10 points a dimension the others shrink towards
    their mean by Ledoit and Wolf's share (which rule of shrinking the theory wants is open; this is our choice).
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    check_finite("data", data)
    share = weights / weights.sum()
    centered = (data - share @ data) * np.sqrt(share)[:, None]
    eigenvalues = np.linalg.svd(centered, compute_uv=False) ** 2
    kept = eigenvalues[eigenvalues > 1e-6 * eigenvalues.max(initial=0.0)]
    if len(data) < 10 * len(kept):
        amount = float(ledoit_wolf_shrinkage(centered * np.sqrt(len(data)), assume_centered=True))
        kept = (1 - amount) * kept + amount * kept.mean()
    return kept
