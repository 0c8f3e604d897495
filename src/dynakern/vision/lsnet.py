r"""LSNet: see large, focus small. Each pixel looks at a wide neighbourhood to choose how it mixes a narrow one.

For very small networks a large kernel is a waste of weights and attention a waste of time. LSNet's convolution first
looks at 7x7 pixels to predict, for every pixel and group of channels, a 3x3 kernel (large-kernel perception), and then
applies it (small-kernel aggregation).

Paper: Wang, Chen, Lin, Han and Ding, 2025, "LSNet: See Large, Focus Small", arXiv:2503.23135. Official code:
https://github.com/jameslahm/lsnet.

Implemented: the convolution, the network at all sizes, the distillation head, fusing, the authors' weights. Other image
sizes than the network was built for resize the attention biases as a table of offsets, bilinearly; the authors resize
the matrix of all pairs. Biases are read anew in each forward pass, so that weights loaded in eval mode count.

Example:
    >>> import torch
    >>> layer = LSConv(16)
    >>> layer(torch.randn(1, 16, 9, 8)).shape
    torch.Size([1, 16, 9, 8])
    >>> model = lsnet_t(img_size=64, num_classes=10).eval()
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_floating, check_positive, check_shape
from dynakern.layers.vision import check_fusable, fuse_conv_norm, fuse_norm_linear, norm_scale_shift
from dynakern.ops import depthwise_conv2d, ska

__all__ = ["LKP", "LSConv", "LSNet", "lsnet_b", "lsnet_s", "lsnet_t"]


class _ConvNorm(nn.Module):
    """A convolution without bias (``c``) and a batch norm (``bn``); after fusing, a convolution with bias."""

    def __init__(self, in_chans: int, out: int, size: int = 1, *, stride: int = 1, groups: int = 1, gain: float = 1.0):
        super().__init__()
        self.c = nn.Conv2d(in_chans, out, size, stride, size // 2, groups=groups, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(out)
        nn.init.constant_(self.bn.weight, gain)  # pyright: ignore[reportArgumentType]
        self.large = groups == in_chans == out and stride == 1 and size >= 7

    def forward(self, x: Tensor) -> Tensor:
        y = depthwise_conv2d(x, self.c.weight, self.c.bias) if self.large else self.c(x)
        return self.bn(y)

    def fuse(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            self.c, self.bn = fuse_conv_norm(self.c, self.bn), nn.Identity()


class LKP(nn.Module):
    """Large-kernel perception: predict a small kernel for every pixel and group of channels.

    Args:
        dim: Channels C, a multiple of ``groups`` and of 2.
        lks: Size of the large kernel, odd.
        sks: Size of the predicted kernels, odd.
        groups: Channels G that share a kernel.

    Raises:
        ValueError: A size is even, or ``dim`` is not divisible.
    """

    def __init__(self, dim: int, lks: int = 7, sks: int = 3, groups: int = 8) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("lks", lks), ("sks", sks), ("groups", groups)):
            check_positive(name, size, integer=True)
        for name, size in (("lks", lks), ("sks", sks)):
            if size % 2 == 0:
                raise ValueError(f"`{name}` must be odd, got {size}.")
        if dim % groups or dim % 2:
            raise ValueError(f"`dim` must be even and divisible by `groups`, got {dim} and {groups}.")
        self.taps = sks**2
        self.cv1 = _ConvNorm(dim, dim // 2)
        self.cv2 = _ConvNorm(dim // 2, dim // 2, lks, groups=dim // 2)
        self.cv3 = _ConvNorm(dim // 2, dim // 2)
        self.cv4 = nn.Conv2d(dim // 2, self.taps * dim // groups, 1)
        self.norm = nn.GroupNorm(dim // groups, self.taps * dim // groups)

    def forward(self, x: Tensor) -> Tensor:
        """Return kernels ``(B, C / G, sks^2, H, W)`` for a map ``(B, C, H, W)``."""
        h = F.relu(self.cv3(self.cv2(F.relu(self.cv1(x)))))
        return self.norm(self.cv4(h)).unflatten(1, (-1, self.taps))


class LSConv(nn.Module):
    r"""Large-small convolution, a token mixer for maps of any size.

    :math:`y = \mathrm{BN}(\mathrm{SKA}(x, \mathrm{LKP}(x))) + x`, with :func:`dynakern.ops.ska` and :class:`LKP`.

    Args:
        dim: Channels C, a multiple of ``groups``.
        lks: See :class:`LKP`.
        sks: See :class:`LKP`.
        groups: See :class:`LKP`.

    Raises:
        ValueError: A size is even, or ``dim`` is not divisible.

    Source: arXiv:2503.23135, section 3.2; channel c takes kernel c mod (C / G), as in the authors' code.
    """

    def __init__(self, dim: int, *, lks: int = 7, sks: int = 3, groups: int = 8) -> None:
        super().__init__()
        self.lkp = LKP(dim, lks, sks, groups)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of ``x``, ``(B, C, H, W)``."""
        return self.bn(ska(x, self.lkp(x))) + x


