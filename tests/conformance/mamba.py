"""Small Mamba networks for the conformance suite."""

from dynakern.layers import Mamba, MambaStack
from dynakern.layers.mamba import classify_series, forecast
from dynakern.testing import randn
from tests.conformance.example import Example


def signal(dtype):
    return (randn(2, 37, 6, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(name="block", build=lambda: Mamba(6, d_state=4), inputs=signal),
    Example(
        name="block-with-biases",
        build=lambda: Mamba(
            6, d_state=3, d_conv=2, expand=1, dt_rank=2, dt_init="constant", conv_bias=False, bias=True
        ),
        inputs=signal,
    ),
    Example(name="stack", build=lambda: MambaStack(6, 2, d_state=4), inputs=signal),
    Example(name="forecast", build=lambda: forecast(channels=6, context=37, horizon=5, time_features=0), inputs=signal),
    Example(name="classify", build=lambda: classify_series(channels=6, length=37, classes=3), inputs=signal),
]
