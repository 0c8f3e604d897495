"""Kernel densities: scikit-learn's protocol and numbers, the phases, the exact means, the command."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.neighbors import KernelDensity
from sklearn.utils.estimator_checks import parametrize_with_checks

from dynakern.data import sample
from dynakern.data.tables import read_sample_table
from dynakern.similarity import HighDimKDE, kde_phases
from dynakern.similarity.density import density, expected_log_partition, expected_participation
from dynakern.similarity.density.command import main

KERNELS = ("gaussian", "epanechnikov", "exponential", "tophat")
GOLDEN = Path(__file__).parents[1] / "goldens" / "data" / "kde" / "sk_kde_d16.safetensors"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 3))


@parametrize_with_checks([HighDimKDE(), HighDimKDE("tophat", 2.0), HighDimKDE(algorithm="tree")])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize("kernel", KERNELS)
def test_exact_sums_of_scikit_learn_in_16_dimensions(kernel):
    golden = load_file(GOLDEN)
    data, query = golden["in.data"], golden["in.query"]
    for h in golden["in.bandwidth"]:
        exact = KernelDensity(kernel=kernel, bandwidth=h, algorithm="kd_tree", leaf_size=len(data)).fit(data)
        ours, theirs = HighDimKDE(kernel, float(h)).fit(data).score_samples(query), exact.score_samples(query)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
        seen = np.isfinite(theirs)
        np.testing.assert_allclose(ours[seen], theirs[seen], rtol=1e-11)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_density_integrates_to_one(kernel):
    kde = HighDimKDE(kernel, 0.4).fit(X[:20, :1])
    grid = np.linspace(-12, 12, 20_001)
    assert np.trapezoid(np.exp(kde.score_samples(grid[:, None])), grid) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_count_points(kernel):
    weight = np.random.default_rng(1).integers(0, 4, len(X))
    kde = HighDimKDE(kernel, 1.5).fit(X, sample_weight=weight)
    repeated = HighDimKDE(kernel, 1.5).fit(np.repeat(X, weight, axis=0))
    np.testing.assert_allclose(kde.score_samples(X[:9]), repeated.score_samples(X[:9]), rtol=1e-12)
    assert kde.score(X[:9]) == pytest.approx(kde.score_samples(X[:9]).sum())


def test_leave_one_out_is_what_it_says_and_is_maximised():
    kde = HighDimKDE().fit(X)
    rows = [HighDimKDE(bandwidth=0.6).fit(np.delete(X, i, 0)).score_samples(X[i : i + 1])[0] for i in range(len(X))]
    assert kde.leave_one_out([0.6])[0] == pytest.approx(np.mean(rows), rel=1e-12)
    around = kde.leave_one_out(kde.bandwidth_ * np.array([0.97, 1.0, 1.03]))
    assert around.argmax() == 1
    for kernel in ("epanechnikov", "tophat"):
        assert np.isfinite(HighDimKDE(kernel).fit(X).leave_one_out([HighDimKDE(kernel).fit(X).bandwidth_]))


def test_rules():
    n, d = X.shape
    mean_variance = np.sqrt(X.var(0).mean())
    assert HighDimKDE(bandwidth="scott").fit(X).bandwidth_ == pytest.approx(mean_variance * n ** (-1 / (d + 4)))
    silverman = mean_variance * (n * (d + 2) / 4) ** (-1 / (d + 4))
    assert HighDimKDE(bandwidth="silverman").fit(X).bandwidth_ == pytest.approx(silverman)
    wide = np.random.default_rng(2).normal(size=(3000, 60))
    rem = HighDimKDE(bandwidth="rem").fit(wide).bandwidth_
    assert rem == pytest.approx(kde_phases(np.log(3000) / 60).h_opt, rel=0.03)
    assert HighDimKDE(bandwidth="rem").fit(3 * wide).bandwidth_ == pytest.approx(3 * rem, rel=1e-6)


@pytest.mark.parametrize(
    ("alpha", "h_g", "h_clt", "h_opt", "least"),
    [
        (0.05, 1.73306, 2.45092, 1.14588, 0.18618),
        (0.3, 0.86774, 1.22717, 0.78361, 0.05616),
        (2, 0.13537, 0.19144, 0.13535, 8.19e-5),
    ],
)
def test_phases_of_isotropic_data(alpha, h_g, h_clt, h_opt, least):
    phases = kde_phases(alpha)
    np.testing.assert_allclose([phases.h_g, phases.h_clt, phases.h_opt], [h_g, h_clt, h_opt], atol=6e-6)
    assert float(phases.kl(phases.h_opt)) == pytest.approx(least, rel=1e-3)
    assert float(phases.kl(phases.h_g * (1 - 1e-9))) == pytest.approx(float(phases.kl(phases.h_g)), rel=1e-6)
    near = phases.kl(phases.h_opt * np.array([0.99, 1, 1.01]))
    assert near.argmin() == 1
    assert phases.participation(phases.h_g * np.array([0.5, 2.0])).tolist() == pytest.approx([0.75, 0.0])


def test_exact_means_agree_with_monte_carlo():
    d, n, h = 20, 500, 1.1
    rng = np.random.default_rng(3)
    draws = []
    for _ in range(150):
        kde = HighDimKDE(bandwidth=h).fit(rng.normal(size=(n, d)))
        sums = kde._sums(np.ones((1, d)), [h])
        draws.append((float(sums.log_sum), float(sums.participation)))
    mean, error = np.mean(draws, 0), np.std(draws, 0) / np.sqrt(150)
    setting = {"n": n, "d": d, "x_norm2": float(d)}
    assert abs(expected_log_partition(h, **setting) - mean[0]) < 4 * error[0]
    assert abs(expected_participation(h, **setting) - mean[1]) < 4 * error[1]


def test_diagnosis_tells_the_regimes_apart():
    rng = np.random.default_rng(4)
    points, queries = rng.normal(size=(4000, 60)), rng.normal(size=(60, 60))
    h_g = kde_phases(np.log(4000) / 60).h_g
    wide = HighDimKDE(bandwidth=3 * h_g).fit(points).diagnose(queries)
    assert wide.regime == "clt"
    assert wide.effective_points > 100
    with pytest.warns(UserWarning, match="condensed: at the median query"):
        narrow = HighDimKDE(bandwidth=0.4 * h_g).fit(points).diagnose(queries)
    assert narrow.regime == "condensed"
    assert narrow.mu < 1
    assert narrow.h_g == pytest.approx(wide.h_g, rel=0.01)  # whatever the bandwidth it is read off at


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_have_the_density(kernel):
    kde = HighDimKDE(kernel, 0.8).fit([[0.0] * 4, [90.0] * 4])
    drawn = kde.sample(20_000, random_state=0)
    near = drawn[drawn[:, 0] < 45]
    assert len(near) == pytest.approx(10_000, abs=400)
    reference = KernelDensity(kernel=kernel, bandwidth=0.8).fit(np.zeros((2, 4)))
    inside = HighDimKDE(kernel, 0.8).fit(np.zeros((2, 4))).score_samples(near)
    assert np.isfinite(inside).all()
    radius = np.linalg.norm(near, axis=1)
    grid = np.linspace(1e-3, 30, 9000)
    law = np.exp(reference.score_samples(np.stack([grid, *[0 * grid] * 3], 1))) * grid**3
    assert radius.mean() == pytest.approx((law * grid).sum() / law.sum(), rel=0.02)


def test_conditional_draws_follow_the_known_features():
    kde = HighDimKDE(bandwidth=0.1).fit([[0.0, 5.0], [1.0, -5.0]])
    drawn = kde.sample_conditional([[0.02, np.nan], [np.nan, -5.0]], 50, random_state=0)
    assert np.abs(drawn[0, :, 1] - 5).max() < 1
    assert (drawn[0, :, 0] == 0.02).all()
    assert np.abs(drawn[1, :, 0] - 1).max() < 1
    with pytest.raises(NotImplementedError, match="need kernel='gaussian', got 'tophat'"):
        HighDimKDE("tophat", 1.0).fit(X).sample_conditional(X[:1])


def test_the_command_reads_a_file_and_draws(tmp_path, capsys):
    picture = tmp_path / "curve.png"
    assert main([str(sample("uci/yacht.txt")), "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "231 rows of 7 standardised features" in out
    assert "regime at the median held-out row:" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert list(tmp_path.iterdir()) == [picture]
    with pytest.raises(ValueError, match="`--out` must be one of"):
        main(["sklearn:iris", "--out", str(tmp_path / "x.doc")])
    with pytest.raises(ValueError, match="`bandwidth` must be one of"):
        main(["sklearn:iris", "--bandwidth", "silvermann", "--out", str(picture)])


def test_factory_competes_with_scikit_learn():
    table = read_sample_table("sklearn:wine", supervised=False).features
    table = (table - table.mean(0)) / table.std(0)
    ours = density(features=13, random_state=0).fit(table[::2]).score(table[1::2])
    assert ours > KernelDensity(bandwidth=0.3).fit(table[::2]).score(table[1::2])


def test_refusals():
    for estimator, message in (
        (HighDimKDE("gauss"), "`kernel` must be one of"),
        (HighDimKDE(bandwidth="scot"), "Did you mean 'scott'"),
        (HighDimKDE(bandwidth=0.0), "`bandwidth` must be a positive number"),
        (HighDimKDE(algorithm="ball"), "`algorithm` must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.fit(X)
    with pytest.raises(ValueError, match="needs points that differ, got 5 equal ones"):
        HighDimKDE().fit(np.ones((5, 2)))
    with pytest.raises(ValueError, match="`sample_weight` must be non-negative and not all zero"):
        HighDimKDE().fit(X, sample_weight=-np.ones(len(X)))
    with pytest.raises(ValueError, match="`alpha` must be a positive number"):
        kde_phases(0.0)
    for spectrum in ((), (1.0, -1.0)):
        with pytest.raises(ValueError, match="`spectrum` must be one or more positive eigenvalues"):
            kde_phases(0.1, spectrum)
    with pytest.raises(ValueError, match="`h` must be positive numbers"):
        kde_phases(0.1).kl(-1.0)
    with pytest.raises(TypeError, match="`n` must be an integer"):
        expected_participation(1.0, n=2.5, d=3, x_norm2=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HighDimKDE(bandwidth=1).fit(X).bandwidth_ == 1.0
