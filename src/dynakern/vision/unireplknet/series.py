r"""Series of many stations as maps: a UniRepLKNet and a decoder that correlates lags in time and across stations.

The decoder is that of Corrformer (Wu et al., 2023, "Interpretable weather forecasting for worldwide stations with a
unified deep model", doi:10.1038/s42256-023-00667-9): a series takes over what follows the lags at which it resembles
another one, and stations are arranged in a tree, on whose every level the one that leads informs those that follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_floating, check_positive, check_shape
from dynakern.vision.unireplknet.network import UniRepLKNet

__all__ = ["StationForecaster", "convert_state_dict"]


def _decompose(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return what remains of ``(B, L, C)`` and its moving average, the ends repeated."""
    half = (width - 1) // 2
    padded = F.pad(x.transpose(1, 2), (half, width - 1 - half), mode="replicate")
    trend = F.avg_pool1d(padded, width, stride=1).transpose(1, 2)
    return x - trend, trend


def _rolled(x: Tensor, lag: Tensor) -> Tensor:
    """Return ``x[..., (l + lag) mod L]`` of ``(..., L)``; ``lag`` broadcasts with the axes before."""
    steps = torch.arange(x.shape[-1], device=x.device)
    index = (steps + lag.unsqueeze(-1)) % x.shape[-1]
    return x.gather(-1, index.expand(x.shape))


def _correlation(q: Tensor, k: Tensor) -> Tensor:
    """Return the circular cross-correlation of ``(..., L)`` by lag."""
    return torch.fft.irfft(torch.fft.rfft(q) * torch.fft.rfft(k).conj(), n=q.shape[-1])


class _Projected(nn.Module):
    """Maps of queries, keys, values and outputs around a correlation; series end as long as the queries."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        for name in ("query", "key", "value", "out"):
            self.add_module(f"{name}_projection", nn.Linear(d_model, d_model))

    def heads(self, x: Tensor, cross: Tensor) -> list[Tensor]:
        """Return queries, keys and values, ``(B, A, K, L)`` each."""
        length, found = x.shape[1], []
        for name, source in (("query", x), ("key", cross), ("value", cross)):
            z = self.get_submodule(f"{name}_projection")(source)[:, :length]
            z = F.pad(z, (0, 0, 0, length - z.shape[1]))
            found.append(z.unflatten(-1, (self.n_heads, -1)).permute(0, 2, 3, 1))
        return found

    def join(self, y: Tensor) -> Tensor:
        """Return the output ``(B, L, D)`` of heads ``(B, A, K, L)``."""
        return self.get_submodule("out_projection")(y.permute(0, 3, 1, 2).flatten(2))


class _AutoCorrelation(_Projected):
    """Sum of a series' values after the ``factor ln L`` best lags, weighted by the softmax of their correlation."""

    def __init__(self, d_model: int, n_heads: int, factor: int) -> None:
        super().__init__(d_model, n_heads)
        self.factor = factor

    def forward(self, x: Tensor, cross: Tensor) -> Tensor:
        q, k, v = self.heads(x, cross)
        best = _correlation(q, k).mean(2).topk(int(self.factor * math.log(q.shape[-1])), dim=-1)  # (B, A, top)
        weights = best.values.softmax(-1)
        y = torch.zeros_like(v)
        for i in range(weights.shape[-1]):
            y = y + weights[..., i, None, None] * _rolled(v, best.indices[..., i, None])
        return self.join(y)


