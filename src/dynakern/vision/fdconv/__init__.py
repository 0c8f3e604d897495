r"""FDConv: convolutions whose kernels adapt to each image, at the parameters of one kernel.

Dynamic convolution mixes several kernels by an attention of the image, which costs their number in parameters, and the
kernels learnt come out alike. Here the Fourier coefficients of one kernel are cut into K disjoint groups by frequency;
group q, back in space, is a kernel :math:`W_q` that no other resembles, and the image weighs them,
:math:`W = \sum_q a_q W_q`. Further gates scale the kernel's entries (kernel spatial modulation), and before the
convolution the bands of the feature map are weighed pixel by pixel (frequency band modulation).

Paper: Chen, Gu, Li, Yan, Meng, Xu and Fu, 2025, "Frequency Dynamic Convolution for Dense Image Prediction",
arXiv:2503.18783. Official code: https://github.com/Linwei-Chen/FDConv, whose state-dict keys are ours.

Implemented: the layer with all its options, the conversion of any convolution or network, and ResNets in the paper's
setting. Left out: the split of the attention by spatial frequency, which crashes in the official code, and FDLinear,
which is not in the paper. Differs: the head of the filter attention starts near zero like the other heads (the official
code misses it), so that a converted layer starts as the convolution that it was.

Example:
    >>> import torch
    >>> conv = torch.nn.Conv2d(32, 48, 3, padding=1)
    >>> layer = FDConv.from_conv(conv, kernel_num=16).eval()
    >>> x = torch.randn(2, 32, 16, 16)
    >>> torch.allclose(layer(x), conv(x), atol=1e-4)
    True
"""

from __future__ import annotations

from dynakern.vision.fdconv.bands import BandModulation
from dynakern.vision.fdconv.gates import GlobalModulation, LocalModulation
from dynakern.vision.fdconv.layer import FDConv, convert_state_dict, frequency_order
from dynakern.vision.fdconv.network import (
    FDConvResNet,
    classify_images,
    convert_to_fdconv,
    fdconv_resnet18,
    fdconv_resnet34,
    fdconv_resnet50,
    fdconv_resnet101,
)

__all__ = [
    "BandModulation",
    "FDConv",
    "FDConvResNet",
    "GlobalModulation",
    "LocalModulation",
    "classify_images",
    "convert_state_dict",
    "convert_to_fdconv",
    "fdconv_resnet18",
    "fdconv_resnet34",
    "fdconv_resnet50",
    "fdconv_resnet101",
    "frequency_order",
]
