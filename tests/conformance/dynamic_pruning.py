"""Small dynamically pruned networks for the conformance suite."""

import torch

from dynakern.adaptive.dynamic_pruning import CifarResNet, DynamicPruner, MobileNetV1, classify_images
from dynakern.layers.resnet import ResNet
from dynakern.testing import randn
from tests.conformance.example import Example


def images(dtype):
    return (randn(2, 3, 16, 16, dtype=dtype, requires_grad=False),)


def decided(network):
    """Draw predictors whose logits are far from 0, so that other precisions take the same decisions."""
    for name, layer in network.masked_layers().items():
        linear = layer.mask.model["1Conv2dMask"]
        torch.nn.init.normal_(linear.weight, std=0.01)
        signs = torch.arange(layer.conv.out_channels) % 3 != len(name) % 3
        linear.bias.data.copy_(2.0 * signs - 1.0)
    return network


def predictors(build):
    """Return the predictors' prefixes: masks pass no gradient, they learn from the mask loss alone."""
    return tuple(f"{name}.mask." for name in build().masked_layers())


BUILDS = {
    "resnet": lambda: CifarResNet(8, width=8, num_classes=5),
    "mobilenetv1": lambda: MobileNetV1(width=0.125, num_classes=5),
    "pruner": lambda: DynamicPruner(
        ResNet("basic", (1, 1), widths=(8, 12), num_classes=5, stem="cifar"), img_size=16, mode="joint"
    ),
    "classify": lambda: classify_images(in_chans=3, img_size=16, num_classes=4, width=0.25),
}

EXAMPLES = [
    Example(
        name=name,
        build=lambda build=build: decided(build()),
        inputs=images,
        image=True,
        unused=predictors(build),
    )
    for name, build in BUILDS.items()
]
