"""Pauli rotations: the fast engine is the definition, which is the exponential of the matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from dynakern.ops import explain_backend, pauli_states
from dynakern.testing import assert_same, randn

I, X, Y, Z = (
    np.array(m, dtype=complex) for m in ([[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]])
)
H = (X + Z) / np.sqrt(2)


def word(x, z, n):
    """Return the matrix of a word, qubit 0 being the last factor."""
    matrix = np.ones((1, 1), dtype=complex)
    for q in reversed(range(n)):
        letter = (x >> q & 1) + 2 * (z >> q & 1)
        matrix = np.kron(matrix, (I, X, Z, Y)[letter])
    return matrix


def program(n, seed, rotations=7, layers=3, columns=5):
    rng = np.random.default_rng(seed)
    return [
        [
            (int(rng.integers(columns)), int(rng.integers(2**n)) * int(rng.random() < 0.5), int(rng.integers(1, 2**n)))
            for _ in range(rotations)
        ]
        for _ in range(layers)
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_states_are_those_of_the_matrix_exponentials(n, backend):
    layers, angles = program(n, n), randn(4, 5, requires_grad=False) * 3
    found = pauli_states(angles, layers, n, backend=backend)
    hadamard = np.ones((1, 1))
    for _ in range(n):
        hadamard = np.kron(hadamard, H)
    for theta, (real, imaginary) in zip(angles.numpy(), found.numpy(), strict=True):
        state = np.eye(2**n)[0]
        for layer in layers:
            state = hadamard @ state
            for column, x, z in layer:
                state = expm(-1j * theta[column] * word(x, z, n)) @ state
        np.testing.assert_allclose(real + 1j * imaginary, state, atol=1e-13)


@pytest.mark.parametrize("N", [1, 8, 13])
@pytest.mark.parametrize("n", [1, 4, 7])
def test_cpu_is_the_reference(N, n):
    angles = randn(N, 5, requires_grad=False) * 4
    for layers in (program(n, 0), [[], [(0, 0, 1)]], [[(1, 1, 0)], [], [(2, 0, 2**n - 1), (0, 0, 1)]], []):
        a, b = (pauli_states(angles, layers, n, backend=engine) for engine in ("cpu", "reference"))
        assert_same(a, b, rtol=1e-14)
        assert_same(a.square().sum((1, 2)), torch.ones(N, dtype=torch.float64), rtol=1e-14)


def test_large_angles_keep_their_period():
    angles = torch.tensor([[0.3], [0.3 + 2 * np.pi * 1000]], dtype=torch.float64)
    a, b = pauli_states(angles, [[(0, 0, 1)]], 1, backend="cpu")
    assert_same(a, b, rtol=1e-12)


def test_result_does_not_depend_on_threads_and_inputs_may_be_strided():
    angles, before = randn(5, 40, requires_grad=False).T, torch.get_num_threads()
    one = pauli_states(angles, program(3, 1), 3)
    try:
        torch.set_num_threads(2)
        assert torch.equal(pauli_states(angles, program(3, 1), 3), one)
    finally:
        torch.set_num_threads(before)
    assert pauli_states(angles[:0], program(3, 1), 3).shape == (0, 2, 8)
    assert pauli_states(angles.float(), program(3, 1), 3).dtype == torch.float64


def test_reference_has_a_gradient_and_auto_takes_it():
    angles = randn(2, 5)
    assert explain_backend(pauli_states, angles, program(2, 0), 2).engine == "reference"
    assert torch.autograd.gradcheck(lambda a: pauli_states(a, program(2, 0), 2), (angles,))
    with pytest.raises(NotImplementedError, match="gives no gradient"):
        pauli_states(angles, program(2, 0), 2, backend="cpu")


def test_refusals():
    angles = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="`angles` must have shape"):
        pauli_states(angles[0], [], 2)
    with pytest.raises(TypeError, match="`angles` must have a floating-point dtype"):
        pauli_states(angles.long(), [], 2)
    with pytest.raises(ValueError, match="`n_qubits` must be positive, got 0"):
        pauli_states(angles, [], 0)
    with pytest.raises(ValueError, match="columns below R = 3"):
        pauli_states(angles, [[(3, 0, 1)]], 2)
    with pytest.raises(ValueError, match="some of 2 qubits in each rotation, got bits 0 and 100"):
        pauli_states(angles, [[(0, 0, 4)]], 2)
