"""Small S4D networks for the conformance suite."""

import torch

from dynakern.sequence import S4D, S4DModel
from dynakern.sequence.s4d import classify_series, forecast
from dynakern.testing import randn
from tests.conformance.example import Example


def signal(dtype):
    return (randn(2, 37, 6, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(name="layer", build=lambda: S4D(6, 8), inputs=signal),
    Example(
        name="bidirectional", build=lambda: S4D(6, 8, bidirectional=True, disc="bilinear", channels=2), inputs=signal
    ),
    Example(
        name="classifier",
        build=lambda: S4DModel(d_input=6, num_classes=3, d_model=8, num_layers=2, d_state=4, dropout=0.0),
        inputs=signal,
    ),
    Example(
        name="tokens",
        build=lambda: S4DModel(
            vocab_size=9, num_classes=3, d_model=8, num_layers=1, d_state=4, norm="batch", prenorm=True
        ),
        inputs=lambda dtype: (torch.arange(40).reshape(2, 20) % 9,),
    ),
    Example(
        name="forecast",
        build=lambda: forecast(channels=6, context=37, horizon=5, time_features=0),
        inputs=signal,
    ),
    Example(name="classify", build=lambda: classify_series(channels=6, length=37, classes=3), inputs=signal),
]
