"""Replay InceptionNeXt's goldens: whole networks in eval and train mode, and a mixer inside one of them."""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.vision import InceptionNeXt


def replay(case, config, params, inputs):
    channels = params["stem.0.weight"].shape
    model = InceptionNeXt(
        config["depths"],
        config["dims"],
        in_chans=channels[1],
        patch_size=channels[2],
        num_classes=params["head.fc2.weight"].shape[0] if "head.fc2.weight" in params else 0,
        mlp_ratios=config["mlp_ratios"],
        layer_scale=1e-6 if any(key.endswith(".gamma") for key in params) else None,
        **config.get("token_mixer", {}),
    )
    load_official(model, params)
    return _train(model, inputs) if config.get("mode") == "train" else _eval(model.eval(), inputs["x"])


def _eval(model, x):
    seen = {}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):

            def keep(module, arguments, output, name=f"stage{i}_block{j}"):
                seen.update({f"{name}_in": arguments[0], f"{name}_mixer": output})

            block.token_mixer.register_forward_hook(keep)
    with torch.no_grad():
        features = model.forward_features(x)
        return {"features": features, "logits": model.forward_head(features), **seen}


def _train(model, inputs):
    x = inputs["x"].clone().requires_grad_()
    logits = model.train()(x)
    (logits * inputs["grad_out"]).sum().backward()
    outputs = {"logits": logits, "grad_x": x.grad}
    outputs |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return outputs | {f"buffer_after.{name}": b for name, b in model.named_buffers()}


def tolerance(key):
    # Biases before a norm have no gradient but rounding noise: 1e-5 beside gradients of the order of 1.
    return (1e-3, 1e-4, 1e-5) if key.startswith("grad") else (1e-4, 1e-5, 0.0)
