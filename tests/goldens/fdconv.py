"""Replay the goldens of FDConv: the layer with its gates, its bands, its output and its gradients."""

from __future__ import annotations

import torch

from dynakern.models import load_official
from dynakern.vision import FDConv
from dynakern.vision.fdconv import BandModulation

UNUSED = ("input", "mode", "fbm_cfg", "use_fdconv_if_stride_in", "att_grid", "linear_mode", "spatial_freq_decompose")
BANDS = ("k_list", "lowfreq_att", "spatial_group", "spatial_kernel")


def tolerance(key: str) -> tuple[float, float, float]:
    return (1e-3, 1e-4, 0.0) if key.startswith("grad") else (1e-4, 2e-5, 0.0)


def bands(config):
    options = {key: config[key] for key in BANDS if key in config}
    return options | ({"mask": tuple(config["max_size"])} if "max_size" in config else {})


def build(config, inputs):
    options = {key: value for key, value in config.items() if key not in UNUSED}
    if "use_fdconv_if_c_gt" in options:
        options["min_channels"] = options.pop("use_fdconv_if_c_gt")
    if "fbm_cfg" in config:
        options |= bands(config["fbm_cfg"])
        options["fbm_act"] = config["fbm_cfg"].get("act", "sigmoid")
    for key, value in options.items():
        options[key] = tuple(value) if isinstance(value, list) else value
    return FDConv(**options, indices=inputs.get("indices"))


def replay(case, config, params, inputs):
    x = inputs["x"].clone().requires_grad_("grad_out" in inputs)
    train = config.get("mode") == "train"
    if "out_channels" not in config:  # the modulation of the bands alone
        layer = load_official(BandModulation(x.shape[1], act=config.get("act", "sigmoid"), **bands(config)), params)
        return {"y": layer(x), "fbm": layer(x)}
    layer = build(config, inputs).train(train)
    if config.get("linear_mode") and not layer.convert_param:
        params = {**params, "weight": params["weight"].view_as(layer.weight)}
    load_official(layer, params)
    with torch.set_grad_enabled("grad_out" in inputs):
        y = layer(x)
    outputs = {"y": y}
    if "grad_out" in inputs:
        named = dict(layer.named_parameters())
        grads = torch.autograd.grad((y * inputs["grad_out"]).sum(), [x, *named.values()], allow_unused=True)
        outputs["grad_x"] = grads[0]
        outputs |= {f"grad.{name}": grad for name, grad in zip(named, grads[1:], strict=True) if grad is not None}
    if layer.dynamic and not train:
        outputs |= gates(layer, x)
    return outputs


def gates(layer, x):
    outputs = {}
    with torch.no_grad():
        g = x.mean((2, 3), keepdim=True)
        gate, B = layer.KSM_Global(g), len(x)
        shapes = {"channel": (B, 1, 1, -1, 1, 1), "filter": (B, 1, -1, 1, 1, 1), "kernel": (B, -1, 1, 1, 1, 1)}
        shapes["spatial"] = (B, 1, 1, 1, *layer.kernel_size)
        for name, shape in shapes.items():
            if getattr(gate, name) is not None:
                outputs[f"att_{name}"] = getattr(gate, name).view(shape)
        if hasattr(layer, "KSM_Local"):
            z = layer.KSM_Local(g)  # (B, O, k, I, k)
            outputs["ksm_local_logit"] = z.permute(0, 3, 1, 2, 4).reshape(B, 1, layer.in_channels, -1)
        if hasattr(layer, "FBM"):
            outputs["fbm"] = layer.FBM(x)
    return outputs
