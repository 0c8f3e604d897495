r"""Depthwise convolution with large kernels: one kernel a channel, up to 31 x 31 and beyond.

A large kernel makes a shallow network see far (Ding et al., 2022, arXiv:2203.06717; 2024, arXiv:2311.15599), and a
depthwise one is cheap in multiplications, but the general routines of libraries are far from the speed that the
processor allows, above all in the gradient of the weight. The CPU engine here keeps the sums of a tile of pixels in
registers, and takes an FFT for the largest kernels.

Example:
    >>> import torch
    >>> x, weight = torch.randn(2, 8, 28, 28), torch.randn(8, 1, 13, 13)
    >>> y = depthwise_conv2d(x, weight)
    >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight, padding=6, groups=8), atol=1e-4)
    True
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_floating, check_same_device, check_shape
from dynakern.ops.depthwise_conv2d.layout import fresh_like, is_channels_last
from dynakern.ops.depthwise_conv2d.reference import depthwise_conv2d_reference
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend

__all__ = ["depthwise_conv2d"]


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    r"""Correlate every channel with a kernel of its own, at stride 1, with zeros around the image.

    .. math:: y_{nchw} = b_c + \sum_{i < K_H} \sum_{j < K_W} w_{cij} \,
        x_{n,\, c,\, h + i - (K_H - 1)/2,\, w + j - (K_W - 1)/2}

    Args:
        x: Input, ``(N, C, H, W)``, floating point; in memory as planes or channels last.
        weight: Kernels, ``(C, 1, KH, KW)``, both sizes odd.
        bias: Added to each channel, ``(C,)``; none by default.
        backend: ``"auto"``, ``"reference"`` (PyTorch's own) or ``"cpu"``. ``auto`` takes the reference on other devices
            than the CPU and where it was measured to be faster: for kernels of few taps, and for small inputs.

    Returns:
        ``(N, C, H, W)``, dtype and memory format of ``x``. It is computed in the wider dtype of the arguments, on a CPU
        at least in float32. Where kernels are so large that the CPU engine takes the FFT (such as 31 x 31 for images
        of 28 x 28 and more), errors are relative to the largest values of a plane and a NaN spoils its whole plane.

    Raises:
        TypeError: An argument is not floating point.
        ValueError: Shapes do not fit, a size of the kernels is even, C, H or W is 0, or devices differ.
        NotImplementedError: ``backend`` names an engine that cannot run.

    Example:
        >>> x = torch.arange(5.0).reshape(1, 1, 1, 5)
        >>> depthwise_conv2d(x, torch.ones(1, 1, 1, 3)).flatten()
        tensor([1., 3., 6., 9., 7.])
    """
    dims = check_shape("x", x, "N C H W")
    dims = check_shape("weight", weight, "C 1 KH KW", dims)
    check_floating("x", x)
    check_floating("weight", weight)
    if bias is not None:
        check_shape("bias", bias, "C", dims)
        check_floating("bias", bias)
    check_same_device(x=x, weight=weight, bias=bias)
    if min(x.shape[1:]) == 0:
        raise ValueError(f"`x` must have at least one channel, row and column, got shape {tuple(x.shape)}.")
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"`weight` must have kernels of odd sizes, got {weight.shape[2]} x {weight.shape[3]}.")
    present = (x, weight) if bias is None else (x, weight, bias)
    small = _is_small(x, weight)
    engine = resolve_backend("depthwise_conv2d", backend, present, refusals={"cpu": None}, small=small)
    dtype = functools.reduce(torch.promote_types, (y.dtype for y in present))
    if x.device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    wide = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if engine == "cpu":
        y = torch.ops.dynakern.depthwise_conv2d(*wide)
    else:
        y = depthwise_conv2d_reference(*wide)
    return y.to(x.dtype)


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's own was measured to be faster on one thread: it is good at few taps, forward."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    (H, W), (kh, kw) = x.shape[2:], weight.shape[2:]
    last, taps = is_channels_last(x), min(kh, 2 * H - 1) * min(kw, 2 * W - 1)  # those that can act
    work = taps * x.numel()
    if torch.is_grad_enabled() and weight.requires_grad:  # its gradient of the weight is slow
        return taps < 16 or work < (1e6 if last else 4e5)
    if last:
        return taps < 81 or work < (16e6 if taps < 121 else 1e6 if taps <= 169 else 40e6)
    return taps < 25 or (work < 9e6 and max(kh, kw) <= 13)


@torch.library.custom_op("dynakern::depthwise_conv2d", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from dynakern.ops.depthwise_conv2d import cpu

    y = fresh_like(x)
    cpu.forward(x, weight, bias, y)
    return y


@_convolve.register_fake
def _(x, weight, bias):
    return fresh_like(x)


@torch.library.custom_op("dynakern::depthwise_conv2d_backward", mutates_args=())
def _convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from dynakern.ops.depthwise_conv2d import cpu

    dx = fresh_like(x) if needs_x else None
    dw, db = cpu.backward(dy, x, weight, dx, needs_weight, needs_bias)
    return x.new_empty(0) if dx is None else dx, dw, db


@_convolve_backward.register_fake
def _(dy, x, weight, needs_x, needs_weight, needs_bias):
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return (
        fresh_like(x) if needs_x else x.new_empty(0),
        dw if needs_weight else x.new_empty(0),
        x.new_empty(weight.shape[0] if needs_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    found = _convolve_backward(dy, *ctx.saved_tensors, *ctx.needs_input_grad)
    return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))


_convolve.register_autograd(_backward, setup_context=_setup_context)
_convolve_backward.register_autograd(lambda ctx, *grads: refuse_double_backward("depthwise_conv2d"))


@register_flop_formula(torch.ops.dynakern.depthwise_conv2d)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    """Count two operations for a pixel and tap, those on the zeros around the image included."""
    N, C, H, W = x_shape
    return 2 * N * C * H * W * weight_shape[2] * weight_shape[3]


@register_flop_formula(torch.ops.dynakern.depthwise_conv2d_backward)
def _(dy_shape, x_shape, weight_shape, needs_x, needs_weight, needs_bias, **kwargs) -> int:
    return (needs_x + needs_weight) * _flops(x_shape, weight_shape)
