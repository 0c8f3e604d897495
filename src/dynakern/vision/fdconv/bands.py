"""Frequency band modulation: a map's bands, weighed pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice

__all__ = ["Activation", "BandModulation"]

Activation = Literal["sigmoid", "tanh", "softmax"]


class _Band(NamedTuple):
    """A low-pass filter of a map: ``U_h (e z - O z S^T) U_w^T``, z being the map in a real Fourier basis.

    ``e`` is the even part of the row mask. A row mask that treats f and -f alike has no odd part, ``O`` and ``S``.
    """

    rows: int
    columns: int
    even: Tensor
    odd: Tensor | None
    turn: Tensor | None


class BandModulation(nn.Module):
    r"""Weigh the frequency bands of a map pixel by pixel.

    With :math:`l_0 = x` and :math:`l_j` the part of x below :math:`0.5 / k_j` cycles a pixel along both axes, the
    output is :math:`\sum_j A_j (l_{j-1} - l_j) + A_{last}\, l_{last}` with gates :math:`A_j` from small convolutions.

    A low-pass filter is a product of a matrix for the rows and one for the columns, of low rank: they are applied as
    such, in a real Fourier basis shared by the bands, which is faster on a CPU than transforms.

    Args:
        channels: C.
        k_list: The :math:`k_j`, ascending, at least 1.
        lowfreq_att: Learn :math:`A_{last}` too, instead of 1.
        act: Of the gates: ``"sigmoid"`` (times 2), ``"tanh"`` (plus 1) or ``"softmax"`` over the groups (times G).
        spatial_group: Number G of groups of channels with a gate of their own; above 64 it means C.
        spatial_kernel: Size of the gates' convolutions.
        mask: ``"cached64"``: which frequencies pass is drawn up for 64 x 64 and looked up at the nearest entry for
            other sizes, as in the official code (f and -f are then treated unlike at some heights); ``"exact"``: by
            the definition. A pair of integers: as ``"cached64"`` for another size.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: An option is unknown, ``k_list`` does not ascend from 1 or more, or G does not divide C.
    """

    def __init__(
        self,
        channels: int,
        *,
        k_list: Sequence[int] = (2, 4, 8),
        lowfreq_att: bool = False,
        act: Activation = "sigmoid",
        spatial_group: int = 1,
        spatial_kernel: int = 3,
        mask: Literal["cached64", "exact"] | tuple[int, int] = "cached64",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("fbm_act", act, ("sigmoid", "tanh", "softmax"))
        if isinstance(mask, str):
            check_choice("mask", mask, ("cached64", "exact"))
        if not k_list or min(k_list) < 1 or list(k_list) != sorted(set(k_list)):
            raise ValueError(f"`k_list` must ascend and start at 1 or above, got {list(k_list)}.")
        groups = channels if spatial_group > 64 else spatial_group
        if groups < 1 or channels % groups:
            raise ValueError(f"`spatial_group` must divide the {channels} channels, got {spatial_group}.")
        self.k_list, self.lowfreq_att, self.act, self.groups = tuple(k_list), lowfreq_att, act, groups
        self.cached_size = {"cached64": (64, 64), "exact": None}[mask] if isinstance(mask, str) else mask
        # As in the official code, float32 decides whether the border frequency itself passes (for k = 2 it does not).
        one = torch.ones((), dtype=torch.float32, device="cpu")
        self.border_passes = tuple(bool(one * (0.5 / k) < 0.5 / k + 1e-8) for k in self.k_list)
        self.freq_weight_conv_list = nn.ModuleList()
        for _ in range(len(self.k_list) + lowfreq_att):
            gate = nn.Conv2d(
                channels, groups, spatial_kernel, padding=spatial_kernel // 2, groups=groups, device=device, dtype=dtype
            )
            nn.init.normal_(gate.weight, std=1e-6)
            nn.init.zeros_(gate.bias)  # pyright: ignore[reportArgumentType]
            self.freq_weight_conv_list.append(gate)
        self._filters: dict[Any, Any] = {}

    def _passes(self, band: int, index: int, size: int) -> bool:
        """Whether frequency ``index / size`` (``index`` signed) passes the filter of the band."""
        twice = 2 * self.k_list[band] * abs(index)
        return twice < size or (twice == size and self.border_passes[band])

    def _mask(self, band: int, height: int, width: int) -> tuple[list[bool], list[bool]]:
        """Return which rows and columns of the half-plane spectrum of a map pass."""
        rows, columns = range(height), range(width // 2 + 1)
        if self.cached_size is not None:
            H, W = self.cached_size
            rows, columns = _nearest(H, height), _nearest(W // 2 + 1, width // 2 + 1)
            height, width = H, W
        signed = [i if 2 * i < height else i - height for i in rows]
        return [self._passes(band, i, height) for i in signed], [self._passes(band, j, width) for j in columns]

    def _build(self, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, list[_Band]]:
        """Return the bases of rows ``(H, r)`` and columns ``(W, c)``, and the filter of each band."""
        bands = []
        for j in range(len(self.k_list)):
            rows, columns = self._mask(j, height, width)
            top = max(f for f in range(height // 2 + 1) if rows[f] or rows[-f])
            e = [(rows[f] + rows[-f]) / 2 for f in range(top + 1)]
            o = [0 if 2 * f == height else (rows[f] - rows[-f]) / 2 for f in range(top + 1)]
            s = [float(f > 0 and 2 * f != width) for f in range(sum(columns))]
            even = like.new_tensor(_spread(e, height)).unsqueeze(-1)
            odd, turn = (_quarter_turn(o, height, like), _quarter_turn(s, width, like)) if any(o) else (None, None)
            bands.append(_Band(len(even), len(_spread(s, width)), even, odd, turn))
        rows_basis = _fourier_basis(height, max(b.rows for b in bands), like)
        return rows_basis, _fourier_basis(width, max(b.columns for b in bands), like), bands

    def _filter(self, x: Tensor) -> tuple[Tensor, Tensor, list[_Band]]:
        if torch.compiler.is_compiling():
            return self._build(x.shape[2], x.shape[3], x)
        key = (x.shape[2], x.shape[3], x.dtype, x.device)
        if key not in self._filters:
            if len(self._filters) >= 8:  # training on many sizes must not fill the memory
                self._filters.clear()
            with torch.inference_mode(False), torch.no_grad():
                self._filters[key] = self._build(x.shape[2], x.shape[3], torch.empty(0, dtype=x.dtype, device=x.device))
        return self._filters[key]

    def low_passes(self, x: Tensor) -> list[Tensor]:
        """Return the low-pass filtered maps :math:`l_1, l_2, ...`, ``(B, C, H, W)`` each, in at least float32."""
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        B, C, H, W = x.shape
        with torch.autocast(x.device.type, enabled=False):
            U, V, bands = self._filter(x)
            z = U.T @ (x.reshape(B * C * H, W) @ V).view(B * C, H, -1)
            lows = []
            for band in bands:
                part = z[:, : band.rows, : band.columns]
                kept = band.even * part
                if band.odd is not None and band.turn is not None:
                    kept = kept - band.odd @ part @ band.turn.T
                y = (U[:, : band.rows] @ kept).reshape(B * C * H, -1) @ V[:, : band.columns].T
                lows.append(y.view(B, C, H, W))
        return lows

    def gates(self, x: Tensor) -> Tensor:
        """Return the gates, ``(B, J, G, H, W)``, of a map ``(B, C, H, W)``; J bands, and one more if learnt."""
        convs: list[Any] = list(self.freq_weight_conv_list)
        J, G = len(convs), self.groups
        # One convolution for all bands; the outputs of a group stand together.
        weight = torch.stack([c.weight for c in convs], 1).flatten(0, 1)
        bias = torch.stack([c.bias for c in convs], 1).flatten()
        z = F.conv2d(x, weight, bias, padding=convs[0].padding, groups=G)
        z = z.unflatten(1, (G, J)).transpose(1, 2)
        if self.act == "softmax":
            return G * z.softmax(2)
        return 2 * torch.sigmoid(z) if self.act == "sigmoid" else 1 + torch.tanh(z)

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """Weigh the bands.

        Args:
            x: Map, ``(B, C, H, W)``.
            features: Map that the gates are read from, of C channels and the size of ``x``, which may then have any
                number of channels that G divides; by default ``x``.

        Returns:
            The shape and dtype of ``x``.
        """
        lows, A, G = self.low_passes(x), self.gates(x if features is None else features), self.groups
        A = A.to(lows[0].dtype)
        x_, *lows = (m.unflatten(1, (G, -1)) for m in (x.to(A.dtype), *lows))  # (B, G, C / G, H, W)
        y = A[:, 0, :, None] * x_
        add = torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_
        for j, low in enumerate(lows):
            last = j + 1 == A.shape[1]
            y = add(y, (1 - A[:, j] if last else A[:, j + 1] - A[:, j])[:, :, None], low)
        return y.flatten(1, 2).to(x.dtype)

    def extra_repr(self) -> str:
        """Say the options."""
        return f"k_list={self.k_list}, lowfreq_att={self.lowfreq_att}, act={self.act!r}, groups={self.groups}"


def _nearest(source: int, size: int) -> list[int]:
    """Return which of ``source`` entries each of ``size`` takes in a nearest resize, whose scale is a float32."""
    scale = _float32(source / size)
    return [min(source - 1, int(_float32(i * scale))) for i in range(size)]


def _float32(value: float) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def _spread(values: Sequence[float], size: int) -> list[float]:
    """Repeat the value of each frequency for its cosine and sine; frequency 0 and size / 2 have a cosine only."""
    return [v for f, v in enumerate(values) for _ in range(1 if f == 0 or 2 * f == size else 2)]


def _quarter_turn(values: Sequence[float], size: int, like: Tensor) -> Tensor:
    """Return the matrix that turns a cosine into ``values[f]`` times its sine, and that into minus the cosine."""
    below = [v if place % 2 else 0.0 for place, v in enumerate(_spread(values, size))][:-1]
    turn = torch.diag_embed(like.new_tensor(below), offset=-1)
    return turn - turn.T


def _fourier_basis(size: int, count: int, like: Tensor) -> Tensor:
    """Return the first ``count`` orthonormal columns 1, cos 1, sin 1, cos 2, ... over ``size`` points."""
    column = torch.arange(count, device=like.device)
    f = (column + 1) // 2
    t = torch.arange(size, device=like.device)
    angle = (2 * math.pi / size) * ((f * t[:, None]) % size).to(torch.float64)
    wave = torch.where(column % 2 == 0, torch.sin(angle), torch.cos(angle))
    wave = torch.where(f == 0, torch.ones_like(wave), wave)
    once = (f == 0) | (2 * f == size)
    return torch.where(once, wave * math.sqrt(1 / size), wave * math.sqrt(2 / size)).to(like.dtype)
