"""The authors' networks for small images with masked layers: VGG, ResNet, MobileNet V1 and V2, in their key layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.adaptive.dynamic_pruning.layers import MaskedConv
from dynakern.adaptive.dynamic_pruning.network import DynamicNetwork
from dynakern.checks import check_floating, check_positive, check_shape

__all__ = ["VGG", "CifarResNet", "MobileNetV1", "MobileNetV2", "convert_state_dict"]


def _layer(
    inputs: int,
    outputs: int,
    size: int = 3,
    stride: int = 1,
    *,
    groups: int = 1,
    bias: bool = False,
    act: type[nn.Module] | None = nn.ReLU,
    feeder: str | None = None,
    **masking: Any,
) -> MaskedConv:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)
    nn.init.normal_(conv.weight, std=(2 / (size * size * outputs)) ** 0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    layer = MaskedConv(conv, nn.BatchNorm2d(outputs), None if act is None else act(), **masking)
    layer.feeder = feeder
    return layer


class _Classifier(DynamicNetwork):
    """What the four networks share: pooling, a linear classifier, checks."""

    head_name = "fc"

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        check_positive("in_chans", in_chans, integer=True)
        check_positive("num_classes", num_classes, integer=True, zero=True)
        self.in_chans, self.num_classes = in_chans, num_classes

    def _head(self, width: int) -> nn.Module:
        return nn.Linear(width, self.num_classes) if self.num_classes else nn.Identity()

    def _check(self, x: Tensor) -> Tensor:
        check_floating("x", x)
        check_shape("x", x, f"B {self.in_chans} H W")
        return x

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the last map of each size, ``(B, C_i, H_i, W_i)``, of images ``(B, in_chans, H, W)``."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, ``(B, C, H', W')``, of images ``(B, in_chans, H, W)``."""
        return self.forward_intermediates(x)[-1]

    def forward_head(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of the last map, or its means if there is no classifier."""
        return self.get_submodule(self.head_name)(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, num_classes)`` of images ``(B, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))


class VGG(_Classifier):
    """VGG with batch norms and one linear classifier, every convolution masked.

    Args:
        cfg: Channels of each 3x3 convolution, and ``"M"`` for a pooling that halves the map.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        masked: Whether layers have mask predictors; False for the dense network to be pretrained.
        **masking: Options of :class:`MaskedConv`: mass, target, mode, embedding, softmax, pool, safe.

    Raises:
        ValueError: ``cfg`` holds no convolution, or an option is out of range.
    """

    head_keys = ("classifier.",)
    head_name = "classifier"

    def __init__(
        self, cfg: Sequence[int | str], *, in_chans: int = 3, num_classes: int = 10, masked: bool = True, **masking: Any
    ) -> None:
        super().__init__(in_chans, num_classes)
        layers: list[nn.Module] = []
        channels, feeder = in_chans, None
        for i, entry in enumerate(cfg):
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            check_positive("cfg", entry, integer=True)  # pyright: ignore[reportArgumentType]
            layers.append(_layer(channels, int(entry), bias=True, feeder=feeder, masked=masked, **masking))
            channels, feeder = int(entry), f"features.{i}"
        if feeder is None:
            raise ValueError(f"`cfg` must hold at least one convolution, got {cfg!r}.")
        self.features = nn.Sequential(*layers)
        self.classifier = self._head(channels)
        if num_classes:
            nn.init.normal_(self.classifier.weight, std=0.01)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(self.classifier.bias)  # pyright: ignore[reportArgumentType]

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map before each pooling and the last one, ``(B, C_i, H_i, W_i)``, of ``(B, in_chans, H, W)``.

        Raises:
            ValueError: The image has other channels, or is smaller than the poolings need.
        """
        self._check(x)
        need = 2 ** sum(isinstance(m, nn.MaxPool2d) for m in self.features)
        if min(x.shape[2:]) < need:
            raise ValueError(f"`x` must have at least {need} pixels a side, got shape {tuple(x.shape)}.")
        maps: list[Tensor] = []
        for module in self.features:
            if isinstance(module, nn.MaxPool2d):
                maps.append(x)
            x = module(x)
        return [*maps, x]


class _ResidualBlock(nn.Module):
    """Two masked 3x3 convolutions; the mask of the second acts before the sum, or after it (``after_block``)."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, after_block: bool, detach: bool, **layer: Any
    ) -> None:
        super().__init__()
        self.after_block, self.detach, self.stride, self.extra = after_block, detach, stride, outputs - inputs
        self.masked_conv1 = _layer(inputs, outputs, stride=stride, **layer)
        self.masked_conv2 = _layer(outputs, outputs, act=nn.ReLU if after_block else None, **layer)

    def shortcut(self, x: Tensor) -> Tensor:
        """Return the mean of 2 x 2 pixels, with zeros for new channels, where the block changes the shape."""
        if self.stride == 1 and self.extra == 0:
            return x
        x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        x = F.pad(x, (0, 0, 0, 0, 0, self.extra))
        return x.detach() if self.detach else x

    def forward(self, x: Tensor) -> Tensor:
        h = self.masked_conv1(x)
        if self.after_block:
            return self.masked_conv2(h, self.shortcut(x))
        return F.relu(self.masked_conv2(h) + self.shortcut(x))


class CifarResNet(_Classifier):
    """ResNet of 6n + 2 layers for small images, every convolution masked; shortcuts have no parameters.

    Args:
        depth: Layers, 6n + 2.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        width: Channels of the first stage; the next have twice and four times as many.
        after_block: Mask a block's second convolution after the sum and its ReLU, instead of before.
        detach_shortcut: Stop gradients in the shortcuts that change the shape, as the authors' code does.
        masked: Whether layers have mask predictors; False for the dense network to be pretrained.
        **masking: Options of :class:`MaskedConv`: mass, target, mode, embedding, softmax, pool, safe.

    Raises:
        ValueError: ``depth`` is not 6n + 2, or an option is out of range.
    """

    head_keys = ("fc.",)

    def __init__(
        self,
        depth: int = 56,
        *,
        in_chans: int = 3,
        num_classes: int = 10,
        width: int = 16,
        after_block: bool = False,
        detach_shortcut: bool = False,
        masked: bool = True,
        **masking: Any,
    ) -> None:
        super().__init__(in_chans, num_classes)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"`depth` must be 6n + 2 with n >= 1, got {depth!r}.")
        check_positive("width", width, integer=True)
        options = {"after_block": after_block, "detach": detach_shortcut, "masked": masked, **masking}
        self.masked_conv = _layer(in_chans, width, masked=masked, **masking)
        channels, feeder = width, "masked_conv"
        for stage in range(3):
            blocks = []
            for j in range(depth // 6):
                stride = 2 if stage > 0 and j == 0 else 1
                block = _ResidualBlock(channels, width << stage, stride, **options)
                name = f"layer{stage + 1}.{j}.masked_conv"
                block.masked_conv1.feeder, block.masked_conv2.feeder = feeder, name + "1"
                channels, feeder = width << stage, name + "2" if after_block else None
                blocks.append(block)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = self._head(channels)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each stage, ``(B, C_i, H_i, W_i)``, of images ``(B, in_chans, H, W)``."""
        x, maps = self.masked_conv(self._check(x)), []
        for i in (1, 2, 3):
            x = self.get_submodule(f"layer{i}")(x)
            maps.append(x)
        return maps


_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class MobileNetV1(_Classifier):
    """MobileNet for small images: 13 depthwise-separable blocks, every convolution masked.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        width: Multiplies all channels.
        masked: Whether layers have mask predictors; False for the dense network to be pretrained.
        **masking: Options of :class:`MaskedConv`: mass, target, mode, embedding, softmax, pool, safe.

    Raises:
        ValueError: An option is out of range.
    """

    head_keys = ("fc.",)

    def __init__(
        self, *, in_chans: int = 3, num_classes: int = 10, width: float = 1.0, masked: bool = True, **masking: Any
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_positive("width", width)
        masking["masked"] = masked
        channels = int(width * 32)
        layers = [_layer(in_chans, channels, **masking)]
        for outputs, stride in _V1:
            out, i = int(width * outputs), len(layers)
            layers.append(_layer(channels, channels, 3, stride, groups=channels, feeder=f"model.{i - 1}", **masking))
            layers.append(_layer(channels, out, 1, feeder=f"model.{i}", **masking))
            channels = out
        self.model = nn.Sequential(*layers)
        self.fc = self._head(channels)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the last map of each size, ``(B, C_i, H_i, W_i)``, of images ``(B, in_chans, H, W)``."""
        return _last_of_each_size(self._check(x), self.model)


class _InvertedResidual(nn.Module):
    """Masked 1x1, depthwise 3x3 and 1x1 convolutions, the last without activation; a shortcut at stride 1.

    The shortcut is the identity where shapes agree; elsewhere a dense 1x1 convolution, or there is none.
    """

    def __init__(
        self, inputs: int, outputs: int, expansion: int, stride: int, *, project: bool, **masking: Any
    ) -> None:
        super().__init__()
        hidden, same = expansion * inputs, inputs == outputs
        self.residual = stride == 1 and (same or project)
        self.masked_conv1 = _layer(inputs, hidden, 1, act=nn.ReLU6, **masking)
        self.masked_conv2 = _layer(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6, **masking)
        self.masked_conv3 = _layer(hidden, outputs, 1, act=None, **masking)
        self.shortcut = nn.Sequential()
        if self.residual and not same:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.masked_conv3(self.masked_conv2(self.masked_conv1(x)))
        return self.shortcut(x) + y if self.residual else y


_V2 = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))  # expansion, width, blocks


class MobileNetV2(_Classifier):
    """MobileNet V2 for small images: 17 inverted residual blocks, every convolution but projections masked.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier, the pooled features come out.
        width: Multiplies all channels.
        projections: Halve the map three times, with 1x1 convolutions in the shortcuts where channels differ: the
            network of the published counts. False for the layout of the authors' code: no shortcuts there, and the map
            is halved twice (2.238 M parameters, 297.5 MMAC at 32).
        masked: Whether layers have mask predictors; False for the dense network to be pretrained.
        **masking: Options of :class:`MaskedConv`: mass, target, mode, embedding, softmax, pool, safe.

    Raises:
        ValueError: An option is out of range.
    """

    head_keys = ("fc.",)

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 10,
        width: float = 1.0,
        projections: bool = True,
        masked: bool = True,
        **masking: Any,
    ) -> None:
        super().__init__(in_chans, num_classes)
        check_positive("width", width)
        masking["masked"] = masked
        channels, feeder = int(width * 32), "masked_conv0"
        self.masked_conv0 = _layer(in_chans, channels, act=nn.ReLU6, **masking)
        blocks: list[nn.Module] = []
        halved = (32, 64, 160) if projections else (64, 160)
        for expansion, outputs, count in _V2:
            for j in range(count):
                out, name = int(width * outputs), f"bottlenecks.{len(blocks)}.masked_conv"
                stride = 2 if j == 0 and outputs in halved else 1
                block = _InvertedResidual(channels, out, expansion, stride, project=projections, **masking)
                block.masked_conv1.feeder = feeder
                block.masked_conv2.feeder, block.masked_conv3.feeder = name + "1", name + "2"
                blocks.append(block)
                channels, feeder = out, None if block.residual else name + "3"
        self.bottlenecks = nn.Sequential(*blocks)
        self.masked_conv1 = _layer(channels, int(width * 1280), 1, act=nn.ReLU6, feeder=feeder, **masking)
        self.fc = self._head(int(width * 1280))

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the last map of each size, ``(B, C_i, H_i, W_i)``, of images ``(B, in_chans, H, W)``."""
        return _last_of_each_size(self._check(x), [self.masked_conv0, *self.bottlenecks, self.masked_conv1])


def _last_of_each_size(x: Tensor, modules: Any) -> list[Tensor]:
    maps: list[Tensor] = []
    for module in modules:
        y = module(x)
        if maps and maps[-1].shape[2:] == y.shape[2:]:
            maps[-1] = y
        else:
            maps.append(y)
        x = y
    return maps


def convert_state_dict(sd: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the authors' weights under the keys of ``model``.

    Prefixes of data parallelism go, and so do the second names (``conv1``, ``bn1``) of tensors that the authors'
    masked ResNets and MobileNets save twice. Checkpoints of their dense networks fit networks with ``masked=False``.
    """
    found: dict[str, Tensor] = {}
    plain = {key.removeprefix("module.").replace("features.module.", "features."): v for key, v in sd.items()}
    own = model.state_dict()
    renamed = _sequential_names(plain, own, model)
    for key, value in plain.items():
        name = renamed.get(key) or _masked_name(key, own)
        if name == key or name not in plain:
            found[name] = value
    return found


def _masked_name(key: str, own: Mapping[str, Tensor]) -> str:
    """Return ``masked_conv1.conv.weight`` for ``conv1.weight``, ``masked_conv1.bn.bias`` for ``bn1.bias``."""
    match = re.fullmatch(r"(.*\.)?(conv|bn)(\d)\.(\w+)", key)
    if key in own or match is None:
        return key
    prefix, kind, number, name = match.groups(default="")
    for candidate in (f"{prefix}masked_conv{number}.{kind}.{name}", f"{prefix}masked_conv.{kind}.{name}"):
        if candidate in own:
            return candidate
    return key


def _sequential_names(plain: Mapping[str, Tensor], own: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Return new names for the layers of a dense VGG or MobileNet V1, whose parts are numbered one by one."""
    names: dict[str, str] = {}
    if isinstance(model, VGG) and "features.0.weight" in plain:
        at = 0
        for i, module in enumerate(model.features):
            if isinstance(module, MaskedConv):
                for part, j in (("conv", at), ("bn", at + 1)):
                    names |= {f"features.{j}.{n}": f"features.{i}.{part}.{n}" for n in _tensors(module, part)}
            at += 3 if isinstance(module, MaskedConv) else 1
    elif isinstance(model, MobileNetV1) and "model.0.0.weight" in plain:
        for i, module in enumerate(model.model):
            block, first = (i + 1) // 2, 3 if i > 0 and i % 2 == 0 else 0
            for part, j in (("conv", first), ("bn", first + 1)):
                old = f"model.{block}.{j}."
                names |= {old + n: f"model.{i}.{part}.{n}" for n in _tensors(module, part)}
    return {old: new for old, new in names.items() if old in plain and new in own}


def _tensors(module: nn.Module, part: str) -> list[str]:
    return list(module.get_submodule(part).state_dict())
