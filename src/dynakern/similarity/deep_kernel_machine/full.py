"""The full machine: the exact objective over the Gram matrices of all points."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice, check_finite, check_positive, check_shape
from dynakern.similarity.deep_kernel_machine.machine import KERNELS, Factor, angular

__all__ = ["FullDKM"]


class FullDKM(nn.Module):
    r"""The exact machine on P points: maximise the objective over all Gram matrices.

    Gaussian likelihood :math:`\sum_c \log \mathcal N(y_c; 0, K(G^L) + \sigma^2 I)`. With one output and
    :math:`\nu \le 1` it overfits badly: use many outputs, inducing points or a large :math:`\nu`.

    Args:
        gram: :math:`G^0`, ``(P, P)``, such as ``X @ X.T / features``; symmetric, positive definite for a linear kernel.
        targets: Y, ``(P, C)``.
        layers: L, number of Gram matrices to learn.
        kernel: See :class:`GramKernel`; ``"linear"`` is K(G) = G here.
        dof: :math:`\nu`, one for all layers.
        noise: :math:`\sigma^2 \ge 0`.
        jitter: Added to the diagonal of every kernel matrix.
    """

    def __init__(
        self,
        gram: Tensor,
        targets: Tensor,
        *,
        layers: int = 1,
        kernel: str = "sqexp",
        dof: float = 1.0,
        noise: float = 0.05,
        jitter: float = 1e-3,
    ) -> None:
        super().__init__()
        dims = check_shape("gram", gram, "P P")
        check_shape("targets", targets, "P C", dims)
        check_finite("gram", gram)
        check_finite("targets", targets)
        check_choice("kernel", kernel, KERNELS)
        check_positive("layers", layers, integer=True)
        check_positive("noise", noise, zero=True)
        check_positive("jitter", jitter, zero=True)
        if not dof > 0 or math.isinf(dof):
            raise ValueError(f"`dof` must be positive and finite, got {dof!r}.")
        if not torch.allclose(gram, gram.T, rtol=1e-10, atol=1e-12 * float(gram.abs().max())):
            raise ValueError("`gram` must be symmetric.")
        lowest = float(torch.linalg.eigvalsh(gram)[0])
        if lowest < -1e-8 * float(gram.diagonal().max()):
            raise ValueError(f"`gram` must be positive semi-definite, got the eigenvalue {lowest:.3e}.")
        self.gram: Tensor
        self.targets: Tensor
        self.register_buffer("gram", gram)
        self.register_buffer("targets", targets)
        self.kernel, self.dof, self.noise, self.jitter = kernel, dof, noise, jitter
        self.factors = [Factor(len(gram), "cholesky", gram.dtype, scale=False) for _ in range(layers)]
        self.layers = nn.ModuleList(self.factors)
        state = gram
        for layer in self.factors:
            state = self._kernel(state)
            layer.set(state)

    def _kernel(self, gram: Tensor) -> Tensor:
        d, eye = gram.diagonal(), torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        if self.kernel == "linear":
            k = gram
        elif self.kernel == "sqexp":
            k = (-(d[:, None] + d - 2 * gram) / 2).exp()
        else:
            k = torch.where(eye > 0, d, angular(self.kernel, gram, (d[:, None] * d).sqrt()))
        return k + self.jitter * eye

    @property
    def grams(self) -> list[Tensor]:
        r"""The Gram matrices :math:`G^1, \dots, G^L`, ``(P, P)`` each."""
        return [layer.matrix for layer in self.factors]

    def forward(self) -> Tensor:
        """Return the objective, a number."""
        total, state = self.gram.new_zeros(()), self.gram
        for layer in self.factors:
            k = self._kernel(state)
            total = total - self.dof * layer.divergence(torch.linalg.cholesky(k), k, taylor=False)
            state = layer.matrix
        k = self._kernel(state) + self.noise * torch.eye(len(state), dtype=state.dtype, device=state.device)
        root = torch.linalg.cholesky(k)
        p, c = self.targets.shape
        fit = torch.linalg.solve_triangular(root, self.targets, upper=False).square().sum() / 2
        return total - fit - c * (root.diagonal().log().sum() + p * math.log(2 * math.pi) / 2)

    def optimize(self, *, max_iterations: int = 2000, tolerance: float = 1e-12) -> Self:
        """Maximise the objective by L-BFGS with line search.

        Args:
            max_iterations: Stop there at the latest.
            tolerance: Largest gradient entry, and change, at which to stop.

        Returns:
            This module.

        Raises:
            FloatingPointError: The objective is not finite.
        """
        optimizer = torch.optim.LBFGS(
            self.parameters(),
            max_iter=max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=tolerance * 1e-3,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -self()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        if not bool(self().isfinite()):
            raise FloatingPointError("The objective is not finite; raise `jitter` or `noise`.")
        return self
