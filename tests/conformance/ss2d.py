"""Small SS2D layers for the conformance suite."""

from dynakern.layers import SS2D
from dynakern.testing import randn
from tests.conformance.example import Example


def image(dtype):
    return (randn(2, 5, 7, 6, dtype=dtype, requires_grad=False),)


def image_channel_first(dtype):
    return (randn(2, 6, 5, 7, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(name="v0", build=lambda: SS2D(6, d_state=3, forward_type="v0"), inputs=image),
    Example(
        name="v05_noz",
        build=lambda: SS2D(6, d_state=1, forward_type="v05_noz", channel_first=True),
        inputs=image_channel_first,
    ),
    Example(
        name="v052d_nozact_oact_oncnorm",
        build=lambda: SS2D(6, d_state=2, d_conv=1, bias=True, forward_type="v052d_nozact_oact_oncnorm"),
        inputs=image,
    ),
    Example(
        name="v051d_onsoftmax",
        build=lambda: SS2D(6, d_state=2, forward_type="v051d_onsoftmax", channel_first=True),
        inputs=image_channel_first,
    ),
]
