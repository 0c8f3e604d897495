"""Log densities beside scikit-learn's KernelDensity, its exact walk of one leaf and its default tree."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from harness import Case, main
from sklearn.neighbors import KernelDensity

from dynakern.measure import time_interleaved
from dynakern.similarity import HighDimKDE


def cases():
    rng = np.random.default_rng(0)
    a = torch.randn(1536, 1536, dtype=torch.float64)
    rate = 2 * 1536**3 / time_interleaved({"mm": lambda: a @ a}, repeats=5)["mm"].median
    for d, n, q, h in ((50, 20_000, 2_000, 1.0), (50, 20_000, 2_000, 0.5), (8, 20_000, 2_000, 0.4)):
        points, queries = rng.standard_normal((n, d)), rng.standard_normal((q, d))
        ours = HighDimKDE(bandwidth=h).fit(points)
        exact = KernelDensity(bandwidth=h, algorithm="kd_tree", leaf_size=n).fit(points)
        tree = KernelDensity(bandwidth=h).fit(points)

        def check(ours=ours, exact=exact, queries=queries):
            np.testing.assert_allclose(ours.score_samples(queries), exact.score_samples(queries), rtol=1e-9)

        yield Case(
            name=f"gaussian kernel, d = {d}, n = {n}, q = {q}, h = {h}",
            ours=lambda ours=ours, queries=queries: ours.score_samples(queries),
            peers={
                "scikit-learn, one leaf": lambda exact=exact, queries=queries: exact.score_samples(queries),
                "scikit-learn, default tree": lambda tree=tree, queries=queries: tree.score_samples(queries),
            },
            check=check,
            floor_seconds=2 * q * n * d / rate,
            floor_note="FLOPs of the distances at the rate of a 1536 x 1536 matrix product; exponentials on top",
            at_least=10.0 if d == 50 else None,
            repeats=5,
        )


if __name__ == "__main__":
    main("density", "Kernel densities", cases)
