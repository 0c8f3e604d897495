r"""InceptionNeXt: a ConvNeXt whose large depthwise convolution is split into cheap branches.

A 7x7 depthwise convolution has few operations but moves all channels through memory slowly. InceptionNeXt leaves most
channels as they are and gives an eighth each to a small square, a wide and a tall band, which together still see 11
pixels each way.

Paper: Yu, Zhou, Yan and Wang, 2024, "InceptionNeXt: When Inception Meets ConvNeXt", arXiv:2303.16900. Official code:
https://github.com/sail-sg/inceptionnext.

Implemented: the mixer, the published sizes, fusing for inference, the authors' weights. The ablations with other
depthwise convolutions are options of :class:`dynakern.layers.ConvNeXt`; the isotropic networks of the appendix are not
here.

Example:
    >>> import torch
    >>> model = inception_next_atto(num_classes=10).eval()
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    >>> fast = model.fuse()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_floating, check_positive, check_shape
from dynakern.layers.vision import (
    DropPath,
    check_fusable,
    drop_path_rates,
    fuse_conv_norm,
    fuse_norm_linear,
    init_truncated_normal,
)
from dynakern.ops import inception_conv

__all__ = [
    "InceptionDWConv2d",
    "InceptionNeXt",
    "inception_next_atto",
    "inception_next_base",
    "inception_next_base_384",
    "inception_next_small",
    "inception_next_tiny",
]


class InceptionDWConv2d(nn.Module):
    r"""Inception depthwise convolution, ``(B, C, H, W) -> (B, C, H, W)``.

    The channels are, in order, C - 3g that pass, g under an s x s filter, g under 1 x b (along the width) and g under
    b x 1, with :math:`g = \lfloor C r \rfloor`; all filters have biases and keep the size.

    Args:
        in_channels: Channels C.
        square_kernel_size: s, odd.
        band_kernel_size: b, odd.
        branch_ratio: r, in (0, 1/3].
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: A size is even, ``branch_ratio`` is out of range, or a branch would have no channel.

    Source: arXiv:2303.16900, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("in_channels", in_channels, integer=True)
        for name, size in (("square_kernel_size", square_kernel_size), ("band_kernel_size", band_kernel_size)):
            check_positive(name, size, integer=True)
            if size % 2 == 0:
                raise ValueError(f"`{name}` must be odd, got {size}.")
        if not 0 < branch_ratio <= 1 / 3:
            raise ValueError(f"`branch_ratio` must be in (0, 1/3], got {branch_ratio!r}.")
        g, s, b = int(in_channels * branch_ratio), square_kernel_size, band_kernel_size
        if g == 0:
            raise ValueError(f"`branch_ratio` {branch_ratio:g} of {in_channels} channels leaves none to a branch.")
        self.in_channels = in_channels
        made = {"groups": g, "device": device, "dtype": dtype}
        self.dwconv_hw = nn.Conv2d(g, g, s, padding=s // 2, **made)
        self.dwconv_w = nn.Conv2d(g, g, (1, b), padding=(0, b // 2), **made)
        self.dwconv_h = nn.Conv2d(g, g, (b, 1), padding=(b // 2, 0), **made)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape and memory format of ``x``."""
        hw, w, h = self.dwconv_hw, self.dwconv_w, self.dwconv_h
        return inception_conv(x, hw.weight, hw.bias, w.weight, w.bias, h.weight, h.bias)


class _Mlp(nn.Module):
    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, int(ratio * channels), 1)
        self.fc2 = nn.Conv2d(int(ratio * channels), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1, self.fc2
        if x.stride(1) != 1 or torch.compiler.is_compiling():
            return second(F.gelu(first(x)))
        # Channels last these are plain matrix products, which are faster than convolutions, above all backward.
        x = F.gelu(F.linear(x.permute(0, 2, 3, 1), first.weight.flatten(1), first.bias))  # (B, H, W, C)
        return F.linear(x, second.weight.flatten(1), second.bias).permute(0, 3, 1, 2)


class _Block(nn.Module):
    """x + gamma MLP(norm(mixer(x)))."""

    def __init__(
        self, channels: int, *, mlp_ratio: float, mixer: dict[str, Any], layer_scale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.token_mixer = InceptionDWConv2d(channels, **mixer)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.mlp = _Mlp(channels, mlp_ratio)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((channels,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.token_mixer(x)))
        y = y if self.gamma is None else y * self.gamma.view(-1, 1, 1)
        return x + self.drop_path(y)

    def fuse(self) -> None:
        """Fold the norm into the first map and the layer scale into the second."""
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        self.mlp.fc1 = fuse_norm_linear(self.norm, fc1)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        self.norm = nn.Identity()
        if self.gamma is not None:
            assert fc2.bias is not None
            fc2.weight.mul_(self.gamma.view(-1, 1, 1, 1))
            fc2.bias.mul_(self.gamma)
            self.gamma = None


class _Stage(nn.Module):
    def __init__(self, in_channels: int | None, channels: int, blocks: list[_Block]) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if in_channels is not None:
            self.downsample = nn.Sequential(nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, channels, 2, stride=2))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class _Head(nn.Module):
    """Pooled features, a hidden layer of three times their width, a norm after its activation, logits."""

    def __init__(self, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 3 * channels)
        self.norm = nn.LayerNorm(3 * channels, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(3 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.norm(F.gelu(self.fc1(x)))))


class InceptionNeXt(nn.Module):
    r"""A MetaNeXt with inception depthwise convolutions.

    A block is :math:`x + \gamma\, \mathrm{MLP}(\mathrm{BN}(\mathrm{mixer}(x)))`.

    Args:
        depths: Blocks of each stage.
        dims: Channels of each stage, as many.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        mlp_ratios: Width of each stage's MLPs over its channels.
        square_kernel_size: See :class:`InceptionDWConv2d`.
        band_kernel_size: See :class:`InceptionDWConv2d`.
        branch_ratio: See :class:`InceptionDWConv2d`.
        layer_scale: Initial :math:`\gamma`, 1e-6 as published, which makes short training slow; None for no scale.
        drop_path_rate: Stochastic depth of the last block; grows from 0.
        drop_rate: Dropout before the logits.
        patch_size: Side of the first patches, 4 as published; smaller for small images.

    Raises:
        ValueError: The numbers of stages differ, or an option is out of range.

    Source: arXiv:2303.16900; keys of https://github.com/sail-sg/inceptionnext, which timm shares.
    """

    head_keys = ("head.fc2.",)

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        mlp_ratios: Sequence[float] = (4, 4, 4, 3),
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 0.125,
        layer_scale: float | None = 1e-6,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        if not len(depths) == len(dims) == len(mlp_ratios):
            raise ValueError(
                "`depths`, `dims` and `mlp_ratios` must have one entry a stage, "
                f"got {len(depths)}, {len(dims)} and {len(mlp_ratios)}."
            )
        for name, size in (("in_chans", in_chans), ("patch_size", patch_size)):
            check_positive(name, size, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.reduction = patch_size * 2 ** (len(dims) - 1)
        mixer = {
            "square_kernel_size": square_kernel_size,
            "band_kernel_size": band_kernel_size,
            "branch_ratio": branch_ratio,
        }
        self.stem: nn.Module = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], patch_size, stride=patch_size), nn.BatchNorm2d(dims[0])
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.Sequential()
        for i, (dim, ratio) in enumerate(zip(dims, mlp_ratios, strict=True)):
            blocks = [_Block(dim, mlp_ratio=ratio, mixer=mixer, layer_scale=layer_scale, drop_path=r) for r in rates[i]]
            self.stages.append(_Stage(None if i == 0 else dims[i - 1], dim, blocks))
        self.head = _Head(dims[-1], num_classes, drop_rate) if num_classes else nn.Identity()
        self.apply(init_truncated_normal)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage of images ``(B, in_chans, H, W)``: a quarter of their size and smaller.

        Raises:
            ValueError: The shape does not fit, or the image is too small for all stages.
        """
        check_floating("x", x)
        dims = check_shape("x", x, f"B {self.in_chans} H W")
        if min(dims["H"], dims["W"]) < self.reduction:
            least = f"{self.reduction} x {self.reduction}"
            raise ValueError(f"`x` must have at least {least} pixels, got shape {tuple(x.shape)}.")
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of the last map."""
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of images ``(B, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def fuse(self) -> InceptionNeXt:
        """Return an equivalent, faster copy for inference: norms and layer scales folded into the maps beside them.

        Raises:
            RuntimeError: The network is in training mode.
        """
        network: Any = check_fusable(self)
        network.stem = fuse_conv_norm(*network.stem)
        for stage in network.stages:
            if not isinstance(stage.downsample, nn.Identity):
                stage.downsample = fuse_norm_linear(*stage.downsample)
            for block in stage.blocks:
                block.fuse()
        return network.to(memory_format=torch.channels_last)


_LARGE = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}


def inception_next_atto(**overrides: Any) -> InceptionNeXt:
    """InceptionNeXt-A (4.157 M parameters, 0.503 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    settings = {"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), "band_kernel_size": 9, "branch_ratio": 0.25}
    return InceptionNeXt(**{**settings, **overrides})


def inception_next_tiny(**overrides: Any) -> InceptionNeXt:
    """InceptionNeXt-T (28.056 M parameters, 4.189 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return InceptionNeXt(**overrides)


def inception_next_small(**overrides: Any) -> InceptionNeXt:
    """InceptionNeXt-S (49.374 M parameters, 8.356 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return InceptionNeXt(**{"depths": (3, 3, 27, 3), **overrides})


def inception_next_base(**overrides: Any) -> InceptionNeXt:
    """InceptionNeXt-B (86.672 M parameters, 14.841 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return InceptionNeXt(**{**_LARGE, **overrides})


def inception_next_base_384(**overrides: Any) -> InceptionNeXt:
    """InceptionNeXt-B as fine-tuned at 384 pixels (43.603 GMAC), with dropout in its head."""
    return InceptionNeXt(**{**_LARGE, "drop_rate": 0.5, **overrides})


def classify_images(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> InceptionNeXt:
    """Build the competitor of ``dynakern compare classify-images``: three stages, no layer scale.

    Args:
        in_chans: Channels of the images.
        img_size: Side of the images.
        num_classes: Number of classes.
        width: Multiplies the channels of the stages.

    Returns:
        A module that maps ``(B, in_chans, S, S)`` to logits ``(B, num_classes)``.
    """
    return InceptionNeXt(
        (2, 2, 2),
        tuple(max(4, round(c * width)) for c in (32, 64, 112)),
        in_chans=in_chans,
        num_classes=num_classes,
        mlp_ratios=(4, 4, 3),
        band_kernel_size=9 if img_size >= 24 else 5,
        branch_ratio=0.25,
        layer_scale=None,
        patch_size=2 if img_size <= 64 else 4,
    )