class _RepVGGDW(nn.Module):
    """Depthwise 3x3 and 1x1 convolutions and the input, added; after fusing, one depthwise convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = _ConvNorm(dim, dim, 3, groups=dim)
        self.conv1: _ConvNorm | None = _ConvNorm(dim, dim, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.conv1 is None else self.conv(x) + self.conv1(x) + x

    def fuse(self) -> None:
        if self.conv1 is None:
            return
        scale, shift = norm_scale_shift(self.conv1.bn)  # pyright: ignore[reportArgumentType]
        point = self.conv1.c.weight * scale.view(-1, 1, 1, 1) + 1  # the input itself is a 1 in the middle
        self.conv.fuse()
        assert self.conv.c.bias is not None
        self.conv.c.weight.add_(F.pad(point, (1, 1, 1, 1)))
        self.conv.c.bias.add_(shift)
        self.conv1 = None


class _SqueezeExcite(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(8, int(dim / 4 + 4) // 8 * 8)
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class _Residual(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class _FFN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pw1, self.pw2 = _ConvNorm(dim, 2 * dim), _ConvNorm(2 * dim, dim, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw2(F.relu(self.pw1(x)))


class _Attention(nn.Module):
    """Attention of all pixels of a small map, with a bias for each head and distance between rows and columns."""

    def __init__(self, dim: int, key_dim: int, num_heads: int, resolution: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.resolution = num_heads, key_dim, resolution
        self.width = int(dim / (key_dim * num_heads) * key_dim)  # of a head's values
        keys, values = num_heads * key_dim, num_heads * self.width
        self.sizes = (keys, keys, values)
        self.qkv = _ConvNorm(dim, sum(self.sizes))
        self.proj = nn.Sequential(nn.ReLU(), _ConvNorm(values, dim, gain=0.0))
        self.dw = _ConvNorm(keys, keys, 3, groups=keys)
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2))
        self.register_buffer("attention_bias_idxs", _offsets(resolution, resolution))
        self.attention_bias_idxs: Tensor

    def _bias(self, height: int, width: int) -> Tensor:
        """Return ``(heads, N, N)``; for another size than the network's the table of offsets is resized."""
        if height == width == self.resolution:
            return self.attention_biases[:, self.attention_bias_idxs]
        table = self.attention_biases.unflatten(1, (self.resolution, -1)).unsqueeze(0)
        table = F.interpolate(table, (height, width), mode="bilinear", align_corners=True)[0].flatten(1)
        return table[:, _offsets(height, width, device=table.device)]

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        q, k, v = self.qkv(x).split(self.sizes, dim=1)
        q = self.dw(q)
        q, k, v = (z.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(-1, -2) for z in (q, k, v))  # (B, A, N, K)
        bias = self._bias(height, width).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.key_dim**-0.5)
        return self.proj(y.transpose(-1, -2).flatten(1, 2).unflatten(-1, (height, width)))


def _offsets(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the number of each pair's offset, rows apart times width plus columns apart: ``(N, N)``."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)


class _Block(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module, *, se: bool) -> None:
        super().__init__()
        self.mixer = mixer
        self.se = _SqueezeExcite(dim) if se else nn.Identity()
        self.ffn = _Residual(_FFN(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.se(self.mixer(x)))


class _NormLinear(nn.Module):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm1d(dim)
        self.l = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))

    def fuse(self) -> None:
        if isinstance(self.bn, nn.BatchNorm1d):
            self.l, self.bn = fuse_norm_linear(self.bn, self.l), nn.Identity()  # pyright: ignore


