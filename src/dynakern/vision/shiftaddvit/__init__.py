r"""ShiftAddViT: vision transformers that shift and add where others multiply.

Multiplications cost energy. Here queries and keys become codes of zeros and ones, so that attention is a masked sum of
values, run over the tokens once; weights become powers of two, so that linear maps shift; and where accuracy needs
products, a router sends each token to a map that multiplies or to one that shifts. A trained transformer is converted
and fine-tuned.

Paper: You, Shi, Guo and Lin, 2023, "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision
Transformer", arXiv:2306.06446. Official code: https://github.com/GATECH-EIC/ShiftAddViT, whose state-dict keys are
ours; the shift layers are DeepShift's, arXiv:1905.13298.

Implemented: both shift layers with a packed form and exact integer arithmetic, linear angular attention with binary
and with hashed codes and the hashes' training, the mixture with both gates, PVT and PVTv2 at all sizes, the conversion
of other transformers, and the count of operations with the authors' unit costs. Left out: sums of two powers, the
sparse regulariser (broken in the official code), the search over memory tilings, the attentions compared with
(Performer, EcoFormer), DeiT and NeRF networks, which were not released. The official code's quirks are options: the
untrained gate ``gate="naive"``, outputs combined by ``combine="logexp"``, thresholds that couple the images of a
batch, ``threshold="batch"``.

Example:
    >>> import torch
    >>> layer = ShiftLinear(8, 4, mode="q").eval()
    >>> packed, x = layer.pack(), torch.randn(3, 8)
    >>> torch.allclose(packed(x), layer(x)), packed.codes.dtype
    (True, torch.int8)
    >>> torch.allclose(packed.forward_shift(x).float(), layer(x), rtol=0, atol=8 * 2**-16)
    True
"""

from __future__ import annotations

from dynakern.vision.shiftaddvit.attention import (
    KernelHash,
    LinearAngularAttention,
    ReducedAttention,
    SoftmaxAttention,
    binary_codes,
    masked_sums,
)
from dynakern.vision.shiftaddvit.convert import UNIT_COSTS, EnergyReport, convert_to_shiftadd, energy_report
from dynakern.vision.shiftaddvit.linear import (
    Experts,
    NaiveGate,
    NoisyGate,
    PackedShiftLinear,
    ShiftLinear,
    shift_add_experts,
    to_fixed_point,
)
from dynakern.vision.shiftaddvit.network import (
    PVT,
    PVTv2,
    classify_images,
    convert_state_dict,
    pvt_large,
    pvt_medium,
    pvt_small,
    pvt_tiny,
    pvt_v2_b0,
    pvt_v2_b1,
    pvt_v2_b2,
    pvt_v2_b3,
    pvt_v2_b4,
    pvt_v2_b5,
)

__all__ = [
    "PVT",
    "UNIT_COSTS",
    "EnergyReport",
    "Experts",
    "KernelHash",
    "LinearAngularAttention",
    "NaiveGate",
    "NoisyGate",
    "PVTv2",
    "PackedShiftLinear",
    "ReducedAttention",
    "ShiftLinear",
    "SoftmaxAttention",
    "binary_codes",
    "classify_images",
    "convert_state_dict",
    "convert_to_shiftadd",
    "energy_report",
    "masked_sums",
    "pvt_large",
    "pvt_medium",
    "pvt_small",
    "pvt_tiny",
    "pvt_v2_b0",
    "pvt_v2_b1",
    "pvt_v2_b2",
    "pvt_v2_b3",
    "pvt_v2_b4",
    "pvt_v2_b5",
    "shift_add_experts",
    "to_fixed_point",
]
