"""Kernel products beside KeOps on the CPU and beside blocked ``torch.cdist``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern.ops import gram_product
from dynakern.testing import assert_same

ROWS = 1024


def blocked_cdist(x, v, scale):
    return torch.cat([(-(torch.cdist(part, x) / scale).square() / 2).exp() @ v for part in x.split(ROWS)])


def keops(x, v, scale):
    from pykeops.torch import Vi, Vj

    return (-((Vi(x) - Vj(x)) ** 2).sum(-1) / (2 * scale**2)).exp() @ v


def peak_rate(dtype):
    """Return the rate of a large matrix product on this machine now, FLOPs a second."""
    from dynakern.measure import time_interleaved

    a = torch.randn(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / time_interleaved({"mm": lambda: a @ a}, repeats=5)["mm"].median


def cases():
    shapes = [(20_000, 3, torch.float32), (20_000, 32, torch.float32), (10_000, 32, torch.float64)]
    for n, features, dtype in [*shapes, (200_000, 32, torch.float32)]:
        torch.manual_seed(0)
        x, v, scale = torch.randn(n, features, dtype=dtype), torch.randn(n, 1, dtype=dtype), features**0.5
        large, name = n > 100_000, str(dtype).removeprefix("torch.")

        def check(x=x, v=v, scale=scale, large=large):
            part = slice(0, 2000) if large else slice(None)
            assert_same(
                gram_product("gaussian", x[part], v[part], length_scale=scale), blocked_cdist(x[part], v[part], scale)
            )
            if not large:
                assert_same(gram_product("gaussian", x, v, length_scale=scale), keops(x, v, scale))

        peers = {"blocked torch.cdist": lambda x=x, v=v, scale=scale: blocked_cdist(x, v, scale)}
        if not large:  # there it takes a quarter of an hour
            peers = {"KeOps": lambda x=x, v=v, scale=scale: keops(x, v, scale), **peers}
        yield Case(
            name=f"gaussian kernel of {n} points, {features} features, {name}, times a vector",
            ours=lambda x=x, v=v, scale=scale: gram_product("gaussian", x, v, length_scale=scale),
            peers=peers,
            check=check,
            floor_seconds=2 * n * n * (features + 1) / peak_rate(dtype),
            floor_note="FLOPs of both products at the rate of a 2048 x 2048 matrix product; exponentials on top",
            at_least=1.0,
            repeats=1 if large else 5,
            memory=large,
        )


if __name__ == "__main__":
    main("gram", "Kernel products", cases)
