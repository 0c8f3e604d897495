"""Small long convolutions for the conformance suite."""

import torch

from dynakern.sequence import H3Conv, LongConv, LongConvModel
from dynakern.sequence.long_conv import classify_series, forecast
from dynakern.testing import randn
from tests.conformance.example import Example


def signal(dtype):
    return (randn(2, 32, 6, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(name="layer", build=lambda: LongConv(6, 32, init_std=0.1, smooth=5), inputs=signal),
    Example(
        name="bidirectional",
        build=lambda: LongConv(
            6, 20, channels=1, init="double_exp", smooth=3, smooth_in="frequency", bidirectional=True
        ),
        inputs=signal,
    ),
    Example(
        name="butterfly",
        build=lambda: LongConv(6, 32, init_std=0.1, butterfly="replace"),
        inputs=signal,
        # 64 points are transformed by matrices of 16 and 4.
        unused=("block_fft_u.mat_2", "block_fft_u.mat_8", "block_fft_k.mat_2", "block_fft_k.mat_8"),
    ),
    Example(name="h3", build=lambda: H3Conv(6, 32, init_std=0.1), inputs=signal),
    Example(
        name="classifier",
        build=lambda: LongConvModel(
            d_input=6, num_classes=3, d_model=8, num_layers=2, l_max=40, dropout=0.0, causal=False, init_std=0.1
        ),
        inputs=signal,
    ),
    Example(
        name="tokens",
        build=lambda: LongConvModel(
            vocab_size=9, num_classes=3, d_model=8, num_layers=1, l_max=20, norm="batch", prenorm=True, init_std=0.1
        ),
        inputs=lambda dtype: (torch.arange(40).reshape(2, 20) % 9,),
    ),
    Example(
        name="forecast",
        build=lambda: forecast(channels=6, context=32, horizon=5, time_features=0),
        inputs=signal,
    ),
    Example(name="classify", build=lambda: classify_series(channels=6, length=32, classes=3), inputs=signal),
]
