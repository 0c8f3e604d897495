"""Feature maps: which Pauli words rotate which qubits by which products of the features."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynakern.checks import check_choice, check_finite, check_positive
from dynakern.ops.pauli_states import Rotation, pauli_states

__all__ = ["Entanglement", "PauliFeatureMap", "ZFeatureMap", "ZZFeatureMap", "entangling_sets"]

Entanglement = str | Sequence[Sequence[int]] | Mapping[int, Sequence[Sequence[int]]]
_SCHEMES = ("full", "linear", "reverse_linear", "circular", "sca", "pairwise")
_PRACTICAL = 20


def entangling_sets(
    entanglement: Entanglement, size: int, n_qubits: int, *, layer: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Return the sets of qubits that gates on ``size`` qubits act on, in order.

    Args:
        entanglement: ``"full"`` (all sets), ``"linear"`` (neighbours), ``"reverse_linear"``, ``"circular"`` (neighbours
            on a ring, those over its end first), ``"sca"`` (circular, shifted by one and turned round from layer to
            layer), ``"pairwise"`` (even pairs, then odd ones); or the sets themselves (for one size above 1; gates on
            one qubit act on all), or a mapping of sizes to sets, in which a size that is missing has none.
        size: Qubits of a set.
        n_qubits: Qubits of the circuit.
        layer: Number of the layer, from 0; only ``"sca"`` depends on it.

    Returns:
        Tuples of ``size`` different qubits.

    Raises:
        ValueError: The scheme is unknown, or a set has another size, or names a qubit twice or one that does not exist.
    """
    if isinstance(entanglement, str):
        check_choice("entanglement", entanglement, _SCHEMES)
        return _scheme(entanglement, size, n_qubits, layer)
    if isinstance(entanglement, Mapping):
        given = entanglement.get(size, ())
    else:
        given = [(q,) for q in range(n_qubits)] if size == 1 else entanglement
    sets = tuple(tuple(int(q) for q in group) for group in given)
    for group in sets:
        if len(group) != size or len(set(group)) != size or not all(0 <= q < n_qubits for q in group):
            raise ValueError(f"`entanglement` must hold sets of {size} different qubits below {n_qubits}, got {group}.")
    return sets


def _scheme(name: str, size: int, n: int, layer: int) -> tuple[tuple[int, ...], ...]:
    neighbours = [tuple(range(i, i + size)) for i in range(n - size + 1)]
    if name == "full":
        return tuple(combinations(range(n), size))
    if name == "linear":
        return tuple(neighbours)
    if name == "reverse_linear":
        return tuple(neighbours[::-1])
    if name == "pairwise":
        if size > 2:
            raise ValueError(f"`entanglement` 'pairwise' is for words of at most 2 qubits, got {size}.")
        return tuple(neighbours if size == 1 else neighbours[::2] + neighbours[1::2])
    if size > 1:  # on a ring; a set of all qubits closes none
        over = [tuple((n - size + 1 + i + j) % n for j in range(size)) for i in range(size - 1)]
        neighbours = (over if n > size else []) + neighbours
    if name == "sca":
        shift = layer % len(neighbours)
        neighbours = neighbours[len(neighbours) - shift :] + neighbours[: len(neighbours) - shift]
        neighbours = [group[::-1] if layer % 2 else group for group in neighbours]
    return tuple(neighbours)


