r"""Quantum feature maps on a fast exact simulator: kernels, classifiers, and what shots and noise leave of them.

A feature map encodes n features in the state of n qubits, :math:`x \mapsto |\Phi(x)\rangle`, a vector of
:math:`2^n` amplitudes. The kernel :math:`|\langle \Phi(x) | \Phi(z) \rangle|^2` goes into a support vector machine,
or a circuit is trained behind the map. States are computed once a sample by Walsh-Hadamard transforms, and kernels by
two real matrix products, instead of one circuit a pair.

Implemented: maps of Z, ZZ and arbitrary Pauli words; the kernel exactly, with depolarising noise and from a finite
number of shots; repair of indefinite matrices; the kernel machine; the variational classifier with exact gradients and
SPSA; the data set whose separability is guaranteed; a diagnosis of concentration; a scale trained by alignment. Not
implemented: other noise models, error mitigation, execution on hardware. Signs and order of bits are those of Qiskit.

Paper: Havlíček, Córcoles, Temme, Harrow, Kandala, Chow and Gambetta, 2019, "Supervised learning with quantum enhanced
feature spaces", Nature 567, arXiv:1804.11326.

Example:
    >>> from sklearn.svm import SVC
    >>> X, y, X_test, y_test = ad_hoc_data(random_state=0)
    >>> SVC(kernel=QuantumKernel(ZZFeatureMap()), C=1000.0).fit(X, y).score(X_test, y_test)
    1.0
"""

from dynakern.similarity.quantum.feature_map import PauliFeatureMap, ZFeatureMap, ZZFeatureMap, entangling_sets
from dynakern.similarity.quantum.kernel import (
    KernelDiagnosis,
    QuantumKernel,
    QuantumKernelClassifier,
    align_scale,
    classify,
    diagnose,
    kernel_alignment,
    psd_repair,
)
from dynakern.similarity.quantum.variational import VariationalQuantumClassifier, ad_hoc_data, apply_ansatz, parity

__all__ = [
    "KernelDiagnosis",
    "PauliFeatureMap",
    "QuantumKernel",
    "QuantumKernelClassifier",
    "VariationalQuantumClassifier",
    "ZFeatureMap",
    "ZZFeatureMap",
    "ad_hoc_data",
    "align_scale",
    "apply_ansatz",
    "classify",
    "diagnose",
    "entangling_sets",
    "kernel_alignment",
    "parity",
    "psd_repair",
]
