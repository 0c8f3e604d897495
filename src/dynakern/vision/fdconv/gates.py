"""Kernel spatial modulation: the gates that an image sets on the entries of a kernel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice
from dynakern.vision.fdconv.bands import Activation

__all__ = ["Attention", "GlobalModulation", "LocalModulation"]


class StarReLU(nn.Module):
    """``s relu(z)^2 + t`` with learnt scalars s and t."""

    def __init__(self, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, z: Tensor) -> Tensor:
        """Return the same shape, ``(...)``."""
        return self.scale * F.relu(z).square() + self.bias


class Attention(NamedTuple):
    """Gates of an image; None stands for ones.

    Attributes:
        channel: Of the input channels, ``(B, I)``.
        filter: Of the output channels, ``(B, O)``.
        spatial: Of the places of the kernel, ``(B, k, k)``.
        kernel: Of the frequency groups, ``(B, R K)``.
    """

    channel: Tensor | None
    filter: Tensor | None
    spatial: Tensor | None
    kernel: Tensor


def _pointwise(conv: Any, x: Tensor) -> Tensor:
    """Return what a 1x1 convolution makes of one pixel, ``(B, C_out)`` of ``(B, C_in)``, as a matrix product."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class GlobalModulation(nn.Module):
    r"""Gates of channels, filters, places and frequency groups from the means of the channels.

    :math:`h = \mathrm{StarReLU}(\mathrm{BN}(W g))`, and each gate is an activation of a linear map of h. A batch of one
    image has no variance: in training its norm then uses the running statistics.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k.
        num_groups: Number R K of frequency groups.
        reduction: The hidden width is ``max(int(reduction * I), 16)``.
        att_multi: Largest value m of a gate ``m sigmoid(z / temp)``.
        temp: Temperature of the first three gates.
        kernel_temp: Temperature of the groups' gate.
        act: ``"sigmoid"``: as above, the groups' gate ``2 sigmoid / (R K)``; ``"tanh"``: ``1 + tanh``, the groups' gate
            over ``R K``; ``"softmax"``: over the groups, with ``only_kernel`` only.
        only_kernel: No gates but the groups'.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: ``act`` is ``"softmax"`` without ``only_kernel``.
    """

    kernel_fc: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        num_groups: int,
        *,
        reduction: float = 1 / 16,
        att_multi: float = 2.0,
        temp: float = 1.0,
        kernel_temp: float = 1.0,
        act: Activation = "sigmoid",
        only_kernel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("ksm_global_act", act, ("sigmoid", "tanh", "softmax"))
        if act == "softmax" and not only_kernel:
            raise ValueError("`ksm_global_act` 'softmax' fits the kernel attention only: set ksm_only_kernel_att=True.")
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_groups, self.att_multi, self.temp, self.kernel_temp, self.act = (
            num_groups, att_multi, temp, kernel_temp, act)  # fmt: skip
        hidden = max(int(in_channels * reduction), 16)
        self.fc = nn.Conv2d(in_channels, hidden, 1, bias=False, **at)
        self.bn: nn.Module = nn.BatchNorm2d(hidden, **at)
        self.relu = StarReLU(**at)
        places = 0 if kernel_size == 1 else kernel_size**2
        widths = {"channel": in_channels, "filter": out_channels, "spatial": places}
        widths = dict.fromkeys(widths, 0) if only_kernel else widths
        for name, width in {**widths, "kernel": num_groups if num_groups > 1 else 0}.items():
            if width:
                head = nn.Conv2d(hidden, width, 1, **at)
                nn.init.normal_(head.weight, std=1e-6)
                nn.init.zeros_(head.bias)  # pyright: ignore[reportArgumentType]
                self.add_module(f"{name}_fc", head)
        nn.init.kaiming_normal_(self.fc.weight, mode="fan_out", nonlinearity="relu")

    def _gate(self, name: str, h: Tensor) -> Tensor | None:
        if not hasattr(self, f"{name}_fc"):
            return None
        z = _pointwise(getattr(self, f"{name}_fc"), h) / self.temp
        return 1 + torch.tanh(z) if self.act == "tanh" else self.att_multi * torch.sigmoid(z)

    def forward(self, g: Tensor) -> Attention:
        """Return the gates of images whose channels have the means ``g``, ``(B, I, 1, 1)``."""
        z, bn = _pointwise(self.fc, g.flatten(1)), self.bn
        if isinstance(bn, nn.BatchNorm2d) and bn.training and len(z) == 1:
            z = F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        else:
            z = bn(z[:, :, None, None]).flatten(1)
        h = self.relu(z)
        channel, filter, spatial = (self._gate(name, h) for name in ("channel", "filter", "spatial"))
        if spatial is not None:
            k = math.isqrt(spatial.shape[1])
            spatial = spatial.view(-1, k, k)
        if self.num_groups == 1:
            return Attention(channel, filter, spatial, g.new_ones(len(g), 1))
        z = _pointwise(self.kernel_fc, h) / self.kernel_temp
        if self.act == "softmax":
            return Attention(channel, filter, spatial, z.softmax(1))
        kernel = 2 * torch.sigmoid(z) if self.act == "sigmoid" else 1 + torch.tanh(z)
        return Attention(channel, filter, spatial, kernel / self.num_groups)


class LocalModulation(nn.Module):
    """A logit for every entry of the kernel, from a short convolution along the normalised means of the channels.

    The convolution takes ``(round(log2(I) / 2 + 0.5) // 2) * 2 + 1`` neighbours (rounding half to even).

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_channels, self.kernel_size = out_channels, kernel_size
        self.taps = (round(math.log2(in_channels) / 2 + 0.5) // 2) * 2 + 1
        outputs = out_channels * kernel_size**2
        self.conv = nn.Conv1d(1, outputs, self.taps, padding=self.taps // 2, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(in_channels, device=device, dtype=dtype)
        nn.init.constant_(self.conv.weight, 1e-6)

    def forward(self, g: Tensor) -> Tensor:
        """Return the logits of the kernel's entries, ``(B, O, k, I, k)``, of the channels' means ``(B, I, 1, 1)``.

        That order is the one in which the kernel leaves the Fourier transform. One matrix product writes it: the
        neighbours stand k times, each time for one column of the kernel.
        """
        B, I, k, O = g.shape[0], g.shape[1], self.kernel_size, self.out_channels
        neighbours = F.pad(self.norm(g.flatten(1)), (self.taps // 2,) * 2).unfold(1, self.taps, 1)  # (B, I, taps)
        wide = torch.diag_embed(
            neighbours.transpose(1, 2).unsqueeze(-1).expand(B, self.taps, I, k)
        )  # (B, taps, I, k, k)
        wide = wide.permute(0, 4, 1, 2, 3).reshape(B, k * self.taps, I * k)
        return (self.conv.weight.view(O * k, k * self.taps) @ wide).view(B, O, k, I, k)
