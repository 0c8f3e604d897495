"""Private classification by the nearest noisy class mean."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any, ClassVar, Self

import numba
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from dynakern.similarity.private.noise import PrivacyAccountant, Released, add_noise

__all__ = ["PrivateSimilarityClassifier", "release_centroids"]

_BITS = 12  # a row of length one has 4096 steps of the grid: fine beside any useful noise


@numba.njit(cache=True, nogil=True)
def _add_rows(X, labels, unit, sums, counts):  # pragma: no cover - compiled
    """Scale each row to at most length one, in steps of 1 / unit towards zero, and add it to its class.

    Feature by feature and without fastmath, so that a row's integers do not depend on other rows.
    """
    for i in range(len(X)):
        largest, square, label = 0.0, 0.0, labels[i]
        for value in X[i]:
            largest = max(largest, abs(value))
        counts[label] += 1
        if largest < 1e-290:  # a row of zeros, to all intents
            continue
        scale = 1.0 / largest
        for value in X[i]:
            square += (value * scale) * (value * scale)
        length = unit / math.sqrt(square)
        for k in range(X.shape[1]):
            sums[label, k] += np.int64(np.trunc((X[i, k] * scale) * length))


def _class_sums(X: np.ndarray, labels: np.ndarray, classes: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact sums in steps of 2^-bits, ``(C, P)``, and the counts, ``(C,)``."""
    sums, counts = np.zeros((classes, X.shape[1]), dtype=np.int64), np.zeros(classes, dtype=np.int64)
    unit = 2.0**bits * (1 - 1e-9)  # the margin pays for rounding
    _add_rows(np.ascontiguousarray(X), np.ascontiguousarray(labels, dtype=np.int64), unit, sums, counts)
    return sums, counts


def release_centroids(
    X: np.ndarray,
    labels: np.ndarray,
    sum_noise: np.ndarray | float,
    count_noise: np.ndarray | float,
    *,
    num_classes: int,
    bits: int = 30,
) -> np.ndarray:
    r"""Average the rows of each class, scaled to length one, with noisy sums and noisy counts.

    A row lies in one class, so the l2 sensitivity of all sums together is 1, that of the counts 1.

    Args:
        X: Rows, ``(N, P)``; a row of zeros stays zero.
        labels: Class of each row, 0 .. num_classes - 1, ``(N,)``.
        sum_noise: ``(C, P)``, or 0.
        count_noise: ``(C,)``, or 0.
        num_classes: C.
        bits: Scaled rows are cut to multiples of :math:`2^{-bits}`.

    Returns:
        Means :math:`\mu_c = S_c / \max(N_c, 1)`, ``(C, P)``.

    Source: Backurs et al., 2024, arXiv:2403.08917.
    """
    sums, counts = _class_sums(np.asarray(X, dtype=np.float64), np.asarray(labels), num_classes, bits)
    noisy = sums / 2.0**bits + np.asarray(sum_noise, dtype=np.float64)
    return noisy / np.maximum(counts + np.asarray(count_noise, dtype=np.float64), 1.0)[:, None]


