"""Replay the quantum goldens: Qiskit's feature maps with their global phase, fidelity kernels, a variational circuit.

Which map it is stands in ``feature_map`` (a name, or a name with its options as in ``"zz reps=2 full"``) and in the
options beside it. States carry Qiskit's global phase, a half of all angles of its phase gates.
"""

from __future__ import annotations

import numpy as np
import torch

from dynakern.similarity import PauliFeatureMap, QuantumKernel, ZFeatureMap, ZZFeatureMap
from dynakern.similarity.quantum import apply_ansatz, parity


def _entanglement(given):
    if isinstance(given, dict):
        return {int(size): sets for size, sets in given.items()}
    return given


def _feature_map(config):
    name, *words = str(config.get("feature_map", "zz")).lower().split()
    options = {"reps": config.get("reps", 2), "alpha": config.get("alpha", 2.0)}
    entanglement = "full" if words else config.get("entanglement", "full")
    for word in words:
        key, _, value = word.partition("=")
        if key == "reps":
            options["reps"] = int(value)
        elif key == "alpha":
            options["alpha"] = float(value)
        else:
            entanglement = value or key
    if name == "z":
        return ZFeatureMap(config["num_qubits"], **options)
    entanglement = _entanglement(entanglement)
    if name == "pauli" or config.get("paulis"):
        paulis = tuple(config.get("paulis") or ("Z", "ZZ"))
        return PauliFeatureMap(config["num_qubits"], paulis, entanglement=entanglement, **options)
    return ZZFeatureMap(config["num_qubits"], entanglement=entanglement, **options)


def _states(feature_map, x):
    angles, layers = feature_map.angles(x)
    phase = sum(angles[:, [column for column, _, _ in layer]].sum(1) for layer in layers)
    return feature_map.states(x) * np.exp(1j * phase.numpy())[:, None]


def _kernels(config, inputs):
    feature_map = _feature_map(config)
    kernel, outputs = QuantumKernel(feature_map), {}
    for name, x in inputs.items():
        states = _states(feature_map, x)
        outputs[f"state_{name}_re"], outputs[f"state_{name}_im"] = states.real, states.imag
        outputs[f"kernel_{name}{name}"] = kernel(x.numpy())
    if "y" in inputs:
        outputs["kernel_xy"] = kernel(inputs["x"].numpy(), inputs["y"].numpy())
    return outputs


def _variational(config, inputs):
    states = torch.from_numpy(_feature_map(config).states(inputs["x"]))
    entanglement = _entanglement(config.get("entanglement", "full"))
    observable = config.get("observable", "Z" * config["num_qubits"])
    k = torch.arange(2 ** config["num_qubits"])
    signs = torch.ones(len(k), dtype=torch.float64)
    for q, letter in enumerate(reversed(observable)):
        signs = signs * (1 - 2.0 * ((k >> q) & 1)) if letter == "Z" else signs

    def expectation(theta):
        found = apply_ansatz(states, theta, entanglement)
        return parity(found) if set(observable) == {"Z"} else found.abs().square() @ signs

    theta = inputs["theta"]
    return {
        "parity": expectation(theta),
        "probabilities": apply_ansatz(states, theta, entanglement).abs().square(),
        "grad_parity": torch.autograd.functional.jacobian(expectation, theta),
    }


def replay(case, config, params, inputs):
    """Build what the keys say, and run it."""
    return _variational(config, inputs) if "theta" in inputs else _kernels(config, inputs)


def tolerance(key):
    """As the folder's README says: 1e-10 absolute."""
    return 0.0, 0.0, 1e-10
