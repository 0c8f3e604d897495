"""Dynamic time warping beside tslearn's compiled one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import Case, main

from dynakern.ops import dtw
from dynakern.testing import assert_same


def cases():
    from tslearn.metrics import cdist_dtw

    for n, length, channels in ((40, 251, 1), (40, 100, 6)):
        torch.manual_seed(0)
        x = torch.randn(n, length, channels, dtype=torch.float64)
        array, radius = x.numpy(), int(0.1 * length)

        def peer(array=array, radius=radius):
            return cdist_dtw(array, array.copy(), global_constraint="sakoe_chiba", sakoe_chiba_radius=radius)

        def check(x=x, peer=peer):
            assert_same(dtw(x, x, window=0.1), torch.from_numpy(peer()), rtol=1e-6)

        yield Case(
            name=f"{n} x {n} series of {length} steps, {channels} channel(s), band 10 %",
            ours=lambda x=x: dtw(x, x, window=0.1),
            peers={"tslearn cdist_dtw": peer},
            check=check,
            repeats=5,
        )


if __name__ == "__main__":
    main("dtw", "Dynamic time warping", cases)
