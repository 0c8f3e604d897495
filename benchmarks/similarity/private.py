"""Queries and releases of private similarities beside plain NumPy, and beside exact sums that keep nothing private."""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from harness import Case, main
from scipy.spatial.distance import cdist
from sklearn.neighbors import KernelDensity

from dynakern.similarity import PrivateDistanceSum
from dynakern.similarity.private import (
    add_noise,
    draw_frequencies,
    fgt_similarity,
    release_fgt,
    release_rff,
    rff_similarity,
)


def _close(a, b, rtol):
    assert np.abs(a - b).max() <= rtol * np.abs(b).max(), np.abs(a - b).max() / np.abs(b).max()


def _features(d, m, n=5000, queries=1000):
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((n, d)), rng.standard_normal((queries, d))
    omega, shift = draw_frequencies("gaussian", d, m, bandwidth=math.sqrt(d), random_state=0), rng.uniform(0, 6.28, m)
    sketch = release_rff(X, omega, shift, 0.0)

    def ours():
        return rff_similarity(sketch, Y, omega, shift)

    def plain():
        return (math.sqrt(2) * np.cos(Y @ omega + shift)) @ sketch / m

    exact = KernelDensity(bandwidth=math.sqrt(d)).fit(X)
    yield Case(
        name=f"{queries} queries of {m} random features, {d} dimensions",
        ours=ours,
        peers={
            "plain NumPy": plain,
            f"KernelDensity, exact, {n} rows, not private": lambda: exact.score_samples(Y),
        },
        check=lambda: _close(ours(), plain(), 1e-9),
        floor_seconds=2 * queries * d * m / 6e10,
        floor_note="the matrix product at 60 GFLOP/s in float64",
        at_least=1,
        repeats=9,
    )
    yield Case(
        name=f"release of {m} random features of {n} rows, {d} dimensions",
        ours=lambda: release_rff(X, omega, shift, 0.0),
        peers={"plain NumPy": lambda: (math.sqrt(2) * np.cos(X @ omega + shift)).mean(0)},
        check=lambda: _close(sketch, (math.sqrt(2) * np.cos(X @ omega + shift)).mean(0), 1e-9),
        repeats=5,
    )


def _published_transform(sketch, Y, width, order):
    """The fast Gauss transform's query as published, a loop over queries."""
    d = Y.shape[1]
    cells = np.indices((width,) * d).reshape(d, -1).T
    out = np.empty(len(Y))
    for i, y in enumerate(Y):
        near = ((y - cells) ** 2).sum(1) <= order
        q = y - cells[near]
        hermite = np.empty((*q.shape, order))
        hermite[..., 0] = np.exp(-q * q)
        if order > 1:
            hermite[..., 1] = 2 * q * hermite[..., 0]
        for a in range(2, order):
            hermite[..., a] = 2 * q * hermite[..., a - 1] - 2 * (a - 1) * hermite[..., a - 2]
        hermite /= np.array([math.factorial(a) for a in range(order)])
        terms = hermite[:, 0]
        for k in range(1, d):
            terms = (terms[:, :, None] * hermite[:, k, None, :]).reshape(len(q), -1)
        out[i] = (terms * sketch[near]).sum()
    return out


def _transform():
    rng = np.random.default_rng(0)
    X, Y, width, order = 7 * rng.random((5000, 2)), 7 * rng.random((1000, 2)), 8, 8
    sketch = release_fgt(X, 0.0, width=width, order=order)

    def ours():
        return fgt_similarity(sketch, Y, width=width, order=order)

    return Case(
        name="1000 queries of the fast Gauss transform, 2 dimensions, width 8, order 8",
        ours=ours,
        peers={
            "plain NumPy, a loop over queries": lambda: _published_transform(sketch, Y, width, order),
            "exact sums, 5000 rows, not private": lambda: np.exp(-cdist(Y, X, "sqeuclidean")).mean(1),
        },
        check=lambda: _close(ours(), _published_transform(sketch, Y, width, order), 1e-9),
        at_least=1,
    )


def _sums(queries):
    rng = np.random.default_rng(0)
    X, Y = rng.random((20_000, 4)), rng.random((queries, 4))
    found = {
        method: PrivateDistanceSum(method=method, alpha=0.1, epsilon=1e6, bounds=(0, 1), noise_source="exact").fit(X)
        for method in ("countsum", "bucket")
    }
    return Case(
        name=f"{queries} sums of l1 distances to 20,000 rows, 4 dimensions",
        ours=lambda: found["countsum"].sum(Y),
        peers={
            "scipy cdist, exact, not private": lambda: cdist(Y, X, "cityblock").sum(1),
            "dynakern, buckets": lambda: found["bucket"].sum(Y),
        },
        check=lambda: _close(found["countsum"].sum(Y), cdist(Y, X, "cityblock").sum(1), 1e-2),
        repeats=5,
    )


def _noise(delta):
    values, options = np.zeros(20_000), {"epsilon": 1.0, "delta": delta, "l1": 10**5, "l2_squared": 10**10}

    def ours():
        return add_noise(values, source="exact", **options)

    def opendp():
        return add_noise(values, source="opendp", **options)

    def check():
        a, b = ours(), opendp()
        assert abs(a[0].std() / b[0].std() - 1) < 0.1

    return Case(
        name=f"20,000 draws of discrete {'Gaussian' if delta else 'Laplace'} noise, scale about 1e5",
        ours=ours,
        peers={"OpenDP": opendp},
        check=check,
        repeats=5,
    )


def cases():
    yield from _features(32, 1024)
    yield from _features(128, 4096)
    yield _transform()
    yield _sums(1000)
    yield _noise(0.0)
    yield _noise(1e-6)


if __name__ == "__main__":
    main("private", "Private similarities: queries, releases and noise", cases)
