"""Deep kernel machines: limits, closed forms, gradients, both estimators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.distributions import MultivariateNormal, kl_divergence

from dynakern import load_official
from dynakern.data import sample
from dynakern.data.tables import read_sample_table
from dynakern.similarity.deep_kernel_machine import (
    DKMClassifier,
    DKMRegressor,
    FullDKM,
    GramKernel,
    GramLayer,
    GramNorm,
    GramState,
    SparseDKM,
    classify,
    convert_state_dict,
    regress,
)
from dynakern.testing import assert_same, randn

KERNELS = ("sqexp", "relu", "linear", "heaviside", "normalized_gaussian")
QUICK = {"num_inducing": 20, "epochs": 30, "layers": 1, "num_samples": 10, "random_state": 0}


@parametrize_with_checks([DKMClassifier(**QUICK), DKMRegressor(**QUICK)])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def state_of(points, batch):
    width = points.shape[1]
    return GramState(points @ points.T / width, batch @ points.T / width, batch.square().sum(1) / width)


@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_are_psd_consistent_and_differentiable(kind):
    x = randn(7, 3, requires_grad=False)
    kernel = GramKernel(kind, jitter=0.0)
    found = kernel(state_of(x, x))
    assert (torch.linalg.eigvalsh(found.ii) > -1e-9).all()
    assert_same(found.ii, found.ii.T)
    # The batch is the inducing points: acos keeps 1e-6 away from 0, so that its slope is finite.
    assert_same(found.ti, found.ii, rtol=1e-6)
    assert_same(found.t, found.ii.diagonal())
    jittered = GramKernel(kind)
    x, y = randn(4, 3), randn(3, 3, seed=1)
    torch.autograd.gradcheck(lambda a, b: tuple(jittered(state_of(a, b))), (x, y))


def test_relu_kernel_is_that_of_random_features():
    x = randn(2, 3, requires_grad=False)
    weights = randn(400_000, 3, seed=1, requires_grad=False)
    features = (x @ weights.T).relu()
    kernel = GramKernel("relu", jitter=0.0, weight_variance=1.0, bias_variance=1e-12)
    expected = 2 * features @ features.T / len(weights) / 3
    assert_same(kernel(state_of(x, x)).ii, expected, rtol=5e-3)


@pytest.mark.parametrize("form", ["cholesky", "full"])
def test_divergence_is_that_of_two_normals(form):
    a, b = (
        m @ m.T + torch.eye(5) for m in (randn(5, 5, requires_grad=False), randn(5, 5, seed=1, requires_grad=False))
    )
    layer = GramLayer(5, dof=2.5, form=form)
    layer.set(a)
    assert_same(layer.matrix.detach(), a)
    _, term = layer.requires_grad_(False)(
        GramState(b, randn(2, 5, requires_grad=False), torch.full((2,), 99.0, dtype=torch.float64))
    )
    zero = torch.zeros(5, dtype=torch.float64)
    assert float(term) == pytest.approx(
        -2.5 * float(kl_divergence(MultivariateNormal(zero, a), MultivariateNormal(zero, b)))
    )
    near = GramLayer(5, dof=1.0, form=form, taylor=True)
    near.set(b * (1 + 1e-3))
    _, taylor = near.requires_grad_(False)(
        GramState(b, randn(2, 5, requires_grad=False), torch.ones(2, dtype=torch.float64))
    )
    exact = kl_divergence(MultivariateNormal(zero, b * (1 + 1e-3)), MultivariateNormal(zero, b))
    assert float(-taylor) == pytest.approx(float(exact), rel=5e-3)


def test_gram_layer_is_the_conditional_of_gaussian_features():
    points, batch = randn(4, 3, requires_grad=False), randn(3, 3, seed=1, requires_grad=False)
    kernel = GramKernel("sqexp")(state_of(points, batch))
    g = randn(4, 4, seed=2, requires_grad=False)
    g = g @ g.T + torch.eye(4)
    layer = GramLayer(4)
    layer.set(g)
    found, _ = layer(kernel)
    a = kernel.ti @ torch.linalg.inv(kernel.ii)
    assert_same(found.ti.detach(), a @ g)
    expected = kernel.t - (a @ kernel.ti.T).diagonal() + (a @ g @ a.T).diagonal()
    assert_same(found.t.detach(), expected)


def test_infinite_dof_is_the_fixed_kernel_and_initial_machines_are_it():
    x, z = randn(6, 3, requires_grad=False), randn(5, 3, seed=1, requires_grad=False)
    options = {"num_inducing": 5, "layers": 2, "kernel": "relu"}
    fixed = SparseDKM(3, 1, dof=math.inf, **options).initialize(z)
    learned = SparseDKM(3, 1, dof=1.0, **options).initialize(z)
    for (_, a, _), (_, b, _) in zip(fixed.stages(x), learned.stages(x), strict=True):
        for one, other in zip(a, b, strict=True):
            assert_same(one.detach(), other.detach(), rtol=1e-8)


def test_norms_make_unit_diagonals_and_local_rows_are_independent():
    state = state_of(randn(5, 3, requires_grad=False), randn(4, 3, seed=1, requires_grad=False))
    local = GramNorm(5)(state)
    assert_same(local.ii.diagonal().detach(), torch.ones(5, dtype=torch.float64))
    assert_same(local.t.detach(), torch.ones(4, dtype=torch.float64))
    overall = GramNorm(5, ("global", "global", "global", "global"))(state)
    assert float(overall.t.mean().detach()) == pytest.approx(1.0)
    assert_same(GramNorm(5, (None, None, None, None))(state).ti, state.ti)
    model = SparseDKM(3, 2, num_inducing=5).initialize(randn(5, 3, requires_grad=False))
    x = randn(6, 3, seed=3, requires_grad=False)
    assert_same(model(x)[0][:2].detach(), model(x[:2])[0].detach())


@pytest.mark.parametrize("form", ["cholesky", "full"])
def test_objective_has_right_gradients(form):
    model = SparseDKM(2, 2, num_inducing=3, layers=1, kernel="relu", form=form, norms=None)
    model.initialize(randn(3, 2, requires_grad=False), randn(3, 2, seed=4, requires_grad=False))
    x = randn(4, 2, seed=1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = tuple(p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad)

    def run(x, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    torch.autograd.gradcheck(run, (x, *values))


def test_state_dicts_of_both_sources_load():
    model = SparseDKM(2, 1, num_inducing=3, layers=1, form="full", norms=None, kernel="sqexp")
    numbered = {"0.X": torch.ones(3, 2), "3.V": torch.eye(3), "3.latent_Gscale": torch.ones(1), "5.L": torch.eye(3)}
    numbered["5.mu"] = torch.ones(3, 1)
    assert set(convert_state_dict(numbered, model)) == set(model.state_dict())
    load_official(model, {key: value.double() for key, value in numbered.items()})
    assert float(model.f2g.Xi.sum().detach()) == 6
    again = SparseDKM(2, 1, num_inducing=3, layers=1, form="full", norms=None, kernel="sqexp")
    load_official(again, model.state_dict())
    assert_same(again.output.factor.detach(), model.output.factor.detach())


def test_full_machine_in_the_limit_of_large_nu_is_a_gaussian_process():
    x, y = randn(6, 2, requires_grad=False), randn(6, 3, seed=1, requires_grad=False)
    gram = x @ x.T / 2
    machine = FullDKM(gram, y, layers=1, dof=1e7, noise=0.1).optimize()
    fixed = machine._kernel(gram)
    assert_same(machine.grams[0].detach(), fixed, rtol=1e-4)
    normal = MultivariateNormal(torch.zeros(6).double(), machine._kernel(fixed) + 0.1 * torch.eye(6).double())
    start = FullDKM(gram, y, layers=1, noise=0.1)
    assert float(start().detach()) == pytest.approx(float(normal.log_prob(y.T).sum()), rel=1e-9)  # KL is 0 there


@pytest.mark.parametrize("kernel", ["relu", "heaviside", "normalized_gaussian"])
def test_full_machine_follows_the_labels(kernel):
    x, y = randn(8, 2, requires_grad=False), randn(8, 4, seed=1, requires_grad=False)
    machine = FullDKM(x @ x.T / 2, y, kernel=kernel, dof=1.0, noise=0.1, jitter=1e-2)
    before, start = float(machine().detach()), machine.grams[0].detach().clone()
    machine.optimize(max_iterations=200)
    assert float(machine().detach()) > before + 0.1
    target = y @ y.T / 4

    def alignment(g):
        return float((g * target).sum() / g.norm() / target.norm())

    assert alignment(machine.grams[0].detach()) > alignment(start)


def test_estimators_on_real_tables():
    x, y = load_iris(return_X_y=True)
    model = DKMClassifier(num_inducing=30, epochs=40, random_state=0).fit(x[::2], y[::2])
    assert model.score(x[1::2], y[1::2]) > 0.92
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1)
    assert model.representation(x).shape == (150, 30)
    assert model.grams_[0].shape == (30, 30)
    assert model.objectives_[-1] > model.objectives_[0]
    table = read_sample_table(sample("uci/yacht.txt"))
    features = (table.features - table.features.mean(0)) / table.features.std(0)
    train, test = ~table.is_test, table.is_test
    machine = regress(features=6, random_state=0).fit(features[train], table.target[train])
    mean, std = machine.predict(features[test], return_std=True)
    assert np.sqrt(np.mean((mean - table.target[test]) ** 2)) < 0.3 * table.target.std()
    assert ((np.abs(mean - table.target[test]) < 3 * std).mean()) > 0.8
    assert isinstance(classify(features=4, random_state=1), DKMClassifier)


def test_refusals():
    x, y = load_iris(return_X_y=True)
    for options, message in (
        ({"dof": 0.0}, r"`dof` must be positive \(or infinite\), got 0.0"),
        ({"kernel": "rbf"}, "`kind` must be one of"),
        ({"num_inducing": 0}, "`num_inducing` must be a positive integer"),
        ({"epochs": 0}, "`epochs` must be a positive integer"),
        ({"lr": -1.0}, "`lr` must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            DKMClassifier(**{"epochs": 1, **options}).fit(x, y)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        DKMClassifier().fit(x[:50], y[:50])
    with pytest.raises(ValueError, match="`norms` must hold 'local', 'global' or None, got 'both' for batch"):
        GramNorm(3, ("local", "both", None, None))
    with pytest.raises(ValueError, match="for the scale of the batch, got 'local'"):
        GramNorm(3, ("local", "local", "local", "local"))
    with pytest.raises(ValueError, match="`form` must be one of"):
        GramLayer(3, form="lower")
    eye = torch.eye(3).double()
    with pytest.raises(ValueError, match="`gram` must be symmetric"):
        FullDKM(eye + torch.ones(3, 3).triu(1), eye)
    with pytest.raises(ValueError, match="must be positive semi-definite, got the eigenvalue -1"):
        FullDKM(-eye, eye)
    with pytest.raises(ValueError, match="`targets` must have P = 3"):
        FullDKM(eye, eye[:2])
    with pytest.raises(ValueError, match="`dof` must be positive and finite, got inf"):
        FullDKM(eye, eye, dof=math.inf)
    with pytest.raises(ValueError, match="`inducing` must be finite"):
        SparseDKM(2, 1, num_inducing=2).initialize(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="`x` must have size 2"):
        SparseDKM(2, 1, num_inducing=2)(eye)
