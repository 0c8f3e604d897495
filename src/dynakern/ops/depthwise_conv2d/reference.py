"""The definition of the depthwise convolution: PyTorch's own, one group a channel."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["depthwise_conv2d_reference"]


def depthwise_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``(N, C, H, W)`` from ``x`` ``(N, C, H, W)``, ``weight`` ``(C, 1, KH, KW)`` and ``bias`` ``(C,)``."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return torch.nn.functional.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])
