"""Replay RepLKNet's goldens: maps, logits, merged kernels, and the effective receptive field of a network."""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.lens import effective_receptive_field
from dynakern.vision import RepLKNet


def replay(case, config, params, inputs):
    head = params.get("head.weight")
    depthwise = next(
        v for k, v in params.items() if ".blocks.0.large_kernel." in k and k.endswith("weight") and v.ndim == 4
    )
    model = RepLKNet(
        config["large_kernel_sizes"],
        config["layers"],
        config["channels"],
        in_chans=params["stem.0.conv.weight"].shape[1],
        num_classes=0 if head is None else len(head),
        small_kernel=config.get("small_kernel"),
        dw_ratio=config.get("dw_ratio", len(depthwise) / config["channels"][0]),
        ffn_ratio=config.get("ffn_ratio", 4),
        merged=any(".lkb_reparam." in key for key in params),
    )
    load_official(model, params).eval()
    x = inputs["x"]
    with torch.no_grad():
        features = model.forward_features(x)
        outputs = {"features": features, "logits": model.forward_head(features)}
    field = effective_receptive_field(model.forward_features, x)
    rows = [[t, field.side(t) or -1, field.ratio(t) or -1] for t in (0.2, 0.3, 0.5, 0.99)]
    outputs |= {"erf_contribution": field.contributions, "erf_side_and_ratio": torch.tensor(rows, dtype=torch.float64)}
    merged = model.fuse().state_dict()
    return outputs | {f"reparam.{k}": v for k, v in merged.items() if ".lkb_reparam." in k}


def tolerance(key):
    return (0.0, 0.0, 1e-9) if key == "erf_side_and_ratio" else (1e-4, 1e-5, 0.0)
