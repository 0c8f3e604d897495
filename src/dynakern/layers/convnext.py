"""ConvNeXt with the authors' keys: the plain network that other convolutional networks are measured against.

Paper: Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, 2022, "A ConvNet for the 2020s", arXiv:2201.03545. Two options of
its depthwise convolution come from the ablations of Yu et al., 2024, arXiv:2303.16900: its size, and the share of
channels that it touches at all.

Example:
    >>> import torch
    >>> model = convnext_tiny(num_classes=10).eval()
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_positive, check_shape
from dynakern.layers.vision import DropPath, LayerNorm2d, drop_path_rates, init_truncated_normal

__all__ = ["ConvNeXt", "PartialConv2d", "convnext_base", "convnext_small", "convnext_tiny"]


class PartialConv2d(nn.Conv2d):
    """Depthwise convolution of the last channels only; the others pass.

    Args:
        channels: Channels C of the map.
        kernel_size: Odd size of the filter.
        ratio: Share of the channels that are convolved, int(C ratio) of them.

    Raises:
        ValueError: ``kernel_size`` is even, or no channel would be convolved.
    """

    def __init__(self, channels: int, kernel_size: int = 7, ratio: float = 1.0) -> None:
        self.convolved = int(channels * ratio)
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}.")
        if not 0 < self.convolved <= channels:
            raise ValueError(f"`ratio` must leave 1 to {channels} channels to convolve, got {ratio!r}.")
        n = self.convolved
        super().__init__(n, n, kernel_size, padding=kernel_size // 2, groups=n)
        self.passed = channels - n

    def forward(self, input: Tensor) -> Tensor:
        """Return a map of the shape of ``input``, ``(B, C, H, W)``."""
        if self.passed == 0:
            return super().forward(input)
        passed, rest = input.split((self.passed, self.convolved), dim=1)
        return torch.cat([passed, super().forward(rest)], 1)


class _Block(nn.Module):
    def __init__(
        self, channels: int, *, kernel_size: int, ratio: float, layer_scale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.dwconv = PartialConv2d(channels, kernel_size, ratio)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # (B, H, W, C)
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        y = y if self.gamma is None else y * self.gamma
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """A ConvNeXt.

    Args:
        depths: Blocks of each stage.
        dims: Channels of each stage, as many.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        kernel_size: Odd size of the depthwise convolutions.
        conv_ratio: Share of the channels that they touch; see :class:`PartialConv2d`.
        patch_size: Side of the first patches, 4 as published; smaller for small images.
        layer_scale: Initial scale of each block's branch; None for no scale.
        drop_path_rate: Stochastic depth of the last block; grows from 0.

    Raises:
        ValueError: ``depths`` and ``dims`` differ in length, or an option is out of range.
    """

    head_keys = ("head.",)

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        kernel_size: int = 7,
        conv_ratio: float = 1.0,
        patch_size: int = 4,
        layer_scale: float | None = 1e-6,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"`depths` and `dims` must have one entry a stage, got {depths!r} and {dims!r}.")
        check_positive("in_chans", in_chans, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        check_positive("patch_size", patch_size, integer=True)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        options: dict[str, Any] = {"kernel_size": kernel_size, "ratio": conv_ratio, "layer_scale": layer_scale}
        for i, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            down = [
                nn.Conv2d(in_chans, dim, patch_size, stride=patch_size),
                LayerNorm2d(dim),
            ] if i == 0 else [LayerNorm2d(dims[i - 1]), nn.Conv2d(dims[i - 1], dim, 2, stride=2)]  # fmt: skip
            self.downsample_layers.append(nn.Sequential(*down))
            self.stages.append(nn.Sequential(*(_Block(dim, drop_path=rate, **options) for rate in rates)))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_truncated_normal)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage of an image ``(B, in_chans, H, W)``: a quarter of its size and smaller."""
        check_shape("x", x, f"B {self.in_chans} H W")
        maps = []
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of the last map."""
        return self.head(self.norm(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of images ``(B, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))


def convnext_tiny(**overrides: Any) -> ConvNeXt:
    """ConvNeXt-T (28.589 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return ConvNeXt(**{"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768), **overrides})


def convnext_small(**overrides: Any) -> ConvNeXt:
    """ConvNeXt-S (50.224 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return ConvNeXt(**{"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768), **overrides})


def convnext_base(**overrides: Any) -> ConvNeXt:
    """ConvNeXt-B (88.591 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return ConvNeXt(**{"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024), **overrides})
