r"""Chimera: state-space layers over two axes, time and variates, with coefficients that depend on the input.

A multivariate series has two directions: what a variate did before, and what the others do now. Chimera runs one hidden
state along each, coupled in every cell, with step sizes and input and output maps computed from the input. One pair of
states with small steps follows the trend, one with large steps the season; variates are scanned both ways, since their
order means nothing.

Paper: Behrouz, Santacatterina and Zabih, 2024, "Chimera: Effectively Modeling Multivariate Time Series with
2-Dimensional State Space Models", arXiv:2406.04320. There is no official code, and its text leaves choices open. Ours,
not confirmed by the authors: the placement of indices in the recurrence; one input map a state; the factor 1/2 on the
transitions (``coupling="half"``; ``"raw"`` is the literal equation, whose impulse response can grow like
:math:`2^{v+t}`); linear maps of the cell's features for B, C and the steps, as in Mamba; the wiring of a block, where
the season reads the same input as the trend (reading what the trend leaves, the two nearly cancel at the start); the
ranges of the steps.

Implemented: the selective layer, its two heads, forecasting, classification and reconstruction networks, the
data-independent case as a kernel and an FFT convolution, the closed-loop companion decoder of SpaceTime (Zhang et al.,
2023, arXiv:2302.09489). The state space itself is :func:`dynakern.ops.ssm2d`, its recurrence
:func:`dynakern.ops.scan2d`.

Example:
    >>> import torch
    >>> layer = SSM2D(d_model=4, d_state=2)
    >>> layer(torch.randn(1, 3, 5, 4)).shape  # (B, V, T, D)
    torch.Size([1, 3, 5, 4])
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_positive, check_shape
from dynakern.ops import scan2d, ssm2d
from dynakern.ops.ssm2d import Coupling, InputRule

__all__ = ["SSM2D", "Chimera", "ClosedLoop", "chimera", "lti_conv2d", "lti_kernel2d", "ssm2d"]


def lti_kernel2d(
    a1: Tensor,
    a2: Tensor,
    a3: Tensor,
    a4: Tensor,
    B1: Tensor,
    B2: Tensor,
    C1: Tensor,
    C2: Tensor,
    *,
    size: tuple[int, int],
) -> Tensor:
    """Return the impulse response of data-independent coefficients.

    Args:
        a1: Discretised transition, ``(D, N)``; so are a2, a3, a4.
        a2: See ``a1``.
        a3: See ``a1``.
        a4: See ``a1``.
        B1: Input map of the first state, ``(D, N)``; so are B2, C1, C2 for the other maps.
        B2: See ``B1``.
        C1: See ``B1``.
        C2: See ``B1``.
        size: (V, T) of the kernel.

    Returns:
        ``(V, T, D)``.
    """
    dims = check_shape("a1", a1, "D N")
    for name, x in {"a2": a2, "a3": a3, "a4": a4, "B1": B1, "B2": B2, "C1": C1, "C2": C2}.items():
        check_shape(name, x, "D N", dims)
    corner = torch.zeros(*size, 1, 1, dtype=a1.dtype, device=a1.device)
    corner[0, 0] = 1
    s1, s2, s3, s4 = (a.expand(*size, *a1.shape) for a in (a1, a2, a3, a4))
    h1, h2 = scan2d(s1, s2, s3, s4, corner * B1, corner * B2)
    return (C1 * h1 + C2 * h2).sum(-1)


def lti_conv2d(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolve ``u`` ``(B, V, T, D)`` causally along both axes with ``kernel`` ``(V, T, D)``, by FFTs."""
    dims = check_shape("u", u, "B V T D")
    check_shape("kernel", kernel, "V T D", dims)
    size = (2 * dims["V"], 2 * dims["T"])
    spectrum = torch.fft.rfft2(u, s=size, dim=(1, 2)) * torch.fft.rfft2(kernel, s=size, dim=(0, 1))
    return torch.fft.irfft2(spectrum, s=size, dim=(1, 2))[:, : dims["V"], : dims["T"]]


