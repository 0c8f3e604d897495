"""Tasks: readers, protocols, metrics and baselines, and the estimators that take any network of the library."""

from dynakern.tasks.classify import ClassifyTask
from dynakern.tasks.classify_images import ImageClassifier
from dynakern.tasks.classify_series import SeriesClassifier
from dynakern.tasks.density import DensityTask
from dynakern.tasks.forecast import ForecastTask, split_rows
from dynakern.tasks.forecaster import Forecaster
from dynakern.tasks.regress import RegressTask
from dynakern.tasks.windowed import AnomalyDetector, Imputer

__all__ = [
    "AnomalyDetector",
    "ClassifyTask",
    "DensityTask",
    "ForecastTask",
    "Forecaster",
    "ImageClassifier",
    "Imputer",
    "RegressTask",
    "SeriesClassifier",
    "split_rows",
]
