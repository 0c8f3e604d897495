r"""Private kernel densities.

The mean similarity of y to the private rows is :math:`\frac{1}{n} \sum_x f(x, y)`. Random features release
:math:`F_j = \frac{1}{n} \sum_x \sqrt{2} \cos(\omega_j \cdot x + b_j)` with noise and answer
:math:`\frac{1}{m} \sum_j \sqrt{2} \cos(\omega_j \cdot y + b_j) F_j`.
"""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from dynakern.checks import check_choice, check_positive
from dynakern.similarity.private.noise import (
    PrivacyAccountant,
    Released,
    add_noise,
    check_bounds,
    check_inside,
    multiply_rows,
)
from dynakern.similarity.private.sketches import (
    KERNELS,
    OF_L1,
    check_transform,
    draw_frequencies,
    feature_sums,
    fgt_similarity,
    johnson_lindenstrauss,
    rff_similarity,
    transform_sums,
)

__all__ = ["PrivateKDE"]


def _log_normaliser(kernel: str, features: int, bandwidth: float) -> float | None:
    """Return the logarithm of the kernel's integral, or None if it has none."""
    log = features * math.log(bandwidth)
    if kernel == "gaussian":
        return log + 0.5 * features * math.log(2 * math.pi)
    if kernel == "laplacian":
        return log + features * math.log(2.0)
    if kernel == "exponential":
        sphere = math.log(2.0) + 0.5 * features * math.log(math.pi) - math.lgamma(0.5 * features)
        return log + sphere + math.lgamma(features)
    return log + math.log(math.pi) if kernel == "cauchy" and features == 1 else None


