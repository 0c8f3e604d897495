"""Torch modules that more than one network uses."""

from dynakern.layers.embedding import DataEmbedding, sinusoidal_table
from dynakern.layers.series import SeriesClassification, SeriesForecast

__all__ = ["DataEmbedding", "SeriesClassification", "SeriesForecast", "sinusoidal_table"]
