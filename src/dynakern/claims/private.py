"""Private similarities: one release answers any number of queries, projections keep its answers, and means classify.

Claims behind Backurs et al., 2024, arXiv:2403.08917, at a size for a laptop: (1) sums of l1 distances to 20,000 rows
from one release with epsilon 1, beside noise added to each of 1,000 answers; the error does not grow with the queries,
and without noise the tree keeps its factor; (2) in 2,048 dimensions a projection to 128 keeps the error of a private
kernel density and makes its queries faster; (3) on digits the nearest noisy mean is as accurate as logistic regression
by private gradient descent at (1, 1e-5)-privacy, and much faster to fit. Noise comes from the operating system, so that
figures vary from run to run; they are means over several releases. The paper's tables (CIFAR-10 features) are not
measured here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import gammaln

from dynakern.claims.run import Measurement, Progress
from dynakern.data.images import load_digits
from dynakern.measure import time_interleaved
from dynakern.similarity.private import (
    PrivateDistanceSum,
    PrivateKDE,
    PrivateSimilarityClassifier,
    discrete_gaussian,
    release_tree,
    tree_distance,
)

__all__ = ["CLAIMS"]


def unlimited_queries(progress: Progress) -> Iterator[Measurement]:
    """Mean relative error of sums of l1 distances: one release, beside noise for each of 1,000 queries."""
    rng, n, d = np.random.default_rng(0), 20_000, 4
    X = np.stack([rng.beta(a, b, n) for a, b in ((2, 5), (5, 2), (1, 1), (0.5, 0.5))], 1)
    Y = rng.uniform(size=(10_000, d))
    ordered, sums = np.sort(X, axis=0), np.zeros((n + 1, d))
    sums[1:] = np.cumsum(ordered, axis=0)
    exact = np.zeros(len(Y))
    for k in range(d):  # by sorting, O(log n) a query
        below = np.searchsorted(ordered[:, k], Y[:, k])
        exact += Y[:, k] * (2 * below - n) + sums[n, k] - 2 * sums[below, k]
    naive = float(np.mean(np.abs(rng.laplace(scale=1.0 * d * 1000, size=1000)) / exact[:1000]))
    grid = {"bounds": (0.0, 1.0), "grid_size": n}
    for label, options in (("counts, alpha 0.1", {"method": "bucket", "alpha": 0.1}), ("counts and sums", {})):
        errors, growth = [], []
        for release in range(5):
            estimator = PrivateDistanceSum(epsilon=1.0, **grid, **options).fit(X)
            relative = np.abs(estimator.sum(Y) - exact) / exact
            errors.append(relative[:1000].mean())
            growth.append(relative.mean() / relative[:1000].mean())
            progress(f"{label}, release {release + 1}", release / 10 + (0.5 if not options else 0.0))
        name = f"{label}: "
        mean = float(np.mean(errors))
        yield Measurement(
            name=name + "mean relative error", value=mean, unit="relative", at_most=0.5 * naive, baseline=naive
        )
        yield Measurement(
            name=name + "error of 10,000 queries / of 1,000",
            value=float(np.mean(growth)),
            unit="x",
            at_least=0.8,
            at_most=1.2,
        )
    found = tree_distance(release_tree(X, 0.0, **grid), Y[:1000], alpha=0.1, **grid)
    kept = (found >= exact[:1000]) & (found <= 1.1 * exact[:1000] + d)
    yield Measurement(
        name="without noise: queries within [S, 1.1 S + R d]", value=float(kept.mean()), unit="share", at_least=1
    )


def _clusters(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 rows and 500 queries of ten Gaussian clusters in a 32-dimensional subspace of 2,048 dimensions."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((2048, 32)))
    centres = rng.standard_normal((10, 32))
    inner = centres[rng.integers(10, size=5500)] + rng.standard_normal((5500, 32)) * 0.5
    X = inner @ basis.T + 0.02 * rng.standard_normal((5500, 2048))
    return X[:5000], X[5000:]


def projection(progress: Progress) -> Iterator[Measurement]:
    """Private Gaussian density of 5,000 rows in 2,048 dimensions, projected to 128: error and time of queries."""
    errors, ratios = {"projected": [], "plain": []}, []
    for seed in range(3):
        X, Y = _clusters(seed)
        squares = cdist(Y, X, "sqeuclidean")
        width = float(np.median(squares))
        exact = np.exp(-squares / width).mean(1)
        options = {"bandwidth": math.sqrt(width / 2), "epsilon": 1.0, "num_features": 4000, "random_state": seed}
        models = {"projected": PrivateKDE(project=128, **options).fit(X)}
        progress(f"seed {seed}: projected", (2 * seed + 1) / 6)
        models["plain"] = PrivateKDE(**options).fit(X)
        progress(f"seed {seed}: plain", (2 * seed + 2) / 6)
        for label, model in models.items():
            errors[label].append(float(np.abs(model.mean_similarity(Y) - exact).mean()))
        times = time_interleaved({k: lambda m=m, Y=Y: m.mean_similarity(Y) for k, m in models.items()}, repeats=5)
        ratios.append(times["plain"].median / times["projected"].median)
    ours, plain = float(np.mean(errors["projected"])), float(np.mean(errors["plain"]))
    yield Measurement(
        name="mean absolute error, projected", value=ours, unit="absolute", at_most=1.5 * plain, baseline=plain
    )
    yield Measurement(name="time of a query, plain / projected", value=float(np.median(ratios)), unit="x", at_least=2)


def _renyi_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Return epsilon of ``steps`` sampled Gaussian steps by Renyi accounting at whole orders (Mironov et al., 2019)."""
    best = math.inf
    for order in range(2, 128):
        k = np.arange(order + 1)
        terms = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        terms += (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * sigma**2)
        renyi = steps * np.logaddexp.reduce(terms) / (order - 1)
        gap = math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        best = min(best, renyi + gap)
    return best