class LSNet(nn.Module):
    """An LSNet.

    Args:
        embed_dim: Channels of the four stages, multiples of 8.
        depth: Blocks of the four stages.
        num_heads: Attention heads of the four stages; only the last stage has attention.
        key_dim: Width of a head's keys, one number a stage.
        img_size: Side of the images that the attention biases are made for; others resize them.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        patch_size: Reduction by the stem: 8 as published; 4 or 2 for small images.
        distillation: Add a second head: in training the pair of logits comes out, else their mean.

    Raises:
        ValueError: An option does not have four entries, or is out of range.

    Source: arXiv:2503.23135; keys of https://github.com/jameslahm/lsnet.
    """

    head_keys = ("head.", "head_dist.")

    def __init__(
        self,
        embed_dim: Sequence[int] = (64, 128, 256, 384),
        depth: Sequence[int] = (0, 2, 8, 10),
        num_heads: Sequence[int] = (3, 3, 3, 4),
        key_dim: Sequence[int] = (16, 16, 16, 16),
        *,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 8,
        distillation: bool = False,
    ) -> None:
        super().__init__()
        if not len(embed_dim) == len(depth) == len(num_heads) == len(key_dim) == 4:
            raise ValueError("`embed_dim`, `depth`, `num_heads` and `key_dim` must have four entries, one a stage.")
        if patch_size not in (2, 4, 8):
            raise ValueError(f"`patch_size` must be 2, 4 or 8, got {patch_size}.")
        for name, size in (("img_size", img_size), ("in_chans", in_chans)):
            check_positive(name, size, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        self.in_chans, self.num_classes, self.distillation = in_chans, num_classes, distillation
        e, strides = embed_dim[0], {8: (2, 2, 2), 4: (1, 2, 2), 2: (1, 1, 2)}[patch_size]
        self.patch_embed = nn.Sequential(
            _ConvNorm(in_chans, e // 4, 3, stride=strides[0]),
            nn.ReLU(),
            _ConvNorm(e // 4, e // 2, 3, stride=strides[1]),
            nn.ReLU(),
            _ConvNorm(e // 2, e, 3, stride=strides[2]),
        )
        resolution = max(1, img_size // patch_size)
        for stage, (dim, blocks) in enumerate(zip(embed_dim, depth, strict=True)):
            layers: list[nn.Module] = []
            if stage > 0:
                before = embed_dim[stage - 1]
                layers += [_ConvNorm(before, before, 3, stride=2, groups=before), _ConvNorm(before, dim)]
                resolution = (resolution - 1) // 2 + 1
            for d in range(blocks):
                if d % 2 == 0:
                    mixer: nn.Module = _RepVGGDW(dim)
                elif stage == 3:
                    mixer = _Residual(_Attention(dim, key_dim[stage], num_heads[stage], resolution))
                else:
                    mixer = LSConv(dim)
                layers.append(_Block(dim, mixer, se=d % 2 == 0))
            self.add_module(f"blocks{stage + 1}", nn.Sequential(*layers))
        self.head = _NormLinear(embed_dim[3], num_classes) if num_classes else nn.Identity()
        self.head_dist = _NormLinear(embed_dim[3], num_classes) if num_classes and distillation else None

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage of images ``(B, in_chans, H, W)``: an eighth of their size and smaller.

        Raises:
            ValueError: The shape does not fit.
        """
        check_floating("x", x)
        check_shape("x", x, f"B {self.in_chans} H W")
        x, maps = self.patch_embed(x), []
        for stage in range(1, 5):
            x = self.get_submodule(f"blocks{stage}")(x)
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Any:
        """Return logits ``(B, num_classes)`` of the last map; in training with a distillation head, both heads'."""
        x = x.mean((2, 3))
        if self.head_dist is None:
            return self.head(x)
        pair = self.head(x), self.head_dist(x)
        return pair if self.training else (pair[0] + pair[1]) / 2

    def forward(self, x: Tensor) -> Any:
        """Return logits ``(B, num_classes)`` of images ``(B, in_chans, H, W)``; see :meth:`forward_head`."""
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def fuse(self) -> LSNet:
        """Return an equivalent, faster copy for inference: norms folded, parallel depthwise convolutions merged.

        Raises:
            RuntimeError: The network is in training mode.
        """
        network: Any = check_fusable(self)
        parts = list(network.modules())
        for kind in (_RepVGGDW, _ConvNorm, _NormLinear):
            for module in parts:
                if isinstance(module, kind):
                    module.fuse()
        if network.head_dist is not None:
            for name in ("weight", "bias"):
                mean = (getattr(network.head.l, name) + getattr(network.head_dist.l, name)) / 2
                getattr(network.head.l, name).copy_(mean)
            network.head_dist = None
        return network


def lsnet_t(**overrides: Any) -> LSNet:
    """LSNet-T (11.410 M parameters, 0.315 GMAC at 224), ``(B, 3, 224, 224) -> (B, 1000)``."""
    return LSNet(**overrides)


def lsnet_s(**overrides: Any) -> LSNet:
    """LSNet-S (16.146 M parameters, 0.537 GMAC at 224), ``(B, 3, 224, 224) -> (B, 1000)``."""
    return LSNet(**{"embed_dim": (96, 192, 320, 448), "depth": (1, 2, 8, 10), **overrides})


def lsnet_b(**overrides: Any) -> LSNet:
    """LSNet-B (23.314 M parameters, 1.241 GMAC at 224), ``(B, 3, 224, 224) -> (B, 1000)``."""
    return LSNet(**{"embed_dim": (128, 256, 384, 512), "depth": (4, 6, 8, 10), **overrides})


def classify_images(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> LSNet:
    """Build the competitor of ``dynakern compare classify-images``.

    Args:
        in_chans: Channels of the images.
        img_size: Side of the images.
        num_classes: Number of classes.
        width: Multiplies the channels of the stages, which are multiples of 16.

    Returns:
        A module that maps ``(B, in_chans, S, S)`` to logits ``(B, num_classes)``.
    """
    dims = tuple(16 * max(1, round(c * width / 16)) for c in (32, 48, 80, 112))
    return LSNet(
        dims,
        (2, 2, 2, 2),
        key_dim=(8,) * 4,
        num_heads=(2,) * 4,
        img_size=img_size,
        in_chans=in_chans,
        num_classes=num_classes,
        patch_size=2 if img_size <= 64 else 8,
    )
