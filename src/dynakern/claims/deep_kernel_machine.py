"""Deep kernel machines: wide Bayesian networks reach the limit, and Gram matrices that learn beat fixed ones.

Claims behind Yang et al., 2023, arXiv:2108.13097, at a size for a laptop: (1) the posterior of a wide deep Gaussian
process, by Hamiltonian Monte Carlo, approaches the maximiser of the objective, which is far from the fixed kernel;
(2) on a curved two-class problem and (3) on real digits a small nu beats the fixed kernel; (4) without noise a deep
linear machine reaches the geometric interpolation in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dynakern.claims.run import Measurement, Progress
from dynakern.similarity.deep_kernel_machine import DKMClassifier, FullDKM
from dynakern.testing import relative_error

__all__ = ["CLAIMS"]

_NOISE, _JITTER = 0.05, 1e-3


def _kernel(gram: Tensor) -> Tensor:
    d = gram.diagonal()
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return (-(d[:, None] + d - 2 * gram) / 2).exp() + _JITTER * eye


def _posterior_gram(root: Tensor, y: Tensor, width: int, seed: int, progress: Progress) -> Tensor:
    """Return the mean of F F^T / W under the posterior: 150 steps of 15 leapfrogs, the first 50 not counted."""
    generator = torch.Generator().manual_seed(seed)
    p = len(y)
    eye = torch.eye(p, dtype=y.dtype)

    def log_posterior(f: Tensor) -> Tensor:
        k = _kernel(f @ f.T / width) + _NOISE * eye
        outer = torch.linalg.cholesky(k)
        fit = torch.linalg.solve_triangular(outer, y, upper=False).square().sum() / 2
        prior = torch.linalg.solve_triangular(root, f, upper=False).square().sum() / 2
        return -width * (fit + outer.diagonal().log().sum()) - prior

    def slope(f: Tensor) -> tuple[Tensor, Tensor]:
        f = f.detach().requires_grad_()
        value = log_posterior(f)
        return value.detach(), torch.autograd.grad(value, f)[0]

    def draw() -> Tensor:
        return torch.randn(p, width, generator=generator, dtype=y.dtype)

    # The momenta have the precision of the prior, so that one step size serves all directions.
    f = root @ draw()
    value, gradient = slope(f)
    covariance = root @ root.T
    total, eps = torch.zeros(p, p, dtype=y.dtype), 0.12
    for iteration in range(150):
        progress(f"width {width}", iteration / 150)
        momentum = torch.linalg.solve_triangular(root.T, draw(), upper=True)
        new, new_value, new_gradient, moving = f, value, gradient, momentum
        for _ in range(15):
            half = moving + eps / 2 * new_gradient
            new = new + eps * covariance @ half
            new_value, new_gradient = slope(new)
            moving = half + eps / 2 * new_gradient
        before, after = ((root.T @ m).square().sum() / 2 for m in (momentum, moving))
        if math.log(float(torch.rand((), generator=generator))) < float(new_value - value + before - after):
            f, value, gradient = new, new_value, new_gradient
        if iteration >= 50:
            total += f @ f.T / width / 100
    return total


def wide_posteriors_reach_the_limit(progress: Progress) -> Iterator[Measurement]:
    """The mean Gram matrix of wider and wider networks approaches the objective's maximiser."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:] / 2
    y = (y - y.mean()) / y.std(correction=0)
    gram = x @ x.T / 2
    machines = []
    for start in range(3):
        machine = FullDKM(gram, y, layers=1, kernel="sqexp", dof=1.0, noise=_NOISE, jitter=_JITTER)
        if start:
            with torch.no_grad():
                for parameter in machine.parameters():
                    shift = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter += 0.3 * shift
        machines.append(machine.optimize())
    values = [float(machine().detach()) for machine in machines]
    yield Measurement(
        name="largest difference of the objective over 3 starts", value=max(values) - min(values), unit="", at_most=1e-8
    )
    optimum, fixed = machines[0].grams[0].detach(), _kernel(gram)
    yield Measurement(
        name="distance of the optimum from the fixed kernel",
        value=relative_error(optimum, fixed),
        unit="relative",
        at_least=0.3,
    )
    root = torch.linalg.cholesky(fixed)
    widths = (16, 64, 256)
    errors = [relative_error(_posterior_gram(root, y, w, w, progress), optimum) for w in widths]
    for width, error, wider in zip(widths, errors, (None, *errors[:-1]), strict=True):
        yield Measurement(
            name=f"distance of the posterior's Gram matrix from it, width {width} (baseline: a quarter of the width)",
            value=error,
            unit="relative",
            at_most=min(0.02, errors[1]) if width == 256 else wider,
            baseline=wider,
        )


