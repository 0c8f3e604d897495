"""Kernels between data points: infinite networks, Gaussian processes, densities, quantum states, private sums."""

from dynakern.similarity.kernel import SimilarityKernel, to_gpytorch

__all__ = [
    "SimilarityKernel",
    "to_gpytorch",
]
