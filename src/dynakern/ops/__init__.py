"""Operators: one public function each, in front of a reference, a CPU and a GPU engine.

``backend="auto"`` always works; an engine asked for by name that cannot run raises and says why;
:func:`explain_backend` answers "why so slow?".
"""

from dynakern.ops.block_fft import block_fft, dft_matrix, three_pass_conv
from dynakern.ops.dispatch import Backend, Choice, explain_backend
from dynakern.ops.dtw import dtw
from dynakern.ops.fft_conv import fft_conv
from dynakern.ops.flash_rnn import flash_rnn
from dynakern.ops.scan2d import scan2d
from dynakern.ops.selective_scan import selective_scan
from dynakern.ops.stl import stl

__all__ = [
    "Backend",
    "Choice",
    "block_fft",
    "dft_matrix",
    "dtw",
    "explain_backend",
    "fft_conv",
    "flash_rnn",
    "scan2d",
    "selective_scan",
    "stl",
    "three_pass_conv",
]
