"""Small ShiftAddViT parts and networks for the conformance suite."""

import torch
from torch import nn

from dynakern.testing import randn
from dynakern.vision import PVT, LinearAngularAttention, PVTv2, ShiftLinear
from dynakern.vision.shiftaddvit import shift_add_experts
from tests.conformance.example import Example

SMALL = {"embed_dims": (8, 16), "num_heads": (1, 2), "mlp_ratios": (2, 2), "depths": (1, 1), "num_classes": 4}
CODES = {"bits": 4, "num_anchors": 3, "topk": 2}


def tokens(dtype):
    return (randn(2, 12, 8, dtype=dtype, requires_grad=False),)


def image(size):
    return lambda dtype: (randn(2, 3, size, size, dtype=dtype, requires_grad=False),)


def fitted(model, size):
    model.fit_hashing(torch.randn(2, 3, size, size))
    return model


def reduced():
    return PVTv2(**SMALL, sr_ratios=(2, 1), attention="reduced")


EXAMPLES = [
    Example(name="shift-ps", build=lambda: ShiftLinear(8, 6), inputs=tokens),
    Example(name="shift-q", build=lambda: ShiftLinear(8, 6, mode="q"), inputs=tokens),
    Example(name="experts", build=lambda: nn.Sequential(shift_add_experts(8, 6)), inputs=tokens),
    Example(name="binary", build=lambda: LinearAngularAttention(8, 2, codes="binary"), inputs=tokens),
    Example(name="baseline", build=reduced, inputs=image(16), image=True),
    Example(
        name="pvt-v2",
        build=lambda: fitted(PVTv2(**SMALL, **CODES, moe_mlp=True, drop_path_rate=0.1), 16),
        inputs=image(16),
        image=True,
    ),
    Example(
        name="pvt",
        build=lambda: PVT(**SMALL, img_size=16, attention="binary", moe_mlp=True, gate="naive", combine="logexp"),
        inputs=image(24),
        image=True,
        unused=("block1.0.mlp.gate", "block2.0.mlp.gate"),  # nothing differentiable depends on this gate
    ),
]
