"""Slow nets: small networks of coordinates, multiplicative sine filters, that write the kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_positive, check_shape
from dynakern.layers.vision import cache_key

__all__ = ["LocalSlowNet", "MAGNet", "MAGNetLocal", "SlowNet"]


def _point_map(outputs: int, inputs: int, axes: int, *, bias: float) -> nn.Conv1d | nn.Conv2d:
    """Return a linear map at each point, stored as the authors store it, as a convolution of size 1."""
    layer = (nn.Conv1d if axes == 1 else nn.Conv2d)(inputs, outputs, 1)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="linear")
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    return layer


def _apply(layer: nn.Conv1d | nn.Conv2d, z: Tensor) -> Tensor:
    """Return ``(N, outputs)`` of points ``(N, inputs)``, in the precision of ``z``."""
    assert layer.bias is not None
    return F.linear(z, layer.weight.flatten(1).to(z.dtype), layer.bias.to(z.dtype))


class _SineFilter(nn.Module):
    """sin(V c + u); the frequencies V grow with ``omega_0`` and a Gamma variable."""

    def __init__(self, hidden: int, axes: int, index: int, omega_0: float) -> None:
        super().__init__()
        self.linear = (nn.Conv1d if axes == 1 else nn.Conv2d)(axes, hidden, 1)
        gamma = torch.distributions.Gamma(6.0 / (index + 1), 1.0, validate_args=False).sample((hidden, axes))
        with torch.no_grad():
            weight = self.linear.weight
            weight.mul_(2 * math.pi * omega_0 * gamma.to(weight).view(weight.shape))
        assert self.linear.bias is not None
        nn.init.zeros_(self.linear.bias)

    def forward(self, points: Tensor) -> Tensor:
        return torch.sin(_apply(self.linear, points))


class _Coordinates(nn.Module):
    """What the two kinds of slow nets share: filters, maps, and the grid from -1 to 1 along each axis."""

    def __init__(
        self, size: int, outputs: int, hidden: int, num_layers: int, axes: int, omega_0: float, bias: str
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("outputs", outputs), ("hidden", hidden), ("num_layers", num_layers)):
            check_positive(name, value, integer=True)
        check_positive("omega_0", omega_0)
        self.size, self.axes, self.bias_name = size, axes, bias
        self.linears = nn.ModuleList(_point_map(hidden, hidden, axes, bias=1.0) for _ in range(num_layers))
        self.filters = nn.ModuleList(_SineFilter(hidden, axes, i, omega_0) for i in range(num_layers + 1))
        self.output_linear = _point_map(outputs, hidden, axes, bias=0.0)
        with torch.no_grad():  # the authors' code does so in the first forward pass
            self.output_linear.weight.mul_(size ** (-axes / 2))
        self.register_parameter(bias, nn.Parameter(torch.zeros(1, 1, *(size,) * axes)))

    def points(self) -> Tensor:
        """Return the grid, ``(N, axes)``, at least in single precision."""
        like = self.output_linear.weight
        dtype = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
        line = torch.linspace(-1, 1, self.size, device=like.device, dtype=dtype)
        return torch.stack(torch.meshgrid(*[line] * self.axes, indexing="ij"), dim=-1).flatten(0, -2)

    def position_bias(self, z: Tensor) -> Tensor:
        """Return the bias of each point, ``(N, 1)``."""
        return getattr(self, self.bias_name).flatten()[:, None].to(z.dtype)

    def as_kernel(self, z: Tensor) -> Tensor:
        """Return ``(1, outputs, size, ...)`` in the parameters' dtype."""
        weight = self.output_linear.weight
        return _apply(self.output_linear, z).T.reshape(1, -1, *(self.size,) * self.axes).to(weight.dtype)


class MAGNet(_Coordinates):
    r"""A kernel as a function of position, by multiplicative sine filters.

    :math:`z_0 = f_0(c)`, :math:`z_i = f_i(c) \odot (A_i z_{i-1} + a_i) + p`, kernel :math:`= O z_L + o` with
    :math:`f_i(c) = \sin(V_i c + u_i)`, c on a grid from -1 to 1, and p a learned bias of each position.

    Args:
        size: Points s along each axis.
        outputs: Channels of the kernel.
        hidden: Width h.
        num_layers: Layers L.
        axes: 2 for a kernel over an image, ``(1, outputs, s, s)``; 1 for one over channels, ``(1, outputs, s)``.
        omega_0: Scale of the frequencies. At the authors' 2000 neighbouring positions are all but independent.

    Raises:
        ValueError: A size is not positive.

    Source: arXiv:2401.17948; names and initialisation of the authors' code.
    """

    def __init__(
        self, size: int, outputs: int, hidden: int, num_layers: int, *, axes: int = 2, omega_0: float = 2000.0
    ) -> None:
        super().__init__(size, outputs, hidden, num_layers, axes, omega_0, "bias_p")

    def forward(self) -> Tensor:
        """Return the kernel."""
        points = self.points()
        z = self.filters[0](points)
        bias = self.position_bias(z)
        for sine, linear in zip(list(self.filters)[1:], self.linears, strict=True):
            z = sine(points) * _apply(linear, z) + bias  # pyright: ignore[reportArgumentType]
        return self.as_kernel(z)


