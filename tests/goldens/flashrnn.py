"""Replay the goldens of FlashRNN: the four cells with their gradients, constraint texts, tilings of fused kernels."""

from __future__ import annotations

import torch

from dynakern.ops import flash_rnn
from dynakern.ops.constrint import Infeasible, autotune, solutions, solve


def tolerance(key: str) -> tuple[float, float, float]:
    if key.rpartition(".")[2] in ("states", "last") or ".grad_" in key:
        return 1e-4, 0.0, 1e-5
    return 0.0, 0.0, 0.0


def replay(case, config, params, inputs):
    if "gpus" in config:
        return tilings(config)
    if any(isinstance(value, dict) and "text" in value for value in config.values()):
        return texts(config)
    return networks(config, inputs)


def networks(config, inputs):
    outputs = {}
    for group in sorted({key.rpartition(".")[0] for key in inputs}):
        found = {key.rpartition(".")[2]: value for key, value in inputs.items() if key.rpartition(".")[0] == group}
        leaves = {k: found[k].clone().requires_grad_() for k in ("Wx", "R", "b", "states") if k in found}
        options = {}
        if config.get("gradient_recurrent_cut"):
            options["recurrent_gradient"] = False
        if config.get("gradient_recurrent_clipval"):
            options["gradient_clip"] = config["gradient_recurrent_clipval"]
        states, last = flash_rnn(
            leaves["Wx"],
            leaves["R"],
            leaves.get("b"),
            leaves.get("states"),
            function=group.partition(".")[0] if group else config["function"],
            return_states=True,
            **options,
        )
        prefix = group + "." if group else ""
        outputs |= {prefix + "states": states, prefix + "last": last}
        if "w_out" in found or "w_last" in found:
            loss = (states[0] * found["w_out"][0]).sum() if "w_out" in found else 0.0
            loss = loss + (last * found["w_last"]).sum() if "w_last" in found else loss
            grads = torch.autograd.grad(loss, list(leaves.values()))
            outputs |= {f"{prefix}grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return outputs


def rows(found, names):
    return torch.tensor([[solution[name] for name in names] for solution in found], dtype=torch.int64).reshape(
        -1, len(names)
    )


def texts(config):
    outputs = {}
    for label, problem in config.items():
        if not isinstance(problem, dict) or "text" not in problem:
            continue
        names = [name for name, _ in problem["order"]]
        order = [name + (":largest" if which == "L" else "") for name, which in problem["order"]]
        try:  # the authors' solver ignores parentheses
            first = [solve(problem["text"], order=order, parentheses="strip")]
        except Infeasible:
            first = []
        outputs[f"{label}.first"] = rows(first, names)
        outputs[f"{label}.all"] = rows(solutions(problem["text"], order=order, parentheses="strip"), names)
    return outputs


def tilings(config):
    outputs = {}
    for label, problem in config.items():
        if isinstance(problem, dict) and "gpu" in problem:
            options = {key: value for key, value in problem.items() if key != "gpu"}
            try:
                macros = autotune(device=config["gpus"][problem["gpu"]], **options).macros()
                outputs[label] = torch.tensor([macros[name] for name in config["names"]])
            except Infeasible:
                outputs[label] = torch.zeros(0, dtype=torch.int64)
    return outputs