class _Direction(nn.Module):
    """Parameters of one scan: rates, input-dependent maps and steps, and the skip of the first direction."""

    def __init__(self, d_model: int, d_state: int, dt_range: tuple[float, float], *, skip: bool) -> None:
        super().__init__()
        n = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.log(n).expand(4, d_model, d_state).clone())
        self.D = nn.Parameter(torch.ones(d_model)) if skip else None
        self.maps = nn.Linear(d_model, 4 * d_state, bias=False)
        self.steps = nn.Linear(d_model, 2 * d_model)
        low, high = (math.log(v) for v in dt_range)
        dt = torch.exp(torch.rand(2 * d_model) * (high - low) + low)
        with torch.no_grad():
            self.steps.weight.mul_(0.1)
            self.steps.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus

    def forward(self, x: Tensor, coupling: Coupling, input_rule: InputRule, return_state: bool) -> Any:
        b, c = self.maps(x).unflatten(-1, (2, 2, -1)).unbind(-3)
        delta = F.softplus(self.steps(x)).unflatten(-1, (2, -1))
        a = -torch.exp(self.A_log)
        return ssm2d(x, delta, a, b, c, self.D, coupling=coupling, input_rule=input_rule, return_state=return_state)


class SSM2D(nn.Module):
    """The selective two-dimensional layer, ``(B, V, T, D) -> (B, V, T, D)``; causal in time.

    Args:
        d_model: Width D.
        d_state: States N a feature.
        bidirectional: Add a second scan, with its own parameters, over the variates in reverse.
        dt_range: Range of the initial steps, log-uniform.
        coupling: See :func:`dynakern.ops.ssm2d`.
        input_rule: See :func:`dynakern.ops.ssm2d`.

    Raises:
        ValueError: A size, range or name is wrong.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        *,
        bidirectional: bool = True,
        dt_range: tuple[float, float] = (1e-3, 1e-1),
        coupling: Coupling = "half",
        input_rule: InputRule = "zoh",
    ) -> None:
        super().__init__()
        check_positive("d_model", d_model, integer=True)
        check_positive("d_state", d_state, integer=True)
        check_choice("coupling", coupling, ("half", "raw", "none"))
        check_choice("input_rule", input_rule, ("zoh", "euler"))
        if not 0 < dt_range[0] <= dt_range[1]:
            raise ValueError(f"`dt_range` must be positive and increasing, got {dt_range}.")
        self.d_model, self.coupling, self.input_rule = d_model, coupling, input_rule
        self.forward_scan = _Direction(d_model, d_state, dt_range, skip=True)
        self.backward_scan = _Direction(d_model, d_state, dt_range, skip=False) if bidirectional else None

    def forward(self, x: Tensor, *, return_state: bool = False) -> Any:
        """Run the layer.

        Args:
            x: ``(B, V, T, D)``.
            return_state: Return the states of the forward scan too.

        Returns:
            ``(B, V, T, D)``, or ``(y, (h1, h2))`` with states ``(B, V, T, D, N)``.

        Raises:
            ValueError: The shape does not fit, or V or T is 0.
        """
        dims = check_shape("x", x, f"B V T {self.d_model}")
        if min(dims["V"], dims["T"]) == 0:
            raise ValueError(f"`x` must not be empty, got shape {tuple(x.shape)}.")
        found = self.forward_scan(x, self.coupling, self.input_rule, return_state)
        y, states = (found[0], found[1:]) if return_state else (found, None)
        if self.backward_scan is not None:
            y = y + self.backward_scan(x.flip(1), self.coupling, self.input_rule, False).flip(1)
        return (y, states) if return_state else y


class _Block(nn.Module):
    """Residual block: norm, map, causal convolution, trend and season, gate, map back."""

    def __init__(self, d_model: int, d_state: int, *, expand: int, conv: int, **scan: Any) -> None:
        super().__init__()
        width = expand * d_model
        self.norm = nn.LayerNorm(d_model)
        self.in_proj = nn.Linear(d_model, width)
        self.conv = nn.Conv1d(width, width, conv, groups=width, padding=conv - 1)
        self.trend = SSM2D(width, d_state, dt_range=(1e-3, 1e-2), **scan)
        self.season = SSM2D(width, d_state, dt_range=(1e-2, 0.5), **scan)
        self.gate = nn.Linear(d_model, width)
        self.out_proj = nn.Linear(width, d_model)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        u = self.in_proj(z)  # (B, V, T, E)
        u = F.silu(self._convolve(u))
        y = self.trend(u) + self.season(u)
        return x + self.out_proj(y * F.silu(self.gate(z)))

    def _convolve(self, u: Tensor) -> Tensor:
        """Convolve along time as an image of height 1 whose channels lie side by side, so that nothing is turned."""
        image = u.flatten(0, 1).transpose(1, 2).unsqueeze(2)  # (B V, E, 1, T)
        options = {"padding": (0, self.conv.kernel_size[0] - 1), "groups": u.shape[3]}
        image = F.conv2d(image, self.conv.weight.unsqueeze(2), self.conv.bias, **options)
        return image[..., : u.shape[2]].squeeze(2).transpose(1, 2).unflatten(0, u.shape[:2])


class ClosedLoop(nn.Module):
    r"""Companion state space that forecasts by feeding its own prediction of the next input back.

    A is a companion matrix: ones below the diagonal, a free last column a. In the window
    :math:`h_n = \sum_i A^{n-1-i} B u_i`; beyond it :math:`y_{n+k} = C (A + B K)^k h_n` and
    :math:`u_{n+k} = K (A + B K)^k h_n`. With a = 0, B the first unit vector and C = K = φ it is an AR(N) process.

    Args:
        d_model: Features D, each with a system of its own.
        d_state: States N.
        normalise: Divide a, b, c and k by their L1 norms.
        official: As the authors of SpaceTime do it with ``normalise``: the history is summed with the raw b, and the
            raw k reads the next inputs.

    Source: Zhang et al., 2023, arXiv:2302.09489, section 3.
    """

    def __init__(self, d_model: int, d_state: int = 16, *, normalise: bool = True, official: bool = False) -> None:
        super().__init__()
        self.normalise, self.official = normalise, official
        for name in "abck":
            self.register_parameter(name, nn.Parameter(torch.randn(d_model, d_state) / math.sqrt(d_state)))

    def _vectors(self) -> list[Tensor]:
        raw: list[Tensor] = [self.get_parameter(name) for name in "abck"]
        if not self.normalise:
            return raw
        return [v / v.abs().sum(-1, keepdim=True).clamp_min(1e-12) for v in raw]

    def companion(self) -> Tensor:
        """Return A, ``(D, N, N)``."""
        a = self._vectors()[0]
        shift = torch.diag(a.new_ones(a.shape[1] - 1), -1).expand(len(a), -1, -1)
        return torch.cat([shift[..., :-1], a.unsqueeze(-1)], -1)

    def _response(self, matrix: Tensor, start: Tensor, length: int) -> Tensor:
        """Return ``matrix^j start`` for j = 0 .. length - 1: ``(..., D, length, N)`` from ``start (..., D, N)``."""
        states = [start]
        for _ in range(length - 1):
            states.append(torch.einsum("dij,...dj->...di", matrix, states[-1]))
        return torch.stack(states, -2)

    def open_loop(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and predicted next inputs inside the window, each ``(B, L, D)``, of ``u`` ``(B, L, D)``."""
        from dynakern.ops import fft_conv

        _, b, c, k = self._vectors()
        states = self._response(self.companion(), b, u.shape[1])  # (D, L, N)
        kernels = torch.stack([(states * v.unsqueeze(1)).sum(-1) for v in (c, k)])  # (2, D, L)
        y = fft_conv(u.transpose(1, 2), kernels)  # (B, 2, D, L)
        return y[:, 0].transpose(1, 2), y[:, 1].transpose(1, 2)

    def forward(self, u: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
        """Forecast beyond a window.

        Args:
            u: ``(B, L, D)``.
            horizon: Steps H.

        Returns:
            Outputs and fed-back inputs, each ``(B, H, D)``; the first step is the one after the window.
        """
        check_positive("horizon", horizon, integer=True)
        _, b, c, k = self._vectors()
        a = self.companion()
        start, read = (self.get_parameter("b"), self.get_parameter("k")) if self.official else (b, k)
        history = self._response(a, start, u.shape[1]).flip(-2)  # A^{n-1-i} b for i = 0 .. n - 1
        state = torch.einsum("bld,dln->bdn", u, history)
        states = self._response(a + torch.einsum("di,dj->dij", b, k), state, horizon)  # (B, D, H, N)
        y, following = ((states * v.unsqueeze(1)).sum(-1).transpose(1, 2) for v in (c, read))
        return y, following


class Chimera(nn.Module):
    """Chimera for one task: normalise, embed every cell, blocks, decode.

    Args:
        task: ``"forecast"``, ``"reconstruct"`` (for anomaly detection) or ``"classify"``.
        channels: Variates V.
        lookback: Steps seen, T.
        horizon: Steps to forecast; 0 for other tasks.
        classes: Number of classes, for ``"classify"``.
        d_model: Width D of a cell.
        d_state: States N.
        num_layers: Number of blocks.
        expand: Width inside a block over ``d_model``.
        conv: Width of the causal convolution.
        decoder: ``"linear"``: a linear map over time; ``"closed-loop"``: :class:`ClosedLoop`.
        bidirectional: See :class:`SSM2D`.
        coupling: See :func:`dynakern.ops.ssm2d`.

    Raises:
        ValueError: A name or size is wrong.
    """

    head_keys = ("head.",)

    def __init__(
        self,
        task: Literal["forecast", "reconstruct", "classify"] = "forecast",
        *,
        channels: int = 7,
        lookback: int = 96,
        horizon: int = 0,
        classes: int = 2,
        d_model: int = 64,
        d_state: int = 16,
        num_layers: int = 2,
        expand: int = 2,
        conv: int = 4,
        decoder: Literal["linear", "closed-loop"] = "linear",
        bidirectional: bool = True,
        coupling: Coupling = "half",
    ) -> None:
        super().__init__()
        check_choice("task", task, ("forecast", "reconstruct", "classify"))
        check_choice("decoder", decoder, ("linear", "closed-loop"))
        if (horizon > 0) != (task == "forecast"):
            raise ValueError(f"`horizon` must be positive to forecast and 0 otherwise, got {horizon} for {task!r}.")
        for name, value in (("channels", channels), ("lookback", lookback), ("num_layers", num_layers)):
            check_positive(name, value, integer=True)
        self.task, self.channels, self.lookback, self.horizon = task, channels, lookback, horizon
        self.embed = nn.Linear(1, d_model)
        options = {"expand": expand, "conv": conv, "bidirectional": bidirectional, "coupling": coupling}
        self.blocks = nn.ModuleList(_Block(d_model, d_state, **options) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        # a classifier reads the mean over time of every variate, which may mean different things
        self.head = nn.Linear(channels * d_model, classes) if task == "classify" else nn.Linear(d_model, 1)
        self.extend = nn.Linear(lookback, horizon) if task == "forecast" and decoder == "linear" else None
        self.loop = ClosedLoop(d_model, d_state) if task == "forecast" and decoder == "closed-loop" else None

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: ``(B, lookback, V)``; to classify, any length.
            lengths: To classify: number of valid steps of each series, ``(B,)``.

        Returns:
            Forecast ``(B, horizon, V)``, reconstruction ``(B, lookback, V)``, or logits ``(B, classes)``.

        Raises:
            ValueError: The shape does not fit.
        """
        if self.task == "classify":
            check_shape("x", x, f"B L {self.channels}")
            return self._classify(x, lengths)
        check_shape("x", x, f"B {self.lookback} {self.channels}")
        mean = x.mean(1, keepdim=True)
        scale = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
        h = self._features((x - mean) / scale)  # (B, V, T, D)
        if self.loop is not None:
            rows, _ = self.loop(h.flatten(0, 1), self.horizon)
            y = self.head(rows).reshape(len(x), self.channels, self.horizon)
        else:
            y = self.head(h).squeeze(-1)  # (B, V, T)
            y = y if self.extend is None else self.extend(y)
        return y.transpose(1, 2) * scale + mean

    def _features(self, x: Tensor) -> Tensor:
        h = self.embed(x.transpose(1, 2).unsqueeze(-1))  # (B, V, T, D)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def _classify(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        h = self._features(x)  # (B, V, T, D)
        if lengths is None:
            return self.head(h.mean(2).flatten(1))
        valid = (torch.arange(h.shape[2], device=h.device) < lengths[:, None])[:, None, :, None]
        return self.head(((h * valid).sum(2) / lengths.clamp_min(1)[:, None, None]).flatten(1))


def chimera(**overrides: Any) -> Chimera:
    """Chimera to forecast 96 steps of 7 variates from 96: width 64, 16 states, 2 blocks."""
    task = overrides.get("task", "forecast")
    return Chimera(**{"horizon": 96 if task == "forecast" else 0, **overrides})


_SMALL: dict[str, Any] = {"d_model": 8, "d_state": 4, "num_layers": 1}


class _ForecastOnly(nn.Module):
    """Take and ignore time marks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        return self.network(x)


def forecaster(*, channels: int, context: int, horizon: int, time_features: int) -> nn.Module:
    """Build the competitor of ``dynakern compare forecast``: width 8, 4 states, 1 block; marks are not used.

    The module maps ``x (B, context, C)`` to ``(B, horizon, C)``.
    """
    return _ForecastOnly(Chimera(channels=channels, lookback=context, horizon=horizon, **_SMALL))


def detector(*, channels: int, length: int) -> Chimera:
    """Build a small detector: reconstruction ``(B, L, C) -> (B, L, C)``."""
    return Chimera("reconstruct", channels=channels, lookback=length, **_SMALL)


def series_classifier(*, channels: int, length: int, classes: int) -> Chimera:
    """Build a small classifier, ``x (B, L, C)`` and ``lengths (B,) | None`` to logits ``(B, classes)``."""
    return Chimera("classify", channels=channels, lookback=length, classes=classes, **{**_SMALL, "d_model": 16})
