"""Small FDConv layers and a network for the conformance suite."""

from dynakern.testing import randn
from dynakern.vision import FDConv, FDConvResNet
from tests.conformance.example import Example


def maps(channels, size):
    return lambda dtype: (randn(2, channels, size, size, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(
        name="3x3",
        build=lambda: FDConv(18, 20, 3, padding=1, kernel_num=3, k_list=(2, 4)),
        inputs=maps(18, 12),
        image=True,
    ),
    Example(name="1x1", build=lambda: FDConv(18, 20, 1, stride=2, kernel_num=10), inputs=maps(18, 9), image=True),
    Example(
        name="resnet",
        build=lambda: FDConvResNet(
            "basic", (1, 1), kernel_num=6, widths=(8, 18), num_classes=4, stem="cifar", drop_path_rate=0.1
        ),
        inputs=maps(3, 12),
        image=True,
    ),
]
