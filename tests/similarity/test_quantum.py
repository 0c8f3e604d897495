"""Quantum kernels: states against products of gates, shots within sigmas, repair, both classifiers, the data set."""

from __future__ import annotations

import warnings
from functools import reduce

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import WhiteKernel
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from dynakern.similarity import (
    PauliFeatureMap,
    QuantumKernel,
    QuantumKernelClassifier,
    VariationalQuantumClassifier,
    ZFeatureMap,
    ZZFeatureMap,
    ad_hoc_data,
    psd_repair,
)
from dynakern.similarity.quantum import (
    align_scale,
    apply_ansatz,
    classify,
    diagnose,
    entangling_sets,
    kernel_alignment,
    parity,
)

RNG = np.random.default_rng(0)
X = RNG.uniform(0, 2 * np.pi, (12, 3))
Y = RNG.uniform(0, 2 * np.pi, (7, 3))


# The checks' data are no angles, and some of their data sets are wide.
@pytest.mark.filterwarnings("ignore:`X` spans:UserWarning")
@pytest.mark.filterwarnings("ignore:`Y` spans:UserWarning")
@parametrize_with_checks(
    [
        QuantumKernelClassifier(),
        QuantumKernelClassifier(scale="align", shots=5000, random_state=0),
        VariationalQuantumClassifier(steps=20, restarts=1, depth=1),
    ],
    expected_failed_checks=lambda estimator: (
        {
            "check_methods_sample_order_invariance": "outcomes are drawn in the order of the samples",
            "check_methods_subset_invariance": "outcomes are drawn in the order of the samples",
        }
        if getattr(estimator, "scale", None) == "align"
        else {"check_classifiers_train": "standardised blobs are no angles: on two qubits they overlap"}
    ),
)
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


# Feature maps.


def test_zz_states_are_the_papers_phases():
    """One layer of the map has amplitudes exp(-i phase) / sqrt(2^n), the phases written out."""
    k = np.arange(8)
    signs = 1 - 2 * ((k[:, None] >> np.arange(3)) & 1)
    for entanglement, pairs in (("full", [(0, 1), (0, 2), (1, 2)]), ("linear", [(0, 1), (1, 2)]), ([(2, 0)], [(2, 0)])):
        phase = X @ signs.T
        for i, j in pairs:
            phase += ((np.pi - X[:, i]) * (np.pi - X[:, j]))[:, None] * signs[:, i] * signs[:, j]
        found = ZZFeatureMap(reps=1, entanglement=entanglement).states(X)
        np.testing.assert_allclose(found, np.exp(-1j * phase) / np.sqrt(8), atol=1e-13)


def test_z_kernel_is_a_product_over_features():
    found = QuantumKernel(ZFeatureMap(reps=2))(X, Y)
    single = QuantumKernel(ZFeatureMap(reps=2))
    product = reduce(np.multiply, (single(X[:, [q]], Y[:, [q]]) for q in range(3)))
    np.testing.assert_allclose(found, product, atol=1e-13)
    # One layer of one qubit: cos(x - z)^2.
    np.testing.assert_allclose(
        QuantumKernel(ZFeatureMap(reps=1))(X[:, :1], Y[:, :1]), np.cos(X[:, :1] - Y[:, 0]) ** 2, atol=1e-13
    )


def test_pauli_words_apply_to_their_qubits_in_order():
    pauli = {
        "I": np.eye(2),
        "X": np.array([[0, 1], [1, 0]]),
        "Y": np.array([[0, -1j], [1j, 0]]),
        "Z": np.diag([1.0, -1.0]),
    }
    x, n = X[0], 3
    state = np.ones(8, dtype=complex) / np.sqrt(8)  # reps=1
    for word, group in [("ZY", (0, 1)), ("ZY", (1, 2)), ("X", (0,)), ("X", (1,)), ("X", (2,))]:
        letters = dict(zip(group, reversed(word), strict=True))
        matrix = reduce(np.kron, [pauli[letters.get(q, "I")] for q in reversed(range(n))])
        angle = x[group[0]] if len(group) == 1 else np.prod(np.pi - x[list(group)])
        state = np.cos(0.65 * angle) * state - 1j * np.sin(0.65 * angle) * matrix @ state
    found = PauliFeatureMap(paulis=("ZY", "X"), reps=1, entanglement="linear", alpha=1.3).states(X[:1])[0]
    np.testing.assert_allclose(found, state, atol=1e-13)


