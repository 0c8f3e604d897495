r"""The network: dilated reparam blocks, the published sizes, fusing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_floating, check_positive, check_shape
from dynakern.layers.vision import (
    DropPath,
    LayerNorm2d,
    cache_key,
    check_fusable,
    drop_path_rates,
    fuse_conv_norm,
    init_truncated_normal,
    norm_scale_shift,
)
from dynakern.ops import depthwise_conv2d

__all__ = [
    "BRANCHES",
    "DilatedReparamBlock",
    "UniRepLKNet",
    "UniRepLKNetBlock",
    "classify_images",
    "default_kernel_sizes",
    "layer_decay_scales",
]

# Kernel size to the sizes and dilations of its parallel branches.
BRANCHES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    17: ((5, 9, 3, 3, 3), (1, 2, 4, 5, 7)),
    15: ((5, 7, 3, 3, 3), (1, 2, 3, 5, 7)),
    13: ((5, 7, 3, 3, 3), (1, 2, 3, 4, 5)),
    11: ((5, 5, 3, 3, 3), (1, 2, 3, 4, 5)),
    9: ((5, 5, 3, 3), (1, 2, 3, 4)),
    7: ((5, 3, 3), (1, 2, 3)),
    5: ((3, 3), (1, 2)),
}


class DilatedReparamBlock(nn.Module):
    r"""A large depthwise convolution with dilated small ones beside it, ``(B, C, H, W) -> (B, C, H, W)``.

    :math:`y = \mathrm{BN}_0(W_K * x) + \sum_i \mathrm{BN}_i(W_{k_i} *_{r_i} x)`: a kernel of k taps and dilation r is a
    sparse one of r (k - 1) + 1 pixels, so all merge into one K x K kernel for inference.

    Args:
        channels: Channels C.
        kernel_size: K, one of 5, 7, ..., 17.
        deploy: Build the single merged convolution.

    Raises:
        ValueError: ``kernel_size`` is not one of these.

    Source: Ding et al., 2024, arXiv:2311.15599, section 3.2.
    """

    def __init__(self, channels: int, kernel_size: int, *, deploy: bool = False) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise ValueError(f"`kernel_size` must be one of {sorted(BRANCHES)}, got {kernel_size}.")
        self.kernel_size, self.deploy = kernel_size, deploy
        self._kept: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None
        made: dict[str, Any] = {"groups": channels, "bias": deploy}
        self.lk_origin = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, **made)
        if deploy:
            return
        self.origin_bn = nn.BatchNorm2d(channels)
        for k, r in self.branches:
            padding = (r * (k - 1) + 1) // 2
            self.add_module(f"dil_conv_k{k}_{r}", nn.Conv2d(channels, channels, k, 1, padding, r, **made))
            self.add_module(f"dil_bn_k{k}_{r}", nn.BatchNorm2d(channels))

    @property
    def branches(self) -> list[tuple[int, int]]:
        """Kernel size and dilation of each branch."""
        return list(zip(*BRANCHES[self.kernel_size], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of ``x``."""
        if self.deploy:
            return depthwise_conv2d(x, self.lk_origin.weight, self.lk_origin.bias)
        if not self.training and not torch.is_grad_enabled():
            return depthwise_conv2d(x, *self._merged_once())  # one convolution instead of six
        y = self.origin_bn(depthwise_conv2d(x, self.lk_origin.weight))
        for k, r in self.branches:
            y = y + self.get_submodule(f"dil_bn_k{k}_{r}")(self.get_submodule(f"dil_conv_k{k}_{r}")(x))
        return y

    def _merged_once(self) -> tuple[Tensor, Tensor]:
        """Return :meth:`merged`, kept from the last call where nothing has changed since."""
        key = cache_key(*self.parameters(), *(b for b in self.buffers() if b.is_floating_point()))
        if key is None:
            return self.merged()
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.merged()
        return self._kept[1]

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return kernel ``(C, 1, K, K)`` and bias ``(C,)`` of the convolution that all branches are in eval mode."""
        if self.deploy:
            assert self.lk_origin.bias is not None
            return self.lk_origin.weight.detach(), self.lk_origin.bias.detach()
        scale, bias = norm_scale_shift(self.origin_bn)
        weight = self.lk_origin.weight.detach() * scale.view(-1, 1, 1, 1)
        for k, r in self.branches:
            small: Any = self.get_submodule(f"dil_conv_k{k}_{r}")
            scale, shift = norm_scale_shift(self.get_submodule(f"dil_bn_k{k}_{r}"))  # pyright: ignore
            dense = weight.new_zeros(len(weight), 1, r * (k - 1) + 1, r * (k - 1) + 1)
            dense[:, :, ::r, ::r] = small.weight.detach() * scale.view(-1, 1, 1, 1)
            margin = (self.kernel_size - dense.shape[-1]) // 2
            weight = weight + F.pad(dense, (margin,) * 4)
            bias = bias + shift
        return weight, bias


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, channels // 4, 1)
        self.up = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class _GRN(nn.Module):
    """Global response normalisation of ``(B, H, W, C)``: (gamma g / mean(g) + 1) z + beta, g the norm over pixels."""

    def __init__(self, channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels)) if bias else None

    def forward(self, z: Tensor) -> Tensor:
        g = torch.linalg.vector_norm(z, dim=(1, 2), keepdim=True)
        y = (self.gamma * (g / (g.mean(-1, keepdim=True) + 1e-6)) + 1) * z
        return y if self.beta is None else y + self.beta


class _ToLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _ToFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class UniRepLKNetBlock(nn.Module):
    r"""One block, ``(B, C, H, W) -> (B, C, H, W)``.

    :math:`x + \gamma\, \mathrm{BN}(W_2\, \mathrm{GRN}(\mathrm{GELU}(W_1\, \mathrm{SE}(\mathrm{BN}(\mathrm{DW}(x))))))`.

    Args:
        dim: Channels C, at least 4.
        kernel_size: 0 for no depthwise convolution, 3 or 5 for a plain one, 7 to 17 for a :class:`DilatedReparamBlock`.
        drop_path: Rate of stochastic depth.
        layer_scale_init_value: Initial :math:`\gamma`; None or 0 for none.
        deploy: Build the block as it is after fusing.
        ffn_factor: Width of the hidden layer over C.

    Raises:
        ValueError: ``kernel_size`` is none of these.

    Source: arXiv:2311.15599, figure 2; keys of https://github.com/AILab-CVC/UniRepLKNet.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        deploy: bool = False,
        ffn_factor: int = 4,
    ) -> None:
        super().__init__()
        check_positive("dim", dim, integer=True)
        self.kernel_size, wide = kernel_size, int(ffn_factor * dim)
        if kernel_size == 0:
            self.dwconv: nn.Module = nn.Identity()
        elif kernel_size in (3, 5):
            self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=deploy)
        elif kernel_size >= 7 and kernel_size in BRANCHES:
            self.dwconv = DilatedReparamBlock(dim, kernel_size, deploy=deploy)
        else:
            raise ValueError(f"`kernel_size` must be 0, 3, 5, 7, 9, 11, 13, 15 or 17, got {kernel_size}.")
        self.norm: nn.Module = nn.Identity() if deploy or kernel_size == 0 else nn.BatchNorm2d(dim)
        self.se = _SqueezeExcite(dim)
        self.pwconv1 = nn.Sequential(_ToLast(), nn.Linear(dim, wide))
        self.act = nn.Sequential(nn.GELU(), _GRN(wide, bias=not deploy))
        second: list[nn.Module] = [nn.Linear(wide, dim, bias=deploy), _ToFirst()]
        self.pwconv2 = nn.Sequential(*second, *([] if deploy else [nn.BatchNorm2d(dim)]))
        scaled = not deploy and layer_scale_init_value is not None and layer_scale_init_value > 0
        self.gamma = nn.Parameter(torch.full((dim,), float(layer_scale_init_value or 0))) if scaled else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of ``x``."""
        y = self.pwconv2(self.act(self.pwconv1(self.se(self.norm(self.dwconv(x))))))
        y = y if self.gamma is None else y * self.gamma.view(-1, 1, 1)
        return x + self.drop_path(y)

    def _depthwise(self) -> nn.Module:
        """Return the merged depthwise convolution with the norm after it folded in."""
        if self.kernel_size == 0 or isinstance(self.norm, nn.Identity):
            return self.dwconv
        if isinstance(self.dwconv, nn.Conv2d):
            return fuse_conv_norm(self.dwconv, self.norm)  # pyright: ignore[reportArgumentType]
        assert isinstance(self.dwconv, DilatedReparamBlock)
        weight, bias = self.dwconv.merged()
        scale, shift = norm_scale_shift(self.norm)  # pyright: ignore[reportArgumentType]
        fused = DilatedReparamBlock(len(bias), self.kernel_size, deploy=True).to(weight.device, weight.dtype)
        assert fused.lk_origin.bias is not None
        fused.lk_origin.weight.copy_(weight * scale.view(-1, 1, 1, 1))
        fused.lk_origin.bias.copy_(bias * scale + shift)
        return fused.requires_grad_(False)

    def fuse(self) -> None:
        """Turn this block into its deployed form, in place."""
        self.dwconv, self.norm = self._depthwise(), nn.Identity()
        grn, linear = self.act[1], self.pwconv2[0]
        if len(self.pwconv2) < 3:
            return
        assert isinstance(grn, _GRN)
        assert isinstance(linear, nn.Linear)
        scale, shift = norm_scale_shift(self.pwconv2[2])  # pyright: ignore[reportArgumentType]
        bias = linear.weight @ grn.beta.view(-1) * scale + shift  # pyright: ignore[reportOptionalMemberAccess]
        weight = linear.weight * scale[:, None]
        if self.gamma is not None:
            weight, bias = weight * self.gamma[:, None], bias * self.gamma
        second = nn.Linear(linear.in_features, linear.out_features, device=weight.device, dtype=weight.dtype)
        second.weight.copy_(weight)
        second.bias.copy_(bias)
        grn.beta = self.gamma = None
        self.pwconv2 = nn.Sequential(second.requires_grad_(False), _ToFirst())


def default_kernel_sizes(depths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the kernel sizes of every block of the published depths.

    Raises:
        ValueError: The depths are none of the published ones, which have no default.

    Example:
        >>> default_kernel_sizes((2, 2, 6, 2))
        ((3, 3), (13, 13), (13, 13, 13, 13, 13, 13), (13, 13))
    """
    depths = tuple(depths)
    if depths in ((2, 2, 6, 2), (2, 2, 8, 2)):
        return ((3,) * depths[0], *((13,) * n for n in depths[1:]))
    if depths == (3, 3, 18, 3):
        return (3, 3, 3), (13, 13, 13), (13, 3) * 9, (13, 13, 13)
    if depths == (3, 3, 27, 3):
        return (3, 3, 3), (13, 13, 13), (13, 3, 3) * 9, (13, 13, 13)
    raise ValueError(f"`depths` {depths} have no default kernels: give `kernel_sizes`, one list a stage.")


