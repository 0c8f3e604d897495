"""Kernels between data points: infinite networks, Gaussian processes, densities, quantum states, private sums."""

from dynakern.similarity.deep_kernel_machine import DKMClassifier, DKMRegressor, FullDKM, SparseDKM
from dynakern.similarity.density import HighDimKDE, KDEPhases, kde_phases
from dynakern.similarity.kernel import SimilarityKernel, to_gpytorch
from dynakern.similarity.private import PrivacyAccountant, PrivateDistanceSum, PrivateKDE, PrivateSimilarityClassifier

__all__ = [
    "DKMClassifier",
    "DKMRegressor",
    "FullDKM",
    "HighDimKDE",
    "KDEPhases",
    "PrivacyAccountant",
    "PrivateDistanceSum",
    "PrivateKDE",
    "PrivateSimilarityClassifier",
    "SimilarityKernel",
    "SparseDKM",
    "kde_phases",
    "to_gpytorch",
]
