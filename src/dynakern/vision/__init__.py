"""Kernels over images: large, dynamic and generated convolutions."""

from dynakern.vision.fdconv import FDConv, FDConvResNet, convert_to_fdconv
from dynakern.vision.replknet import RepLKNet, ShapeBias, shape_bias, sweep_kernels
from dynakern.vision.shiftaddvit import PVT, LinearAngularAttention, PVTv2, ShiftLinear, convert_to_shiftadd
from dynakern.vision.unireplknet import UniRepLKNet

__all__ = [
    "PVT",
    "FDConv",
    "FDConvResNet",
    "LinearAngularAttention",
    "PVTv2",
    "RepLKNet",
    "ShapeBias",
    "ShiftLinear",
    "UniRepLKNet",
    "convert_to_fdconv",
    "convert_to_shiftadd",
    "shape_bias",
    "sweep_kernels",
]
