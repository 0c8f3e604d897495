"""Inference that really leaves filters out: gather the active filters and input channels, convolve, put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.adaptive.dynamic_pruning.layers import MaskedConv

__all__ = ["SkippingConv", "SkippingNetwork", "skip_filters"]

_BLOCK = 8  # channel counts that convolutions are fast at are multiples of this
_KEPT_PACKINGS = 8  # packed weights that a layer keeps, for masks that come again


class SkippingConv(nn.Module):
    """A folded :class:`MaskedConv` that convolves only active input channels to active filters.

    Images of a batch with equal masks run together. The weights that a pair of masks selects are packed once and kept
    for the next images, for the latest eight pairs.

    Args:
        layer: The layer, with its norm folded.
    """

    def __init__(self, layer: MaskedConv) -> None:
        super().__init__()
        self.layer = layer
        self._feeder: tuple[SkippingConv, ...] = ()
        self._active: Tensor | None = None  # (B, C), of the present batch
        self._packings: dict[bytes, _Packing] = {}

    def connect(self, feeder: SkippingConv) -> None:
        """Let the layer know which other layer's mask left zeros in its input."""
        self._feeder = (feeder,)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return what the masked layer returns, ``(B, C, H', W')``."""
        conv = self.layer.conv
        assert self.layer.mask is not None
        active = self.layer.decide(self.layer.mask(x).flatten(1))
        self._active = active
        inputs = None
        if self._feeder and conv.groups == 1:
            inputs = self._feeder[0]._active
        keys = active if inputs is None else torch.cat([active, inputs], dim=1)
        if len(x) == 1 or bool((keys == keys[:1]).all()):
            return self._run(x, residual, keys[0])
        pairs, group = keys.unique(dim=0, return_inverse=True)
        y: Tensor | None = None
        for i, pair in enumerate(pairs):
            rows = (group == i).nonzero().flatten()
            part = self._run(x[rows], None if residual is None else residual[rows], pair)
            y = part.new_empty((len(x), *part.shape[1:])) if y is None else y
            y[rows] = part
        assert y is not None
        return y

    def _run(self, x: Tensor, residual: Tensor | None, key: Tensor) -> Tensor:
        """Convolve images that share masks; ``key`` holds the filters to compute, then the inputs that are not 0."""
        conv, act = self.layer.conv, self.layer.activation if self.layer.activates else nn.Identity()
        pack = self._pack(key)
        if pack.whole:
            y = conv(x)
            return act(y if residual is None else y + residual)
        pads = tuple(int(p) for p in conv.padding)
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], pads, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        ]
        y = x.new_zeros((len(x), conv.out_channels, *size))
        if len(pack.filters) == 0:
            return y
        if len(pack.channels) == 0:  # every input is 0: the bias remains
            bias = y.new_zeros(len(pack.filters)) if pack.bias is None else pack.bias[: len(pack.filters)]
            part = bias[:, None, None].expand(len(x), -1, *size)
        else:
            depthwise = conv.groups > 1
            gathers = depthwise or len(pack.channels) < conv.in_channels
            chosen = x.index_select(1, pack.channels) if gathers else x
            groups = len(pack.weight) if depthwise else 1
            part = F.conv2d(chosen, pack.weight, pack.bias, conv.stride, conv.padding, conv.dilation, groups)
            part = part[:, : len(pack.filters)]
        part = part if residual is None else part + residual.index_select(1, pack.filters)
        return y.index_copy_(1, pack.filters, act(part))

    def _pack(self, key: Tensor) -> _Packing:
        name = key.cpu().numpy().tobytes()
        found = self._packings.pop(name, None)
        if found is None:
            conv = self.layer.conv
            filters, computed = _rounded(key[: conv.out_channels])
            if conv.groups > 1:
                channels = computed
            elif self._feeder:
                channels = _rounded(key[conv.out_channels :])[1]
            else:
                channels = torch.arange(conv.in_channels, device=key.device)
            weight = conv.weight.index_select(0, computed)
            if conv.groups == 1 and len(channels) < conv.in_channels:
                weight = weight.index_select(1, channels)
            bias = None if conv.bias is None else conv.bias.index_select(0, computed)
            whole = len(filters) == conv.out_channels and len(channels) == conv.in_channels
            found = _Packing(filters, channels, weight, bias, whole)
        self._packings[name] = found  # the latest is last
        while len(self._packings) > _KEPT_PACKINGS:
            self._packings.pop(next(iter(self._packings)))
        return found


@dataclass(frozen=True)
class _Packing:
    """What a pair of masks selects: active filters, input channels read, and the weights and biases between them.

    The weights may compute a few filters more than the active ones, at the end.
    """

    filters: Tensor
    channels: Tensor
    weight: Tensor
    bias: Tensor | None
    whole: bool


def _rounded(active: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices that are on, and these with a few that are off, to fill the last block."""
    on = active.nonzero().flatten()
    missing = -len(on) % _BLOCK
    return on, torch.cat([on, (~active).nonzero().flatten()[:missing]])


class SkippingNetwork(nn.Module):
    """A pruned network that skips filters; inference only. Made by ``compile()`` of a pruned network.

    Args:
        network: A folded network in eval mode whose masked layers skip.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        super().train(False)

    def train(self, mode: bool = True) -> SkippingNetwork:
        """Stay in eval mode.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        if mode:
            raise RuntimeError("A network that skips filters cannot be trained; train the one that it was made from.")
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.network(x)


def skip_filters(network: nn.Module, names: Mapping[str, MaskedConv]) -> SkippingNetwork:
    """Replace, in place, the masked layers of a folded network by skipping ones."""
    made: dict[str, SkippingConv] = {}
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, MaskedConv)
        conv, ungrouped = layer.conv, layer.conv.groups == 1 or _depthwise(layer.conv)
        if layer.mask is None or not ungrouped or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue  # such layers stay dense, and masked
        made[name] = SkippingConv(layer)
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, made[name])
    for name, skipping in made.items():
        feeder = names[name].feeder
        if feeder in made:
            skipping.connect(made[feeder])
    return SkippingNetwork(network)


def _depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels
