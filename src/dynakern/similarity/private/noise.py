r"""Exact integer noise from the operating system, the privacy budget, and what every private release shares.

A statistic is an integer vector whose change between neighbouring data sets is bounded in integers, so that no rounding
of floating-point numbers can leak (Mironov, 2012). To it is added, independently in each entry, either discrete Laplace
noise, :math:`P(k) \propto e^{-|k| / b}` with :math:`b \ge \Delta_1 / \varepsilon`, or discrete Gaussian noise,
:math:`P(k) \propto e^{-k^2 / 2 \sigma^2}` with :math:`\sigma^2 \ge \Delta_2^2 / 2 \rho`. OpenDP draws it where it is
installed; otherwise the rejection samplers of Canonne, Kamath & Steinke, 2020, arXiv:2004.00010 (algorithms 1 to 3) do,
here compiled, with ``os.urandom`` as their only randomness and integers as their only numbers.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, ClassVar, NoReturn, Self

import numba
import numpy as np
from scipy.stats import beta
from sklearn.utils.validation import check_is_fitted

from dynakern.checks import check_choice, check_positive, require

__all__ = [
    "PrivacyAccountant",
    "add_noise",
    "audit_epsilon",
    "discrete_gaussian",
    "discrete_laplace",
    "zcdp_budget",
]


def _exact(value: float) -> Fraction:
    """Return the decimal number that was written: 0.1 is a tenth, so that ten of them are one."""
    return Fraction(repr(float(value)))


# ---- the sampler -----------------------------------------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def _uniform_below(words, at, bound):  # pragma: no cover - compiled
    """Draw from 0 .. bound - 1: masked words, drawn again when too large. Returns its place too, -1 at the end."""
    mask = np.uint64(bound - 1)
    for shift in (1, 2, 4, 8, 16, 32):
        mask |= mask >> np.uint64(shift)
    while at < len(words):
        value = np.int64(words[at] & mask)
        at += 1
        if value < bound:
            return value, at
    return np.int64(0), np.int64(-1)


@numba.njit(cache=True, nogil=True)
def _coin(words, at, numerator, denominator):  # pragma: no cover - compiled
    """Draw Bernoulli(exp(-numerator / denominator)), algorithm 1; arguments of at most 2^52."""
    for _ in range(numerator // denominator):
        heads, at = _coin_below_one(words, at, 1, 1)
        if not heads:
            return False, at
    return _coin_below_one(words, at, numerator % denominator, denominator)


@numba.njit(cache=True, nogil=True)
def _coin_below_one(words, at, numerator, denominator):  # pragma: no cover - compiled
    k = np.int64(1)
    while at >= 0:
        value, at = _uniform_below(words, at, denominator * k)
        if at >= 0 and value >= numerator:
            return k % 2 == 1, at
        k += 1
    return False, np.int64(-1)


@numba.njit(cache=True, nogil=True)
def _one_laplace(words, at, top, bottom):  # pragma: no cover - compiled
    """Draw discrete Laplace noise of scale top / bottom, algorithm 2."""
    while at >= 0:
        u, at = _uniform_below(words, at, top)
        if at < 0:
            break
        kept, at = _coin_below_one(words, at, u, top)
        if not kept:
            continue
        v, more = np.int64(0), True
        while more:  # a geometric variable: how often Bernoulli(1/e) comes up in a row
            more, at = _coin_below_one(words, at, 1, 1)
            v += more
        if at < 0:
            break
        magnitude = (u + top * v) // bottom
        negative, at = _uniform_below(words, at, 2)
        if at >= 0 and not (negative and magnitude == 0):  # zero must not count twice
            return -magnitude if negative else magnitude, at
    return np.int64(0), np.int64(-1)


@numba.njit(cache=True, nogil=True)
def _one_gaussian(words, at, sigma):  # pragma: no cover - compiled
    """Draw discrete Gaussian noise, algorithm 3."""
    while at >= 0:
        y, at = _one_laplace(words, at, sigma, np.int64(1))
        if at < 0:
            break
        kept, at = _coin(words, at, (abs(y) - sigma) ** 2, 2 * sigma * sigma)
        if kept:
            return y, at
    return np.int64(0), np.int64(-1)


@numba.njit(cache=True, nogil=True)
def _fill(words, out, first, gaussian, top, bottom):  # pragma: no cover - compiled
    """Draw until ``out`` or the words end; return how many are drawn and the word at which the next one starts."""
    at = np.int64(0)
    for i in range(first, len(out)):
        if gaussian:
            value, after = _one_gaussian(words, at, top)
        else:
            value, after = _one_laplace(words, at, top, bottom)
        if after < 0:
            return i, at
        out[i], at = value, after
    return len(out), at


def _draw(size: int, gaussian: bool, top: int, bottom: int) -> np.ndarray:
    """Draw noise from the operating system's words.

    A draw that reaches the end of the words starts again with the same words and more of them, never with others:
    what it has seen is not thrown away, so that its law is not bent.
    """
    out, done, words = np.empty(size, dtype=np.int64), 0, np.empty(0, dtype=np.uint64)
    while done < size:
        fresh = os.urandom(8 * min(1 << 16, 20 * (size - done) + 64))
        words = np.concatenate([words, np.frombuffer(fresh, dtype=np.uint64)])
        done, used = _fill(words, out, done, gaussian, top, bottom)
        words = words[used:]
    return out


def _rational_above(scale: Fraction) -> tuple[int, int]:
    """Return whole numbers t, s with t / s >= scale, less than one part in 10^9 above it where 64 bits allow."""
    bits = min(30, max(0, 40 - math.ceil(scale).bit_length()))
    top, bottom = math.ceil(scale * (1 << bits)), 1 << bits
    if top >= 1 << 52:
        raise ValueError(f"The noise scale must be below 2^52, got {float(scale):.3g}: take a coarser grid.")
    return top, bottom


def discrete_laplace(scale: float | Fraction, size: int) -> np.ndarray:
    r"""Draw integers with :math:`P(k) \propto e^{-|k| / b}`, exactly, from the operating system's randomness.

    Args:
        scale: b, positive, below 2^52; rounded up by at most one part in 10^9 (more where it is above 2^40).
        size: How many.

    Returns:
        ``(size,)``, int64.

    Raises:
        ValueError: ``scale`` is not positive or too large.

    Example:
        >>> bool(abs(discrete_laplace(100.0, 20_000).std() / 100 - 2**0.5) < 0.1)
        True

    Source: Canonne, Kamath & Steinke, 2020, arXiv:2004.00010, algorithm 2.
    """
    exact = scale if isinstance(scale, Fraction) else _exact(scale)
    check_positive("scale", float(exact))
    return _draw(size, False, *_rational_above(exact))


def discrete_gaussian(sigma: int, size: int) -> np.ndarray:
    r"""Draw integers with :math:`P(k) \propto e^{-k^2 / 2 \sigma^2}`, exactly, from the operating system's randomness.

    Args:
        sigma: A whole number in [1, 2^25].
        size: How many.

    Returns:
        ``(size,)``, int64.

    Raises:
        TypeError: ``sigma`` is no whole number.
        ValueError: ``sigma`` is out of range.

    Source: Canonne, Kamath & Steinke, 2020, arXiv:2004.00010, algorithm 3, with discrete Laplace proposals of scale
    sigma, so that the exponent :math:`(|y| - \sigma)^2 / 2 \sigma^2` stays within 64 bits.
    """
    check_positive("sigma", sigma, integer=True)
    if sigma > 1 << 25:
        raise ValueError(f"`sigma` must be at most 2^25, got {sigma}.")
    return _draw(size, True, sigma, 1)


# ---- noise by budget -------------------------------------------------------------------------------------------------


def zcdp_budget(epsilon: float, delta: float) -> float:
    r"""Return the largest :math:`\rho` for which :math:`\rho`-zCDP implies (epsilon, delta)-privacy.

    :math:`\rho = (\sqrt{\ln(1/\delta) + \varepsilon} - \sqrt{\ln(1/\delta)})^2`, lowered by one part in 10^12 so that
    rounding errs on the safe side.

    Raises:
        ValueError: ``epsilon`` is not positive and finite, or ``delta`` is not in (0, 1).

    Source: Bun & Steinke, 2016, arXiv:1605.02065, proposition 1.3.
    """
    check_positive("epsilon", epsilon)
    if not 0 < delta < 1:
        raise ValueError(f"`delta` must be in (0, 1) for Gaussian noise, got {delta!r}.")
    log = math.log(1 / delta)
    return (epsilon / (math.sqrt(log + epsilon) + math.sqrt(log))) ** 2 * (1 - 1e-12)


def add_noise(
    values: np.ndarray,
    *,
    epsilon: float,
    delta: float = 0.0,
    share: Fraction | int = 1,
    l1: int,
    l2_squared: int,
    source: str = "auto",
) -> tuple[np.ndarray, float, str]:
    r"""Add the noise that makes a vector of integers private.

    With ``delta`` 0 it is discrete Laplace noise of scale :math:`\Delta_1 / (s \varepsilon)`; otherwise discrete
    Gaussian noise with :math:`\sigma^2 = \Delta_2^2 / (2 s \rho)`, where s is the share of the budget.

    Args:
        values: Integers, any shape.
        epsilon: The whole budget, positive and finite; the decimal number as written.
        delta: 0 for pure privacy, else in (0, 1).
        share: Part of the budget that this vector may use; the shares of one release add up to one.
        l1: Largest sum of absolute changes of ``values`` between neighbouring data sets.
        l2_squared: Largest sum of squared changes.
        source: ``"opendp"``, ``"exact"`` (the sampler of this module), or ``"auto"``: OpenDP if it is installed.

    Returns:
        The noisy integers as float64, the noise's standard deviation, and the source that drew it.

    Raises:
        ImportError: ``source="opendp"`` and it is not installed.
        ValueError: ``source`` is unknown or the scale is too large.
    """
    check_choice("noise_source", source, ("auto", "opendp", "exact"))
    if source == "auto":
        source = "opendp" if importlib.util.find_spec("opendp") else "exact"
    flat = np.ascontiguousarray(values, dtype=np.int64).reshape(-1)
    if delta == 0:
        scale = Fraction(l1) / (_exact(epsilon) * share)
        if source == "opendp":
            noisy = _opendp_laplace(flat, l1, scale, _exact(epsilon) * share)
        else:
            noisy = flat + discrete_laplace(scale, flat.size)
        rate = 1 / float(scale)  # variance 2 q / (1 - q)^2 with q = exp(-1 / scale)
        deviation = math.sqrt(2 * math.exp(-rate)) / -math.expm1(-rate)
    else:
        rho = zcdp_budget(epsilon, delta) * float(share)
        wanted = math.sqrt(l2_squared / (2 * rho)) * (1 + 1e-12)
        fine = 1 << max(0, 10 - int(wanted).bit_length())  # a finer grid, so that rounding sigma up costs little
        sigma = math.ceil(wanted * fine)
        if source == "opendp":
            noisy = _opendp_gaussian(flat * fine, sigma, math.sqrt(l2_squared) * fine, rho) / fine
        else:
            noisy = (flat * fine + discrete_gaussian(sigma, flat.size)) / fine
        deviation = sigma / fine
    return noisy.astype(np.float64).reshape(values.shape), deviation, source


def _opendp_laplace(values: np.ndarray, sensitivity: int, scale: Fraction, epsilon: Fraction) -> np.ndarray:
    dp = require("opendp.prelude", extra="private")
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")
    width = math.nextafter(float(scale), math.inf)
    while Fraction(sensitivity) / Fraction(width) > epsilon:  # OpenDP takes a float: round it to the safe side
        width = math.nextafter(width, math.inf)
    return np.asarray(dp.m.make_laplace(*space, scale=width)(values.tolist()), dtype=np.int64)


def _opendp_gaussian(values: np.ndarray, sigma: int, sensitivity: float, rho: float) -> np.ndarray:
    dp = require("opendp.prelude", extra="private")
    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T=float)
    mechanism = dp.m.make_gaussian(*space, scale=float(sigma), MO="ZeroConcentratedDivergence")
    if mechanism.map(sensitivity) > rho * (1 + 1e-9):
        raise RuntimeError("OpenDP's account of the Gaussian noise exceeds the budget.")
    return np.asarray(mechanism(values.tolist()), dtype=np.int64)


# ---- the budget ------------------------------------------------------------------------------------------------------


class PrivacyAccountant:
    """A privacy budget that several releases on the same rows share, by basic composition: epsilons and deltas add.

    Amounts count as the decimal numbers that were written (ten times 0.1 is 1). An accountant is never copied:
    ``copy``, ``deepcopy`` and ``sklearn.clone`` give the same object, and pickling (which a worker process would need)
    is refused, so that no copy can spend the budget again.

    Args:
        epsilon: Whole budget, positive and finite.
        delta: Whole budget of failure probability, in [0, 1).

    Raises:
        ValueError: A budget is out of range.

    Example:
        >>> accountant = PrivacyAccountant(1.0)
        >>> accountant.charge(0.7)
        >>> accountant.remaining
        (0.3, 0.0)
    """

    def __init__(self, epsilon: float, delta: float = 0.0) -> None:
        _check_budget(epsilon, delta)
        self._budget = _exact(epsilon), _exact(delta)
        self._spent = Fraction(0), Fraction(0)
        self._lock = threading.Lock()

    def charge(self, epsilon: float, delta: float = 0.0) -> None:
        """Spend a part of the budget, or refuse before anything is released.

        Raises:
            ValueError: The budget does not hold that much, or an amount is out of range.
        """
        _check_budget(epsilon, delta)
        with self._lock:
            after = self._spent[0] + _exact(epsilon), self._spent[1] + _exact(delta)
            if after[0] > self._budget[0] or after[1] > self._budget[1]:
                left = self.remaining
                raise ValueError(
                    f"The privacy budget does not hold epsilon={epsilon!r}, delta={delta!r}: epsilon={left[0]!r}, "
                    f"delta={left[1]!r} are left."
                )
            self._spent = after

    @property
    def spent(self) -> tuple[float, float]:
        """Epsilon and delta spent so far."""
        return float(self._spent[0]), float(self._spent[1])

    @property
    def remaining(self) -> tuple[float, float]:
        """Epsilon and delta left."""
        left = [float(a - b) for a, b in zip(self._budget, self._spent, strict=True)]
        return left[0], left[1]

    def __repr__(self) -> str:
        return f"PrivacyAccountant({float(self._budget[0])}, {float(self._budget[1])}): spent {self.spent}"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("A PrivacyAccountant cannot be pickled: a copy could spend the budget again. Use n_jobs=1.")


def _check_budget(epsilon: float, delta: float) -> None:
    check_positive("epsilon", epsilon)
    if not 0 <= delta < 1:
        raise ValueError(f"`delta` must be in [0, 1), got {delta!r}.")


def audit_epsilon(first: np.ndarray, second: np.ndarray, *, delta: float = 0.0, confidence: float = 0.999) -> float:
    r"""Return a lower confidence bound on the epsilon of a mechanism, from its outputs on two neighbouring data sets.

    Half of the outputs choose the event :math:`E = \{\text{output} \ge t\}` (or its complement, or the data sets
    exchanged) with the largest bound; the other half test it: :math:`\varepsilon \ge \ln((p - \delta) / q)`, where p is
    the lower Clopper-Pearson bound on the probability of E on one data set and q the upper one on the other. A private
    mechanism's bound exceeds its epsilon with probability at most 1 - confidence, whatever the outputs are.

    Args:
        first: One number for each independent release on the one data set, ``(N,)``.
        second: The same on its neighbour, ``(N,)``.
        delta: The mechanism's delta.
        confidence: Probability that the bound is one.

    Returns:
        The bound; 0 if nothing could be told.

    Raises:
        ValueError: Fewer than 100 numbers on a side, or ``confidence`` not in (0, 1).
    """
    first, second = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (first, second))
    if min(first.size, second.size) < 100:
        raise ValueError(f"An audit needs at least 100 releases a side, got {first.size} and {second.size}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence!r}.")

    def bound(yes: np.ndarray, no: np.ndarray, n: int, m: int) -> np.ndarray:
        tail = (1 - confidence) / 2
        low = np.where(yes > 0, beta.ppf(tail, yes, n - yes + 1), 0.0)
        high = np.where(no < m, beta.ppf(1 - tail, no + 1, m - no), 1.0)
        return np.log(np.maximum(low - delta, 1e-300) / high)

    candidates = []
    half = first[::2], second[::2], first[1::2], second[1::2]
    thresholds = np.quantile(np.concatenate(half[:2]), np.linspace(0.005, 0.995, 199))
    for sign in (1, -1):
        counts = [(sign * x[None] >= sign * thresholds[:, None]).sum(1) for x in half]
        sizes = [len(x) for x in half]
        for a, b in ((0, 1), (1, 0)):
            chosen = int(np.argmax(bound(counts[a], counts[b], sizes[a], sizes[b])))
            train = bound(counts[a], counts[b], sizes[a], sizes[b])[chosen]
            candidates.append((train, bound(counts[2 + a], counts[2 + b], sizes[2 + a], sizes[2 + b])[chosen]))
    return max(0.0, float(max(candidates)[1]))


# ---- what the private estimators share -------------------------------------------------------------------------------


class Released:
    """What the private estimators share: the budget, and the released structure as plain arrays.

    A child lists in ``_arrays`` the names of its fitted arrays, all of them public or noisy.
    """

    _arrays: ClassVar[tuple[str, ...]] = ()
    epsilon: float
    delta: float
    neighbours: str
    accountant: PrivacyAccountant | None
    get_params: Callable[..., dict[str, Any]]
    set_params: Callable[..., Any]

    def _check_privacy(self) -> int:
        """Check the privacy parameters and return the factor of the sensitivities: 1, or 2 for replaced rows."""
        _check_budget(self.epsilon, self.delta)
        check_choice("neighbours", self.neighbours, ("add-remove", "replace"))
        if self.accountant is not None and not isinstance(self.accountant, PrivacyAccountant):
            raise TypeError(f"`accountant` must be a PrivacyAccountant or None, got {self.accountant!r}.")
        return 2 if self.neighbours == "replace" else 1

    def _charge(self) -> None:
        if self.accountant is not None:
            self.accountant.charge(self.epsilon, self.delta)
        self._released = float(self.epsilon), float(self.delta)

    @property
    def epsilon_spent(self) -> float:
        """The epsilon of the release that this object holds; queries spend nothing."""
        check_is_fitted(self, "_released")
        return self._released[0]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return the released structure as plain arrays: noisy values and public settings, never a row of the data.

        ``safetensors.numpy.save_file`` takes it. The settings are JSON in the bytes of ``"settings"``.
        """
        check_is_fitted(self, "_released")
        settings = {k: v for k, v in self.get_params(deep=False).items() if k not in ("accountant", "random_state")}
        about = {"class": type(self).__name__, "released": self._released, "noise": self.noise_source_}
        about |= {"features": self.n_features_in_, "settings": settings}
        text = json.dumps(about, default=lambda array: array.tolist())
        arrays = {name: np.array(getattr(self, name)) for name in self._arrays if hasattr(self, name)}
        return {**arrays, "settings": np.frombuffer(text.encode(), dtype=np.uint8).copy()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> Self:
        """Take over a released structure and its settings; nothing is charged, since nothing new is released.

        Raises:
            ValueError: ``state`` belongs to another class or misses an array.
        """
        if "settings" not in state:
            raise ValueError(f"`state` must hold 'settings', got {sorted(state)}.")
        about = json.loads(np.asarray(state["settings"], dtype=np.uint8).tobytes())
        if about["class"] != type(self).__name__:
            raise ValueError(f"`state` must be that of a {type(self).__name__}, got one of a {about['class']}.")
        unknown = [name for name in state if name not in (*self._arrays, "settings")]
        if unknown:
            raise ValueError(f"`state` must hold arrays of {', '.join(self._arrays)}, got {', '.join(unknown)}.")
        self.set_params(**{k: tuple(v) if isinstance(v, list) else v for k, v in about["settings"].items()})
        for name in self._arrays:
            if name in state:
                value = np.array(state[name])
                setattr(self, name, value if value.ndim else value.item())
        self._released, self.noise_source_ = tuple(about["released"]), about["noise"]
        self.n_features_in_ = int(about["features"])
        return self


def check_bounds(bounds: Any, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the public box as two vectors ``(P,)``.

    Raises:
        ValueError: There are no bounds, or a lower one is not below its upper one, or a shape is wrong.
    """
    if bounds is None:
        raise ValueError(
            "`bounds` must be given, as (low, high): public numbers, not computed from the data. Got None."
        )
    try:
        low, high = (np.broadcast_to(np.asarray(b, dtype=np.float64), (features,)).copy() for b in bounds)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`bounds` must be (low, high), numbers or {features} numbers each, got {bounds!r}."
        ) from error
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(f"`bounds` must be finite with low < high in every feature, got {bounds!r}.")
    return low, high


def check_inside(X: np.ndarray, low: np.ndarray, high: np.ndarray, clip: bool) -> np.ndarray:
    """Return the rows clipped to the box, or refuse rows outside unless ``clip``.

    Raises:
        ValueError: A row is outside and ``clip`` is off.
    """
    outside = (low > X) | (high < X)
    if not clip and outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"`X` must lie within `bounds`, got {int(outside.any(1).sum())} row(s) outside, the first at row {row}, "
            f"feature {column}; pass clip=True to move them to the border."
        )
    return np.clip(X, low, high)


def _split(values: np.ndarray, axis: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Split numbers into two parts of ``bits`` bits each, on a grid that the largest along ``axis`` sets."""
    exponent = np.maximum(np.frexp(np.abs(values).max(axis, keepdims=True))[1], -400)
    unit = np.ldexp(1.0, exponent - bits)
    high = np.rint(values / unit) * unit
    unit = np.ldexp(unit, -bits)
    return high, np.rint((values - high) / unit) * unit


def multiply_rows(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return ``x @ weight`` for ``(N, P)`` and ``(P, K)`` such that a row of the result depends on its own row alone.

    A matrix product may sum in another order when there is a row more or less; the last bits of all rows would then
    tell whether somebody is in the data. Here both factors are split into parts so short that every product and every
    sum of the library's matrix products is exact in float64, whatever the order; about 40 bits remain.
    """
    bits = (53 - math.ceil(math.log2(x.shape[1] + 1))) // 2
    x = np.clip(x, -(2.0**400), 2.0**400)  # whether sums of larger numbers overflow depends on their order
    (x1, x2), (w1, w2) = _split(x, 1, bits), _split(weight, 0, bits)
    return x1 @ w1 + (x1 @ w2 + x2 @ w1)