def test_entangling_sets():
    assert entangling_sets("full", 2, 3) == ((0, 1), (0, 2), (1, 2))
    assert entangling_sets("circular", 2, 4) == ((3, 0), (0, 1), (1, 2), (2, 3))
    assert entangling_sets("circular", 2, 2) == ((0, 1),)
    assert entangling_sets("circular", 3, 4)[:2] == ((2, 3, 0), (3, 0, 1))
    assert entangling_sets("reverse_linear", 2, 3) == ((1, 2), (0, 1))
    assert entangling_sets("pairwise", 2, 5) == ((0, 1), (2, 3), (1, 2), (3, 4))
    assert entangling_sets("sca", 2, 3, layer=1) == ((2, 1), (0, 2), (1, 0))
    assert entangling_sets({2: [[0, 2]]}, 2, 3) == ((0, 2),)
    assert entangling_sets({2: [[0, 2]]}, 1, 3) == ()
    assert entangling_sets([[0, 2]], 1, 3) == ((0,), (1,), (2,))


def test_map_refusals():
    with pytest.raises(ValueError, match="`entanglement` must be one of 'full'"):
        ZZFeatureMap(entanglement="ful")
    with pytest.raises(ValueError, match=r"2 different qubits below 3, got \(1, 1\)"):
        ZZFeatureMap(entanglement=[[1, 1]]).states(X)
    with pytest.raises(ValueError, match=r"2 different qubits below 3, got \(0, 3\)"):
        ZZFeatureMap(entanglement=[[0, 3]]).states(X)
    with pytest.raises(ValueError, match="'pairwise' is for words of at most 2"):
        PauliFeatureMap(paulis=("ZZZ",), entanglement="pairwise").states(X)
    with pytest.raises(ValueError, match="`paulis` must be words of I, X, Y and Z, not of I alone, got 'ZA'"):
        PauliFeatureMap(paulis=("ZA",))
    with pytest.raises(ValueError, match="`paulis` must hold at least one word"):
        PauliFeatureMap(paulis=())
    with pytest.raises(ValueError, match=r"at most as long as the 3 qubit\(s\), got 'ZZZZ'"):
        PauliFeatureMap(3, ("ZZZZ",))
    with pytest.raises(ValueError, match=r"`n_qubits` = 21 needs 0\.031 GB a state; pass allow_large=True"):
        ZZFeatureMap(21)
    assert ZZFeatureMap(21, allow_large=True).n_qubits == 21
    with pytest.raises(ValueError, match="must have n_qubits = 2 features, got 3"):
        ZZFeatureMap(2).states(X)
    with pytest.raises(ValueError, match=r"`X` must be \(N, n_qubits\), got shape \(3,\)"):
        ZZFeatureMap().states(X[0])
    with pytest.raises(ValueError, match="`X` must be finite"):
        ZZFeatureMap().states(X * np.nan)
    with pytest.raises(ValueError, match="`reps` must be a positive integer"):
        ZZFeatureMap(reps=0)
    with pytest.raises(ValueError, match="`alpha` must be a positive number"):
        ZZFeatureMap(alpha=-1.0)


def test_maps_show_and_compare_their_settings():
    assert repr(ZFeatureMap(3)) == "ZFeatureMap(n_qubits=3, reps=2, alpha=2.0)"
    assert ZZFeatureMap(3) == ZZFeatureMap(3)
    assert ZZFeatureMap(3) != ZZFeatureMap(3, reps=1)


# The kernel.


def test_kernel_is_the_fidelity_of_the_states():
    feature_map = PauliFeatureMap(paulis=("Z", "YX"))
    a, b = feature_map.states(X), feature_map.states(Y)
    kernel = QuantumKernel(feature_map)
    np.testing.assert_allclose(kernel(X, Y), np.abs(a.conj() @ b.T) ** 2, atol=1e-14)
    K = kernel(X)
    np.testing.assert_array_equal(K, K.T)
    np.testing.assert_allclose(np.diag(K), 1.0, rtol=1e-13)
    np.testing.assert_allclose(kernel.diag(X), 1.0)
    assert np.linalg.eigvalsh(K)[0] > -1e-13
    np.testing.assert_array_equal(kernel(X, X), K)
    assert not kernel.is_stationary()


