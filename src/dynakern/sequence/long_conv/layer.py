"""The long convolution layer, its learned transforms, the H3 layer, and the authors' weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_shape
from dynakern.ops import block_fft, dft_matrix, fft_conv
from dynakern.sequence.long_conv.kernel import LongConvKernel

__all__ = ["ButterflyFFT", "H3Conv", "LongConv", "convert_state_dict"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "none": nn.Identity,
}


class ButterflyFFT(nn.Module):
    r"""A block FFT whose small matrices are parameters; the twiddle factors stay those of the FFT.

    At the start it is the FFT (``"replace"``), or the FFT plus noise (``"additive"``: the parameters, drawn from
    0.01 N(0, 1), are added to the DFT matrices). It costs what the block FFT costs.

    Args:
        features: Number of features with matrices of their own; 1 shares them.
        mode: ``"replace"`` or ``"additive"``.
        dropout: Rate at which entries of the parameters are dropped in training.
        lr: Learning rate of the matrices, for :func:`dynakern.train.parameter_groups`.
        device: Of the parameters.
        dtype: Of the parameters (real).

    Source: Fu et al., 2023, arXiv:2302.06646, section 3.2.
    """

    def __init__(
        self,
        features: int = 1,
        *,
        mode: Literal["replace", "additive"] = "replace",
        dropout: float = 0.0,
        lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("replace", "additive"))
        self.mode, self.dropout = mode, dropout
        for size in (2, 4, 8, 16):
            if mode == "additive":
                start = 0.01 * torch.randn(features, size, size, 2, device=device, dtype=dtype)
            else:
                matrix = torch.view_as_real(dft_matrix(size, device=device, dtype=torch.complex128))
                start = matrix.to(dtype or torch.get_default_dtype()).repeat(features, 1, 1, 1)
            parameter = nn.Parameter(start)
            parameter._optim = {"lr": lr, "weight_decay": 0.0}  # pyright: ignore[reportAttributeAccessIssue]
            self.register_parameter(f"mat_{size}", parameter)

    def _matrix(self, size: int) -> Tensor:
        matrix = torch.view_as_complex(F.dropout(getattr(self, f"mat_{size}"), self.dropout, self.training))
        return matrix if self.mode == "replace" else matrix + dft_matrix(size, device=matrix.device, dtype=matrix.dtype)

    def forward(self, x: Tensor, n: int, *, inverse: bool = False) -> Tensor:
        """Transform ``(..., H, L)`` to ``(..., H, n)``, complex; n is a power of two, the input is padded with zeros.

        ``inverse`` computes ``conj(F(conj(x))) / n``, which undoes the transform only as long as it is the FFT.
        """
        matrices = {size: self._matrix(size) for size in (2, 4, 8, 16)}
        return block_fft(x, n=n, matrices=matrices, inverse=inverse)

    def extra_repr(self) -> str:
        """Return the options for ``repr``."""
        return f"features={self.get_parameter('mat_2').shape[0]}, mode={self.mode!r}, dropout={self.dropout:g}"


def _two_sided(k: Tensor) -> Tensor:
    """Join forward and reverse kernels (2 C, H, T) to two-sided ones (C, H, 2 T); reverse tap j is lag -(j + 1)."""
    k0, k1 = k.chunk(2)
    return torch.cat([k0, k1.flip(-1)], -1)


def _wrap(k: Tensor, length: int, points: int) -> Tensor:
    """Return the two-sided kernel (C, H, 2 L) that equals a circular convolution by k over ``points`` points."""
    k = F.pad(k, (0, points - k.shape[-1]))  # cuts what is too long
    return torch.cat([k[..., :length], k[..., points - length :]], -1)


class LongConv(nn.Module):
    r"""Filter H features by C long kernels each, then mix them: (B, L, H) to (B, L, H).

    .. math:: z_{ch} = k_{ch} * u_h + D_{ch} u_h, \qquad y = \mathrm{GLU}(W\, \mathrm{dropout}(\mathrm{GELU}(z)) + b)

    Args:
        d_model: Number of features H.
        l_max: Number of taps. A shorter input uses the first ones, a longer one all of them, and sees no further back.
        channels: Number of kernels for each feature C.
        squash: Threshold of the kernel; see :class:`LongConvKernel`.
        smooth: Odd width of its smoothing, or None.
        smooth_in: ``"time"`` or ``"frequency"``.
        bidirectional: Learn a second kernel of l_max taps for the future.
        causal: Whether kernels act on the past only; otherwise each kernel has 2 l_max taps, the second half of which
            acts on the future (the authors' stand-alone layer). Not together with ``bidirectional``.
        kernel_dropout: Rate at which taps are dropped in training.
        init: ``"random"`` or ``"double_exp"``.
        init_std: Scale of the initial taps.
        kernel_lr: Learning rate of the taps.
        activation: Between convolution and mixing.
        postact: After mixing: ``"glu"`` (the linear map then has 2 H outputs), another activation, or None, which
            leaves the linear map out and returns ``(B, L, C H)``.
        dropout: Rate of dropout before mixing.
        tie_dropout: One mask for all steps.
        transposed: Take and return ``(B, H, L)``.
        butterfly: Learn the transforms of the convolution: ``"replace"`` or ``"additive"``, see :class:`ButterflyFFT`.
            The layer is then no longer invariant under shifts, and ``causal`` holds only at the start; l_max must be a
            power of two and inputs no longer.
        butterfly_shared: One transform for all features instead of one for each.
        butterfly_dropout: Rate at which entries of its matrices are dropped in training.
        compat: Reproduce the authors' code where it errs: a kernel longer than the input wraps around, so that taps
            from L on act on the *future*; frequency smoothing loses the last of an odd number of taps.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option is out of its range, or nearly all taps start dead.

    Source: Fu et al., 2023, arXiv:2302.06646; ``long_conv.py`` and ``standalone_long_convs.py`` of
    ``HazyResearch/safari``. Differs from there: kernels never wrap around, unless ``compat``.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        channels: int = 2,
        *,
        squash: float = 0.003,
        smooth: int | None = None,
        smooth_in: Literal["time", "frequency"] = "time",
        bidirectional: bool = False,
        causal: bool = True,
        kernel_dropout: float = 0.2,
        init: Literal["random", "double_exp"] = "random",
        init_std: float | None = None,
        kernel_lr: float | None = None,
        activation: str = "gelu",
        postact: str | None = "glu",
        dropout: float = 0.0,
        tie_dropout: bool = False,
        transposed: bool = False,
        butterfly: Literal["replace", "additive"] | None = None,
        butterfly_shared: bool = True,
        butterfly_dropout: float = 0.0,
        compat: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, tuple(ACTIVATIONS))
        if bidirectional and not causal:
            raise ValueError(
                "`bidirectional` adds kernels for the future to causal ones; do not pass causal=False too."
            )
        if butterfly is not None and l_max & (l_max - 1):
            raise ValueError(f"`l_max` must be a power of two with `butterfly`, got {l_max}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.l_max, self.channels = d_model, l_max, channels
        self.bidirectional, self.causal, self.transposed, self.compat = bidirectional, causal, transposed, compat
        self.kernel = LongConvKernel(
            d_model,
            l_max,
            2 * channels if bidirectional else channels,
            squash=squash,
            smooth=smooth,
            smooth_in=smooth_in,
            dropout=kernel_dropout,
            init=init,
            init_std=init_std,
            lr=kernel_lr,
            causal=causal,
            compat=compat,
            **factory,
        )
        self.D = nn.Parameter(torch.randn(channels, d_model, **factory))
        self.block_fft_u = self.block_fft_k = None
        if butterfly is not None:
            features = 1 if butterfly_shared else d_model
            self.block_fft_u = ButterflyFFT(features, mode=butterfly, dropout=butterfly_dropout, **factory)
            self.block_fft_k = ButterflyFFT(features, mode=butterfly, dropout=butterfly_dropout, **factory)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout1d(dropout) if tie_dropout else nn.Dropout(dropout)
        self.output_linear = self._mixing(postact, factory)

    def _mixing(self, postact: str | None, factory: dict[str, Any]) -> nn.Module:
        if postact is None:
            return nn.Identity()
        check_choice("postact", postact, ("glu", *ACTIVATIONS))
        width = 2 * self.d_model if postact == "glu" else self.d_model
        linear = nn.Linear(self.channels * self.d_model, width, **factory)
        return nn.Sequential(linear, nn.GLU() if postact == "glu" else ACTIVATIONS[postact]())

    def convolve(self, u: Tensor) -> Tensor:
        """Return kernels and direct path applied to ``(B, H, L)``: ``(B, C, H, L)``."""
        k, length = self.kernel(), u.shape[-1]
        if self.block_fft_u is not None and self.block_fft_k is not None:
            return self._convolve_learned(u, k) + self.D.unsqueeze(-1) * u.unsqueeze(1)
        if self.compat:
            points = length + (min(length, self.l_max) if self.causal else length)
            if self.bidirectional:
                k0, k1 = k.chunk(2)
                k = F.pad(k0, (0, length)) + F.pad(k1.flip(-1), (length, 0))
            return fft_conv(u, _wrap(k, length, points), causal=False, skip=self.D)
        causal = self.causal and not self.bidirectional
        return fft_conv(u, _two_sided(k) if self.bidirectional else k, causal=causal, skip=self.D)

    def _convolve_learned(self, u: Tensor, k: Tensor) -> Tensor:
        length, points = u.shape[-1], 2 * self.l_max
        if length > self.l_max:
            raise ValueError(f"With `butterfly` an input may have at most l_max = {self.l_max} steps, got {length}.")
        assert self.block_fft_u is not None
        assert self.block_fft_k is not None
        spectrum = self.block_fft_u(u, points).unsqueeze(1) * self.block_fft_k(
            _two_sided(k) if self.bidirectional else k, points
        )
        return torch.fft.ifft(spectrum).real[..., :length]

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the filtered and mixed signal.

        Args:
            x: ``(B, L, H)``, or ``(B, H, L)`` if ``transposed``.
            lengths: Number of valid steps of each sequence, ``(B,)``; the rest is set to zero before the convolution.

        Returns:
            Shape of ``x``; with ``postact=None`` C H features instead of H.
        """
        check_shape("x", x, f"B {self.d_model} L" if self.transposed else f"B L {self.d_model}")
        u = x if self.transposed else x.transpose(1, 2)
        if lengths is not None:
            u = u * (torch.arange(u.shape[-1], device=u.device) < lengths[:, None]).unsqueeze(1)
        y = self.convolve(u).flatten(1, 2)  # (B, C H, L), channel major
        y = self.output_linear(self.dropout(self.activation(y)).transpose(1, 2))
        return y.transpose(1, 2) if self.transposed else y


class H3Conv(nn.Module):
    r"""The H3 layer of language models with long convolutions: (B, L, H) to (B, L, H).

    .. math:: y = W_o \left( q \odot \mathrm{conv}_2(\mathrm{conv}_1(k) \odot v) \right), \qquad q, k, v = W u + b

    with :math:`\mathrm{conv}(x) = \kappa * x + D x`, causal.

    Args:
        d_model: Number of features H.
        l_max: Longest kernel; a shorter input uses the first taps, a longer one all of them.
        compat: Reproduce the authors' code where it errs, as in :class:`LongConv`.
        device: Of the parameters.
        dtype: Of the parameters.
        **kernel: Options of :class:`LongConvKernel`, for both kernels.

    Source: Fu et al., 2023, arXiv:2302.06646, section 4.2; ``h3_conv.py`` of ``HazyResearch/safari``, head width 1.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int,
        *,
        compat: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.compat = d_model, compat
        self.q_proj = nn.Linear(d_model, d_model, **factory)
        self.k_proj = nn.Linear(d_model, d_model, **factory)
        self.v_proj = nn.Linear(d_model, d_model, **factory)
        self.k_kernel = LongConvKernel(d_model, l_max, compat=compat, **kernel, **factory)
        self.k_D = nn.Parameter(torch.randn(d_model, **factory))
        self.kernel = LongConvKernel(d_model, l_max, compat=compat, **kernel, **factory)
        self.D = nn.Parameter(torch.randn(d_model, **factory))
        self.output_linear = nn.Linear(d_model, d_model, **factory)

    def _convolve(self, u: Tensor, kernel: LongConvKernel, skip: Tensor) -> Tensor:
        k, length = kernel()[0], u.shape[-1]
        if self.compat:
            return fft_conv(u, _wrap(k, length, 2 * length), causal=False, skip=skip)
        return fft_conv(u, k, skip=skip)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, L, H)`` from ``(B, L, H)``."""
        check_shape("x", x, f"B L {self.d_model}")
        q, k, v = (project(x).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        k = self._convolve(k, self.k_kernel, self.k_D)
        y = q * self._convolve(k * v, self.kernel, self.D)  # (B, H, L)
        return self.output_linear(y.transpose(1, 2))


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the authors' weights to ours.

    Their full layer has our keys, but lists the matrices of a learned FFT twice (``dft_matrices``). Their stand-alone
    layer calls the taps ``kernel``, where we have ``kernel.kernel``. Keys that already fit stay.
    """
    own = model.state_dict()
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".dft_matrices." in f".{key}" and key not in own:
            continue
        nested = f"{key}.kernel"
        renamed[nested if key not in own and nested in own else key] = value
    return renamed
