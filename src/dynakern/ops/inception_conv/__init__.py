r"""The inception depthwise convolution of InceptionNeXt: channels that pass, a square, a wide and a tall stencil.

A large depthwise convolution costs little arithmetic but much traffic. Here (Yu et al., 2023, arXiv:2303.16900) most
channels pass, and a few have a small square or a long band each. The CPU engine makes the output in one go: nothing is
split or joined.

Example:
    >>> import torch
    >>> square, wide, tall = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 1, 11), torch.randn(4, 1, 11, 1)
    >>> x = torch.randn(2, 32, 28, 28)
    >>> y = inception_conv(x, square, None, wide, None, tall, None)
    >>> torch.equal(y[:, :20], x[:, :20])
    True
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_floating, check_same_device, check_shape
from dynakern.ops.depthwise_conv2d.layout import fresh_like
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend
from dynakern.ops.inception_conv.reference import inception_reference

__all__ = ["inception_conv"]

_PATTERNS = {"weight_hw": "g 1 S S", "weight_w": "g 1 1 B", "weight_h": "g 1 B 1"}


def inception_conv(
    x: Tensor,
    weight_hw: Tensor,
    bias_hw: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    weight_h: Tensor,
    bias_h: Tensor | None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Correlate the last 3 g channels with stencils of three shapes, at stride 1, with zeros around the image.

    .. math:: y = \mathrm{concat}(x_\mathrm{id},\ \mathrm{DW}_{s \times s}(x_\mathrm{hw}),\
        \mathrm{DW}_{1 \times b}(x_\mathrm{w}),\ \mathrm{DW}_{b \times 1}(x_\mathrm{h}))

    where the channels of x are, in this order, C - 3g that pass and g for each stencil.

    Args:
        x: Input, ``(N, C, H, W)``, floating point; in memory as planes or channels last.
        weight_hw: Square stencils, ``(g, 1, s, s)``, s odd.
        bias_hw: Added to the channels of the square stencils, ``(g,)``, or None.
        weight_w: Stencils along the width, ``(g, 1, 1, b)``, b odd.
        bias_w: ``(g,)`` or None.
        weight_h: Stencils along the height, ``(g, 1, b, 1)``, with the same b.
        bias_h: ``(g,)`` or None.
        backend: ``"auto"``, ``"reference"`` (split, convolutions of PyTorch, join) or ``"cpu"``. ``auto`` takes the
            reference on other devices than the CPU.

    Returns:
        ``(N, C, H, W)``, dtype and memory format of ``x``. It is computed in the wider dtype of the arguments, on a CPU
        at least in float32.

    Raises:
        TypeError: An argument is not floating point.
        ValueError: Shapes do not fit, a size of the stencils is even, there are fewer than 3 g channels, g, H or W is
            0, or devices differ.
        NotImplementedError: ``backend`` names an engine that cannot run.

    Example:
        >>> x = torch.ones(1, 3, 1, 4)
        >>> square, wide, tall = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 5), torch.ones(1, 1, 5, 1)
        >>> inception_conv(x, square, None, wide, torch.ones(1), tall, None)[0, :, 0]
        tensor([[2., 3., 3., 2.],
                [4., 5., 5., 4.],
                [1., 1., 1., 1.]])

    Source: arXiv:2303.16900, section 3.2.
    """
    arguments = (x, weight_hw, bias_hw, weight_w, bias_w, weight_h, bias_h)
    if not _fits(*arguments):
        weights = {"weight_hw": weight_hw, "weight_w": weight_w, "weight_h": weight_h}
        _check(x, weights, {"bias_hw": bias_hw, "bias_w": bias_w, "bias_h": bias_h})
    engine = resolve_backend("inception_conv", backend, arguments, refusals={"cpu": None})
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in arguments if t is not None))
    if x.device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    wide: list[Any] = [t if t is None or t.dtype == dtype else t.to(dtype) for t in arguments]
    if engine == "cpu":
        y = torch.ops.dynakern.inception_conv(*wide)
    else:
        y = inception_reference(wide[0], wide[1::2], wide[2::2])
    return y.to(x.dtype)


