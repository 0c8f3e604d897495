"""Kar: optimisers that add up the signs of the gradient and of its averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dynakern.checks import check_positive

__all__ = ["Kar2", "Kar3", "warmup_cosine"]


class _SignSum(torch.optim.Optimizer):
    """p <- p - lr (sign(g) + sum of sign(m_i)), then m_i <- b_i m_i + (1 - b_i) g."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, ...]) -> None:
        check_positive("lr", lr, zero=True)
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"Every beta must be in [0, 1), got {beta!r}.")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; return what ``closure``, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    for i in range(len(group["betas"])):
                        state[f"average{i + 1}"] = torch.zeros_like(p)
                direction = p.grad.sign()
                for i, beta in enumerate(group["betas"]):
                    average: Tensor = state[f"average{i + 1}"]
                    direction.add_(average.sign())
                    average.lerp_(p.grad, 1 - beta)
                p.add_(direction, alpha=-group["lr"])
        return loss


class Kar3(_SignSum):
    r"""Step by the signs of the gradient and of a fast and a slow average, all three before this gradient counts.

    :math:`p \leftarrow p - \eta(\mathrm{sign}\,g + \mathrm{sign}\,m_1 + \mathrm{sign}\,m_2)`, then
    :math:`m_i \leftarrow b_i m_i + (1 - b_i) g`; the averages start at 0 and sign(0) = 0. No weight decay.

    Args:
        params: Parameters, or groups of them.
        lr: Rate. The authors' is 1.215e-3 on CIFAR-10.
        betas: b_1 and b_2 in [0, 1).

    Raises:
        ValueError: A rate or beta is out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = Kar3([p], lr=0.5)
        >>> for _ in range(2):
        ...     p.grad = torch.tensor([3.0, 0.0])
        ...     optimizer.step()
        >>> p.data
        tensor([-2.,  0.])

    Source: arXiv:2401.17948, as in the authors' code.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.2e-3, betas: tuple[float, float] = (0.5, 0.95)) -> None:
        super().__init__(params, lr, tuple(betas))


class Kar2(_SignSum):
    """As :class:`Kar3` with one average.

    Args:
        params: Parameters, or groups of them.
        lr: Rate.
        beta: In [0, 1).

    Raises:
        ValueError: A rate or beta is out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1.2e-3, beta: float = 0.95) -> None:
        super().__init__(params, lr, (beta,))


def warmup_cosine(epoch: float, epochs: int, warmup: int = 8, start: float = 1e-8) -> float:
    """Return the factor of the rate in an epoch: linear from ``start`` over ``warmup`` epochs, then a cosine to 0.

    For ``torch.optim.lr_scheduler.LambdaLR``; the authors train for 100 epochs.

    Example:
        >>> [round(warmup_cosine(epoch, 100), 2) for epoch in (0, 4, 8, 54, 100)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if epoch < warmup:
        return start + (1 - start) * epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup)))
