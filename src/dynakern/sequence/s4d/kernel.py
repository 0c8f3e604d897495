"""The convolution kernel of a diagonal state space: parameters, discretisation, fast Vandermonde products."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice, check_positive
from dynakern.sequence.s4d.hippo import ssm_init

__all__ = ["S4DKernel", "vandermonde", "vandermonde_naive", "vandermonde_transpose"]

TRANSFORMS = ("exp", "relu", "sigmoid", "softplus", "none")


def vandermonde_naive(weights: Tensor, exponents: Tensor, length: int) -> Tensor:
    r"""Return :math:`K_l = 2\,\mathrm{Re} \sum_n w_n e^{a_n l}` by its definition, in O(M L) time and memory.

    Args:
        weights: w, ``(..., M)``, complex.
        exponents: a, ``(..., M)``, complex.
        length: L.

    Returns:
        ``(..., L)``, real.
    """
    steps = torch.arange(length, device=exponents.device, dtype=exponents.real.dtype)
    powers = torch.exp(exponents.unsqueeze(-1) * steps)  # (..., M, L)
    return 2 * (weights.unsqueeze(-1) * powers).sum(-2).real


def _powers(exponents: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``exp(a * steps)`` as real pairs ``(..., M, S, 2)``, with phases reduced in float64.

    A phase of 1e5 radians has lost its last digits in float32 before the cosine is taken.
    """
    a = exponents.to(torch.complex128).unsqueeze(-1)
    phase = a.imag * steps
    turns = (phase.detach() / (2 * math.pi)).round()
    phase = (phase - 2 * math.pi * turns).to(dtype)
    size = torch.exp((a.real * steps).to(dtype))
    return torch.stack([size * torch.cos(phase), size * torch.sin(phase)], -1)


