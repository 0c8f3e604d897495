"""Replay TimesNet's goldens: the network of each task, one block with its periods, the embedding, and the helpers."""

from __future__ import annotations

import numpy as np
import torch

from dynakern import load_official
from dynakern.data.calendar import calendar_features
from dynakern.sequence.timesnet import TimesNet, dominant_periods
from dynakern.tasks.series_metrics import mape_loss, mase, mase_loss, point_adjust, smape, smape_loss

TASKS = {
    "long_term_forecast": "forecast",
    "short_term_forecast": "forecast",
    "imputation": "impute",
    "anomaly_detection": "anomaly",
    "classification": "classify",
}
STEPS = {"s": "1s", "t": "15m", "h": "1h", "d": "1D", "b": "1D", "w": "7D"}


def replay(case, config, params, inputs):
    return _network(config, params, inputs) if "task_name" in config else _helpers(config, inputs)


def tolerance(key):
    exact = key in ("adjusted", "block0_periods")
    return (0.0, 0.0, 0.0) if exact else (1e-4, 0.0, 2e-5)


def _network(config, params, inputs):
    task = TASKS[config["task_name"]]
    model = TimesNet(
        task,
        seq_len=config["seq_len"],
        pred_len=config["pred_len"] if task == "forecast" else 0,
        n_channels=config["enc_in"],
        num_class=config.get("num_class", 2),
        **{key: config[key] for key in ("d_model", "d_ff", "e_layers", "top_k", "num_kernels") if key in config},
        **{key: config[key] for key in ("embed", "freq", "dropout") if key in config},
    )
    model = load_official(model, params).eval()
    x, marks = inputs["x"], inputs.get("x_mark")
    with torch.no_grad():
        if task == "anomaly":
            outputs = {"y": model(x)}
        elif task == "classify":
            outputs = {"y": model(x, mask=inputs.get("padding_mask"))}
        else:
            outputs = {"y": model(x, marks, inputs["mask"] if task == "impute" else None)}
        if task != "classify":
            outputs["embedding_of_raw_x"] = model.enc_embedding(x, None if task == "anomaly" else marks)
        if "block_z" in inputs:
            z = inputs["block_z"]
            periods, weights = dominant_periods(z, config["top_k"])
            for e, block in enumerate(model.model):
                outputs |= {f"block{e}": block(z), f"block{e}_periods": periods, f"block{e}_period_weights": weights}
    return outputs


def _helpers(config, inputs):
    season = config.get("freq_mase", 1)
    outputs = {}
    if "forecast" in inputs:
        forecast, target, mask = inputs["forecast"], inputs["target"], inputs.get("mask")
        outputs |= {
            "smape_loss": smape_loss(forecast, target, mask),
            "mape_loss": mape_loss(forecast, target, mask),
            "smape_2": smape(forecast, target),
        }
        if "insample" in inputs:
            outputs["mase_loss"] = mase_loss(forecast, target, inputs["insample"], mask, season=season)
            outputs["mase_per_series"] = mase(forecast, target, inputs["insample"], season=season)
    if "gt" in inputs:
        outputs["adjusted"] = point_adjust(inputs["pred"], inputs["gt"]).astype(np.int64)
    if "start" in config:
        start = np.datetime64(config["start"], "s")
        for freq, step in STEPS.items():
            stamps = start + np.arange(50) * np.timedelta64(int(step[:-1]), step[-1])
            outputs[f"timefeat_{freq}"] = calendar_features(stamps, freq)
    return outputs
