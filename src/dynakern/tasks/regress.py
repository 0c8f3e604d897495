"""Predicting a number from the rows of a table, as a task."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dynakern.tasks.tabular import Factory, TableTask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RegressTask"]

_NORMAL_95 = 1.959963984540054


class RegressTask(TableTask):
    """Predict a number from a row; see :class:`~dynakern.tasks.tabular.TableTask`.

    Targets are standardised with the statistics of the training part; scores are in the units of the table.
    """

    name: ClassVar[str] = "regress"
    headline: ClassVar[str] = "rmse"

    def __post_init__(self) -> None:
        if self.data.target is None or self.data.target.dtype.kind != "f":
            raise ValueError(f"{self.data.source}: a column of numbers to predict is needed.")
        super().__post_init__()
        if self.scale[1] == 0:
            raise ValueError(f"{self.data.source}: the value to predict is constant in the training part.")

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the targets of the training part."""
        assert self.data.target is not None
        train = self.data.target[self.is_train]
        return float(train.mean()), float(train.std())

    def _targets(self, rows: np.ndarray) -> np.ndarray:
        assert self.data.target is not None
        return (self.data.target[rows] - self.scale[0]) / self.scale[1]

    def _baselines(self) -> Mapping[str, Factory]:
        return BASELINES

    def _score(self, estimator: Any, x: np.ndarray, rows: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        y, deviation = self._targets(rows), self.scale[1]
        if hasattr(estimator, "predict_dist"):
            found = estimator.predict_dist(x)
            mean, log_density, (low, high) = found.mean, found.log_prob(y), found.interval(0.95)
        elif "return_std" in signature(estimator.predict).parameters:
            mean, std = estimator.predict(x, return_std=True)
            std = np.maximum(std, 1e-12)
            log_density = -0.5 * ((y - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
            low, high = mean - _NORMAL_95 * std, mean + _NORMAL_95 * std
        else:
            mean, log_density = estimator.predict(x), None
            low = high = np.full(len(x), np.nan)
        mean = np.asarray(mean, dtype=np.float64)
        if not np.isfinite(mean).all():
            raise FloatingPointError("The predictions are not finite.")
        error = (mean - y) * deviation
        metrics = {"rmse": float(np.sqrt(np.mean(error**2))), "mae": float(np.abs(error).mean())}
        if log_density is not None:
            covered = float(((y >= low) & (y <= high)).mean())
            metrics["nll"] = float(-np.mean(log_density) + np.log(deviation))
            metrics["coverage_gap"] = abs(covered - 0.95)
        return metrics, np.stack([mean, low, high]) * deviation + self.scale[0]

    def _draw(self, axes: Axes, name: str, drawn: np.ndarray) -> None:
        _, rows = self.part(test=True)
        y = self._targets(rows) * self.scale[1] + self.scale[0]
        mean, low, high = drawn.reshape(3, -1)
        if np.isfinite(low).all():
            axes.errorbar(y, mean, yerr=(mean - low, high - mean), fmt="none", ecolor="0.8", lw=0.8, zorder=0)
        axes.plot(y, mean, "o", ms=2.5, alpha=0.6)
        ends = [float(y.min()), float(y.max())]
        axes.plot(ends, ends, color="0.5", lw=1)
        axes.set(xlabel="true", ylabel="predicted, 95 % interval" if np.isfinite(low).all() else "predicted")

    def describe(self) -> str:
        """Return the problem in a sentence."""
        return f"a number from rows with {super().describe()}"

    def notes(self) -> str:
        """Return what the columns mean, for the report."""
        return (
            "root mean squared and mean absolute error in the units of the table; NLL is the mean negative log density "
            "of the true value and coverage gap the distance of the 95 % interval's coverage from 0.95, for those that "
            "know their uncertainty."
        )


def _ridge(*, features: int, random_state: int | None) -> Any:
    from sklearn.linear_model import BayesianRidge

    return BayesianRidge()


def _boosting(*, features: int, random_state: int | None) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor

    return HistGradientBoostingRegressor(random_state=random_state)


def _svm(*, features: int, random_state: int | None) -> Any:
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVR

    grid = {"C": [1.0, 10.0, 100.0], "gamma": [0.1 / features, 1.0 / features, 10.0 / features]}
    return GridSearchCV(SVR(), grid, cv=3)


BASELINES: dict[str, Factory] = {"ridge": _ridge, "rbf-svm": _svm, "boosting": _boosting}
