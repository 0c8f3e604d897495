"""Residual networks with torchvision's keys: the backbone that other systems change, and the baseline they are held to.

Paper: He, Zhang, Ren and Sun, 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385. The stride of a
bottleneck sits in its 3x3 convolution, as in torchvision. State-dict keys are torchvision's, so that its checkpoints
load as they are; the small networks for CIFAR (:func:`resnet20`, :func:`resnet56`) have the same keys, three stages.

Example:
    >>> import torch
    >>> model = resnet18(num_classes=10).eval()
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    >>> [tuple(map.shape[1:]) for map in model.forward_intermediates(torch.zeros(1, 3, 64, 64))]
    [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_floating, check_positive, check_shape
from dynakern.layers.vision import DropPath, check_fusable, drop_path_rates, fuse_conv_norm

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "PadShortcut",
    "ResNet",
    "resnet18",
    "resnet20",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
]

Shortcut = Literal["conv", "subsample", "pool"]


class PadShortcut(nn.Module):
    """Shortcut without parameters: every ``stride``-th pixel, or means of pixels, and zeros for the new channels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least as many.
        stride: Step S between pixels.
        pool: Take the mean of S x S pixels instead of one of them.

    Raises:
        ValueError: There are fewer output than input channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, pool: bool = False) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f"A padded shortcut cannot drop channels: {in_channels} to {out_channels}.")
        self.stride, self.extra, self.pool = stride, out_channels - in_channels, pool

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, out_channels, ceil(H / S), ceil(W / S))`` of a map ``(B, in_channels, H, W)``."""
        if self.pool and self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        else:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        """Say the options."""
        return f"stride={self.stride}, extra={self.extra}, pool={self.pool}"


def _fold(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Return one module equal to ``norm(conv(x))``; a layer that is no plain convolution does it by ``fuse_norm``."""
    if isinstance(norm, nn.Identity):
        return conv
    assert isinstance(norm, nn.BatchNorm2d)
    own = getattr(conv, "fuse_norm", None)
    if own is not None:
        return own(norm)
    assert isinstance(conv, nn.Conv2d)
    return fuse_conv_norm(conv, norm)


class _Block(nn.Module):
    """Common part of the blocks: ``relu(shortcut(x) + drop_path(branch(x)))``."""

    expansion: int
    convs: int

    def __init__(self, downsample: nn.Module | None, drop_path: float) -> None:
        super().__init__()
        self.downsample = downsample
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map, ``(B, expansion * width, H / stride, W / stride)``, of ``(B, C, H, W)``."""
        h = x
        for i in range(1, self.convs + 1):
            h = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(h))
            if i < self.convs:
                h = F.relu(h)
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(shortcut + self.drop_path(h))

    def fold_norms(self) -> None:
        """Fold every batch norm into its convolution, in place (eval mode)."""
        for i in range(1, self.convs + 1):
            setattr(self, f"conv{i}", _fold(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")))
            setattr(self, f"bn{i}", nn.Identity())
        if isinstance(self.downsample, nn.Sequential):
            self.downsample = nn.Sequential(_fold(self.downsample[0], self.downsample[1]))


class BasicBlock(_Block):
    """Two 3x3 convolutions.

    Args:
        in_channels: Channels of the input.
        width: Channels of the output.
        stride: Of the first convolution.
        downsample: The shortcut where shapes differ; None for the identity.
        drop_path: Rate of stochastic depth.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    expansion = 1
    convs = 2

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(downsample, drop_path)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False, **at)
        self.bn1 = nn.BatchNorm2d(width, **at)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False, **at)
        self.bn2 = nn.BatchNorm2d(width, **at)


