"""Small recurrent networks for the conformance suite."""

from dynakern.sequence import FlashRNN
from dynakern.sequence.flash_rnn import classify_series, forecast
from dynakern.testing import randn
from tests.conformance.example import Example


def signal(dtype):
    return (randn(2, 21, 6, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    *(
        Example(
            name=cell, build=lambda cell=cell: FlashRNN(6, 8, batch_first=True, num_heads=2, cell=cell), inputs=signal
        )
        for cell in ("elman", "gru", "lstm", "slstm")
    ),
    Example(
        name="bidirectional",
        build=lambda: FlashRNN(6, 8, num_layers=2, batch_first=True, bidirectional=True, num_heads=2, cell="gru"),
        inputs=signal,
    ),
    Example(name="forecast", build=lambda: forecast(channels=6, context=21, horizon=5, time_features=0), inputs=signal),
    Example(name="classify", build=lambda: classify_series(channels=6, length=21, classes=3), inputs=signal),
]
