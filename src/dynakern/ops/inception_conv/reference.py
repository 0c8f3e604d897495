"""The definition of the Inception depthwise convolution: split, three convolutions, join."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["inception_reference"]


def inception_reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Return ``(N, C, H, W)`` from x and the three branches' weights, ``(G, 1, KH, KW)``, and biases, ``(G,)``."""
    G = weights[0].shape[0]
    parts = list(x.split([x.shape[1] - 3 * G, G, G, G], dim=1))
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        parts[i + 1] = torch.nn.functional.conv2d(parts[i + 1], weight, bias, padding=padding, groups=G)
    return torch.cat(parts, dim=1)
