"""Turn any layer over sequences into a forecaster or a classifier of multivariate series."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SeriesClassification", "SeriesForecast"]


class SeriesForecast(nn.Module):
    r"""Forecast a window by a sequence layer between two linear maps.

    Each window is normalised by its own mean and standard deviation, :math:`\tilde x = (x - \mu) / \sigma`; the
    variates are embedded, time marks added, the body mixes over time, a linear map takes ``context`` steps to
    ``horizon`` steps, and the result is mapped back to the variates and to the window's scale.

    Args:
        body: Module ``(B, L, d_model) -> (B, L, d_model)``.
        channels: Number of variates C.
        context: Steps seen.
        horizon: Steps forecast.
        d_model: Width of ``body``.
        time_features: Number F of calendar features of a step; 0 for none.
    """

    def __init__(
        self, body: nn.Module, *, channels: int, context: int, horizon: int, d_model: int, time_features: int = 0
    ) -> None:
        super().__init__()
        self.context = context
        self.encoder = nn.Linear(channels, d_model)
        self.marks = nn.Linear(time_features, d_model, bias=False) if time_features else None
        self.body = body
        self.extend = nn.Linear(context, horizon)
        self.decoder = nn.Linear(d_model, channels)

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Return the forecast.

        Args:
            x: Windows, ``(B, context, C)``.
            marks: Calendar features of the window and the horizon, ``(B, context + horizon, F)``; only those of the
                window are used.

        Returns:
            ``(B, horizon, C)``.
        """
        mean = x.mean(1, keepdim=True)
        scale = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5)
        h = self.encoder((x - mean) / scale)
        if self.marks is not None and marks is not None:
            h = h + self.marks(marks[:, : self.context])
        h = self.body(h)
        h = self.extend(h.transpose(1, 2)).transpose(1, 2)  # (B, horizon, d_model)
        return self.decoder(h) * scale + mean


class SeriesClassification(nn.Module):
    """Classify a series by a sequence layer, a mean over the valid steps and a linear map.

    Args:
        body: Module ``(B, L, d_model) -> (B, L, d_model)``.
        channels: Number of variates C.
        classes: Number of classes.
        d_model: Width of ``body``.
    """

    def __init__(self, body: nn.Module, *, channels: int, classes: int, d_model: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(channels, d_model)
        self.body = body
        self.decoder = nn.Linear(d_model, classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the logits.

        Args:
            x: Series, ``(B, L, C)``, padded at the end.
            lengths: Number of valid steps of each series, ``(B,)``; all by default.

        Returns:
            ``(B, classes)``.
        """
        if lengths is None:
            return self.decoder(self.body(self.encoder(x)).mean(1))
        valid = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).unsqueeze(-1)  # (B, L, 1)
        h = self.body(self.encoder(x) * valid)
        return self.decoder((h * valid).sum(1) / lengths.clamp_min(1)[:, None])
