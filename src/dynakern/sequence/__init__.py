"""Kernels over positions in a sequence: state spaces, long convolutions, time-series backbones."""

from dynakern.sequence.chimera import SSM2D, Chimera, ClosedLoop, ssm2d
from dynakern.sequence.flash_rnn import FlashRNN
from dynakern.sequence.long_conv import H3Conv, LongConv, LongConvModel
from dynakern.sequence.s4d import S4D, S4DModel
from dynakern.sequence.tempo import TEMPO
from dynakern.sequence.timesnet import InceptionConv2d, TimesBlock, TimesNet, dominant_periods

__all__ = [
    "S4D",
    "SSM2D",
    "TEMPO",
    "Chimera",
    "ClosedLoop",
    "FlashRNN",
    "H3Conv",
    "InceptionConv2d",
    "LongConv",
    "LongConvModel",
    "S4DModel",
    "TimesBlock",
    "TimesNet",
    "dominant_periods",
    "ssm2d",
]
