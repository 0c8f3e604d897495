"""The definition of Pauli rotations of a state: one gate after another."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pauli_states_reference"]


def _parity(indices: Tensor, mask: int, n_qubits: int) -> Tensor:
    """Return (-1)^(number of bits of ``mask`` set in each index)."""
    bits = sum((((indices >> q) & 1) for q in range(n_qubits) if mask >> q & 1), torch.zeros_like(indices))
    return 1.0 - 2.0 * (bits % 2)


def _hadamard(state: Tensor, n_qubits: int) -> Tensor:
    for q in range(n_qubits):
        pairs = state.unflatten(-1, (-1, 2, 2**q))
        state = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
    return state * 2.0 ** (-n_qubits / 2)


def pauli_states_reference(angles: Tensor, layers: list[list[tuple[int, int, int]]], n_qubits: int) -> Tensor:
    """Return ``(N, 2, 2^n)``; see :func:`dynakern.ops.pauli_states`."""
    theta = angles.double()
    k = torch.arange(2**n_qubits, device=theta.device)
    real = (k == 0).double().expand(len(theta), -1)
    imaginary = torch.zeros_like(real)
    for layer in layers:
        real, imaginary = _hadamard(real, n_qubits), _hadamard(imaginary, n_qubits)
        for column, x, z in layer:
            cosine, sine = theta[:, column, None].cos(), theta[:, column, None].sin()
            # P |j> = i^(number of Y) (-1)^(j . z) |j ^ x>, and exp(-i theta P) = cos theta - i sin theta P.
            sign = _parity(k ^ x, z, n_qubits)
            a, b = sign * real[:, k ^ x], sign * imaginary[:, k ^ x]
            for _ in range((x & z).bit_count() % 4):
                a, b = -b, a
            real, imaginary = cosine * real + sine * b, cosine * imaginary - sine * a
    return torch.stack([real, imaginary], 1)
