"""Pyramid vision transformers whose attention adds and whose linear maps shift."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_floating, check_positive, check_shape
from dynakern.layers.vision import DropPath, check_fusable, drop_path_rates
from dynakern.vision.shiftaddvit.attention import (
    KernelHash,
    LinearAngularAttention,
    LinearMap,
    ReducedAttention,
    SoftmaxAttention,
)
from dynakern.vision.shiftaddvit.linear import Experts, NaiveGate, NoisyGate, ShiftLinear, shift_add_experts

__all__ = [
    "PVT",
    "PVTv2",
    "classify_images",
    "convert_state_dict",
    "pvt_large",
    "pvt_medium",
    "pvt_small",
    "pvt_tiny",
    "pvt_v2_b0",
    "pvt_v2_b1",
    "pvt_v2_b2",
    "pvt_v2_b3",
    "pvt_v2_b4",
    "pvt_v2_b5",
]

AttentionKind = Literal["hash", "binary", "softmax", "reduced"]


class DepthwiseConv(nn.Module):
    """3x3 convolution of each channel on the grid of the tokens."""

    def __init__(self, dim: int, **at: Any) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **at)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return ``(B, N, C)`` of tokens ``(B, height * width, C)``."""
        grid = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # a view: channels last
        return self.dwconv(grid).permute(0, 2, 3, 1).flatten(1, 2)


class Mlp(nn.Module):
    """Two linear maps with a GELU and, in PVTv2, a depthwise convolution between them, ``(B, N, C) -> (B, N, C)``."""

    def __init__(self, dim: int, hidden: int, *, linear: LinearMap = nn.Linear, conv: bool = True, **at: Any) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden, True, **at)
        self.dwconv = DepthwiseConv(hidden, **at) if conv else None
        self.fc2 = linear(hidden, dim, True, **at)

    def forward(self, x: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Return ``(B, N, C)`` of tokens ``(B, N, C)``."""
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x, height, width)
        return self.fc2(F.gelu(x))


class Block(nn.Module):
    """Attention and an MLP, each after a norm and beside a shortcut."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, **at: Any) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6, **at), attn
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6, **at), mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return ``(B, N, C)`` of the tokens of a grid, ``(B, N, C)``."""
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        y = self.norm2(x)
        return x + self.drop_path(self.mlp(y) if isinstance(self.mlp, Experts) else self.mlp(y, height, width))


class PatchEmbed(nn.Module):
    """A strided convolution to tokens, and their norm."""

    def __init__(self, in_channels: int, dim: int, size: int, stride: int, padding: int, **at: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, size, stride, padding, **at)
        self.norm = nn.LayerNorm(dim, **at)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Return tokens ``(B, H' W', C)``, H' and W' of a map ``(B, C_in, H, W)``."""
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2], x.shape[3]


