"""Small LSNets for the conformance suite."""

from dynakern.testing import randn
from dynakern.vision.lsnet import LSNet, classify_images
from tests.conformance.example import Example


def images(dtype):
    return (randn(2, 3, 32, 32, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(
        name="network",
        build=lambda: LSNet(
            (16, 16, 24, 32), (1, 2, 2, 2), (2,) * 4, (4,) * 4, img_size=32, num_classes=5, patch_size=4
        ),
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