def _split(length: int) -> tuple[int, int]:
    """Return (rows I, columns R) with I R >= L and R about sqrt(L)."""
    columns = max(1, math.isqrt(length - 1) + 1) if length > 1 else 1
    return -(-length // columns), columns


def vandermonde(weights: Tensor, exponents: Tensor, length: int) -> Tensor:
    r"""Return :math:`K_l = 2\,\mathrm{Re} \sum_n w_n e^{a_n l}`, l = 0 .. L - 1, by one real matrix product.

    With :math:`l = R i + j` and :math:`R \approx \sqrt L` the power factors, :math:`e^{a l} = (e^{a R})^i e^{a j}`, and
    :math:`K_{ij} = 2 (\mathrm{Re} P\,\mathrm{Re} Q - \mathrm{Im} P\,\mathrm{Im} Q)` with
    :math:`P_{in} = w_n e^{a_n R i}` and :math:`Q_{nj} = e^{a_n j}`: only :math:`2 \sqrt L` exponentials a state, then
    8 M L floating-point operations.

    Args:
        weights: w, ``(C, ..., M)``, complex: C output channels over the same exponents.
        exponents: a, ``(..., M)``, complex; real parts should not be positive.
        length: L.

    Returns:
        ``(C, ..., L)``, of the real dtype of ``weights``.

    Source: the factorisation is the first level of the Vandermonde product in Gu et al., 2022, arXiv:2206.11893,
    appendix A, written as a matrix product.
    """
    rows, columns = _split(length)
    dtype = weights.real.dtype
    i = columns * torch.arange(rows, device=exponents.device, dtype=torch.float64)
    j = torch.arange(columns, device=exponents.device, dtype=torch.float64)
    coarse = torch.view_as_complex(_powers(exponents, i, dtype).contiguous())  # (..., M, I)
    q = _powers(exponents, j, dtype)  # (..., M, R, 2)
    p = weights.unsqueeze(-1) * coarse  # (C, ..., M, I)
    left = torch.cat([p.real, -p.imag], -2).movedim(0, -3)  # (..., C, 2M, I)
    left = left.transpose(-1, -2).flatten(-3, -2)  # (..., C I, 2M)
    right = torch.cat([q[..., 0], q[..., 1]], -2)  # (..., 2M, R)
    k = 2 * (left @ right)  # (..., C I, R)
    k = k.unflatten(-2, (weights.shape[0], rows)).movedim(-3, 0).flatten(-2)  # (C, ..., I R)
    return k[..., :length]


def vandermonde_transpose(u: Tensor, exponents: Tensor) -> Tensor:
    r"""Return :math:`s_n = \sum_l e^{a_n (L - 1 - l)} u_l`, the state after a sequence, by the same factorisation.

    Args:
        u: ``(B, H, L)``, real.
        exponents: a, ``(H, M)``, complex.

    Returns:
        ``(B, H, M)``, complex.
    """
    length = u.shape[-1]
    rows, columns = _split(length)
    i = columns * torch.arange(rows, device=u.device, dtype=torch.float64)
    j = torch.arange(columns, device=u.device, dtype=torch.float64)
    reversed_ = nn.functional.pad(u.flip(-1), (0, rows * columns - length)).unflatten(-1, (rows, columns))
    q = _powers(exponents, j, u.dtype)  # (H, M, R, 2)
    right = torch.cat([q[..., 0], q[..., 1]], 1).transpose(1, 2)  # (H, R, 2M)
    inner = reversed_.transpose(0, 1).flatten(1, 2) @ right  # (H, B I, 2M)
    real, imag = inner.unflatten(1, (u.shape[0], rows)).chunk(2, -1)  # (H, B, I, M)
    p = torch.view_as_complex(_powers(exponents, i, u.dtype).contiguous()).transpose(1, 2)  # (H, I, M)
    return (torch.complex(real.contiguous(), imag.contiguous()) * p.unsqueeze(1)).sum(2).transpose(0, 1)


def _to_raw(x: Tensor, transform: str) -> Tensor:
    """Invert a positivity transform; values are first clamped to 1e-4, as in the authors' code."""
    if transform == "none":
        return x
    x = x.clamp_min(1e-4)
    if transform == "exp":
        return torch.log(x)
    if transform == "softplus":
        return torch.log(torch.expm1(x))
    return torch.logit(x) if transform == "sigmoid" else x


def _from_raw(x: Tensor, transform: str) -> Tensor:
    if transform == "none":
        return x
    if transform == "exp":
        return torch.exp(x)
    if transform == "softplus":
        return nn.functional.softplus(x)
    return torch.sigmoid(x) if transform == "sigmoid" else nn.functional.relu(x) + 1e-4


class S4DKernel(nn.Module):
    r"""Kernel of H diagonal state spaces with C output channels, in both views.

    Stored unconstrained: :math:`\Delta = f(\mathrm{inv\_dt})`, :math:`\mathrm{Re} A = -f(A_{real})`,
    :math:`\mathrm{Im} A = -g(A_{imag})`; B and C as real pairs. Discretised:

    - ``"zoh"``: :math:`\bar A = e^{\Delta A}`, :math:`\bar B = B (e^{\Delta A} - 1) / A`
    - ``"bilinear"``: :math:`\bar A = (1 + \Delta A / 2) / (1 - \Delta A / 2)`,
      :math:`\bar B = B \Delta / (1 - \Delta A / 2)`
    - ``"dss"``: the softmax-like kernel of Gupta et al., 2022, arXiv:2203.14343, without the factor 2, as in the
      authors' code; it depends on L and has no recurrent view.

    Args:
        d_model: Number of features H.
        d_state: Real state size N, even; M = N/2 complex states are stored.
        channels: Kernels a feature, C.
        init: Initial A, see :func:`ssm_init`.
        disc: ``"zoh"``, ``"bilinear"`` or ``"dss"``.
        dt_min: Smallest initial step.
        dt_max: Largest initial step; steps are log-uniform between the two.
        dt_tie: One step a feature, else one a (feature, state).
        dt_transform: ``"exp"``, ``"softplus"`` or another of exp, relu, sigmoid, softplus, none.
        real_transform: Transform f of the real part.
        imag_transform: Transform g of the imaginary part.
        n_ssm: Number of different (A, B), dividing H; feature h uses copy h mod n_ssm. H by default.
        l_max: Longest kernel, at rate 1; as long as the input by default.
        bandlimit: Zero the weights of states above this fraction of the Nyquist frequency; off by default.
        real_scale: See :func:`ssm_init`.
        imag_scale: See :func:`ssm_init`.
        real_random: See :func:`ssm_init`.
        imag_random: See :func:`ssm_init`.
        ssm_lr: Learning rate of dt, A and B, or a dict with keys dt, A, B; None for no rate of their own. A rate of 0
            freezes. They get no weight decay.
        device: Device of the parameters.
        dtype: Real dtype of the parameters.

    Raises:
        ValueError: A size, range or name is wrong.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        channels: int = 1,
        init: str = "lin",
        disc: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: str = "exp",
        real_transform: str = "exp",
        imag_transform: str = "none",
        n_ssm: int | None = None,
        l_max: int | None = None,
        bandlimit: float | None = None,
        real_scale: float = 1.0,
        imag_scale: float = 1.0,
        real_random: bool = False,
        imag_random: bool = False,
        ssm_lr: float | Mapping[str, float | None] | None = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("disc", disc, ("zoh", "bilinear", "dss"))
        for name, value in (("dt", dt_transform), ("real", real_transform), ("imag", imag_transform)):
            check_choice(f"{name}_transform", value, TRANSFORMS)
        check_positive("d_model", d_model, integer=True)
        check_positive("channels", channels, integer=True)
        if not 0 < dt_min < dt_max:
            raise ValueError(f"`dt_min` and `dt_max` must satisfy 0 < dt_min < dt_max, got {dt_min!r} and {dt_max!r}.")
        n_ssm = d_model if n_ssm is None else n_ssm
        if n_ssm < 1 or d_model % n_ssm:
            raise ValueError(f"`n_ssm` must divide d_model = {d_model}, got {n_ssm}.")
        if l_max is not None:
            check_positive("l_max", l_max, integer=True)
        self.d_model, self.d_state, self.channels, self.init, self.disc = d_model, d_state, channels, init, disc
        self.n_ssm, self.l_max, self.bandlimit = n_ssm, l_max, bandlimit
        self.dt_transform, self.real_transform, self.imag_transform = dt_transform, real_transform, imag_transform
        systems = [
            ssm_init(
                init,
                d_state,
                real_scale=real_scale,
                imag_scale=imag_scale,
                real_random=real_random,
                imag_random=imag_random,
            )
            for _ in range(n_ssm)
        ]
        a, b = (torch.stack(part) for part in zip(*systems, strict=True))  # (n_ssm, M)
        span = math.log(dt_max) - math.log(dt_min)
        dt = torch.exp(torch.rand(d_model, 1 if dt_tie else d_state // 2) * span + math.log(dt_min))
        c = torch.randn(channels, d_model, d_state // 2, dtype=torch.complex64)
        factory = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.inv_dt = nn.Parameter(_to_raw(dt, dt_transform).to(**factory))  # (H, 1 or M)
        self.A_real = nn.Parameter(_to_raw(-a.real, real_transform).to(**factory))  # (n_ssm, M)
        self.A_imag = nn.Parameter(_to_raw(-a.imag.clamp_max(-1e-4), imag_transform).to(**factory))
        self.B = nn.Parameter(torch.view_as_real(b.unsqueeze(0)).to(**factory).contiguous())  # (1, n_ssm, M, 2)
        self.C = nn.Parameter(torch.view_as_real(c).to(**factory).contiguous())  # (C, H, M, 2)
        self._hint(ssm_lr)

    def _hint(self, ssm_lr: float | Mapping[str, float | None] | None) -> None:
        rates = dict.fromkeys(("dt", "A", "B"), ssm_lr) if not isinstance(ssm_lr, Mapping) else dict(ssm_lr)
        unknown = set(rates) - {"dt", "A", "B"}
        if unknown:
            raise ValueError(f"`ssm_lr` takes the keys dt, A and B, got {', '.join(sorted(unknown))}.")
        owners = {"dt": (self.inv_dt,), "A": (self.A_real, self.A_imag), "B": (self.B,)}
        for name, rate in rates.items():
            for parameter in owners[name]:
                if rate == 0:
                    parameter.requires_grad_(False)
                elif rate is not None:
                    parameter._optim = {"lr": rate, "weight_decay": 0.0}  # pyright: ignore[reportAttributeAccessIssue]

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dt ``(H, 1 or M)``, A ``(H, M)``, B ``(H, M)`` and C ``(C, H, M)``; float32 or wider."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        dt = _from_raw(self.inv_dt.to(wide), self.dt_transform)
        real = -_from_raw(self.A_real.to(wide), self.real_transform)
        imag = -_from_raw(self.A_imag.to(wide), self.imag_transform)
        copies = self.d_model // self.n_ssm
        a = torch.complex(real, imag).repeat(copies, 1)
        b = torch.view_as_complex(self.B.to(wide).contiguous())[0].repeat(copies, 1)
        c = torch.view_as_complex(self.C.to(wide).contiguous())
        if self.bandlimit is not None:
            c = c * (dt * a.imag.abs() / (2 * math.pi) < self.bandlimit / 2)
        return dt, a, b, c

    def discretise(self, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`\log \bar A` ``(H, M)``, :math:`\bar B` ``(H, M)`` and C ``(C, H, M)``, complex.

        Args:
            rate: Factor of the step: 2 for an input sampled at half the rate of training.

        Raises:
            ValueError: The discretisation is ``"dss"``, which has no recurrence.
        """
        if self.disc == "dss":
            raise ValueError("`disc='dss'` has no recurrent view: its kernel depends on the length of the sequence.")
        dt, a, b, c = self.continuous()
        step = rate * dt
        if self.disc == "zoh":
            return step * a, b * (torch.exp(step * a) - 1) / a, c
        ratio = (1 + step * a / 2) / (1 - step * a / 2)
        # A real state with step * a = -2 dies at once; its logarithm must stay finite.
        ratio = torch.where(ratio.abs() < 1e-30, torch.full_like(ratio, 1e-30), ratio)
        return torch.log(ratio), b * step / (1 - step * a / 2), c

    def kernel_length(self, length: int, rate: float = 1.0) -> int:
        """Return how many taps the kernel has for an input of ``length`` steps."""
        return length if self.l_max is None else min(length, max(1, round(self.l_max / rate)))

    def forward(self, length: int, *, rate: float = 1.0, state: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        r"""Return the kernel, and what an initial state adds to the output.

        Args:
            length: L.
            rate: Factor of the step, positive.
            state: Initial state :math:`x_{-1}`, ``(B, H, M)``, complex.

        Returns:
            K ``(C, H, T)`` with T = :meth:`kernel_length`; with a state also
            :math:`2\,\mathrm{Re} \sum_n C_n \bar A_n^{l+1} x_{-1,n}`, ``(B, C, H, L)``.

        Raises:
            ValueError: ``rate`` is not positive, or a state is given with ``"dss"``.
        """
        check_positive("length", length, integer=True)
        check_positive("rate", rate)
        taps = self.kernel_length(length, rate)
        if self.disc == "dss":
            if state is not None:
                self.discretise()  # raises
            return self._dss(taps, rate)
        log_a, b, c = self.discretise(rate)
        k = vandermonde(c * b, log_a, taps)
        if state is None:
            return k
        weights = (c * torch.exp(log_a)).unsqueeze(1) * state  # (C, B, H, M)
        forced = vandermonde(weights.flatten(0, 1), log_a, length).unflatten(0, weights.shape[:2])
        return k, forced.transpose(0, 1)

    def _dss(self, length: int, rate: float) -> Tensor:
        dt, a, b, c = self.continuous()
        z = rate * dt * a
        growing = a.real > 0  # only without a transform of the real part
        down = torch.where(growing, -z, z)
        x = (torch.exp(down * length) - 1) * a
        reciprocal = x.conj() / (x * x.conj() + 1e-7)
        weights = b * c * (torch.exp(down) - 1) * reciprocal
        falling = vandermonde(torch.where(growing, 0, weights), down, length)
        if self.real_transform == "none":
            falling = falling + vandermonde(torch.where(growing, weights, 0), down, length).flip(-1)
        return falling / 2  # vandermonde brings the factor 2 of a conjugate pair, which this kernel has not

    def next_state(self, u: Tensor, state: Tensor, *, rate: float = 1.0) -> Tensor:
        r"""Return the state after a sequence: :math:`\bar A^L x_{-1} + \sum_l \bar A^{L-1-l} \bar B u_l`.

        Args:
            u: Input, ``(B, H, L)``.
            state: ``(B, H, M)``, complex.
            rate: Factor of the step.
        """
        log_a, b, _ = self.discretise(rate)
        length = torch.tensor([float(u.shape[-1])], dtype=torch.float64, device=u.device)
        decay = torch.view_as_complex(_powers(log_a, length, log_a.real.dtype).contiguous()).squeeze(-1)
        return decay * state + b * vandermonde_transpose(u.to(log_a.real.dtype), log_a)

    def initial_state(self, batch: int) -> Tensor:
        """Return zeros ``(B, H, M)``, complex."""
        dtype = torch.complex128 if self.C.dtype == torch.float64 else torch.complex64
        return torch.zeros(batch, self.d_model, self.d_state // 2, dtype=dtype, device=self.C.device)

    def extra_repr(self) -> str:
        """Return the sizes for ``repr``."""
        sizes = f"d_model={self.d_model}, d_state={self.d_state}, channels={self.channels}"
        return f"{sizes}, init={self.init!r}, disc={self.disc!r}"
