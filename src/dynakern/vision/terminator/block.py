"""The slow-fast neural encoding block: full context by image-sized kernels, local context by small ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_positive
from dynakern.vision.terminator.slow_nets import LocalSlowNet, SlowNet

__all__ = ["BatchStandardize", "GroupStandardize", "HyperChannel", "HyperInteraction", "RecursiveGate", "SFNEBlock"]

_EPS = 1e-5


def _linear(inputs: int, outputs: int, *, normal: bool = False) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 1)
    (nn.init.kaiming_normal_ if normal else nn.init.kaiming_uniform_)(layer.weight, nonlinearity="linear")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class BatchStandardize(nn.Module):
    """Standardise each channel by the batch's statistics, in eval mode too, or by running ones.

    Args:
        channels: Channels C.
        running: Keep running statistics and use them outside training.
    """

    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, channels: int, *, running: bool = False) -> None:
        super().__init__()
        self.channels, self.momentum, self.calibrating = channels, 0.1, False
        self.register_buffer("running_mean", torch.zeros(channels) if running else None)
        self.register_buffer("running_var", torch.ones(channels) if running else None)

    def start_running(self, like: Tensor) -> None:
        """Begin to keep running statistics."""
        self.running_mean, self.running_var = like.new_zeros(self.channels), like.new_ones(self.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)``."""
        batch = self.training or self.calibrating or self.running_mean is None
        return F.batch_norm(x, self.running_mean, self.running_var, training=batch, momentum=self.momentum, eps=_EPS)


class GroupStandardize(nn.Module):
    """Standardise 12 groups of channels by turns over the batch and over each image (G_IBS).

    Args:
        channels: Channels C, a multiple of 12.
        running: See :class:`BatchStandardize`.

    Raises:
        ValueError: ``channels`` is no multiple of 12.
    """

    def __init__(self, channels: int, *, running: bool = False) -> None:
        super().__init__()
        if channels % 12:
            raise ValueError(f"The channels that leave a block must be a multiple of 12, got {channels}.")
        self.batch = BatchStandardize(channels // 2, running=running)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)``."""
        groups = x.unflatten(1, (6, 2, -1))
        even = self.batch(groups[:, :, 0].flatten(1, 2))
        odd = F.instance_norm(groups[:, :, 1].flatten(1, 2), eps=_EPS)
        parts = [y.unflatten(1, (6, -1)) for y in (even, odd)]
        return torch.stack(parts, dim=2).flatten(1, 3)


class RecursiveGate(nn.Module):
    r"""Recursive gated unit: :math:`W_y(\mathrm{GELU}(\mathrm{IS}(W_k x \odot W_q W_v x)) + P)`.

    Args:
        channels: Channels C.
        size: Side of the map, for the position bias P.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        for name in "kvqy":
            self.add_module(f"fast_linear_{name}", _linear(channels, channels))
        self.bias_p = nn.Parameter(torch.zeros(1, 1, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, S, S)``."""
        k, q, v = (self.get_submodule(f"fast_linear_{name}") for name in "kqv")
        h = F.instance_norm(k(x) * q(v(x)), eps=_EPS)
        return self.get_submodule("fast_linear_y")(F.gelu(h) + self.bias_p)


class HyperChannel(nn.Module):
    r"""Channel interaction (HCI): :math:`x \odot \sigma(y \odot g_c \odot y)`, y the mean over space."""

    def __init__(self, channels: int, hidden: int, num_layers: int, omega_0: float) -> None:
        super().__init__()
        self.slow_net_gc = SlowNet(channels, 1, hidden, num_layers, axes=1, omega_0=omega_0)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)``."""
        y = x.mean((2, 3))
        return x * torch.sigmoid(y * self.slow_net_gc()[0] * y)[:, :, None, None]


class HyperInteraction(nn.Module):
    r"""Interaction (HI) of space and channels: :math:`x \odot \sigma((y_s g_s y_s)(y_c g_c y_c))`, y another map."""

    def __init__(self, channels: int, size: int, hidden: tuple[int, int], num_layers: int, omega_0: float) -> None:
        super().__init__()
        self.slow_net_gc_hi = SlowNet(channels, 1, hidden[0], num_layers, axes=1, omega_0=omega_0)
        self.slow_net_gs_hi = SlowNet(size, 1, hidden[1], num_layers, omega_0=omega_0)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``(B, C, S, S)`` of two maps of that shape."""
        over_space, over_channels = y.mean((2, 3)), y.mean(1, keepdim=True)
        c = (over_space * self.slow_net_gc_hi()[0] * over_space)[:, :, None, None]
        s = over_channels * self.slow_net_gs_hi() * over_channels
        return x * torch.sigmoid(s * c)


