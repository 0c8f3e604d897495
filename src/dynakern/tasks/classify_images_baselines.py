"""What every classifier of images must beat: logistic regression on pixels, a ResNet, a ConvNeXt."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.layers.resnet import ResNet, resnet20
from dynakern.layers.vision import LayerNorm2d, init_truncated_normal
from dynakern.tasks.forecast import FitReport, Progress
from dynakern.train import Budget

__all__ = ["BASELINES", "ConvNeXt", "LogisticPixels"]


class LogisticPixels:
    """Logistic regression on standardised pixels."""

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        *,
        seed: int,
        budget: Budget,
        device: str | None,
        progress: Progress | None,
    ) -> FitReport:
        """Fit on images ``(N, C, H, W)``, to convergence or 200 steps of the solver; the budget does not count."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        began = time.perf_counter()
        self.model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a baseline that stops early is one
            self.model.fit(X.reshape(len(X), -1), y)
        return FitReport(time.perf_counter() - began)

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return class probabilities, ``(N, classes)``."""
        return self.model.predict_proba(X.reshape(len(X), -1))


class _Block(nn.Module):
    """Depthwise 7 x 7, norm, two linear maps of each pixel, layer scale, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + self.pwconv2(F.gelu(self.pwconv1(y))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A ConvNeXt of three stages for small images, without layer scale.

    Args:
        in_chans: Channels of the images.
        num_classes: Number of classes.
        channels: Channels of the three stages.
        depths: Blocks of the three stages.
        patch: Side of the first patches.

    Source: Liu et al., 2022, "A ConvNet for the 2020s", arXiv:2201.03545.
    """

    def __init__(
        self,
        *,
        in_chans: int,
        num_classes: int,
        channels: tuple[int, ...] = (32, 64, 128),
        depths: tuple[int, ...] = (2, 2, 2),
        patch: int = 2,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_chans, channels[0], patch, stride=patch), LayerNorm2d(channels[0])]
        for stage, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            if stage:
                layers += [LayerNorm2d(channels[stage - 1]), nn.Conv2d(channels[stage - 1], width, 2, stride=2)]
            layers += [_Block(width) for _ in range(depth)]
        self.stages = nn.Sequential(*layers).apply(init_truncated_normal)
        self.norm, self.head = nn.LayerNorm(channels[-1], eps=1e-6), nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, S, S)`` to logits ``(B, num_classes)``."""
        return self.head(self.norm(self.stages(x).mean((2, 3))))


def _convnext(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> ConvNeXt:
    channels = tuple(max(1, round(c * width)) for c in (32, 64, 128))
    return ConvNeXt(in_chans=in_chans, num_classes=num_classes, channels=channels, patch=2 if img_size <= 64 else 4)


def _resnet(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> ResNet:
    widths = tuple(max(1, round(c * width)) for c in (16, 32, 64))
    return resnet20(in_chans=in_chans, num_classes=num_classes, widths=widths)


BASELINES: dict[str, Any] = {"logistic": LogisticPixels, "resnet": _resnet, "convnext": _convnext}
