"""Small TEMPO networks for the conformance suite."""

import torch

from dynakern.sequence.tempo import forecaster, series_classifier, tempo_small
from dynakern.testing import randn
from tests.conformance.example import Example

SIZES = {"seq_len": 30, "pred_len": 7, "patch_size": 8, "stride": 4, "d_model": 8, "num_heads": 2, "max_positions": 64}


def window(dtype):
    return (randn(2, 30, 1, dtype=dtype, requires_grad=False),)


EXAMPLES = [
    Example(name="semi-soft", build=lambda: tempo_small(**SIZES), inputs=window),
    Example(
        name="pool",
        build=lambda: tempo_small(**SIZES, prompt="pool", pool_size=5, use_token=True),
        inputs=window,
        unused=("gpt2.wte", "pool.keys", "pool.summary"),  # no words; a choice has no gradient but through the loss
    ),
    Example(
        name="student-t",
        build=lambda: tempo_small(**SIZES, prompt="none", head="student-t"),
        inputs=window,
        unused=("gpt2.wte", "distribution.sigma", "distribution.nu"),  # forward gives the location only
    ),
    Example(
        name="lora",
        build=lambda: tempo_small(**SIZES, lora_rank=2),
        inputs=window,
        # frozen beside the adapters: everything of the transformer but the adapters and the biases of their maps
        unused=("gpt2.wte", "gpt2.wpe", "gpt2.ln_f", *(f"gpt2.h.0.{n}" for n in ("ln_", "mlp", "attn.c_proj")),
                "gpt2.h.0.attn.c_attn.base_layer.weight"),
    ),
    Example(
        name="forecast",
        build=lambda: forecaster(channels=3, context=30, horizon=7, time_features=0),
        inputs=lambda dtype: (randn(2, 30, 3, dtype=dtype, requires_grad=False),),
    ),
    Example(
        name="classify",
        build=lambda: series_classifier(channels=3, length=30, classes=4),
        inputs=lambda dtype: (randn(2, 30, 3, dtype=dtype, requires_grad=False), torch.tensor([30, 21])),
    ),
]  # fmt: skip