class UniRepLKNet(nn.Module):
    """A UniRepLKNet.

    Args:
        depths: Blocks of each of the four stages.
        dims: Channels of each stage.
        kernel_sizes: Kernel size of every block, one list a stage; by default those of the published depths.
        in_chans: Channels of the image or map.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        features_only: Return the map of every stage, each normed, instead of logits; there is no head then.
        drop_path_rate: Stochastic depth of the last block; grows from 0.
        layer_scale_init_value: See :class:`UniRepLKNetBlock`.
        head_init_scale: Factor on the initial weights of the head.
        deploy: Build the network as it is after fusing, to load such weights.
        stem_stride: Reduction by the stem: 4 as published; 2 or 1 for small images.

    Raises:
        ValueError: Lists differ in length, depths have no default kernels, or a kernel size is not known.

    Source: Ding et al., 2024, arXiv:2311.15599; keys of https://github.com/AILab-CVC/UniRepLKNet.
    """

    head_keys = ("head.",)

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 27, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        *,
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        features_only: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        head_init_scale: float = 1.0,
        deploy: bool = False,
        stem_stride: int = 4,
    ) -> None:
        super().__init__()
        if len(depths) != len(dims):
            raise ValueError(f"`depths` and `dims` must have one entry a stage, got {depths!r} and {dims!r}.")
        kernels = default_kernel_sizes(depths) if kernel_sizes is None else kernel_sizes
        if [len(sizes) for sizes in kernels] != list(depths):
            raise ValueError(
                f"`kernel_sizes` must have one entry a block, {tuple(depths)}, got {tuple(len(s) for s in kernels)}."
            )
        check_positive("in_chans", in_chans, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"`stem_stride` must be 1, 2 or 4, got {stem_stride}.")
        self.in_chans, self.num_classes, self.features_only = in_chans, num_classes, features_only
        first, second = {4: (2, 2), 2: (2, 1), 1: (1, 1)}[stem_stride]
        half = dims[0] // 2
        stem = [nn.Conv2d(in_chans, half, 3, first, 1), LayerNorm2d(half), nn.GELU()]
        stem += [nn.Conv2d(half, dims[0], 3, second, 1), LayerNorm2d(dims[0])]
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        for before, dim in itertools.pairwise(dims):
            self.downsample_layers.append(nn.Sequential(nn.Conv2d(before, dim, 3, 2, 1), LayerNorm2d(dim)))
        self.stages = nn.ModuleList()
        options: dict[str, Any] = {"layer_scale_init_value": layer_scale_init_value, "deploy": deploy}
        for dim, sizes, rates in zip(dims, kernels, drop_path_rates(drop_path_rate, depths), strict=True):
            blocks = [UniRepLKNetBlock(dim, k, drop_path=r, **options) for k, r in zip(sizes, rates, strict=True)]
            self.stages.append(nn.Sequential(*blocks))
        if features_only:
            for i, dim in enumerate(dims):
                self.add_module(f"norm{i}", LayerNorm2d(dim))
        else:
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
            self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(init_truncated_normal)
        if not features_only and num_classes:
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)  # pyright: ignore

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage of ``(B, in_chans, H, W)``: a quarter of its size and smaller.

        With ``features_only`` each map is normed.

        Raises:
            ValueError: The shape does not fit.
        """
        check_floating("x", x)
        check_shape("x", x, f"B {self.in_chans} H W")
        maps = []
        for i, (down, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(down(x))
            maps.append(self.get_submodule(f"norm{i}")(x) if self.features_only else x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of the last map.

        Raises:
            ValueError: The network was built with ``features_only``.
        """
        if self.features_only:
            raise ValueError("A network with features_only=True has no head.")
        return self.head(self.norm(x.mean((2, 3))))

    def forward(self, x: Tensor) -> Any:
        """Return logits ``(B, num_classes)`` of ``(B, in_chans, H, W)``, or the list of maps with ``features_only``."""
        maps = self.forward_intermediates(x)
        return maps if self.features_only else self.forward_head(maps[-1])

    @torch.no_grad()
    def fuse(self) -> UniRepLKNet:
        """Return an equivalent, faster copy for inference, in the authors' deployed form.

        Branches are merged into one kernel, norms, layer scales and the bias of the response normalisation folded.

        Raises:
            RuntimeError: The network is in training mode.
        """
        network: Any = check_fusable(self)
        for stage in network.stages:
            for block in stage:
                block.fuse()
        return network.to(memory_format=torch.channels_last)


