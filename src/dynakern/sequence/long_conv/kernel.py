"""The regularised kernel: smoothing over time or frequency, soft threshold, dropout of taps, initialisation."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_positive

__all__ = ["LongConvKernel", "smooth_frequency", "smooth_time", "squash"]


def squash(k: Tensor, threshold: float) -> Tensor:
    r"""Shrink every tap towards zero: :math:`\mathrm{sign}(k) \max(|k| - \lambda, 0)`.

    The gradient is zero where :math:`|k| \le \lambda`: a tap that starts there stays there.

    Args:
        k: Kernel, any shape ``(..., T)``.
        threshold: :math:`\lambda \ge 0`.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: The threshold is negative.

    Example:
        >>> squash(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
        tensor([-2.,  0.,  1.])

    Source: Fu et al., 2023, arXiv:2302.06646, section 3.1.
    """
    if not threshold >= 0:
        raise ValueError(f"`threshold` must not be negative, got {threshold!r}.")
    return F.softshrink(k, threshold)


def _check_width(width: int) -> None:
    check_positive("width", width, integer=True)
    if width % 2 == 0:
        raise ValueError(f"`width` of the smoothing must be odd, got {width}.")


def smooth_time(k: Tensor, width: int) -> Tensor:
    r"""Average over time: :math:`\bar k_j = \frac{1}{w} \sum_{|i| \le (w-1)/2} k_{j+i}`, zeros beyond the ends.

    The divisor is always w, also at the ends.

    Args:
        k: Kernel, ``(C, H, T)``.
        width: Odd number of taps w.

    Returns:
        ``(C, H, T)``.

    Raises:
        ValueError: The width is even or not positive.

    Source: Fu et al., 2023, arXiv:2302.06646, section 3.1.
    """
    _check_width(width)
    return F.avg_pool1d(k, width, stride=1, padding=width // 2)


def smooth_frequency(k: Tensor, width: int, *, keep_length: bool = True) -> Tensor:
    r"""Smooth the spectrum by a bell: correlate ``rfft(k)`` with :math:`g_j = e^{-(j - \lfloor w/2 \rfloor)^2 / 2}`.

    The bell is not normalised and frequencies beyond the ends count as zero. In time it multiplies the kernel by a
    window, which shortens it.

    Args:
        k: Kernel, ``(C, H, T)``.
        width: Odd number of frequencies w.
        keep_length: Return T taps. Otherwise an odd T loses its last tap, as in the authors' code.

    Returns:
        ``(C, H, T)``, or ``(C, H, T - 1)``.

    Raises:
        ValueError: The width is even or not positive.

    Source: Fu et al., 2023, arXiv:2302.06646, section 3.1.
    """
    _check_width(width)
    taps = k.shape[-1]
    offsets = torch.arange(width, device=k.device, dtype=k.dtype) - width // 2
    bell = torch.exp(-0.5 * offsets.square()).view(1, 1, width)
    spectrum = torch.view_as_real(torch.fft.rfft(k))  # (C, H, T // 2 + 1, 2)
    parts = spectrum.movedim(-1, 0).flatten(0, 2).unsqueeze(1)  # (2 C H, 1, T // 2 + 1)
    smoothed = F.conv1d(parts, bell, padding=width // 2).reshape(2, *spectrum.shape[:-1])
    result = torch.complex(smoothed[0], smoothed[1])
    return torch.fft.irfft(result, n=taps if keep_length else 2 * (spectrum.shape[-2] - 1))


class LongConvKernel(nn.Module):
    r"""C kernels for each of H features, learned tap by tap, smoothed, squashed and dropped out.

    Args:
        d_model: Number of features H.
        l_max: Number of taps; a two-sided kernel has twice as many.
        channels: Number of kernels for each feature C.
        squash: Threshold :math:`\lambda`.
        smooth: Odd width of the smoothing, or None.
        smooth_in: ``"time"`` (moving average) or ``"frequency"`` (of the spectrum, by a bell).
        dropout: Rate at which taps are dropped in training.
        init: ``"random"``, :math:`W \sim s\, N(0, 1)` with s = 0.002, or ``"double_exp"``, geometric decay:
            :math:`W_{ij} \sim s\, N(0, 1) \exp(-\frac{j}{T} \lfloor H/2 \rfloor^{i/H})` for feature i, tap j; s = 0.02.
        init_std: Another s.
        lr: Learning rate of the taps, for :func:`dynakern.train.parameter_groups`; their weight decay is always zero.
        causal: Whether taps act on the past only; otherwise the kernel is two-sided, in the order of
            :func:`dynakern.ops.fft_conv`.
        compat: Let frequency smoothing lose the last of an odd number of taps, as in the authors' code.
        device: Of the parameter.
        dtype: Of the parameter.

    Raises:
        ValueError: An option is out of its range, or fewer than 1 % of the taps survive the threshold at the start:
            they would never learn.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        channels: int = 1,
        *,
        squash: float = 0.003,
        smooth: int | None = None,
        smooth_in: Literal["time", "frequency"] = "time",
        dropout: float = 0.0,
        init: Literal["random", "double_exp"] = "random",
        init_std: float | None = None,
        lr: float | None = None,
        causal: bool = True,
        compat: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("l_max", l_max), ("channels", channels)):
            check_positive(name, value, integer=True)
        check_choice("init", init, ("random", "double_exp"))
        check_choice("smooth_in", smooth_in, ("time", "frequency"))
        check_positive("squash", squash, zero=True)
        if smooth is not None:
            _check_width(smooth)
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout!r}.")
        self.squash, self.smooth, self.smooth_in, self.compat = squash, smooth, smooth_in, compat
        self.dropout = dropout
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        taps = l_max if causal else 2 * l_max
        std = init_std if init_std is not None else {"random": 0.002, "double_exp": 0.02}[init]
        kernel = std * torch.randn(channels, d_model, taps, **factory)
        if init == "double_exp":
            rate = float(d_model // 2) ** (torch.arange(d_model, **factory) / d_model)
            kernel = kernel * torch.exp(-rate[:, None] * torch.arange(taps, **factory) / taps)
        self.kernel = nn.Parameter(kernel)
        optim = {"weight_decay": 0.0} if lr is None else {"lr": lr, "weight_decay": 0.0}
        self.kernel._optim = optim  # pyright: ignore[reportAttributeAccessIssue]
        if not self.kernel.is_meta and self.alive() < 0.01:
            size = float(self._smoothed().detach().square().mean().sqrt())
            raise ValueError(
                f"Only {self.alive():.2%} of the taps survive `squash` = {squash:g} at the start, and dead taps never "
                f"learn: they are of size {size:.2g}{f' after smoothing over {smooth}' if smooth else ''}. Lower "
                "`squash` or raise `init_std` (also before loading trained weights)."
            )

    def _smoothed(self) -> Tensor:
        if self.smooth is None:
            return self.kernel
        if self.smooth_in == "time":
            return smooth_time(self.kernel, self.smooth)
        return smooth_frequency(self.kernel, self.smooth, keep_length=not self.compat)

    @torch.no_grad()
    def alive(self) -> float:
        """Return the fraction of taps that the threshold leaves above zero, in [0, 1]."""
        return float((squash(self._smoothed(), self.squash) != 0).float().mean())

    def forward(self) -> Tensor:
        """Return the regularised kernel, ``(C, H, T)``."""
        return F.dropout(squash(self._smoothed(), self.squash), self.dropout, self.training)

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        smooth = "" if self.smooth is None else f", smooth={self.smooth} in {self.smooth_in}"
        return f"{tuple(self.kernel.shape)}, squash={self.squash:g}{smooth}, dropout={self.dropout:g}"
