"""The density estimator: bandwidth rules, scores, samples, and the diagnosis of its phase."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.neighbors import KernelDensity
from sklearn.utils import check_random_state
from sklearn.utils.validation import (  # pyright: ignore[reportAttributeAccessIssue]
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)

from dynakern.checks import check_choice, check_positive
from dynakern.ops.kernel_sums import KernelSums, kernel_sums
from dynakern.similarity.density.phases import KDEPhases, kde_phases, sample_spectrum

__all__ = ["Diagnosis", "HighDimKDE", "density"]

Floats = NDArray[Any]
_KERNELS = ("gaussian", "epanechnikov", "exponential", "tophat")
_RULES = ("loo", "rem", "scott", "silverman")
_POWERS = 2.0 ** (np.arange(-24, 33) / 4)  # lambda from 1/64 to 256
_ONE_NAT = 1.0  # entropy below which "a handful of levels" is said to dominate: a choice for finite sizes


@dataclass(frozen=True, eq=False)
class Diagnosis:
    r"""In which phase an estimate is; medians over Q queries, and what they are medians of.

    Attributes:
        regime: ``"clt"`` (a mean of many terms with Gaussian fluctuations), ``"stable"`` (right on average, but with
            heavy tails) or ``"condensed"`` (a handful of points decide): stable index above 2, from 1 to 2, below 1.
        mu: Stable index :math:`\hat\mu`, the largest :math:`\lambda` at which the entropy of
            :math:`p_i \propto w_i^\lambda` exceeds 1 nat; 0 below and infinite above the range [1/64, 256].
        effective_points: :math:`1 / Y_2`, how many points contribute; 0 where a compact kernel sees none.
        h_g: Bandwidth below which the estimate at the median query is condensed, read off the data:
            :math:`h / \sqrt{\hat\mu}` (exponential kernel: :math:`h / \hat\mu`; compact kernels: the distance of the
            nearest point).
        h_clt: Bandwidth above which it is a Gaussian mean: :math:`\sqrt 2\, h_G` (exponential: 2; compact: 1).
        bandwidth: The bandwidth in use.
        phases: What the theory of Gaussian data with the sample's spectrum says, for comparison.
        query_mu: ``(Q,)``.
        query_effective_points: ``(Q,)``.
        query_log_density: ``(Q,)``.
    """

    regime: Literal["clt", "stable", "condensed"]
    mu: float
    effective_points: float
    h_g: float
    h_clt: float
    bandwidth: float
    phases: KDEPhases
    query_mu: Floats
    query_effective_points: Floats
    query_log_density: Floats


class HighDimKDE(DensityMixin, BaseEstimator):
    r"""Kernel density whose bandwidth is chosen, and judged, for many dimensions.

    .. math:: \hat\rho_h(x) = \frac{1}{\sum_i v_i} \sum_i v_i \frac{c_d}{h^d} K\!\left(\frac{|x - y_i|}{h}\right)

    with scikit-learn's normalised kernels. Logarithms are summed, so that nothing underflows. A query costs O(n d);
    ``bandwidth="loo"`` costs two passes over all pairs of training points.

    Args:
        kernel: ``"gaussian"``, ``"epanechnikov"``, ``"exponential"`` or ``"tophat"``.
        bandwidth: A positive number, or a rule: ``"loo"`` maximises the leave-one-out log-likelihood; ``"rem"`` is the
            bandwidth of least divergence for Gaussian data with the sample's spectrum (:func:`kde_phases`; poor for
            clustered data); ``"scott"`` :math:`n^{-1/(d+4)}` and ``"silverman"`` :math:`(n (d+2)/4)^{-1/(d+4)}`, both
            times the root of the mean variance. With weights n is :math:`(\sum v)^2 / \sum v^2`.
        algorithm: ``"exact"``: every pair, to rounding. ``"tree"``: scores by scikit-learn's ``KernelDensity``, whose
            tree can skip far points; where it must refine a far too large bound it is left with what the
            subtraction lost (off by 11 nats at d = 16, h = 0.4, and finite where no point is inside a compact kernel).

    Attributes:
        bandwidth_: The bandwidth in use.
        n_features_in_: Number d of features.
        data_: Training points, ``(n, d)``.
        sample_weight_: Their weights, ``(n,)``.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> kde = HighDimKDE().fit(rng.standard_normal((2000, 20)))
        >>> X = rng.standard_normal((100, 20))
        >>> kde.diagnose(X).regime
        'stable'
        >>> kde.score_samples(X).shape
        (100,)

    Source: Biroli and Mézard, 2024, arXiv:2408.05807.
    """

    def __init__(
        self, kernel: str = "gaussian", bandwidth: float | str = "loo", algorithm: Literal["exact", "tree"] = "exact"
    ) -> None:
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.algorithm = algorithm

    def fit(self, X: ArrayLike, y: Any = None, sample_weight: ArrayLike | None = None) -> Self:
        """Keep the points and choose the bandwidth.

        Args:
            X: Points, ``(n, d)``, finite.
            y: Ignored.
            sample_weight: How often each point counts, ``(n,)``, non-negative.

        Returns:
            This estimator.

        Raises:
            TypeError: ``bandwidth`` is neither a number nor a string.
            ValueError: There are fewer than two points, a bandwidth is not positive or no rule of that name exists, a
                weight is negative, or a rule meets points that are all the same.
        """
        check_choice("kernel", self.kernel, _KERNELS)
        check_choice("algorithm", self.algorithm, ("exact", "tree"))
        rule = self.bandwidth
        if isinstance(rule, str):
            check_choice("bandwidth", rule, _RULES)
        else:
            check_positive("bandwidth", float(rule) if isinstance(rule, Real) else rule)
        data = np.asarray(validate_data(self, X, dtype=np.float64, ensure_min_samples=2))  # pyright: ignore
        if sample_weight is None:
            weight = np.ones(len(data))
        else:
            weight = _check_sample_weight(sample_weight, data, dtype=np.float64)
            if weight.min() < 0 or weight.max() <= 0:
                raise ValueError(
                    f"`sample_weight` must be non-negative and not all zero, got {weight.min():g} as least."
                )
        self.data_ = np.array(data)
        self.sample_weight_ = weight
        self._weighted = bool((weight != weight[0]).any())
        self.bandwidth_ = self._choose_bandwidth() if isinstance(rule, str) else float(rule)
        if self.algorithm == "tree":
            tree = KernelDensity(bandwidth=self.bandwidth_, kernel=self.kernel)  # pyright: ignore[reportArgumentType]
            self._tree = tree.fit(self.data_, sample_weight=weight if self._weighted else None)
        return self

    def _choose_bandwidth(self) -> float:
        """Return the bandwidth by a rule."""
        share = self.sample_weight_ / self.sample_weight_.sum()
        d, n = self.data_.shape[1], 1.0 / float(share @ share)
        variance = float((share @ (self.data_ - share @ self.data_) ** 2).mean())
        if variance <= 0:
            raise ValueError(
                f"bandwidth={self.bandwidth!r} needs points that differ, got {len(self.data_)} equal ones."
            )
        if self.bandwidth == "scott":
            return math.sqrt(variance) * n ** (-1 / (d + 4))
        if self.bandwidth == "silverman":
            return math.sqrt(variance) * (n * (d + 2) / 4) ** (-1 / (d + 4))
        if self.bandwidth == "rem":
            return self._phases().h_opt
        return self._leave_one_out_bandwidth(2 * math.sqrt(variance))

    def _phases(self) -> KDEPhases:
        """Return the phases of Gaussian data with the sample's spectrum."""
        share = self.sample_weight_ / self.sample_weight_.sum()
        spectrum = sample_spectrum(self.data_, self.sample_weight_)
        return kde_phases(max(-math.log(float(share @ share)), 1e-12) / len(spectrum), spectrum)

    def _sums(self, X: Floats, bandwidths: ArrayLike, powers: ArrayLike = (), *, leave_out: bool = False) -> KernelSums:
        weights = torch.from_numpy(self.sample_weight_) if self._weighted else None
        points = torch.from_numpy(self.data_)
        queries = points if leave_out else torch.from_numpy(np.ascontiguousarray(X))
        options = {"kernel": self.kernel, "weights": weights, "exclude_diagonal": leave_out}
        return kernel_sums(queries, points, np.asarray(bandwidths), powers=np.asarray(powers), **options)  # pyright: ignore

    def _normaliser(self, h: ArrayLike) -> Floats:
        """Return the logarithm of the integral of the kernel of bandwidth h over space."""
        d = self.data_.shape[1]
        ball = 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)
        unit = {
            "gaussian": 0.5 * d * math.log(2 * math.pi),
            "tophat": ball,
            "epanechnikov": ball + math.log(2 / (d + 2)),
            "exponential": ball + math.lgamma(d + 1),
        }[self.kernel]
        return unit + d * np.log(np.asarray(h, dtype=np.float64))

    def leave_one_out(self, bandwidths: ArrayLike) -> Floats:
        """Return the mean log density of the training points, each under the estimate from all others.

        Args:
            bandwidths: ``(H,)``, positive. All come from one pass over the distances.

        Returns:
            ``(H,)``, weighted as the fit was; -inf where a point has no neighbour inside a compact kernel.
        """
        check_is_fitted(self)
        h = np.atleast_1d(np.asarray(bandwidths, dtype=np.float64))
        v = self.sample_weight_ if self._weighted else np.ones(len(self.data_))
        used = v > 0
        log_sum = self._sums(self.data_, h, leave_out=True).log_sum.numpy()[:, used]
        others = np.log(v.sum() - v[used])
        return (log_sum - others) @ (v[used] / v.sum()) - self._normaliser(h)

    def _leave_one_out_bandwidth(self, largest: float) -> float:
        r"""Maximise the leave-one-out likelihood over :math:`\ln h`.

        A grid of bandwidths that are :math:`\sqrt 2` apart, so that they share exponentials, brackets the maximum. In
        the bracket the smooth kernels' likelihood is interpolated through 9 Chebyshev nodes, and a golden section runs
        on the interpolant; compact kernels, whose likelihood is not smooth, take the best of 33 bandwidths.
        """
        few = np.random.default_rng(0).choice(len(self.data_), min(len(self.data_), 1000), replace=False)
        distances = self._nearest(np.sort(few))
        smallest = max(distances / (4 * math.sqrt(self.data_.shape[1])), 1e-6 * largest)
        grid = largest * 2.0 ** (-0.5 * np.arange(2 + math.ceil(2 * math.log2(max(largest / smallest, 1.0)))))
        if self.kernel in ("epanechnikov", "tophat"):
            grid = np.concatenate([largest * 2.0 ** (0.5 * np.arange(12, 0, -1)), grid])
        best = int(np.argmax(self.leave_one_out(grid)))
        low, high = np.log(grid[min(best + 1, len(grid) - 1)]), np.log(grid[max(best - 1, 0)])
        if self.kernel in ("epanechnikov", "tophat"):
            fine = np.exp(np.linspace(low, high, 33))
            return float(fine[np.argmax(self.leave_one_out(fine))])
        nodes = np.cos(np.pi * (np.arange(9) + 0.5) / 9)
        values = self.leave_one_out(np.exp(low + (high - low) * (nodes + 1) / 2))
        curve = np.polynomial.Chebyshev.fit(nodes, values, 8, domain=[-1, 1])
        return float(np.exp(low + (high - low) * (_golden_section(curve, -1.0, 1.0) + 1) / 2))

    def _nearest(self, rows: NDArray[np.intp]) -> float:
        """Return the lower decile of the distances of some points to their nearest distinct neighbour among all."""
        points = torch.from_numpy(self.data_)
        order = np.concatenate([rows, np.setdiff1d(np.arange(len(points)), rows)])
        found = kernel_sums(points[order[: len(rows)]], points[order], 1.0, exclude_diagonal=True).nearest.numpy()
        positive = found[found > 0]
        return float(np.quantile(positive, 0.1)) if len(positive) else 0.0

    def score_samples(self, X: ArrayLike) -> Floats:
        """Return the log density at each row of ``X`` ``(q, d)``, ``(q,)``; -inf outside all compact kernels.

        Raises:
            NotFittedError: The estimator is not fitted.
            ValueError: ``X`` has another number of features than the fit, or is not finite.
        """
        check_is_fitted(self)
        X = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))  # pyright: ignore
        if self.algorithm == "tree":
            return self._tree.score_samples(X)
        return self._log_density(self._sums(X, [self.bandwidth_]))

    def _log_density(self, sums: KernelSums) -> Floats:
        # Equal weights were left out of the sums; they cancel.
        total = self.sample_weight_.sum() if self._weighted else float(len(self.data_))
        return sums.log_sum[0].numpy() - np.log(total) - self._normaliser(self.bandwidth_)

    def score(self, X: ArrayLike, y: Any = None) -> float:
        """Return the total log density of the rows of ``X`` ``(q, d)``, as scikit-learn's ``KernelDensity`` does."""
        return float(self.score_samples(X).sum())

    def diagnose(self, X: ArrayLike) -> Diagnosis:
        r"""Say in which phase the estimate is at typical queries, without assuming Gaussian data.

        Args:
            X: Queries that were not fitted, ``(q, d)``.

        Returns:
            :class:`Diagnosis`.

        Warns:
            UserWarning: Fewer than 3 points contribute at the median query.
        """
        check_is_fitted(self)
        X = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))  # pyright: ignore
        sums = self._sums(X, [self.bandwidth_], _POWERS)
        seen = np.isfinite(sums.log_sum[0].numpy())
        effective = np.divide(1.0, sums.participation[0].numpy(), out=np.zeros(len(X)), where=seen)
        query_mu = _stable_index(np.nan_to_num(sums.entropy[0].numpy()))
        mu, h = float(np.median(query_mu)), self.bandwidth_
        if self.kernel in ("gaussian", "exponential"):
            power = 2 if self.kernel == "gaussian" else 1
            h_g = float(h * mu ** (-1 / power)) if mu > 0 else math.inf
            h_clt = 2 ** (1 / power) * h_g
        else:
            h_g = h_clt = float(np.median(sums.nearest.numpy()))
        if np.median(effective) < 3:
            warnings.warn(
                f"The estimate is condensed: at the median query {np.median(effective):.2g} of {len(self.data_)} "
                f"points contribute. A larger bandwidth than {h:.4g} or more data would average more of them.",
                stacklevel=2,
            )
        regime = "clt" if mu > 2 else "stable" if mu > 1 else "condensed"
        medians = {"mu": mu, "effective_points": float(np.median(effective)), "h_g": h_g, "h_clt": h_clt}
        return Diagnosis(
            regime=regime,
            **medians,
            bandwidth=h,
            phases=self._phases(),
            query_mu=query_mu,
            query_effective_points=effective,
            query_log_density=self._log_density(sums),
        )

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> Floats:
        """Draw points from the estimate: a training point by weight, then a step by the kernel (all four kernels).

        Args:
            n_samples: How many.
            random_state: Seed.

        Returns:
            ``(n_samples, d)``.
        """
        check_is_fitted(self)
        check_positive("n_samples", n_samples, integer=True)
        rng = check_random_state(random_state)
        rows = rng.choice(len(self.data_), n_samples, p=self.sample_weight_ / self.sample_weight_.sum())
        d = self.data_.shape[1]
        step = rng.standard_normal((n_samples, d))
        if self.kernel != "gaussian":
            radius = {
                "tophat": lambda: rng.uniform(size=n_samples) ** (1 / d),
                "epanechnikov": lambda: np.sqrt(rng.beta(d / 2, 2, n_samples)),  # density of r^2: t^(d/2 - 1) (1 - t)
                "exponential": lambda: rng.gamma(d, 1.0, n_samples),
            }[self.kernel]()
            step *= (radius / np.linalg.norm(step, axis=1))[:, None]
        return self.data_[rows] + self.bandwidth_ * step

    def sample_conditional(
        self, X: ArrayLike, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> Floats:
        r"""Draw the unknown features of each row given the known ones, under a Gaussian kernel.

        The known features choose training points, :math:`p_i \propto v_i e^{-|x_k - y_{ik}|^2 / 2 h^2}`, and the
        unknown ones are theirs plus noise of width h: the exact conditional law of the estimate.

        Args:
            X: ``(q, d)``, NaN where a feature is unknown.
            n_samples: Draws for each row.
            random_state: Seed.

        Returns:
            ``(q, n_samples, d)``; known features are repeated as they are.

        Raises:
            NotImplementedError: The kernel is not Gaussian.
        """
        check_is_fitted(self)
        if self.kernel != "gaussian":
            raise NotImplementedError(f"Conditional draws need kernel='gaussian', got {self.kernel!r}.")
        check_positive("n_samples", n_samples, integer=True)
        X = np.asarray(validate_data(self, X, dtype=np.float64, reset=False, ensure_all_finite="allow-nan"))  # pyright: ignore
        rng = check_random_state(random_state)
        drawn = np.repeat(X[:, None], n_samples, 1)  # (q, n_samples, d)
        with np.errstate(divide="ignore"):
            prior = np.log(self.sample_weight_)
        for row, out in zip(X, drawn, strict=True):
            known = ~np.isnan(row)
            energy = ((self.data_[:, known] - row[known]) ** 2).sum(1) / (2 * self.bandwidth_**2) - prior
            p = np.exp(energy.min() - energy)
            chosen = rng.choice(len(p), n_samples, p=p / p.sum())
            noise = self.bandwidth_ * rng.standard_normal((n_samples, int((~known).sum())))
            out[:, ~known] = self.data_[chosen][:, ~known] + noise
        return drawn


def _stable_index(entropy: Floats) -> Floats:
    """Return the power at which entropies ``(L, Q)``, which fall with the power, cross one nat, ``(Q,)``."""
    above = entropy > _ONE_NAT
    count = np.logical_and.accumulate(above, axis=0).sum(0)
    inner = np.clip(count, 1, len(_POWERS) - 1)
    columns = np.arange(entropy.shape[1])
    before, after = entropy[inner - 1, columns], entropy[inner, columns]
    share = np.clip((before - _ONE_NAT) / np.maximum(before - after, 1e-300), 0.0, 1.0)
    crossing = _POWERS[inner - 1] * (_POWERS[inner] / _POWERS[inner - 1]) ** share
    return np.where(count == 0, 0.0, np.where(count == len(_POWERS), np.inf, crossing))


def _golden_section(function: Any, low: float, high: float, width: float = 1e-6) -> float:
    """Return where a function with one maximum in [low, high] has it."""
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > width:
        step = ratio * (high - low)
        low, high = (high - step, high) if function(high - step) < function(low + step) else (low, low + step)
    return (low + high) / 2


def density(*, features: int, random_state: int | None = None) -> HighDimKDE:
    """Return a competitor for density tasks: a Gaussian kernel, its bandwidth by leave-one-out.

    Args:
        features: Number of features; the estimator learns it from the data.
        random_state: Not used: the estimate is deterministic.
    """
    return HighDimKDE(kernel="gaussian", bandwidth="loo")