class _NormedConv1d(nn.Module):
    """A convolution whose filters are their directions times a length each."""

    def __init__(self, channels: int, size: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.weight_v = nn.Parameter(0.01 * torch.randn(channels, channels, size))
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(self.weight_v.detach(), dim=(1, 2), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of ``(B, C, N)`` that looks back only."""
        v = self.weight_v
        weight = self.weight_g * v / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True)
        reach = self.dilation * (weight.shape[-1] - 1)
        return F.conv1d(F.pad(x, (reach, 0)), weight, self.bias, dilation=self.dilation)


class _CausalBlock(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _NormedConv1d(channels, 3, dilation), _NormedConv1d(channels, 3, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + F.relu(self.conv2(F.relu(self.conv1(x)))))


class _CausalFusion(nn.Module):
    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.network = nn.Sequential(*(_CausalBlock(channels, 3**i) for i in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class _Inner(nn.Module):
    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.causal_fusion = _CausalFusion(channels, layers)


class _CrossCorrelation(_Projected):
    """Stations aligned at their best lag to the mean one, put in order of that lag, and mixed along it."""

    def __init__(self, d_model: int, n_heads: int, length: int, layers: int) -> None:
        super().__init__(d_model, n_heads)
        self.inner_correlation = _Inner(d_model // n_heads * length, layers)

    def forward(self, x: Tensor, cross: Tensor, nodes: int) -> Tensor:
        """Mix ``(B nodes, L, D)`` within groups of ``nodes``."""
        q, k, v = (z.unflatten(0, (-1, nodes)) for z in self.heads(x, cross))  # (B, N, A, K, L)
        peak, lag = _correlation(q.mean(1, keepdim=True), k).mean(3).max(-1)  # (B, N, A)
        length = v.shape[-1]
        aligned = _rolled(v, (length - lag).unsqueeze(-1)) * torch.sigmoid(peak)[..., None, None]
        order = (length - lag).argsort(dim=1, stable=True)
        rows = order[..., None, None].expand_as(aligned)
        line = aligned.gather(1, rows).transpose(1, 2).flatten(3).flatten(0, 1).transpose(1, 2)  # (B A, K L, N)
        fused = self.inner_correlation.causal_fusion(line).transpose(1, 2)
        fused = fused.unflatten(0, (-1, self.n_heads)).unflatten(-1, (-1, length)).transpose(1, 2)
        back = torch.zeros_like(aligned).scatter(1, rows, fused)
        return self.join(_rolled(back, lag.unsqueeze(-1)).flatten(0, 1))


class _MultiCorrelation(nn.Module):
    """Correlation in time of every station, plus the mean over all levels of the tree of that across stations."""

    def __init__(self, auto: _AutoCorrelation, cross: _CrossCorrelation, node_list: Sequence[int]) -> None:
        super().__init__()
        self.auto_correlation, self.cross_correlation, self.node_list = auto, cross, tuple(node_list)

    def forward(self, x: Tensor, cross: Tensor) -> Tensor:
        levels = []
        for i, nodes in enumerate(self.node_list):
            below = math.prod(self.node_list[i + 1 :])
            pooled = (z.unflatten(0, (-1, below)).mean(1) for z in (x, cross))
            levels.append(self.cross_correlation(*pooled, nodes).repeat_interleave(below, 0))
        return self.auto_correlation(x, cross) + torch.stack(levels).mean(0)


class _Circular(nn.Conv1d):
    """A convolution of three steps around a circle, without bias, ``(B, L, C) -> (B, L, out)``."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1, padding_mode="circular", bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class _DecoderLayer(nn.Module):
    def __init__(self, own: _MultiCorrelation, other: _MultiCorrelation, d_model: int, c_out: int, width: int) -> None:
        super().__init__()
        self.multi_correlation, self.cross_multi_correlation, self.width = own, other, width
        self.conv1 = nn.Conv1d(d_model, 4 * d_model, 1, bias=False)
        self.conv2 = nn.Conv1d(4 * d_model, d_model, 1, bias=False)
        self.projection = _Circular(d_model, c_out)

    def forward(self, x: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        x, first = _decompose(x + self.multi_correlation(x, x), self.width)
        x, second = _decompose(x + self.cross_multi_correlation(x, cross), self.width)
        y = self.conv2(F.gelu(self.conv1(x.transpose(1, 2)))).transpose(1, 2)
        x, third = _decompose(x + y, self.width)
        return x, self.projection(first + second + third)


class _SeasonalNorm(nn.Module):
    """A layer norm without its mean over time."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layernorm(x)
        return y - y.mean(1, keepdim=True)


class _Decoder(nn.Module):
    def __init__(self, layers: Sequence[nn.Module], d_model: int, c_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm, self.projection = _SeasonalNorm(d_model), nn.Linear(d_model, c_out)

    def forward(self, x: Tensor, cross: Tensor, trend: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x, more = layer(x, cross)
            trend = trend + more
        return self.projection(self.norm(x)), trend


class _Embedding(nn.Module):
    """Values of three steps, calendar features, and the place of a group of stations, added up."""

    def __init__(self, enc_in: int, d_model: int, time_features: int) -> None:
        super().__init__()
        self.value_embedding, self.temporal_embedding, self.national_embedding = nn.Module(), nn.Module(), nn.Module()
        self.value_embedding.tokenConv = _Circular(enc_in, d_model)
        self.temporal_embedding.embed = nn.Linear(time_features, d_model, bias=False)
        self.national_embedding.location_embedding = nn.Linear(3 * enc_in, d_model)

    def forward(self, x: Tensor, marks: Tensor, places: Tensor) -> Tensor:
        """Embed ``(B N, L, E)`` with marks ``(B, L, F)`` and places ``(N, 3 E)``."""
        groups, values, times = len(places), self.value_embedding.tokenConv, self.temporal_embedding.embed
        placed = self.national_embedding.location_embedding(places)  # pyright: ignore[reportCallIssue]
        found = values(x) + times(marks).repeat_interleave(groups, 0)  # pyright: ignore[reportCallIssue]
        return found + placed.repeat(len(marks), 1).unsqueeze(1)


class StationForecaster(nn.Module):
    r"""Forecast many stations: series as maps, a UniRepLKNet, and a decoder that correlates lags.

    The M = N E stations are N groups of E neighbours; the groups are the leaves of a tree.

    Args:
        node_list: Branches of the tree from its root to the leaves; their product is N.
        enc_in: Stations E of a group.
        seq_len: Steps seen, L.
        label_len: Of these, the last that the decoder starts from.
        pred_len: Steps forecast, H.
        d_model: Width d, a multiple of ``n_heads``.
        n_heads: Heads of the correlations.
        map_hw: Height and width of a map, with height times width = L d.
        depths: Blocks of the encoder's stages.
        dims: Channels of the encoder's stages; the last is d.
        kernel_sizes: Of the encoder; see :class:`~dynakern.vision.UniRepLKNet`.
        moving_avg: Steps of the moving average.
        factor: Lags per ln L that a correlation in time keeps.
        dec_layers: Layers of the decoder.
        dec_tcn_layers: Convolutional blocks along the order of stations.
        time_features: Calendar features of a step.

    Raises:
        ValueError: A size does not fit.

    Source: the time-series part of arXiv:2311.15599. The encoder's maps are normed, which the authors' scripts leave
    open. The published size has d = 768, L = 48, H = 24 and maps of 192 x 192.
    """

    def __init__(
        self,
        node_list: Sequence[int],
        enc_in: int,
        *,
        seq_len: int = 48,
        label_len: int = 24,
        pred_len: int = 24,
        d_model: int = 768,
        n_heads: int = 16,
        map_hw: tuple[int, int] = (192, 192),
        depths: Sequence[int] = (3, 3, 27, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        moving_avg: int = 25,
        factor: int = 1,
        dec_layers: int = 1,
        dec_tcn_layers: int = 1,
        time_features: int = 4,
    ) -> None:
        super().__init__()
        for name, value in (("enc_in", enc_in), ("seq_len", seq_len), ("pred_len", pred_len), ("n_heads", n_heads)):
            check_positive(name, value, integer=True)
        if d_model % n_heads or dims[-1] != d_model:
            got = f"{d_model}, {n_heads}, {dims[-1]}"
            raise ValueError(f"`d_model` must be a multiple of `n_heads` and the last of `dims`, got {got}.")
        if map_hw[0] * map_hw[1] != seq_len * d_model:
            raise ValueError(f"`map_hw` {tuple(map_hw)} must hold seq_len d_model = {seq_len * d_model} numbers.")
        if not 0 <= label_len <= seq_len or label_len + pred_len < 3:
            raise ValueError(f"`label_len` must be 0 to {seq_len} and leave 3 steps to decode, got {label_len}.")
        self.groups, self.enc_in, self.map_hw = math.prod(node_list), enc_in, tuple(map_hw)
        self.seq_len, self.label_len, self.pred_len, self.moving_avg = seq_len, label_len, pred_len, moving_avg
        self.affine_weight = nn.Parameter(torch.ones(1, 1, enc_in))
        self.affine_bias = nn.Parameter(torch.zeros(1, 1, enc_in))
        self.enc_embedding = _Embedding(enc_in, d_model, time_features)
        self.dec_embedding = _Embedding(enc_in, d_model, time_features)
        self.encoder = UniRepLKNet(depths, dims, kernel_sizes=kernel_sizes, in_chans=1, features_only=True)

        def correlation() -> _MultiCorrelation:
            auto = _AutoCorrelation(d_model, n_heads, factor)
            cross = _CrossCorrelation(d_model, n_heads, label_len + pred_len, dec_tcn_layers)
            return _MultiCorrelation(auto, cross, node_list)

        layers = [_DecoderLayer(correlation(), correlation(), d_model, enc_in, moving_avg) for _ in range(dec_layers)]
        self.decoder = _Decoder(layers, d_model, enc_in)

    def parts(self, x: Tensor, x_mark: Tensor, y_mark: Tensor, stations: Tensor) -> dict[str, Tensor]:
        """Return every step of the way to the forecast by name; arguments as for :meth:`forward`."""
        z, mean, scale = self.normalise(x)
        seasonal, trend = _decompose(z, self.moving_avg)
        places = (stations - stations.mean(0)) / stations.std(0, unbiased=False)
        places = places.reshape(self.groups, -1)  # (N, 3 E)
        embedded = self.enc_embedding(z, x_mark, places)
        image = embedded.reshape(len(z), 1, *self.map_hw)
        feature = self.encoder(image)[-1]  # (B N, d, h, w)
        cross = feature.reshape(len(z), -1, feature.shape[1])  # the memory of (d, h, w) read as (h w, d)
        start = F.pad(seasonal[:, seasonal.shape[1] - self.label_len :], (0, 0, 0, self.pred_len))
        level = z.mean(1, keepdim=True).expand(-1, self.pred_len, -1)
        trend_start = torch.cat([trend[:, trend.shape[1] - self.label_len :], level], 1)
        decoded = self.dec_embedding(start, y_mark, places)
        seasonal_part, trend_part = self.decoder(decoded, cross, trend_start)
        y = ((seasonal_part + trend_part)[:, -self.pred_len :] - self.affine_bias) / (self.affine_weight + 1e-10)
        return {
            "seasonal": self._joined(seasonal),
            "trend": self._joined(trend),
            "enc_embedding": embedded,
            "map": image,
            "encoder_feature": feature,
            "cross": cross,
            "dec_embedding": decoded,
            "seasonal_part": seasonal_part,
            "trend_part": trend_part,
            "forecast": self._joined(y * scale + mean),
        }

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the groups' standardised series ``(B N, L, E)``, their means and their scales."""
        groups = x.unflatten(-1, (self.groups, self.enc_in)).transpose(1, 2).flatten(0, 1)
        mean = groups.mean(1, keepdim=True).detach()
        scale = torch.sqrt(groups.var(1, keepdim=True, unbiased=False) + 1e-5).detach()
        return (groups - mean) / scale * self.affine_weight + self.affine_bias, mean, scale

    def _joined(self, x: Tensor) -> Tensor:
        """Return ``(B, L, M)`` of ``(B N, L, E)``."""
        return x.unflatten(0, (-1, self.groups)).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, x_mark: Tensor, y_mark: Tensor, stations: Tensor) -> Tensor:
        """Forecast.

        Args:
            x: Series, ``(B, seq_len, M)``.
            x_mark: Calendar features of these steps, ``(B, seq_len, F)``.
            y_mark: Of the last ``label_len`` of these and those to forecast, ``(B, label_len + pred_len, F)``.
            stations: Longitude, latitude and altitude of each, ``(M, 3)``.

        Returns:
            ``(B, pred_len, M)``, in the units of ``x``.

        Raises:
            ValueError: A shape does not fit.
        """
        check_floating("x", x)
        count = self.groups * self.enc_in
        dims = check_shape("x", x, f"B {self.seq_len} {count}")
        dims = check_shape("x_mark", x_mark, f"B {self.seq_len} F", dims)
        check_shape("y_mark", y_mark, f"B {self.label_len + self.pred_len} F", dims)
        check_shape("stations", stations, f"{count} 3")
        return self.parts(x, x_mark, y_mark, stations)["forecast"]


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Drop the second names that the authors' causal convolutions have for their weights."""
    return {key: value for key, value in state.items() if ".causal_fusion.network." not in key or ".net." not in key}