def test_blocks_of_states_change_nothing(monkeypatch):
    from dynakern.similarity.quantum import kernel as module

    expected, cross = QuantumKernel()(X), QuantumKernel()(X, Y)
    monkeypatch.setattr(module, "_BLOCK", 5 * 8)
    np.testing.assert_allclose(QuantumKernel()(X), expected, atol=1e-14)
    np.testing.assert_allclose(QuantumKernel()(X, Y), cross, atol=1e-14)


def test_tensors_carry_gradients():
    x = torch.from_numpy(X[:3, :2].copy()).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: QuantumKernel()(a, torch.from_numpy(Y[:2, :2])), (x,))
    assert torch.autograd.gradcheck(QuantumKernel(PauliFeatureMap(paulis=("X", "ZY"))), (x,))
    assert QuantumKernel()(x.detach().float()).dtype == torch.float32


def test_scale_is_learned_by_a_gaussian_process():
    kernel = QuantumKernel(ZFeatureMap(), scale=0.3, scale_bounds=(0.05, 1.0))
    step = 1e-6
    _, gradient = kernel(X, eval_gradient=True)
    upper, lower = (kernel.clone_with_theta(kernel.theta + sign * step)(X) for sign in (1, -1))
    np.testing.assert_allclose(gradient[..., 0], (upper - lower) / (2 * step), atol=1e-7)
    values = np.cos(0.2 * X).sum(1)
    process = GaussianProcessRegressor(kernel + WhiteKernel(1e-4, "fixed"), random_state=0).fit(X, values)
    fixed = GaussianProcessRegressor(QuantumKernel(ZFeatureMap(), scale=0.3) + WhiteKernel(1e-4, "fixed")).fit(
        X, values
    )
    assert process.log_marginal_likelihood_value_ > fixed.log_marginal_likelihood_value_


def test_shots_are_binomial_and_symmetric():
    kernel = QuantumKernel(shots=500, random_state=0)
    p, K = QuantumKernel()(X), kernel(X)
    np.testing.assert_array_equal(K, K.T)
    np.testing.assert_array_equal(np.diag(K), 1.0)
    np.testing.assert_array_equal(kernel.diag(X), 1.0)
    np.testing.assert_array_equal(K, kernel(X))
    np.testing.assert_array_equal(K, kernel(X, X))
    np.testing.assert_allclose(K * 500, np.round(K * 500), atol=1e-9)
    cross = np.mean([QuantumKernel(shots=500, random_state=seed)(X, Y) for seed in range(100)], 0)
    exact = QuantumKernel()(X, Y)
    sigma = np.sqrt(exact * (1 - exact) / 50_000) + 1e-12
    assert np.abs((cross - exact) / sigma).max() < 5
    assert np.abs((K - p)[np.triu_indices(12, 1)]).max() < 5 * np.sqrt(0.25 / 500)
    with pytest.raises(ValueError, match="no gradient; use shots=None"):
        QuantumKernel(shots=10)(torch.from_numpy(X).requires_grad_())
    with pytest.raises(ValueError, match="no gradient; use shots=None"):
        QuantumKernel(shots=1000, scale_bounds=(0.1, 1.0))(X, eval_gradient=True)


def test_depolarising_noise():
    exact, noisy = QuantumKernel(), QuantumKernel(depolarizing=0.2)
    np.testing.assert_allclose(noisy(X, Y), 0.8 * exact(X, Y) + 0.2 / 8, rtol=1e-13)
    np.testing.assert_allclose(noisy.diag(X), np.diag(noisy(X)))
    np.testing.assert_allclose(QuantumKernel(depolarizing=1.0)(X), 1 / 8)


def test_algebra_and_estimators():
    kernel = 0.5 * QuantumKernel() + QuantumKernel(ZFeatureMap()) ** 2
    np.testing.assert_allclose(kernel(X), 0.5 * QuantumKernel()(X) + QuantumKernel(ZFeatureMap())(X) ** 2)
    assert clone(QuantumKernel(ZZFeatureMap(3))) == QuantumKernel(ZZFeatureMap(3))
    assert repr(QuantumKernel(ZFeatureMap(3), shots=10)) == f"QuantumKernel({ZFeatureMap(3)!r}, scale=1, shots=10)"


