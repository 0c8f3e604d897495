"""Replay UniRepLKNet's goldens: blocks, merging, a network, and the maps of the other modalities."""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.vision import UniRepLKNet
from dynakern.vision.unireplknet import (
    DilatedReparamBlock,
    PointProjection,
    StationForecaster,
    UniRepLKNetBlock,
    video_to_map,
)


def replay(case, config, params, inputs):
    if "video" in inputs:
        return {"map": video_to_map(inputs["video"], layout="raw")}
    if "points" in inputs:
        return _points(config, params, inputs["points"])
    if "stations" in inputs:
        return _series(config, params, inputs)
    if any(".lk_origin" in key and key.startswith("k") for key in params):
        return _merging(params, inputs)
    if "ffn_factor" in config or ("dim" in config and "dims" not in config):
        return _block(config, params, inputs)
    return _network(config, params, inputs)


def _part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _points(config, params, points):
    sizes = {name: config[name] for name in ("trans_dim", "graph_dim", "img_size", "obj_size", "num_views")}
    fusion = config.get("atten_fusion", False)
    projection = PointProjection(num_neighbors=config["local_size"], fusion=fusion, **sizes)
    load_official(projection, params).eval()
    with torch.no_grad():
        return {"rotated_points": projection.rotate(points), "image": projection(points)}


def _series(config, params, inputs):
    names = ("seq_len", "label_len", "pred_len", "d_model", "n_heads", "map_hw", "dims", "kernel_sizes", "moving_avg")
    layers = {key.split(".")[2] for key in params if key.startswith("decoder.layers.")}
    model = StationForecaster(
        config["node_list"],
        config["enc_in"],
        depths=[len(sizes) for sizes in config["kernel_sizes"]],
        factor=config.get("factor_temporal", 1),
        dec_layers=len(layers),
        dec_tcn_layers=config.get("dec_tcn_layers", 1),
        time_features=inputs["x_mark"].shape[-1],
        **{name: config[name] for name in names},
    )
    affine = {name: inputs[name] for name in ("affine_weight", "affine_bias")}
    load_official(model, params | affine).eval()
    with torch.no_grad():
        return model.parts(inputs["x"], inputs["x_mark"], inputs["y_mark"], inputs["stations"])


def _merging(params, inputs):
    outputs = {}
    for prefix in sorted({key.split(".")[0] + "." for key in params}):
        own = _part(params, prefix)
        channels, _, size, _ = own["lk_origin.weight"].shape
        block = load_official(DilatedReparamBlock(channels, size), own).eval()
        weight, bias = block.merged()
        outputs |= {f"{prefix}y": block(inputs[f"{prefix}x"])}  # branch by branch, since gradients are on
        outputs |= {f"{prefix}merged_weight": weight, f"{prefix}merged_bias": bias}
    return outputs


def _block(config, params, inputs):
    block = UniRepLKNetBlock(
        config["dim"],
        config["kernel_size"],
        ffn_factor=config.get("ffn_factor", 4),
        layer_scale_init_value=1e-6 if "gamma" in params else None,
        deploy="dwconv.lk_origin.bias" in params or "dwconv.bias" in params,
    )
    load_official(block, params)
    x = inputs["x"].clone().requires_grad_()
    if "grad_out" not in inputs:
        return {"y": block.eval()(x)}
    y = block.train()(x)
    (y * inputs["grad_out"]).sum().backward()
    outputs = {"y": y, "grad_x": x.grad} | {f"grad.{name}": p.grad for name, p in block.named_parameters()}
    return outputs | {f"buffer_after.{name}": b for name, b in block.named_buffers()}


def build_network(config, params, **options):
    return UniRepLKNet(
        config.get("depths", [len(k) for k in config["kernel_sizes"]]),
        config["dims"],
        kernel_sizes=config.get("kernel_sizes"),
        in_chans=params["downsample_layers.0.0.weight"].shape[1],
        num_classes=params["head.weight"].shape[0] if "head.weight" in params else 0,
        layer_scale_init_value=1e-6 if any(key.endswith(".gamma") and ".act." not in key for key in params) else None,
        deploy=any(key.endswith("lk_origin.bias") for key in params),
        **options,
    )


def _network(config, params, inputs):
    normed = "norm0.weight" in params
    model = load_official(build_network(config, params, features_only=normed), params).eval()
    x = inputs["x"]
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        outputs = {f"stage{i}": m for i, m in enumerate(maps)}
        fused = model.fuse()
        if not normed:
            outputs |= {"logits": model.forward_head(maps[-1]), "logits_after_reparam": fused(x)}
    return outputs | {f"reparam.{name}": tensor for name, tensor in fused.state_dict().items()}


def tolerance(key):
    # Biases before a norm have no gradient but rounding noise: 1e-4 beside gradients of the order of 50.
    return (1e-3, 1e-4, 1e-4) if key.startswith("grad") else (1e-4, 1e-5, 0.0)
