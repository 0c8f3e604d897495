r"""Kernel densities in many dimensions: the bandwidth, and whether the estimate can be trusted.

In d dimensions with n points and :math:`\alpha = \ln n / d` fixed, a kernel density is the partition function of a
random energy model. Above a bandwidth :math:`h_{CLT}` it is a mean of many terms with Gaussian fluctuations; between
:math:`h_G` and :math:`h_{CLT}` it is right on average but heavy-tailed; below :math:`h_G` a handful of points decide.
The bandwidth of least Kullback-Leibler divergence lies, for Gaussian data, always below :math:`h_G`.

Implemented: the estimator with its bandwidth rules (:class:`HighDimKDE`), the phases of Gaussian data
(:func:`kde_phases`), exact means at finite n (:func:`expected_log_partition`, :func:`expected_participation`), and a
diagnosis of real data that assumes no Gaussian. Only the paper's abstract was at hand: the formulas are derived from it
and reproduce what it states; kernels other than the Gaussian are treated by the same argument, which the paper may do
otherwise. Leave-one-out is the default rule, since the theory's optimum is poor for clustered data.

Paper: Biroli and Mézard, 2024, "Kernel density estimators in large dimensions", arXiv:2408.05807.

Example:
    >>> import numpy as np
    >>> phases = kde_phases(np.log(20_000) / 50)
    >>> bool(phases.h_opt < phases.h_g < phases.h_clt)
    True
"""

from dynakern.similarity.density.estimator import Diagnosis, HighDimKDE, density
from dynakern.similarity.density.phases import KDEPhases, expected_log_partition, expected_participation, kde_phases

__all__ = [
    "Diagnosis",
    "HighDimKDE",
    "KDEPhases",
    "density",
    "expected_log_partition",
    "expected_participation",
    "kde_phases",
]
