"""Kernels over positions in a sequence: state spaces, long convolutions, time-series backbones."""

from dynakern.sequence.s4d import S4D, S4DModel
from dynakern.sequence.timesnet import InceptionConv2d, TimesBlock, TimesNet, dominant_periods

__all__ = ["S4D", "InceptionConv2d", "S4DModel", "TimesBlock", "TimesNet", "dominant_periods"]
