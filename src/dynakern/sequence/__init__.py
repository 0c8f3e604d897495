"""Kernels over positions in a sequence: state spaces, long convolutions, time-series backbones."""
