r"""Mamba: a gated block around the selective scan, for sequences, with constant memory a step.

A linear state-space layer treats every step alike, so it cannot skip what does not matter. Mamba lets the input choose
its own step size and input and output maps, :math:`(\Delta, B, C) = \text{linear}(x)`, and wraps the scan in a short
causal convolution and a gate (Gu & Dao, 2023, arXiv:2312.00752, section 3). State-dict keys are those of
``state-spaces/mamba``. Implemented: the block, its recurrent form, and a pre-norm stack of blocks with factories for
forecasting and classification. Not implemented: the language model around it and sequences packed into one.

Example:
    >>> import torch
    >>> block, x = Mamba(d_model=8, d_state=4), torch.randn(2, 10, 8)
    >>> y = block(x)                                            # (2, 10, 8)
    >>> state = block.init_state(2)
    >>> for t in range(10):
    ...     y_t, state = block.step(x[:, t], state)
    >>> torch.allclose(y_t, y[:, -1], atol=1e-5)
    True
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynakern.checks import check_choice, check_positive, check_shape
from dynakern.layers.series import SeriesClassification, SeriesForecast
from dynakern.ops.dispatch import Backend
from dynakern.ops.selective_scan import selective_scan

__all__ = ["Mamba", "MambaStack", "MambaState", "classify_series", "forecast", "init_step_bias", "init_step_weight"]


def init_step_weight(
    weight: Tensor, *, dt_init: Literal["random", "constant"] = "random", dt_scale: float = 1.0
) -> None:
    """Fill the weight of a step projection, ``(..., D, R)``, so that it keeps the variance of an input of rank R.

    The values are uniform within, or with ``dt_init="constant"`` all equal to, ``dt_scale / sqrt(R)``.
    """
    check_choice("dt_init", dt_init, ("random", "constant"))
    scale = weight.shape[-1] ** -0.5 * dt_scale
    with torch.no_grad():
        weight.fill_(scale) if dt_init == "constant" else weight.uniform_(-scale, scale)


def init_step_bias(bias: Tensor, *, dt_min: float = 0.001, dt_max: float = 0.1, dt_init_floor: float = 1e-4) -> None:
    """Fill the bias of a step projection so that its softplus is log-uniform in [``dt_min``, ``dt_max``]."""
    with torch.no_grad():
        dt = torch.exp(torch.rand_like(bias) * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min))
        dt = dt.clamp_min(dt_init_floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of the softplus


class MambaState(NamedTuple):
    """What a :class:`Mamba` block remembers of the steps so far.

    Attributes:
        conv: The last ``d_conv`` inputs of the convolution, ``(B, d_inner, d_conv)``, the newest last.
        ssm: The state of the scan, ``(B, d_inner, d_state)``.
    """

    conv: Tensor
    ssm: Tensor


class Mamba(nn.Module):
    r"""The Mamba block: project, convolve, scan selectively, gate, project back.

    .. math::
        x, z &= W_{in} v, \qquad x \leftarrow \operatorname{silu}(\operatorname{conv}(x)), \\
        \delta, B, C &= W_x x, \qquad \Delta = \operatorname{softplus}(W_\Delta \delta + b_\Delta), \\
        y &= W_{out} \, \operatorname{scan}(x, \Delta, -e^{A_{log}}, B, C, D, z).

    Args:
        d_model: Features of the input and output.
        d_state: States N of each channel.
        d_conv: Taps of the causal convolution.
        expand: Inner channels as a multiple of ``d_model``.
        dt_rank: Rank R of the step projection; ``"auto"`` is ``ceil(d_model / 16)``.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        dt_init: How the step projection starts: ``"random"`` or ``"constant"``.
        dt_scale: Scale of that start.
        dt_init_floor: Lower bound on the initial steps.
        conv_bias: Whether the convolution has a bias.
        bias: Whether the input and output projections have biases.
        backend: Engine of the scan; see :func:`dynakern.ops.selective_scan`.
        device: Where the parameters live.
        dtype: Of the parameters; ``A_log`` and ``D`` stay float32 if it has 16 bits.

    Source: arXiv:2312.00752, figure 3 and algorithm 2; ``mamba_simple`` of ``state-spaces/mamba``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
            check_positive(name, value, integer=True)
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.backend: Backend = backend
        d_inner, factory = self.d_inner, {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **factory)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias, **factory)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner, **factory)
        init_step_weight(self.dt_proj.weight, dt_init=dt_init, dt_scale=dt_scale)
        init_step_bias(self.dt_proj.bias, dt_min=dt_min, dt_max=dt_max, dt_init_floor=dt_init_floor)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, **wide).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner, **wide))
        for parameter in (self.A_log, self.D):  # as in the authors' training
            parameter._optim = {"weight_decay": 0.0}  # pyright: ignore[reportAttributeAccessIssue]
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **factory)

    def extra_repr(self) -> str:
        """Name the sizes."""
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, dt_rank={self.dt_rank}"

    def forward(self, x: Tensor) -> Tensor:
        """Map a sequence to a sequence, causally.

        Args:
            x: ``(B, L, d_model)``.

        Returns:
            ``(B, L, d_model)``.
        """
        return self._run(x, None)[0]

    def init_state(self, batch: int) -> MambaState:
        """Return the state before the first step of ``batch`` sequences."""
        weight = self.conv1d.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return MambaState(
            weight.new_zeros(batch, self.d_inner, self.d_conv),
            weight.new_zeros(batch, self.d_inner, self.d_state, dtype=wide),
        )

    def extend(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Go on from ``state`` by several steps at once, e.g. over a prompt.

        Args:
            x: The next steps, ``(B, L, d_model)``.
            state: From :meth:`init_state`, :meth:`extend` or :meth:`step`; it is not modified.

        Returns:
            The outputs, ``(B, L, d_model)``, and the state after them.
        """
        return self._run(x, state)

    def step(self, x_t: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Go on by one step, at a cost that does not depend on how many came before.

        Args:
            x_t: The next step, ``(B, d_model)``.
            state: As for :meth:`extend`.

        Returns:
            The output, ``(B, d_model)``, and the state after it.
        """
        check_shape("x_t", x_t, f"B {self.d_model}")
        y, state = self._run(x_t.unsqueeze(1), state)
        return y.squeeze(1), state

    def _run(self, x: Tensor, state: MambaState | None) -> tuple[Tensor, MambaState]:
        check_shape("x", x, f"B L {self.d_model}")
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (B, d_inner, L) each
        past = self.d_conv - 1
        x = F.pad(x, (past, 0)) if state is None else torch.cat([state.conv[..., 1:].to(x.dtype), x], dim=-1)
        window = x[..., -self.d_conv :].contiguous()
        x = F.silu(self.conv1d(x))
        dt, B, C = self.x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm = selective_scan(
            x,
            F.linear(dt, self.dt_proj.weight).transpose(1, 2),
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            return_last_state=True,
            initial_state=None if state is None else state.ssm,
            backend=self.backend,
        )
        return self.out_proj(y.transpose(1, 2)), MambaState(window, ssm)


class _Residual(nn.Module):
    def __init__(self, mixer: nn.Module, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class MambaStack(nn.Module):
    """Residual Mamba blocks, each after a root-mean-square norm, and a final norm.

    The keys of the state dict are those of the backbone in ``state-spaces/mamba``, without its embedding.

    Args:
        d_model: Features.
        num_layers: Number of blocks.
        **options: For :class:`Mamba`.
    """

    def __init__(self, d_model: int, num_layers: int = 2, **options: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_Residual(Mamba(d_model, **options), d_model) for _ in range(num_layers)))
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, L, d_model)`` to ``(B, L, d_model)``, causally."""
        return self.norm_f(self.layers(x))


def forecast(*, channels: int, context: int, horizon: int, time_features: int) -> SeriesForecast:
    """Build a small Mamba forecaster (2 blocks of width 32) for ``dynakern compare forecast``."""
    return SeriesForecast(
        MambaStack(32, 2),
        channels=channels,
        context=context,
        horizon=horizon,
        d_model=32,
        time_features=time_features,
    )


def classify_series(*, channels: int, length: int, classes: int) -> SeriesClassification:
    """Build a small Mamba classifier of series (2 blocks of width 32); it takes any ``length``."""
    return SeriesClassification(MambaStack(32, 2), channels=channels, classes=classes, d_model=32)
