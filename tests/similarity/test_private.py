"""Similarities to private rows: exact noise, sensitivities attacked, answers against brute force, budgets refused."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.utils.estimator_checks import parametrize_with_checks

from dynakern.similarity import PrivacyAccountant, PrivateDistanceSum, PrivateKDE, PrivateSimilarityClassifier
from dynakern.similarity.private import (
    add_noise,
    audit_epsilon,
    classify,
    count_sum_distance,
    density_estimator,
    discrete_gaussian,
    discrete_laplace,
    draw_frequencies,
    fgt_similarity,
    inverse_mixture,
    johnson_lindenstrauss,
    moment_distance,
    release_centroids,
    release_count_sums,
    release_fgt,
    release_moments,
    release_rff,
    release_tree,
    rff_similarity,
    tree_distance,
    zcdp_budget,
)
from dynakern.similarity.private.centroid import _class_sums
from dynakern.similarity.private.noise import _coin, _draw, _uniform_below, multiply_rows
from dynakern.similarity.private.sketches import feature_sums, transform_sums

SUM, KDE, CLASSIFIER = PrivateDistanceSum, PrivateKDE, PrivateSimilarityClassifier
BOX = {"bounds": (0.0, 1.0), "grid_size": 255}
FRESH = "each fit draws fresh noise from the operating system, so that two fits differ"


def rows(n=400, features=3, seed=0):
    return np.random.default_rng(seed).uniform(size=(n, features))


@parametrize_with_checks(
    [KDE(), SUM(bounds=(-10, 10), clip=True), CLASSIFIER()],
    expected_failed_checks=lambda estimator: (
        dict.fromkeys(("check_fit_idempotent", "check_supervised_y_2d", "check_classifier_data_not_an_array"), FRESH)
        if isinstance(estimator, CLASSIFIER)
        else {}
    ),
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


# ---- the sampler -----------------------------------------------------------------------------------------------------


def chi_square(sample, probability, reach):
    """Probability value of a sample of integers against exact probabilities; the tails are pooled."""
    k = np.arange(-reach, reach + 1)
    expected = np.append(probability(k), 0.0)
    expected[-1] = 1 - expected.sum()
    seen = np.append([(sample == i).sum() for i in k], (np.abs(sample) > reach).sum())
    return stats.chisquare(seen[expected > 0], expected[expected > 0] * len(sample)).pvalue


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.7])
def test_discrete_laplace_has_its_law(scale):
    q = math.exp(-1 / scale)
    sample = discrete_laplace(scale, 60_000)
    assert chi_square(sample, lambda k: (1 - q) / (1 + q) * q ** np.abs(k), int(3 * scale) + 1) > 1e-6


@pytest.mark.parametrize("sigma", [1, 2, 5])
def test_discrete_gaussian_has_its_law(sigma):
    every = np.arange(-60 * sigma, 60 * sigma + 1)
    total = np.exp(-(every**2) / (2 * sigma**2)).sum()
    sample = discrete_gaussian(sigma, 60_000)
    assert chi_square(sample, lambda k: np.exp(-(k**2) / (2 * sigma**2)) / total, 3 * sigma) > 1e-6


@pytest.mark.parametrize("source", ["exact", "opendp"])
@pytest.mark.parametrize("delta", [0.0, 1e-6])
def test_large_noise_has_the_deviation_it_states(source, delta):
    if source == "opendp":
        pytest.importorskip("opendp")
    values = np.full(4000, 10**6)
    noisy, deviation, used = add_noise(
        values, epsilon=0.5, delta=delta, l1=10**5, l2_squared=10**10, share=Fraction(1, 2), source=source
    )
    assert used == source
    assert stats.kstest((noisy - 10**6) / deviation, "laplace" if delta == 0 else "norm",
                        (0, 2**-0.5) if delta == 0 else ()).pvalue > 1e-6  # fmt: skip
    wanted = 2**0.5 * 10**5 / 0.25 if delta == 0 else 10**5 / math.sqrt(2 * 0.5 * zcdp_budget(0.5, 1e-6))
    assert deviation == pytest.approx(wanted, rel=1e-3)


def test_noise_is_never_below_the_budget():
    for epsilon, l1 in product((0.1, 1 / 3, 0.30000000000000004, 7.0), (1, 76, 10**7)):
        _, deviation, _ = add_noise(np.zeros(1), epsilon=epsilon, l1=l1, l2_squared=l1, source="exact")
        scale = Fraction(l1) / Fraction(repr(epsilon))
        assert deviation >= math.sqrt(2) * 0.5 / math.sinh(0.5 / float(scale)) * (1 - 1e-12)
        _, deviation, _ = add_noise(np.zeros(1), epsilon=epsilon, delta=1e-5, l1=l1, l2_squared=l1, source="exact")
        assert deviation**2 >= l1 / (2 * zcdp_budget(epsilon, 1e-5))


def words(n, seed=0):
    return np.random.default_rng(seed).integers(2**64, size=n, dtype=np.uint64)


def test_coins_are_exact():
    stream, at, seen = words(4000), 0, []
    while len(seen) < 2000:
        value, at = _uniform_below(stream, at, 3)
        seen.append(value)
    assert stats.chisquare(np.bincount(seen, minlength=3)).pvalue > 1e-6
    for numerator, denominator in ((0, 5), (2, 5), (5, 5), (13, 5)):
        stream, at, heads = words(100_000, seed=1), 0, 0
        for _ in range(5000):
            head, at = _coin(stream, at, numerator, denominator)
            heads += head
        assert stats.binomtest(heads, 5000, math.exp(-numerator / denominator)).pvalue > 1e-6


@pytest.mark.parametrize(("gaussian", "top", "bottom"), [(False, 37, 8), (True, 900, 1)])
def test_noise_does_not_depend_on_where_the_words_end(monkeypatch, gaussian, top, bottom):
    """A draw cut off by the end of the words goes on with the same words: drawing another would favour short draws."""
    found = []
    for chunk in (3, 17, 4096):
        stream = words(60_000)
        place = [0]

        def urandom(size, chunk=chunk, stream=stream, place=place):
            start = place[0]
            place[0] += chunk
            return stream[start : place[0]].tobytes()

        monkeypatch.setattr("dynakern.similarity.private.noise.os.urandom", urandom)
        found.append(_draw(500, gaussian, top, bottom))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_zcdp_budget_converts_back():
    rho = zcdp_budget(1.0, 1e-5)
    assert rho + 2 * math.sqrt(rho * math.log(1e5)) == pytest.approx(1.0, abs=1e-9)


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_bucket_tree_keeps_its_factor_without_noise(alpha, p):
    X, Y = rows(), rows(50, seed=1)
    found = tree_distance(release_tree(X, 0.0, **BOX), Y, alpha=alpha, p=p, **BOX)
    exact = (np.abs(X[None] - Y[:, None]) ** p).sum((1, 2))
    rounding = p * X.size / BOX["grid_size"]
    assert np.all(found >= exact - rounding)
    assert np.all(found <= (1 + alpha) ** p * (exact + rounding))


def test_the_farthest_point_is_counted():
    tree = release_tree(np.array([[1.0], [0.0]]), 0.0, **BOX)
    assert tree_distance(tree, np.array([[0.0], [1.0]]), alpha=0.5, **BOX) == pytest.approx([1.0, 1.0])


def test_counts_and_sums_and_moments_are_exact_up_to_the_grid():
    X, Y = np.round(rows() * 255) / 255, np.round(rows(50, seed=1) * 255) / 255
    found = count_sum_distance(release_count_sums(X, 0.0, **BOX), Y, **BOX)
    assert found == pytest.approx(np.abs(X[None] - Y[:, None]).sum((1, 2)), rel=1e-12)
    fine = {"bounds": (0.0, 1.0), "grid_size": 1 << 20}
    found = moment_distance(release_moments(X, 0.0, **fine), Y, **fine)
    assert found == pytest.approx(((X[None] - Y[:, None]) ** 2).sum((1, 2)), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "bucket", "alpha": 0.05},
        {"metric": "lp", "alpha": 0.02, "p": 2.0},
        {"metric": "sqeuclidean"},
        {"metric": "l2", "project": 200, "random_state": 0},
        {"delta": 1e-6, "neighbours": "replace"},
    ],
    ids=str,
)
def test_sums_of_distances(options):
    low, high = np.array([-1.0, 0.0, 2.0]), np.array([1.0, 5.0, 3.0])
    X, Y = low + (high - low) * rows(), low + (high - low) * rows(300, seed=1)
    estimator = SUM(epsilon=1e4, bounds=(low, high), noise_source="exact", grid_size=511, **options).fit(X)
    z = np.abs(X[None] - Y[:, None])
    exact = {"lp": (z**2).sum((1, 2)), "sqeuclidean": (z**2).sum((1, 2)), "l2": np.sqrt((z**2).sum(2)).sum(1)}
    wanted = exact.get(options.get("metric"), z.sum((1, 2)))
    walked = estimator.sum(Y)
    assert np.abs(walked / wanted - 1).max() < (0.2 if options.get("metric") == "l2" else 0.07)
    assert estimator.sum(np.tile(Y, (3, 1)))[:300] == pytest.approx(walked)  # by the table


@pytest.mark.parametrize("options", [{}, {"method": "bucket"}, {"metric": "lp"}, {"metric": "sqeuclidean"}], ids=str)
def test_expected_error_is_the_deviation_of_the_noise(options):
    X, Y = rows(200, 2), rows(40, 2, seed=1)
    answers = [
        SUM(epsilon=1.0, bounds=(0, 1), grid_size=63, noise_source="exact", **options).fit(X) for _ in range(150)
    ]
    spread = np.sqrt(np.var([a.sum(Y) for a in answers], axis=0).mean())
    assert answers[0].expected_error(Y) == pytest.approx(spread, rel=0.2)
    assert answers[0].expected_error() == pytest.approx(spread, rel=0.5)


def kernel_value(name, z, h):
    l1, l2 = np.abs(z).sum(-1), np.sqrt((z**2).sum(-1))
    return {
        "gaussian": np.exp(-(l2**2) / (2 * h * h)),
        "exponential": np.exp(-l2 / h),
        "laplacian": np.exp(-l1 / h),
        "cauchy": 1 / (1 + l2**2 / h**2),
        "inverse": 1 / (1 + l2 / h),
        "inverse_l1": 1 / (1 + l1 / h),
    }[name]


@pytest.mark.parametrize("kernel", ["gaussian", "exponential", "laplacian", "cauchy", "inverse", "inverse_l1"])
def test_random_features_have_their_kernel(kernel):
    m, h, z = 40_000, 1.7, rows(6, 3) * 3
    omega = draw_frequencies(kernel, 3, m, bandwidth=h, random_state=0)
    shift = np.random.default_rng(1).uniform(0, 2 * np.pi, m)
    found = [rff_similarity(release_rff(row[None], omega, shift, 0.0), np.zeros((1, 3)), omega, shift)[0] for row in z]
    assert np.abs(np.array(found) - kernel_value(kernel, z, h)).max() < 5 / math.sqrt(m)


def test_features_and_their_cosines_are_exact():
    X, omega = rows(300, 5) * 20 - 10, draw_frequencies("gaussian", 5, 77, random_state=0)
    shift = np.random.default_rng(0).uniform(0, 2 * np.pi, 77)
    phi = math.sqrt(2) * np.cos(X @ omega + shift)
    sketch = release_rff(X, omega, shift, 0.0)
    assert np.abs(sketch - phi.mean(0)).max() < 1e-12
    assert np.abs(rff_similarity(sketch, X, omega, shift) - phi @ sketch / 77).max() < 1e-13


@pytest.mark.parametrize("features", [1, 2, 3])
def test_fast_gauss_transform_converges(features):
    X, Y = 5 * rows(100, features), 5 * rows(40, features, seed=1)
    exact = np.exp(-((X[None] - Y[:, None]) ** 2).sum(-1)).mean(1)
    sizes = (4, 8, 12) if features < 3 else (4, 8)
    errors = [
        np.abs(fgt_similarity(release_fgt(X, 0.0, width=6, order=o), Y, width=6, order=o) - exact).max() for o in sizes
    ]
    assert all(b < a for a, b in pairwise(errors))
    assert errors[1] < 2e-3


def test_far_queries_have_no_similarity():
    sketch = release_fgt(5 * rows(50, 2), 0.0, width=6, order=5)
    assert np.all(fgt_similarity(sketch, np.array([[1e300, 0.0], [-1e18, 2.0], [40.0, 40.0]]), width=6, order=5) == 0)


def test_mixture_of_exponentials():
    h = np.append(np.logspace(-6, 8, 500), 0.0)
    for options, terms, error in (({}, 29, 4e-5), ({"step": 0.4, "low": -14.0, "high": 2.5}, 42, 2e-6)):
        t, w = inverse_mixture(**options)
        assert len(t) == terms
        assert np.abs(np.exp(-h[:, None] * t) @ w - 1 / (1 + h)).max() < error


def test_projection_keeps_lengths():
    z = rows(1, 500)[0]
    lengths = [np.sum((z @ johnson_lindenstrauss(500, 40, seed)) ** 2) for seed in range(100)]
    assert np.mean(lengths) == pytest.approx(np.sum(z**2), rel=4 * math.sqrt(2 / 4000))


@pytest.mark.parametrize("options", [{}, {"method": "fgt", "bounds": (-4, 4), "clip": True}, {"delta": 1e-6}], ids=str)
def test_density_is_that_of_scikit_learn(options):
    X = np.random.default_rng(0).standard_normal((4000, 2))
    kde = KDE(bandwidth=0.6, epsilon=200.0, num_features=4096, random_state=0, noise_source="exact", **options).fit(X)
    inner = X[np.abs(X).max(1) < 1][:50]
    exact = KernelDensity(bandwidth=0.6).fit(X).score_samples(inner)
    assert np.abs(kde.score_samples(inner) - exact).max() < 0.25
    assert kde.score(inner) == pytest.approx(kde.score_samples(inner).sum())
    far = kde.score_samples([[50.0, 50.0]])[0]
    assert np.isfinite(far)


@pytest.mark.parametrize("kernel", ["gaussian", "exponential", "laplacian"])
@pytest.mark.parametrize("features", [1, 2])
def test_densities_integrate_to_one(kernel, features):
    """One row, no noise worth the name: what score_samples divides by is the kernel's integral."""
    kde = KDE(kernel, bandwidth=0.5, epsilon=1e6, num_features=60_000, random_state=0, noise_source="exact",
              neighbours="replace", floor=1e-9).fit(np.zeros((1, features)))  # fmt: skip
    axis = np.linspace(-4, 4, 81 if features == 1 else 33)
    grid = np.stack(np.meshgrid(*[axis] * features), -1).reshape(-1, features)
    expected = kernel_value(kernel, grid, 0.5)
    mass = expected.sum() * (axis[1] - axis[0]) ** features
    log = np.log(kde.mean_similarity(np.zeros((1, features)))) - kde.score_samples(np.zeros((1, features)))
    assert math.exp(log[0]) == pytest.approx(mass, rel=0.07)


