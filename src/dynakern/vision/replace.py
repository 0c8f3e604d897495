"""Put this library's convolutions in the place of those of an existing network."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_positive
from dynakern.ops import depthwise_conv2d
from dynakern.vision.fdconv import FDConv
from dynakern.vision.inception_next import InceptionDWConv2d
from dynakern.vision.lsnet import LSConv

__all__ = ["LargeConv2d", "replace_conv"]

Kind = Literal["large", "frequency-dynamic", "inception", "large-small"]


class LargeConv2d(nn.Conv2d):
    """Depthwise convolution with a large kernel, stride 1, same size, by :func:`dynakern.ops.depthwise_conv2d`.

    Args:
        channels: Channels C of the map ``(B, C, H, W)``.
        kernel_size: Odd size.
        bias: Whether there is a bias.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: ``kernel_size`` is even.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive("kernel_size", kernel_size, integer=True)
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}.")
        made: dict[str, Any] = {"groups": channels, "bias": bias, "device": device, "dtype": dtype}
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, **made)

    def forward(self, input: Tensor) -> Tensor:
        """Return a map of the shape of ``input``, ``(B, C, H, W)``."""
        return depthwise_conv2d(input, self.weight, self.bias)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise, keeps the size, and has an odd kernel."""
    keeps = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    same = conv.padding == tuple(k // 2 for k in conv.kernel_size) and all(k % 2 for k in conv.kernel_size)
    return keeps and same and conv.groups == conv.in_channels == conv.out_channels


def _large(conv: nn.Conv2d, *, kernel_size: int = 13) -> nn.Module | None:
    if not _is_depthwise(conv) or max(conv.kernel_size) > kernel_size:
        return None
    weight = conv.weight
    layer = LargeConv2d(conv.in_channels, kernel_size, conv.bias is not None, device=weight.device, dtype=weight.dtype)
    top, left = ((kernel_size - k) // 2 for k in conv.kernel_size)
    with torch.no_grad():
        layer.weight.copy_(F.pad(weight, (left, left, top, top)))
        if layer.bias is not None and conv.bias is not None:
            layer.bias.copy_(conv.bias)
    return layer


def _frequency_dynamic(conv: nn.Conv2d, **options: Any) -> nn.Module | None:
    smallest = options.get("min_channels", 16)
    square = conv.kernel_size in ((1, 1), (3, 3)) and not isinstance(conv.padding, str)
    plain = conv.groups == 1 and conv.padding_mode == "zeros" and min(conv.in_channels, conv.out_channels) > smallest
    return FDConv.from_conv(conv, **options) if square and plain else None


def _inception(conv: nn.Conv2d, **options: Any) -> nn.Module | None:
    if not _is_depthwise(conv):
        return None
    return InceptionDWConv2d(conv.in_channels, device=conv.weight.device, dtype=conv.weight.dtype, **options)


def _large_small(conv: nn.Conv2d, **options: Any) -> nn.Module | None:
    if not _is_depthwise(conv) or conv.in_channels % options.get("groups", 8):
        return None
    return LSConv(conv.in_channels, **options).to(conv.weight.device, conv.weight.dtype)


_KINDS: dict[str, Callable[..., nn.Module | None]] = {
    "large": _large,
    "frequency-dynamic": _frequency_dynamic,
    "inception": _inception,
    "large-small": _large_small,
}


def replace_conv(
    model: nn.Module,
    kind: Kind | Callable[[nn.Conv2d], nn.Module],
    *,
    where: str | Callable[[str, nn.Conv2d], bool] | None = None,
    **options: Any,
) -> nn.Module:
    """Return a copy of a network with other convolutions.

    ===================== ============================================= ==========================================
    kind                  takes the place of                            weights
    ===================== ============================================= ==========================================
    ``large``             depthwise ones, stride 1                      kept: zeros around them, the same function
    ``frequency-dynamic`` ungrouped 1x1 and 3x3 ones of over 16 channels kept: starts as the same function
    ``inception``         depthwise ones, stride 1                      new
    ``large-small``       depthwise ones, stride 1, 8 channels a group  new
    ===================== ============================================= ==========================================

    Args:
        model: Any network; it is left as it is.
        kind: One of the above, or a function from an ``nn.Conv2d`` to the module that takes its place.
        where: Which convolutions: a pattern of module names like ``"stages.2.*"``, or a function of name and module;
            all that the kind fits by default.
        **options: Of the layer: ``kernel_size`` of ``large`` (13), or the arguments of
            :class:`~dynakern.vision.FDConv`, :class:`~dynakern.vision.InceptionDWConv2d` or
            :class:`~dynakern.vision.LSConv`.

    Returns:
        The new network, which maps inputs of the same shapes, e.g. ``(B, C, H, W)``.

    Raises:
        TypeError: ``kind`` is neither a name nor a function.
        ValueError: No convolution was replaced, or an option is wrong.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU())
        >>> larger = replace_conv(network, "large", kernel_size=13)
        >>> x = torch.randn(1, 16, 20, 20)
        >>> torch.allclose(larger(x), network(x), atol=1e-5)
        True
    """
    if isinstance(kind, str):
        check_choice("kind", kind, tuple(_KINDS))
        make: Callable[..., nn.Module | None] = _KINDS[kind]
    elif callable(kind):
        make = kind
    else:
        raise TypeError(f"`kind` must be a name or a function, got {type(kind).__name__}.")
    model, replaced = copy.deepcopy(model), 0
    for name, conv in list(model.named_modules()):
        if type(conv) is not nn.Conv2d or not _chosen(name, conv, where):
            continue
        layer = make(conv, **options)
        if layer is None:
            continue
        replaced += 1
        if not name:
            return layer
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.train(conv.training))
    if not replaced:
        raise ValueError(f"No convolution of {type(model).__name__} fits kind={kind!r} and where={where!r}.")
    return model


def _chosen(name: str, conv: nn.Conv2d, where: str | Callable[[str, nn.Conv2d], bool] | None) -> bool:
    if where is None:
        return True
    return fnmatch.fnmatch(name, where) if isinstance(where, str) else bool(where(name, conv))
