r"""SS2D: the selective scan over images, along four directions at once.

A scan is causal and an image is not. SS2D unrolls the image by rows and by columns, forwards and backwards, scans the
four sequences with parameters of their own and adds the results up where they came from, so that every pixel sees every
other in O(H W) (Liu et al., VMamba, 2024, arXiv:2401.10166, section 4). State-dict keys are those of
``MzeroMiko/VMamba``. Implemented: its forward types v0 to v05, v2 and v3 (one result, different kernels there), the
ablations v051d and v052d, and the suffixes of :class:`SS2D`. Not implemented: the types whose scans depend on each
other (``cascade2d``), rotate the image, or start with ``xv`` or ``m0``.

Example:
    >>> import torch
    >>> layer = SS2D(d_model=16, d_state=1, forward_type="v05_noz", channel_first=True)
    >>> layer(torch.randn(2, 16, 6, 4)).shape
    torch.Size([2, 16, 6, 4])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynakern.checks import check_choice, check_positive, check_shape
from dynakern.layers.mamba import init_step_bias, init_step_weight
from dynakern.ops.dispatch import Backend
from dynakern.ops.selective_scan import selective_scan

__all__ = ["SS2D", "Scans", "convert_state_dict", "cross_merge", "cross_scan"]

Scans = Literal["cross2d", "unidi", "bidi"]

_FORWARD_TYPES: dict[str, Scans] = {
    **dict.fromkeys(("v0", "v0seq", "v01", "v02", "v03", "v04", "v05", "v2", "v3"), "cross2d"),
    "v051d": "unidi",
    "v052d": "bidi",
}
_NORMS = ("onnone", "onsoftmax", "onsigmoid", "ondwconv3", "oncnorm")
_SUFFIXES = ("no32", "noz", "nozact", "oact", *_NORMS)


def cross_scan(x: Tensor, scans: Scans = "cross2d") -> Tensor:
    """Unroll an image into four sequences.

    Args:
        x: ``(B, D, H, W)``.
        scans: ``"cross2d"``: by rows, by columns, and both reversed; ``"bidi"``: by rows twice, and both reversed;
            ``"unidi"``: by rows four times.

    Returns:
        ``(B, 4, D, H * W)``.
    """
    check_choice("scans", scans, ("cross2d", "unidi", "bidi"))
    rows = x.flatten(2)
    if scans == "unidi":
        return torch.stack([rows] * 4, dim=1)
    other = x.transpose(2, 3).flatten(2) if scans == "cross2d" else rows
    forward = torch.stack([rows, other], dim=1)
    return torch.cat([forward, forward.flip(-1)], dim=1)


def cross_merge(ys: Tensor, height: int, width: int, scans: Scans = "cross2d") -> Tensor:
    """Add four sequences up where :func:`cross_scan` took them from; its transpose as a linear map.

    Args:
        ys: ``(B, 4, D, H * W)``.
        height: H.
        width: W.
        scans: As for :func:`cross_scan`.

    Returns:
        ``(B, D, H, W)``.
    """
    check_choice("scans", scans, ("cross2d", "unidi", "bidi"))
    if scans == "unidi":
        return ys.sum(1).unflatten(-1, (height, width))
    rows, other = (ys[:, :2] + ys[:, 2:].flip(-1)).unbind(1)  # (B, D, H W) each
    rows = rows.unflatten(-1, (height, width))
    if scans == "bidi":
        return rows + other.unflatten(-1, (height, width))
    return rows + other.unflatten(-1, (width, height)).transpose(2, 3)


class _Linear2d(nn.Linear):
    """A linear map of the channels of ``(B, C, H, W)``, with the weight of ``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight[:, :, None, None], self.bias)


class _LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of ``(B, C, H, W)``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _SpatialSoftmax(nn.Module):
    """Softmax over the pixels, channel by channel."""

    def __init__(self, channel_first: bool) -> None:
        super().__init__()
        self.channel_first = channel_first

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_first:
            return x.flatten(2).softmax(-1).unflatten(-1, x.shape[2:])
        return x.flatten(1, 2).softmax(1).unflatten(1, x.shape[1:3])


