"""What every classifier of images must beat: logistic regression on pixels, a ResNet, a ConvNeXt."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np

from dynakern.layers.convnext import ConvNeXt
from dynakern.layers.resnet import ResNet, resnet20
from dynakern.tasks.forecast import FitReport, Progress
from dynakern.train import Budget

__all__ = ["BASELINES", "LogisticPixels"]


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


def _convnext(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> ConvNeXt:
    channels = tuple(max(1, round(c * width)) for c in (32, 64, 128))
    return ConvNeXt(
        (2, 2, 2),
        channels,
        in_chans=in_chans,
        num_classes=num_classes,
        patch_size=2 if img_size <= 64 else 4,
        layer_scale=None,
    )


def _resnet(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> ResNet:
    widths = tuple(max(1, round(c * width)) for c in (16, 32, 64))
    return resnet20(in_chans=in_chans, num_classes=num_classes, widths=widths)


BASELINES: dict[str, Any] = {"logistic": LogisticPixels, "resnet": _resnet, "convnext": _convnext}
