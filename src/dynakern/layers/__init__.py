"""Torch modules that more than one network uses."""

from dynakern.layers.series import SeriesClassification, SeriesForecast

__all__ = ["SeriesClassification", "SeriesForecast"]
