"""The base of all similarity kernels, on the smallest kernel there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Hyperparameter
from sklearn.svm import SVC

from dynakern.similarity import SimilarityKernel, to_gpytorch


class Wave(SimilarityKernel):
    """scale * exp(-|x - y|^2 / (2 length^2))."""

    def __init__(self, length=1.3, scale=0.7, scale_bounds=(1e-5, 1e5)):
        self.length = length
        self.scale = scale
        self.scale_bounds = scale_bounds

    @property
    def hyperparameter_length(self):
        return Hyperparameter("length", "numeric", (1e-5, 1e5))

    @property
    def hyperparameter_scale(self):
        return Hyperparameter("scale", "numeric", self.scale_bounds)

    def _matrix(self, X, Y, *, length, scale=None):
        Y = X if Y is None else Y
        scale = self.scale if scale is None else scale
        return scale * (-((X[:, None] - Y) ** 2).sum(-1) / (2 * length**2)).exp()

    def _variances(self, X, *, length, scale=None):
        return (self.scale if scale is None else scale) * torch.ones(len(X)).to(X)


X = np.random.default_rng(0).normal(size=(20, 3))
Y = np.random.default_rng(1).normal(size=(7, 3))


def test_values_and_gradients_are_those_of_scikit_learn():
    ours, theirs = Wave(), 0.7 * RBF(1.3)
    np.testing.assert_allclose(ours(X, Y), theirs(X, Y), rtol=1e-12)
    np.testing.assert_allclose(ours.diag(X), theirs.diag(X))
    _, gradient = ours(X, eval_gradient=True)
    _, expected = theirs(X, eval_gradient=True)
    np.testing.assert_allclose(gradient, expected[..., ::-1], atol=1e-12)  # theirs: the constant first


def test_fixed_hyperparameters_stay():
    kernel = Wave(scale_bounds="fixed")
    assert len(kernel.theta) == 1
    np.testing.assert_allclose(kernel(X, eval_gradient=True)[1][..., 0], Wave()(X, eval_gradient=True)[1][..., 0])


def test_algebra_and_estimators():
    product = 2.0 * Wave() * Wave(length=0.4) + Wave() ** 2
    np.testing.assert_allclose(product(X, Y), 2 * Wave()(X, Y) * Wave(0.4)(X, Y) + Wave()(X, Y) ** 2)
    y = np.sin(X).sum(1)
    fitted = GaussianProcessRegressor(Wave(), alpha=1e-6, random_state=0).fit(X, y)
    expected = GaussianProcessRegressor(0.7 * RBF(1.3), alpha=1e-6, random_state=0).fit(X, y)
    np.testing.assert_allclose(
        fitted.log_marginal_likelihood_value_, expected.log_marginal_likelihood_value_, rtol=1e-5
    )
    assert SVC(kernel=Wave()).fit(X, y > 0).score(X, y > 0) > 0.9


def test_tensors_stay_tensors_and_carry_gradients():
    x = torch.from_numpy(X).requires_grad_()
    torch.autograd.gradcheck(lambda a: Wave()(a, torch.from_numpy(Y)), (x,))
    assert Wave()(torch.from_numpy(X).float()).dtype == torch.float32
    assert isinstance(Wave().diag(x), torch.Tensor)


def test_gpytorch():
    kernel = to_gpytorch(2.0 * Wave() + Wave(0.4) ** 2)
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    expected = (2.0 * Wave() + Wave(0.4) ** 2)(X, Y)
    np.testing.assert_allclose(kernel(x, y).to_dense().detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(kernel(x, diag=True).detach().numpy(), np.full(20, 1.4 + 0.49), rtol=1e-6)
    batched = to_gpytorch(Wave())(torch.stack([x, 2 * x])).to_dense()
    np.testing.assert_allclose(batched[1].detach().numpy(), Wave()(2 * X), rtol=1e-6)
    kernel(x).to_dense().sum().backward()
    assert all(p.grad is not None for p in kernel.parameters())


def test_refusals():
    with pytest.raises(ValueError, match=r"`X` must be finite"):
        Wave()(np.array([[np.nan]]))
    with pytest.raises(ValueError, match=r"rows of one shape, got \(3,\) and \(2,\)"):
        Wave()(X, Y[:, :2])
    with pytest.raises(ValueError, match=r"one row a sample"):
        Wave()(X[0])
    with pytest.raises(ValueError, match="needs `Y` to be None"):
        Wave()(X, Y, eval_gradient=True)
    with pytest.raises(TypeError, match="must be made of kernels of this library, got RBF"):
        to_gpytorch(Wave() + RBF())

    class Empty(SimilarityKernel):
        def __init__(self):
            pass

    for call in (lambda: Empty()(X), lambda: Empty().diag(X)):
        with pytest.raises(NotImplementedError, match="gives no"):
            call()
