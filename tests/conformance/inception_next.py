"""A small InceptionNeXt for the conformance suite."""

from dynakern.testing import randn
from dynakern.vision.inception_next import InceptionNeXt, classify_images
from tests.conformance.example import Example


def images(dtype):
    return (randn(2, 3, 32, 24, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(
        name="two-stages",
        build=lambda: InceptionNeXt((1, 1), (16, 24), mlp_ratios=(2, 2), num_classes=5, layer_scale=1.0),
        inputs=images,
        image=True,
    ),
    Example(
        name="classify",
        build=lambda: classify_images(in_chans=3, img_size=32, num_classes=4, width=0.5),
        inputs=images,
        image=True,
    ),
]
