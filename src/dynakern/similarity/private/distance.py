r"""Sums of distances to private rows: noisy dyadic trees for l1, lp^p and l2, noisy moments for the squared distance.

Every release is a pure function of (data, noise); every query is post-processing of what was released.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar, Self

import numba
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from dynakern.checks import check_choice, check_positive
from dynakern.ops.dispatch import numba_threads
from dynakern.similarity.private.noise import (
    PrivacyAccountant,
    Released,
    add_noise,
    check_bounds,
    check_inside,
    multiply_rows,
)

__all__ = [
    "PrivateDistanceSum",
    "count_sum_distance",
    "moment_distance",
    "release_count_sums",
    "release_moments",
    "release_tree",
    "tree_distance",
]


# ---- trees -----------------------------------------------------------------------------------------------------------


def _depth(grid_size: int) -> int:
    check_positive("grid_size", grid_size, integer=True)
    if grid_size > 1 << 20:
        raise ValueError(f"`grid_size` must be at most 2^20, got {grid_size}.")
    return math.ceil(math.log2(grid_size + 1))


def _grid_ids(X: np.ndarray, low: np.ndarray, high: np.ndarray, grid_size: int) -> np.ndarray:
    """Round each coordinate to its grid: floor(v N / R + 1/2), ``(N, P)``; elementwise, so a row's ids are its own."""
    scaled = (np.clip(X, low, high) - low) * grid_size / (high - low)
    return np.clip(np.floor(scaled + 0.5), 0, grid_size).astype(np.int64)


def _heap(leaves: np.ndarray) -> np.ndarray:
    """Sum leaves ``(P, 2^L)`` upwards into the heap ``(P, 2^(L + 1))``: root 1, children 2 v and 2 v + 1."""
    size = leaves.shape[1]
    tree = np.zeros((len(leaves), 2 * size), dtype=np.int64)
    tree[:, size:] = leaves
    while size > 1:
        size //= 2
        tree[:, size : 2 * size] = tree[:, 2 * size : 4 * size : 2] + tree[:, 2 * size + 1 : 4 * size : 2]
    return tree


