"""The spectrum of a network's empirical tangent kernel: how many directions of function space training moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynakern.checks import check_positive
from dynakern.ops import tangent_kernel

__all__ = ["TangentSpectrum", "tangent_spectrum"]


@dataclass(frozen=True)
class TangentSpectrum:
    """Tangent kernel of a set of inputs and its eigenvalues.

    Attributes:
        kernel: ``(N, N)``, the mean over outputs.
        eigenvalues: ``(N,)``, largest first.
    """

    kernel: Tensor
    eigenvalues: Tensor

    @property
    def effective_rank(self) -> float:
        r"""Number of directions that share the trace: :math:`(\sum \lambda)^2 / \sum \lambda^2`, from 1 to N."""
        return float(self.eigenvalues.sum() ** 2 / self.eigenvalues.square().sum())

    @property
    def largest_step(self) -> float:
        r"""Largest stable learning rate of gradient descent on half the mean squared error, :math:`2 N / \lambda_1`."""
        return float(2 * len(self.eigenvalues) / self.eigenvalues[0])


class _Projected(nn.Module):
    """A network whose outputs are multiplied by a vector v: ``(B, ...) -> (B, 1)``."""

    def __init__(self, model: nn.Module, v: Tensor) -> None:
        super().__init__()
        self.model, self.v = model, v

    def forward(self, x: Tensor) -> Tensor:
        return _flat(self.model, x) @ self.v.unsqueeze(1)


def _flat(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    y = y if isinstance(y, Tensor) else y[0]
    return y.reshape(len(x), -1)


def tangent_spectrum(model: nn.Module, x: Tensor, *, probes: int = 4, seed: int = 0) -> TangentSpectrum:
    r"""Return kernel and spectrum of a network's tangent kernel at its present parameters, for any torch module.

    A network of O outputs has as many kernels; their mean is :math:`E\, \Theta_v / O` where :math:`\Theta_v` belongs to
    :math:`v \cdot f` with random signs v. With more outputs than ``probes`` the mean over so many v stands for it.

    Args:
        model: Maps ``(B, ...)`` to outputs whose first axis is the batch; run in eval mode, and put back.
        x: Inputs, ``(N, ...)``.
        probes: Number of random v.
        seed: Of these.

    Raises:
        ValueError: The model has no trainable parameters, or ``probes`` is not positive.
    """
    check_positive("probes", probes, integer=True)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            like = _flat(model, x[:1])
        size = like.shape[1]
        if size <= probes:
            vectors = torch.eye(size, dtype=torch.float64) * size**0.5
        else:
            signs = torch.randint(2, (probes, size), generator=torch.Generator().manual_seed(seed))
            vectors = signs * 2.0 - 1
        found = [tangent_kernel(_Projected(model, v.to(like)), x, method="loop") for v in vectors]
    finally:
        model.train(training)
    kernel = torch.stack(found).mean(0) / size
    eigenvalues = torch.linalg.eigvalsh(kernel.double()).flip(0).clamp_min(0)
    return TangentSpectrum(kernel, eigenvalues)
