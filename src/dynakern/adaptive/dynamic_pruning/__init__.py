r"""Dynamic channel pruning: a tiny predictor looks at a layer's input and decides which of its filters to compute.

Static pruning removes the same filters for all images. Here each layer of a trained network gets a predictor, one
pooling and one linear map. Its targets come from the layer itself, without labels or a sparsity loss: of the responses
:math:`a_c = \max_{hw} |O_{chw}|` of an image, those that make up a share r, the mass, are kept. One number, r, sets the
budget before training.

Paper: Elkerdawy, Elhoushi, Zhang and Ray, 2022, "Fire Together Wire Together: A Dynamic Pruning Approach with
Self-Supervised Mask Prediction", arXiv:2110.08232. Official code: https://github.com/selkerdawy/FTWT.

Implemented: mass and uniform targets; predictors with average or maximum pooling; decoupled and joint training; the
mask loss and its cooldown; the cost before training; the authors' networks for CIFAR with their keys, and a wrapper for
other networks; inference that computes active filters only, which the authors' code does not have. Their networks for
ImageNet were not released. Pooling is the average, as in their code; the paper says maximum.

Example:
    >>> import torch
    >>> dense = VGG((8, "M", 12, "M"), masked=False)             # train this first
    >>> pruned = DynamicPruner(dense, mass=0.8)
    >>> images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    >>> before = pruned.estimate_flops([images])                  # before training
    >>> loss = torch.nn.functional.cross_entropy(pruned(images), labels) + pruned.auxiliary_loss()
    >>> loss.backward()
    >>> fast = pruned.eval().compile()                            # skips filters
    >>> bool(torch.allclose(fast(images), pruned(images), atol=1e-5))
    True
"""

from __future__ import annotations

from typing import Any

from dynakern.adaptive.dynamic_pruning.layers import (
    LayerRecord,
    MaskedConv,
    MaskPredictor,
    filter_response,
    mask_bce,
    mass_mask,
    uniform_mask,
)
from dynakern.adaptive.dynamic_pruning.network import (
    DynamicNetwork,
    FlopsEstimate,
    LayerReport,
    PruningReport,
    mask_weight,
)
from dynakern.adaptive.dynamic_pruning.networks import VGG, CifarResNet, MobileNetV1, MobileNetV2
from dynakern.adaptive.dynamic_pruning.pruner import DynamicPruner
from dynakern.adaptive.dynamic_pruning.skipping import SkippingConv, SkippingNetwork

__all__ = [
    "VGG",
    "CifarResNet",
    "DynamicNetwork",
    "DynamicPruner",
    "FlopsEstimate",
    "LayerRecord",
    "LayerReport",
    "MaskPredictor",
    "MaskedConv",
    "MobileNetV1",
    "MobileNetV2",
    "PruningReport",
    "SkippingConv",
    "SkippingNetwork",
    "filter_response",
    "ftwt_mobilenetv1",
    "ftwt_mobilenetv1_50",
    "ftwt_mobilenetv1_75",
    "ftwt_mobilenetv2",
    "ftwt_resnet20",
    "ftwt_resnet56",
    "ftwt_resnet110",
    "ftwt_vgg11_bn",
    "ftwt_vgg13_bn",
    "ftwt_vgg16_bn",
    "ftwt_vgg19_bn",
    "mask_bce",
    "mask_weight",
    "mass_mask",
    "uniform_mask",
]


def _vgg(counts: tuple[int, ...], overrides: dict[str, Any]) -> VGG:
    cfg: list[int | str] = []
    for channels, count in zip((64, 128, 256, 512, 512), counts, strict=True):
        cfg += [channels] * count + ["M"]
    return VGG(**{"cfg": cfg, **overrides})


def ftwt_vgg11_bn(**overrides: Any) -> VGG:
    """VGG-11 (9.231 M parameters without predictors, 152.8 MMAC at 32), ``(B, 3, 32, 32) -> (B, 10)``."""
    return _vgg((1, 1, 2, 2, 2), overrides)


def ftwt_vgg13_bn(**overrides: Any) -> VGG:
    """VGG-13 (9.416 M parameters without predictors, 228.3 MMAC at 32), ``(B, 3, 32, 32) -> (B, 10)``."""
    return _vgg((2, 2, 2, 2, 2), overrides)


def ftwt_vgg16_bn(**overrides: Any) -> VGG:
    """VGG-16 (14.728 M parameters without predictors, 313.2 MMAC at 32), ``(B, 3, 32, 32) -> (B, 10)``."""
    return _vgg((2, 2, 3, 3, 3), overrides)


def ftwt_vgg19_bn(**overrides: Any) -> VGG:
    """VGG-19 (20.041 M parameters without predictors, 398.1 MMAC at 32), ``(B, 3, 32, 32) -> (B, 10)``."""
    return _vgg((2, 2, 4, 4, 4), overrides)


def ftwt_resnet20(**overrides: Any) -> CifarResNet:
    """ResNet-20 (0.270 M parameters without predictors), ``(B, 3, 32, 32) -> (B, 10)``."""
    return CifarResNet(**{"depth": 20, **overrides})


def ftwt_resnet56(**overrides: Any) -> CifarResNet:
    """ResNet-56 (0.853 M parameters without predictors, 125.5 MMAC at 32), ``(B, 3, 32, 32) -> (B, 10)``."""
    return CifarResNet(**{"depth": 56, **overrides})


def ftwt_resnet110(**overrides: Any) -> CifarResNet:
    """ResNet-110 (1.728 M parameters without predictors, 252.9 MMAC at 32), ``(B, 3, 32, 32) -> (B, 10)``."""
    return CifarResNet(**{"depth": 110, **overrides})


def ftwt_mobilenetv1(**overrides: Any) -> MobileNetV1:
    """MobileNet (3.217 M parameters without predictors, 46.35 MMAC at 32), ``(B, 3, 32, 32) -> (B, 10)``."""
    return MobileNetV1(**overrides)


def ftwt_mobilenetv1_75(**overrides: Any) -> MobileNetV1:
    """MobileNet with 3/4 of the channels, ``(B, 3, 32, 32) -> (B, 10)``."""
    return MobileNetV1(**{"width": 0.75, **overrides})


def ftwt_mobilenetv1_50(**overrides: Any) -> MobileNetV1:
    """MobileNet with half of the channels, ``(B, 3, 32, 32) -> (B, 10)``."""
    return MobileNetV1(**{"width": 0.5, **overrides})


def ftwt_mobilenetv2(**overrides: Any) -> MobileNetV2:
    """MobileNet V2 (2.297 M parameters without predictors, 91.2 MMAC at 32), ``(B, 3, 32, 32) -> (B, 10)``."""
    return MobileNetV2(**overrides)


def classify_images(*, in_chans: int, img_size: int, num_classes: int, width: float = 1.0) -> VGG:
    """Build the competitor of ``dynakern compare classify-images``: a small VGG that learns with its masks.

    Args:
        in_chans: Channels of the images.
        img_size: Side of the images.
        num_classes: Number of classes.
        width: Multiplies the channels, which are multiples of 8.

    Returns:
        A module that maps ``(B, in_chans, S, S)`` to logits ``(B, num_classes)``.
    """
    a, b, c = (8 * max(1, round(n * width / 8)) for n in (32, 64, 128))
    cfg: tuple[int | str, ...] = (a, "M", b, b, "M", c, c, "M") if img_size >= 16 else (a, b, b, "M", c, c)
    return VGG(cfg, in_chans=in_chans, num_classes=num_classes, mass=0.95, safe=True)
