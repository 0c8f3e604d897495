"""Small Terminators for the conformance suite, with running statistics: others see their whole batch."""

from dynakern.testing import randn
from dynakern.vision.terminator import Terminator
from tests.conformance.example import Example


def images(dtype):
    return (randn(3, 3, 8, 8, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(
        name="network",
        build=lambda: Terminator(
            img_size=8,
            factors=(4, 1),
            local_sizes=(3, 7, 5, 5),
            global_layers=(2, 1),
            global_hidden=6,
            local_hidden=6,
            channel_hidden=5,
            interact_hidden=(4, 4),
            num_classes=5,
            dropout=0.0,
            batch_stats="running",
            omega_0=0.02,  # at 2000 the phases of the sines are beyond lower precisions
        ),
        inputs=images,
        image=True,
    ),
]