class _Permute(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class SS2D(nn.Module):
    r"""Gated block around a selective scan of an image in four directions.

    With K = 4 directions, :math:`x_k` the sequences of :func:`cross_scan`, and the maps of each direction its own,

    .. math::
        \delta_k, B_k, C_k = W_k x_k, \qquad
        y = \operatorname{merge}_k \operatorname{scan}(x_k, \operatorname{softplus}(W^\Delta_k \delta_k + b_k),
        -e^{A_k}, B_k, C_k, D_k),

    after an input projection, a depthwise convolution and a SiLU, and before a norm, the gate and an output projection.

    Args:
        d_model: Channels of the input and output.
        d_state: States N of each inner channel and direction (1 in VMamba's models).
        ssm_ratio: Inner channels as a multiple of ``d_model``.
        dt_rank: Rank R of the step projections; ``"auto"`` is ``ceil(d_model / 16)``.
        act_layer: Makes the activation of the convolution and of the gate.
        d_conv: Side of the depthwise convolution, odd; below 2 there is none.
        conv_bias: Whether it has a bias.
        dropout: Rate of dropout on the output.
        bias: Whether the input and output projections have biases.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        dt_init: How the step projections start: ``"random"`` or ``"constant"``.
        dt_scale: Scale of that start.
        dt_init_floor: Lower bound on the initial steps.
        forward_type: VMamba's name of the variant. ``v0`` and ``v05`` compute the same; ``v051d`` and ``v052d`` scan in
            one and in two directions. Suffixes, in any order: ``_noz`` no gate; ``_nozact`` gate without activation;
            ``_oact`` GELU after the norm; ``_onnone``, ``_onsoftmax``, ``_onsigmoid``, ``_ondwconv3``, ``_oncnorm``
            another norm than the layer norm; ``_no32`` changes nothing here.
        channel_first: Images are ``(B, C, H, W)`` instead of ``(B, H, W, C)``.
        backend: Engine of the scan; see :func:`dynakern.ops.selective_scan`.
        device: Where the parameters live.
        dtype: Of the parameters; ``A_logs`` and ``Ds`` stay float32 if it has 16 bits.

    Raises:
        ValueError: ``forward_type`` is unknown, or is v0 with ``channel_first``, which the authors do not have.

    Source: arXiv:2401.10166, figure 4; ``vmamba.py`` of ``MzeroMiko/VMamba``.
    """

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        act_layer: Callable[[], nn.Module] = nn.SiLU,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        forward_type: str = "v05",
        channel_first: bool = False,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state)):
            check_positive(name, value, integer=True)
        if d_conv > 1 and d_conv % 2 == 0:
            raise ValueError(f"`d_conv` must be odd or below 2, got {d_conv}.")
        scans, suffixes = _parse(forward_type, channel_first)
        self.scans: Scans = scans
        self.d_model, self.d_state, self.channel_first = d_model, d_state, channel_first
        self.d_inner = int(ssm_ratio * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.gated, self.gate_act = "noz" not in suffixes, "nozact" not in suffixes
        self.backend: Backend = backend
        factory = {"device": device, "dtype": dtype}
        linear, d_inner = _Linear2d if channel_first else nn.Linear, self.d_inner
        self.in_proj = linear(d_model, 2 * d_inner if self.gated else d_inner, bias=bias, **factory)
        self.act = act_layer()
        padding = (d_conv - 1) // 2
        self.conv2d = (
            nn.Conv2d(d_inner, d_inner, d_conv, padding=padding, groups=d_inner, bias=conv_bias, **factory)
            if d_conv > 1
            else nn.Identity()
        )
        self._init_scans(dt_min, dt_max, dt_init, dt_scale, dt_init_floor, factory)
        self.out_norm = _out_norm(suffixes, d_inner, channel_first, factory)
        self.out_act = nn.GELU() if "oact" in suffixes else nn.Identity()
        self.out_proj = linear(d_inner, d_model, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)

    def _init_scans(
        self,
        dt_min: float,
        dt_max: float,
        dt_init: Literal["random", "constant"],
        dt_scale: float,
        dt_init_floor: float,
        factory: dict[str, Any],
    ) -> None:
        K, D, N, R = 4, self.d_inner, self.d_state, self.dt_rank
        wide = dict(factory, dtype=torch.float64 if factory["dtype"] == torch.float64 else torch.float32)
        self.x_proj_weight = nn.Parameter(torch.empty(K, R + 2 * N, D, **factory).uniform_(-(D**-0.5), D**-0.5))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, D, R, **factory))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, D, **factory))
        init_step_weight(self.dt_projs_weight, dt_init=dt_init, dt_scale=dt_scale)
        init_step_bias(self.dt_projs_bias, dt_min=dt_min, dt_max=dt_max, dt_init_floor=dt_init_floor)
        self.A_logs = nn.Parameter(torch.arange(1, N + 1, **wide).log().repeat(K * D, 1))
        self.Ds = nn.Parameter(torch.ones(K * D, **wide))
        for parameter in (self.A_logs, self.Ds):  # as in the authors' training
            parameter._optim = {"weight_decay": 0.0}  # pyright: ignore[reportAttributeAccessIssue]

    def extra_repr(self) -> str:
        """Name the sizes and the layout."""
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, dt_rank={self.dt_rank}, scans={self.scans!r}, "
            f"gated={self.gated}, channel_first={self.channel_first}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map an image to an image of the same size.

        Args:
            x: ``(B, H, W, d_model)``, or ``(B, d_model, H, W)`` with ``channel_first``.

        Returns:
            The shape of ``x``.
        """
        check_shape("x", x, f"B {self.d_model} H W" if self.channel_first else f"B H W {self.d_model}")
        x = self.in_proj(x)
        z = None
        if self.gated:
            x, z = x.chunk(2, dim=1 if self.channel_first else -1)
            z = self.act(z) if self.gate_act else z
        if not self.channel_first:
            x = x.permute(0, 3, 1, 2)
        y = self.scan(self.act(self.conv2d(x)))
        if not self.channel_first:
            y = y.permute(0, 2, 3, 1)
        y = self.out_act(self.out_norm(y))
        return self.dropout(self.out_proj(y if z is None else y * z))

    def scan(self, x: Tensor) -> Tensor:
        """Scan the inner channels in all directions: ``(B, d_inner, H, W)`` to the same, no norm, no gate."""
        N, R = self.d_state, self.dt_rank
        xs = cross_scan(x, self.scans)  # (B, K, D, L)
        dts, Bs, Cs = torch.matmul(self.x_proj_weight, xs).split([R, N, N], dim=2)
        ys = selective_scan(
            xs.flatten(1, 2),
            torch.matmul(self.dt_projs_weight, dts).flatten(1, 2),
            -torch.exp(self.A_logs.to(torch.promote_types(self.A_logs.dtype, torch.float32))),
            Bs,
            Cs,
            self.Ds,
            delta_bias=self.dt_projs_bias.flatten(),
            delta_softplus=True,
            backend=self.backend,
        )
        return cross_merge(ys.unflatten(1, (4, -1)), x.shape[2], x.shape[3], self.scans)


def _parse(forward_type: str, channel_first: bool) -> tuple[Scans, set[str]]:
    base, *suffixes = forward_type.split("_")
    check_choice("forward_type", base, tuple(_FORWARD_TYPES))
    for suffix in suffixes:
        check_choice("suffix of forward_type", suffix, _SUFFIXES)
    if sum(suffix in _NORMS for suffix in suffixes) > 1:
        raise ValueError(f"`forward_type` may name one norm at most, got {forward_type!r}.")
    if base in ("v0", "v0seq") and (channel_first or suffixes):
        raise ValueError(f"`forward_type` v0 has neither suffixes nor channel_first; take 'v05', got {forward_type!r}.")
    return _FORWARD_TYPES[base], set(suffixes)


def _out_norm(suffixes: set[str], d_inner: int, channel_first: bool, factory: dict[str, Any]) -> nn.Module:
    norm = _LayerNorm2d(d_inner, **factory) if channel_first else nn.LayerNorm(d_inner, **factory)
    if suffixes.isdisjoint(_NORMS):
        return norm
    if "onnone" in suffixes:
        return nn.Identity()
    if "onsoftmax" in suffixes:
        return _SpatialSoftmax(channel_first)
    if "onsigmoid" in suffixes:
        return nn.Sigmoid()
    conv = nn.Sequential(
        nn.Identity() if channel_first else _Permute(0, 3, 1, 2),
        nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner, bias=False, **factory),
        nn.Identity() if channel_first else _Permute(0, 2, 3, 1),
    )
    return conv if "ondwconv3" in suffixes else nn.Sequential(norm, *conv)


def convert_state_dict(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring projections that were saved as 1 x 1 convolutions to the shape of linear maps."""
    names = ("in_proj.weight", "out_proj.weight")
    return {k: v.flatten(1) if k.endswith(names) and v.ndim == 4 else v for k, v in state.items()}
