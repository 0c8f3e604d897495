"""Quantum feature maps: a kernel that separates what classical ones do not, a circuit that learns it, and the limits.

Claims behind Havlíček et al., 2019, arXiv:1804.11326, at a size for a laptop: (1) on the paper's synthetic data the
quantum kernel classifies nearly all test samples and radial-basis machines, tuned by cross-validation on the features
and on their sines and cosines, do not; shots change little; (2) the variational classifier needs depth; (3) kernels are
at least 50 times as fast as Qiskit's for the same numbers; (4) kernels of uniform data concentrate as qubits are added,
which is reported. The data is made by a quantum circuit: no claim is made that such kernels help on other data.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

from dynakern.claims.run import Measurement, NotMeasurable, Progress
from dynakern.measure import time_interleaved
from dynakern.similarity import (
    QuantumKernel,
    QuantumKernelClassifier,
    VariationalQuantumClassifier,
    ZZFeatureMap,
    ad_hoc_data,
)
from dynakern.similarity.quantum import diagnose

__all__ = ["CLAIMS"]

_GRID = {"C": [1, 10, 100, 1000], "gamma": [0.1, 0.3, 1, 3, 10]}
_Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _data(seed: int) -> _Data:
    return ad_hoc_data(2, gap=0.3, n_per_class=20, n_test_per_class=200, random_state=seed)


def _turned(X: np.ndarray) -> np.ndarray:
    return np.concatenate([np.sin(X), np.cos(X)], 1)


def _radial(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray) -> float:
    accuracy: Any = GridSearchCV(SVC(kernel="rbf"), _GRID, cv=5).fit(X, y).score(X_test, y_test)
    return accuracy


def kernel_separates(progress: Progress) -> Iterator[Measurement]:
    """Test accuracy over ten data sets of a gap of 0.3: the quantum kernel and radial-basis machines."""
    exact, measured, plain, turned = [], [], [], []
    for seed in range(10):
        progress(f"data set {seed}", seed / 10)
        X, y, X_test, y_test = _data(seed)
        exact.append(QuantumKernelClassifier(C=1e3).fit(X, y).score(X_test, y_test))
        noisy = QuantumKernelClassifier(C=10.0, shots=1000, psd="clip", random_state=seed)
        measured.append(noisy.fit(X, y).score(X_test, y_test))
        plain.append(_radial(X, y, X_test, y_test))
        turned.append(_radial(_turned(X), y, _turned(X_test), y_test))
    best = max(np.mean(plain), np.mean(turned))
    value = float(np.mean(exact))
    yield Measurement(name="accuracy, exact kernel", value=value, unit="accuracy", at_least=0.98)
    yield Measurement(
        name="the same, over the best radial-basis machine",
        value=value,
        unit="accuracy",
        at_least=float(best) + 0.25,
        baseline=float(best),
    )
    yield Measurement(name="accuracy, radial basis", value=float(np.mean(plain)), unit="accuracy")
    yield Measurement(name="accuracy, radial basis of sines and cosines", value=float(np.mean(turned)), unit="accuracy")
    yield Measurement(name="accuracy, 1,000 shots, clipped", value=float(np.mean(measured)), unit="accuracy")


def circuit_needs_depth(progress: Progress) -> Iterator[Measurement]:
    """Test accuracy of the variational classifier over five data sets, by depth of the trained circuit."""
    bounds = {0: (None, 0.85), 1: (None, None), 2: (0.97, None), 4: (0.97, None)}
    for index, (depth, (at_least, at_most)) in enumerate(bounds.items()):
        scores = []
        for seed in range(5):
            progress(f"depth {depth}, data set {seed}", (index + seed / 5) / len(bounds))
            X, y, X_test, y_test = _data(seed)
            classifier = VariationalQuantumClassifier(depth=depth, lr=0.1, steps=150, restarts=3, random_state=seed)
            scores.append(classifier.fit(X, y).score(X_test, y_test))
        yield Measurement(
            name=f"accuracy, depth {depth}",
            value=float(np.mean(scores)),
            unit="accuracy",
            at_least=at_least,
            at_most=at_most,
        )


_PEER = """
import os, sys
import numpy as np
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from qiskit.circuit.library import zz_feature_map
from qiskit_machine_learning.kernels import FidelityStatevectorKernel
for line in sys.stdin:
    path = line.strip()
    X = np.load(path)
    K = FidelityStatevectorKernel(feature_map=zz_feature_map(X.shape[1], reps=2, entanglement="full")).evaluate(X)
    np.save(path.replace("X.npy", "K.npy"), K)
    print("done", file=answers, flush=True)
"""


def _qiskit() -> Callable[[Path], None]:
    """Start Qiskit's kernel in a process of its own: a function of the file that samples stand in.

    The interpreter is this one where it has the package, else the one that DYNAKERN_PEER_QISKIT names.

    Raises:
        NotMeasurable: Neither is there, or the process ended.
    """
    python = sys.executable if importlib.util.find_spec("qiskit_machine_learning") else None
    python = python or os.environ.get("DYNAKERN_PEER_QISKIT")
    if not python:
        raise NotMeasurable(
            "The peer qiskit-machine-learning is not installed; set DYNAKERN_PEER_QISKIT to the Python that has it."
        )
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.Popen(
        [python, "-W", "ignore", "-c", _PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
    )
    atexit.register(process.kill)

    def evaluate(path: Path) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        if process.stdout.readline() != "done\n":
            raise NotMeasurable(f"The peer qiskit-machine-learning under {python} ended; its message is above.")

    return evaluate


def kernel_speed(progress: Progress) -> Iterator[Measurement]:
    """The kernel of 100 samples against Qiskit's FidelityStatevectorKernel: the same numbers, 50 times as fast."""
    peer = _qiskit()
    with tempfile.TemporaryDirectory(prefix="dynakern-quantum-") as folder:
        path = Path(folder) / "X.npy"
        for index, n in enumerate((4, 8)):
            progress(f"timing {n} qubits", index / 2)
            X = np.random.default_rng(0).uniform(0, 2 * np.pi, (100, n))
            np.save(path, X)
            kernel = QuantumKernel(ZZFeatureMap(n, reps=2, entanglement="full"))
            peer(path)
            difference = float(np.abs(kernel(X) - np.load(Path(folder) / "K.npy")).max())
            yield Measurement(name=f"largest difference, n = {n}", value=difference, unit="absolute", at_most=1e-13)
            times = time_interleaved({"ours": lambda k=kernel, X=X: k(X), "qiskit": lambda: peer(path)}, repeats=5)
            ratio = times["qiskit"].median / times["ours"].median
            yield Measurement(name=f"qiskit / ours, n = {n}", value=ratio, unit="x", at_least=50)


def concentration(progress: Progress) -> Iterator[Measurement]:
    """Mean entry off the diagonal for 200 uniform samples, by number of qubits (baseline: random states)."""
    rng = np.random.default_rng(0)
    for index, n in enumerate((2, 4, 6, 8, 10)):
        progress(f"{n} qubits", index / 5)
        found = diagnose(QuantumKernel(ZZFeatureMap(n)), rng.uniform(0, 2 * np.pi, (200, n)), shots=1000)
        yield Measurement(name=f"mean entry, n = {n}", value=found.mean, unit="", baseline=found.floor)
        yield Measurement(name=f"share that 1,000 shots cannot use, n = {n}", value=found.unusable, unit="")


CLAIMS = (kernel_separates, circuit_needs_depth, kernel_speed, concentration)
