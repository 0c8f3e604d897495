"""Replay LSNet's goldens: the aggregation, one convolution in eval and train mode, and a whole network."""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.ops import ska
from dynakern.vision import LSConv, LSNet


def replay(case, config, params, inputs):
    if not params:
        return _operator(inputs)
    return _network(config, params, inputs) if "embed_dim" in config else _convolution(config, params, inputs)


def _operator(inputs):
    x, w = inputs["x"].requires_grad_(), inputs["w"].requires_grad_()
    y = ska(x, w)
    outputs = {"y": y}
    if "grad_out" in inputs:
        y.backward(inputs["grad_out"])
        outputs |= {"grad_x": x.grad, "grad_w": w.grad}
    return outputs


def _convolution(config, params, inputs):
    model = LSConv(config["dim"], **{k: config[k] for k in ("lks", "sks", "groups") if k in config})
    load_official(model, params)
    x = inputs["x"].clone().requires_grad_()
    with torch.no_grad():
        outputs = {"lkp_eval": model.eval().lkp(x), "y_eval": model(x)}
    y = model.train()(x)
    if "grad_out" in inputs:
        (y * inputs["grad_out"]).sum().backward()
        outputs |= {"grad_x": x.grad} | {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return outputs | {"y_train": y} | {f"buffer_after.{name}": b for name, b in model.named_buffers()}


def _network(config, params, inputs):
    head = params.get("head.l.weight")
    model = LSNet(
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        config["key_dim"],
        img_size=config.get("img_size", 224),
        in_chans=params["patch_embed.0.c.weight"].shape[1],
        num_classes=0 if head is None else len(head),
        patch_size=config.get("patch_size", 8),
        distillation=any(key.startswith("head_dist.") for key in params),
    )
    load_official(model, params).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(inputs["x"])
        return {"logits": model.forward_head(maps[-1])} | {f"stage{i + 1}": m for i, m in enumerate(maps)}


def tolerance(key):
    # A bias before a norm has no gradient but rounding noise: 1e-4 beside gradients of the order of 50.
    return (1e-3, 1e-4, 1e-4) if key.startswith("grad") else (1e-4, 1e-5, 0.0)
