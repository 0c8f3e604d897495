"""The fidelity of encoded samples as a kernel: exact, with noise, from a finite number of shots; what it is worth."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.gaussian_process.kernels import Hyperparameter
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

from dynakern.checks import check_choice, check_finite, check_positive
from dynakern.similarity.kernel import SimilarityKernel
from dynakern.similarity.quantum.feature_map import PauliFeatureMap, ZZFeatureMap

__all__ = [
    "KernelDiagnosis",
    "QuantumKernel",
    "QuantumKernelClassifier",
    "align_scale",
    "classify",
    "diagnose",
    "kernel_alignment",
    "psd_repair",
]

Floats = NDArray[np.float64]
_BLOCK = 2**25  # amplitudes that are held at a time: 512 MB


def _fidelities(feature_map: PauliFeatureMap, X: Tensor, Y: Tensor | None) -> Tensor:
    """Return |<Phi(x)|Phi(y)>|^2, ``(N, M)``, as two real products; blocks of states where they are many."""
    rows = max(1, _BLOCK >> X.shape[1])

    def product(left: Tensor, right: Tensor) -> Tensor:
        turned = torch.stack([-left[:, 1], left[:, 0]], 1)
        right = right.flatten(1).T
        return (left.flatten(1) @ right).square() + (turned.flatten(1) @ right).square()

    if Y is not None:
        columns = []
        for y in Y.split(rows):
            right = feature_map.amplitudes(y)
            columns.append(torch.cat([product(feature_map.amplitudes(x), right) for x in X.split(rows)]))
        return torch.cat(columns, 1)
    parts = X.split(rows)
    blocks: dict[tuple[int, int], Tensor] = {}
    for j, y in enumerate(parts):
        right = feature_map.amplitudes(y)
        for i in range(j):
            blocks[i, j] = product(feature_map.amplitudes(parts[i]), right)
            blocks[j, i] = blocks[i, j].T
        square = product(right, right)
        blocks[j, j] = 0.5 * (square + square.T)
    return torch.cat([torch.cat([blocks[i, j] for j in range(len(parts))], 1) for i in range(len(parts))])


class QuantumKernel(SimilarityKernel):
    r"""How alike two samples are as quantum states.

    .. math:: k(x, z) = (1 - p)\, |\langle \Phi(s x) | \Phi(s z) \rangle|^2 + p / 2^n

    with the depolarising probability p and the scale s. With R ``shots`` an entry is the share of all-zero outcomes,
    :math:`\mathrm{Binomial}(R, k) / R`, as hardware measures it; ``k(X)`` and ``k(X, X)`` then measure each pair once
    and have a diagonal of 1, which needs no measuring. Data may be NumPy arrays, or tensors, whose gradients are exact.
    O((N + M) n 2^n + N M 2^n) operations.

    Args:
        feature_map: The circuit; :class:`ZZFeatureMap` by default.
        scale: s, which multiplies the data.
        scale_bounds: Pair of bounds to learn ``scale`` within, or ``"fixed"``.
        shots: R, or None for exact values.
        depolarizing: p, in [0, 1].
        random_state: Seed of the shots. An integer gives the same outcomes in every call.

    Raises:
        ValueError: On a call: data that is not finite, not ``(N, n_qubits)``; an option out of range; a gradient of
            shots.

    Example:
        >>> kernel = QuantumKernel(ZZFeatureMap(reps=2))
        >>> kernel(np.array([[0.1, 0.2], [0.1, 0.2], [2.0, 1.0]])).round(4)
        array([[1.    , 1.    , 0.0342],
               [1.    , 1.    , 0.0342],
               [0.0342, 0.0342, 1.    ]])

    Source: Havlíček et al., 2019, arXiv:1804.11326, quantum kernel estimation.
    """

    def __init__(
        self,
        feature_map: PauliFeatureMap | None = None,
        *,
        scale: float = 1.0,
        scale_bounds: tuple[float, float] | str = "fixed",
        shots: int | None = None,
        depolarizing: float = 0.0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.feature_map = feature_map
        self.scale = scale
        self.scale_bounds = scale_bounds
        self.shots = shots
        self.depolarizing = depolarizing
        self.random_state = random_state

    @property
    def hyperparameter_scale(self) -> Hyperparameter:
        """The scale s."""
        return Hyperparameter("scale", "numeric", self.scale_bounds)

    def __repr__(self) -> str:
        given = "" if self.shots is None else f", shots={self.shots}"
        given += f", depolarizing={self.depolarizing:g}" if self.depolarizing else ""
        return f"QuantumKernel({self._map()!r}, scale={self.scale:.3g}{given})"

    def _map(self) -> PauliFeatureMap:
        return ZZFeatureMap() if self.feature_map is None else self.feature_map

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """Return the kernel matrix, as the base does; ``k(X, X)``, as SVC calls it, is ``k(X)``."""
        return super().__call__(X, None if Y is X else Y, eval_gradient)

    def _inputs(self, name: str, X: Any) -> Tensor:
        x = super()._inputs(name, X if isinstance(X, Tensor) else np.require(X, np.float64, ["C", "W"]))
        check_positive("scale", float(self.scale))
        if self.shots is not None:
            check_positive("shots", self.shots, integer=True)
        if not 0 <= self.depolarizing <= 1:
            raise ValueError(f"`depolarizing` must be in [0, 1], got {self.depolarizing!r}.")
        if x.ndim != 2:
            raise ValueError(f"`{name}` must be (N, n_qubits), got shape {tuple(x.shape)}.")
        self._map().width(x.shape[1])
        if len(x):
            spread = float((x.detach().amax(0) - x.detach().amin(0)).max()) * self.scale
            if spread > 2 * math.pi * (1 + 1e-9):
                warnings.warn(
                    f"`{name}` spans {spread:.3g} in a feature, more than 2 pi: different values give the same state. "
                    "Scale the data, or set `scale`.",
                    stacklevel=3,
                )
        return x

    def _matrix(self, X: Tensor, Y: Tensor | None, *, scale: Tensor | None = None) -> Tensor:
        s = self.scale if scale is None else scale
        exact = _fidelities(self._map(), X.double() * s, None if Y is None else Y.double() * s)
        noisy = (1 - self.depolarizing) * exact + self.depolarizing / 2 ** X.shape[1] if self.depolarizing else exact
        if self.shots is None:
            return noisy.to(X.dtype)
        if noisy.requires_grad or (scale is not None and torch._C._are_functorch_transforms_active()):
            raise ValueError(f"A kernel from `shots` = {self.shots} outcomes has no gradient; use shots=None.")
        return torch.from_numpy(self._measure(noisy.numpy(), Y is None)).to(X.dtype)

    def _measure(self, K: Floats, symmetric: bool) -> Floats:
        """Replace probabilities by shares of ``shots`` outcomes."""
        assert self.shots is not None
        rng = check_random_state(self.random_state)
        if not symmetric:
            return rng.binomial(self.shots, K.clip(0, 1)) / self.shots
        rows, columns = np.triu_indices(len(K), 1)
        p = K[rows, columns].clip(0, 1)
        if len(p) and p.mean() < 3 / self.shots:
            warnings.warn(
                f"The kernel is concentrated: its mean off the diagonal, {p.mean():.2g}, is below 3 / shots = "
                f"{3 / self.shots:.2g}, so most entries are noise. Use fewer qubits, a smaller `scale` or more shots.",
                stacklevel=4,
            )
        measured = np.eye(len(K))
        measured[rows, columns] = measured[columns, rows] = rng.binomial(self.shots, p) / self.shots
        return measured

    def _variances(self, X: Tensor, *, scale: Tensor | None = None) -> Tensor:
        noise = 0.0 if self.shots else self.depolarizing
        return X.new_full((len(X),), 1 - noise + noise / 2 ** X.shape[1])


def psd_repair(K: ArrayLike, method: str = "clip") -> Floats:
    r"""Return the nearest use of a kernel matrix that measuring has made indefinite.

    Args:
        K: Symmetric matrix, ``(N, N)``.
        method: ``"clip"`` sets negative eigenvalues to 0 (the nearest positive semidefinite matrix); ``"shift"`` adds
            the least eigenvalue's size to the diagonal, which leaves the other entries as they were measured.

    Returns:
        ``(N, N)``, positive semidefinite up to rounding; ``K`` itself where it already is.

    Raises:
        ValueError: ``K`` is not square, not finite or not symmetric, or the method is unknown.
    """
    matrix = np.asarray(K, dtype=np.float64)
    check_choice("method", method, ("clip", "shift"))
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`K` must be a square matrix, got shape {matrix.shape}.")
    check_finite("K", matrix)
    asymmetry = float(np.abs(matrix - matrix.T).max(initial=0.0))
    if asymmetry > 1e-8 * max(1.0, float(np.abs(matrix).max(initial=0.0))):
        raise ValueError(f"`K` must be symmetric, got entries that differ by {asymmetry:.3g} from their mirror images.")
    values, vectors = np.linalg.eigh(matrix)
    if len(values) == 0 or values[0] >= 0:
        return matrix
    if method == "shift":
        return matrix - values[0] * np.eye(len(matrix))
    return (vectors * values.clip(min=0)) @ vectors.T


def kernel_alignment(K: ArrayLike, y: ArrayLike) -> float:
    r"""Return how well a kernel matrix fits labels: the cosine of it and the ideal kernel, both centred.

    Args:
        K: ``(N, N)``.
        y: Labels of any number of classes, ``(N,)``; the ideal kernel is 1 within a class and 0 between classes.

    Returns:
        A number in [-1, 1].

    Raises:
        ValueError: ``K`` is not ``(N, N)``.

    Source: Cortes, Mohri and Rostamizadeh, 2012, arXiv:1203.0550.
    """
    matrix, labels = np.asarray(K, dtype=np.float64), np.asarray(y)
    if matrix.shape != (len(labels), len(labels)):
        raise ValueError(f"`K` must be ({len(labels)}, {len(labels)}) as `y` has it, got shape {matrix.shape}.")
    a, b = (m - m.mean(0) - m.mean(1)[:, None] + m.mean() for m in (matrix, (labels[:, None] == labels).astype(float)))
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norm) if norm > 0 else 0.0


def align_scale(
    kernel: QuantumKernel, X: ArrayLike, y: ArrayLike, *, bounds: tuple[float, float] = (0.05, 3.0)
) -> QuantumKernel:
    """Return the kernel with the scale whose exact matrix aligns best with the labels.

    Args:
        kernel: The kernel; it is not changed.
        X: ``(N, n)``.
        y: Labels, ``(N,)``.
        bounds: Range of scales: 12 on a logarithmic grid, then a bounded search around the best.

    Returns:
        A copy of ``kernel`` with another ``scale``.

    Raises:
        ValueError: ``bounds`` is no increasing pair of positive numbers.
    """
    low, high = bounds
    if not 0 < low < high:
        raise ValueError(f"`bounds` must be two increasing positive numbers, got {bounds!r}.")
    params = {**kernel.get_params(), "shots": None}

    def misfit(log_scale: float) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scales that alias: they lose by themselves
            return -kernel_alignment(QuantumKernel(**{**params, "scale": math.exp(log_scale)})(X), y)

    grid = np.linspace(math.log(low), math.log(high), 12)
    found = [misfit(value) for value in grid]
    best = int(np.argmin(found))
    around = (grid[max(best - 1, 0)], grid[min(best + 1, 11)])
    result: Any = minimize_scalar(misfit, bounds=around, method="bounded", options={"maxiter": 12})
    chosen = result.x if result.fun < found[best] else grid[best]
    return QuantumKernel(**{**kernel.get_params(), "scale": float(math.exp(chosen))})


@dataclass(frozen=True, eq=False)
class KernelDiagnosis:
    """How much a quantum kernel still says about the data; see :func:`diagnose`.

    Attributes:
        n_qubits: Number n of qubits.
        mean: Mean of the exact entries off the diagonal. It falls with n: kernels concentrate.
        spread: Their standard deviation.
        floor: Mean for states drawn at random, 1 / 2^n.
        shots: Number R of shots in question, or None.
        unusable: Share of entries below 1 / R, which R shots cannot tell from 0; 0 for exact values.
        shots_needed: Shots from which on the mean exceeds 3 / R.
        effective_rank: Exponential of the entropy of the eigenvalues: 1 if all samples look alike, N if all differ.
        alignment: :func:`kernel_alignment` with the labels, or None.
    """

    n_qubits: int
    mean: float
    spread: float
    floor: float
    shots: int | None
    unusable: float
    shots_needed: int
    effective_rank: float
    alignment: float | None

    @property
    def is_concentrated(self) -> bool:
        """Whether the mean entry is below 3 / R, for R shots."""
        return self.shots is not None and self.mean < 3 / self.shots


def diagnose(
    kernel: QuantumKernel, X: ArrayLike, y: ArrayLike | None = None, *, shots: int | None = None
) -> KernelDiagnosis:
    """Measure the concentration of a kernel on data, from its exact values.

    Args:
        kernel: The kernel.
        X: At least two samples, ``(N, n)``.
        y: Labels, ``(N,)``, for the alignment.
        shots: Shots in question; the kernel's own by default.

    Returns:
        :class:`KernelDiagnosis`.

    Raises:
        ValueError: There are fewer than two samples, or an option is out of range.
    """
    shots = kernel.shots if shots is None else shots
    if shots is not None:
        check_positive("shots", shots, integer=True)
    K = QuantumKernel(**{**kernel.get_params(), "shots": None})(np.asarray(X, dtype=np.float64))
    if len(K) < 2:
        raise ValueError(f"`X` must hold at least two samples, got {len(K)}.")
    entries = K[np.triu_indices(len(K), 1)]
    shares = np.linalg.eigvalsh(K).clip(min=1e-300)
    shares = shares / shares.sum()
    n = int(np.asarray(X).shape[1])
    return KernelDiagnosis(
        n_qubits=n,
        mean=float(entries.mean()),
        spread=float(entries.std()),
        floor=2.0**-n,
        shots=shots,
        unusable=0.0 if shots is None else float((entries < 1 / shots).mean()),
        shots_needed=math.ceil(3 / max(float(entries.mean()), 1e-300)),
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        alignment=None if y is None else kernel_alignment(K, y),
    )


class QuantumKernelClassifier(ClassifierMixin, BaseEstimator):
    """Support vector machine on a :class:`QuantumKernel`; its matrix is measured once, and repaired if shots need it.

    Args:
        feature_map: The circuit; :class:`ZZFeatureMap` by default. Features are angles: scale them into (0, 2 pi].
        C: Penalty; by default 1000 for exact kernels and 10 for measured ones.
        shots: Outcomes for each pair, or None for exact values.
        depolarizing: Probability p of the noise model.
        psd: ``"clip"``, ``"shift"`` or None: what :func:`psd_repair` does to the training matrix, with shots.
        scale: Factor of the data, or ``"align"`` to choose it by :func:`align_scale` on at most 500 samples.
        max_samples: Train on at most this many samples, drawn at random; the machine needs their full matrix.
        random_state: Seed of the draws and of the shots, which are then the same in every prediction.

    Attributes:
        classes_: The class labels.
        kernel_: The kernel that predictions use.
        svc_: The fitted ``sklearn.svm.SVC``.
        n_features_in_: Number of features.

    Example:
        >>> from dynakern.similarity.quantum import ad_hoc_data
        >>> X, y, X_test, y_test = ad_hoc_data(random_state=0)
        >>> QuantumKernelClassifier().fit(X, y).score(X_test, y_test)
        1.0

    Source: Havlíček et al., 2019, arXiv:1804.11326.
    """

    def __init__(
        self,
        feature_map: PauliFeatureMap | None = None,
        *,
        C: float | None = None,
        shots: int | None = None,
        depolarizing: float = 0.0,
        psd: str | None = "clip",
        scale: float | str = 1.0,
        max_samples: int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.feature_map = feature_map
        self.C = C
        self.shots = shots
        self.depolarizing = depolarizing
        self.psd = psd
        self.scale = scale
        self.max_samples = max_samples
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Measure the kernel of the samples and train the machine.

        Args:
            X: ``(N, n)``, finite.
            y: Labels, ``(N,)``, of at least two classes.

        Returns:
            This estimator.

        Raises:
            ValueError: Data or options are out of range.
        """
        checked: Any = validate_data(self, X, y, dtype=np.float64)
        samples, labels = checked
        check_classification_targets(labels)
        if self.psd is not None:
            check_choice("psd", self.psd, ("clip", "shift"))
        if isinstance(self.scale, str):
            check_choice("scale", self.scale, ("align",))
        rng = check_random_state(self.random_state)
        if self.max_samples is not None:
            check_positive("max_samples", self.max_samples, integer=True)
            rows = np.sort(rng.permutation(len(samples))[: self.max_samples])
            samples, labels = samples[rows], labels[rows]
        first, second = (int(seed) for seed in rng.randint(2**31 - 1, size=2))
        options = {"shots": self.shots, "depolarizing": self.depolarizing}
        kernel = QuantumKernel(
            self.feature_map, scale=1.0 if isinstance(self.scale, str) else self.scale, random_state=first, **options
        )
        if isinstance(self.scale, str):
            few = rng.permutation(len(samples))[:500]
            kernel = align_scale(kernel, samples[few], labels[few])
        K = kernel(samples)
        if self.shots is not None and self.psd is not None:
            K = psd_repair(K, self.psd)
        C = (1e3 if self.shots is None else 10.0) if self.C is None else self.C
        self.svc_ = SVC(kernel="precomputed", C=C).fit(K, labels)
        self.classes_ = self.svc_.classes_
        self.kernel_ = QuantumKernel(**{**kernel.get_params(), "random_state": second})
        self._support, self._count = samples[self.svc_.support_], len(samples)
        return self

    def _columns(self, X: Any) -> Floats:
        """Return the kernel with the training samples, ``(M, N)``; the machine reads only its support vectors'."""
        check_is_fitted(self)
        samples: Any = validate_data(self, X, dtype=np.float64, reset=False)
        K = np.zeros((len(samples), self._count))
        K[:, self.svc_.support_] = self.kernel_(samples, self._support)
        return K

    def decision_function(self, X: Any) -> Floats:
        """Return the distance from the boundary, ``(M,)``, or a score a class, ``(M, classes)``, if there are more."""
        columns = self._columns(X)
        return self.svc_.decision_function(columns)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the labels of ``X`` ``(M, n)``, ``(M,)``."""
        columns = self._columns(X)
        return self.svc_.predict(columns)


def classify(*, features: int, random_state: int | None = None) -> Pipeline:
    """Return a competitor for classification of tables.

    More than 8 features are reduced to their 8 leading principal components, since kernels of more qubits concentrate.
    Each is brought to [-1, 1]; the scale of the angles is chosen by alignment with the labels. At most 3,000 samples
    are trained on, a limit of the kernel machine.

    Args:
        features: Number of features.
        random_state: Seed of the draw of samples.
    """
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import MinMaxScaler

    machine = QuantumKernelClassifier(
        ZZFeatureMap(entanglement="linear"), C=10.0, scale="align", max_samples=3000, random_state=random_state
    )
    components = [("components", PCA(8, random_state=random_state))] if features > 8 else []
    return Pipeline([*components, ("range", MinMaxScaler((-1, 1), clip=True)), ("machine", machine)])