@dataclass(frozen=True, repr=False)
class PauliFeatureMap:
    r"""Encode n features in the state of n qubits by rotations about Pauli words.

    Each of ``reps`` layers is a Hadamard gate on every qubit and then, word by word and set by set,

    .. math:: e^{-i \frac{\alpha}{2} \phi_S(x) P}, \qquad \phi_{\{q\}} = x_q, \quad
       \phi_S = \prod_{q \in S} (\pi - x_q).

    The signs are Qiskit's; the paper's are the opposite, which for words of Z gives conjugate states and the same
    kernel. The last letter of a word is for the first qubit of a set. Letters I let qubits out of the rotation, but not
    out of :math:`\phi_S`, as in Qiskit.

    Args:
        n_qubits: Number n of qubits and features; by default as many as the data has features.
        paulis: Words of the letters I, X, Y and Z.
        reps: Number of layers.
        entanglement: The sets of qubits, see :func:`entangling_sets`; for words of one letter all qubits.
        alpha: :math:`\alpha`.
        allow_large: Allow more than 20 qubits; a state takes :math:`16 \cdot 2^n` bytes.

    Raises:
        TypeError: ``n_qubits`` or ``reps`` is no integer.
        ValueError: A number is out of range, or a word has another letter, is empty or longer than ``n_qubits``.

    Example:
        >>> states = PauliFeatureMap(paulis=("Z", "YY")).states(np.array([[0.1, 0.2], [0.3, 0.4]]))
        >>> states.shape
        (2, 4)

    Source: Havlíček et al., 2019, arXiv:1804.11326, eq. for :math:`U_\Phi(x)`; words as in Qiskit's
    ``pauli_feature_map``.
    """

    n_qubits: int | None = None
    paulis: tuple[str, ...] = ("Z", "ZZ")
    reps: int = 2
    entanglement: Entanglement = "full"
    alpha: float = 2.0
    allow_large: bool = False
    _plans: dict[int, tuple[list[Tensor], list[list[Rotation]]]] = field(
        default_factory=dict, init=False, compare=False
    )

    def __post_init__(self) -> None:
        check_positive("reps", self.reps, integer=True)
        check_positive("alpha", float(self.alpha))
        object.__setattr__(self, "paulis", tuple(self.paulis))
        for word in self.paulis:
            if not word or set(word) - set("IXYZ") or set(word) == {"I"}:
                raise ValueError(f"`paulis` must be words of I, X, Y and Z, not of I alone, got {word!r}.")
        if not self.paulis:
            raise ValueError("`paulis` must hold at least one word, got none.")
        if isinstance(self.entanglement, str):
            check_choice("entanglement", self.entanglement, _SCHEMES)
        if self.n_qubits is not None:
            self._check_size(self.n_qubits)

    def __repr__(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name != "allow_large"]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def _check_size(self, n: int) -> None:
        check_positive("n_qubits", n, integer=True)
        if n > _PRACTICAL and not self.allow_large:
            size = 16 * 2.0**n / 2**30
            raise ValueError(f"`n_qubits` = {n} needs {size:.2g} GB a state; pass allow_large=True if you mean it.")
        # A map of pairs of a single feature has no pair; a longer word is a mistake.
        long = [word for word in self.paulis if len(word) > n and (len(word) > 2 or n > 1)]
        if long:
            raise ValueError(f"`paulis` must be at most as long as the {n} qubit(s), got {long[0]!r}.")

    def width(self, features: int) -> int:
        """Return the number of qubits for data of this many features.

        Raises:
            ValueError: The map has another number of qubits, or the number is out of range.
        """
        if self.n_qubits is not None and features != self.n_qubits:
            raise ValueError(f"`X` must have n_qubits = {self.n_qubits} features, got {features}.")
        self._check_size(features)
        return features

    def blocks(self, n_qubits: int) -> list[list[tuple[str, tuple[int, ...]]]]:
        """Return, for each layer, its words and their qubits in order."""
        return [
            [
                (word, group)
                for word in self.paulis
                if len(word) <= n_qubits
                for group in entangling_sets(self.entanglement, len(word), n_qubits, layer=layer)
            ]
            for layer in range(self.reps)
        ]

    def angles(self, X: Tensor) -> tuple[Tensor, list[list[Rotation]]]:
        r"""Return the rotations' angles :math:`\tfrac\alpha2 \phi_S(x)` and the layers that use them.

        Args:
            X: ``(N, n)``.

        Returns:
            ``(N, R)``, and layers as :func:`dynakern.ops.pauli_states` takes them.
        """
        sizes, layers = self._plan(X.shape[1])
        columns = []
        for groups in sizes:  # (S, size) each
            x = X[:, groups]
            columns.append(x[..., 0] if groups.shape[1] == 1 else (math.pi - x).prod(-1))
        return 0.5 * self.alpha * torch.cat([X[:, :0], *columns], 1), layers

    def _plan(self, n: int) -> tuple[list[Tensor], list[list[Rotation]]]:
        """Return the sets whose products are needed, by size, and the layers of rotations; kept for each n."""
        if n not in self._plans:
            blocks = self.blocks(n)
            sets = sorted({tuple(sorted(group)) for layer in blocks for _, group in layer}, key=lambda g: (len(g), g))
            column = {group: index for index, group in enumerate(sets)}
            layers = [[self._rotation(word, group, column) for word, group in layer] for layer in blocks]
            sizes = [torch.tensor([g for g in sets if len(g) == size]) for size in sorted({len(g) for g in sets})]
            self._plans[n] = sizes, layers
        return self._plans[n]

    @staticmethod
    def _rotation(word: str, group: tuple[int, ...], column: dict[tuple[int, ...], int]) -> Rotation:
        letters = list(zip(word[::-1], group, strict=True))
        x = sum(1 << q for letter, q in letters if letter in "XY")
        z = sum(1 << q for letter, q in letters if letter in "ZY")
        return column[tuple(sorted(group))], x, z

    def amplitudes(self, X: Tensor) -> Tensor:
        """Return states of ``X`` ``(N, n)`` as ``(N, 2, 2^n)``: real and imaginary parts, differentiable in ``X``."""
        n = self.width(X.shape[1])
        angles, layers = self.angles(X.double())
        return pauli_states(angles, layers, n)

    def states(self, X: Any) -> np.ndarray:
        """Return the states of samples ``(N, n)`` as complex amplitudes ``(N, 2^n)``; qubit 0 is the lowest bit.

        Raises:
            ValueError: ``X`` is not 2-d or not finite, or has another number of features than the map has qubits.
        """
        x = torch.from_numpy(np.require(X, np.float64, ["C", "W"]))
        if x.ndim != 2:
            raise ValueError(f"`X` must be (N, n_qubits), got shape {tuple(x.shape)}.")
        check_finite("X", x)
        real, imaginary = self.amplitudes(x).unbind(1)
        return torch.complex(real, imaginary).numpy()