def _trees(X: np.ndarray, bounds: Any, grid_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact heaps of counts and of sums of grid ids."""
    X = np.asarray(X, dtype=np.float64)
    leaves = 1 << _depth(grid_size)
    ids = _grid_ids(X, *check_bounds(bounds, X.shape[1]), grid_size)
    counts = np.stack([np.bincount(column, minlength=leaves) for column in ids.T])
    return _heap(counts), _heap(counts * np.arange(leaves))


def release_tree(X: np.ndarray, noise: np.ndarray | float, *, bounds: Any, grid_size: int) -> np.ndarray:
    r"""Count the rows below every node of a dyadic tree a coordinate, and add noise.

    A row touches L + 1 nodes in each of the P trees, so the counts' l1 sensitivity is P (L + 1), where
    :math:`L = \lceil \log_2 (N_g + 1) \rceil` and :math:`N_g` is ``grid_size``.

    Args:
        X: Rows, ``(N, P)``; values outside the box count at its border.
        noise: ``(P, 2^(L + 1))`` in heap layout (root 1, children 2 v and 2 v + 1, leaf of grid id g at
            :math:`2^L + g`, slot 0 unused), or 0.
        bounds: The public box (low, high), numbers or ``(P,)`` each.
        grid_size: Number of grid cells a coordinate, at most 2^20.

    Returns:
        ``(P, 2^(L + 1))``, float64.

    Raises:
        ValueError: ``bounds`` or ``grid_size`` is out of range.

    Source: Backurs et al., 2024, arXiv:2403.08917 (the tree includes the root).
    """
    return _trees(X, bounds, grid_size)[0] + np.asarray(noise, dtype=np.float64)


def release_count_sums(X: np.ndarray, noise: np.ndarray | float, *, bounds: Any, grid_size: int) -> np.ndarray:
    r"""Count the rows and sum their grid ids below every node, and add noise.

    The l1 sensitivities are P (L + 1) for the counts and :math:`P (L + 1) N_g` for the sums.

    Args:
        X: Rows, ``(N, P)``.
        noise: ``(2, P, 2^(L + 1))``, of the counts and of the sums (in grid units), or 0.
        bounds: The public box (low, high).
        grid_size: Number of grid cells a coordinate.

    Returns:
        ``(2, P, 2^(L + 1))``, float64: counts, sums of grid ids.

    Raises:
        ValueError: ``bounds`` or ``grid_size`` is out of range.

    Source: Liu et al., 2024, arXiv:2409.01688.
    """
    return np.stack(_trees(X, bounds, grid_size)) + np.asarray(noise, dtype=np.float64)


@numba.njit(cache=True, nogil=True)
def _interval(tree, first, last, grid_size):  # pragma: no cover - compiled
    """Sum the fewest nodes that cover the grid ids first .. last."""
    size = tree.shape[0] // 2
    first, last, total = max(first, 0), min(last, grid_size), 0.0
    if first > last:
        return total
    left, right = first + size, last + size + 1
    while left < right:
        if left & 1:
            total += tree[left]
            left += 1
        if right & 1:
            right -= 1
            total += tree[right]
        left >>= 1
        right >>= 1
    return total


@numba.njit(cache=True, nogil=True, parallel=True)
def _bucket_values(tree, ids, lows, highs, weights, grid_size, out):  # pragma: no cover - compiled
    for i in numba.prange(ids.shape[0]):
        for k in range(ids.shape[1]):
            q, total = ids[i, k], 0.0
            for j in range(len(weights)):
                near = _interval(tree[k], q + lows[j], q + highs[j], grid_size)
                total += weights[j] * (near + _interval(tree[k], q - highs[j], q - lows[j], grid_size))
            out[i, k] = total


@numba.njit(cache=True, nogil=True, parallel=True)
def _side_values(tree, ids, sign, grid_size, out):  # pragma: no cover - compiled
    """The sum above each id plus ``sign`` times the sum below it."""
    for i in numba.prange(ids.shape[0]):
        for k in range(ids.shape[1]):
            above = _interval(tree[k], ids[i, k] + 1, grid_size, grid_size)
            out[i, k] = above + sign * _interval(tree[k], 0, ids[i, k] - 1, grid_size)


def _buckets(grid_size: int, alpha: float, p: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the nearest and farthest grid distance of each bucket and its weight, the upper end to the power p."""
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must be in (0, 1], got {alpha!r}.")
    check_positive("p", p)
    last = math.ceil(math.log(grid_size) / math.log1p(alpha)) if grid_size > 1 else 0
    ends = [(1 + alpha) ** j for j in range(last + 2)]
    highs = np.array([math.floor(grid_size / e + 1e-9) for e in ends[:-1]])
    lows = np.array([math.floor(grid_size / e + 1e-9) + 1 for e in ends[1:]])
    lows[-1] = 1
    kept = lows <= highs
    return lows[kept], highs[kept], (1 / np.array(ends[:-1])[kept]) ** p


def _bucket_sums(tree: np.ndarray, ids: np.ndarray, alpha: float, p: float, grid_size: int) -> np.ndarray:
    """Return each coordinate's sum in units of its range to the power p, ``(M, P)``."""
    out = np.empty(ids.shape)
    with numba_threads():
        _bucket_values(np.ascontiguousarray(tree), ids, *_buckets(grid_size, alpha, p), grid_size, out)
    return out


def _side_sums(tree: np.ndarray, ids: np.ndarray, sign: float, grid_size: int) -> np.ndarray:
    out = np.empty(ids.shape)
    with numba_threads():
        _side_values(np.ascontiguousarray(tree), ids, sign, grid_size, out)
    return out


def tree_distance(
    tree: np.ndarray, Y: np.ndarray, *, bounds: Any, grid_size: int, alpha: float = 0.1, p: float = 1.0
) -> np.ndarray:
    r"""Estimate :math:`\sum_x \sum_k |x_k - y_k|^p` from released counts.

    Distances fall into buckets :math:`(R / (1 + \alpha)^{j + 1}, R / (1 + \alpha)^j]`, each weighed with its upper end
    to the power p: without noise the answer lies between the sum S and :math:`(1 + \alpha)^p S`, up to the rounding to
    the grid. The paper closes the buckets at the other end, which would drop a point at the largest distance.

    Args:
        tree: From :func:`release_tree`, ``(P, 2^(L + 1))``.
        Y: Queries, ``(M, P)``.
        bounds: The public box.
        grid_size: As in the release.
        alpha: Width of the buckets, in (0, 1].
        p: Power of the distances, positive.

    Returns:
        ``(M,)``. O(P log^2(N_g) / alpha) a query.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> X = np.array([[0.0], [1.0]])
        >>> tree = release_tree(X, 0.0, bounds=(0.0, 1.0), grid_size=100)
        >>> tree_distance(tree, np.array([[0.0]]), bounds=(0.0, 1.0), grid_size=100)
        array([1.])

    Source: Backurs et al., 2024, arXiv:2403.08917.
    """
    Y = np.asarray(Y, dtype=np.float64)
    low, high = check_bounds(bounds, Y.shape[1])
    return _bucket_sums(tree, _grid_ids(Y, low, high, grid_size), alpha, p, grid_size) @ (high - low) ** p


def _grid_places(Y: np.ndarray, low: np.ndarray, high: np.ndarray, grid_size: int) -> np.ndarray:
    return (np.clip(Y, low, high) - low) * grid_size / (high - low)


def count_sum_distance(trees: np.ndarray, Y: np.ndarray, *, bounds: Any, grid_size: int) -> np.ndarray:
    r"""Estimate :math:`\sum_x |x - y|_1` from released counts c and sums s, with factor exactly one.

    :math:`S(y) = \sum_k s(> y_k) - y_k c(> y_k) + y_k c(< y_k) - s(< y_k)`.

    Args:
        trees: From :func:`release_count_sums`, ``(2, P, 2^(L + 1))``.
        Y: Queries, ``(M, P)``.
        bounds: The public box.
        grid_size: As in the release.

    Returns:
        ``(M,)``. O(P log N_g) a query.

    Raises:
        ValueError: An option is out of range.

    Source: Liu et al., 2024, arXiv:2409.01688.
    """
    Y = np.asarray(Y, dtype=np.float64)
    low, high = check_bounds(bounds, Y.shape[1])
    ids, places = _grid_ids(Y, low, high, grid_size), _grid_places(Y, low, high, grid_size)
    counts, sums = (_side_sums(tree, ids, -1.0, grid_size) for tree in trees)
    return (sums - places * counts) @ (high - low) / grid_size


# ---- moments ---------------------------------------------------------------------------------------------------------


def _moment_grid(bounds: Any, features: int, grid_size: int) -> tuple[np.ndarray, float, np.ndarray]:
    """Return the centre of the box, the one step of the grid around it, and how many steps each side has."""
    _depth(grid_size)
    low, high = check_bounds(bounds, features)
    step = float((high - low).max()) / grid_size
    return (low + high) / 2, step, np.floor((high - low) / (2 * step) + 0.5).astype(np.int64)


def release_moments(X: np.ndarray, noise: np.ndarray | float, *, bounds: Any, grid_size: int) -> np.ndarray:
    r"""Sum ones, coordinates and squared norms of the rows, in steps from the centre of the box, and add noise.

    With :math:`h_k` steps from the centre to the border the l1 sensitivities are 1, :math:`\sum_k h_k` and
    :math:`\sum_k h_k^2`.

    Args:
        X: Rows, ``(N, P)``.
        noise: ``(P + 2,)``: of the count, of the P sums, of the sum of squared norms; or 0.
        bounds: The public box (low, high).
        grid_size: Number of grid steps over the widest side.

    Returns:
        ``(P + 2,)``, float64.

    Raises:
        ValueError: ``bounds`` or ``grid_size`` is out of range.

    Source: Backurs et al., 2024, arXiv:2403.08917 (its corollary for squared distances; the grid is ours).
    """
    X = np.asarray(X, dtype=np.float64)
    centre, step, half = _moment_grid(bounds, X.shape[1], grid_size)
    inside = np.clip(X, *check_bounds(bounds, X.shape[1]))
    h = np.clip(np.floor((inside - centre) / step + 0.5), -half, half).astype(np.int64)
    return np.concatenate([[len(h)], h.sum(0), [(h * h).sum()]]) + np.asarray(noise, dtype=np.float64)


def moment_distance(moments: np.ndarray, Y: np.ndarray, *, bounds: Any, grid_size: int) -> np.ndarray:
    r"""Estimate :math:`\sum_x |x - y|_2^2 = \sum |x|^2 - 2 y \cdot \sum x + n |y|^2` from released moments.

    Args:
        moments: From :func:`release_moments`, ``(P + 2,)``.
        Y: Queries, ``(M, P)``.
        bounds: The public box.
        grid_size: As in the release.

    Returns:
        ``(M,)``. O(P) a query.

    Raises:
        ValueError: An option is out of range.

    Source: Backurs et al., 2024, arXiv:2403.08917.
    """
    Y = np.asarray(Y, dtype=np.float64)
    centre, step, _ = _moment_grid(bounds, Y.shape[1], grid_size)
    y = (Y - centre) / step
    return (moments[-1] - 2 * y @ moments[1:-1] + moments[0] * np.einsum("mp,mp->m", y, y)) * step**2


# ---- the estimator ---------------------------------------------------------------------------------------------------


class PrivateDistanceSum(Released, BaseEstimator):
    r"""Answer unlimited queries :math:`S(y) = \sum_x \mathrm{dist}(x, y)` from one private release of the rows x.

    ``"l1"`` and ``"lp"`` (:math:`\sum_k |x_k - y_k|^p`) use dyadic trees of noisy counts, ``"l1"`` by default also of
    noisy sums, whose factor is exactly one; ``"sqeuclidean"`` uses noisy moments; ``"l2"`` maps rows and queries by one
    public Gaussian matrix into l1.

    Args:
        metric: ``"l1"``, ``"l2"``, ``"sqeuclidean"`` or ``"lp"``.
        p: Power for ``"lp"``.
        method: For ``"l1"`` and ``"l2"``: ``"countsum"`` or ``"bucket"``; ``"lp"`` always uses buckets.
        alpha: Width of the buckets, in (0, 1].
        epsilon: Privacy budget of a fit.
        delta: 0 for pure privacy by Laplace noise; else (epsilon, delta)-privacy by Gaussian noise.
        bounds: The public box (low, high), numbers or one a feature. Required: bounds computed from the data would
            spend budget that nobody accounts for.
        clip: Move rows outside the box to its border instead of refusing them.
        grid_size: Public number of grid cells a coordinate; :math:`2^L - 1` makes full use of L levels.
        project: Number of coordinates of the embedding for ``"l2"``; its relative error is about
            :math:`0.76 / \sqrt{k}`.
        truncate: Cut answers below zero.
        neighbours: ``"add-remove"`` one row, or ``"replace"`` one, which doubles every sensitivity.
        noise_source: ``"auto"``, ``"opendp"`` or ``"exact"``; see :func:`add_noise`.
        accountant: The :class:`PrivacyAccountant` that each fit charges.
        random_state: Seed of the public matrix of ``"l2"``; the noise never comes from it.

    Attributes:
        released_: The noisy structure.
        embedding_: The public matrix ``(P, k)`` for ``"l2"``.
        noise_scale_: Standard deviation of the noise of each part of the structure, ``(parts,)``.
        noise_source_: Who drew the noise.
        n_features_in_: P.

    Example:
        >>> X = np.random.default_rng(0).uniform(size=(50_000, 2))
        >>> estimator = PrivateDistanceSum(epsilon=1.0, bounds=(0.0, 1.0), noise_source="exact").fit(X)
        >>> exact = np.abs(X - 0.25).sum()
        >>> bool(abs(estimator.sum([[0.25, 0.25]])[0] / exact - 1) < 0.5)
        True

    Source: Backurs et al., 2024, arXiv:2403.08917; Liu et al., 2024, arXiv:2409.01688.
    """

    _arrays: ClassVar[tuple[str, ...]] = ("released_", "noise_scale_", "embedding_")

    def __init__(
        self,
        metric: str = "l1",
        *,
        p: float = 2.0,
        method: str = "countsum",
        alpha: float = 0.1,
        epsilon: float = 1.0,
        delta: float = 0.0,
        bounds: Any = None,
        clip: bool = False,
        grid_size: int = 1023,
        project: int = 32,
        truncate: bool = False,
        neighbours: str = "add-remove",
        noise_source: str = "auto",
        accountant: PrivacyAccountant | None = None,
        random_state: Any = None,
    ) -> None:
        self.metric = metric
        self.p = p
        self.method = method
        self.alpha = alpha
        self.epsilon = epsilon
        self.delta = delta
        self.bounds = bounds
        self.clip = clip
        self.grid_size = grid_size
        self.project = project
        self.truncate = truncate
        self.neighbours = neighbours
        self.noise_source = noise_source
        self.accountant = accountant
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Release the structure of the rows ``(N, P)`` and charge the accountant; ``y`` is ignored.

        Raises:
            ValueError: A parameter is out of range, ``bounds`` is missing, a row is outside, or the budget is spent.
        """
        X = validate_data(self, X, dtype=np.float64)
        check_choice("metric", self.metric, ("l1", "l2", "sqeuclidean", "lp"))
        check_choice("method", self.method, ("countsum", "bucket"))
        factor = self._check_privacy()
        _buckets(self.grid_size, self.alpha, self.p)
        levels = _depth(self.grid_size) + 1
        low, high = check_bounds(self.bounds, X.shape[1])
        X = check_inside(X, low, high, self.clip)
        if hasattr(self, "embedding_"):
            del self.embedding_
        if self.metric == "l2":
            check_positive("project", self.project, integer=True)
            matrix = check_random_state(self.random_state).standard_normal((X.shape[1], self.project))
            self.embedding_ = matrix
            X = multiply_rows(X - (low + high) / 2, matrix)
        box, columns = self._box(low, high), X.shape[1]
        if self.metric == "sqeuclidean":
            half = _moment_grid(box, columns, self.grid_size)[2]
            clean = release_moments(X, 0.0, bounds=box, grid_size=self.grid_size)
            square = int((half**2).sum())
            quarter = Fraction(1, 4)
            parts = [
                (clean[:1], quarter, 1, 1),
                (clean[1:-1], 2 * quarter, int(half.sum()), square),
                (clean[-1:], quarter, square, square**2),
            ]
        else:
            trees, touched, top = _trees(X, box, self.grid_size), levels * columns, self.grid_size
            if self._bucketed():
                parts = [(trees[0][:, 1:], Fraction(1), touched, touched)]
            else:
                half_budget = Fraction(1, 2)
                parts = [
                    (trees[0][:, 1:], half_budget, touched, touched),
                    (trees[1][:, 1:], half_budget, touched * top, touched * top**2),
                ]
        self._charge()
        noisy, deviations, sources = zip(
            *(
                add_noise(
                    np.asarray(values, dtype=np.int64),
                    epsilon=self.epsilon,
                    delta=self.delta,
                    share=share,
                    l1=factor * l1,
                    l2_squared=factor**2 * l2_squared,
                    source=self.noise_source,
                )
                for values, share, l1, l2_squared in parts
            ),
            strict=True,
        )
        if self.metric == "sqeuclidean":
            self.released_ = np.concatenate(noisy)
        else:
            self.released_ = np.stack([np.pad(tree, ((0, 0), (1, 0))) for tree in noisy])
        self.noise_scale_, self.noise_source_ = np.array(deviations), sources[0]
        self._tables, self._asked = None, 0
        return self

    def _bucketed(self) -> bool:
        return self.metric == "lp" or self.method == "bucket"

    def _box(self, low: np.ndarray, high: np.ndarray) -> tuple[Any, Any]:
        if self.metric != "l2":
            return low, high
        # A Gaussian coordinate of a row has at most the deviation |x|; three of the longest row's are kept.
        reach = 1.5 * math.sqrt(float(((high - low) ** 2).sum()))
        return -reach, reach

    def _queries(self, Y: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        check_is_fitted(self, "released_")
        Y = validate_data(self, Y, dtype=np.float64, reset=False)
        low, high = check_bounds(self.bounds, Y.shape[1])
        if self.metric == "l2":
            Y = (np.clip(Y, low, high) - (low + high) / 2) @ self.embedding_
        return Y, *check_bounds(self._box(low, high), Y.shape[1])

    def _unit(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return what one unit of each coordinate's tree is worth."""
        power = self.p if self.metric == "lp" else 1.0
        embedding = math.sqrt(math.pi / 2) / len(low) if self.metric == "l2" else 1.0
        return embedding * (high - low) ** power

    def _lookups(self, ids: np.ndarray) -> list[np.ndarray]:
        """Return what the trees say for grid ids ``(M, P)``: a walk each, or one look into a table of all the ids.

        The table is made once as many queries were asked as it has rows.
        """
        if self._tables is None:
            self._asked += len(ids)
            if self._asked <= self.grid_size:
                return self._walks(ids)
            every = np.repeat(np.arange(self.grid_size + 1)[:, None], ids.shape[1], axis=1)
            self._tables = self._walks(every)
        columns = np.arange(ids.shape[1])
        return [table[ids, columns] for table in self._tables]

    def _walks(self, ids: np.ndarray) -> list[np.ndarray]:
        if self._bucketed():
            power = self.p if self.metric == "lp" else 1.0
            return [_bucket_sums(self.released_[0], ids, self.alpha, power, self.grid_size)]
        return [_side_sums(tree, ids, -1.0, self.grid_size) for tree in self.released_]

    def sum(self, Y: Any) -> np.ndarray:
        """Estimate the sum of distances from each query to all private rows.

        Args:
            Y: Queries, ``(M, P)``; coordinates outside the box count at its border (not for ``"sqeuclidean"``).

        Returns:
            ``(M,)``. Spends no budget.

        Raises:
            NotFittedError: Nothing was released.
            ValueError: ``Y`` has another number of features, or is not finite.
        """
        Y, low, high = self._queries(Y)
        if self.metric == "sqeuclidean":
            found = moment_distance(self.released_, Y, bounds=(low, high), grid_size=self.grid_size)
        else:
            values = self._lookups(_grid_ids(Y, low, high, self.grid_size))
            if self._bucketed():
                found = values[0] @ self._unit(low, high)
            else:
                places = _grid_places(Y, low, high, self.grid_size)
                found = (values[1] - places * values[0]) @ self._unit(low, high) / self.grid_size
        return np.maximum(found, 0.0) if self.truncate else found

    def expected_error(self, Y: Any = None) -> float:
        """Return the standard deviation of the noise in an answer, from public numbers alone.

        The widths of buckets and of the grid, and the embedding of ``"l2"``, come on top.

        Args:
            Y: Queries, ``(M, P)``; their root mean square is returned. 256 points spread over the box by default.

        Raises:
            NotFittedError: Nothing was released.
        """
        check_is_fitted(self, "released_")
        if Y is None:
            low, high = check_bounds(self.bounds, self.n_features_in_)
            Y = np.random.default_rng(0).uniform(low, high, (256, self.n_features_in_))
        Y, low, high = self._queries(Y)
        variances = self.noise_scale_**2
        if self.metric == "sqeuclidean":
            centre, step, _ = _moment_grid((low, high), Y.shape[1], self.grid_size)
            square = (((Y - centre) / step) ** 2).sum(1)
            found = step**4 * (variances[2] + 4 * square * variances[1] + square**2 * variances[0])
            return float(np.sqrt(found.mean()))
        ids, unit, ones = (
            _grid_ids(Y, low, high, self.grid_size),
            self._unit(low, high),
            np.ones_like(self.released_[0]),
        )
        if self._bucketed():
            power = self.p if self.metric == "lp" else 1.0
            found = variances[0] * _bucket_sums(ones, ids, self.alpha, 2 * power, self.grid_size) @ unit**2
        else:
            nodes = _side_sums(ones, ids, 1.0, self.grid_size)  # how many noisy numbers an answer adds
            places = _grid_places(Y, low, high, self.grid_size)
            found = nodes * (variances[1] + places**2 * variances[0]) @ (unit / self.grid_size) ** 2
        return float(np.sqrt(found.mean()))

    def load_state_dict(self, state: Any) -> Self:
        """Take over a released structure and its settings; see :meth:`state_dict`.

        Raises:
            ValueError: ``state`` belongs to another class or misses an array.
        """
        super().load_state_dict(state)
        self.noise_scale_ = np.atleast_1d(self.noise_scale_)
        self._tables, self._asked = None, 0
        return self
