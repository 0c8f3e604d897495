"""Small UniRepLKNets for the conformance suite."""

from dynakern.testing import randn
from dynakern.vision.unireplknet import UniRepLKNet, classify_images
from tests.conformance.example import Example


def images(dtype):
    return (randn(2, 3, 32, 24, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(
        name="two-stages",
        build=lambda: UniRepLKNet(
            (1, 2), (8, 12), kernel_sizes=((3,), (7, 0)), num_classes=5, layer_scale_init_value=0.5
        ),
        inputs=images,
        image=True,
    ),
    Example(
        name="classify",
        build=lambda: classify_images(in_chans=3, img_size=32, num_classes=4, width=0.3),
        inputs=images,
        image=True,
    ),
]
