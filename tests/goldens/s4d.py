"""Replay the goldens of S4D: initial values, the diagonal kernel in both views, the minimal layer, the full block."""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.sequence import S4D
from dynakern.sequence.s4d import S4DKernel, hippo, hippo_diagonal, ssm_init

# Options of the official constructors that have the same name and meaning here.
KERNEL_OPTIONS = (
    *("dt_min", "dt_max", "dt_tie", "dt_transform", "real_transform", "imag_transform", "n_ssm", "l_max", "bandlimit"),
    *("real_scale", "imag_scale", "disc"),
)


def tolerance(key: str) -> tuple[float, float, float]:
    if key.startswith("N"):
        return (1e-4, 0.0, 1e-12) if ".legs." in key else (1e-5, 0.0, 1e-12)
    return 1e-4, 2e-5, 0.0


def replay(case, config, params, inputs):
    if "Ns" in config:
        return init_values(config["Ns"])
    if "kernel.log_dt" in params:
        return minimal(config, params, inputs)
    if "x" in inputs or "output_linear.0.weight" in params:
        return block(config, params, inputs)
    return kernels(config, params, inputs)


def init_values(sizes):
    outputs = {}
    for n in sizes:
        for init in ("lin", "inv", "inv2", "quad", "legs", "real"):
            outputs[f"N{n}.{init}.A"] = torch.view_as_real(ssm_init(init, n)[0])
        _, b, p = hippo_diagonal("legs", n)
        dense_a, dense_b, _ = hippo("legs", n)
        outputs |= {
            f"N{n}.legs.absB": torch.from_numpy(abs(b)),
            f"N{n}.legs.absP": torch.from_numpy(abs(p[:, 0])),
            f"N{n}.hippo_legs.A": torch.from_numpy(dense_a),
            f"N{n}.hippo_legs.B": torch.from_numpy(dense_b),
        }
    return outputs


def options(config):
    found = {name: config[name] for name in KERNEL_OPTIONS if config.get(name) is not None}
    if "init" in config:
        found["init"] = config["init"].removeprefix("diag-")
    return found


def kernels(config, params, inputs):
    length, rate = config["L"], config.get("rate", 1.0)
    outputs = {}
    for init in sorted({key.split(".")[0] for key in params}):
        weights = {key.removeprefix(init + "."): value for key, value in params.items() if key.startswith(init + ".")}
        for disc in ("zoh", "bilinear", "dss"):
            settings = {**options(config), "disc": disc, "init": init.removeprefix("diag-")}
            kernel = S4DKernel(config["d_model"], config["d_state"], channels=config.get("channels", 1), **settings)
            load_official(kernel, weights)
            name = f"{init}.{disc}"
            with torch.no_grad():
                outputs[f"{name}.K"] = kernel(length)
                outputs[f"{name}.K_rate"] = kernel(length, rate=rate)
                if disc == "dss" or "state" not in inputs:
                    continue
                state = torch.view_as_complex(inputs["state"].contiguous())
                outputs[f"{name}.K_state"] = kernel(length, state=state)[1]
                outputs[f"{name}.next_state"] = torch.view_as_real(kernel.next_state(inputs["u"], state))
                outputs[f"{name}.step_y"] = steps(kernel, inputs["u"], state)
    return outputs


def steps(kernel, u, state):
    log_a, b, c = kernel.discretise()
    a, outputs = torch.exp(log_a), []
    for column in u.unbind(-1):
        state = a * state + b * column.unsqueeze(-1)
        outputs.append(2 * torch.einsum("chm,bhm->bch", c, state).real)
    return torch.stack(outputs, -1)


def minimal(config, params, inputs):
    layer = S4D(config["d_model"], config["d_state"], transposed=config.get("transposed", True)).eval()
    load_official(layer, params)
    with torch.no_grad():
        return {"k": layer.layer.kernel(inputs["u"].shape[-1])[0], "y": layer(inputs["u"])}


def block(config, params, inputs):
    settings = {
        k: config[k] for k in ("channels", "bidirectional", "activation", "final_act") if config.get(k) is not None
    }
    transposed = config.get("transposed", True)
    layer = S4D(
        config["d_model"], config.get("d_state", 64), transposed=transposed, **settings, **options(config)
    ).eval()
    load_official(layer, params)
    x = inputs["x"]
    with torch.no_grad():
        rate = {"rate": config["rate"]} if "rate" in config else {}
        outputs = {"y": layer(x, **rate)}
        length = x.shape[-1] if transposed else x.shape[1]
        outputs["y_lengths_minus5"] = layer(x, lengths=torch.full((len(x),), length - 5))
        if "state" in inputs:
            state = torch.view_as_complex(inputs["state"].contiguous())
            outputs["y_from_state"], following = layer(x, state=state)
            outputs["next_state"] = torch.view_as_real(following)
            recurrence, stepped = layer.recurrent(), []
            for column in x.unbind(-1 if transposed else 1):
                y, state = recurrence.step(column, state)
                stepped.append(y)
            outputs["y_step"] = torch.stack(stepped, -1 if transposed else 1)
    return outputs