def _curves(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 500 points of each of two sine curves, one above the other, in noise."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-2, 2, 500) + 0.1 * rng.standard_normal((2, 500))
    height = 6 * np.sin(3 * x) + rng.standard_normal((2, 500)) + np.array([[0.0], [5.0]])
    return np.stack([x.ravel(), height.ravel()], 1), np.repeat([0, 1], 500)


def _accuracy_and_likelihood(model: DKMClassifier, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    probabilities = model.predict_proba(x)
    return float((probabilities.argmax(1) == y).mean()), float(np.log(probabilities[np.arange(len(y)), y]).mean())


def learned_kernels_beat_fixed_ones(progress: Progress) -> Iterator[Measurement]:
    """On two sine curves the test likelihood rises as nu falls, and nu = 1 is 8 points more accurate than the NNGP."""
    (x, y), (test_x, test_y) = _curves(0), _curves(1)
    found = {}
    for place, dof in enumerate((math.inf, 100.0, 10.0, 1.0)):
        progress(f"nu = {dof:g}", place / 4)
        model = DKMClassifier(dof=dof, num_inducing=32, batch_size=500, epochs=40, random_state=0).fit(x, y)
        found[dof] = _accuracy_and_likelihood(model, test_x, test_y)
    fixed = found[math.inf][0]
    yield Measurement(name="accuracy at nu = 1", value=found[1.0][0], unit="", at_least=fixed + 0.08, baseline=fixed)
    for wider, dof in ((math.inf, 100.0), (100.0, 10.0), (10.0, 1.0)):
        yield Measurement(
            name=f"test log-likelihood at nu = {dof:g} (baseline: nu = {wider:g})",
            value=found[dof][1],
            unit="nats",
            at_least=found[wider][1],
            baseline=found[wider][1],
        )


def real_digits(progress: Progress) -> Iterator[Measurement]:
    """On handwritten digits, 900 for training, nu = 1 beats the NNGP by 3 points and .2 nats."""
    digits = load_digits()
    x, y = digits.data / 16, digits.target  # pyright: ignore[reportAttributeAccessIssue]
    rows = np.random.default_rng(0).permutation(len(x))
    train, test = rows[:900], rows[900:]
    found = {}
    for place, dof in enumerate((math.inf, 10.0, 1.0)):
        progress(f"nu = {dof:g}", place / 3)
        model = DKMClassifier(dof=dof, num_inducing=60, batch_size=150, epochs=12, random_state=0)
        found[dof] = _accuracy_and_likelihood(model.fit(x[train], y[train]), x[test], y[test])
    fixed = found[math.inf]
    accuracy, likelihood = found[1.0]
    yield Measurement(name="accuracy at nu = 1", value=accuracy, unit="", at_least=fixed[0] + 0.03, baseline=fixed[0])
    yield Measurement(
        name="test log-likelihood at nu = 1", value=likelihood, unit="nats", at_least=fixed[1] + 0.2, baseline=fixed[1]
    )
    yield Measurement(name="accuracy at nu = 10", value=found[10.0][0], unit="", baseline=fixed[0])


def deep_linear_closed_form(progress: Progress) -> Iterator[Measurement]:
    """A deep linear machine without noise reaches G0 (G0^-1 YY^T/C)^(l/4) at its three layers."""
    generator = torch.Generator().manual_seed(0)
    a, y = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (10, 8))
    gram, last = a @ a.T / 10, y @ y.T / 8
    machine = FullDKM(gram, y, layers=3, kernel="linear", dof=8.0, noise=0.0, jitter=0.0).optimize()
    values, vectors = torch.linalg.eig(torch.linalg.solve(gram, last))
    errors = []
    for layer, found in enumerate(machine.grams, 1):
        power = vectors @ (values ** (layer / 4)).diag() @ torch.linalg.inv(vectors)
        errors.append(relative_error(found.detach(), gram @ power.real))
    yield Measurement(name="largest distance of a layer from it", value=max(errors), unit="relative", at_most=1e-6)


CLAIMS = (
    wide_posteriors_reach_the_limit,
    learned_kernels_beat_fixed_ones,
    real_digits,
    deep_linear_closed_form,
)
