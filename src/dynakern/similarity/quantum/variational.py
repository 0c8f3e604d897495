"""The variational classifier: a trained circuit behind the feature map, and the parity of its outcome."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import unitary_group
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from dynakern.checks import check_choice, check_positive
from dynakern.similarity.quantum.feature_map import Entanglement, PauliFeatureMap, ZZFeatureMap, entangling_sets

__all__ = ["VariationalQuantumClassifier", "ad_hoc_data", "apply_ansatz", "parity"]

Floats = NDArray[np.float64]


def _signs(n_qubits: int) -> Tensor:
    """Return (-1)^(number of ones) of each outcome, ``(2^n,)``."""
    signs = torch.ones(1, dtype=torch.float64)
    for _ in range(n_qubits):
        signs = torch.cat([signs, -signs])
    return signs


def apply_ansatz(states: Tensor, theta: Tensor, entanglement: Entanglement = "full") -> Tensor:
    r"""Apply the trainable circuit to a batch of states.

    .. math:: W(\theta) = U_{loc}(\theta_D)\, U_{ent} \cdots U_{ent}\, U_{loc}(\theta_0), \qquad
       U_{loc}(\theta_l) = \bigotimes_q R_Z(\theta_{lq1}) R_Y(\theta_{lq0}), \quad R_P(t) = e^{-i t P / 2}

    where :math:`U_{ent}` is a controlled Z gate on each entangled pair. Differentiable. The paper's rotations have the
    opposite sign.

    Args:
        states: Amplitudes, ``(N, 2^n)``, complex.
        theta: Angles, ``(..., D + 1, n, 2)`` for depth D; leading dimensions are independent circuits.
        entanglement: The pairs, see :func:`entangling_sets`.

    Returns:
        ``(..., N, 2^n)``, complex128.

    Raises:
        ValueError: Shapes do not fit.
    """
    size = states.shape[-1]
    n = size.bit_length() - 1
    if states.ndim != 2 or size != 2**n or n < 1:
        raise ValueError(f"`states` must be (N, 2^n), got shape {tuple(states.shape)}.")
    if theta.ndim < 3 or theta.shape[-2:] != (n, 2):
        raise ValueError(f"`theta` must be (..., depth + 1, {n}, 2), got shape {tuple(theta.shape)}.")
    batch = theta.shape[:-3]
    if size < len(states):  # the circuit's matrix first
        eye = torch.eye(size, dtype=torch.complex128)
        return states.to(torch.complex128) @ _circuit(eye.expand(*batch, -1, -1), theta, n, entanglement)
    return _circuit(states.to(torch.complex128).expand(*batch, -1, -1), theta, n, entanglement)


def _circuit(x: Tensor, theta: Tensor, n: int, entanglement: Entanglement) -> Tensor:
    """Apply the circuit to ``(..., N, 2^n)``."""
    half = 0.5 * theta.double()
    cosine, sine = half[..., 0].cos(), half[..., 0].sin()
    y = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    z = torch.polar(torch.ones_like(half[..., 1]), half[..., 1])
    gates = torch.stack([z.conj(), z], -1)[..., None] * y  # (..., D + 1, n, 2, 2)
    k = torch.arange(2**n)
    sign = torch.ones(2**n, dtype=torch.float64)
    for i, j in entangling_sets(entanglement, 2, n) if n > 1 else ():
        sign = sign * (1.0 - 2.0 * ((k >> i) & (k >> j) & 1))
    for layer in range(theta.shape[-3]):
        x = x * sign if layer else x
        for q in range(n):
            gate = gates[..., layer, q, :, :]
            x = torch.einsum("...ab,...nxbz->...nxaz", gate, x.unflatten(-1, (-1, 2, 2**q))).flatten(-3)
    return x


def parity(states: Tensor) -> Tensor:
    r"""Return :math:`\langle Z \otimes \cdots \otimes Z \rangle` of states ``(..., 2^n)``, ``(...)``, in [-1, 1]."""
    probabilities = states.real.square() + states.imag.square()
    return probabilities @ _signs(states.shape[-1].bit_length() - 1)


class VariationalQuantumClassifier(ClassifierMixin, BaseEstimator):
    r"""Two classes told apart by the parity that a trained circuit gives their encoded samples.

    With :math:`e(x) = \langle \Phi(x) | W^\dagger f W | \Phi(x) \rangle`, :math:`p_y = (1 + y e) / 2` and a trained
    bias b the decision is the sign of :math:`e + b`, and training minimises the probability that R shots give the wrong
    one,

    .. math:: \frac1N \sum_x
       \sigma\!\left(\frac{\sqrt R\, (\tfrac12 - p_y - \tfrac12 y b)}{\sqrt{2 (1 - p_y) p_y}}\right).

    All restarts train side by side; the one of least risk is kept. The paper's b has the opposite sign.

    Args:
        feature_map: The encoding; :class:`ZZFeatureMap` by default. Features are angles: scale them into (0, 2 pi].
        depth: Entangling layers of the trained circuit, 0 to about 4.
        entanglement: Its pairs.
        optimizer: ``"adam"`` (exact expectations and gradients) or ``"spsa"`` (two noisy evaluations a step, of R shots
            each, as on hardware; gains :math:`a_k = a / (k + 1 + A)^{0.602}`, :math:`c_k = 0.1 / (k + 1)^{0.101}` with
            A a tenth of the steps and a first gain of ``lr``: constants of our choice).
        lr: Learning rate.
        steps: Number of steps.
        restarts: Number of random starts.
        shots: R.
        random_state: Seed of the starts and of SPSA.

    Attributes:
        classes_: The two labels.
        theta_: Angles, ``(depth + 1, n, 2)``.
        bias_: b.
        risk_: Training risk of each restart, ``(restarts,)``.
        n_features_in_: Number of features.

    Example:
        >>> X, y, X_test, y_test = ad_hoc_data(random_state=0)
        >>> VariationalQuantumClassifier(depth=2, restarts=2, random_state=0).fit(X, y).score(X_test, y_test)
        1.0

    Source: Havlíček et al., 2019, arXiv:1804.11326, quantum variational classification.
    """

    def __init__(
        self,
        feature_map: PauliFeatureMap | None = None,
        *,
        depth: int = 4,
        entanglement: Entanglement = "full",
        optimizer: str = "adam",
        lr: float = 0.1,
        steps: int = 150,
        restarts: int = 3,
        shots: int = 200,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.feature_map = feature_map
        self.depth = depth
        self.entanglement = entanglement
        self.optimizer = optimizer
        self.lr = lr
        self.steps = steps
        self.restarts = restarts
        self.shots = shots
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """Say that there are two classes."""
        tags = super().__sklearn_tags__()  # pyright: ignore[reportAttributeAccessIssue]
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Train the circuit.

        Args:
            X: ``(N, n)``, finite.
            y: Labels, ``(N,)``, of two classes.

        Returns:
            This estimator.

        Raises:
            TypeError: A count is no integer.
            ValueError: There are not two classes, or an option is out of range.
        """
        check_positive("depth", self.depth, integer=True, zero=True)
        for name in ("steps", "restarts", "shots"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("lr", self.lr)
        check_choice("optimizer", self.optimizer, ("adam", "spsa"))
        checked: Any = validate_data(self, X, y, dtype=np.float64)
        samples, targets = checked
        check_classification_targets(targets)
        kind = type_of_target(targets, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_, codes = np.unique(targets, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"`y` must hold two classes, got only one class: {self.classes_[0]!r}.")
        rng = check_random_state(self.random_state)
        states = self._states(samples)
        labels = torch.from_numpy(2.0 * codes - 1.0)
        start = rng.uniform(0, 2 * math.pi, (self.restarts, self.depth + 1, samples.shape[1], 2))
        theta, bias = torch.from_numpy(start), torch.zeros(self.restarts, dtype=torch.float64)
        train = self._adam if self.optimizer == "adam" else self._spsa
        theta, bias = train(states, labels, theta, bias, rng)
        with torch.no_grad():
            self.risk_ = self._risk(parity(apply_ansatz(states, theta, self.entanglement)), labels, bias).numpy()
        best = int(np.argmin(self.risk_))
        self.theta_, self.bias_ = theta[best].numpy(), float(bias[best])
        return self

    def _states(self, X: Floats) -> Tensor:
        feature_map = ZZFeatureMap() if self.feature_map is None else self.feature_map
        return torch.from_numpy(feature_map.states(X))

    def _risk(self, e: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
        """Return the probability of a wrong decision, ``(restarts,)``, from expectations ``(restarts, N)``."""
        p = (0.5 * (1 + labels * e)).clamp(1e-6, 1 - 1e-6)
        margin = p - 0.5 + 0.5 * labels * bias[:, None]
        return torch.sigmoid(-math.sqrt(self.shots) * margin / (2 * (1 - p) * p).sqrt()).mean(-1)

    def _adam(
        self, states: Tensor, labels: Tensor, theta: Tensor, bias: Tensor, rng: np.random.RandomState
    ) -> tuple[Tensor, Tensor]:
        theta.requires_grad_()
        bias.requires_grad_()
        optimizer = torch.optim.Adam([theta, bias], lr=self.lr)
        for _ in range(self.steps):
            optimizer.zero_grad()
            self._risk(parity(apply_ansatz(states, theta, self.entanglement)), labels, bias).sum().backward()
            optimizer.step()
        return theta.detach(), bias.detach()

    @torch.no_grad()
    def _spsa(
        self, states: Tensor, labels: Tensor, theta: Tensor, bias: Tensor, rng: np.random.RandomState
    ) -> tuple[Tensor, Tensor]:
        delay = 0.1 * self.steps

        def measured(theta: Tensor, bias: Tensor) -> Tensor:
            e = parity(apply_ansatz(states, theta, self.entanglement)).numpy()
            ones = rng.binomial(self.shots, (0.5 * (1 + e)).clip(0, 1))
            return self._risk(torch.from_numpy(2.0 * ones / self.shots - 1), labels, bias)

        for k in range(self.steps):
            gain, width = self.lr * ((1 + delay) / (k + 1 + delay)) ** 0.602, 0.1 / (k + 1) ** 0.101
            turn, tilt = (torch.from_numpy(rng.choice([-1.0, 1.0], size=tuple(t.shape))) for t in (theta, bias))
            upper = measured(theta + width * turn, bias + width * tilt)
            slope = (upper - measured(theta - width * turn, bias - width * tilt)) / (2 * width)
            theta = theta - gain * slope[:, None, None, None] * turn
            bias = bias - gain * slope * tilt
        return theta, bias

    def decision_function(self, X: Any) -> Floats:
        """Return e + b for ``X`` ``(M, n)``, ``(M,)``, from exact expectations; positive for the second class."""
        check_is_fitted(self)
        samples: Any = validate_data(self, X, dtype=np.float64, reset=False)
        states = apply_ansatz(self._states(samples), torch.from_numpy(self.theta_), self.entanglement)
        return parity(states).numpy() + self.bias_

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the labels of ``X`` ``(M, n)``, ``(M,)``."""
        decision = self.decision_function(X)
        return self.classes_[(decision > 0).astype(int)]

    def predict_proba(self, X: Any) -> Floats:
        """Return (1 -+ (e + b)) / 2, cut to [0, 1], for the two classes, ``(M, 2)``."""
        p = (0.5 * (1 + self.decision_function(X))).clip(0, 1)
        return np.stack([1 - p, p], 1)


def ad_hoc_data(
    n_qubits: int = 2,
    *,
    gap: float = 0.3,
    n_per_class: int = 20,
    n_test_per_class: int | None = None,
    feature_map: PauliFeatureMap | None = None,
    random_state: int | np.random.Generator | None = None,
) -> tuple[Floats, NDArray[np.int64], Floats, NDArray[np.int64]]:
    r"""Return data that a quantum kernel separates perfectly: labels are the parity after a random unitary V.

    x is uniform on :math:`[0, 2 \pi)^n`; its label is the sign of
    :math:`\langle \Phi(x) | V^\dagger f V | \Phi(x) \rangle`, and samples for which that is below the gap are
    rejected.

    Args:
        n_qubits: Number n of qubits and features.
        gap: :math:`\Delta`, in [0, 1).
        n_per_class: Training samples of each label.
        n_test_per_class: Test samples of each label; as many by default.
        feature_map: The encoding; :class:`ZZFeatureMap` by default.
        random_state: Seed of V (drawn by the Haar measure) and of the samples.

    Returns:
        Training samples ``(2 n_per_class, n)`` and labels -1, 1, the first half 1; test samples and labels likewise.

    Raises:
        TypeError: A count is no integer.
        ValueError: An argument is out of range, or 2 million draws did not give enough samples beyond the gap.

    Source: Havlíček et al., 2019, arXiv:1804.11326 (n = 2, a gap of 0.3 and 20 samples a label there).
    """
    check_positive("n_qubits", n_qubits, integer=True)
    check_positive("n_per_class", n_per_class, integer=True)
    n_test = n_per_class if n_test_per_class is None else n_test_per_class
    check_positive("n_test_per_class", n_test, integer=True, zero=True)
    if not 0 <= gap < 1:
        raise ValueError(f"`gap` must be in [0, 1), got {gap!r}.")
    encode = (ZZFeatureMap() if feature_map is None else feature_map).states
    rng = np.random.default_rng(random_state)
    V = unitary_group.rvs(2**n_qubits, random_state=random_state if isinstance(random_state, int) else rng)
    signs, wanted, drawn = _signs(n_qubits).numpy(), n_per_class + n_test, 0
    found: dict[int, list[Floats]] = {1: [np.empty((0, n_qubits))], -1: [np.empty((0, n_qubits))]}
    rows = max(1, min(20_000, 2**24 >> n_qubits))
    while min(sum(map(len, parts)) for parts in found.values()) < wanted:
        if drawn >= 2_000_000:
            raise ValueError(
                f"`gap` = {gap} is too large for {n_qubits} qubits: of {drawn} samples too few are beyond it."
            )
        X = rng.uniform(0, 2 * np.pi, (rows, n_qubits))
        drawn += rows
        e = (np.abs(encode(X) @ V.T) ** 2) @ signs
        for label, parts in found.items():
            parts.append(X[label * e >= max(gap, 1e-300)])
    positive, negative = (np.concatenate(found[label])[:wanted] for label in (1, -1))
    y, y_test = (np.repeat(np.array([1, -1]), count) for count in (n_per_class, n_test))
    train = np.concatenate([positive[:n_per_class], negative[:n_per_class]])
    return train, y, np.concatenate([positive[n_per_class:], negative[n_per_class:]]), y_test
