r"""Small-kernel aggregation: mix each pixel's neighbourhood with a kernel of its own.

"See large, focus small": LSNet (Wang et al., 2025, arXiv:2503.23135) looks at a large neighbourhood of each pixel to
decide on a small kernel, and mixes the small neighbourhood with it. The kernels depend on the input and on the place;
channels share them in an interleaved way. This is the mixing; it moves few bytes and does few multiplications, so its
speed is a matter of reading each of them once.

Implemented: the operator and its gradients, for the CPU (Numba) and for GPUs (Triton).

Example:
    >>> import torch
    >>> x, w = torch.randn(2, 16, 14, 14), torch.randn(2, 2, 9, 14, 14)
    >>> ska(x, w).shape
    torch.Size([2, 16, 14, 14])
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_floating, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend
from dynakern.ops.ska.reference import ska_reference

__all__ = ["ska"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def ska(x: Tensor, w: Tensor, *, backend: Backend = "auto") -> Tensor:
    r"""Mix the k x k neighbourhood of each pixel with the kernel that ``w`` holds for it.

    .. math:: y_{ncij} = \sum_{a < k} \sum_{b < k} x_{n,\, c,\, i + a - p,\, j + b - p} \,
        w_{n,\, c \bmod C_w,\, a k + b,\, i,\, j}, \qquad p = (k - 1)/2

    where pixels outside of the image are zero. O(N C H W k\ :sup:`2`) time.

    Args:
        x: Input, ``(N, C, H, W)``, floating point.
        w: Kernels, ``(N, C_w, k k, H, W)``, k odd; :math:`C_w` divides C. Channels c, c + C_w, ... share a kernel.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"gpu"``.

    Returns:
        ``(N, C, H, W)``, contiguous, dtype of ``x``. It is computed in the wider dtype of the arguments, 16-bit numbers
        in float32.

    Raises:
        TypeError: An argument is not floating point.
        ValueError: Shapes do not fit, C is not divisible by C_w, the number of taps is no odd square, an axis but N is
            empty, or devices differ.
        NotImplementedError: The engine asked for by name cannot run here.

    Example:
        >>> w = torch.zeros(1, 1, 9, 1, 3)
        >>> w[:, :, 5] = 1.0  # the right neighbour
        >>> ska(torch.tensor([[[[1.0, 2.0, 3.0]]]]), w).flatten()
        tensor([2., 3., 0.])

    Source: Wang et al., 2025, arXiv:2503.23135, section 3.2; the order of the taps and the interleaved channels are
    those of ``jameslahm/lsnet``.
    """
    check_floating("x", x)
    check_floating("w", w)
    dims = check_shape("w", w, "N C_w T H W", check_shape("x", x, "N C H W"))
    if 0 in x.shape[1:] or 0 in w.shape[1:]:
        raise ValueError(f"No axis but N may be empty, got shapes {tuple(x.shape)} and {tuple(w.shape)}.")
    if dims["C"] % dims["C_w"]:
        raise ValueError(f"The channels C = {dims['C']} must be divisible by the kernels C_w = {dims['C_w']}.")
    size = math.isqrt(dims["T"])
    if size * size != dims["T"] or size % 2 == 0:
        raise ValueError(f"`w` must have an odd square number of taps on axis 2 (1, 9, 25, ...), got {dims['T']}.")
    check_same_device(x=x, w=w)
    real = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    refusals = {"cpu": None, "gpu": None if _HAS_TRITON else "Triton is not installed: pip install 'dynakern[gpu]'"}
    engine = resolve_backend("ska", backend, (x, w), refusals=refusals, small=x.numel() * dims["T"] < 20_000)
    if engine == "gpu":  # reads 16-bit numbers as they are
        narrow = torch.promote_types(x.dtype, w.dtype)
        y = _ska(x.to(narrow), w.to(narrow))
    elif engine == "cpu":
        y = _ska(x.to(real), w.to(real))
    else:
        y = ska_reference(x.to(real), w.to(real))
    return y.to(x.dtype)


def _engine(x: Tensor) -> Any:
    if x.device.type == "cpu":
        from dynakern.ops.ska import cpu

        return cpu
    from dynakern.ops.ska import gpu

    return gpu


@torch.library.custom_op("dynakern::ska", mutates_args=())
def _ska(x: Tensor, w: Tensor) -> Tensor:
    return _engine(x).forward(x, w)


@_ska.register_fake
def _(x, w):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("dynakern::ska_backward", mutates_args=())
def _ska_backward(dy: Tensor, x: Tensor, w: Tensor, needs_x: bool, needs_w: bool) -> tuple[Tensor, Tensor]:
    engine = _engine(x)
    dx = engine.backward_input(dy, w) if needs_x else x.new_empty(0)
    return dx, engine.backward_kernels(dy, x, w.shape[1], w.shape[2]) if needs_w else x.new_empty(0)


@_ska_backward.register_fake
def _(dy, x, w, needs_x, needs_w):
    empty = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w))
    return tuple(t if needed else x.new_empty(0) for t, needed in zip(empty, (needs_x, needs_w), strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    found = _ska_backward(dy, *ctx.saved_tensors, *ctx.needs_input_grad)
    return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))


_ska.register_autograd(_backward, setup_context=_setup_context)
_ska_backward.register_autograd(lambda ctx, *grads: refuse_double_backward("ska"))


@register_flop_formula(torch.ops.dynakern.ska)
def _flops(x_shape, w_shape, *args, **kwargs) -> int:
    """Count two operations for a pixel, channel and tap."""
    return 2 * math.prod(x_shape) * w_shape[2]


@register_flop_formula(torch.ops.dynakern.ska_backward)
def _(dy_shape, x_shape, w_shape, needs_x, needs_w, **kwargs) -> int:
    return (needs_x + needs_w) * _flops(x_shape, w_shape)
