r"""Sketches of kernel sums: random features, the fast Gauss transform, projections, and mixtures of exponentials.

Every release is a pure function of (data, noise); every answer is post-processing of what was released.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from sklearn.utils import check_random_state

from dynakern.checks import check_choice, check_positive
from dynakern.ops.dispatch import numba_threads
from dynakern.similarity.private.noise import multiply_rows

__all__ = [
    "KERNELS",
    "OF_L1",
    "check_transform",
    "draw_frequencies",
    "feature_sums",
    "fgt_similarity",
    "inverse_mixture",
    "johnson_lindenstrauss",
    "release_fgt",
    "release_rff",
    "rff_similarity",
    "transform_sums",
]

KERNELS = ("gaussian", "exponential", "laplacian", "cauchy", "inverse", "inverse_l1")
OF_L1 = ("laplacian", "inverse_l1")

# ---- random features -------------------------------------------------------------------------------------------------

# Taylor coefficients of sin(pi t), enough for |t| <= 1/2 in float64.
_SINE = np.array([(-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(11)])
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10 = (float(c) for c in _SINE)


@numba.njit(cache=True, nogil=True, inline="always")
def _cosine(turns):  # pragma: no cover - compiled
    """cos(2 pi t) = 1 - 2 sin^2(pi t), for t in turns, by IEEE operations alone."""
    t = turns - np.rint(turns)
    u = t * t
    s = _C7 + u * (_C8 + u * (_C9 + u * _C10))
    s = _C3 + u * (_C4 + u * (_C5 + u * (_C6 + u * s)))
    s = t * (_C0 + u * (_C1 + u * (_C2 + u * s)))
    return 1.0 - 2.0 * s * s


@numba.njit(cache=True, nogil=True)
def _add_features(turns, shifts, scale, total):  # pragma: no cover - compiled
    """Add the features of each row, rounded to integers one by one; no fastmath, so a row's integers are its own."""
    limit = np.rint(scale) + 1.0
    for i in range(turns.shape[0]):
        for j in range(turns.shape[1]):
            value = np.rint(scale * _cosine(turns[i, j] + shifts[j]))
            if -limit <= value <= limit:  # so that no cosine can pass its bound
                total[j] += np.int64(value)


