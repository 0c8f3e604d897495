"""ResNets: torchvision's keys and counts, maps, folded norms, shortcuts, stochastic depth, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynakern.layers import resnet
from dynakern.layers.resnet import PadShortcut, ResNet, resnet18, resnet20, resnet50
from dynakern.measure import count_parameters
from dynakern.models import load_official
from dynakern.testing import assert_same, randn


@pytest.mark.parametrize(
    ("name", "parameters", "macs", "size"),
    [
        ("resnet18", 11_689_512, 1.814e9, 224),
        ("resnet34", 21_797_672, 3.664e9, 224),
        ("resnet50", 25_557_032, 4.089e9, 224),
        ("resnet101", 44_549_160, 7.801e9, 224),
        ("resnet20", 269_722, 40.6e6, 32),
        ("resnet56", 853_018, 125.5e6, 32),
    ],
)
def test_parameters_and_products(name, parameters, macs, size):
    model = getattr(resnet, name)(device="meta")
    assert count_parameters(model) == parameters
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=2e-3)


def test_keys_are_those_of_torchvision():
    keys = set(resnet50(device="meta").state_dict())
    block = [f"{part}{i}.{name}" for i in (1, 2, 3) for part, name in (("conv", "weight"), ("bn", "running_var"))]
    expected = {"conv1.weight", "bn1.weight", "fc.weight", "fc.bias", "layer1.0.downsample.0.weight"}
    expected |= {"layer4.0.downsample.1.running_mean", "layer3.5.bn3.num_batches_tracked"}
    expected |= {
        f"layer{i}.{j}.{key}" for i, depth in enumerate((3, 4, 6, 3), 1) for j in range(depth) for key in block
    }
    assert expected <= keys
    assert len(keys) == 320  # 53 convolutions, 53 norms of five entries, two of the classifier
    basic = set(resnet18(device="meta").state_dict())
    assert "layer2.0.downsample.0.weight" in basic
    assert "layer1.0.downsample.0.weight" not in basic
    assert len(basic) == 122


def small(**options):
    torch.manual_seed(0)
    options = {"block": "basic", "depths": (1, 2, 1), "widths": (4, 6, 8), "num_classes": 3, **options}
    model = ResNet(**options, dtype=torch.float64).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["conv", "subsample", "pool"])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_fused_equals_unfused(block, shortcut, stem):
    model, x = small(block=block, shortcut=shortcut, stem=stem), randn(2, 3, 33, 30, requires_grad=False)
    fused = model.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert_same(fused(x), model(x))
    with pytest.raises(RuntimeError, match=r"call \.eval"):
        model.train().fuse()


def test_maps_and_no_classifier():
    x = randn(2, 3, 32, 24, requires_grad=False)
    model = small(stem="cifar")
    shapes = [tuple(m.shape[1:]) for m in model.forward_intermediates(x)]
    assert shapes == [(4, 32, 24), (6, 16, 12), (8, 8, 6)]
    assert small(stem="imagenet").forward_features(x).shape == (2, 8, 2, 2)
    bare = small(stem="cifar", num_classes=0)
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if not key.startswith("fc.")})
    assert_same(bare(x), model.forward_features(x).mean((2, 3)))
    one = ResNet("bottleneck", (1,), widths=(4,), in_chans=1, num_classes=2, stem="cifar")
    assert one(torch.zeros(1, 1, 8, 8)).shape == (1, 2)


def test_padded_shortcut():
    x = randn(1, 2, 5, 4, requires_grad=False)
    y = PadShortcut(2, 5, 2)(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 2:], torch.zeros(1, 3, 3, 2, dtype=torch.float64))
    pooled = PadShortcut(2, 2, 2, pool=True)(x)
    assert_same(pooled[:, :, 0, 0], x[:, :, :2, :2].mean((2, 3)))
    assert_same(pooled[:, :, 2, 1], x[:, :, 4:, 2:].mean((2, 3)))
    with pytest.raises(ValueError, match="cannot drop channels: 4 to 2"):
        PadShortcut(4, 2, 1)


def test_zero_initialised_blocks_are_their_shortcuts():
    torch.manual_seed(0)
    model = resnet20(zero_init_residual=True, depths=(2, 1, 1)).double().eval()
    x = model.forward_stem(randn(1, 3, 8, 8, requires_grad=False))
    assert_same(model.layer1(x), x)


def test_stochastic_depth_grows():
    model = resnet20(depths=(1, 1, 2), drop_path_rate=0.3)
    assert [b.drop_path.rate for stage in model.stages() for b in stage] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_a_checkpoint_with_another_head_loads_with_a_warning():
    torch.manual_seed(0)
    state = resnet20(num_classes=4, depths=(1, 1, 1)).state_dict()
    model = resnet20(depths=(1, 1, 1))
    with pytest.warns(UserWarning, match="Head not loaded"):
        load_official(model, state)
    assert torch.equal(model.layer2[0].conv1.weight, state["layer2.0.conv1.weight"])


def test_refusals():
    with pytest.raises(ValueError, match="one entry a stage"):
        ResNet("basic", (1, 1))
    with pytest.raises(ValueError, match="must be one of 'basic', 'bottleneck', got 'basik'"):
        ResNet("basik", (1,), widths=(4,))
    with pytest.raises(ValueError, match="`shortcut` must be one of"):
        small(shortcut="none")
    with pytest.raises(ValueError, match="`x` must have size 3 on axis 1"):
        small()(torch.zeros(1, 1, 32, 32, dtype=torch.float64))
    with pytest.raises(TypeError, match="floating-point"):
        small()(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
