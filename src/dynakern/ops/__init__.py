"""Operators: one public function each, in front of a reference, a CPU and a GPU engine.

``backend="auto"`` always works; an engine asked for by name that cannot run raises and says why;
:func:`explain_backend` answers "why so slow?".
"""

from dynakern.ops.block_fft import block_fft, dft_matrix, three_pass_conv
from dynakern.ops.depthwise_conv2d import depthwise_conv2d
from dynakern.ops.dispatch import Backend, Choice, explain_backend
from dynakern.ops.dtw import dtw
from dynakern.ops.fft_conv import fft_conv
from dynakern.ops.flash_rnn import flash_rnn
from dynakern.ops.gram import gram_product, gram_solve, nystroem, random_features
from dynakern.ops.inception_conv import inception_conv
from dynakern.ops.kernel_sums import kernel_sums
from dynakern.ops.pauli_states import pauli_states
from dynakern.ops.scan2d import scan2d
from dynakern.ops.selective_scan import selective_scan
from dynakern.ops.ska import ska
from dynakern.ops.ssm2d import ssm2d
from dynakern.ops.stl import stl
from dynakern.ops.tangent_kernel import tangent_kernel

__all__ = [
    "Backend",
    "Choice",
    "block_fft",
    "depthwise_conv2d",
    "dft_matrix",
    "dtw",
    "explain_backend",
    "fft_conv",
    "flash_rnn",
    "gram_product",
    "gram_solve",
    "inception_conv",
    "kernel_sums",
    "nystroem",
    "pauli_states",
    "random_features",
    "scan2d",
    "selective_scan",
    "ska",
    "ssm2d",
    "stl",
    "tangent_kernel",
    "three_pass_conv",
]
