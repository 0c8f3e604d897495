"""Replay the selective scan, the Mamba block and SS2D against ``state-spaces/mamba`` and ``MzeroMiko/VMamba``."""

from __future__ import annotations

import torch
from torch import nn

from dynakern.layers import SS2D, Mamba
from dynakern.models import load_official
from dynakern.ops import selective_scan

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
# Arguments of the official constructors that choose a kernel or an initial value, not a result.
IGNORED = ("use_fast_path", "layer_idx", "initialize", "device", "dtype", "seed")


def _with_gradients(outputs, cotangents, leaves):
    """Add ``grad_<name>`` of every leaf for the cotangents that the file has."""
    given = {name: g for name, g in cotangents.items() if g is not None}
    if given:
        ends = [outputs[name] for name in given]
        found = torch.autograd.grad(ends, list(leaves.values()), list(given.values()), allow_unused=True)
        outputs |= {f"grad_{k}": g for k, g in zip(leaves, found, strict=True) if g is not None}
    return outputs


def _scan(config, inputs):
    leaves = {name: inputs[name].clone().requires_grad_() for name in SCAN if name in inputs}
    y, last = selective_scan(
        **leaves, delta_softplus=config.get("delta_softplus", False), return_last_state=True, backend="cpu"
    )
    outputs = {"y": y, "last_state": last}
    return _with_gradients(outputs, {"y": inputs.get("grad_y"), "last_state": inputs.get("grad_last_state")}, leaves)


def _layer(cls, config, params):
    config = {k: v for k, v in config.items() if k not in IGNORED}
    if isinstance(config.get("act_layer"), str):
        config["act_layer"] = ACTIVATIONS[config["act_layer"].lower()]
    return load_official(cls(**config), params).eval()


def _module(config, params, inputs):
    model = _layer(SS2D if "x_proj_weight" in params else Mamba, config, params)
    x = inputs["x"].clone().requires_grad_()
    outputs = {"y": model(x)}
    if isinstance(model, Mamba):
        state, steps = model.init_state(len(x)), []
        for x_t in x.detach().unbind(1):
            y_t, state = model.step(x_t, state)
            steps.append(y_t)
        outputs |= {"y_step": torch.stack(steps, 1), "conv_state": state.conv, "ssm_state": state.ssm}
    return _with_gradients(outputs, {"y": inputs.get("grad_y")}, {"x": x, **dict(model.named_parameters())})


def replay(case, config, params, inputs):
    return _module(config, params, inputs) if params else _scan(config, inputs)


def tolerance(key):
    return (0.0, 5e-5, 0.0) if key.startswith("grad_") else (0.0, 2e-5, 0.0)
