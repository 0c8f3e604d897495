"""Replay the goldens of ShiftAddViT: shift layers, mixtures, attentions, a small network, with official quirks."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from dynakern.models import load_official
from dynakern.vision.shiftaddvit import (
    PVT,
    Experts,
    LinearAngularAttention,
    NaiveGate,
    NoisyGate,
    PVTv2,
    ShiftLinear,
    shift_add_experts,
)


def tolerance(key: str) -> tuple[float, float, float]:
    return (1e-3, 1e-4, 0.0) if ".grad_" in key else (1e-4, 2e-5, 0.0)


def parts(params):
    """Split parameters by the first word of their names."""
    split = {}
    for key, value in params.items():
        name, _, rest = key.partition(".")
        split.setdefault(name, {})[rest] = value
    return split


def replay(case, config, params, inputs):
    if "patch_embed1.proj.weight" in params:
        return network(config, params, inputs)
    outputs = {}
    for name, own in parts(params).items():
        if any(key.startswith("experts.") for key in own):
            found = mixture(config, own, inputs)
        elif "dconv.weight" in own:
            found = attention(config, own, inputs)
        else:
            found = shift(config, own, inputs)
        outputs |= {f"{name}.{key}": value for key, value in found.items()}
    return outputs


def shift(config, params, inputs):
    mode, names = ("ps", ("shift", "sign")) if "shift" in params else ("q", ("weight",))
    options = ("weight_bits", "act_integer_bits", "act_fraction_bits", "rounding")
    options = {key: config[key] for key in options if key in config}
    first = params[names[0]]
    layer = ShiftLinear(first.shape[1], first.shape[0], "bias" in params, mode=mode, **options)
    load_official(layer, params)
    x = inputs["x"].clone().requires_grad_()
    y = layer(x)  # in training mode, as the official layer clamps its parameter
    outputs = {"y": y, f"{names[0]}_after_clamp": getattr(layer, names[0]).detach().clone()}
    if "grad_out" in inputs:
        wanted = {"x": x, **dict(layer.named_parameters())}
        grads = torch.autograd.grad(y, list(wanted.values()), inputs["grad_out"])
        outputs |= {f"grad_{key}": grad for key, grad in zip(wanted, grads, strict=True)}
    return outputs


def mixture(config, params, inputs):
    (O, I), bias = params["experts.0.weight"].shape, "experts.0.bias" in params
    naive = "gate.gate.weight" in params
    gate = NaiveGate(I) if naive else NoisyGate(I, weigh_counts=False)
    expert = ShiftLinear(I, O, bias, weight_bits=config.get("weight_bits", 5))
    layer = load_official(Experts(gate, nn.Linear(I, O, bias), expert, combine="logexp"), params).eval()
    with torch.no_grad():
        routing = layer.gate(inputs["x"].flatten(0, -2))
        gates = F.one_hot(routing.expert, 2).float()
        gates = gates if routing.value is None else gates * routing.value[:, None]
        outputs = {"y": layer(inputs["x"]), "gates": gates}
    if routing.loss is not None:
        outputs["balance_loss"] = routing.loss.view(1)
    return outputs


def attention(config, params, inputs):
    hashed = "qk_quant.ksh.A" in params
    linear = nn.Linear
    if any(".experts." in key for key in params):
        gate = "noisy" if any(key.endswith("w_gate") for key in params) else "naive"
        bits = config.get("weight_bits", 5)
        linear = functools.partial(shift_add_experts, gate=gate, combine="logexp", weight_bits=bits)
    layer = LinearAngularAttention(
        config["dim"],
        config["num_heads"],
        codes="hash" if hashed else "binary",
        qkv_bias=any(key.startswith(("to_qk.", "qkv.")) and key.endswith("bias") for key in params),
        threshold="batch",
        bits=config.get("nbits", 16),
        num_anchors=config.get("m", 25),
        res_kernel_size=config.get("res_kernel_size", 9),
        linear=linear,
    ).eval()
    load_official(layer, {key: value for key, value in params.items() if not key.endswith("projection_matrix")})
    with torch.no_grad():
        outputs = {"y": layer(inputs["x"])}
        q, k, _ = layer.encode(inputs["x"])
    return outputs | ({"codes": q} if hashed else {"q": q, "k": k})


def network(config, params, inputs):
    block = {key.removeprefix("block1.0.attn.") for key in params if key.startswith("block1.0.attn.")}
    kind = "hash" if "qk_quant.ksh.A" in block else "binary" if "dconv.weight" in block else "softmax"
    kind = "reduced" if kind == "softmax" and any(key.startswith("q.") for key in block) else kind
    first = "cls_token" in params
    options = {key: tuple(config[key]) for key in ("embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios")}
    if first:
        options["img_size"] = config["img_size"]
    model = (PVT if first else PVTv2)(
        **options,
        in_chans=params["patch_embed1.proj.weight"].shape[1],
        num_classes=config["num_classes"],
        attention=kind,
        moe_attn=any(".experts." in key for key in block),
        moe_mlp=any(".mlp." in key and ".experts." in key for key in params),
        gate="noisy" if any(key.endswith("w_gate") for key in params) else "naive",
        combine="logexp",
        weight_bits=config.get("weight_bits", 5),
        qkv_bias=any(key.startswith(("to_qk.", "qkv.", "q.")) and key.endswith("bias") for key in block),
        threshold="batch",
        bits=config.get("nbits", 16),
        num_anchors=config.get("m", 25),
    ).eval()
    load_official(model, params)
    with torch.no_grad():
        maps = model.forward_intermediates(inputs["x"])
        outputs = {"logits": model(inputs["x"])}
    return outputs | {f"stage{i}": m.flatten(2).transpose(1, 2) for i, m in enumerate(maps, 1)}
