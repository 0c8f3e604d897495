"""The two layouts of images in memory, planes and channels last, by strides alone."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fresh_like", "is_channels_last"]


def is_channels_last(x: Tensor) -> bool:
    """Whether x ``(N, C, H, W)`` is laid out channels last, or is a slice of channels of a tensor that is."""
    return not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1


def fresh_like(x: Tensor) -> Tensor:
    """Return a fresh dense tensor of the shape and layout of x."""
    last = is_channels_last(x)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)
