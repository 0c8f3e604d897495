"""Replay HyperZZW's goldens: the whole network, a local slow net with its gradients, and Kar's trajectories."""

from __future__ import annotations

import torch

from dynakern import load_official
from dynakern.vision.terminator import Kar2, Kar3, MAGNetLocal, Terminator


def replay(case, config, params, inputs):
    if "grads" in inputs:
        return _optimiser(config, inputs)
    return _network(config, params, inputs) if "in_channel" in config else _local(config, params, inputs)


def _optimiser(config, inputs):
    outputs = {}
    lr, betas = config["lr"], config.get("betas", [0.5, 0.95])
    made = {"kar2": lambda p: Kar2([p], lr=lr, beta=config.get("beta", betas[-1] if betas else 0.95))}
    if len(betas) == 2:
        made["kar3"] = lambda p: Kar3([p], lr=lr, betas=tuple(betas))
    for name, make in made.items():
        p = torch.nn.Parameter(inputs["p0"].clone())
        optimizer, trajectory = make(p), []
        for gradient in inputs["grads"]:
            p.grad = gradient.clone()
            optimizer.step()
            trajectory.append(p.detach().clone())
        outputs[name] = torch.stack(trajectory)
    return outputs


def _local(config, params, inputs):
    net = MAGNetLocal(
        config["channels"],
        config["kernel_size"],
        config["hidden"],
        config["num_layers"],
        alpha=config.get("alpha_renorm", 1.0),
        beta=config.get("beta_renorm", 0.1),
    )
    load_official(net, params)
    assert torch.allclose(net.points().T.reshape(inputs["coords"].shape), inputs["coords"])
    x = inputs["x"].clone().requires_grad_()
    kernel = net(x)
    outputs = {"kernel": kernel}
    if "grad_out" in inputs:
        (kernel * inputs["grad_out"]).sum().backward()
        outputs |= {"grad_x": x.grad} | {f"grad.{name}": p.grad for name, p in net.named_parameters()}
    return outputs


def _network(config, params, inputs):
    channels, factors = config["in_channel"], config["factors"]
    model = Terminator(
        img_size=config["size"],
        in_chans=channels[0],
        num_classes=config["num_classes"],
        factors=factors,
        local_sizes=config["sizes"],
        global_layers=config["g_layers"],
        global_hidden=config["g_hidden"],
        local_hidden=config["l_hidden"],
        local_layers=config["l_layers"],
        channel_hidden=config["gc_hidden"],
        interact_hidden=(config["gc_hi_hidden"], config["gs_hidden"]),
    )
    load_official(model, params).eval()
    seen = {}

    def keep(name):
        return lambda module, arguments, output: seen.update({name: output})

    for i, block in enumerate(model.blocks):
        branch = block.fast_multi_branch
        branch.Fast_Kernel_rgu.register_forward_hook(keep(f"block{i}_rgu"))
        branch.hyper_interact.register_forward_hook(keep(f"block{i}_hyper_interact"))
        branch.slow_net_g.register_forward_hook(keep(f"global_hk{i}"))
        for n in range(1, 5):
            getattr(branch, f"slow_net_l{n}").register_forward_hook(keep(f"block{i}_local_hk{n}"))
    with torch.no_grad():
        logits, slow = model(inputs["x"], return_slow_loss=True)
        seen |= {f"block{i}": y for i, y in enumerate(model.forward_intermediates(inputs["x"]))}
    return seen | {"logits": logits, "slow_loss": slow.reshape(1)}


def tolerance(key):
    if key.startswith(("kar", "kernel", "grad")):
        return (1e-5, 1e-5, 1e-7)
    return (1e-3, 1e-4, 0.0)
