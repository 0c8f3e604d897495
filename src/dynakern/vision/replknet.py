r"""RepLKNet: depthwise kernels of up to 31x31 pixels, and the measure of whether a network decides by shape.

A few very large kernels give a network a wide effective receptive field where a stack of small ones does not; a
parallel 5x5 kernel makes them trainable and is merged into the large one afterwards. How far a network really sees is
measured by :func:`dynakern.lens.effective_receptive_field`.

Papers: Ding, Zhang, Han and Ding, 2022, "Scaling Up Your Kernels to 31x31", arXiv:2203.06717; Zhang, Ding and Yue,
2025, "Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal Representations", arXiv:2410.08049.
Official code: https://github.com/DingXiaoH/RepLKNet-pytorch.

Implemented: the published networks, merging and fusing, the authors' weights (merged or not), the sweep over kernel
sizes, the shape bias. The stimuli and class lists of the latter are not bundled. Rules of design that are checked here:
kernels are odd, the parallel kernel is no larger than the main one, every block has a shortcut.

Example:
    >>> import torch
    >>> model = RepLKNet((13, 9), (1, 1), (8, 16), num_classes=10).eval()
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    >>> fast = model.fuse()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_floating, check_positive, check_shape
from dynakern.layers.vision import DropPath, check_fusable, drop_path_rates, fuse_conv_norm, fuse_norm_linear
from dynakern.ops import depthwise_conv2d

__all__ = [
    "RepLKNet",
    "ShapeBias",
    "replknet_31b",
    "replknet_31l",
    "replknet_xl",
    "shape_bias",
    "sweep_kernels",
]


class _ConvNorm(nn.Module):
    """A convolution without bias, a batch norm and perhaps ReLU, ``(B, C, H, W) -> (B, out, H', W')``."""

    def __init__(self, chans: int, out: int, size: int, *, stride: int = 1, groups: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chans, out, size, stride, size // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y) if self.relu else y

    def fuse(self, norm: nn.Module | None = None) -> None:
        """Fold the norm, and one before the convolution, into it."""
        conv: Any = self.conv
        if isinstance(norm, nn.BatchNorm2d):
            conv = fuse_norm_linear(norm, conv)
        self.conv, self.bn = fuse_conv_norm(conv, self.bn), nn.Identity()  # pyright: ignore[reportArgumentType]


class _LargeKernel(nn.Module):
    """A large depthwise convolution with a small one beside it, each normed, added; merged into one by ``merge``."""

    def __init__(self, channels: int, size: int, small: int | None, *, merged: bool) -> None:
        super().__init__()
        self.lkb_origin = self.small_conv = self.lkb_reparam = None
        if merged:
            self.lkb_reparam = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)
            return
        self.lkb_origin = _ConvNorm(channels, channels, size, groups=channels, relu=False)
        if small is not None:
            self.small_conv = _ConvNorm(channels, channels, small, groups=channels, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.lkb_reparam is not None:
            return depthwise_conv2d(x, self.lkb_reparam.weight, self.lkb_reparam.bias)
        assert self.lkb_origin is not None
        y = self.lkb_origin.bn(depthwise_conv2d(x, self.lkb_origin.conv.weight))
        return y if self.small_conv is None else y + self.small_conv(x)

    def merge(self) -> None:
        if self.lkb_reparam is not None:
            return
        assert self.lkb_origin is not None
        merged = fuse_conv_norm(self.lkb_origin.conv, self.lkb_origin.bn)  # pyright: ignore[reportArgumentType]
        assert merged.bias is not None
        if self.small_conv is not None:
            small = fuse_conv_norm(self.small_conv.conv, self.small_conv.bn)  # pyright: ignore[reportArgumentType]
            assert small.bias is not None
            margin = (merged.weight.shape[-1] - small.weight.shape[-1]) // 2
            merged.weight.add_(F.pad(small.weight, (margin,) * 4))
            merged.bias.add_(small.bias)
        self.lkb_reparam, self.lkb_origin, self.small_conv = merged, None, None


class _RepLKBlock(nn.Module):
    """x + BN W2 relu(LK(relu(BN W1 BN x)))."""

    def __init__(
        self, channels: int, width: int, size: int, small: int | None, *, drop_path: float, merged: bool
    ) -> None:
        super().__init__()
        self.prelkb_bn: nn.Module = nn.BatchNorm2d(channels)
        self.pw1 = _ConvNorm(channels, width, 1)
        self.large_kernel = _LargeKernel(width, size, small, merged=merged)
        self.pw2 = _ConvNorm(width, channels, 1, relu=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.large_kernel(self.pw1(self.prelkb_bn(x))))
        return x + self.drop_path(self.pw2(y))

    def fuse(self) -> None:
        self.pw1.fuse(self.prelkb_bn)
        self.large_kernel.merge()
        self.pw2.fuse()
        self.prelkb_bn = nn.Identity()


class _FFNBlock(nn.Module):
    """x + BN P2 gelu(BN P1 BN x)."""

    def __init__(self, channels: int, width: int, *, drop_path: float) -> None:
        super().__init__()
        self.preffn_bn: nn.Module = nn.BatchNorm2d(channels)
        self.pw1 = _ConvNorm(channels, width, 1, relu=False)
        self.pw2 = _ConvNorm(width, channels, 1, relu=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.pw2(F.gelu(self.pw1(self.preffn_bn(x)))))

    def fuse(self) -> None:
        self.pw1.fuse(self.preffn_bn)
        self.pw2.fuse()
        self.preffn_bn = nn.Identity()


class _Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class RepLKNet(nn.Module):
    """A RepLKNet.

    Args:
        large_kernel_sizes: Kernel size of each stage, odd.
        layers: Pairs of a large-kernel and a feed-forward block in each stage.
        channels: Channels of each stage.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        small_kernel: Size of the parallel kernel, odd and no larger than the large ones; None for none.
        dw_ratio: Width of the depthwise convolutions over the channels.
        ffn_ratio: Width of the feed-forward blocks over the channels.
        drop_path_rate: Stochastic depth of the last block; grows from 0.
        merged: Build the large-kernel blocks as they are after merging, to load such weights.
        stem_stride: Reduction by the stem: 4 as published; 2 or 1 for small images.

    Raises:
        ValueError: The numbers of stages differ, a kernel is even, or the small kernel is larger than a large one.

    Source: arXiv:2203.06717, section 4; keys of https://github.com/DingXiaoH/RepLKNet-pytorch.
    """

    head_keys = ("head.",)

    def __init__(
        self,
        large_kernel_sizes: Sequence[int] = (31, 29, 27, 13),
        layers: Sequence[int] = (2, 2, 18, 2),
        channels: Sequence[int] = (128, 256, 512, 1024),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        small_kernel: int | None = 5,
        dw_ratio: float = 1.0,
        ffn_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        merged: bool = False,
        stem_stride: int = 4,
    ) -> None:
        super().__init__()
        if not len(large_kernel_sizes) == len(layers) == len(channels):
            raise ValueError(
                "`large_kernel_sizes`, `layers` and `channels` must have one entry a stage, "
                f"got {len(large_kernel_sizes)}, {len(layers)} and {len(channels)}."
            )
        _check_kernels(large_kernel_sizes, small_kernel)
        check_positive("in_chans", in_chans, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"`stem_stride` must be 1, 2 or 4, got {stem_stride}.")
        self.in_chans, self.num_classes = in_chans, num_classes
        first, last = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stem_stride]
        width = channels[0]
        self.stem = nn.ModuleList(
            [
                _ConvNorm(in_chans, width, 3, stride=first),
                _ConvNorm(width, width, 3, groups=width),
                _ConvNorm(width, width, 1),
                _ConvNorm(width, width, 3, stride=last, groups=width),
            ]
        )
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path_rate, layers)):
            c, blocks = channels[i], []
            for rate in rates:
                wide = {"drop_path": rate, "merged": merged}
                blocks.append(_RepLKBlock(c, int(c * dw_ratio), large_kernel_sizes[i], small_kernel, **wide))
                blocks.append(_FFNBlock(c, int(c * ffn_ratio), drop_path=rate))
            self.stages.append(_Stage(blocks))
            if i + 1 < len(channels):
                n = channels[i + 1]
                self.transitions.append(nn.Sequential(_ConvNorm(c, n, 1), _ConvNorm(n, n, 3, stride=2, groups=n)))
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes) if num_classes else nn.Identity()

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage of images ``(B, in_chans, H, W)``: a quarter of their size and smaller.

        Raises:
            ValueError: The shape does not fit.
        """
        check_floating("x", x)
        check_shape("x", x, f"B {self.in_chans} H W")
        for layer in self.stem:
            x = layer(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps.append(x)
            if i < len(self.transitions):
                x = self.transitions[i](x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, before the norm of the head."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of the last map."""
        return self.head(self.norm(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of images ``(B, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def fuse(self) -> RepLKNet:
        """Return an equivalent, faster copy for inference: parallel kernels merged, norms folded into the maps.

        Raises:
            RuntimeError: The network is in training mode.
        """
        network: Any = check_fusable(self)
        for layer in [*network.stem, *(part for pair in network.transitions for part in pair)]:
            layer.fuse()
        for stage in network.stages:
            for block in stage.blocks:
                block.fuse()
        return network.to(memory_format=torch.channels_last)


def _check_kernels(sizes: Iterable[int], small: int | None) -> None:
    for size in sizes:
        check_positive("large_kernel_sizes", size, integer=True)
        if size % 2 == 0:
            raise ValueError(f"`large_kernel_sizes` must be odd, got {size}.")
        if small is not None and small > size:
            raise ValueError(f"`small_kernel` {small} is larger than the large kernel {size}.")
    if small is not None and small % 2 == 0:
        raise ValueError(f"`small_kernel` must be odd, got {small}.")


def sweep_kernels(
    build: Callable[[int], nn.Module], sizes: Sequence[int] = (3, 7, 9, 11, 13, 15), *, seed: int = 0
) -> dict[int, nn.Module]:
    """Build one network for each kernel size, from the same seed.

    Args:
        build: Takes a kernel size and returns a network.
        sizes: Kernel sizes, odd.
        seed: Of the weights.

    Returns:
        Size to network, in the order of ``sizes``; each maps what ``build`` says, e.g. ``(B, 3, H, W)``.

    Raises:
        ValueError: A size is even.

    Example:
        >>> networks = sweep_kernels(lambda k: RepLKNet((k,), (2,), (8,), small_kernel=None), (3, 13))
        >>> list(networks)
        [3, 13]
    """
    _check_kernels(sizes, None)
    networks = {}
    for size in sizes:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            networks[size] = build(size)
    return networks


class ShapeBias(NamedTuple):
    """Share of decisions for the shape among those for shape or texture.

    Attributes:
        per_class: Shape class to its share; NaN where no decision was for either.
        mean: Mean of the shares that are defined.
        overall: Share over all images together.
    """

    per_class: dict[int, float]
    mean: float
    overall: float


def shape_bias(
    probabilities: Tensor | np.ndarray,
    shape_class: Sequence[int] | np.ndarray,
    texture_class: Sequence[int] | np.ndarray,
    groups: Sequence[Sequence[int]],
) -> ShapeBias:
    """Measure whether a network decides by shape or by texture, on images whose shape and texture disagree.

    The probability of a coarse class is the mean of its members'; the decision is the largest.

    Args:
        probabilities: Softmax outputs, ``(N, classes)``, finite.
        shape_class: Coarse class of each image's shape, ``(N,)``.
        texture_class: Coarse class of its texture, ``(N,)``; another one.
        groups: For each coarse class, the classes it consists of.

    Raises:
        ValueError: Shapes do not fit, values are not finite, shape and texture agree somewhere, or a group is empty or
            names a class that is not there.

    Source: Geirhos et al., 2019, arXiv:1811.12231, as in the toolbox ``bethgelab/model-vs-human``.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    shape, texture = np.asarray(shape_class), np.asarray(texture_class)
    if p.ndim != 2 or shape.shape != (len(p),) or texture.shape != (len(p),):
        raise ValueError(
            f"`probabilities` must be (N, classes) and the classes (N,), got {p.shape}, {shape.shape}, {texture.shape}."
        )
    if not np.isfinite(p).all():
        raise ValueError("`probabilities` must be finite.")
    if any(len(g) == 0 or min(g) < 0 or max(g) >= p.shape[1] for g in groups):
        raise ValueError(f"`groups` must each name some of the {p.shape[1]} classes.")
    if (shape == texture).any():
        raise ValueError(f"Shape and texture agree in image {int(np.flatnonzero(shape == texture)[0])}.")
    chosen = np.stack([p[:, list(group)].mean(1) for group in groups], 1).argmax(1)

    def share(rows: np.ndarray) -> float:
        by_shape, by_texture = int((chosen == shape)[rows].sum()), int((chosen == texture)[rows].sum())
        return by_shape / (by_shape + by_texture) if by_shape + by_texture else float("nan")

    per_class = {int(c): share(shape == c) for c in np.unique(shape)}
    defined = [value for value in per_class.values() if not np.isnan(value)]
    return ShapeBias(per_class, float(np.mean(defined)) if defined else float("nan"), share(np.full(len(p), True)))


def replknet_31b(**overrides: Any) -> RepLKNet:
    """RepLKNet-31B (79.53 M parameters merged, 15.35 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return RepLKNet(**overrides)


def replknet_31l(**overrides: Any) -> RepLKNet:
    """RepLKNet-31L (172.17 M parameters merged, 95.99 GMAC at 384), ``(B, 3, H, W) -> (B, 1000)``."""
    return RepLKNet(**{"channels": (192, 384, 768, 1536), **overrides})


def replknet_xl(**overrides: Any) -> RepLKNet:
    """RepLKNet-XL (335.40 M parameters, 128.73 GMAC at 320; inputs in [-1, 1]), ``(B, 3, H, W) -> (B, 1000)``."""
    settings = {"large_kernel_sizes": (27, 27, 27, 13), "channels": (256, 512, 1024, 2048), "dw_ratio": 1.5}
    return RepLKNet(**{**settings, "small_kernel": None, **overrides})


def classify_images(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> RepLKNet:
    """Build the competitor of ``dynakern compare classify-images``: three stages with kernels up to half the map.

    Args:
        in_chans: Channels of the images.
        img_size: Side of the images.
        num_classes: Number of classes.
        width: Multiplies the channels of the stages.

    Returns:
        A module that maps ``(B, in_chans, S, S)`` to logits ``(B, num_classes)``.
    """
    stride = 2 if img_size <= 64 else 4
    sides = (img_size // stride // 2**i for i in range(3))
    kernels = tuple(max(3, min(13, side // 2 * 2 + 1)) for side in sides)
    return RepLKNet(
        kernels,
        (1, 1, 1),
        tuple(max(4, round(c * width)) for c in (32, 64, 128)),
        in_chans=in_chans,
        num_classes=num_classes,
        small_kernel=3,
        stem_stride=stride,
    )
