"""What image networks share: stochastic depth, norms over channels, initialisation, and folding norms into maps.

Every image network of this library takes ``in_chans``, ``num_classes`` (0: no classifier, the pooled features come
out) and ``drop_path_rate``, and has ``forward_features(x)`` (the last map), ``forward_intermediates(x)`` (a list, the
map after each stage), ``forward_head(map)``, and ``fuse()``: an equivalent, faster copy for inference.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DropPath",
    "LayerNorm2d",
    "cache_key",
    "check_fusable",
    "drop_path_rates",
    "fuse_conv_norm",
    "fuse_norm_linear",
    "init_truncated_normal",
    "norm_scale_shift",
]


class DropPath(nn.Module):
    """Stochastic depth: in training, drop whole samples with probability ``rate`` and scale the others up.

    Args:
        rate: Probability in [0, 1).

    Raises:
        ValueError: ``rate`` is outside [0, 1).

    Source: Huang et al., 2016, arXiv:1603.09382.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be in [0, 1), got {rate!r}.")
        self.rate = float(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` of any shape, ``(B, ...)``, with samples dropped."""
        if self.rate == 0 or not self.training:
            return x
        keep = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        """Say the rate."""
        return f"rate={self.rate:g}"


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel, ``(B, C, H, W)``.

    Args:
        channels: Channels C.
        eps: Added to the variance.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, eps, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(B, C, H, W)``, in the memory format of ``input``."""
        pixels = input.permute(0, 2, 3, 1)  # a view; contiguous if the input is channels-last
        y = F.layer_norm(pixels, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)
        channels_last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        return y if channels_last else y.contiguous()


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop rate of each block of each stage: evenly spaced from 0 to ``rate`` over all blocks.

    Example:
        >>> drop_path_rates(0.2, (1, 2))
        [[0.0], [0.1, 0.2]]
    """
    total = sum(depths)
    rates = iter(rate * i / max(1, total - 1) for i in range(total))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_truncated_normal(module: nn.Module, std: float = 0.02) -> None:
    """Draw the weights of a convolution or linear map from N(0, std^2) cut at +-2, and clear its bias.

    Other modules are left alone; use as ``network.apply(init_truncated_normal)``.
    """
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def cache_key(*parameters: Tensor) -> tuple[object, ...] | None:
    """Return a key that changes whenever a parameter does, for what a layer derives from it; None: keep nothing.

    Nothing may be kept while gradients are recorded, a graph is captured, a functorch transform runs, or if a parameter
    was made in inference mode, where changes are not counted.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if any(p.is_inference() for p in parameters):
        return None
    return tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)


def check_fusable(network: nn.Module) -> nn.Module:
    """Return a deep copy of ``network`` to be fused, without gradients.

    Raises:
        RuntimeError: The network is in training mode, where batch norms use statistics that cannot be folded.
    """
    if network.training:
        raise RuntimeError(f"{type(network).__name__}.fuse() needs eval mode: call .eval() first.")
    return copy.deepcopy(network).requires_grad_(False)


def norm_scale_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return s and t, ``(C,)``, for which a batch norm in eval mode is ``s x + t``.

    Raises:
        ValueError: The norm keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("A batch norm without running statistics cannot be folded.")
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias).detach()


def fuse_conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return one convolution, with bias, that equals ``norm(conv(x))`` in eval mode."""
    scale, shift = norm_scale_shift(norm)
    fused = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # pyright: ignore[reportArgumentType]
        stride=conv.stride,  # pyright: ignore[reportArgumentType]
        padding=conv.padding,  # pyright: ignore[reportArgumentType]
        dilation=conv.dilation,  # pyright: ignore[reportArgumentType]
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    ).requires_grad_(False)
    assert fused.bias is not None
    fused.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    fused.bias.copy_(shift if conv.bias is None else conv.bias * scale + shift)
    return fused.train(conv.training)


def fuse_norm_linear(norm: nn.BatchNorm1d | nn.BatchNorm2d, linear: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Return a map, of the kind of ``linear`` and with bias, that equals ``linear(norm(x))`` in eval mode.

    Args:
        norm: Batch norm over the input channels.
        linear: Linear map, or ungrouped convolution without padding (at a padded border the norm would shift zeros).

    Raises:
        ValueError: ``linear`` is a grouped or padded convolution.
    """
    scale, shift = norm_scale_shift(norm)
    device, dtype = linear.weight.device, linear.weight.dtype
    if isinstance(linear, nn.Conv2d):
        if linear.groups != 1 or any(p != 0 for p in linear.padding):
            raise ValueError("A norm folds into an ungrouped convolution without padding only.")
        size, stride = linear.kernel_size, linear.stride
        fused = nn.Conv2d(
            linear.in_channels,
            linear.out_channels,
            size,  # pyright: ignore[reportArgumentType]
            stride=stride,  # pyright: ignore[reportArgumentType]
            device=device,
            dtype=dtype,
        )
        weight, shifted = linear.weight * scale.view(-1, 1, 1), torch.einsum("oihw,i->o", linear.weight, shift)
    else:
        fused = nn.Linear(linear.in_features, linear.out_features, device=device, dtype=dtype)
        weight, shifted = linear.weight * scale, linear.weight @ shift
    fused.requires_grad_(False)
    assert fused.bias is not None
    fused.weight.copy_(weight)
    fused.bias.copy_(shifted if linear.bias is None else linear.bias + shifted)
    return fused.train(linear.training)
