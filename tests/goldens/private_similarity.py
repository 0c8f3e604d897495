"""Replay the private-similarity goldens: releases are pure functions of data and noise, queries of releases."""

from __future__ import annotations

import re

import numpy as np
import torch

from dynakern.similarity.private import (
    count_sum_distance,
    fgt_similarity,
    moment_distance,
    release_centroids,
    release_count_sums,
    release_fgt,
    release_moments,
    release_rff,
    release_tree,
    rff_similarity,
    tree_distance,
)

KERNELS = {
    "exp(-||x-y||^2)": lambda x, y: np.exp(-((x[None] - y[:, None]) ** 2).sum(-1)).mean(1),
    "exp(-||x-y||)": lambda x, y: np.exp(-np.sqrt(((x[None] - y[:, None]) ** 2).sum(-1))).mean(1),
    "exp(-||x-y||_1)": lambda x, y: np.exp(-np.abs(x[None] - y[:, None]).sum(-1)).mean(1),
}


def _kde(sketch, answer, config, x, y, noise, averaged=True):
    scale = 1.0 if averaged else len(x)
    clean = sketch(x, 0.0) * scale
    return {
        "sketch": clean,
        "kde_sketch": answer(clean, y),
        "kde_private": answer(clean + noise, y),
        "kde_exact": KERNELS[config.get("kernel", "exp(-||x-y||^2)")](x, y) * scale,
    }


def _features(config, inputs):
    omega, shift = inputs["omega"], inputs["shift"]
    return _kde(
        lambda x, noise: release_rff(x, omega, shift, noise),
        lambda sketch, y: rff_similarity(sketch, y, omega, shift),
        config,
        inputs["x"],
        inputs["y"],
        inputs["noise"],
        config.get("averaged", True),
    )


def _transform(config, inputs):
    options = {"width": int(config["coordinate_range"]), "order": int(config["rho"])}
    return _kde(
        lambda x, noise: release_fgt(x, noise, **options),
        lambda sketch, y: fgt_similarity(sketch, y, **options),
        config,
        inputs["x"],
        inputs["y"],
        inputs["noise"],
        config.get("averaged", True),
    )


def _tree(config, inputs):
    x, y, noise = inputs["x"], inputs["y"], inputs["noise"]
    grid = {"bounds": (0.0, float(config.get("R", 1.0))), "grid_size": int(config.get("n_grid", len(x)))}
    alphas = np.atleast_1d(inputs.get("alpha", np.asarray(config.get("alphas", [0.1]))))
    outputs, gaps = {}, np.abs(x[None] - y[:, None])
    if noise.ndim == 3:  # counts and sums
        for label, draw in (("noiseless", 0.0), ("private", noise)):
            outputs[f"l1_{label}"] = count_sum_distance(release_count_sums(x, draw, **grid), y, **grid)
        return outputs | {"exact_l1": gaps.sum((1, 2))}
    outputs["counts"] = release_tree(x, 0.0, **grid)
    powers = {"l1": 1.0, "l2pow": 2.0, "lppow": float(config.get("p", 2.0)), "lp": float(config.get("p", 2.0))}
    powers |= {f"l{p}pow": float(p) for p in range(1, 9)}
    for label, draw in (("noiseless", 0.0), ("private", noise)):
        tree = release_tree(x, draw, **grid)
        for name, p in powers.items():
            found = [tree_distance(tree, y, alpha=float(a), p=p, **grid) for a in alphas]
            outputs[f"{name}_{label}"] = np.stack(found)
    for name, p in powers.items():
        outputs[f"exact_{name}"] = (gaps**p).sum((1, 2))
    return outputs


def _moments(config, inputs):
    x, y, noise = inputs["x"], inputs["y"], inputs["noise"]
    grid = {"bounds": (0.0, float(config.get("R", 1.0))), "grid_size": int(config.get("n_grid", 1 << 20))}
    outputs = {"exact": ((x[None] - y[:, None]) ** 2).sum((1, 2))}
    for label, draw in (("noiseless", 0.0), ("private", noise)):
        outputs[label] = moment_distance(release_moments(x, draw, **grid), y, **grid)
    return outputs


def _centroids(inputs):
    labels = inputs["labels"].astype(int)
    noise = inputs["sum_noise"], inputs["count_noise"]
    return {"centroids": release_centroids(inputs["x"], labels, *noise, num_classes=len(noise[1]))}


def replay(case, config, params, inputs):
    """Tell the structure by the keys present."""
    arrays = {key: value.numpy() for key, value in inputs.items()}
    if "omega" in arrays:
        found = _features(config, arrays)
    elif "coordinate_range" in config:
        found = _transform(config, arrays)
    elif "labels" in arrays:
        found = _centroids(arrays)
    elif re.search(r"tree|bucket", str(config)) or arrays["noise"].ndim > 1:
        found = _tree(config, arrays)
    else:
        found = _moments(config, arrays)
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in found.items()}


def tolerance(key):
    """As the folder's README says."""
    return (1e-9, 0.0, 1e-11)
