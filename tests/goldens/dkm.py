"""Replay the deep-kernel-machine goldens: every stage, the objective with its noise at zero, its gradients."""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.similarity.deep_kernel_machine import SparseDKM, convert_state_dict


def _log_likelihood(mean, y, config):
    if y.is_floating_point():
        noise = torch.tensor(config.get("noise_var", 1.0), dtype=mean.dtype)
        return torch.distributions.Normal(mean, noise.sqrt()).log_prob(y).sum(1).mean()
    return mean.log_softmax(1)[torch.arange(len(y)), y].mean()


def replay(case, config, params, inputs):
    """Build the machine from config and keys, run its stages, and differentiate the objective."""
    numbered = any(key.split(".")[0].isdigit() for key in params)
    norms = config.get("batchnorm")
    model = SparseDKM(
        config["N"],
        config["out_features"],
        num_inducing=config["Pi"],
        layers=config["layers"],
        kernel=config["kernel"],
        dof=config["dof"],
        form="full" if numbered else "cholesky",
        taylor=config.get("taylor_objective", False),
        norms=None if norms is None else tuple(norms),
        tempered=config.get("do_tempering", numbered),
    )
    load_official(model, params)
    outputs, terms = {}, []
    state = None
    for name, state, term in model.stages(inputs["Xt"]):
        outputs |= {f"{name}.{part}": value for part, value in state._asdict().items()}
        if term is not None:
            outputs[f"{name}.obj"] = term.reshape(1)
            terms.append(term)
    mean, variance, term = model.output(state)
    outputs |= {"mean": mean, "var": variance[:, None], "output.obj": term.reshape(1)}
    total = torch.stack([*terms, term]).sum()
    objective = _log_likelihood(mean, inputs["y"], config) + total / config["num_datapoints"]
    outputs["objective_zero_noise"] = objective.reshape(1)
    objective.backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    for theirs in params:
        (name,) = convert_state_dict({theirs: params[theirs]}, model)
        if ours.get(name) is not None:
            outputs[f"grad.{theirs}"] = ours[name]
    return outputs


def tolerance(key):
    """As the folder's README says."""
    return (0.0, 1e-7, 0.0) if key.startswith("grad.") else (0.0, 1e-9, 0.0)
