r"""Similarities to a private data set: one differentially private release, unlimited queries.

A curator holds rows :math:`x \in X` and wants to publish one object from which anybody can evaluate
:math:`S_f(y) = \sum_{x \in X} f(x, y)` for any number of queries y. The rows enter integer statistics whose change by
one row is bounded (counts of dyadic trees, moments, random features, lattice moments, class sums); exact integer noise
is added once; all answers are post-processing of what was released and cost no privacy.

Backurs, Lin, Mahabadi, Silwal & Tarnawski, 2024, arXiv:2403.08917. Implemented: dyadic trees for l1 and lp^p, trees of
counts and sums (Liu et al., 2024, arXiv:2409.01688), moments for the squared distance, l2 by a Gaussian embedding into
l1, random features and the fast Gauss transform (Wagner, Naamad & Mishra, 2023), the projection that needs not grow
with the data, the kernels 1 / (1 + s) by one release of a continuous mixture (the paper composes several), and the
nearest-mean classifier. The paper's body was not at hand: its bounds' constants are not claimed. Not implemented:
structured projections. Timing is no secret: releases are for a curator's own machine.

Example:
    >>> import numpy as np
    >>> rows = np.random.default_rng(0).uniform(size=(5000, 3))
    >>> accountant = PrivacyAccountant(1.0)
    >>> sums = PrivateDistanceSum(bounds=(0, 1), epsilon=0.5, accountant=accountant).fit(rows)
    >>> kde = PrivateKDE(bandwidth=0.5, epsilon=0.5, accountant=accountant).fit(rows)
    >>> sums.sum(rows[:4]).shape, kde.score_samples(rows[:4]).shape, accountant.remaining
    ((4,), (4,), (0.0, 0.0))
"""

from __future__ import annotations

from dynakern.similarity.private.centroid import PrivateSimilarityClassifier, release_centroids
from dynakern.similarity.private.density import PrivateKDE
from dynakern.similarity.private.distance import (
    PrivateDistanceSum,
    count_sum_distance,
    moment_distance,
    release_count_sums,
    release_moments,
    release_tree,
    tree_distance,
)
from dynakern.similarity.private.noise import (
    PrivacyAccountant,
    add_noise,
    audit_epsilon,
    discrete_gaussian,
    discrete_laplace,
    zcdp_budget,
)
from dynakern.similarity.private.sketches import (
    draw_frequencies,
    fgt_similarity,
    inverse_mixture,
    johnson_lindenstrauss,
    release_fgt,
    release_rff,
    rff_similarity,
)

__all__ = [
    "PrivacyAccountant",
    "PrivateDistanceSum",
    "PrivateKDE",
    "PrivateSimilarityClassifier",
    "add_noise",
    "audit_epsilon",
    "classify",
    "count_sum_distance",
    "density_estimator",
    "discrete_gaussian",
    "discrete_laplace",
    "draw_frequencies",
    "fgt_similarity",
    "inverse_mixture",
    "johnson_lindenstrauss",
    "moment_distance",
    "release_centroids",
    "release_count_sums",
    "release_fgt",
    "release_moments",
    "release_rff",
    "release_tree",
    "rff_similarity",
    "tree_distance",
    "zcdp_budget",
]


def classify(*, features: int, random_state: int | None) -> PrivateSimilarityClassifier:
    """Return the nearest-mean classifier of ``dynakern compare classify``, with (1, 1e-5)-privacy.

    Args:
        features: Number of features, not used.
        random_state: Not used: the noise comes from the operating system.
    """
    return PrivateSimilarityClassifier(epsilon=1.0, delta=1e-5)


def density_estimator(*, features: int, random_state: int | None) -> PrivateKDE:
    """Return the density of ``dynakern compare density``, with (1, 1e-5)-privacy, for standardised rows ``(N, P)``.

    The bandwidth depends on the number of features alone: two standard normal points have mean similarity 0.2.

    Args:
        features: Number of features.
        random_state: Seed of the public frequencies.
    """
    share = 0.2 ** (2 / features)
    bandwidth = (2 * share / (1 - share)) ** 0.5
    return PrivateKDE(bandwidth=bandwidth, epsilon=1.0, delta=1e-5, num_features=1024, random_state=random_state)