def test_floor_is_where_an_estimate_is_told_from_zero():
    X = rows(500, 2)
    kde = KDE(bandwidth=0.1, random_state=0).fit(X)
    log = kde.score_samples([[30.0, 30.0], [-70.0, 3.0], [5.0, 90.0]])
    lowest = math.log(kde.expected_error()) - math.log(2 * math.pi * 0.01)
    assert log.min() >= lowest - 1e-9
    kde.set_params(floor=0.9)
    assert kde.score_samples([[30.0, 30.0]])[0] == pytest.approx(math.log(0.9) - math.log(2 * math.pi * 0.01))


@pytest.mark.parametrize("method", ["rff", "fgt"])
def test_expected_error_of_densities(method):
    X, bounds = rows(300, 2), (-1, 2)
    options = {"bandwidth": 0.5, "num_features": 64, "order": 4, "random_state": 0, "noise_source": "exact"}
    answers = [
        KDE(method=method, bounds=bounds, neighbours="replace", **options).fit(X).mean_similarity([[0.5, 0.5]])[0]
        for _ in range(200)
    ]
    stated = KDE(method=method, bounds=bounds, neighbours="replace", **options).fit(X).expected_error()
    assert np.std(answers) == pytest.approx(stated, rel=0.35)


def test_classifier_learns_digits():
    X, y = load_digits(return_X_y=True)
    plain = release_centroids(X, y, 0.0, 0.0, num_classes=10)
    U = X / np.linalg.norm(X, axis=1, keepdims=True)
    assert plain == pytest.approx(np.stack([U[y == c].mean(0) for c in range(10)]), abs=1e-8)
    exact = ((U[:, None] - plain) ** 2).sum(-1).argmin(1)
    generous = CLASSIFIER(epsilon=1e4, noise_source="exact").fit(X, y)
    assert np.mean(generous.predict(X) == exact) > 0.99
    assert CLASSIFIER(epsilon=2.0, delta=1e-5).fit(X, y).score(X, y) > 0.75
    pure = CLASSIFIER(epsilon=20.0, delta=0.0).fit(X, y)
    assert pure.score(X, y) > 0.75
    assert generous.decision_function(X).shape == (1797, 10)
    assert generous.expected_error() < pure.expected_error()


