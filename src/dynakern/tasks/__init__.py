"""Tasks: readers, protocols, metrics and baselines, and the estimators that take any network of the library."""

from dynakern.tasks.classify_images import ImageClassifier
from dynakern.tasks.classify_series import SeriesClassifier
from dynakern.tasks.forecast import ForecastTask, split_rows
from dynakern.tasks.forecaster import Forecaster
from dynakern.tasks.windowed import AnomalyDetector, Imputer

__all__ = [
    "AnomalyDetector",
    "ForecastTask",
    "Forecaster",
    "ImageClassifier",
    "Imputer",
    "SeriesClassifier",
    "split_rows",
]
