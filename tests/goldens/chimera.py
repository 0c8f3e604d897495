"""Replay the goldens of Chimera: the scan, the selective layer, the kernel, Mamba's special case, the closed loop."""

from __future__ import annotations

import torch

from dynakern.ops import scan2d
from dynakern.sequence.chimera import ClosedLoop, lti_conv2d, lti_kernel2d, ssm2d


def tolerance(key: str) -> tuple[float, float, float]:
    return (1e-10, 1e-12, 0.0) if key.startswith(("scan.", "sel.", "lti.")) else (1e-4, 0.0, 1e-5)


def replay(case, config, params, inputs):
    if params:
        return closed_loop(config, params, inputs)
    return mamba(config, inputs) if "z" in inputs or "delta_bias" in inputs else own_reference(inputs)


def own_reference(inputs):
    outputs, group = (
        {},
        lambda name: {k.removeprefix(name + "."): v for k, v in inputs.items() if k.startswith(name + ".")},
    )
    if scan := group("scan"):
        outputs["scan.h1"], outputs["scan.h2"] = scan2d(*(scan[n] for n in ("a1", "a2", "a3", "a4", "b1", "b2")))
    if sel := group("sel"):
        order = [sel[n] for n in ("x", "delta", "A", "B", "C", "D")]
        half = ssm2d(*order, coupling="half")
        outputs["sel.y_raw_kappa1"], outputs["sel.y_kappa_half"] = ssm2d(*order, coupling="raw"), half
        # One skip for both directions.
        flipped = [
            v.flip(1) if n in ("x", "delta", "B", "C") else v
            for n, v in zip(("x", "delta", "A", "B", "C", "D"), order, strict=True)
        ]
        outputs["sel.y_bidirectional"] = half + ssm2d(*flipped[:5], coupling="half").flip(1)
    if lti := group("lti"):
        names = ("a1", "a2", "a3", "a4", "B1", "B2", "C1", "C2")
        kernel = lti_kernel2d(*(lti[n] for n in names), size=lti["u"].shape[1:3])
        outputs |= {"lti.kernel": kernel, "lti.y": lti_conv2d(lti["u"], kernel)}
    return outputs


def mamba(config, inputs):
    u, steps = inputs["u"], inputs["delta"]
    if "delta_bias" in inputs:
        steps = steps + inputs["delta_bias"][:, None]
    if config.get("delta_softplus"):
        steps = torch.nn.functional.softplus(steps)
    cells = lambda v: v.transpose(1, 2).unsqueeze(1)  # noqa: E731 - (b, D, L) to (b, 1, L, D)
    delta, zero = cells(steps), torch.zeros_like(cells(inputs["B"]))
    pair = lambda v: torch.stack([cells(v), zero], -2)  # noqa: E731
    y, h1, _ = ssm2d(
        cells(u),
        torch.stack([delta, delta], -2),
        inputs["A"].expand(4, -1, -1),
        pair(inputs["B"]),
        pair(inputs["C"]),
        inputs.get("D"),
        coupling="none",
        input_rule="euler",
        return_state=True,
    )
    y = y[:, 0].transpose(1, 2)
    if "z" in inputs:
        y = y * torch.nn.functional.silu(inputs["z"])
    return {"y": y, "last_state": h1[:, 0, -1]}


def closed_loop(config, params, inputs):
    loop = ClosedLoop(
        config["model_dim"], config["kernel_dim"], normalise=config.get("norm_order", 0) == 1, official=True
    )
    loop.load_state_dict({name: params[name] for name in "abck"})
    with torch.no_grad():
        y, following = loop(inputs["u"], config["horizon"])
        open_y, open_u = loop.open_loop(inputs["u"])
        return {
            "A": loop.companion(),
            "closed_loop_y": y,
            "closed_loop_next_u": following,
            "open_loop_y": open_y,
            "open_loop_u": open_u,
        }
