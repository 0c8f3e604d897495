"""Classifying the rows of a table, as a task."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dynakern.tasks.classification import classification_scores, stratified_quarter
from dynakern.tasks.tabular import Factory, TableTask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ClassifyTask"]


class ClassifyTask(TableTask):
    """Predict the class of a row; see :class:`~dynakern.tasks.tabular.TableTask`."""

    name: ClassVar[str] = "classify"
    headline: ClassVar[str] = "error"

    def __post_init__(self) -> None:
        if self.data.target is None:
            raise ValueError(f"{self.data.source}: a column to predict is needed.")
        counts = {label: int((self.labels[self.is_train] == label).sum()) for label in self.classes}
        rare = [label for label, count in counts.items() if count < 2]
        if rare:
            listed = ", ".join(rare[:5]) + (", ..." if len(rare) > 5 else "")
            raise ValueError(
                f"{self.data.source}: every class needs at least 2 training rows, too few of: {listed}. "
                "A column of measurements is a matter of `dynakern compare regress`."
            )
        if len(self.classes) < 2:
            raise ValueError(f"{self.data.source}: at least 2 classes are needed, got {len(self.classes)}.")
        super().__post_init__()

    @cached_property
    def labels(self) -> np.ndarray:
        """The labels as text, ``(N,)``."""
        target = self.data.target
        assert target is not None
        whole = target.dtype.kind == "f" and bool((target == np.round(target)).all())
        return (target.astype(np.int64) if whole else target).astype(str)

    @cached_property
    def classes(self) -> list[str]:
        """The class labels, sorted; a class number is a place in this list."""
        return sorted(set(self.labels.tolist()))

    def _split(self) -> np.ndarray:
        return stratified_quarter(self.labels)

    def _targets(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.classes, self.labels[rows])

    def _baselines(self) -> Mapping[str, Factory]:
        return BASELINES

    def _fit(self, name: str, seed: int, rows: np.ndarray) -> Any:
        from sklearn.calibration import CalibratedClassifierCV

        if hasattr(self.build(name, seed), "predict_proba"):
            return super()._fit(name, seed, rows)
        estimator = super()._fit(name, seed, rows)
        calibrated = CalibratedClassifierCV(self.build(name, seed), cv=3, ensemble=False)  # pyright: ignore
        calibrated.fit(self.scaled[rows], self._targets(rows))
        if hasattr(estimator, "kernel_"):
            calibrated.kernel_ = estimator.kernel_  # pyright: ignore[reportAttributeAccessIssue]
        return calibrated

    def _predict(self, estimator: Any, x: np.ndarray) -> np.ndarray:
        """Return the probability of every class of the task, those unseen in training included: ``(M, classes)``."""
        found = np.zeros((len(x), len(self.classes)))
        found[:, np.asarray(estimator.classes_)] = estimator.predict_proba(x)
        return found

    def _score(self, estimator: Any, x: np.ndarray, rows: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
        probabilities = self._predict(estimator, x)
        return classification_scores(probabilities, self._targets(rows)), probabilities.argmax(1)

    def _draw(self, axes: Axes, name: str, drawn: np.ndarray) -> None:
        _, rows = self.part(test=True)
        size, matrix = len(self.classes), np.zeros((len(self.classes), len(self.classes)))
        np.add.at(matrix, (self._targets(rows), drawn.astype(int)), 1)
        axes.imshow(matrix / matrix.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_xticks(range(size), self.classes, rotation=45, fontsize=7)
        axes.set_yticks(range(size), self.classes, fontsize=7)

    def describe(self) -> str:
        """Return the problem in a sentence."""
        return f"{len(self.classes)} classes of rows with {super().describe()}"

    def notes(self) -> str:
        """Return what the columns mean, for the report."""
        return (
            "error is the fraction of test rows classified wrongly, balanced error its mean over classes, log loss the "
            "mean negative log-probability of the true class. Estimators without probabilities are calibrated (Platt, "
            "3 folds)."
        )


def _logistic(*, features: int, random_state: int | None) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000)


def _boosting(*, features: int, random_state: int | None) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(random_state=random_state)


def _svm(*, features: int, random_state: int | None) -> Any:
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.svm import SVC

    grid = {"C": [1.0, 10.0, 100.0], "gamma": [0.1 / features, 1.0 / features, 10.0 / features]}
    return GridSearchCV(SVC(), grid, cv=KFold(3, shuffle=True, random_state=0))


BASELINES: dict[str, Factory] = {"logistic": _logistic, "rbf-svm": _svm, "boosting": _boosting}