class MAGNetLocal(_Coordinates):
    r"""A small kernel as a function of position and of what the batch shows.

    As :class:`MAGNet`, and after each layer :math:`z \leftarrow \alpha\,\mathrm{sg}(z) + \beta z / \lVert z \rVert`
    over positions, with sg stopping the gradient, and :math:`z \leftarrow z \odot (X_i q + x_i)` with the context
    :math:`q = \mathrm{GELU}(F(R(\bar x)))`, where :math:`\bar x` is the batch's mean, pooled to k x k.

    Args:
        channels: Channels C of the context and of the kernel.
        kernel_size: Side k, odd.
        hidden: Width h.
        num_layers: Layers L.
        alpha: Share of the value that passes no gradient.
        beta: Share of the normalised value.
        trainable_renorm: Make alpha and beta parameters, ``alpha_renorm`` and ``beta_renorm``, of each layer; in the
            authors' code they are constants.
        omega_0: See :class:`MAGNet`.

    Raises:
        ValueError: A size is not positive, or ``kernel_size`` is even.

    Source: arXiv:2401.17948; names and initialisation of the authors' code.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        hidden: int,
        num_layers: int,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        trainable_renorm: bool = False,
        omega_0: float = 2000.0,
    ) -> None:
        super().__init__(kernel_size, channels, hidden, num_layers, 2, omega_0, "bias_pk")
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}.")
        self.channels = channels
        self.fast_reduce = nn.Conv2d(channels, hidden, 1)
        self.fast_fc1 = nn.Conv2d(hidden, hidden, 1)
        self.fast_linears_x = nn.ModuleList(_point_map(hidden, hidden, 2, bias=1.0) for _ in range(num_layers))
        self.alpha_renorm: Any = [alpha] * num_layers
        self.beta_renorm: Any = [beta] * num_layers
        if trainable_renorm:
            self.alpha_renorm = nn.Parameter(torch.tensor(self.alpha_renorm))
            self.beta_renorm = nn.Parameter(torch.tensor(self.beta_renorm))

    def context(self, x: Tensor) -> Tensor:
        """Return the mean over the batch of maps ``(B, C, H, W)``, pooled: ``(C, k, k)``."""
        return F.adaptive_avg_pool2d(x.mean(0), self.size)

    def kernel(self, context: Tensor) -> Tensor:
        """Return the kernel, ``(1, C, k, k)``, for a context ``(C, k, k)``."""
        points = self.points()
        q = context.flatten(1).T.to(points.dtype)  # (k * k, C)
        q = F.gelu(_apply(self.fast_fc1, _apply(self.fast_reduce, q)))
        z = self.filters[0](points)
        bias = self.position_bias(z)
        for i, linear in enumerate(self.linears):
            z = self.filters[i + 1](points) * _apply(linear, z) + bias  # pyright: ignore[reportArgumentType]
            unit = z / z.norm(dim=0, keepdim=True).clamp_min(1e-12)
            z = self.alpha_renorm[i] * z.detach() + self.beta_renorm[i] * unit
            z = z * _apply(self.fast_linears_x[i], q)  # pyright: ignore[reportArgumentType]
        return self.as_kernel(z)

    def forward(self, x: Tensor) -> Tensor:
        """Return the kernel, ``(1, C, k, k)``, for maps ``(B, C, H, W)``."""
        check_shape("x", x, f"B {self.channels} H W")
        return self.kernel(self.context(x))


class SlowNet(nn.Module):
    """Holds a :class:`MAGNet` as ``Kernel``, and its kernel while weights do not change (inference).

    Args:
        size: See :class:`MAGNet`.
        outputs: See :class:`MAGNet`.
        hidden: See :class:`MAGNet`.
        num_layers: See :class:`MAGNet`.
        axes: See :class:`MAGNet`.
        omega_0: See :class:`MAGNet`.
    """

    def __init__(
        self, size: int, outputs: int, hidden: int, num_layers: int, *, axes: int = 2, omega_0: float = 2000.0
    ) -> None:
        super().__init__()
        self.Kernel = MAGNet(size, outputs, hidden, num_layers, axes=axes, omega_0=omega_0)
        self._kept: tuple[object, Tensor] | None = None

    def forward(self) -> Tensor:
        """Return the kernel."""
        key = None if self.training else cache_key(*self.Kernel.parameters())
        if key is None:
            return self.Kernel()
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.Kernel()
        return self._kept[1]


class LocalSlowNet(nn.Module):
    """Holds a :class:`MAGNetLocal` as ``Kernel``; gives depthwise kernels, of the batch or of a running context.

    Args:
        channels: See :class:`MAGNetLocal`.
        kernel_size: See :class:`MAGNetLocal`.
        hidden: See :class:`MAGNetLocal`.
        num_layers: See :class:`MAGNetLocal`.
        running: Keep a running mean of the context and use that outside training.
        trainable_renorm: See :class:`MAGNetLocal`.
        omega_0: See :class:`MAGNet`.
    """

    running_context: Tensor | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        hidden: int,
        num_layers: int,
        *,
        running: bool = False,
        trainable_renorm: bool = False,
        omega_0: float = 2000.0,
    ) -> None:
        super().__init__()
        self.Kernel = MAGNetLocal(
            channels, kernel_size, hidden, num_layers, trainable_renorm=trainable_renorm, omega_0=omega_0
        )
        self.momentum, self.calibrating = 0.1, False
        self.register_buffer("running_context", None)
        if running:
            self.start_running()

    def start_running(self) -> None:
        """Begin to keep running statistics."""
        shape = (self.Kernel.channels, self.Kernel.size, self.Kernel.size)
        self.running_context = self.Kernel.output_linear.weight.detach().new_zeros(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return depthwise kernels, ``(C, 1, k, k)``, for maps ``(B, C, H, W)``."""
        if self.running_context is not None and not (self.training or self.calibrating):
            return self.Kernel.kernel(self.running_context).transpose(0, 1)
        context = self.Kernel.context(x)
        if self.running_context is not None:
            self.running_context.lerp_(context.detach().to(self.running_context.dtype), self.momentum)
        return self.Kernel.kernel(context).transpose(0, 1)
