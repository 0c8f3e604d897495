"""Kernels between data points: infinite networks, Gaussian processes, densities, quantum states, private sums."""

from dynakern.similarity.deep_kernel_machine import DKMClassifier, DKMRegressor, FullDKM, SparseDKM
from dynakern.similarity.density import HighDimKDE, KDEPhases, kde_phases
from dynakern.similarity.kernel import SimilarityKernel, to_gpytorch
from dynakern.similarity.private import PrivacyAccountant, PrivateDistanceSum, PrivateKDE, PrivateSimilarityClassifier
from dynakern.similarity.quantum import (
    PauliFeatureMap,
    QuantumKernel,
    QuantumKernelClassifier,
    VariationalQuantumClassifier,
    ZFeatureMap,
    ZZFeatureMap,
    ad_hoc_data,
    psd_repair,
)

__all__ = [
    "DKMClassifier",
    "DKMRegressor",
    "FullDKM",
    "HighDimKDE",
    "KDEPhases",
    "PauliFeatureMap",
    "PrivacyAccountant",
    "PrivateDistanceSum",
    "PrivateKDE",
    "PrivateSimilarityClassifier",
    "QuantumKernel",
    "QuantumKernelClassifier",
    "SimilarityKernel",
    "SparseDKM",
    "VariationalQuantumClassifier",
    "ZFeatureMap",
    "ZZFeatureMap",
    "ad_hoc_data",
    "kde_phases",
    "psd_repair",
    "to_gpytorch",
]
