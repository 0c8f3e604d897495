"""The block FFT and the three-pass convolution in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["block_fft_reference", "dft_matrix", "three_pass_reference"]


def _root(power: Tensor, n: int) -> Tensor:
    """Return exp(-2 pi i / n) ** power, complex128."""
    angle = power.to(torch.float64) * (-2 * math.pi / n)
    return torch.complex(angle.cos(), angle.sin())


def dft_matrix(n: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.complex64) -> Tensor:
    r"""Return the matrix of the discrete Fourier transform, :math:`e^{-2\pi \mathrm{i}\, a b / n}`, shape ``(n, n)``.

    Args:
        n: Number of points.
        device: Where the matrix lies.
        dtype: ``torch.complex64`` or ``torch.complex128``; the angles are computed in double precision.
    """
    a = torch.arange(n, device=device)
    return _root(a[:, None] * a % n, n).to(dtype)


def block_fft_reference(x: Tensor, n: int, matrices: Mapping[int, Tensor] | None, inverse: bool) -> Tensor:
    """Return ``(..., n)``; see :func:`dynakern.ops.block_fft`."""
    x = F.pad(x, (0, n - x.shape[-1])).to(torch.promote_types(x.dtype, torch.complex64))
    if inverse:
        return block_fft_reference(x.conj(), n, matrices, False).conj() / n
    return _split(x.unsqueeze(-2), matrices).squeeze(-2)  # (..., H, 1, n): the recursion adds rows


def _split(x: Tensor, matrices: Mapping[int, Tensor] | None) -> Tensor:
    n = x.shape[-1]
    size, rest = min(n, 16), n // min(n, 16)
    if matrices is None:
        matrix = dft_matrix(size, device=x.device, dtype=x.dtype)
    else:
        matrix = matrices[size].to(x.dtype)
        matrix = matrix[0] if matrix.ndim == 3 and matrix.shape[0] == 1 else matrix  # (size, size) or (H, size, size)
    if rest == 1:
        return x @ matrix.mT
    x = x.unflatten(-1, (16, rest))  # (..., H, R, i, j)
    x = (matrix.unsqueeze(-3) if matrix.ndim == 3 else matrix) @ x
    twiddle = _root(torch.arange(16, device=x.device)[:, None] * torch.arange(rest, device=x.device), n)
    x = _split((x * twiddle.to(x.dtype)).flatten(-3, -2), matrices)  # (..., H, R i', j')
    return x.unflatten(-2, (-1, 16)).mT.flatten(-2)


def three_pass_reference(u: Tensor, k: Tensor, points: int, block: int) -> Tensor:
    """Return ``(B, C, H, L)`` from ``(B, H, L)`` and ``(C, H, T)``; see :func:`dynakern.ops.three_pass_conv`."""
    length = u.shape[-1]
    x, kernel = (_gather(_as_matrix(signal, points, block), points) for signal in (u, k[..., :length]))
    rows = []
    for q in range(x.shape[-2]):  # second pass: (B, C, H, block) for each q
        spectrum = torch.fft.fft(x[..., q, :]).unsqueeze(1) * torch.fft.fft(kernel[..., q, :])
        rows.append(torch.fft.ifft(spectrum))
    return _scatter(torch.stack(rows, -2), points).flatten(-2)[..., :length]


def _as_matrix(x: Tensor, points: int, block: int) -> Tensor:
    return F.pad(x, (0, points - x.shape[-1])).unflatten(-1, (points // block, block))


def _twiddled_columns(rows: int, columns: int, points: int, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of columns i with w_N^{q i} for the rows q of the upper half; a chunk has about a row's entries."""
    width = max(1, columns // rows)
    q = torch.arange(rows // 2 + 1, device=like.device)[:, None]
    inner = _root(q * torch.arange(width, device=like.device), points)
    for start in range(0, columns, width):
        here = inner[:, : columns - start] * _root(q * start, points)
        yield slice(start, start + width), here.to(torch.promote_types(like.dtype, torch.complex64))


def _gather(x: Tensor, points: int) -> Tensor:
    """First pass: z[q, i] = w_N^{q i} sum_j w_m^{q j} x[j, i], from (..., m, l) to (..., m / 2 + 1, l)."""
    chunks = _twiddled_columns(x.shape[-2], x.shape[-1], points, x)
    return torch.cat([torch.fft.rfft(x[..., here], dim=-2) * twiddle for here, twiddle in chunks], -1)


def _scatter(z: Tensor, points: int) -> Tensor:
    """Third pass: undo the first."""
    rows = points // z.shape[-1]
    chunks = _twiddled_columns(rows, z.shape[-1], points, z)
    return torch.cat([torch.fft.irfft(z[..., here] * w.conj(), n=rows, dim=-2) for here, w in chunks], -1)
