"""Kernels over images: large, dynamic and generated convolutions."""

from dynakern.vision.fdconv import FDConv, FDConvResNet, convert_to_fdconv
from dynakern.vision.inception_next import InceptionDWConv2d, InceptionNeXt
from dynakern.vision.lsnet import LKP, LSConv, LSNet
from dynakern.vision.replace import LargeConv2d, replace_conv
from dynakern.vision.replknet import RepLKNet, ShapeBias, shape_bias, sweep_kernels
from dynakern.vision.shiftaddvit import PVT, LinearAngularAttention, PVTv2, ShiftLinear, convert_to_shiftadd
from dynakern.vision.terminator import Kar2, Kar3, Terminator
from dynakern.vision.unireplknet import UniRepLKNet

__all__ = [
    "LKP",
    "PVT",
    "FDConv",
    "FDConvResNet",
    "InceptionDWConv2d",
    "InceptionNeXt",
    "Kar2",
    "Kar3",
    "LSConv",
    "LSNet",
    "LargeConv2d",
    "LinearAngularAttention",
    "PVTv2",
    "RepLKNet",
    "ShapeBias",
    "ShiftLinear",
    "Terminator",
    "UniRepLKNet",
    "convert_to_fdconv",
    "convert_to_shiftadd",
    "replace_conv",
    "shape_bias",
    "sweep_kernels",
]
