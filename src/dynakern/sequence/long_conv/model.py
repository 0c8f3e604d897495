"""The classifier backbone of long convolutions, its named variants, and the competitors of ``dynakern compare``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynakern.checks import check_choice, check_positive
from dynakern.layers.series import SeriesClassification, SeriesForecast
from dynakern.sequence.long_conv.layer import LongConv, convert_state_dict

__all__ = ["LongConvModel", "convert_state_dict"]


class LongConvModel(nn.Module):
    """Backbone: encoder, long convolutions with residuals and norms, mean over steps, decoder.

    Args:
        d_input: Width of the input; with ``vocab_size`` the input is token numbers instead.
        num_classes: Width of the output.
        d_model: Width of the layers.
        num_layers: Number of layers.
        l_max: Longest kernel.
        dropout: Rate of dropout, in the layers and on the residual branches.
        prenorm: Normalise before a layer instead of after its residual.
        norm: ``"layer"`` or ``"batch"``.
        vocab_size: Number of tokens, for token input.
        pool: Average over steps (classification); else an output for every step.
        device: Of the parameters.
        dtype: Of the parameters.
        **layer: Options of :class:`LongConv`.
    """

    head_keys = ("decoder.",)

    def __init__(
        self,
        *,
        d_input: int = 1,
        num_classes: int = 10,
        d_model: int = 512,
        num_layers: int = 6,
        l_max: int = 1024,
        dropout: float = 0.1,
        prenorm: bool = False,
        norm: str = "layer",
        vocab_size: int | None = None,
        pool: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer: Any,
    ) -> None:
        super().__init__()
        check_choice("norm", norm, ("layer", "batch"))
        check_positive("num_layers", num_layers, integer=True)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.prenorm, self.pool = prenorm, pool
        self.encoder = (
            nn.Linear(d_input, d_model, **factory)
            if vocab_size is None
            else nn.Embedding(vocab_size, d_model, **factory)
        )
        self.conv_layers = nn.ModuleList(
            LongConv(d_model, l_max, dropout=dropout, transposed=True, **layer, **factory) for _ in range(num_layers)
        )
        make = nn.LayerNorm if norm == "layer" else nn.BatchNorm1d
        self.norms = nn.ModuleList(make(d_model, **factory) for _ in range(num_layers))
        self.dropout = nn.Dropout1d(dropout)
        self.decoder = nn.Linear(d_model, num_classes, **factory)

    def _normalise(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if isinstance(norm, nn.BatchNorm1d) else norm(x.transpose(1, 2)).transpose(1, 2)

    def forward_features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the features of every step, ``(B, L, d_model)``, of input ``(B, L, d_input)`` or tokens ``(B, L)``."""
        h = self.encoder(x).transpose(1, 2)  # (B, d_model, L)
        for layer, norm in zip(self.conv_layers, self.norms, strict=True):
            z = self._normalise(norm, h) if self.prenorm else h
            h = h + self.dropout(layer(z, lengths))
            h = h if self.prenorm else self._normalise(norm, h)
        return h.transpose(1, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits.

        Args:
            x: ``(B, L, d_input)``, or token numbers ``(B, L)``.
            lengths: Number of valid steps of each sequence, ``(B,)``.

        Returns:
            ``(B, num_classes)``, or ``(B, L, num_classes)`` without pooling.
        """
        h = self.forward_features(x, lengths)
        if not self.pool:
            return self.decoder(h)
        if lengths is None:
            return self.decoder(h.mean(1))
        valid = (torch.arange(h.shape[1], device=h.device) < lengths[:, None]).unsqueeze(-1)
        return self.decoder((h * valid).sum(1) / lengths.clamp_min(1)[:, None])


def long_conv_classifier(**overrides: Any) -> LongConvModel:
    """Long convolutions of the authors' stand-alone file: 6 two-sided layers of width 512, post-norm."""
    return LongConvModel(**{"causal": False, **overrides})


def _long_range_arena(**settings: Any) -> LongConvModel:
    return LongConvModel(**{"d_model": 256, "norm": "batch", "dropout": 0.0, **settings})


def long_conv_lra_listops(**overrides: Any) -> LongConvModel:
    """Long convolutions for ListOps of the Long Range Arena: 8 layers of width 128, post-norm, tokens."""
    settings = {"vocab_size": 18, "d_model": 128, "num_layers": 8, "l_max": 2048, "squash": 0.002, "kernel_lr": 5e-4}
    return _long_range_arena(**{**settings, **overrides})


def long_conv_lra_text(**overrides: Any) -> LongConvModel:
    """Long convolutions for Text of the Long Range Arena: 6 layers of width 256, pre-norm, tokens."""
    settings = {"vocab_size": 135, "num_classes": 2, "l_max": 4096, "prenorm": True, "kernel_lr": 1e-3}
    return _long_range_arena(**{**settings, **overrides})


def long_conv_lra_image(**overrides: Any) -> LongConvModel:
    """Long convolutions for Image of the Long Range Arena (grey CIFAR): 6 layers of width 512, post-norm."""
    return LongConvModel(**overrides)


def long_conv_lra_pathfinder(**overrides: Any) -> LongConvModel:
    """Long convolutions for Pathfinder of the Long Range Arena: 6 bidirectional layers of width 256, pre-norm."""
    settings = {"num_classes": 2, "prenorm": True, "bidirectional": True, "squash": 0.001, "kernel_dropout": 0.3}
    return _long_range_arena(**{**settings, **overrides})


def long_conv_lra_pathx(**overrides: Any) -> LongConvModel:
    """Long convolutions for Path-X of the Long Range Arena: as Pathfinder, with 16,384 taps."""
    return long_conv_lra_pathfinder(**{"l_max": 16384, **overrides})


def long_conv_scifar(**overrides: Any) -> LongConvModel:
    """Long convolutions for sequential CIFAR: 6 layers of width 512, post-norm."""
    return LongConvModel(**{"d_input": 3, "squash": 0.001, **overrides})


class _Stack(nn.Module):
    """Residual post-norm layers ``(B, L, d_model) -> (B, L, d_model)``."""

    def __init__(self, d_model: int, l_max: int, num_layers: int, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LongConv(d_model, l_max, **layer) for _ in range(num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + layer(x))
        return x


def forecast(*, channels: int, context: int, horizon: int, time_features: int) -> SeriesForecast:
    """Build the competitor of ``dynakern compare forecast``: two causal layers of width 32, smoothed kernels.

    The module maps ``x (B, context, C)`` and ``marks (B, context + horizon, F) | None`` to ``(B, horizon, C)``.
    """
    # Smoothing shrinks taps, so they start larger: else the threshold would leave few of them alive.
    kernel: dict[str, Any] = {"smooth": 7, "squash": 0.001, "init": "double_exp", "init_std": 0.05}
    body = _Stack(32, context, 2, channels=1, kernel_dropout=0.0, dropout=0.2, **kernel)
    return SeriesForecast(
        body, channels=channels, context=context, horizon=horizon, d_model=32, time_features=time_features
    )


def classify_series(*, channels: int, length: int, classes: int) -> SeriesClassification:
    """Build a classifier of series: three bidirectional layers of width 64.

    The module maps ``x (B, L, C)`` and ``lengths (B,) | None`` to logits ``(B, classes)``.
    """
    kernel: dict[str, Any] = {"squash": 0.001, "init": "double_exp", "init_std": 0.1, "kernel_dropout": 0.0}
    body = _Stack(64, length, 3, channels=1, bidirectional=True, dropout=0.1, **kernel)
    return SeriesClassification(body, channels=channels, classes=classes, d_model=64)