class PrivateKDE(Released, DensityMixin, BaseEstimator):
    r"""Kernel density and mean similarity from one private release; unlimited queries.

    Kernels are those of :func:`draw_frequencies`; the bandwidth has scikit-learn's meaning. Nothing about the rows is
    used but the released numbers: the size of the data set is noisy too where a row may be added or removed.

    Args:
        kernel: ``"gaussian"``, ``"exponential"``, ``"laplacian"``, ``"cauchy"``, ``"inverse"`` or ``"inverse_l1"``.
        bandwidth: h, a public number; a bandwidth computed from the rows would spend budget nobody accounts for.
        epsilon: Privacy budget of a fit.
        delta: 0 for pure privacy by Laplace noise; else (epsilon, delta)-privacy by Gaussian noise, whose error grows
            with the square root of the number of features less.
        method: ``"rff"``, random features; or ``"fgt"``, the fast Gauss transform (Gaussian kernel, up to 4 features,
            needs ``bounds``).
        num_features: m. More features lower the error :math:`1 / \sqrt m` of the kernel and raise that of the noise,
            :math:`2 \sqrt m / (\varepsilon n)`.
        project: Map rows and queries to that many coordinates first (kernels of the l2 distance).
        order: :math:`\rho` of the fast Gauss transform.
        bounds: The public box (low, high); for ``"rff"`` not needed, and enforced where given.
        clip: Move rows outside the box to its border instead of refusing them.
        truncate: Cut mean similarities to [0, 1].
        floor: Mean similarity that :meth:`score_samples` puts in place of anything lower; by default
            :meth:`expected_error`, below which an estimate cannot be told from zero.
        neighbours: ``"add-remove"`` one row, of which 1/20 of the budget goes to a noisy count; or ``"replace"`` one:
            the count is public and sensitivities double.
        noise_source: ``"auto"``, ``"opendp"`` or ``"exact"``; see :func:`add_noise`.
        accountant: The :class:`PrivacyAccountant` that each fit charges.
        random_state: Seed of the public frequencies and projection; the noise never comes from it.

    Attributes:
        sketch_: The noisy averages.
        count_: The number of rows as released.
        frequencies_, shifts_, projection_: Public randomness.
        noise_scale_: Standard deviation of the noise of an entry of ``sketch_``.
        noise_source_: Who drew the noise.
        n_features_in_: P.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((3000, 2))
        >>> kde = PrivateKDE(epsilon=1.0, num_features=256, random_state=0, noise_source="exact").fit(X)
        >>> kde.score_samples(X[:3]).shape, kde.epsilon_spent
        ((3,), 1.0)
        >>> bool(abs(kde.mean_similarity([[0.0, 0.0]])[0] - 0.5) < 0.25)
        True

    Source: Backurs et al., 2024, arXiv:2403.08917; Wagner, Naamad & Mishra, 2023, ICML.
    """

    _arrays: ClassVar[tuple[str, ...]] = (
        "sketch_",
        "count_",
        "frequencies_",
        "shifts_",
        "projection_",
        "noise_scale_",
    )
    _bits = 20  # grid of a row's features: fine beside the noise, coarse enough for 64 bits

    def __init__(
        self,
        kernel: str = "gaussian",
        *,
        bandwidth: float = 1.0,
        epsilon: float = 1.0,
        delta: float = 0.0,
        method: str = "rff",
        num_features: int = 1024,
        project: int | None = None,
        order: int = 8,
        bounds: Any = None,
        clip: bool = False,
        truncate: bool = False,
        floor: float | None = None,
        neighbours: str = "add-remove",
        noise_source: str = "auto",
        accountant: PrivacyAccountant | None = None,
        random_state: Any = None,
    ) -> None:
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.epsilon = epsilon
        self.delta = delta
        self.method = method
        self.num_features = num_features
        self.project = project
        self.order = order
        self.bounds = bounds
        self.clip = clip
        self.truncate = truncate
        self.floor = floor
        self.neighbours = neighbours
        self.noise_source = noise_source
        self.accountant = accountant
        self.random_state = random_state

    def _check(self, features: int) -> None:
        check_choice("kernel", self.kernel, KERNELS)
        check_choice("method", self.method, ("rff", "fgt"))
        if isinstance(self.bandwidth, str):
            raise ValueError(
                f"`bandwidth` must be a public number: {self.bandwidth!r} would be computed from the rows, outside the "
                "privacy budget."
            )
        check_positive("bandwidth", float(self.bandwidth))
        check_positive("num_features", self.num_features, integer=True)
        if self.floor is not None:
            check_positive("floor", self.floor)
        if self.project is not None and self.kernel in OF_L1:
            raise ValueError(f"`project` must be None for kernels of the l1 distance, got {self.project!r}.")
        if self.method == "fgt":
            if self.kernel != "gaussian" or self.project is not None:
                raise ValueError(
                    f"`method` 'fgt' must have the Gaussian kernel and no projection, got kernel={self.kernel!r}, "
                    f"project={self.project!r}."
                )
            check_transform(features, self._width(features), self.order)

    def _width(self, features: int) -> int:
        low, high = check_bounds(self.bounds, features)
        return math.ceil(float((high - low).max()) / (math.sqrt(2.0) * self.bandwidth)) + 1

    def fit(self, X: Any, y: Any = None) -> Self:
        """Release the sketch of the rows ``(N, P)`` and charge the accountant; ``y`` is ignored.

        Raises:
            ValueError: A parameter is out of range, a row is outside ``bounds``, or the budget is spent.
        """
        X = validate_data(self, X, dtype=np.float64)
        n, features = X.shape
        factor = self._check_privacy()
        self._check(features)
        if 0 < 1 / n <= self.delta:
            warnings.warn(f"delta = {self.delta:g} is not below 1 / n: whole rows may be published.", stacklevel=2)
        if self.bounds is not None:
            X = check_inside(X, *check_bounds(self.bounds, features), self.clip)
        for name in ("projection_", "frequencies_", "shifts_"):
            if hasattr(self, name):
                delattr(self, name)
        share = Fraction(19, 20) if self.neighbours == "add-remove" else Fraction(1)
        if self.method == "fgt":
            low, _ = check_bounds(self.bounds, features)
            lattice = (X - low) / (math.sqrt(2.0) * self.bandwidth)
            clean = transform_sums(lattice, self._width(features), self.order, self._bits)
            one = Fraction(2 * (2**self.order - 1), 2**self.order) ** features * 2**self._bits
            l1, l2_squared = math.floor(one), math.floor(Fraction(4, 3) ** features * 4**self._bits)
        else:
            rng = check_random_state(self.random_state)
            if self.project is not None:
                self.projection_ = johnson_lindenstrauss(features, self.project, rng)
                X = multiply_rows(X, self.projection_)
            m = self.num_features
            options = {"bandwidth": self.bandwidth, "random_state": rng}
            self.frequencies_ = draw_frequencies(self.kernel, X.shape[1], m, **options)
            self.shifts_ = rng.uniform(0, 2 * math.pi, m)
            clean = feature_sums(X, self.frequencies_, self.shifts_, self._bits)
            largest = round(math.sqrt(2.0) * 2**self._bits) + 1  # one more for the cosine's last bits
            l1, l2_squared = m * largest, m * largest**2
        self._charge()
        budget = {"epsilon": self.epsilon, "delta": self.delta, "source": self.noise_source}
        noisy, deviation, self.noise_source_ = add_noise(
            clean, share=share, l1=factor * l1, l2_squared=factor**2 * l2_squared, **budget
        )
        self.count_ = float(n)
        if self.neighbours == "add-remove":
            count = np.array([n], dtype=np.int64)
            self.count_ = max(1.0, float(add_noise(count, share=1 - share, l1=1, l2_squared=1, **budget)[0][0]))
        unit = 2.0**self._bits * self.count_
        self.sketch_, self.noise_scale_ = noisy / unit, deviation / unit
        return self

    def _places(self, Y: Any) -> np.ndarray:
        check_is_fitted(self, "sketch_")
        Y = validate_data(self, Y, dtype=np.float64, reset=False)
        if self.method == "fgt":
            return (Y - check_bounds(self.bounds, Y.shape[1])[0]) / (math.sqrt(2.0) * self.bandwidth)
        return Y @ self.projection_ if hasattr(self, "projection_") else Y

    def mean_similarity(self, Y: Any) -> np.ndarray:
        r"""Estimate :math:`\frac{1}{n} \sum_x f(x, y)`, which lies in [0, 1] but for the noise.

        Args:
            Y: Queries, ``(M, P)``.

        Returns:
            ``(M,)``. Spends no budget.

        Raises:
            NotFittedError: Nothing was released.
            ValueError: ``Y`` has another number of features, or is not finite.
        """
        places = self._places(Y)
        if self.method == "fgt":
            width = self._width(self.n_features_in_)
            found = fgt_similarity(self.sketch_, places, width=width, order=self.order)
        else:
            found = rff_similarity(self.sketch_, places, self.frequencies_, self.shifts_)
        return np.clip(found, 0.0, 1.0) if self.truncate else found

    def expected_error(self) -> float:
        """Return the standard deviation of the noise in a mean similarity, from public and released numbers alone.

        That of the random features, about ``num_features ** -0.5``, comes on top. For ``"fgt"`` it is that of a query
        in the middle of the box.

        Raises:
            NotFittedError: Nothing was released.
        """
        check_is_fitted(self, "sketch_")
        if self.method == "rff":
            return self.noise_scale_ / math.sqrt(len(self.sketch_))
        width, features = self._width(self.n_features_in_), self.n_features_in_
        middle, out = np.full((1, features), 0.5 * (width - 1)), 0.0
        cells = np.indices((width,) * features).reshape(features, -1).T
        for cell in np.flatnonzero(((cells - middle) ** 2).sum(1) <= self.order):
            terms = np.ones(1)
            for q in middle[0] - cells[cell]:
                values = [math.exp(-q * q), 2 * q * math.exp(-q * q)]
                for a in range(1, self.order - 1):
                    values.append(2 * q * values[-1] - 2 * a * values[-2])
                powers = [v / math.factorial(a) for a, v in enumerate(values[: self.order])]
                terms = np.outer(terms, powers).reshape(-1)
            out += float((terms**2).sum())
        return self.noise_scale_ * math.sqrt(out)

    def score_samples(self, Y: Any) -> np.ndarray:
        """Return the logarithm of the estimated density, as scikit-learn's ``KernelDensity`` does.

        A mean similarity below the floor (see ``floor``) counts as the floor, so that the answer is finite; the floor
        makes it the logarithm of something that integrates to more than one.

        Args:
            Y: Queries, ``(M, P)``.

        Returns:
            ``(M,)``.

        Raises:
            NotFittedError: Nothing was released.
            ValueError: The kernel has no finite integral, so that there is no density; take :meth:`mean_similarity`.
        """
        similarity = self.mean_similarity(Y)
        log = _log_normaliser(self.kernel, self.n_features_in_, float(self.bandwidth))
        if log is None:
            raise ValueError(
                f"`kernel` must have a finite integral for a density, {self.kernel!r} in {self.n_features_in_} "
                "dimension(s) has none: take mean_similarity."
            )
        return np.log(np.maximum(similarity, self.expected_error() if self.floor is None else self.floor)) - log

    def score(self, Y: Any, y: Any = None) -> float:
        """Return the sum of :meth:`score_samples`; ``y`` is ignored."""
        return float(self.score_samples(Y).sum())
