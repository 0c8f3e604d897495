"""Small RepLKNets for the conformance suite."""

from dynakern.testing import randn
from dynakern.vision.replknet import RepLKNet, classify_images
from tests.conformance.example import Example


def images(dtype):
    return (randn(2, 3, 32, 24, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(
        name="two-stages",
        build=lambda: RepLKNet((7, 5), (1, 1), (8, 12), small_kernel=3, num_classes=5, ffn_ratio=2, dw_ratio=1.5),
        inputs=images,
        image=True,
    ),
    Example(
        name="classify",
        build=lambda: classify_images(in_chans=3, img_size=32, num_classes=4, width=0.25),
        inputs=images,
        image=True,
    ),
]