@numba.njit(cache=True, nogil=True, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def _dot_features(turns, shifts, weights, out):  # pragma: no cover - compiled
    for i in numba.prange(turns.shape[0]):
        total = 0.0
        for j in range(turns.shape[1]):
            total += weights[j] * _cosine(turns[i, j] + shifts[j])
        out[i] = total


def feature_sums(X: np.ndarray, frequencies: np.ndarray, shifts: np.ndarray, bits: int) -> np.ndarray:
    """Sum the features of the rows in units of 2^-bits, ``(m,)``, int64."""
    total, turns = np.zeros(frequencies.shape[1], dtype=np.int64), frequencies / (2 * math.pi)
    block = max(1, (1 << 22) // len(total))
    for start in range(0, len(X), block):
        phases = multiply_rows(X[start : start + block], turns)
        _add_features(phases, shifts.reshape(-1) / (2 * math.pi), math.sqrt(2.0) * 2.0**bits, total)
    return total


def release_rff(
    X: np.ndarray, frequencies: np.ndarray, shifts: np.ndarray, noise: np.ndarray | float, *, bits: int = 40
) -> np.ndarray:
    r"""Average the random features of the rows and add noise.

    The l1 sensitivity of the average is :math:`m \sqrt 2 / n`, its l2 sensitivity :math:`\sqrt{2 m} / n`, for a row
    added or removed and n known.

    Args:
        X: Rows, ``(N, P)``.
        frequencies: :math:`\omega`, ``(P, m)``; see :func:`draw_frequencies`.
        shifts: :math:`b`, m numbers uniform in [0, 2 pi).
        noise: ``(m,)``, or 0.
        bits: Each row's features are rounded to multiples of :math:`2^{-bits}`.

    Returns:
        ``(m,)``.

    Source: Wagner, Naamad & Mishra, 2023, ICML (LSQ with random Fourier features).
    """
    X = np.asarray(X, dtype=np.float64)
    sums = feature_sums(X, np.asarray(frequencies), np.asarray(shifts), bits)
    return sums / 2.0**bits / len(X) + np.asarray(noise, dtype=np.float64)


def rff_similarity(sketch: np.ndarray, Y: np.ndarray, frequencies: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    r"""Estimate the mean similarity from released features, :math:`\frac{1}{m} \sqrt 2 \cos(y \omega + b) \cdot F`.

    Args:
        sketch: F, from :func:`release_rff`, ``(m,)``.
        Y: Queries, ``(M, P)``.
        frequencies: As in the release, ``(P, m)``.
        shifts: As in the release.

    Returns:
        ``(M,)``. A matrix product and m cosines a query.

    Source: Wagner, Naamad & Mishra, 2023, ICML.
    """
    Y, turns = np.asarray(Y, dtype=np.float64), np.asarray(frequencies) / (2 * math.pi)
    weights, out = np.asarray(sketch) * (math.sqrt(2.0) / len(sketch)), np.empty(len(Y))
    shift, block = np.asarray(shifts).reshape(-1) / (2 * math.pi), max(16, (1 << 18) // len(sketch))
    with numba_threads():
        for start in range(0, len(Y), block):
            rows = slice(start, start + block)
            _dot_features(Y[rows] @ turns, shift, weights, out[rows])
    return out


def draw_frequencies(
    kernel: str, features: int, num_features: int, *, bandwidth: float = 1.0, random_state: Any = None
) -> np.ndarray:
    r"""Draw frequencies from a kernel's spectral law; they are public and use no data.

    With h the bandwidth, z the difference of two points and :math:`g \sim N(0, I)`:

    - ``"gaussian"`` :math:`e^{-|z|_2^2 / 2 h^2}`: :math:`\omega = g / h`, as in scikit-learn's ``KernelDensity``;
    - ``"exponential"`` :math:`e^{-|z|_2 / h}`: :math:`g / (h |u|)` with one :math:`u \sim N(0, 1)` a frequency;
    - ``"laplacian"`` :math:`e^{-|z|_1 / h}`: Cauchy of scale 1 / h in each coordinate;
    - ``"cauchy"`` :math:`1 / (1 + |z|_2^2 / h^2)`, ``"inverse"`` :math:`1 / (1 + |z|_2 / h)` and ``"inverse_l1"``
      :math:`1 / (1 + |z|_1 / h)`: since :math:`1 / (1 + s) = \int_0^\infty e^{-t} e^{-t s} dt`, the frequencies of the
      Gaussian, the exponential and the Laplacian scaled by an exponential variable t (its root for the Gaussian,
      whose :math:`e^{-t |z|^2 / h^2}` has frequencies :math:`\sqrt{2 t} g / h`), so that one release serves the whole
      mixture. The variables t are stratified.

    Args:
        kernel: One of these names.
        features: P.
        num_features: m.
        bandwidth: h, a public number.
        random_state: Seed of the public randomness.

    Returns:
        ``(P, m)``.

    Raises:
        ValueError: ``kernel`` is unknown or a number is not positive.

    Source: Backurs et al., 2024, arXiv:2403.08917, who compose one release a term of a finite sum; the single release
    of the continuous mixture is ours.
    """
    check_choice("kernel", kernel, KERNELS)
    check_positive("bandwidth", float(bandwidth))
    rng, shape = check_random_state(random_state), (features, num_features)
    if kernel in OF_L1:
        omega = rng.standard_cauchy(shape)
    else:
        omega = rng.standard_normal(shape)
    if kernel in ("exponential", "inverse"):
        omega /= np.abs(rng.standard_normal(num_features))
    if kernel in ("cauchy", "inverse", "inverse_l1"):
        t = -np.log1p(-(rng.permutation(num_features) + rng.uniform(size=num_features)) / num_features)
        omega *= np.sqrt(2 * t) if kernel == "cauchy" else t
    return omega / bandwidth


def inverse_mixture(*, step: float = 0.5, low: float = -12.0, high: float = 2.2) -> tuple[np.ndarray, np.ndarray]:
    r"""Return rates t and weights w with :math:`1 / (1 + s) \approx \sum_j w_j e^{-t_j s}` for every :math:`s \ge 0`.

    The trapezoidal rule for :math:`\int e^{-t} e^{-t s} dt` in the logarithm of t. With the default step there are 29
    terms and the error is below 4e-5; ``step=0.4, low=-14, high=2.5`` gives 42 terms and 2e-6. It turns any sum of
    exponential or Gaussian kernels, private or not, into one of the kernels ``1 / (1 + s)``.

    Args:
        step: Step in log t, positive.
        low: Smallest log t.
        high: Bound on log t, above ``low``.

    Returns:
        Rates and weights, ``(J,)`` each.

    Raises:
        ValueError: ``step`` is not positive or ``high`` not above ``low``.

    Example:
        >>> t, w = inverse_mixture()
        >>> bool(abs(float(w @ np.exp(-3.0 * t)) - 0.25) < 4e-5)
        True

    Source: Backurs et al., 2024, arXiv:2403.08917 (the statement; the rule is ours).
    """
    check_positive("step", step)
    if not low < high:
        raise ValueError(f"`high` must be above `low`, got {low!r} and {high!r}.")
    logs = np.arange(low, high, step)
    t = np.exp(logs)
    return t, step * t * np.exp(-t)


def johnson_lindenstrauss(features: int, project: int, random_state: Any = None) -> np.ndarray:
    r"""Draw the public matrix that maps rows and queries to ``project`` coordinates, entries :math:`N(0, 1 / k)`.

    Args:
        features: P.
        project: k, independent of the number of rows: only the kernel's value must be kept, not the distance.
        random_state: Seed of the public randomness.

    Returns:
        ``(P, k)``.

    Raises:
        ValueError: A number is not positive.

    Source: Backurs et al., 2024, arXiv:2403.08917.
    """
    check_positive("project", project, integer=True)
    return check_random_state(random_state).standard_normal((features, project)) / math.sqrt(project)


# ---- fast Gauss transform --------------------------------------------------------------------------------------------


def check_transform(features: int, width: int, order: int) -> None:
    """Raise ``ValueError`` unless a transform of ``order ** features * width ** features`` numbers is feasible."""
    check_positive("width", width, integer=True)
    check_positive("order", order, integer=True)
    size = (float(width) * order) ** features
    if features > 4 or size > 1 << 24:
        raise ValueError(
            f"The fast Gauss transform must have at most 4 features and 2^24 numbers, got {features} and {size:.3g}: "
            "take method='rff', a wider bandwidth or a lower order."
        )


def _moment_rows(r: np.ndarray, order: int) -> np.ndarray:
    """Return the products of powers of the residuals, ``(N, order ** P)``, indices in C order."""
    terms = np.ones((len(r), 1))
    for column in r.T:
        powers = np.ones((len(r), order))
        for a in range(1, order):  # one product at a time: elementwise IEEE operations
            powers[:, a] = powers[:, a - 1] * column
        terms = (terms[:, :, None] * powers[:, None, :]).reshape(len(r), -1)
    return terms


def transform_sums(X: np.ndarray, width: int, order: int, bits: int) -> np.ndarray:
    """Sum the moments of the rows in units of 2^-bits, cut towards zero, ``(width ** P, order ** P)``, int64."""
    cells = np.clip(np.rint(X), 0, width - 1).astype(np.int64)
    index = cells @ width ** np.arange(X.shape[1])[::-1]
    total = np.zeros((width ** X.shape[1], order ** X.shape[1]), dtype=np.int64)
    block = max(1, (1 << 20) // total.shape[1])
    for start in range(0, len(X), block):
        rows = slice(start, start + block)
        terms = np.trunc(_moment_rows(np.clip(X[rows] - cells[rows], -0.5, 0.5), order) * 2.0**bits)
        np.add.at(total, index[rows], terms.astype(np.int64))
    return total


def release_fgt(X: np.ndarray, noise: np.ndarray | float, *, width: int, order: int, bits: int = 45) -> np.ndarray:
    r"""Average the moments of the rows around the cells of a lattice and add noise.

    Cell :math:`c = \mathrm{round}(x)`, residual r = x - c, moments :math:`\prod_i r_i^{a_i}` for
    :math:`a \in \{0 .. \rho - 1\}^P`. The l1 sensitivity is :math:`(2 (1 - 2^{-\rho}))^P / n`.

    Args:
        X: Rows in :math:`[0, W - 1]^P`, ``(N, P)``; the kernel is :math:`e^{-|x - y|^2}`.
        noise: ``(W ** P, rho ** P)``, or 0; cell index and multi-index in C order.
        width: W.
        order: :math:`\rho`.
        bits: Each row's moments are cut to multiples of :math:`2^{-bits}`.

    Returns:
        ``(W ** P, rho ** P)``.

    Raises:
        ValueError: A row is outside the lattice, or the transform is too large.

    Source: Wagner, Naamad & Mishra, 2023, ICML (LSQ with the fast Gauss transform).
    """
    X = np.asarray(X, dtype=np.float64)
    check_transform(X.shape[1], width, order)
    if X.min() < -0.5 or X.max() > width - 0.5:
        raise ValueError(f"`X` must lie in [0, {width - 1}], got values from {X.min():.3g} to {X.max():.3g}.")
    return transform_sums(X, width, order, bits) / 2.0**bits / len(X) + np.asarray(noise, dtype=np.float64)


@numba.njit(cache=True, nogil=True, parallel=True)
def _hermite_sums(sketch, y, width, order, out):  # pragma: no cover - compiled
    """Add up the cells within the square root of ``order`` of each query; sketch squared gives the noise's share."""
    features, reach = y.shape[1], math.floor(math.sqrt(order)) + 1
    side = 2 * reach + 1
    terms = order**features
    for i in numba.prange(y.shape[0]):
        hermite = np.empty((features, side, order))
        square = np.empty((features, side))
        start = np.empty(features, np.int64)
        for k in range(features):
            start[k] = np.int64(np.rint(y[i, k])) - reach
            for s in range(side):
                q = y[i, k] - (start[k] + s)
                square[k, s] = q * q
                value, before, factorial = math.exp(-q * q), 0.0, 1.0
                for a in range(order):
                    hermite[k, s, a] = value / factorial
                    value, before = 2.0 * q * value - 2.0 * a * before, value
                    factorial *= a + 1.0
        total = 0.0
        for code in range(side**features):
            rest, distance, cell, stride, inside = code, 0.0, 0, 1, True
            offsets = np.empty(features, np.int64)
            for back in range(features):
                k = features - 1 - back
                offsets[k] = rest % side
                rest //= side
                place = start[k] + offsets[k]
                inside = inside and 0 <= place < width
                distance += square[k, offsets[k]]
                cell += place * stride
                stride *= width
            if inside and distance <= order:
                for term in range(terms):
                    rest, value = term, sketch[cell, term]
                    for back in range(features):
                        k = features - 1 - back
                        value *= hermite[k, offsets[k], rest % order]
                        rest //= order
                    total += value
        out[i] = total


def fgt_similarity(sketch: np.ndarray, Y: np.ndarray, *, width: int, order: int) -> np.ndarray:
    r"""Estimate the mean of :math:`e^{-|x - y|^2}` from a released transform.

    Sums over cells c with :math:`|y - c|^2 \le \rho` of
    :math:`\sum_a F_{c,a} \prod_i H_{a_i}(q_i) e^{-q_i^2} / a_i!`, q = y - c, with the physicists' Hermite polynomials.

    Args:
        sketch: F, from :func:`release_fgt`.
        Y: Queries, ``(M, P)``.
        width: As in the release.
        order: As in the release.

    Returns:
        ``(M,)``.

    Raises:
        ValueError: The transform is too large.

    Source: Wagner, Naamad & Mishra, 2023, ICML.
    """
    Y = np.clip(np.ascontiguousarray(Y, dtype=np.float64), -1e6, 1e6)  # no cell is that far
    check_transform(Y.shape[1], width, order)
    out = np.empty(len(Y))
    with numba_threads():
        _hermite_sums(np.ascontiguousarray(sketch, dtype=np.float64), Y, width, order, out)
    return out
