"""The definition of the long convolution: two FFTs, a product, an inverse FFT; the only engine on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["fft_conv_reference", "split_taps"]


def split_taps(length: int, taps: int, causal: bool) -> tuple[int, int]:
    """Return how many taps of each side can act: P lags 0 .. P-1 and N lags -N .. -1.

    Args:
        length: Number of steps L.
        taps: Number of taps T of the kernel as given.
        causal: Whether all taps act on the past; else the kernel is two-sided in the order of ``torch.fft.fftfreq``.
    """
    future = 0 if causal else taps // 2
    return min(taps - future, length), min(future, length - 1)


def fft_conv_reference(u: Tensor, k: Tensor, *, causal: bool) -> Tensor:
    """Return ``(B, C, H, L)`` from ``u`` ``(B, H, L)`` and ``k`` ``(C, H, T)``; see :func:`dynakern.ops.fft_conv`."""
    if u.shape[0] == 0:
        return u.unsqueeze(1) * k[..., :1]  # FFT libraries refuse empty batches
    length = u.shape[-1]
    past, future = split_taps(length, k.shape[-1], causal)
    n = length + max(past, future)  # from here on nothing that wraps around reaches the first L outputs
    k = torch.cat([F.pad(k[..., :past], (0, n - past - future)), k[..., k.shape[-1] - future :]], -1)
    spectrum = torch.fft.rfft(u, n=n).unsqueeze(1) * torch.fft.rfft(k)  # (B, C, H, n // 2 + 1)
    return torch.fft.irfft(spectrum, n=n)[..., :length]
