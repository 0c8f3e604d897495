"""Networks with FDConv layers: the conversion of any network, and ResNets in the paper's setting."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from dynakern.layers.resnet import ResNet
from dynakern.vision.fdconv.layer import FDConv, convert_state_dict

__all__ = [
    "FDConvResNet",
    "classify_images",
    "convert_state_dict",
    "convert_to_fdconv",
    "fdconv_resnet18",
    "fdconv_resnet34",
    "fdconv_resnet50",
    "fdconv_resnet101",
]


def convert_to_fdconv(
    model: nn.Module, *, kernel_num: int = 64, min_channels: int = 16, exclude: Sequence[str] = (), **options: Any
) -> nn.Module:
    """Return a copy of a network whose convolutions are FDConv layers that start as those were.

    Converted are ungrouped, zero-padded ``nn.Conv2d`` with kernels of 1x1 or 3x3 and more than ``min_channels`` input
    and output channels, ``(B, I, H, W)`` in; all others stay.

    Args:
        model: Any network; it is left as it is.
        kernel_num: Frequency groups K of each layer.
        min_channels: See :class:`FDConv`.
        exclude: Patterns of module names that stay, e.g. ``"*.downsample.*"``.
        **options: Further arguments of :class:`FDConv`.

    Raises:
        ValueError: K does not divide the frequencies of a layer; the message names it.
    """
    model = copy.deepcopy(model)
    sizes = tuple(options.get("use_fdconv_if_k_in", (1, 3)))
    for name, conv in list(model.named_modules()):
        if type(conv) is not nn.Conv2d or conv.groups != 1 or conv.padding_mode != "zeros":
            continue
        square = conv.kernel_size in [(k, k) for k in sizes] and not isinstance(conv.padding, str)
        small = min(conv.in_channels, conv.out_channels) <= min_channels
        if not square or small or any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
            continue
        try:
            layer = FDConv.from_conv(conv, kernel_num=kernel_num, min_channels=min_channels, **options)
        except ValueError as error:
            raise ValueError(f"Layer {name!r}: {error}") from error
        if not name:
            return layer
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return model


class FDConvResNet(ResNet):
    """A ResNet whose blocks convolve by FDConv; stem and shortcuts stay plain, as in the paper's detectors.

    Args:
        block: See :class:`dynakern.layers.resnet.ResNet`, as all but the next two; ``(B, in_chans, H, W)`` in.
        depths: Blocks of each stage.
        kernel_num: Frequency groups K of each layer.
        fdconv: Further arguments of :class:`FDConv` by name.
        **options: Further arguments of :class:`dynakern.layers.resnet.ResNet`.
    """

    def __init__(
        self,
        block: Literal["basic", "bottleneck"],
        depths: Sequence[int],
        *,
        kernel_num: int = 64,
        fdconv: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(block, depths, **options)
        exclude = ("*.downsample.*",)
        for i in range(self.num_stages):
            stage = getattr(self, f"layer{i + 1}")
            setattr(
                self, f"layer{i + 1}", convert_to_fdconv(stage, kernel_num=kernel_num, exclude=exclude, **fdconv or {})
            )


def fdconv_resnet18(**overrides: Any) -> FDConvResNet:
    """ResNet-18 with FDConv, K = 64, ``(B, 3, H, W) -> (B, 1000)``."""
    return FDConvResNet(**{"block": "basic", "depths": (2, 2, 2, 2), **overrides})


def fdconv_resnet34(**overrides: Any) -> FDConvResNet:
    """ResNet-34 with FDConv, K = 64, ``(B, 3, H, W) -> (B, 1000)``."""
    return FDConvResNet(**{"block": "basic", "depths": (3, 4, 6, 3), **overrides})


def fdconv_resnet50(**overrides: Any) -> FDConvResNet:
    """ResNet-50 with FDConv, K = 64, the paper's backbone, ``(B, 3, H, W) -> (B, 1000)``."""
    return FDConvResNet(**{"block": "bottleneck", "depths": (3, 4, 6, 3), **overrides})


def fdconv_resnet101(**overrides: Any) -> FDConvResNet:
    """ResNet-101 with FDConv, K = 64, ``(B, 3, H, W) -> (B, 1000)``."""
    return FDConvResNet(**{"block": "bottleneck", "depths": (3, 4, 23, 3), **overrides})


def classify_images(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> FDConvResNet:
    """Build a small classifier of images, ``(B, in_chans, img_size, img_size) -> (B, num_classes)``."""
    stem = "cifar" if img_size <= 32 else "imagenet"
    widths = tuple(8 * max(1, round(c * width / 8)) for c in (24, 48, 96))  # whose frequencies 8 groups divide
    return FDConvResNet(
        "basic", (1, 1, 1), widths=widths, kernel_num=8, in_chans=in_chans, num_classes=num_classes, stem=stem
    )