class ZFeatureMap(PauliFeatureMap):
    """Encode each feature in the phase of its own qubit: states stay products, and the kernel is one of each feature.

    Args:
        n_qubits: As in :class:`PauliFeatureMap`.
        reps: Number of layers.
        alpha: Factor of the angles.
        allow_large: Allow more than 20 qubits.

    Example:
        >>> ZFeatureMap(reps=1).states(np.array([[0.0]])).real.round(4)
        array([[0.7071, 0.7071]])
    """

    def __init__(
        self, n_qubits: int | None = None, reps: int = 2, alpha: float = 2.0, allow_large: bool = False
    ) -> None:
        super().__init__(n_qubits, ("Z",), reps, "full", alpha, allow_large)


class ZZFeatureMap(PauliFeatureMap):
    r"""The paper's map: phases :math:`x_q` of qubits and :math:`(\pi - x_i)(\pi - x_j)` of entangled pairs.

    Args:
        n_qubits: As in :class:`PauliFeatureMap`.
        reps: Number of layers, 2 in the paper.
        entanglement: The pairs, see :func:`entangling_sets`.
        alpha: Factor of the angles.
        allow_large: Allow more than 20 qubits.

    Example:
        >>> ZZFeatureMap().states(np.array([[0.5, 1.0]])).shape
        (1, 4)
    """

    def __init__(
        self,
        n_qubits: int | None = None,
        reps: int = 2,
        entanglement: Entanglement = "full",
        alpha: float = 2.0,
        allow_large: bool = False,
    ) -> None:
        super().__init__(n_qubits, ("Z", "ZZ"), reps, entanglement, alpha, allow_large)
