r"""UniRepLKNet: one convolutional network with large kernels for image, audio, video, point cloud and time series.

Its receptive field comes from a few 13x13 depthwise convolutions instead of depth. They train with dilated small
convolutions beside them, which are folded away for inference. Other modalities are arranged as maps: a spectrogram, the
frames of a clip side by side, views of a point cloud, a folded series.

Papers: Ding, Zhang, Ge, Zhao, Song, Yue and Shan, 2024, "UniRepLKNet: A Universal Perception Large-Kernel ConvNet",
arXiv:2311.15599; Zhang, Ding and Yue, 2025, arXiv:2410.08049. Official code: https://github.com/AILab-CVC/UniRepLKNet.

Implemented: the network at all sizes, fusing, the authors' weights in training and deployed form, learning rates by
layer, and the four other modalities. Detection and segmentation heads are not: ``forward_intermediates`` feeds those.

Example:
    >>> import torch
    >>> model = unireplknet_a(num_classes=10).eval()
    >>> model(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    >>> fast = model.fuse()
    >>> [tuple(m.shape[1:]) for m in fast.forward_intermediates(torch.zeros(1, 3, 64, 64))]
    [(40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 2, 2)]
"""

from __future__ import annotations

from typing import Any

from dynakern.vision.unireplknet.maps import (
    PointProjection,
    audio_to_map,
    log_mel,
    video_to_map,
    view_rotations,
)
from dynakern.vision.unireplknet.network import (
    DilatedReparamBlock,
    UniRepLKNet,
    UniRepLKNetBlock,
    classify_images,
    default_kernel_sizes,
    layer_decay_scales,
)
from dynakern.vision.unireplknet.series import StationForecaster

__all__ = [
    "DilatedReparamBlock",
    "PointProjection",
    "StationForecaster",
    "UniRepLKNet",
    "UniRepLKNetBlock",
    "audio_to_map",
    "classify_images",
    "default_kernel_sizes",
    "layer_decay_scales",
    "log_mel",
    "unireplknet_a",
    "unireplknet_b",
    "unireplknet_f",
    "unireplknet_l",
    "unireplknet_n",
    "unireplknet_p",
    "unireplknet_s",
    "unireplknet_t",
    "unireplknet_xl",
    "video_to_map",
    "view_rotations",
]


def unireplknet_a(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-A (4.437 M parameters fused, 0.640 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"depths": (2, 2, 6, 2), "dims": (40, 80, 160, 320), **overrides})


def unireplknet_f(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-F (6.235 M parameters fused, 0.905 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"depths": (2, 2, 6, 2), "dims": (48, 96, 192, 384), **overrides})


def unireplknet_p(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-P (10.742 M parameters fused, 1.573 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), **overrides})


def unireplknet_n(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-N (18.319 M parameters fused, 2.767 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"depths": (2, 2, 8, 2), "dims": (80, 160, 320, 640), **overrides})


def unireplknet_t(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-T (31.038 M parameters fused, 4.899 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"depths": (3, 3, 18, 3), "dims": (80, 160, 320, 640), **overrides})


def unireplknet_s(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-S (55.646 M parameters fused, 9.094 GMAC at 224), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"dims": (96, 192, 384, 768), **overrides})


def unireplknet_b(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-B (98.008 M parameters fused, 47.18 GMAC at 384), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"dims": (128, 256, 512, 1024), **overrides})


def unireplknet_l(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-L (218.455 M parameters fused, 105.42 GMAC at 384), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"dims": (192, 384, 768, 1536), **overrides})


def unireplknet_xl(**overrides: Any) -> UniRepLKNet:
    """UniRepLKNet-XL (386.529 M parameters fused, 186.77 GMAC at 384), ``(B, 3, H, W) -> (B, 1000)``."""
    return UniRepLKNet(**{"dims": (256, 512, 1024, 2048), **overrides})