class _LocalConv(nn.Module):
    """A depthwise convolution with a given kernel, a map of the channels, standardised by batch, GELU."""

    def __init__(self, channels: int, *, running: bool) -> None:
        super().__init__()
        self.channel_mixer = _linear(channels, channels, normal=True)
        self.norm = BatchStandardize(channels, running=running)

    def forward(self, kernel: Tensor, x: Tensor) -> Tensor:
        y = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1])
        return F.gelu(self.norm(self.channel_mixer(y)))


class _MultiBranch(nn.Module):
    """The twelve branches of a block and the map that mixes them."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        size: int,
        tiles: tuple[int, ...],
        *,
        local_sizes: tuple[int, int, int, int],
        global_hidden: int,
        global_layers: int,
        local_hidden: int,
        local_layers: int,
        channel_hidden: int,
        interact_hidden: tuple[int, int],
        trainable_renorm: bool,
        omega_0: float,
        running: bool,
    ) -> None:
        super().__init__()
        self.tiles = tiles
        self.slow_net_g = SlowNet(size, channels, global_hidden, global_layers, omega_0=omega_0)
        self.Fast_Kernel_rgu, self.Fast_Kernel_rgu_2 = RecursiveGate(channels, size), RecursiveGate(channels, size)
        self.channel_mixer_mlp = _linear(channels, channels)
        self.channel_mixer_hci = HyperChannel(channels, channel_hidden, 2, omega_0)
        self.hyper_interact = HyperInteraction(channels, size, interact_hidden, 2, omega_0)
        options: dict[str, Any] = {"running": running, "trainable_renorm": trainable_renorm, "omega_0": omega_0}
        for i, side in enumerate(local_sizes, start=1):
            setattr(self, f"slow_net_l{i}", LocalSlowNet(channels, side, local_hidden, local_layers, **options))
            setattr(self, f"local_interact_conv_{i}", _LocalConv(channels, running=running))
            setattr(self, f"bias{i}", nn.Parameter(torch.zeros(1)))
        self.bottleneck_layer = _linear((10 + len(tiles)) * channels, outputs, normal=True)

    def _local(self, i: int, context: Tensor, x: Tensor) -> Tensor:
        kernel = self.get_submodule(f"slow_net_l{i}")(context)
        return self.get_submodule(f"local_interact_conv_{i}")(kernel, x) + getattr(self, f"bias{i}")

    def forward(self, x: Tensor, *before: Tensor) -> tuple[Tensor, Tensor]:
        kernel = self.slow_net_g()
        weights = x * kernel  # the kernel meets the activations: context-dependent weights (B, C, S, S)
        fast = F.instance_norm(self.Fast_Kernel_rgu_2(weights) + self.Fast_Kernel_rgu(x), eps=_EPS)
        mix = F.instance_norm(self.channel_mixer_mlp(x), eps=_EPS)
        hci = F.instance_norm(self.channel_mixer_hci(x), eps=_EPS)
        out, out_x, out_h = weights @ fast, weights @ mix, weights @ hci
        gated, hyper = torch.sigmoid(out) * out, self.hyper_interact(out, x)
        l1, l2 = self._local(1, x, hci), self._local(2, hci, x)
        l3, l4 = self._local(3, mix, x), self._local(4, x, mix)
        parts = [out, l2, fast, out_x, l1, gated, l3, out_h, l4, hyper]
        if before:
            parts.insert(2, before[0])
        if len(before) == 2:
            parts.insert(-1, before[1])
        return self._mix(parts, x.shape[1]), kernel

    def _mix(self, parts: list[Tensor], channels: int) -> Tensor:
        """Return the bottleneck's map of the parts in a row, each repeated to ``channels``.

        A part that repeats k times meets the sum of k slices of the weight. Without gradients the parts are added up
        one by one, so that the long row is never written.
        """
        weight, bias = self.bottleneck_layer.weight.flatten(1), self.bottleneck_layer.bias
        assert bias is not None
        slices = [
            w if part.shape[1] == channels else w.unflatten(1, (-1, part.shape[1])).sum(1)
            for part, w in zip(parts, weight.split(channels, dim=1), strict=True)
        ]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.conv2d(torch.cat(parts, dim=1), torch.cat(slices, dim=1)[:, :, None, None], bias)
        rows = [part.flatten(2) for part in parts]
        total = torch.baddbmm(bias[:, None].expand(len(rows[0]), -1, 1), _batched(slices[0], rows[0]), rows[0])
        for w, row in zip(slices[1:], rows[1:], strict=True):
            total.baddbmm_(_batched(w, row), row)
        return total.unflatten(2, parts[0].shape[2:])


def _batched(weight: Tensor, rows: Tensor) -> Tensor:
    return weight.expand(len(rows), -1, -1)


class SFNEBlock(nn.Module):
    """Slow-fast neural encoding block.

    A slow net writes an image-sized kernel; multiplied with the input it becomes weights that depend on the input, and
    these meet three views of the input by a matrix product of each channel's S x S map, so that every pixel of the
    output depends on the whole image. Small kernels, written by slow nets from pooled context, add local views.

    Args:
        channels: Channels C of the input.
        outputs: Channels of the output, a multiple of 12.
        size: Side S of the maps.
        before: Channels of earlier maps, none to two, that are repeated to C channels and mixed in.
        dropout: Rate at which whole channels of the output are dropped.
        running: Keep running statistics and use them outside training.
        **branches: Options of the branches, all required: local_sizes, global_hidden, global_layers, local_hidden,
            local_layers, channel_hidden, interact_hidden, trainable_renorm, omega_0; see :class:`Terminator`.

    Raises:
        ValueError: Channels do not divide, or a kernel size is even or larger than the map.

    Source: arXiv:2401.17948, section 3, as in the authors' code.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        size: int,
        before: tuple[int, ...] = (),
        *,
        dropout: float = 0.0,
        running: bool = False,
        **branches: Any,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("outputs", outputs), ("size", size)):
            check_positive(name, value, integer=True)
        for earlier in before:
            if channels % earlier:
                raise ValueError(f"An earlier map of {earlier} channels cannot be repeated to {channels}.")
        for side in branches["local_sizes"]:
            if side % 2 == 0 or side > size:
                raise ValueError(f"`local_sizes` must be odd and at most the side of the image, {size}, got {side}.")
        self.fast_multi_branch = _MultiBranch(channels, outputs, size, before, running=running, **branches)
        self.norm = GroupStandardize(outputs, running=running)
        self.drop = nn.Dropout2d(dropout)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, *before: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output ``(B, outputs, S, S)`` and the global kernel ``(1, C, S, S)``.

        Args:
            x: Map, ``(B, C, S, S)``.
            *before: Earlier maps, of the channels given at construction.
        """
        y, kernel = self.fast_multi_branch(x, *before)
        return self.drop(F.gelu(self.norm(y)) + self.bias), kernel
