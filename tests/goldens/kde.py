"""Replay the kernel-density goldens: scikit-learn's log densities, phases, exact means at finite n.

The log densities were made by scikit-learn's default tree, which cancels in 16 dimensions: some stand 11 nats off and
some are finite where no point is near. They are replayed through ``algorithm="tree"``, which is that tree; the exact
algorithm is held against scikit-learn's exact sums on the same data in ``tests/similarity/test_density.py``.
"""

from __future__ import annotations

import numpy as np
import torch

from dynakern.similarity import HighDimKDE, kde_phases
from dynakern.similarity.density import expected_log_partition, expected_participation


def _scores(config, inputs):
    data, query = inputs["data"].numpy(), inputs["query"].numpy()
    outputs = {}
    for kernel in config["kernels"]:
        rows = [HighDimKDE(kernel, float(h), "tree").fit(data).score_samples(query) for h in inputs["bandwidth"]]
        outputs[f"logdens_{kernel}"] = np.stack(rows)
    return outputs


def _phases(inputs):
    outputs = {}
    ratios = inputs["h_over_hG"].numpy()
    for key in [key for key in inputs if key.startswith("spectrum")]:
        found = [kde_phases(float(alpha), inputs[key].numpy()) for alpha in inputs["alpha"]]
        i = key.removeprefix("spectrum")
        outputs[f"t_{i}"] = [p.t for p in found]
        outputs[f"hG_{i}"] = [p.h_g for p in found]
        outputs[f"hCLT_{i}"] = [p.h_clt for p in found]
        outputs[f"hopt_{i}"] = [p.h_opt for p in found]
        outputs[f"kl_{i}"] = np.stack([p.kl(ratios * p.h_g) for p in found])
        outputs[f"mu_{i}"] = np.stack([p.mu(ratios * p.h_g) for p in found])
    return outputs


def _finite(config, inputs):
    setting = {"n": config["n"], "d": config["d"], "x_norm2": config["x_norm2"], "sigma2": config.get("sigma2", 1.0)}
    bandwidths = [float(h) for h in inputs["h"]]
    return {
        "ElnZ": [expected_log_partition(h, **setting) for h in bandwidths],
        "Y2": [expected_participation(h, **setting) for h in bandwidths],
    }


def replay(case, config, params, inputs):
    """Compute what the file is about, told by its keys."""
    if "query" in inputs:
        outputs = _scores(config, inputs)
    elif "alpha" in inputs:
        outputs = _phases(inputs)
    else:
        outputs = _finite(config, inputs)
    return {key: torch.as_tensor(np.asarray(value, dtype=np.float64)) for key, value in outputs.items()}


def tolerance(key):
    """As the folder's README says."""
    if key.startswith("logdens"):
        return 1e-9, 0.0, 0.0
    if key in ("ElnZ", "Y2"):
        return 1e-4, 0.0, 0.0
    return 1e-8, 0.0, 1e-12
