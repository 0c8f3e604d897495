"""Torch modules that more than one network uses."""

from dynakern.layers.embedding import DataEmbedding, sinusoidal_table
from dynakern.layers.mamba import Mamba, MambaStack, MambaState
from dynakern.layers.series import SeriesClassification, SeriesForecast
from dynakern.layers.ss2d import SS2D, cross_merge, cross_scan
from dynakern.layers.transformer import GPT2

__all__ = [
    "GPT2",
    "SS2D",
    "DataEmbedding",
    "Mamba",
    "MambaStack",
    "MambaState",
    "SeriesClassification",
    "SeriesForecast",
    "cross_merge",
    "cross_scan",
    "sinusoidal_table",
]