def test_kernel_warns_and_refuses():
    with pytest.warns(UserWarning, match=r"`X` spans 12.* in a feature, more than 2 pi"):
        QuantumKernel()(np.array([[0.0], [12.5]]))
    wide = RNG.uniform(0, 2 * np.pi, (20, 8))
    with pytest.warns(UserWarning, match="The kernel is concentrated"):
        QuantumKernel(shots=50, random_state=0)(wide)
    with pytest.raises(ValueError, match="`X` must be finite"):
        QuantumKernel()(X * np.inf)
    with pytest.raises(ValueError, match="must have n_qubits = 2 features, got 3"):
        QuantumKernel(ZZFeatureMap(2))(X)
    with pytest.raises(ValueError, match=r"`X` must be \(N, n_qubits\), got shape \(1, 12, 3\)"):
        QuantumKernel()(X[None])
    with pytest.raises(ValueError, match="`shots` must be a positive integer, got 0"):
        QuantumKernel(shots=0)(X)
    with pytest.raises(ValueError, match=r"`depolarizing` must be in \[0, 1\], got 1.5"):
        QuantumKernel(depolarizing=1.5)(X)
    with pytest.raises(ValueError, match="`scale` must be a positive number"):
        QuantumKernel(scale=0.0)(X)


# Repair, alignment, diagnosis.


def test_psd_repair():
    K = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.9], [0.1, 0.9, 1.0]])
    least = np.linalg.eigvalsh(K)[0]
    assert least < 0
    clipped, shifted = psd_repair(K), psd_repair(K, "shift")
    values, vectors = np.linalg.eigh(K)
    np.testing.assert_allclose(clipped, vectors @ np.diag(np.maximum(values, 0)) @ vectors.T, atol=1e-14)
    np.testing.assert_allclose(shifted, K - least * np.eye(3))
    assert np.linalg.eigvalsh(clipped)[0] > -1e-15
    good = QuantumKernel(depolarizing=0.1)(X) + np.eye(12)
    assert psd_repair(good) is good
    with pytest.raises(ValueError, match="`method` must be one of 'clip', 'shift'"):
        psd_repair(K, "flip")
    with pytest.raises(ValueError, match="`K` must be a square matrix"):
        psd_repair(K[:2])
    with pytest.raises(ValueError, match=r"`K` must be symmetric, got entries that differ by 0\.9"):
        psd_repair(np.triu(K))
    with pytest.raises(ValueError, match="`K` must be finite"):
        psd_repair(K * np.nan)