class _Pyramid(nn.Module):
    """What both networks share: how a block is made, and what is done to all hashes, experts and shift layers."""

    head_keys = ("head.",)

    def _set(
        self, in_chans: int, num_classes: int, embed_dims: Sequence[int], depths: Sequence[int], attention: str
    ) -> None:
        check_positive("in_chans", in_chans, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        check_choice("attention", attention, ("hash", "binary", "softmax", "reduced"))
        if len(embed_dims) != len(depths):
            raise ValueError(f"`embed_dims` and `depths` must have one entry a stage, got {embed_dims} and {depths}.")
        self.in_chans, self.num_classes, self.num_stages = in_chans, num_classes, len(depths)
        self.embed_dims, self.num_features = tuple(embed_dims), embed_dims[-1]

    def _check(self, x: Tensor) -> None:
        check_floating("x", x)
        check_shape("x", x, f"B {self.in_chans} H W")

    def balance_loss(self) -> Tensor:
        """Return the sum of the balance losses of all experts in the last forward pass in training, 0-d."""
        losses = [m.last_loss for m in self.modules() if isinstance(m, Experts) and m.last_loss is not None]
        return torch.stack(losses).sum() if losses else torch.zeros(())

    @torch.no_grad()
    def fit_hashing(self, images: Tensor) -> None:
        """Fit every hash anew, first stage first, to ``images``, ``(B, in_chans, H, W)``; a few images suffice.

        Raises:
            ValueError: A stage has fewer tokens than anchors, or than twice ``topk``.
        """
        hooks = [m.register_forward_pre_hook(_fit) for m in self.modules() if isinstance(m, KernelHash)]
        was = self.training
        try:
            self.eval()(images)
        finally:
            self.train(was)
            for hook in hooks:
                hook.remove()

    def fuse(self) -> nn.Module:
        """Return an equivalent copy for inference whose shift layers take one byte a weight.

        Raises:
            RuntimeError: The network is in training mode.
        """
        fused = check_fusable(self)
        for module in list(fused.modules()):
            for name, child in module.named_children():
                if isinstance(child, ShiftLinear):
                    setattr(module, name, child.pack())
        return fused


def _fit(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    assert isinstance(module, KernelHash)
    module.fit(args[0])


def _factories(
    moe: bool, gate: Literal["noisy", "naive"], combine: Literal["product", "logexp"], weight_bits: int
) -> LinearMap:
    if not moe:
        return nn.Linear
    return functools.partial(shift_add_experts, gate=gate, combine=combine, weight_bits=weight_bits)


def _initialise(network: nn.Module) -> None:
    for m in network.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Conv2d):
            fan_out = math.prod(m.kernel_size) * m.out_channels // m.groups
            nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class PVTv2(_Pyramid):
    """PVTv2 with attention by additions and, on request, mixtures of multiplying and shifting experts.

    Args:
        embed_dims: Width of each stage.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden over input width of each stage's MLPs.
        depths: Blocks of each stage.
        sr_ratios: Reductions of ``attention="reduced"``.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the mean of the last tokens comes out.
        attention: Of all stages but the last, which has softmax attention: ``"hash"``, ``"binary"``
            (:class:`LinearAngularAttention`) or ``"softmax"``. ``"reduced"``: the baseline, in the last stage too.
        moe_attn: Experts for the linear maps of the attention (not of softmax attention).
        moe_mlp: Experts for the linear maps of the MLPs.
        gate: See :func:`shift_add_experts`, as the next two.
        combine: How the gate's value enters.
        weight_bits: Of the shifting experts.
        qkv_bias: Whether queries, keys and values have a bias.
        threshold: See :class:`LinearAngularAttention`, as the next three.
        bits: Length of a hash.
        num_anchors: Of a hash.
        topk: Of a hash.
        patch_stride: Stride of the first embedding, whose 7x7 convolution is 3x3 for stride 1 or 2.
        drop_path_rate: Stochastic depth of the last block; grows from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option is unknown, or there is not one entry a stage.

    Source: You et al., 2023, arXiv:2306.06446; PVTv2: Wang et al., 2022, arXiv:2106.13797.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (32, 64, 160, 256),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 2, 2),
        *,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        in_chans: int = 3,
        num_classes: int = 1000,
        attention: AttentionKind = "hash",
        moe_attn: bool = False,
        moe_mlp: bool = False,
        gate: Literal["noisy", "naive"] = "noisy",
        combine: Literal["product", "logexp"] = "product",
        weight_bits: int = 5,
        qkv_bias: bool = True,
        threshold: Literal["sample", "batch"] = "sample",
        bits: int = 16,
        num_anchors: int = 25,
        topk: int = 10,
        patch_stride: int = 4,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set(in_chans, num_classes, embed_dims, depths, attention)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        codes: dict[str, Any] = {"threshold": threshold, "bits": bits, "num_anchors": num_anchors, "topk": topk}
        inner, outer = (_factories(moe, gate, combine, weight_bits) for moe in (moe_attn, moe_mlp))
        channels = in_chans
        for i, (dim, rates) in enumerate(zip(embed_dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            first = (3 if patch_stride <= 2 else 7, patch_stride)
            size, stride = first if i == 0 else (3, 2)
            kind = "softmax" if i + 1 == len(depths) and attention != "reduced" else attention
            make = functools.partial(
                _attention, kind, dim, num_heads[i], sr_ratios[i], inner, codes=codes, qkv_bias=qkv_bias, **at
            )
            blocks = [
                Block(dim, make(), Mlp(dim, int(dim * mlp_ratios[i]), linear=outer, **at), r, **at) for r in rates
            ]
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(channels, dim, size, stride, size // 2, **at))
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6, **at))
            channels = dim
        self.head = nn.Linear(channels, num_classes, **at) if num_classes else nn.Identity()
        _initialise(self)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage, ``(B, C_i, H_i, W_i)``, of images ``(B, in_chans, H, W)``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: ``x`` has another shape.
        """
        self._check(x)
        maps = []
        for i in range(1, self.num_stages + 1):
            x, H, W = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x, H, W)
            x = getattr(self, f"norm{i}")(x).unflatten(1, (H, W)).permute(0, 3, 1, 2)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, ``(B, num_features, H', W')``, of images ``(B, in_chans, H, W)``."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)`` of the last map, or its means if there is no classifier."""
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(B, num_classes)``, of images ``(B, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))