class Bottleneck(_Block):
    """A 1x1, a 3x3 and a 1x1 convolution; the output has four times ``width`` channels.

    Args:
        in_channels: Channels of the input.
        width: Channels of the 3x3 convolution.
        stride: Of the 3x3 convolution.
        downsample: The shortcut where shapes differ; None for the identity.
        drop_path: Rate of stochastic depth.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    expansion = 4
    convs = 3

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(downsample, drop_path)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False, **at)
        self.bn1 = nn.BatchNorm2d(width, **at)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False, **at)
        self.bn2 = nn.BatchNorm2d(width, **at)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False, **at)
        self.bn3 = nn.BatchNorm2d(4 * width, **at)


class ResNet(nn.Module):
    """A residual network.

    Args:
        block: ``"basic"`` or ``"bottleneck"``.
        depths: Blocks of each stage.
        widths: Width of each stage, as many as ``depths``; every stage but the first halves the map.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        stem: ``"imagenet"``: 7x7 convolution of stride 2 and pooling, a quarter of the size. ``"cifar"``: 3x3
            convolution, full size.
        shortcut: Where shapes differ: ``"conv"`` a 1x1 convolution; ``"subsample"`` or ``"pool"`` a
            :class:`PadShortcut`.
        drop_path_rate: Stochastic depth of the last block; grows from 0.
        zero_init_residual: Start every block as its shortcut, with zeros in its last norm.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option is unknown, or ``depths`` and ``widths`` differ in length.
    """

    head_keys = ("fc.",)

    def __init__(
        self,
        block: Literal["basic", "bottleneck"],
        depths: Sequence[int],
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        in_chans: int = 3,
        num_classes: int = 1000,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        shortcut: Shortcut = "conv",
        drop_path_rate: float = 0.0,
        zero_init_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("block", block, ("basic", "bottleneck"))
        check_choice("stem", stem, ("imagenet", "cifar"))
        check_choice("shortcut", shortcut, ("conv", "subsample", "pool"))
        check_positive("in_chans", in_chans, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        if len(depths) != len(widths):
            raise ValueError(f"`depths` and `widths` must have one entry a stage, got {depths!r} and {widths!r}.")
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans, self.num_classes, self.num_stages = in_chans, num_classes, len(depths)
        kind = BasicBlock if block == "basic" else Bottleneck
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_chans, widths[0], kernel, stride, kernel // 2, bias=False, **at)
        self.bn1 = nn.BatchNorm2d(widths[0], **at)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        channels = widths[0]
        for i, (width, rates) in enumerate(zip(widths, drop_path_rates(drop_path_rate, depths), strict=True)):
            blocks = []
            for j, rate in enumerate(rates):
                step, out = (2 if i > 0 and j == 0 else 1), width * kind.expansion
                bridge = None if step == 1 and channels == out else _shortcut(shortcut, channels, out, step, at)
                blocks.append(kind(channels, width, step, bridge, drop_path=rate, **at))
                channels = out
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.num_features = channels
        self.fc = nn.Linear(channels, num_classes, **at) if num_classes else nn.Identity()
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_init_residual and isinstance(module, _Block):
                nn.init.zeros_(getattr(module, f"bn{module.convs}").weight)

    def stages(self) -> list[nn.Sequential]:
        """Return the stages ``layer1``, ``layer2``, ..."""
        return [getattr(self, f"layer{i + 1}") for i in range(self.num_stages)]

    def forward_stem(self, x: Tensor) -> Tensor:
        """Return the map before the first stage, ``(B, widths[0], H', W')``.

        Args:
            x: Images, ``(B, in_chans, H, W)``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: ``x`` has another shape.
        """
        check_floating("x", x)
        check_shape("x", x, f"B {self.in_chans} H W")
        return self.maxpool(F.relu(self.bn1(self.conv1(x))))

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage, ``(B, C_i, H_i, W_i)``, of images ``(B, in_chans, H, W)``."""
        x, maps = self.forward_stem(x), []
        for stage in self.stages():
            x = stage(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, ``(B, num_features, H', W')``, of images ``(B, in_chans, H, W)``."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)`` of the last map, or its means if there is no classifier."""
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(B, num_classes)``, of images ``(B, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))

    def fuse(self) -> ResNet:
        """Return an equivalent copy whose batch norms are folded into its convolutions.

        Raises:
            RuntimeError: The network is in training mode.
        """
        fused = check_fusable(self)
        assert isinstance(fused, ResNet)
        fused.conv1, fused.bn1 = _fold(fused.conv1, fused.bn1), nn.Identity()
        for stage in fused.stages():
            for block in stage:
                assert isinstance(block, _Block)
                block.fold_norms()
        return fused


def _shortcut(kind: Shortcut, channels: int, out: int, stride: int, at: dict[str, Any]) -> nn.Module:
    if kind == "conv":
        return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False, **at), nn.BatchNorm2d(out, **at))
    return PadShortcut(channels, out, stride, pool=kind == "pool")


def resnet18(**overrides: Any) -> ResNet:
    """ResNet-18 (11.690 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return ResNet(**{"block": "basic", "depths": (2, 2, 2, 2), **overrides})


def resnet34(**overrides: Any) -> ResNet:
    """ResNet-34 (21.798 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return ResNet(**{"block": "basic", "depths": (3, 4, 6, 3), **overrides})


def resnet50(**overrides: Any) -> ResNet:
    """ResNet-50 (25.557 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return ResNet(**{"block": "bottleneck", "depths": (3, 4, 6, 3), **overrides})


def resnet101(**overrides: Any) -> ResNet:
    """ResNet-101 (44.549 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return ResNet(**{"block": "bottleneck", "depths": (3, 4, 23, 3), **overrides})


def _cifar(depth: int, overrides: dict[str, Any]) -> ResNet:
    defaults = {"block": "basic", "depths": (depth // 6,) * 3, "widths": (16, 32, 64), "num_classes": 10}
    return ResNet(**{**defaults, "stem": "cifar", "shortcut": "subsample", **overrides})


def resnet20(**overrides: Any) -> ResNet:
    """ResNet-20 for small images (0.270 M parameters), ``(B, 3, H, W) -> (B, 10)``."""
    return _cifar(20, overrides)


def resnet56(**overrides: Any) -> ResNet:
    """ResNet-56 for small images (0.853 M parameters), ``(B, 3, H, W) -> (B, 10)``."""
    return _cifar(56, overrides)
