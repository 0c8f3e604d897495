"""CPU engine: blocked over features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynakern.ops.fft_conv.reference import fft_conv_reference, split_taps


def forward(u: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Return y."""
    return fft_conv_reference(u, k, causal=causal).contiguous()


def backward(dy: Tensor, u: Tensor, k: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Return du, dk."""
    length, taps = u.shape[-1], k.shape[-1]
    past, future = split_taps(length, taps, causal)
    n = length + max(past, future)
    kp = torch.cat([F.pad(k[..., :past], (0, n - past - future)), k[..., taps - future :]], -1)
    dyf = torch.fft.rfft(dy, n=n)
    du = torch.fft.irfft((dyf * torch.fft.rfft(kp).conj()).sum(1), n=n)[..., :length]
    dkp = torch.fft.irfft((dyf * torch.fft.rfft(u, n=n).conj()[:, None]).sum(0), n=n)
    dk = torch.zeros_like(k)
    dk[..., :past] = dkp[..., :past]
    dk[..., taps - future :] = dkp[..., n - future :]
    return du.contiguous(), dk
