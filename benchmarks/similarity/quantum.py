"""Quantum kernels beside Qiskit's FidelityStatevectorKernel, and beside the same circuit gate by gate in PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from harness import Case, main
from peer import Peer

from dynakern.measure import time_interleaved
from dynakern.ops import pauli_states
from dynakern.similarity import QuantumKernel, ZZFeatureMap


def gate_by_gate(X):
    angles, layers = ZZFeatureMap().angles(torch.from_numpy(X))
    real, imaginary = pauli_states(angles, layers, X.shape[1], backend="reference").unbind(1)
    states = torch.complex(real, imaginary)
    return (states.conj() @ states.T).abs().square().numpy()


def peak_rate():
    """Return the rate of a large matrix product on this machine now, FLOPs a second."""
    a = torch.randn(1024, 1024, dtype=torch.float64)
    return 2 * 1024**3 / time_interleaved({"mm": lambda: a @ a}, repeats=5)["mm"].median


def cases():
    script = Path(__file__).parent / "peers" / "quantum.py"
    peer = Peer.find("DYNAKERN_PEER_QISKIT", "qiskit-machine-learning", script)
    for n, samples in ((4, 100), (8, 100), (8, 1000), (12, 100)):
        X = np.random.default_rng(0).uniform(0, 2 * np.pi, (samples, n))
        kernel = QuantumKernel(ZZFeatureMap(n))
        peers, small = {}, samples == 100 and n <= 8
        if peer is not None and small:

            def qiskit(X=X):
                peer.send(x=X)
                peer.call("kernel")

            peers["Qiskit, FidelityStatevectorKernel"] = qiskit
        peers["gate by gate in PyTorch"] = lambda X=X: gate_by_gate(X)

        def check(X=X, kernel=kernel, small=small):
            np.testing.assert_allclose(kernel(X), gate_by_gate(X), atol=1e-12)
            if peer is not None and small:
                peer.send(x=X)
                peer.call("kernel")
                np.testing.assert_allclose(kernel(X), peer.result(), atol=1e-12)

        yield Case(
            name=f"kernel of {samples} samples, ZZ map, {n} qubits",
            ours=lambda X=X, kernel=kernel: kernel(X),
            peers=peers,
            check=check,
            floor_seconds=8 * samples**2 * 2**n / peak_rate(),
            floor_note="FLOPs of both products at the rate of a 1024 x 1024 matrix product in float64",
            at_least=50 if len(peers) > 1 else None,
            repeats=7,
            memory=n == 12,
        )


if __name__ == "__main__":
    main("quantum", "Quantum kernels", cases)
