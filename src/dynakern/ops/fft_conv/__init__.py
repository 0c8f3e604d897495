r"""The long convolution: filter every feature by its own kernel, as long as the sequence, in O(L log L).

The reference multiplies spectra (``torch.fft``). The CPU engine does the same in blocks of rows whose spectra never
leave the cache. There is no direct (Toeplitz) path for short inputs: on a CPU it was measured to win nowhere but for 64
steps and large batches, by a little.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynakern.checks import check_floating, check_same_device, check_shape
from dynakern.ops.dispatch import Backend, refuse_double_backward, resolve_backend
from dynakern.ops.fft_conv.reference import fft_conv_reference, split_taps

__all__ = ["fft_conv"]


def fft_conv(
    u: Tensor, k: Tensor, *, causal: bool = True, skip: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    r"""Convolve each feature of a sequence with C kernels that may be as long as the sequence.

    .. math:: y_{bchl} = \sum_j k_{chj} \, u_{b,h,l-\lambda_j} + d_{ch} u_{bhl}

    where steps before 0 and after L - 1 count as zero: nothing ever wraps around. The lag of tap j is

    - ``causal=True``: :math:`\lambda_j = j`. Of a kernel with T > L taps only the first L matter.
    - ``causal=False``: the two-sided kernel is in the order of ``torch.fft.fftfreq``: lags 0, 1, ..., then the negative
      (future) ones up to -1, that is :math:`\lambda_j = j` for :math:`j < \lceil T/2 \rceil`, and :math:`j - T` from
      there on. A forward kernel ``k0`` and a reverse kernel ``k1`` of equal length, whose taps j act at lags j and
      -(j + 1), make ``torch.cat([k0, k1.flip(-1)], -1)``.

    Args:
        u: Signal, ``(B, H, L)``, floating point.
        k: Kernels, ``(C, H, T)`` or ``(H, T)``.
        causal: Whether the taps act on the present and the past only; else they are two-sided as above.
        skip: Gain :math:`d` of the direct path, ``(C, H)``, or ``(H,)`` for a kernel of two axes; none by default.
        backend: ``"auto"``, ``"reference"`` or ``"cpu"``; see :mod:`dynakern.ops`. There is no engine of ours for a
            GPU: tensors there take the reference, which is that device's FFT library.

    Returns:
        ``(B, C, H, L)``, or ``(B, H, L)`` for a kernel of two axes; dtype of ``u``. It is computed in the wider dtype
        of ``u`` and ``k``, 16-bit numbers in float32.

    Raises:
        TypeError: An argument is not floating point.
        ValueError: Shapes do not fit, an axis is empty, or devices differ.
        NotImplementedError: ``backend`` names an engine that cannot run.

    Example:
        >>> u = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> fft_conv(u, torch.tensor([[1.0, 10.0]])).round().tolist()
        [[[1.0, 12.0, 23.0]]]
        >>> fft_conv(u, torch.tensor([[1.0, 10.0]]), causal=False).round().tolist()  # 10 acts at lag -1
        [[[21.0, 32.0, 3.0]]]

    Source: Fu et al., 2023, arXiv:2302.06646, section 2 and appendix.
    """
    single = k.ndim == 2
    dims = check_shape("u", u, "B H L")
    dims = check_shape("k", k, "H T" if single else "C H T", dims)
    check_floating("u", u)
    check_floating("k", k)
    if skip is not None:
        check_shape("skip", skip, "H" if single else "C H", dims)
        check_floating("skip", skip)
    check_same_device(u=u, k=k, skip=skip)
    if min(u.shape[1:]) == 0 or min(k.shape) == 0:
        raise ValueError(f"`u` and `k` must not be empty, got shapes {tuple(u.shape)} and {tuple(k.shape)}.")
    small = u.shape[2] < 64 or u.shape[0] * u.shape[1] < 6  # the CPU engine transforms 16 rows at a time
    engine = resolve_backend("fft_conv", backend, (u, k, skip), refusals={"cpu": None}, small=small)
    dtype = torch.promote_types(torch.promote_types(u.dtype, k.dtype), torch.float32)
    x, kernel = u.to(dtype), (k.unsqueeze(0) if single else k).to(dtype)
    if skip is not None:  # the direct path is one more tap at lag 0
        kernel = torch.cat([kernel[..., :1] + skip.to(dtype).reshape(*kernel.shape[:2], 1), kernel[..., 1:]], -1)
    if engine == "cpu":
        y = torch.ops.dynakern.fft_conv(x, kernel, causal)
    else:
        y = fft_conv_reference(x, kernel, causal=causal)
    return (y.squeeze(1) if single else y).to(u.dtype)


@torch.library.custom_op("dynakern::fft_conv", mutates_args=())
def _fft_conv(u: Tensor, k: Tensor, causal: bool) -> Tensor:
    from dynakern.ops.fft_conv import cpu

    return cpu.forward(u, k, causal)


@_fft_conv.register_fake
def _(u: Tensor, k: Tensor, causal: bool) -> Tensor:
    return u.new_empty(u.shape[0], k.shape[0], *u.shape[1:])


@torch.library.custom_op("dynakern::fft_conv_backward", mutates_args=())
def _fft_conv_backward(dy: Tensor, u: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    from dynakern.ops.fft_conv import cpu

    return cpu.backward(dy, u, k, causal)


@_fft_conv_backward.register_fake
def _(dy: Tensor, u: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(k)


def _save(ctx, inputs, output) -> None:
    u, k, ctx.causal = inputs
    ctx.save_for_backward(u, k)


def _grad(ctx, dy: Tensor):
    du, dk = torch.ops.dynakern.fft_conv_backward(dy, *ctx.saved_tensors, ctx.causal)
    return du, dk, None


_fft_conv.register_autograd(_grad, setup_context=_save)
_fft_conv_backward.register_autograd(lambda ctx, *grads: refuse_double_backward("fft_conv"))


def _fft_flops(u_shape: torch.Size, k_shape: torch.Size, causal: bool, transforms: int) -> int:
    length = u_shape[2]
    n = length + max(split_taps(length, k_shape[2], causal))
    return round(2.5 * n * math.log2(n) * transforms * u_shape[1])


@register_flop_formula(torch.ops.dynakern.fft_conv)
def _(u_shape, k_shape, causal, *args, **kwargs) -> int:
    """Count the FFTs of real rows, 2.5 n log2 n each: of u, of k and of the products."""
    batch, channels = u_shape[0], k_shape[0]
    return _fft_flops(u_shape, k_shape, causal, batch + channels + batch * channels)


@register_flop_formula(torch.ops.dynakern.fft_conv_backward)
def _(dy_shape, u_shape, k_shape, causal, *args, **kwargs) -> int:
    batch, channels = u_shape[0], k_shape[0]
    return _fft_flops(u_shape, k_shape, causal, 2 * batch + 2 * channels + batch * channels)