def test_alignment_and_scale():
    y = np.repeat([0, 1], 6)
    assert kernel_alignment((y[:, None] == y).astype(float), y) == pytest.approx(1.0)
    assert kernel_alignment(np.ones((12, 12)), y) == 0.0
    with pytest.raises(ValueError, match=r"`K` must be \(12, 12\)"):
        kernel_alignment(np.eye(3), y)
    # Labels that alternate slowly need a small scale.
    x = np.linspace(0, 2 * np.pi, 40)[:, None]
    labels = x[:, 0] > np.pi
    found = align_scale(QuantumKernel(ZFeatureMap()), x, labels)
    assert found.scale < 1
    candidates = np.geomspace(0.05, 3.0, 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = max(kernel_alignment(QuantumKernel(ZFeatureMap(), scale=s)(x), labels) for s in candidates)
    assert kernel_alignment(found(x), labels) > best - 1e-3
    with pytest.raises(ValueError, match="`bounds` must be two increasing positive numbers"):
        align_scale(QuantumKernel(), X, y, bounds=(1.0, 0.1))


def test_diagnosis_reports_concentration():
    rng = np.random.default_rng(1)
    means = []
    for n in (2, 4, 6, 8):
        report = diagnose(QuantumKernel(), rng.uniform(0, 2 * np.pi, (60, n)), shots=100)
        means.append(report.mean)
        assert report.n_qubits == n
        assert report.mean > report.floor
        assert 1 <= report.effective_rank <= 60
        assert report.shots_needed == int(np.ceil(3 / report.mean))
        assert report.is_concentrated == (report.mean < 0.03)
    assert means == sorted(means, reverse=True)
    exact = diagnose(QuantumKernel(), X, np.repeat([0, 1], 6))
    assert exact.unusable == 0
    assert not exact.is_concentrated
    assert exact.alignment == kernel_alignment(QuantumKernel()(X), np.repeat([0, 1], 6))
    same = diagnose(QuantumKernel(), np.zeros((5, 2)))
    assert same.mean == pytest.approx(1.0)
    assert same.effective_rank == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        diagnose(QuantumKernel(), X[:1])
    with pytest.raises(ValueError, match="`shots` must be a positive integer"):
        diagnose(QuantumKernel(), X, shots=0)


# Classifiers.


@pytest.fixture(scope="module")
def data():
    return ad_hoc_data(2, n_per_class=20, n_test_per_class=100, random_state=1)


def test_kernel_classifier(data):
    train, y, test, y_test = data
    machine = QuantumKernelClassifier().fit(train, y)
    assert machine.score(test, y_test) > 0.97
    by_hand = SVC(kernel=QuantumKernel(), C=1e3).fit(train, y)
    np.testing.assert_array_equal(machine.predict(test), by_hand.predict(test))
    np.testing.assert_allclose(machine.decision_function(test), by_hand.decision_function(test), atol=1e-6)
    for repair in ("clip", "shift", None):
        noisy = QuantumKernelClassifier(shots=1000, psd=repair, random_state=0).fit(train, y)
        assert noisy.score(test, y_test) > 0.95
        np.testing.assert_array_equal(noisy.predict(test), noisy.predict(test))
    assert QuantumKernelClassifier(max_samples=10, random_state=0).fit(train, y)._count == 10
    with pytest.raises(ValueError, match="`psd` must be one of"):
        QuantumKernelClassifier(psd="flip").fit(train, y)
    with pytest.raises(ValueError, match="`scale` must be one of 'align'"):
        QuantumKernelClassifier(scale="best").fit(train, y)
    with pytest.raises(ValueError, match="`max_samples` must be a positive integer"):
        QuantumKernelClassifier(max_samples=0).fit(train, y)


def test_competitor_on_real_data():
    x, y = load_iris(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    assert classify(features=4, random_state=0).fit(x[::2], y[::2]).score(x[1::2], y[1::2]) > 0.9
    rng = np.random.default_rng(0)
    wide = np.concatenate([x, 0.1 * rng.normal(size=(150, 10))], 1)
    assert classify(features=14, random_state=0).fit(wide[::2], y[::2]).score(wide[1::2], y[1::2]) > 0.8


def test_ansatz_is_the_product_of_its_gates():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(3, 3, 2))

    def rotation(t, axis):
        half = t / 2
        if axis == "y":
            return np.array([[np.cos(half), -np.sin(half)], [np.sin(half), np.cos(half)]])
        return np.diag(np.exp([-1j * half, 1j * half]))

    states = ZZFeatureMap().states(X)
    for entanglement, pairs in (("full", [(0, 1), (0, 2), (1, 2)]), ("linear", [(0, 1), (1, 2)]), ([(2, 0)], [(2, 0)])):
        k = np.arange(8)
        sign = np.prod([1 - 2 * ((k >> i) & (k >> j) & 1) for i, j in pairs], 0)
        W = np.eye(8)
        for layer, angles in enumerate(theta):
            W = (sign[:, None] * W) if layer else W
            W = reduce(np.kron, [rotation(z, "z") @ rotation(y, "y") for y, z in angles[::-1]]) @ W
        for part in (states, states[:3]):  # more and fewer states than amplitudes
            found = apply_ansatz(torch.from_numpy(part), torch.from_numpy(theta), entanglement).numpy()
            np.testing.assert_allclose(found, part @ W.T, atol=1e-13)
    both = apply_ansatz(torch.from_numpy(states), torch.from_numpy(np.stack([theta, -theta])))
    assert both.shape == (2, 12, 8)
    with pytest.raises(ValueError, match=r"`states` must be \(N, 2\^n\)"):
        apply_ansatz(torch.ones(2, 3, dtype=torch.complex128), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"`theta` must be \(..., depth \+ 1, 3, 2\)"):
        apply_ansatz(torch.from_numpy(states), torch.zeros(1, 2, 2))


def test_gradient_is_that_of_the_parameter_shift():
    states, theta = torch.from_numpy(ZZFeatureMap(2).states(X[:, :2])), torch.randn(2, 2, 2, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(lambda t: parity(apply_ansatz(states, t)), theta)
    for index in np.ndindex(2, 2, 2):
        shift = torch.zeros_like(theta)
        shift[index] = np.pi / 2
        up, down = (parity(apply_ansatz(states, theta + sign * shift)) for sign in (1, -1))
        torch.testing.assert_close(gradient[:, *index], (up - down) / 2)
    assert torch.autograd.gradcheck(lambda t: parity(apply_ansatz(states, t)), (theta.requires_grad_(),))


def test_variational_classifier(data):
    train, y, test, y_test = data
    circuit = VariationalQuantumClassifier(depth=2, restarts=2, random_state=0).fit(train, y)
    assert circuit.score(test, y_test) > 0.95
    assert circuit.risk_.shape == (2,)
    assert circuit.theta_.shape == (3, 2, 2)
    decision, p = circuit.decision_function(test), circuit.predict_proba(test)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_array_equal(p[:, 1] > 0.5, decision > 0)
    words = VariationalQuantumClassifier(depth=1, steps=20, restarts=1, random_state=0)
    names = words.fit(train, np.where(y > 0, "yes", "no"))
    assert set(names.predict(test)) <= {"no", "yes"}
    spsa = VariationalQuantumClassifier(depth=2, optimizer="spsa", steps=250, shots=2000, random_state=0)
    assert spsa.fit(train, y).score(test, y_test) > 0.9


def test_restarts_are_independent(data):
    """Side by side or alone, a start ends at the same risk."""
    train, y, *_ = data
    together = VariationalQuantumClassifier(depth=1, steps=15, restarts=3, random_state=0).fit(train, y)
    alone = VariationalQuantumClassifier(depth=1, steps=15, restarts=1, random_state=0).fit(train, y)
    np.testing.assert_allclose(together.risk_[0], alone.risk_[0], rtol=1e-9)


def test_variational_refusals(data):
    train, y, *_ = data
    for name, value in (("steps", 0), ("restarts", 0), ("shots", 0), ("depth", -1)):
        with pytest.raises(ValueError, match=f"`{name}` must be a"):
            VariationalQuantumClassifier(**{name: value}).fit(train, y)
    with pytest.raises(ValueError, match="`lr` must be a positive number"):
        VariationalQuantumClassifier(lr=0.0).fit(train, y)
    with pytest.raises(ValueError, match="`optimizer` must be one of 'adam', 'spsa'"):
        VariationalQuantumClassifier(optimizer="sgd").fit(train, y)
    with pytest.raises(
        ValueError, match=r"Only binary classification is supported\. The type of the target is multiclass"
    ):
        VariationalQuantumClassifier().fit(train, np.arange(40) % 3)
    with pytest.raises(ValueError, match="`y` must hold two classes, got only one class"):
        VariationalQuantumClassifier().fit(train, np.ones(40))


def test_ad_hoc_data_has_its_gap(data):
    train, y, test, y_test = data
    assert train.shape == (40, 2)
    assert test.shape == (200, 2)
    assert y.sum() == 0
    assert y_test.sum() == 0
    again = ad_hoc_data(2, n_per_class=20, n_test_per_class=100, random_state=1)
    np.testing.assert_array_equal(again[0], train)
    from scipy.stats import unitary_group

    V = unitary_group.rvs(4, random_state=1)
    e = (np.abs(ZZFeatureMap().states(test) @ V.T) ** 2) @ np.array([1, -1, -1, 1])
    assert (e * y_test).min() >= 0.3
    assert ad_hoc_data(3, gap=0.1, n_per_class=5, random_state=np.random.default_rng(0))[0].shape == (10, 3)
    with pytest.raises(ValueError, match=r"`gap` must be in \[0, 1\), got 1"):
        ad_hoc_data(gap=1)
    with pytest.raises(ValueError, match="`n_per_class` must be a positive integer"):
        ad_hoc_data(n_per_class=0)
    with pytest.raises(ValueError, match=r"`gap` = 0\.999 is too large for 2 qubits"):
        ad_hoc_data(gap=0.999, n_per_class=100_000, random_state=0)
