"""Estimating the density of the rows of a table, as a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dynakern.tasks.tabular import Factory, TableTask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DensityTask"]


class DensityTask(TableTask):
    """Say how probable a row is; see :class:`~dynakern.tasks.tabular.TableTask`."""

    name: ClassVar[str] = "density"
    headline: ClassVar[str] = "nll_per_feature"

    def _baselines(self) -> Mapping[str, Factory]:
        return BASELINES

    def _predict(self, estimator: Any, x: np.ndarray) -> np.ndarray:
        return np.asarray(estimator.score_samples(x), dtype=np.float64)

    def _score(self, estimator: Any, x: np.ndarray, rows: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        log_density = self._predict(estimator, x)
        if np.isnan(log_density).any():
            raise FloatingPointError("The log densities are not numbers.")
        width = x.shape[1]
        metrics = {
            "nll_per_feature": float(-log_density.mean() / width),
            "worst_tenth": float(-np.sort(log_density)[: max(1, len(x) // 10)].mean() / width),
        }
        return metrics, log_density

    def _draw(self, axes: Axes, name: str, drawn: np.ndarray) -> None:
        finite = drawn[np.isfinite(drawn)]
        axes.hist(finite, bins=40, color="C0", alpha=0.8)
        axes.set(xlabel="log density of a test row", ylabel="rows")

    def describe(self) -> str:
        """Return the problem in a sentence."""
        return f"density of rows with {super().describe()}"

    def notes(self) -> str:
        """Return what the columns mean, for the report."""
        return (
            "mean negative log density of the standardised test rows, in nats a feature, and its mean over the tenth "
            "of the rows that are least probable."
        )


def _kde(*, features: int, random_state: int | None) -> Any:
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KernelDensity

    return GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.05, 2.0, 16)}, cv=3)


def _kde_scott(*, features: int, random_state: int | None) -> Any:
    from sklearn.neighbors import KernelDensity

    return KernelDensity(bandwidth="scott")  # pyright: ignore[reportArgumentType]


def _mixture(*, features: int, random_state: int | None) -> Any:
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(4, reg_covar=1e-3, random_state=random_state)


def _normal(*, features: int, random_state: int | None) -> Any:
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(1, reg_covar=1e-3, random_state=random_state)


BASELINES: dict[str, Factory] = {"normal": _normal, "mixture": _mixture, "kde": _kde, "kde-scott": _kde_scott}
