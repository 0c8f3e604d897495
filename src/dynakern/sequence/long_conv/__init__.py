r"""Long convolutions: kernels as long as the sequence, learned tap by tap and kept simple by two one-line regularisers.

State-space layers filter a long signal by a kernel that a linear system generates. The paper learns the kernel itself.
Unregularised it overfits; what helps is to make it smooth (a moving average over time, or a smoothing of its spectrum)
and sparse (a soft threshold, *squash*):

.. math:: k = \mathrm{sign}(\bar k) \max(|\bar k| - \lambda, 0), \quad \bar k = \mathrm{smooth}(W), \quad
   y = k * u + D u.

Its second part makes the convolution cheap: an FFT made of small dense matrices (:func:`dynakern.ops.block_fft`), whose
matrices may also be learned, in blocks that fit fast memory (:func:`dynakern.ops.fft_conv`,
:func:`dynakern.ops.three_pass_conv`).

Paper: Fu, Epstein, Nguyen, Thomas, Zhang, Dao, Rudra and Ré, 2023, "Simple Hardware-Efficient Long Convolutions for
Sequence Modeling", arXiv:2302.06646.

Implemented: the regularised kernel with both smoothings and both initialisations, the layer (causal, two-sided,
bidirectional), learned butterfly matrices, the H3 layer with long convolutions, the classifier backbone. Not
implemented: the language model around the H3 layer, the two-tower head of the Retrieval task, heads wider than 1 in the
H3 layer, weight normalisation.

Example:
    >>> import torch
    >>> layer = LongConv(d_model=8, l_max=100, smooth=7, init_std=0.05)
    >>> layer(torch.randn(2, 100, 8)).shape
    torch.Size([2, 100, 8])
    >>> layer(torch.randn(2, 40, 8)).shape  # shorter inputs use the first taps, longer ones all of them
    torch.Size([2, 40, 8])
"""

from dynakern.sequence.long_conv.kernel import LongConvKernel, smooth_frequency, smooth_time, squash
from dynakern.sequence.long_conv.layer import ButterflyFFT, H3Conv, LongConv, convert_state_dict
from dynakern.sequence.long_conv.model import (
    LongConvModel,
    classify_series,
    forecast,
    long_conv_classifier,
    long_conv_lra_image,
    long_conv_lra_listops,
    long_conv_lra_pathfinder,
    long_conv_lra_pathx,
    long_conv_lra_text,
    long_conv_scifar,
)

__all__ = [
    "ButterflyFFT",
    "H3Conv",
    "LongConv",
    "LongConvKernel",
    "LongConvModel",
    "classify_series",
    "convert_state_dict",
    "forecast",
    "long_conv_classifier",
    "long_conv_lra_image",
    "long_conv_lra_listops",
    "long_conv_lra_pathfinder",
    "long_conv_lra_pathx",
    "long_conv_lra_text",
    "long_conv_scifar",
    "smooth_frequency",
    "smooth_time",
    "squash",
]