def layer_decay_scales(model: UniRepLKNet, decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of every parameter for fine-tuning with layer-wise decay.

    The factor is ``decay ** (13 - layer)``: the stem is layer 0, the first two stages and the maps before them 1 and 2,
    three blocks of the third stage together 3 to 11, the last stage 12, the rest 13; shorter third stages end earlier.

    Args:
        model: The network.
        decay: In (0, 1].

    Raises:
        ValueError: ``decay`` is out of range.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"`decay` must be in (0, 1], got {decay!r}.")

    def layer(name: str) -> int:
        kind, _, rest = name.partition(".")
        if kind not in ("downsample_layers", "stages"):
            return 13
        stage = int(rest.split(".")[0])
        if kind == "downsample_layers":
            return (0, 1, 2, 12)[stage] if stage != 2 else 3
        return (1, 2, 3 + int(rest.split(".")[1]) // 3, 12)[stage]

    return {name: decay ** (13 - layer(name)) for name, _ in model.named_parameters()}


def classify_images(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> UniRepLKNet:
    """Build the competitor of ``dynakern compare classify-images``: three stages, no layer scale.

    Args:
        in_chans: Channels of the images.
        img_size: Side of the images.
        num_classes: Number of classes.
        width: Multiplies the channels of the stages.

    Returns:
        A module that maps ``(B, in_chans, S, S)`` to logits ``(B, num_classes)``.
    """
    small = img_size < 24
    return UniRepLKNet(
        (1, 1, 1),
        tuple(max(4, round(c * width)) for c in (32, 64, 112)),
        kernel_sizes=((3,), (7 if small else 13,), (5 if small else 7,)),
        in_chans=in_chans,
        num_classes=num_classes,
        layer_scale_init_value=None,
        stem_stride=2 if img_size <= 64 else 4,
    )