def _attention(
    kind: str,
    dim: int,
    heads: int,
    reduction: int,
    linear: LinearMap,
    *,
    codes: dict[str, Any],
    qkv_bias: bool,
    split: bool = False,
    **at: Any,
) -> nn.Module:
    if kind == "softmax":
        return SoftmaxAttention(dim, heads, qkv_bias=qkv_bias, split=split, **at)
    if kind == "reduced":
        return ReducedAttention(dim, heads, reduction=reduction, qkv_bias=qkv_bias, linear=linear, **at)
    return LinearAngularAttention(
        dim, heads, codes="hash" if kind == "hash" else "binary", qkv_bias=qkv_bias, linear=linear, **codes, **at
    )


class PVT(_Pyramid):
    """PVT (version 1): patches do not overlap, positions are learnt, a class token joins the last stage.

    The classifier reads the class token, which is in no map: there is no ``forward_head``.

    Args:
        embed_dims: Width of each stage.
        num_heads: Heads of each stage.
        mlp_ratios: Hidden over input width of each stage's MLPs.
        depths: Blocks of each stage.
        sr_ratios: Reductions of ``attention="reduced"``.
        img_size: Size of the square images that the positions are drawn up for; others interpolate.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the class token comes out.
        attention: See :class:`PVTv2`, whose last stage here has two maps ``q`` and ``kv``.
        moe_attn: Experts for the linear maps of the attention.
        moe_mlp: Whole MLPs as experts.
        gate: See :class:`PVTv2`, as the rest.
        combine: How the gate's value enters.
        weight_bits: Of the shifting experts.
        qkv_bias: Whether queries, keys and values have a bias.
        threshold: Of binary codes.
        bits: Length of a hash.
        num_anchors: Of a hash.
        topk: Of a hash.
        drop_path_rate: Stochastic depth of the last block; grows from 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option is unknown, or there is not one entry a stage.

    Source: You et al., 2023, arXiv:2306.06446; PVT: Wang et al., 2021, arXiv:2102.12122.
    """

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        depths: Sequence[int] = (2, 2, 2, 2),
        *,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        attention: AttentionKind = "hash",
        moe_attn: bool = False,
        moe_mlp: bool = False,
        gate: Literal["noisy", "naive"] = "noisy",
        combine: Literal["product", "logexp"] = "product",
        weight_bits: int = 5,
        qkv_bias: bool = True,
        threshold: Literal["sample", "batch"] = "sample",
        bits: int = 16,
        num_anchors: int = 25,
        topk: int = 10,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._set(in_chans, num_classes, embed_dims, depths, attention)
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        codes: dict[str, Any] = {"threshold": threshold, "bits": bits, "num_anchors": num_anchors, "topk": topk}
        inner = _factories(moe_attn, gate, combine, weight_bits)
        channels, self.grids = in_chans, []
        for i, (dim, rates) in enumerate(zip(embed_dims, drop_path_rates(drop_path_rate, depths), strict=True)):
            last, size, hidden = i + 1 == len(depths), 4 if i == 0 else 2, int(dim * mlp_ratios[i])
            self.grids.append((img_size if i == 0 else self.grids[-1]) // size)
            kind = "softmax" if last else attention
            make = functools.partial(
                _attention,
                kind,
                dim,
                num_heads[i],
                sr_ratios[i],
                inner,
                codes=codes,
                qkv_bias=qkv_bias,
                split=last,
                **at,
            )
            mlp = functools.partial(_mlp, dim, hidden, moe_mlp, gate, combine, weight_bits, **at)
            positions = nn.Parameter(torch.empty(1, self.grids[-1] ** 2 + last, dim, **at))
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(channels, dim, size, size, 0, **at))
            setattr(self, f"pos_embed{i + 1}", nn.init.trunc_normal_(positions, std=0.02))
            setattr(self, f"block{i + 1}", nn.ModuleList([Block(dim, make(), mlp(), r, **at) for r in rates]))
            channels = dim
        self.norm = nn.LayerNorm(channels, eps=1e-6, **at)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, channels, **at), std=0.02))
        self.head = nn.Linear(channels, num_classes, **at) if num_classes else nn.Identity()
        _initialise(self)

    def _positions(self, stage: int, height: int, width: int) -> Tensor:
        """Return the positions of a stage, ``(1, height * width, C)``, with that of the class token in the last."""
        P, grid = getattr(self, f"pos_embed{stage + 1}"), self.grids[stage]
        if (height, width) == (grid, grid):
            return P
        extra = P.shape[1] - grid**2
        square = P[:, extra:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=(height, width), mode="bilinear").flatten(2).transpose(1, 2)
        return torch.cat([P[:, :extra], resized], 1)

    def _stages(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the maps of the stages and the class token ``(B, C)``."""
        self._check(x)
        maps = []
        for i in range(self.num_stages):
            x, H, W = getattr(self, f"patch_embed{i + 1}")(x)
            last = i + 1 == self.num_stages
            if last:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            x = x + self._positions(i, H, W)
            for block in getattr(self, f"block{i + 1}"):
                x = block(x, H, W)
            x = self.norm(x) if last else x
            grid = x[:, int(last) :].unflatten(1, (H, W)).permute(0, 3, 1, 2)
            maps.append(grid)
            x = x if last else grid
        return maps, x[:, 0]

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage, ``(B, C_i, H_i, W_i)``, of images ``(B, in_chans, H, W)``.

        Raises:
            TypeError: ``x`` is not floating point.
            ValueError: ``x`` has another shape.
        """
        return self._stages(x)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(B, num_classes)``, of images ``(B, in_chans, H, W)``."""
        return self.head(self._stages(x)[1])


def _mlp(
    dim: int,
    hidden: int,
    moe: bool,
    gate: Literal["noisy", "naive"],
    combine: Literal["product", "logexp"],
    weight_bits: int,
    **at: Any,
) -> nn.Module:
    ordinary = Mlp(dim, hidden, conv=False, **at)
    if not moe:
        return ordinary
    check_choice("gate", gate, ("noisy", "naive"))
    shift = Mlp(dim, hidden, linear=functools.partial(ShiftLinear, weight_bits=weight_bits), conv=False, **at)
    return Experts((NaiveGate if gate == "naive" else NoisyGate)(dim, **at), ordinary, shift, combine=combine)


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Leave out what the official state dicts hold but never use: the projection of an attention they derive from."""
    return {key: value for key, value in state.items() if not key.endswith("qk_quant.projection_matrix")}


def pvt_v2_b0(**overrides: Any) -> PVTv2:
    """PVTv2-B0 with hashed attention (3.136 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return PVTv2(**{"embed_dims": (32, 64, 160, 256), **overrides})


def _v2(depths: Sequence[int], overrides: dict[str, Any]) -> PVTv2:
    return PVTv2(**{"embed_dims": (64, 128, 320, 512), "depths": depths, **overrides})


def pvt_v2_b1(**overrides: Any) -> PVTv2:
    """PVTv2-B1 with hashed attention (11.892 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return _v2((2, 2, 2, 2), overrides)


def pvt_v2_b2(**overrides: Any) -> PVTv2:
    """PVTv2-B2 with hashed attention (20.368 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return _v2((3, 4, 6, 3), overrides)


def pvt_v2_b3(**overrides: Any) -> PVTv2:
    """PVTv2-B3 with hashed attention (34.085 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return _v2((3, 4, 18, 3), overrides)


def pvt_v2_b4(**overrides: Any) -> PVTv2:
    """PVTv2-B4 with hashed attention (45.667 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return _v2((3, 8, 27, 3), overrides)


def pvt_v2_b5(**overrides: Any) -> PVTv2:
    """PVTv2-B5 with hashed attention (58.953 M parameters), ``(B, 3, H, W) -> (B, 1000)``."""
    return _v2((3, 6, 40, 3), {"mlp_ratios": (4, 4, 4, 4), **overrides})


def pvt_tiny(**overrides: Any) -> PVT:
    """PVT-Tiny with hashed attention, ``(B, 3, 224, 224) -> (B, 1000)``."""
    return PVT(**overrides)


def pvt_small(**overrides: Any) -> PVT:
    """PVT-Small with hashed attention, ``(B, 3, 224, 224) -> (B, 1000)``."""
    return PVT(**{"depths": (3, 4, 6, 3), **overrides})


def pvt_medium(**overrides: Any) -> PVT:
    """PVT-Medium with hashed attention, ``(B, 3, 224, 224) -> (B, 1000)``."""
    return PVT(**{"depths": (3, 4, 18, 3), **overrides})


def pvt_large(**overrides: Any) -> PVT:
    """PVT-Large with hashed attention, ``(B, 3, 224, 224) -> (B, 1000)``."""
    return PVT(**{"depths": (3, 8, 27, 3), **overrides})


def classify_images(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> PVTv2:
    """Build a small classifier of images, ``(B, in_chans, img_size, img_size) -> (B, num_classes)``."""
    half = 8 * max(1, round(6 * width))
    return PVTv2(
        (half, 2 * half), (2, 4), (4, 4), (2, 2), sr_ratios=(2, 1), in_chans=in_chans, num_classes=num_classes,
        attention="binary", patch_stride=1 if img_size <= 8 else 2 if img_size <= 32 else 4,
    )  # fmt: skip
