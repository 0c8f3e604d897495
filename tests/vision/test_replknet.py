"""RepLKNet: published sizes, merging, the sweep, the arithmetic of the shape bias, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dynakern import create_model, load_official
from dynakern.measure import count_flops
from dynakern.testing import assert_same
from dynakern.vision import RepLKNet, shape_bias, sweep_kernels

SIZES = {  # name: millions of parameters, billions of multiply-adds, side; all of the merged network
    "replknet_31b": (79.53, 15.35, 224),
    "replknet_31l": (172.17, 95.99, 384),
    "replknet_xl": (335.40, 128.73, 320),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_of_the_merged_network(name):
    millions, billions, side = SIZES[name]
    with torch.device("meta"):
        model = create_model(name, merged=True).eval()
        flops = count_flops(lambda: model(torch.zeros(1, 3, side, side)))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=6e-3)
    assert flops / 2e9 == pytest.approx(billions, rel=1e-3)


def test_merged_weights_load_into_a_merged_network():
    torch.manual_seed(0)
    model = RepLKNet((7, 5), (1, 1), (8, 12), small_kernel=3, num_classes=4).eval()
    state = model.state_dict()
    for stage in range(2):
        block = f"stages.{stage}.blocks.0.large_kernel"
        kernel = model.fuse().get_submodule(f"{block}.lkb_reparam")
        state = {k: v for k, v in state.items() if not k.startswith(block)}
        state |= {f"{block}.lkb_reparam.{k}": v for k, v in kernel.state_dict().items()}
    merged = load_official(RepLKNet((7, 5), (1, 1), (8, 12), merged=True, num_classes=4), state).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same(merged(x), model(x))
        assert_same(merged.fuse()(x), model(x), rtol=1e-4)


def test_stages_and_pooled_features():
    model = RepLKNet((7, 5), (1, 2), (8, 12), in_chans=1, num_classes=0, drop_path_rate=0.2).eval()
    maps = model.forward_intermediates(torch.zeros(1, 1, 32, 40))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 8, 10), (1, 12, 4, 5)]
    assert model(torch.zeros(1, 1, 32, 40)).shape == (1, 12)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2])


def test_sweep_uses_one_seed():
    networks = sweep_kernels(lambda k: RepLKNet((k,), (1,), (4,), small_kernel=None), (3, 7))
    assert list(networks) == [3, 7]
    assert torch.equal(networks[3].stem[0].conv.weight, networks[7].stem[0].conv.weight)
    with pytest.raises(ValueError, match="must be odd, got 4"):
        sweep_kernels(lambda k: torch.nn.Identity(), (4,))


def test_shape_bias_counts_decisions():
    groups = [[0, 1], [2], [3]]
    chosen = [0, 0, 1, 2, 2, 1]  # coarse classes
    members = {0: 1, 1: 2, 2: 3}
    p = np.full((6, 4), 0.05)
    p[np.arange(6), [members[c] for c in chosen]] = 0.85
    found = shape_bias(p, [0, 0, 0, 1, 1, 2], [1, 1, 1, 2, 2, 0], groups)
    assert found.per_class[0] == pytest.approx(2 / 3)  # two for the shape, one for the texture
    assert found.per_class[1] == 0
    assert math.isnan(found.per_class[2])  # a decision for neither
    assert found.mean == pytest.approx(1 / 3)
    assert found.overall == pytest.approx(2 / 5)
    assert shape_bias(torch.tensor(p), [0] * 6, [2] * 6, groups).overall == pytest.approx(2 / 4)


def test_members_count_by_their_mean():
    p = np.array([[0.3, 0.3, 0.4, 0.0], [0.5, 0.0, 0.3, 0.2]])  # group 0 has the larger sum, group 1 the larger mean
    assert shape_bias(p, [1, 1], [0, 0], [[0, 1], [2], [3]]).overall == 1


def test_refusals():
    with pytest.raises(ValueError, match="one entry a stage, got 1, 2 and 2"):
        RepLKNet((7,), (1, 1), (8, 12))
    with pytest.raises(ValueError, match="must be odd, got 8"):
        RepLKNet((8,), (1,), (8,))
    with pytest.raises(ValueError, match="`small_kernel` 5 is larger than the large kernel 3"):
        RepLKNet((3,), (1,), (8,))
    with pytest.raises(ValueError, match="must be 1, 2 or 4"):
        RepLKNet((7,), (1,), (8,), stem_stride=3)
    with pytest.raises(ValueError, match="size 3 on axis 1"):
        RepLKNet((7,), (1,), (8,))(torch.zeros(1, 1, 16, 16))
    p = np.full((2, 4), 0.25)
    with pytest.raises(ValueError, match="agree in image 1"):
        shape_bias(p, [0, 1], [1, 1], [[0], [1]])
    with pytest.raises(ValueError, match="some of the 4 classes"):
        shape_bias(p, [0, 0], [1, 1], [[0], [4]])
    with pytest.raises(ValueError, match="must be finite"):
        shape_bias(p * np.nan, [0, 0], [1, 1], [[0], [1]])
    with pytest.raises(ValueError, match=r"must be \(N, classes\)"):
        shape_bias(p, [0], [1, 1], [[0], [1]])
