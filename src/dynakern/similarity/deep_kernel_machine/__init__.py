r"""Deep kernel machines: kernel methods with layers, whose Gram matrices learn.

A wide Bayesian network has one Gram matrix a layer, fixed by its prior. In the representation-learning limit (the
likelihood grows with the widths) the posterior over the Gram matrices is a point too, but one that follows the labels:
the maximiser of

.. math:: \mathcal L(G^1, \dots, G^L) = \log P(Y \mid G^L) - \sum_l \nu_l\,
    \mathrm{KL}\big(\mathcal N(0, G^l) \,\|\, \mathcal N(0, K(G^{l-1}))\big),

where :math:`K(\cdot)` is a kernel that needs only entries of a Gram matrix. :math:`\nu \to \infty` gives back the fixed
kernel (NNGP), a small :math:`\nu` lets the representation follow the labels. With :math:`P_i` inducing points it is a
network whose weights are Gram matrices.

Implemented: the sparse machine (:class:`SparseDKM`) in both parametrisations of the Gram matrices, with exact and
Taylor KL, norms and all five kernels; estimators on it (:class:`DKMClassifier`, :class:`DKMRegressor`); the full
machine with its exact objective (:class:`FullDKM`). The extension to posteriors that are not Gaussian is an appendix
of the paper and is not implemented.

Paper: Yang, Robeyns, Milsom, Anson, Schoots and Aitchison, 2023, "A theory of representation learning gives a deep
generalisation of kernel methods", arXiv:2108.13097.

Example:
    >>> import torch
    >>> model = SparseDKM(3, 2, num_inducing=10, layers=1).initialize(torch.randn(10, 3, dtype=torch.float64))
    >>> mean, variance, objective = model(torch.randn(5, 3, dtype=torch.float64))
    >>> mean.shape, variance.shape
    (torch.Size([5, 2]), torch.Size([5]))
"""

from dynakern.similarity.deep_kernel_machine.estimators import DKMClassifier, DKMRegressor, classify, regress
from dynakern.similarity.deep_kernel_machine.full import FullDKM
from dynakern.similarity.deep_kernel_machine.machine import (
    GramKernel,
    GramLayer,
    GramNorm,
    GramState,
    SparseDKM,
    convert_state_dict,
)

__all__ = [
    "DKMClassifier",
    "DKMRegressor",
    "FullDKM",
    "GramKernel",
    "GramLayer",
    "GramNorm",
    "GramState",
    "SparseDKM",
    "classify",
    "convert_state_dict",
    "regress",
]
