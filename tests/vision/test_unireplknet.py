"""UniRepLKNet: published sizes, merging, fusing, kernel rules, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynakern import create_model, load_official
from dynakern.measure import count_flops, count_parameters
from dynakern.testing import assert_same, randn
from dynakern.vision import UniRepLKNet
from dynakern.vision.unireplknet import (
    DilatedReparamBlock,
    UniRepLKNetBlock,
    default_kernel_sizes,
    layer_decay_scales,
)
from dynakern.vision.unireplknet.network import BRANCHES

SIZES = {  # name: millions of parameters fused and in training, billions of multiply-adds, side
    "unireplknet_a": (4.437, 4.649, 0.640, 224),
    "unireplknet_f": (6.235, 6.489, 0.905, 224),
    "unireplknet_p": (10.742, 11.081, 1.573, 224),
    "unireplknet_n": (18.319, 18.819, 2.767, 224),
    "unireplknet_t": (31.038, 31.693, 4.899, 224),
    "unireplknet_s": (55.646, 56.457, 9.094, 224),
    "unireplknet_b": (98.008, 99.089, 47.18, 384),
    "unireplknet_l": (218.455, 220.076, 105.42, 384),
    "unireplknet_xl": (386.529, 388.691, 186.77, 384),
}


def noisy(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
        if hasattr(module, "beta") and module.beta is not None:
            nn.init.normal_(module.gamma)
            nn.init.normal_(module.beta)
    return model.double().eval()


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    fused, training, billions, side = SIZES[name]
    with torch.device("meta"):
        assert count_parameters(create_model(name)) / 1e6 == pytest.approx(training, abs=1e-3)
        model = create_model(name, deploy=True).eval()
        flops = count_flops(lambda: model(torch.zeros(1, 3, side, side)))
    assert count_parameters(model) / 1e6 == pytest.approx(fused, abs=1e-3)
    assert flops / 2e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("size", sorted(BRANCHES))
def test_merged_kernel_is_the_sum_of_all_branches(size):
    block, x = noisy(DilatedReparamBlock(3, size)), randn(2, 3, 19, 21)
    expected = block(x)  # with gradients the branches run one by one
    weight, bias = block.merged()
    assert weight.shape == (3, 1, size, size)
    assert_same(F.conv2d(x, weight, bias, padding=size // 2, groups=3), expected)
    with torch.no_grad():
        assert_same(block(x), expected)


def test_a_kept_kernel_follows_the_weights():
    block, x = noisy(DilatedReparamBlock(3, 7)), randn(1, 3, 9, 9, requires_grad=False)
    with torch.no_grad():
        before = block(x)
        assert torch.equal(block(x), before)
        block.dil_bn_k3_2.running_mean.add_(1)
        after = block(x)
    assert float((after - before).abs().max()) > 1e-3
    assert_same(after, block(x).detach())
    block.load_state_dict({k: v * 2 if k.endswith("weight") else v for k, v in block.state_dict().items()})
    with torch.no_grad():
        kept = block(x)
    assert_same(kept, block(x).detach())
    assert "_kept" not in block.state_dict()


@pytest.mark.parametrize("size", [0, 3, 5, 7])
def test_fused_block_and_its_keys(size):
    block = noisy(UniRepLKNetBlock(8, size, layer_scale_init_value=0.5))
    x = randn(2, 8, 9, 8, requires_grad=False)
    with torch.no_grad():
        expected = block(x)
        state = block.state_dict()
        block.fuse()
        assert_same(block(x), expected)
        block.fuse()  # a second time changes nothing
        assert_same(block(x), expected)
    deployed = UniRepLKNetBlock(8, size, deploy=True)
    assert set(block.state_dict()) == set(deployed.state_dict())
    assert len(state) > len(deployed.state_dict())


def test_deployed_weights_load():
    sizes = {"depths": (1, 1), "dims": (8, 12), "kernel_sizes": ((3,), (7,)), "num_classes": 4}
    model = noisy(UniRepLKNet(**sizes))
    deployed = load_official(UniRepLKNet(**sizes, deploy=True).double(), model.fuse().state_dict()).eval()
    x = randn(2, 3, 32, 32, requires_grad=False)
    with torch.no_grad():
        assert_same(deployed(x), model(x))


def test_kernels_of_published_depths_and_others():
    assert default_kernel_sizes((3, 3, 18, 3))[2] == (13, 3) * 9
    assert default_kernel_sizes((3, 3, 27, 3))[2] == (13, 3, 3) * 9
    assert default_kernel_sizes((2, 2, 8, 2))[0] == (3, 3)
    with pytest.raises(ValueError, match="have no default kernels"):
        UniRepLKNet((1, 1, 1, 1), (8, 8, 8, 8))


def test_features_only_norms_every_stage():
    model = UniRepLKNet((1, 1), (8, 12), kernel_sizes=((3,), (5,)), features_only=True, in_chans=1).eval()
    maps = model(torch.randn(1, 1, 32, 40))
    assert [tuple(m.shape) for m in maps] == [(1, 8, 8, 10), (1, 12, 4, 5)]
    for m in maps:
        assert float(m.detach().mean(1).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="has no head"):
        model.forward_head(maps[-1])


def test_layer_decay():
    with torch.device("meta"):
        model = create_model("unireplknet_s")
    scales = layer_decay_scales(model, 0.5)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    layer = {name: -round(torch.log2(torch.tensor(s)).item()) for name, s in scales.items()}
    assert layer["head.weight"] == 0
    assert layer["downsample_layers.0.0.weight"] == 13
    assert layer["stages.0.0.gamma"] == 12
    assert layer["stages.1.2.gamma"] == 11
    assert [layer[f"stages.2.{b}.gamma"] for b in (0, 2, 3, 26)] == [10, 10, 9, 2]
    assert layer["stages.3.0.gamma"] == 1
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        layer_decay_scales(model, 0)


def test_refusals():
    with pytest.raises(ValueError, match="one of \\[5, 7, 9, 11, 13, 15, 17\\], got 19"):
        DilatedReparamBlock(4, 19)
    with pytest.raises(ValueError, match="must be 0, 3, 5, 7"):
        UniRepLKNetBlock(8, 4)
    with pytest.raises(ValueError, match=r"one entry a block, \(1, 2\), got \(1, 1\)"):
        UniRepLKNet((1, 2), (8, 8), kernel_sizes=((3,), (3,)))
    with pytest.raises(ValueError, match="must be 1, 2 or 4"):
        UniRepLKNet((1,), (8,), kernel_sizes=((3,),), stem_stride=8)
    model = UniRepLKNet((1,), (8,), kernel_sizes=((3,),))
    with pytest.raises(ValueError, match="size 3 on axis 1"):
        model(torch.zeros(1, 1, 16, 16))
    with pytest.raises(RuntimeError, match=r"\.eval\(\)"):
        model.train().fuse()
