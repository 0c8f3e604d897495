r"""FFTs as products of small dense matrices (Butterfly, Monarch), and a convolution in three passes over memory.

Both are plain matrix products and FFTs of PyTorch, on any device; there are no engines to choose from.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynakern.checks import check_floating, check_same_device, check_shape
from dynakern.ops.block_fft.reference import block_fft_reference, dft_matrix, three_pass_reference
from dynakern.ops.fft_conv import fft_conv

__all__ = ["block_fft", "dft_matrix", "three_pass_conv"]


def block_fft(
    x: Tensor, *, n: int | None = None, matrices: Mapping[int, Tensor] | None = None, inverse: bool = False
) -> Tensor:
    r"""Compute a discrete Fourier transform from matrices of at most 16 x 16 and fixed twiddle factors.

    With :math:`N = 16 n'` the signal is read as a matrix of 16 rows, :math:`s = i n' + j`, and

    .. math:: X_{16 j' + i'} = \sum_j M_{n'}[j', j] \; e^{-2\pi \mathrm{i}\, j i' / N} \sum_i M_{16}[i', i] \, x_{ij},

    where the outer sum is again a block FFT if :math:`n' > 16`. With M the DFT matrices this is ``torch.fft.fft``; with
    other matrices it is a linear map of the same cost, in general no longer invariant under shifts.

    Args:
        x: Signal, ``(..., L)``, real or complex; ``(..., H, L)`` if the matrices differ between features.
        n: Number of points N, a power of two of at least L; the signal is padded with zeros. L by default.
        matrices: Complex matrices by their size, each ``(r, r)`` or ``(H, r, r)``: 16 and what remains of N after
            dividing by 16 are used. The DFT matrices by default.
        inverse: Compute ``conj(F(conj(x))) / N``, the inverse of the exact transform.

    Returns:
        ``(..., N)``, complex64, or complex128 for a signal of double precision.

    Raises:
        TypeError: ``x`` is neither floating point nor complex.
        ValueError: N is no power of two or smaller than L, or a matrix that is needed is missing or of another shape.

    Example:
        >>> x = torch.arange(32.0)
        >>> torch.allclose(block_fft(x), torch.fft.fft(x), atol=1e-3)
        True

    Source: Fu et al., 2023, arXiv:2302.06646, section 3.2 and appendix C.
    """
    if not x.is_complex():
        check_floating("x", x)
    length = x.shape[-1]
    n = length if n is None else n
    if n < max(length, 2) or n & (n - 1):
        raise ValueError(
            f"`n` must be a power of two and at least the signal's length {length}, got {n}; pad the signal, for "
            f"instance n={1 << max(length - 1, 1).bit_length()}."
        )
    if matrices is not None:
        rest = n
        while rest > 1:
            size = min(rest, 16)
            shape = tuple(matrices[size].shape) if size in matrices else None
            if shape is None or shape[-2:] != (size, size) or len(shape) not in (2, 3):
                raise ValueError(
                    f"`matrices[{size}]` must have shape ({size}, {size}) or (H, {size}, {size}), got {shape}."
                )
            if len(shape) == 3 and shape[0] != 1 and (x.ndim < 2 or shape[0] != x.shape[-2]):
                raise ValueError(f"`matrices[{size}]` has H = {shape[0]}, which does not fit `x` of {tuple(x.shape)}.")
            rest //= size
    return block_fft_reference(x, n, matrices, inverse)


def three_pass_conv(u: Tensor, k: Tensor, *, block: int = 1 << 16) -> Tensor:
    r"""Convolve causally as :func:`dynakern.ops.fft_conv` does, by FFTs of at most ``block`` points.

    An FFT of N points does not fit fast memory when N is in the millions; every stage of it then goes to memory. With
    :math:`N = l m` and l = ``block`` the spectrum splits, :math:`X_{q + m r} = \mathrm{FFT}_l(z_q)_r`, into m
    independent transforms of length l. So three passes over memory do: one that makes
    :math:`z_{qi} = w_N^{qi} \sum_j w_m^{qj} x_{jl+i}`, one that convolves each :math:`z_q` circularly with the
    kernel's, and one that undoes the first. Real signals need only the rows q = 0 ... m/2.

    Args:
        u: Signal, ``(B, H, L)``, float32 or float64.
        k: Kernels, ``(C, H, T)`` or ``(H, T)``; taps beyond L do not matter.
        block: Number of points l that fit fast memory, a power of two.

    Returns:
        ``(B, C, H, L)``, or ``(B, H, L)`` for a kernel of two axes. Short signals, of at most ``block`` points with
        their padding, go to :func:`dynakern.ops.fft_conv`.

    Raises:
        TypeError: An argument is not floating point.
        ValueError: Shapes do not fit, or ``block`` is no power of two.

    Example:
        >>> u, k = torch.randn(1, 2, 1000), torch.randn(2, 1000)
        >>> torch.allclose(three_pass_conv(u, k, block=64), fft_conv(u, k), atol=1e-3)
        True

    Source: Fu et al., 2023, arXiv:2302.06646, section 3.3, algorithm 1.
    """
    dims = check_shape("u", u, "B H L")
    check_shape("k", k, "H T" if k.ndim == 2 else "C H T", dims)
    check_floating("u", u)
    check_floating("k", k)
    check_same_device(u=u, k=k)
    if block < 2 or block & (block - 1):
        raise ValueError(f"`block` must be a power of two, at least 2, got {block}.")
    length = u.shape[-1]
    points = 1 << (length + min(k.shape[-1], length) - 2).bit_length()
    if points <= block:
        return fft_conv(u, k)
    dtype = torch.promote_types(torch.promote_types(u.dtype, k.dtype), torch.float32)
    y = three_pass_reference(u.to(dtype), (k if k.ndim == 3 else k.unsqueeze(0)).to(dtype), points, block)
    return (y.squeeze(1) if k.ndim == 2 else y).to(u.dtype)