class PrivateSimilarityClassifier(Released, ClassifierMixin, BaseEstimator):
    r"""Predict the class whose noisy mean is nearest, :math:`\arg\min_c |y - \mu_c|^2`, rows scaled to length one.

    Classes have disjoint rows, so each class's mean has the whole budget: 9/10 of it for the sum, 1/10 for the count.

    Args:
        epsilon: Privacy budget of a fit.
        delta: Gaussian noise for (epsilon, delta)-privacy, accounted by zCDP; 0 for pure privacy by Laplace noise,
            whose error grows with the square root of the number of features more.
        classes: The public list of labels. By default the labels found in ``y``, whose presence then counts as public.
        neighbours: ``"add-remove"`` one row, or ``"replace"`` one.
        noise_source: ``"auto"``, ``"opendp"`` or ``"exact"``; see :func:`add_noise`.
        accountant: The :class:`PrivacyAccountant` that each fit charges.

    Attributes:
        centroids_: Noisy class means, ``(C, P)``.
        classes_: The labels, ``(C,)``.
        noise_scale_: Standard deviation of the noise of a sum's entry and of a count, ``(2,)``.
        noise_source_: Who drew the noise.
        n_features_in_: P.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> X, y = load_digits(return_X_y=True)
        >>> model = PrivateSimilarityClassifier(epsilon=2.0, noise_source="exact").fit(X, y)
        >>> model.score(X, y) > 0.7, model.epsilon_spent
        (True, 2.0)

    Source: Backurs et al., 2024, arXiv:2403.08917; the budget's split is ours.
    """

    _arrays: ClassVar[tuple[str, ...]] = ("centroids_", "classes_", "noise_scale_")

    def __init__(
        self,
        *,
        epsilon: float = 1.0,
        delta: float = 1e-5,
        classes: Any = None,
        neighbours: str = "add-remove",
        noise_source: str = "auto",
        accountant: PrivacyAccountant | None = None,
    ) -> None:
        self.epsilon = epsilon
        self.delta = delta
        self.classes = classes
        self.neighbours = neighbours
        self.noise_source = noise_source
        self.accountant = accountant

    def fit(self, X: Any, y: Any) -> Self:
        """Release the class means of rows ``(N, P)`` with labels ``(N,)`` and charge the accountant.

        Raises:
            ValueError: A parameter is out of range, a label is none of ``classes``, or the budget is spent.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        if y.dtype.kind not in "biu":  # whole numbers are labels
            check_classification_targets(y)
        factor = self._check_privacy()
        if 0 < 1 / len(X) <= self.delta:
            warnings.warn(f"delta = {self.delta:g} is not below 1 / n: whole rows may be published.", stacklevel=2)
        self.classes_ = np.unique(y if self.classes is None else np.asarray(self.classes))
        unknown = np.setdiff1d(y, self.classes_)
        if unknown.size:
            raise ValueError(f"`y` must hold labels of `classes` only, got {unknown[:5].tolist()}.")
        labels = np.searchsorted(self.classes_, y)
        sums, counts = _class_sums(X, labels, len(self.classes_), _BITS)
        self._charge()
        budget = {"epsilon": self.epsilon, "delta": self.delta, "source": self.noise_source}
        ninth, unit = Fraction(9, 10), 1 << _BITS
        l1 = math.isqrt(X.shape[1] * unit * unit) + 1  # of a row of length one
        noisy, sum_scale, self.noise_source_ = add_noise(
            sums, share=ninth, l1=factor * l1, l2_squared=factor**2 * unit**2, **budget
        )
        number, count_scale, _ = add_noise(counts, share=1 - ninth, l1=factor, l2_squared=factor**2, **budget)
        self.centroids_ = noisy / unit / np.maximum(number, 1.0)[:, None]
        self.noise_scale_ = np.array([sum_scale / unit, count_scale])
        return self

    def _distances(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "centroids_")
        X = validate_data(self, X, dtype=np.float64, reset=False)
        length = np.linalg.norm(X, axis=1, keepdims=True)
        rows, means = X / np.where(length > 0, length, 1.0), self.centroids_
        return (rows**2).sum(1)[:, None] - 2 * rows @ means.T + (means**2).sum(1)

    def decision_function(self, X: Any) -> np.ndarray:
        r"""Return :math:`-|y - \mu_c|^2` of rows scaled to length one.

        Args:
            X: ``(M, P)``.

        Returns:
            ``(M, C)``; with two classes the second's score minus the first's, ``(M,)``.

        Raises:
            NotFittedError: Nothing was released.
        """
        scores = -self._distances(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """Return the class of the nearest mean for rows ``(M, P)``, ``(M,)``.

        Raises:
            NotFittedError: Nothing was released.
        """
        nearest = self._distances(X).argmin(1)
        return self.classes_[nearest]

    def expected_error(self) -> float:
        """Return the standard deviation of the noise in a class's sum, in lengths of a row (over all P entries)."""
        check_is_fitted(self, "centroids_")
        return float(self.noise_scale_[0] * math.sqrt(self.n_features_in_))

    def load_state_dict(self, state: Any) -> Self:
        """Take over released class means and their settings; see :meth:`state_dict`.

        Raises:
            ValueError: ``state`` belongs to another class or misses an array.
        """
        super().load_state_dict(state)
        self.classes_ = np.atleast_1d(self.classes_)
        return self
