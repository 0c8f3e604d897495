"""Replay the goldens of TEMPO: the forward pass with its parts, the pool of prompts, and STL."""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.ops import stl
from dynakern.sequence import TEMPO
from dynakern.sequence.tempo import SeriesParts


def tolerance(key: str) -> tuple[float, float, float]:
    if key.startswith(("plain.", "robust.")):
        return 0.0, 0.0, 1e-8
    return 1e-4, 0.0, 2e-5


def replay(case, config, params, inputs):
    return decomposition(config, inputs) if "y" in inputs and not params else network(config, params, inputs)


def decomposition(config, inputs):
    outputs = {}
    for name, robust in (("plain", False), ("robust", True)):
        spans = {"seasonal": config["seasonal"], "trend": config["trend"], "low_pass": config["low_pass"]}
        parts = stl(inputs["y"], config["period"], robust=robust, **spans)
        outputs |= {f"{name}.trend": parts.trend, f"{name}.seasonal": parts.season, f"{name}.resid": parts.residual}
    return outputs


def build(config, params):
    prompt = "none" if not config.get("prompt", 1) else "pool" if config.get("pool") else "semi-soft"
    tokens = config.get("prompt_token_ids")
    gpt2, lora = config["gpt2"], config.get("lora")
    pool = {}
    if prompt == "pool":
        keys = [key for key in params if key.startswith("prompt_key_dict.")]
        pool = {"pool_size": len(keys), "pool_query": "official"}
        length = params["prompt_value_dict.prompt_value_0"].shape[0]
        assert length == 3
        if "top_k" in config:
            pool["top_k"] = config["top_k"]
    return TEMPO(
        seq_len=config["seq_len"],
        pred_len=config["pred_len"],
        patch_size=config["patch_size"],
        stride=config["stride"],
        d_model=config["d_model"],
        num_layers=config.get("gpt_layers", gpt2["n_layer"]),
        num_heads=gpt2["n_head"],
        max_positions=gpt2["n_positions"],
        prompt=prompt,
        use_token=bool(config.get("use_token", 0)),
        double_pass=prompt == "none",
        head="student-t" if "mu.weight" in params else "point",
        lora_rank=lora["r"] if lora and any("lora_A" in key for key in params) else None,
        prompt_tokens=tokens and {"trend": tokens["trend"], "season": tokens["season"], "noise": tokens["residual"]},
        **pool,
    ).eval()


def network(config, params, inputs):
    model = load_official(build(config, params), params)
    x, outputs = inputs["x"], {}
    with torch.no_grad():
        outputs["y"] = model._run(x)[0]
        if model.distribution is not None:
            outputs |= dict(zip(("mu", "sigma", "nu"), model.forecast_distribution(x), strict=True))
        normal = model.normalise(x)[0]
        outputs["moving_avg"] = model.smooth(normal)
        outputs["patches_of_trend_ma"] = model.patches(model.smooth(normal))
        if "stl_trend" in inputs:
            targets = SeriesParts(*(inputs[f"stl_{name}"] for name in ("trend", "season", "resid")))
            outputs["loss_local"] = model.decomposition_loss(model.decompose(x), targets)
        if "pool_z" in inputs:
            prompts, picked, similarity = model.pool(inputs["pool_z"])
            outputs |= {"pool_prompt": prompts, "pool_reduce_sim": similarity}
            outputs["pool_selected_sorted"] = picked.sort(-1).values
    return outputs
