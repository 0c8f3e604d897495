"""What Qiskit computes in its own environment, called by ``benchmarks/similarity/quantum.py``."""

from __future__ import annotations


def kernel(data):
    """Return the fidelity kernel of ``data["x"]``, on a fresh object, as its cache would keep the states."""
    from qiskit.circuit.library import zz_feature_map
    from qiskit_machine_learning.kernels import FidelityStatevectorKernel

    feature_map = zz_feature_map(data["x"].shape[1], reps=2, entanglement="full")
    return FidelityStatevectorKernel(feature_map=feature_map).evaluate(data["x"])
