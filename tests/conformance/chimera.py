"""Small Chimera networks for the conformance suite."""

from dynakern.sequence import SSM2D, Chimera
from dynakern.sequence.chimera import forecaster
from dynakern.testing import randn
from tests.conformance.example import Example

SIZES = {"channels": 3, "lookback": 8, "d_model": 4, "d_state": 2, "num_layers": 1}


def window(dtype):
    return (randn(2, 8, 3, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(
        name="layer",
        build=lambda: SSM2D(4, 2),
        inputs=lambda dtype: (randn(2, 3, 5, 4, dtype=dtype, requires_grad=False),),
    ),
    Example(
        name="closed-loop",
        build=lambda: Chimera(horizon=5, decoder="closed-loop", **SIZES),
        inputs=window,
    ),
    Example(name="classify", build=lambda: Chimera("classify", classes=3, **SIZES), inputs=window),
    Example(name="reconstruct", build=lambda: Chimera("reconstruct", **SIZES), inputs=window),
    Example(
        name="forecast",
        build=lambda: forecaster(channels=3, context=8, horizon=5, time_features=0),
        inputs=window,
    ),
]