def _fits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether all is as usual, in one dtype: a quick look, since :func:`_check` takes as long as a small image."""
    weights = [t for t in parameters[::2] if isinstance(t, Tensor)]
    biases = [t for t in parameters[1::2] if t is not None]
    if not isinstance(x, Tensor) or len(weights) < 3 or not all(isinstance(t, Tensor) for t in biases):
        return False
    if any(t.dtype != x.dtype or t.device != x.device for t in (*weights, *biases)):
        return False
    square, wide, tall = (t.shape for t in weights)
    if not x.ndim == len(square) == len(wide) == 4:
        return False
    g, s, b = square[0], square[3], wide[3]
    fit = square == (g, 1, s, s) and wide == (g, 1, 1, b) and tall == (g, 1, b, 1) and s % 2 == b % 2 == 1
    fit = fit and all(t.shape == (g,) for t in biases)
    return fit and x.is_floating_point() and 0 < 3 * g <= x.shape[1] and x.shape[2] > 0 and x.shape[3] > 0


def _check(x: Tensor, weights: dict[str, Tensor], biases: dict[str, Tensor | None]) -> None:
    check_shape("x", x, "N C H W")
    check_floating("x", x)
    dims: dict[str, int] = {}
    for name, weight in weights.items():
        dims = check_shape(name, weight, _PATTERNS[name], dims)
        check_floating(name, weight)
    for name, bias in biases.items():
        if bias is not None:
            check_shape(name, bias, "g", dims)
            check_floating(name, bias)
    check_same_device(x=x, **weights, **biases)
    g = dims["g"]
    for name, size in (("weight_hw", dims["S"]), ("weight_w", dims["B"])):
        if size % 2 == 0:
            raise ValueError(f"`{name}` must have an odd size, got shape {tuple(weights[name].shape)}.")
    if min(g, *x.shape[2:]) == 0:
        raise ValueError(f"`x` must have a row and a column and each stencil a channel, got {tuple(x.shape)}, g = {g}.")
    if x.shape[1] < 3 * g:
        raise ValueError(f"`x` must have at least 3 g = {3 * g} channels, got shape {tuple(x.shape)}.")


@torch.library.custom_op("dynakern::inception_conv", mutates_args=())
def _convolve(
    x: Tensor,
    weight_hw: Tensor,
    bias_hw: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
    weight_h: Tensor,
    bias_h: Tensor | None,
) -> Tensor:
    from dynakern.ops.inception_conv import cpu

    y = fresh_like(x)
    cpu.forward(x, [weight_hw, weight_w, weight_h], [bias_hw, bias_w, bias_h], y)
    return y


@_convolve.register_fake
def _(x, weight_hw, bias_hw, weight_w, bias_w, weight_h, bias_h):
    return fresh_like(x)


@torch.library.custom_op("dynakern::inception_conv_backward", mutates_args=())
def _convolve_backward(
    dy: Tensor, x: Tensor, weight_hw: Tensor, weight_w: Tensor, weight_h: Tensor, needs_x: bool, needs_weights: bool
) -> list[Tensor]:
    """Return the gradients of x (empty unless needed) and, unless not needed, of the weights and biases in turn."""
    from dynakern.ops.inception_conv import cpu

    dx = fresh_like(x) if needs_x else None
    pairs = cpu.backward(dy, x, [weight_hw, weight_w, weight_h], dx, needs_weights)
    return [x.new_empty(0) if dx is None else dx, *(t for pair in pairs for t in pair)]


@_convolve_backward.register_fake
def _(dy, x, weight_hw, weight_w, weight_h, needs_x, needs_weights):
    found = [fresh_like(x) if needs_x else x.new_empty(0)]
    for w in (weight_hw, weight_w, weight_h) if needs_weights else ():
        found += [torch.empty_like(w, memory_format=torch.contiguous_format), w.new_empty(w.shape[0])]
    return found


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_hw, _, weight_w, _, weight_h, _ = inputs
    ctx.save_for_backward(x, weight_hw, weight_w, weight_h)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs: Sequence[bool] = ctx.needs_input_grad
    found = _convolve_backward(dy, *ctx.saved_tensors, needs[0], any(needs[1:]))
    found = [*found, *[None] * (7 - len(found))]
    return tuple(g if needed else None for g, needed in zip(found, needs, strict=True))


_convolve.register_autograd(_backward, setup_context=_setup_context)
_convolve_backward.register_autograd(lambda ctx, *grads: refuse_double_backward("inception_conv"))


@register_flop_formula(torch.ops.dynakern.inception_conv)
def _flops(x_shape, weight_hw, bias_hw, weight_w, bias_w, weight_h, *args, **kwargs) -> int:
    """Count two operations for a pixel and tap, those on the zeros around the image included."""
    N, _, H, W = x_shape
    return 2 * N * H * W * sum(g * kh * kw for g, _, kh, kw in (weight_hw, weight_w, weight_h))


@register_flop_formula(torch.ops.dynakern.inception_conv_backward)
def _(dy_shape, x_shape, weight_hw, weight_w, weight_h, needs_x, needs_weights, **kwargs) -> int:
    return (needs_x + needs_weights) * _flops(x_shape, weight_hw, None, weight_w, None, weight_h)
