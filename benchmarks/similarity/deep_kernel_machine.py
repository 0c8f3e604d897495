"""A training step of the sparse machine beside explicit inverses, and beside GPyTorch's sparse GP."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern.similarity import SparseDKM
from dynakern.testing import assert_same


def ours(model, x):
    return model(x)


def with_inverses(model, x):
    """Return mean, variance and divergences as the layers' equations are printed, with every inverse written out."""
    terms, state = [], model.kernels[0](model.f2g(x))

    def divergence(g, inverse, k):
        return (torch.trace(inverse @ g) - torch.logdet(g) + torch.logdet(k) - len(k)) / 2

    for index, layer in enumerate(model.grams):
        inverse, g = torch.linalg.inv(state.ii), layer.matrix
        a = state.ti @ inverse
        terms.append(-layer.dof * divergence(g, inverse, state.ii))
        t = state.t - (a @ state.ti.T).diagonal() + (a @ g @ a.T).diagonal()
        state = model.kernels[index + 1](model.norms[index](type(state)(g, a @ g, t)))
    inverse, s, mu = torch.linalg.inv(state.ii), model.output.matrix, model.output.mu
    a = state.ti @ inverse
    terms.append(-mu.shape[1] * divergence(s, inverse, state.ii) - (mu * (inverse @ mu)).sum() / 2)
    variance = state.t - (a @ state.ti.T).diagonal() + (a @ s @ a.T).diagonal()
    return a @ mu, variance, torch.stack(terms).sum()


def sparse_gp(z, outputs):
    import gpytorch

    class SVGP(gpytorch.models.ApproximateGP):
        def __init__(self):
            distribution = gpytorch.variational.CholeskyVariationalDistribution(len(z), torch.Size([outputs]))
            strategy = gpytorch.variational.VariationalStrategy(self, z, distribution)
            super().__init__(gpytorch.variational.IndependentMultitaskVariationalStrategy(strategy, num_tasks=outputs))
            self.mean = gpytorch.means.ZeroMean()
            self.kernel = gpytorch.kernels.RBFKernel()

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))

    return SVGP().double()


def cases():
    for inducing, batch, layers in ((60, 150, 2), (200, 500, 2)):
        torch.manual_seed(0)
        x, z = torch.randn(batch, 20, dtype=torch.float64), torch.randn(inducing, 20, dtype=torch.float64)
        y = torch.randn(batch, 5, dtype=torch.float64)
        model = SparseDKM(20, 5, num_inducing=inducing, layers=layers).initialize(z)
        peer = sparse_gp(z.clone(), 5)

        def step(run, model=model, x=x, y=y):
            mean, variance, divergence = run(model, x)
            loss = (y - mean).square().mean() + variance.mean() - divergence / 1000
            return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

        def peer_step(peer=peer, x=x, y=y):
            found = peer(x)
            divergence = peer.variational_strategy.kl_divergence().sum()
            loss = (y - found.mean).square().mean() + found.variance.mean() + divergence / 1000
            return torch.autograd.grad(loss, list(peer.parameters()), allow_unused=True)

        def check(step=step):
            assert_same(step(ours), step(with_inverses), rtol=1e-6)

        yield Case(
            name=f"loss and gradients, {inducing} inducing points, batch {batch}, {layers} layers, 5 outputs",
            ours=lambda step=step: step(ours),
            peers={"explicit inverses": lambda step=step: step(with_inverses), "GPyTorch SVGP, no layers": peer_step},
            check=check,
            repeats=15,
        )


if __name__ == "__main__":
    main("deep_kernel_machine", "Deep kernel machine", cases)