def test_task_factories():
    X, y = load_digits(return_X_y=True)
    X = (X - X.mean(0)) / (X.std(0) + 1e-9)
    assert classify(features=64, random_state=0).fit(X, y).score(X, y) > 0.6
    log = density_estimator(features=64, random_state=0).fit(X).score_samples(X)
    assert np.isfinite(log).all()


# ---- attacks ---------------------------------------------------------------------------------------------------------

HOSTILE = [
    np.array([1e308, -1e308, 1e300]),
    np.array([5e-324, 0.0, -5e-324]),
    np.array([0.5, 0.5 + 2**-53, 0.1 + 0.2]),
    np.array([1e17, -1e-17, 3.0]),
    np.array([0.0, 0.0, 0.0]),
]


@pytest.mark.parametrize("row", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("n", [1, 7, 64])
def test_a_row_changes_integers_by_its_own_share_only(row, n):
    """Adding a row, at any place, changes the exact statistics by what the sensitivity says, to the last bit."""
    X = rows(n) * np.array([1.0, 1e3, 1e-3])
    for place in (0, n // 2, n):
        more = np.insert(X, place, row, axis=0)
        omega = draw_frequencies("exponential", 3, 41, random_state=0)
        shift = np.random.default_rng(0).uniform(0, 6.28, 41)
        change = feature_sums(more, omega, shift, 20) - feature_sums(X, omega, shift, 20)
        assert np.array_equal(change, feature_sums(row[None], omega, shift, 20))
        assert np.abs(change).max() <= round(math.sqrt(2) * 2**20) + 1
        change = release_tree(more, 0.0, **BOX) - release_tree(X, 0.0, **BOX)
        assert np.abs(change).sum() == 3 * 9
        change = np.stack([release_count_sums(more, 0.0, **BOX) - release_count_sums(X, 0.0, **BOX)])
        assert np.abs(change).sum() <= 3 * 9 * (1 + 255)
        change = release_moments(more, 0.0, **BOX) - release_moments(X, 0.0, **BOX)
        assert change[0] == 1
        assert np.abs(change[1:-1]).sum() <= 3 * 128
        assert abs(change[-1]) <= 3 * 128**2
    inside = np.clip(row, 0, 4)[None]
    change = transform_sums(np.vstack([X.clip(0, 4), inside]), 5, 6, 20) - transform_sums(X.clip(0, 4), 5, 6, 20)
    assert np.abs(change).sum() <= (2 * (1 - 2.0**-6)) ** 3 * 2**20
    label = np.arange(n + 1) % 2
    sums = _class_sums(np.vstack([X, row]), label, 2, 12)[0]
    change = sums - _class_sums(X, label[:n], 2, 12)[0]
    assert (change**2).sum() <= 4**12
    assert np.array_equal(change[label[n]], _class_sums(row[None], np.zeros(1), 1, 12)[0][0])
    assert not change[1 - label[n]].any()


def test_products_do_not_depend_on_other_rows():
    """A plain matrix product does on some machines: that is the side channel which multiply_rows closes."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((65, 300)), rng.standard_normal((300, 50))
    whole = multiply_rows(x, weight)
    assert np.abs(whole - x @ weight).max() < 1e-9
    for size in (1, 3, 16, 64):
        assert np.array_equal(multiply_rows(x[:size], weight), whole[:size])
        assert np.array_equal(multiply_rows(np.asfortranarray(x[-size:]), weight), whole[-size:])


def statistics(neighbour, scale=1.0, trials=4000):
    """Released root counts of a tree of one leaf level, the sharpest statistic there is, for one data set."""
    X = np.full((5 + neighbour, 1), 0.9)
    noise = [add_noise(np.zeros((1, 3)), epsilon=1.0 / scale, l1=2, l2_squared=2, source="exact")[0] for _ in range(1)]
    assert noise[0].shape == (1, 3)
    draws = add_noise(np.zeros((trials, 3)), epsilon=1.0 / scale, l1=2, l2_squared=2, source="exact")[0]
    clean = release_tree(X, 0.0, bounds=(0.0, 1.0), grid_size=1)[0]
    return clean[1] + draws[:, 0] + clean[3] + draws[:, 2]


def test_audit_finds_no_more_than_epsilon_and_catches_broken_noise():
    lower = audit_epsilon(statistics(0, trials=100_000), statistics(1, trials=100_000))
    assert 0.4 < lower <= 1.0
    broken = audit_epsilon(statistics(0, 0.25, trials=100_000), statistics(1, 0.25, trials=100_000))
    assert broken > 1.0
    assert audit_epsilon(np.zeros(200), np.zeros(200)) == 0.0


@pytest.mark.parametrize("kind", ["sum", "kde", "classifier"])
def test_audit_of_whole_estimators(kind):
    """Many fits on neighbouring data sets; the statistic is the likelihood ratio's direction for that structure."""
    X = np.full((6, 1), 0.9)
    near = X[:-1]
    common = {"epsilon": 1.0, "noise_source": "exact"}
    if kind == "sum":
        estimator = SUM(bounds=(0, 1), grid_size=1, method="bucket", **common)
        seen = [
            [e.fit(D).released_[0, 0, [1, 3]].sum() for _ in range(500)] for e, D in ((estimator, X), (estimator, near))
        ]
    elif kind == "kde":
        estimator = KDE(num_features=1, random_state=0, **common)
        seen = [[e.fit(D).sketch_[0] * e.count_ for _ in range(500)] for e, D in ((estimator, X), (estimator, near))]
    else:
        estimator = CLASSIFIER(delta=0.0, classes=[0, 1], **common)
        seen = [
            [e.fit(np.hstack([D, D]), np.arange(len(D)) % 2).centroids_[1].sum() for _ in range(500)]
            for e, D in ((estimator, X), (estimator, near))
        ]
    assert audit_epsilon(*map(np.array, seen)) <= 1.0


def test_audit_of_gaussian_noise():
    draws = [
        add_noise(np.full(50_000, k), epsilon=1.0, delta=1e-3, l1=1, l2_squared=1, source="exact")[0] for k in (0, 1)
    ]
    assert 0.1 < audit_epsilon(*draws, delta=1e-3) <= 1.0
    narrow = [k + discrete_gaussian(1, 50_000) for k in (0, 1)]
    assert audit_epsilon(*narrow, delta=1e-3) > 1.0


def test_repeated_queries_give_nothing_new():
    """Answers are a function of the released structure: asking a thousand times averages nothing out."""
    estimator = SUM(bounds=(0, 1)).fit(rows())
    answers = estimator.sum(np.full((3000, 3), 0.3))
    assert np.ptp(answers) == 0
    kde = KDE(random_state=0).fit(rows())
    assert np.ptp(kde.mean_similarity(np.full((3000, 3), 0.3))) < 1e-13


def test_noise_never_comes_from_the_seed():
    X = rows()
    a, b = (KDE(random_state=0).fit(X) for _ in range(2))
    assert np.array_equal(a.frequencies_, b.frequencies_)
    assert not np.array_equal(a.sketch_, b.sketch_)
    np.random.seed(0)  # noqa: NPY002 - an attacker who seeds the global generator gains nothing
    first = discrete_laplace(1e6, 8)
    np.random.seed(0)  # noqa: NPY002
    assert not np.array_equal(first, discrete_laplace(1e6, 8))


@pytest.mark.parametrize(
    "estimator", [SUM(bounds=(0, 1)), KDE(num_features=8), CLASSIFIER()], ids=lambda e: type(e).__name__
)
def test_nothing_but_the_release_is_kept(estimator):
    X = rows(50)
    X[17] = [0.123456789, 0.987654321, 0.55555]
    estimator = clone(estimator).fit(X, np.arange(50) % 2)
    blob = pickle.dumps(estimator) + b"".join(v.tobytes() for v in estimator.state_dict().values())
    assert X[17].tobytes()[:8] not in blob
    assert all(getattr(v, "shape", ()) != X.shape for v in vars(estimator).values())
    if isinstance(estimator, KDE):
        assert estimator.count_ != 50 or estimator.fit(X).count_ != 50 or estimator.fit(X).count_ != 50


@pytest.mark.parametrize(
    ("estimator", "ask"),
    [
        (SUM(bounds=(0, 1), metric="l2", project=4), "sum"),
        (SUM(bounds=(np.zeros(3), np.ones(3)), metric="sqeuclidean"), "sum"),
        (KDE(num_features=16, project=2), "mean_similarity"),
        (KDE(method="fgt", bounds=(0, 1), order=3), "score_samples"),
        (CLASSIFIER(), "decision_function"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else x,
)
def test_state_dict_round_trip(estimator, ask, tmp_path):
    from safetensors.numpy import load_file, save_file

    X = rows(60)
    fitted = clone(estimator).fit(X, np.arange(60) % 3)
    save_file(fitted.state_dict(), tmp_path / "release.safetensors")
    other = type(estimator)().load_state_dict(load_file(tmp_path / "release.safetensors"))
    assert np.array_equal(getattr(other, ask)(X), getattr(fitted, ask)(X))
    assert (other.epsilon_spent, other.noise_source_) == (fitted.epsilon_spent, fitted.noise_source_)
    assert other.expected_error() == fitted.expected_error()
    wrong = CLASSIFIER() if not isinstance(estimator, CLASSIFIER) else KDE()
    with pytest.raises(ValueError, match=r"`state` must be that of a"):
        wrong.load_state_dict(fitted.state_dict())
    with pytest.raises(ValueError, match=r"must hold arrays of .*, got X"):
        fitted.load_state_dict({**fitted.state_dict(), "X": X})
    with pytest.raises(ValueError, match=r"must hold 'settings'"):
        fitted.load_state_dict({})


# ---- the budget ------------------------------------------------------------------------------------------------------


def test_accountant_refuses_overspending_before_anything_is_released():
    accountant = PrivacyAccountant(1.0, 1e-5)
    estimator = SUM(epsilon=0.4, bounds=(0, 1), accountant=accountant).fit(rows())
    before = estimator.fit(rows()).released_
    with pytest.raises(ValueError, match=r"does not hold epsilon=0\.4, delta=0\.0: epsilon=0\.2"):
        estimator.fit(rows())
    assert estimator.released_ is before
    assert accountant.spent == (0.8, 0.0)
    with pytest.raises(ValueError, match=r"delta=0\.0001"):
        CLASSIFIER(epsilon=0.1, delta=1e-4, accountant=accountant).fit(rows(), np.arange(400) % 2)
    CLASSIFIER(epsilon=0.2, delta=1e-5, accountant=accountant).fit(rows(), np.arange(400) % 2)
    assert accountant.remaining == (0.0, 0.0)
    assert "spent (1.0, 1e-05)" in repr(accountant)


def test_a_refused_fit_charges_nothing():
    accountant = PrivacyAccountant(1.0)
    with pytest.raises(ValueError, match="outside"):
        SUM(bounds=(0, 0.5), accountant=accountant).fit(rows())
    assert accountant.spent == (0.0, 0.0)


def test_ten_tenths_are_one():
    accountant = PrivacyAccountant(1.0)
    for _ in range(10):
        accountant.charge(0.1)
    assert accountant.remaining == (0.0, 0.0)
    with pytest.raises(ValueError, match="does not hold"):
        accountant.charge(1e-9)


def test_clones_share_the_budget():
    accountant = PrivacyAccountant(1.0)
    model = KDE(epsilon=0.3, num_features=8, accountant=accountant)
    search = GridSearchCV(model, {"bandwidth": [0.5, 1.0]}, cv=2, error_score="raise")
    with pytest.raises(ValueError, match="does not hold"):
        search.fit(rows(40))
    assert accountant.spent[0] == pytest.approx(0.9)
    assert copy.deepcopy(accountant) is accountant
    assert copy.copy(accountant) is accountant
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(accountant)


def test_fits_without_an_accountant_are_independent_releases():
    estimator = SUM(bounds=(0, 1), epsilon=0.7)
    first = estimator.fit(rows()).released_
    assert not np.array_equal(estimator.fit(rows()).released_, first)
    assert estimator.epsilon_spent == 0.7


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (SUM(), r"`bounds` must be given.*not computed from the data"),
        (SUM(bounds=(0, 1, 2)), r"`bounds` must be \(low, high\)"),
        (SUM(bounds=(1, 0)), r"low < high in every feature"),
        (SUM(bounds=(0, 0.5)), r"row\(s\) outside, the first at row \d+, feature \d; pass clip=True"),
        (SUM(bounds=(0, 1), epsilon=0.0), r"`epsilon` must be a positive number, got 0\.0"),
        (SUM(bounds=(0, 1), epsilon=math.inf), r"`epsilon` must be a positive number, got inf"),
        (SUM(bounds=(0, 1), epsilon=math.nan), r"`epsilon` must be a positive number, got nan"),
        (SUM(bounds=(0, 1), delta=1.0), r"`delta` must be in \[0, 1\), got 1\.0"),
        (SUM(bounds=(0, 1), metric="l3"), r"`metric` must be one of"),
        (SUM(bounds=(0, 1), method="x"), r"`method` must be one of"),
        (SUM(bounds=(0, 1), neighbours="both"), r"`neighbours` must be one of"),
        (SUM(bounds=(0, 1), noise_source="mine"), r"`noise_source` must be one of"),
        (SUM(bounds=(0, 1), alpha=2.0), r"`alpha` must be in \(0, 1\], got 2\.0"),
        (SUM(bounds=(0, 1), p=0.0), r"`p` must be a positive number"),
        (SUM(bounds=(0, 1), grid_size=1 << 21), r"`grid_size` must be at most 2\^20"),
        (SUM(bounds=(0, 1), metric="l2", project=0), r"`project` must be a positive integer"),
        (SUM(bounds=(0, 1), grid_size=1023, epsilon=1e-12), r"noise scale must be below 2\^52"),
        (KDE("box"), r"`kernel` must be one of"),
        (KDE(method="tree"), r"`method` must be one of"),
        (KDE(bandwidth="scott"), r"`bandwidth` must be a public number: 'scott' would be computed from the rows"),
        (KDE(bandwidth=-1.0), r"`bandwidth` must be a positive number"),
        (KDE(num_features=0), r"`num_features` must be a positive integer"),
        (KDE(floor=0.0), r"`floor` must be a positive number"),
        (KDE("laplacian", project=2), r"`project` must be None for kernels of the l1 distance"),
        (KDE(bounds=(0, 0.5)), r"pass clip=True"),
        (KDE("cauchy", method="fgt", bounds=(0, 1)), r"'fgt' must have the Gaussian kernel"),
        (KDE(method="fgt"), r"`bounds` must be given"),
        (KDE(method="fgt", bounds=(0, 1), bandwidth=1e-3), r"at most 4 features and 2\^24 numbers"),
    ],
    ids=lambda x: None if not isinstance(x, str) else x[:40],
)
def test_refusals(estimator, message):
    source = {} if estimator.noise_source != "auto" else {"noise_source": "exact"}
    with pytest.raises(ValueError, match=message):
        estimator.set_params(**source).fit(rows())


def test_other_refusals():
    with pytest.raises(TypeError, match="`accountant` must be a PrivacyAccountant or None, got 1"):
        SUM(bounds=(0, 1), accountant=1).fit(rows())
    with pytest.raises(ValueError, match=r"labels of `classes` only, got \[3\]"):
        CLASSIFIER(classes=[0, 1]).fit(rows(4), [0, 1, 1, 3])
    with pytest.raises(ValueError, match="minimum of 1 is required"):
        SUM(bounds=(0, 1)).fit(np.empty((0, 3)))
    with pytest.raises(ValueError, match="NaN"):
        SUM(bounds=(0, 1)).fit([[math.nan]])
    fitted = SUM(bounds=(0, 1)).fit(rows())
    with pytest.raises(ValueError, match="expecting 3 features"):
        fitted.sum(rows(2, 4))
    for estimator, ask in ((SUM(), "sum"), (KDE(), "mean_similarity"), (CLASSIFIER(), "predict")):
        with pytest.raises(NotFittedError):
            getattr(estimator, ask)(rows())
        with pytest.raises(NotFittedError):
            estimator.state_dict()
        with pytest.raises(NotFittedError):
            _ = estimator.epsilon_spent
        with pytest.raises(NotFittedError):
            estimator.expected_error()
    with pytest.raises(ValueError, match=r"'inverse' in 3 dimension\(s\) has none"):
        KDE("inverse", num_features=4).fit(rows()).score_samples(rows())
    assert np.isfinite(KDE("cauchy", num_features=64).fit(rows(50, 1)).score_samples(rows(5, 1))).all()
    with pytest.raises(ValueError, match="at least 100 releases"):
        audit_epsilon(np.zeros(5), np.zeros(500))
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\)"):
        audit_epsilon(np.zeros(500), np.zeros(500), confidence=1.0)
    with pytest.raises(ValueError, match=r"`delta` must be in \(0, 1\) for Gaussian noise"):
        zcdp_budget(1.0, 0.0)
    with pytest.raises(ValueError, match="`scale` must be a positive number"):
        discrete_laplace(0.0, 3)
    with pytest.raises(ValueError, match=r"`sigma` must be at most 2\^25"):
        discrete_gaussian(1 << 26, 3)
    with pytest.raises(TypeError, match="`sigma` must be an integer"):
        discrete_gaussian(1.5, 3)
    with pytest.raises(ValueError, match=r"`X` must lie in \[0, 3\]"):
        release_fgt(np.array([[7.0]]), 0.0, width=4, order=3)
    with pytest.raises(ValueError, match="`high` must be above `low`"):
        inverse_mixture(low=1.0, high=0.0)
    with pytest.raises(ValueError, match="`epsilon` must be a positive"):
        PrivacyAccountant(-1.0)


@pytest.mark.parametrize("estimator", [KDE(delta=0.1), CLASSIFIER(delta=0.1)], ids=["kde", "classifier"])
def test_a_large_delta_is_warned_of(estimator):
    with pytest.warns(UserWarning, match=r"delta = 0\.1 is not below 1 / n"):
        estimator.fit(rows(50), np.arange(50) % 2)


def test_opendp_missing_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opendp.prelude", None)
    with pytest.raises(ImportError, match=r"pip install 'dynakern\[private\]'"):
        add_noise(np.zeros(2), epsilon=1.0, l1=1, l2_squared=1, source="opendp")


def test_truncation_is_post_processing():
    X = rows(20, 1)
    assert SUM(bounds=(0, 1), epsilon=0.01, truncate=True).fit(X).sum(rows(200, 1)).min() >= 0
    similarity = KDE(epsilon=0.01, truncate=True).fit(X).mean_similarity(rows(200, 1) * 50)
    assert similarity.min() >= 0
    assert similarity.max() <= 1