def _sgd_noise(rate: float, steps: int, epsilon: float, delta: float) -> float:
    low, high = 0.3, 100.0
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _renyi_epsilon(middle, rate, steps, delta) <= epsilon else (middle, high)
    return high


def _private_descent(
    X: np.ndarray, y: np.ndarray, sigma: float, rng: np.random.Generator, *, exact: bool = False
) -> np.ndarray:
    """Fit softmax regression by private gradient descent: 20 epochs, batches of 128, rate 4, gradients cut to 1.

    Its noise comes from a seeded generator, or with ``exact`` from the sampler that the estimator uses.
    """
    n, batch, W = len(X), 128, np.zeros((X.shape[1], 10))
    targets, lengths = np.eye(10)[y], np.linalg.norm(X, axis=1)
    for _ in range(20 * n // batch):
        rows = np.flatnonzero(rng.random(n) < batch / n)
        x, logits = X[rows], X[rows] @ W
        p = np.exp(logits - logits.max(1, keepdims=True))
        residual = p / p.sum(1, keepdims=True) - targets[rows]
        length = np.linalg.norm(residual, axis=1) * lengths[rows]  # of each row's gradient
        gradient = x.T @ (residual / np.maximum(length, 1.0)[:, None])
        if exact:
            noise = discrete_gaussian(math.ceil(sigma * 4096), W.size).reshape(W.shape) / 4096
        else:
            noise = sigma * rng.standard_normal(W.shape)
        W -= 4.0 * (gradient + noise) / batch
    return W


def classification(progress: Progress) -> Iterator[Measurement]:
    """Digits at epsilon 1, delta 1e-5: the nearest noisy mean beside softmax regression by private descent."""
    digits = load_digits()
    X, y = digits.images.reshape(len(digits.images), -1).astype(np.float64), digits.labels.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = (X / np.linalg.norm(X, axis=1, keepdims=True))[order], y[order]
    (X, test), (y, answers) = (X[:1437], X[1437:]), (y[:1437], y[1437:])
    sigma = _sgd_noise(128 / 1437, 20 * 1437 // 128, 1.0, 1e-5)
    model = PrivateSimilarityClassifier(epsilon=1.0, delta=1e-5, noise_source="exact")
    ours, theirs = [], []
    for seed in range(20):
        ours.append(model.fit(X, y).score(test, answers))
        W = _private_descent(X, y, sigma, np.random.default_rng(seed))
        theirs.append(float(((test @ W).argmax(1) == answers).mean()))
        progress(f"seed {seed}", (seed + 1) / 20)
    mean, baseline = float(np.mean(ours)), float(np.mean(theirs))
    yield Measurement(name="accuracy", value=mean, unit="accuracy", at_least=baseline - 0.03, baseline=baseline)
    rng = np.random.default_rng(0)
    times = time_interleaved(
        {
            "ours": lambda: model.fit(X, y),
            "descent": lambda: _private_descent(X, y, sigma, rng),
            "exact": lambda: _private_descent(X, y, sigma, rng, exact=True),
        },
        repeats=15,
        warmup=2,
    )
    ratio = times["descent"].median / times["ours"].median
    yield Measurement(name="time of a fit, private descent / ours", value=ratio, unit="x", at_least=20)
    ratio = times["exact"].median / times["ours"].median
    yield Measurement(name="the same, both with exact noise from the operating system", value=ratio, unit="x")
    yield Measurement(name="time of a fit, ours", value=1e3 * times["ours"].median, unit="ms")


CLAIMS = (unlimited_queries, projection, classification)
