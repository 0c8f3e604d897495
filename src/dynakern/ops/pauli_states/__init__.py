r"""States of circuits that alternate Hadamard gates and rotations about Pauli words."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dynakern.checks import check_floating, check_shape
from dynakern.ops.dispatch import Backend, resolve_backend

__all__ = ["Rotation", "pauli_states"]

Rotation = tuple[int, int, int]


def pauli_states(
    angles: Tensor, layers: Sequence[Sequence[Rotation]], n_qubits: int, *, backend: Backend = "auto"
) -> Tensor:
    r"""Return the state that a circuit of Pauli rotations makes of :math:`|0 \dots 0\rangle`, for a batch of angles.

    A layer is a Hadamard gate on every qubit and then, in order, the rotations :math:`e^{-i \theta P}`. Amplitude k
    belongs to the bits :math:`k = \sum_q b_q 2^q` (qubit 0 is the least significant). Neighbouring rotations about
    words of Z alone are one diagonal, whose phases a Walsh-Hadamard transform of the angles gives; the Hadamard gates
    are another such transform: O(n 2^n) time for a sample and a layer, and O(2^n) for each further rotation.

    Only the reference gives a gradient; the CPU engine needs only the memory of its result.

    Args:
        angles: :math:`\theta`, ``(N, R)``, floating point; computed in float64.
        layers: For each layer its rotations ``(column, x, z)``: the column of ``angles``, and the qubits on which the
            word has X or Y, and Z or Y, as the bits of two integers.
        n_qubits: Number n of qubits.
        backend: ``"auto"``, ``"reference"`` or ``"cpu"``.

    Returns:
        Amplitudes, ``(N, 2, 2^n)``, float64: real parts, then imaginary parts.

    Raises:
        TypeError: ``angles`` is not floating point.
        ValueError: ``angles`` is not 2-d, ``n_qubits`` is not positive, or a rotation names a column or a qubit that
            does not exist.
        NotImplementedError: The CPU engine is asked for by name where a gradient is needed.

    Example:
        >>> import torch
        >>> amplitudes = pauli_states(torch.tensor([[0.5]]), [[(0, 0, 0b11)]], n_qubits=2)   # exp(-0.5 i Z Z)
        >>> [round(float(a), 4) for a in amplitudes[0, 1]]
        [-0.2397, 0.2397, 0.2397, -0.2397]

    Source: Havlíček et al., 2019, arXiv:1804.11326, with the signs of Qiskit.
    """
    dims = check_shape("angles", angles, "N R")
    check_floating("angles", angles)
    if n_qubits < 1:
        raise ValueError(f"`n_qubits` must be positive, got {n_qubits}.")
    program = [[(int(c), int(x), int(z)) for c, x, z in layer] for layer in layers]
    for column, x, z in (rotation for layer in program for rotation in layer):
        if not 0 <= column < dims["R"]:
            raise ValueError(f"`layers` must name columns below R = {dims['R']} of `angles`, got {column}.")
        if not 0 < (x | z) < 2**n_qubits:
            raise ValueError(
                f"`layers` must name some of {n_qubits} qubits in each rotation, got bits {x:b} and {z:b}."
            )
    refusal = "it gives no gradient and the angles require one" if angles.requires_grad else None
    engine = resolve_backend("pauli_states", backend, (angles,), refusals={"cpu": refusal})
    if engine == "cpu":
        from dynakern.ops.pauli_states.cpu import pauli_states_cpu

        return pauli_states_cpu(angles, program, n_qubits)
    from dynakern.ops.pauli_states.reference import pauli_states_reference

    return pauli_states_reference(angles, program, n_qubits)
