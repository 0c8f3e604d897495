r"""The kernel that a module applies at one input, and how much it changes with the input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dynakern.checks import check_positive

__all__ = ["dynamism", "effective_kernel", "impulse_response"]

Module = nn.Module | Callable[[Tensor], Tensor]


def effective_kernel(
    network: Module, x: Tensor, *, place: tuple[int, ...] | None = None, channel: int | None = None, seed: int = 0
) -> Tensor:
    r"""Return a row of the Jacobian: the weights :math:`K(x)` with which the input enters one place of the output.

    :math:`K_j(x) = \partial (v \cdot y_{place}) / \partial x_j`; for a linear filter it is the filter, turned round.

    Args:
        network: Maps ``(1, ...)`` to an output whose first axis is the batch. Images are ``(1, C, H, W)``, with places
            in the last two axes; everything else is ``(1, L, D)``, with places in the second; ``(1, O)`` has none.
        x: One input.
        place: Indices of the output place; the middle by default.
        channel: Output channel; by default a fixed random sum of all, with weights v = +-1.
        seed: Of these signs.

    Returns:
        Shape and dtype of ``x``; zero where the output does not depend on the input.

    Raises:
        ValueError: ``x`` holds more than one sample, or ``place`` does not fit the output.
    """
    if x.ndim < 2 or len(x) != 1:
        raise ValueError(f"`x` must be one sample, (1, ...), got shape {tuple(x.shape)}.")
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        rows = _at(_first(network(leaf)), place)  # (channels,)
        if channel is not None:
            value = rows[channel]
        else:
            signs = torch.randint(2, rows.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            value = (rows * signs.to(rows)).sum()
        if not value.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(value, leaf, materialize_grads=True)
    return gradient


def impulse_response(
    network: Module, x: Tensor, *, place: tuple[int, ...] | None = None, channel: int = 0, amplitude: float = 1.0
) -> Tensor:
    r"""Return what a change at one place of the input does to the output, :math:`(f(x + a\,\delta) - f(x)) / a`.

    Args:
        network: Maps ``(1, ...)`` to an output whose first axis is the batch.
        x: One input, the background; zeros give the response of signal processing.
        place: Indices of the input place (see :func:`effective_kernel`); the middle by default.
        channel: Input channel of the impulse.
        amplitude: a.

    Returns:
        Shape of the output.

    Raises:
        ValueError: ``x`` holds more than one sample, ``amplitude`` is not positive, or ``place`` does not fit ``x``.
    """
    if x.ndim < 2 or len(x) != 1:
        raise ValueError(f"`x` must be one sample, (1, ...), got shape {tuple(x.shape)}.")
    check_positive("amplitude", amplitude)
    changed = x.detach().clone()
    _at(changed, place)[channel] += amplitude
    with torch.no_grad():
        return (_first(network(changed)) - _first(network(x.detach()))) / amplitude


def dynamism(
    network: Module, inputs: Tensor, *, place: tuple[int, ...] | None = None, channel: int | None = None, seed: int = 0
) -> float:
    r"""Return how much the effective kernel changes with the input: 0 for a static filter, at most 1.

    :math:`\sum_i \|K(x_i) - \bar K\|^2 / \sum_i \|K(x_i)\|^2` with :math:`\bar K` the mean kernel.

    Args:
        network: See :func:`effective_kernel`.
        inputs: At least two inputs, ``(N, ...)``.
        place: See :func:`effective_kernel`.
        channel: See :func:`effective_kernel`.
        seed: See :func:`effective_kernel`.

    Raises:
        ValueError: There are fewer than two inputs, or the output depends on none of them.
    """
    if len(inputs) < 2:
        raise ValueError(f"`inputs` must hold at least two, got shape {tuple(inputs.shape)}.")
    kernels = torch.cat(
        [effective_kernel(network, x, place=place, channel=channel, seed=seed) for x in inputs.split(1)]
    )
    kernels = kernels.double()
    total = float(kernels.square().sum())
    if total == 0:
        raise ValueError("The output does not depend on any of the inputs.")
    return float((kernels - kernels.mean(0)).square().sum()) / total


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output itself, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def _at(y: Tensor, place: tuple[int, ...] | None) -> Tensor:
    """Return the channels at a place of one sample: ``(C,)`` of ``(1, C, H, W)``, ``(D,)`` of ``(1, L, D)``."""
    y = y[0]
    axes = (1, 2) if y.ndim == 3 else tuple(range(y.ndim - 1))
    place = tuple(y.shape[a] // 2 for a in axes) if place is None else place
    if len(place) != len(axes) or any(not -y.shape[a] <= i < y.shape[a] for a, i in zip(axes, place, strict=False)):
        raise ValueError(f"`place` must be {len(axes)} indices within {tuple(y.shape[a] for a in axes)}, got {place}.")
    return y[(slice(None), *place)] if y.ndim == 3 else y[place]
