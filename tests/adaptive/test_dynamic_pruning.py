"""Dynamic pruning: targets, predictors, gradients, counts, surgery, folding, real skipping, sizes, keys, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynakern import create_model, load_official
from dynakern.adaptive.dynamic_pruning import (
    VGG,
    CifarResNet,
    DynamicPruner,
    MaskedConv,
    MaskPredictor,
    MobileNetV1,
    MobileNetV2,
    SkippingConv,
    filter_response,
    ftwt_vgg11_bn,
    mask_bce,
    mask_weight,
    mass_mask,
    uniform_mask,
)
from dynakern.layers.resnet import ResNet, resnet20
from dynakern.testing import assert_same, randn

SIZES = {  # millions of parameters without predictors; of multiply-adds at 32 pixels, with the classifier
    "ftwt_vgg11_bn": (9.231, 152.8),
    "ftwt_vgg13_bn": (9.416, 228.3),
    "ftwt_vgg16_bn": (14.728, 313.2),
    "ftwt_vgg19_bn": (20.041, 398.1),
    "ftwt_resnet56": (0.853, 125.5),
    "ftwt_resnet110": (1.728, 252.9),
    "ftwt_mobilenetv1": (3.217, 46.35),
    "ftwt_mobilenetv2": (2.297, 91.2),
}


def switch(network, share, *, spread=0.0):
    """Set predictors that keep a random share of filters; with ``spread`` the image has a say."""
    torch.manual_seed(5)
    for layer in network.masked_layers().values():
        linear = layer.mask.model["1Conv2dMask"]
        filters = layer.conv.out_channels
        nn.init.normal_(linear.weight, std=spread)
        linear.bias.data.fill_(-1.0)
        linear.bias.data[torch.randperm(filters)[: round(share * filters)]] = 1.0
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return network


NETWORKS = {
    "vgg": lambda: VGG((8, 10, "M", 12, "M"), num_classes=5),
    "resnet": lambda: CifarResNet(8, width=8, num_classes=5),
    "resnet-after": lambda: CifarResNet(14, width=8, num_classes=5, after_block=True),
    "mobilenetv1": lambda: MobileNetV1(width=0.25, num_classes=5),
    "mobilenetv2": lambda: MobileNetV2(width=0.25, num_classes=5),
    "mobilenetv2-plain": lambda: MobileNetV2(width=0.25, num_classes=5, projections=False),
    "pruner": lambda: DynamicPruner(ResNet("basic", (1, 1), widths=(8, 12), num_classes=5, stem="imagenet")),
    "pruner-bottleneck": lambda: DynamicPruner(ResNet("bottleneck", (1, 1), widths=(4, 8), num_classes=5)),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    with torch.device("meta"):
        dense = create_model(name, masked=False).eval()
        macs = (
            dense.dense_macs(torch.zeros(1, 3, 32, 32), "exact")
            + dense.forward_features(torch.zeros(1, 3, 32, 32)).shape[1] * 10
        )
    millions, multiply_adds = SIZES[name]
    assert sum(p.numel() for p in dense.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)
    assert macs / 1e6 == pytest.approx(multiply_adds, abs=0.06)


def test_mass_mask_by_hand():
    response = torch.tensor([[5.0, 1.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0], [9.0, 0.5, 0.5, 0.0]])
    assert mass_mask(response, 0.8).tolist() == [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert mass_mask(response, 0.95)[2].tolist() == [1, 1, 0, 0]  # the second reaches 0.95 exactly, within 1e-5
    assert mass_mask(response, 1.0)[2].tolist() == [1, 1, 1, 0]
    assert mass_mask(response, None).min() == 1


def test_uniform_mask_by_hand():
    response = torch.tensor([[5.0, 1.0, 3.0, 2.0], [0.0, 7.0, 0.0, 1.0]])
    assert uniform_mask(response, 0.49).tolist() == [[1, 0, 1, 1], [0, 1, 0, 1]]
    assert uniform_mask(response, 0.75).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert uniform_mask(response, None).min() == 1


def test_kept_mass_never_exceeds_its_bound_and_grows_with_it():
    response = torch.rand(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = response / response.sum(1, keepdim=True)
    before = torch.zeros(50)
    for mass in (0.1, 0.4, 0.7, 0.95):
        mask = mass_mask(response, mass)
        assert float((share * mask).sum(1).max()) <= mass + 1e-5
        assert bool((mask.sum(1) >= before).all())
        before = mask.sum(1)


def test_predictor_follows_its_definition():
    torch.manual_seed(0)
    x = randn(2, 3, 4, 6, requires_grad=False)
    predictor = MaskPredictor(3, 5, embedding=12).double()
    assert predictor.dim == 2
    linear = predictor.model["1Conv2dMask"]
    pooled = x.unflatten(2, (2, 2)).unflatten(4, (2, 3)).mean((3, 5)).flatten(1)  # channel by channel
    expected = torch.softmax(pooled, 1) @ linear.weight.flatten(1).T + linear.bias
    assert_same(predictor(x).flatten(1), expected)
    largest = MaskPredictor(3, 5, softmax=False, pool="max").double()
    linear = largest.model["1Conv2dMask"]
    assert_same(largest(x).flatten(1), x.amax((2, 3)) @ linear.weight.flatten(1).T + linear.bias)


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_mask_loss_reaches_the_backbone_only_in_joint_mode(mode):
    network = VGG((6, 8), num_classes=3, mode=mode).train()
    network(torch.randn(4, 3, 8, 8))
    network.mask_loss().backward()
    layer = network.features[1]
    assert layer.mask.model["1Conv2dMask"].weight.grad.abs().sum() > 0
    first = network.features[0].conv.weight.grad
    assert (first is not None and float(first.abs().sum()) > 0) == (mode == "joint")


def test_gradients_of_the_masked_layer():
    torch.manual_seed(0)
    layer = MaskedConv(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), mode="joint").double().train()
    linear, x = layer.mask.model["1Conv2dMask"], randn(2, 2, 4, 4)
    linear.bias.data.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    layer(x)
    kept = layer.record.mask
    assert kept.mean() == 0.5

    def outputs(x):
        y = layer(x)
        return y, mask_bce(layer.record.logits, kept)

    assert torch.autograd.gradcheck(outputs, (x,))


def test_mask_loss_is_summed_over_filters_and_cools_down():
    network = VGG((6, 8), num_classes=3).train()
    network(torch.randn(4, 3, 8, 8))
    total = 0.0
    for record in network.records().values():
        z, g = record.logits.flatten(1), record.target.flatten(1)
        total -= (g * F.logsigmoid(z) + (1 - g) * F.logsigmoid(-z)).mean(0).sum().item()
    assert network.mask_loss(weight=2.0).item() == pytest.approx(total, rel=1e-5)
    assert mask_weight(2, 6) == 1
    assert mask_weight(3, 6) == 0
    network.cool_down(5, 6)
    assert network.auxiliary_loss().item() == 0


def test_counts_by_hand():
    network = switch(MobileNetV1(width=0.25, num_classes=3), 0.5).eval()
    x = torch.randn(2, 3, 8, 8)
    with network.recording():
        network(x)
        official, exact = network.macs(), network.macs("exact")
    kept = [round(0.5 * m.conv.out_channels) for m in network.masked_layers().values()]
    predictors = sum(m.mask.model["1Conv2dMask"].weight.numel() for m in network.masked_layers().values())
    sides, count, fair, inputs = 8, 0, predictors, 3
    for layer, k in zip(network.masked_layers().values(), kept, strict=True):
        sides = -(-sides // layer.conv.stride[0])
        taps, depthwise = layer.conv.kernel_size[0] ** 2, layer.conv.groups > 1
        count += 0 if depthwise else k * sides**2 * inputs * taps  # half the channels are off: floor(k / groups) = 0
        fair += k * sides**2 * taps * (1 if depthwise else inputs)
        inputs = k
    assert official.tolist() == [count] * 2
    assert exact.tolist() == [fair] * 2


def test_residual_sums_are_dense_in_exact_counts():
    network = switch(CifarResNet(8, width=8, num_classes=3), 0.5).eval()
    with network.recording():
        network(torch.randn(1, 3, 8, 8))
        exact = float(network.macs("exact"))
    predictors = sum(m.mask.model["1Conv2dMask"].weight.numel() for m in network.masked_layers().values())
    expected = 9 * (64 * 4 * (3 + 4 + 4) + 16 * 8 * (8 + 8) + 4 * 16 * (16 + 16)) + predictors
    assert exact == expected


def test_estimate_falls_with_the_mass_and_leaves_the_network_alone():
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dense = VGG((8, 10, "M", 12, "M"), num_classes=3, masked=False)
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    saved = []
    for mass in (None, 0.9, 0.7, 0.5):
        network = DynamicPruner(dense, mass=mass)
        estimate = network.estimate_flops([images])
        assert network.training
        saved.append(estimate.reduction)
    assert saved[0] == 0
    assert saved == sorted(saved)
    assert all(torch.equal(v, state[k]) for k, v in dense.state_dict().items())


def test_report():
    network = switch(NETWORKS["vgg"](), 0.5)
    x = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        labels = network.eval()(x).argmax(1)
    report = network.report([(x[:4], labels[:4]), (x[4:], labels[4:])])
    assert report.accuracy == 1.0
    assert report.flops.std == 0
    assert [layer.active for layer in report.layers.values()] == [4, 5, 6]
    assert "features.1: 5.0 of 10 filters" in str(report)
    assert network.report([x]).accuracy is None
    with pytest.raises(RuntimeError, match="No masks are on record"):
        network.records()
    with pytest.raises(ValueError, match="gave no images"):
        network.report([])


def test_safe_masks_keep_one_filter():
    for safe in (False, True):
        network = VGG((6, 8), num_classes=3, safe=safe, mass=0.1).eval()
        for layer in network.masked_layers().values():
            layer.mask.model["1Conv2dMask"].bias.data.fill_(-5.0)
        with network.recording():
            network(torch.randn(2, 3, 8, 8))
            records = network.records().values()
        assert all((r.mask.flatten(1).sum(1) == float(safe)).all() for r in records)
        assert all((r.target.flatten(1).sum(1) >= float(safe)).all() for r in records)


def test_warm_start_teaches_predictors_to_keep_everything():
    network = switch(NETWORKS["vgg"](), 0.0)
    images = torch.randn(4, 3, 16, 16)
    weight = network.features[0].conv.weight.clone()
    network.warm_start([images] * 30, lr=0.1)
    assert network.report([images]).flops.reduction == 0
    assert torch.equal(network.features[0].conv.weight, weight)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("share", "spread"), [(0.5, 0.0), (0.4, 9.0), (0.0, 0.0), (1.0, 0.0)])
def test_skipping_equals_masking(name, share, spread):
    network = switch(NETWORKS[name](), share, spread=spread).double().eval()
    fast, x = network.compile(), randn(5, 3, 32, 32, requires_grad=False) + 4 * randn(5, 3, 1, 1, seed=1)
    with torch.no_grad():
        expected = network(x)
        assert_same(network.fuse()(x), expected, rtol=1e-9)
        assert_same(fast(x), expected, rtol=1e-9)
        assert_same(fast(x[2:3]), expected[2:3], rtol=1e-9)
        assert_same(fast(x), expected, rtol=1e-9)  # packed weights are used again
    assert sum(isinstance(m, SkippingConv) for m in fast.modules()) == len(network.masked_layers())
    if share == 0.4:
        with network.recording():
            network(x)
            masks = torch.cat([r.mask.flatten(1) for r in network.records().values()], dim=1)
        assert len(masks.unique(dim=0)) > 1  # the images do differ


def test_skipped_weights_are_not_read():
    network = switch(NETWORKS["vgg"](), 0.5).eval()
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected, fast = network(x), network.compile()
        with network.recording():
            network(x)
            mask = network.records()["features.1"].mask.flatten() > 0
        layer = fast.network.features[1].layer
        computed = fast.network.features[1]._packings
        fast(x)
        (packing,) = computed.values()
        assert len(packing.weight) == 8  # 5 active filters, to the next multiple of 8
        assert sorted(packing.filters.tolist()) == mask.nonzero().flatten().tolist()
        layer.conv.weight.fill_(float("nan"))
        assert_same(fast(x), expected)


def test_surgery_finds_chains_shortcuts_and_feeders():
    network = DynamicPruner(ResNet("basic", (1, 1), widths=(8, 12), num_classes=5, stem="imagenet"))
    layers = network.masked_layers()
    assert [name.removeprefix("model.") for name in layers] == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer2.0.conv1",
        "layer2.0.conv2",
    ]  # the projection layer2.0.downsample.0 stays dense
    feeders = {name: layer.feeder for name, layer in layers.items()}
    assert feeders["model.layer1.0.conv1"] == "model.conv1"  # through ReLU and pooling
    assert feeders["model.layer1.0.conv2"] == "model.layer1.0.conv1"
    assert feeders["model.layer2.0.conv1"] is None  # after a sum
    assert isinstance(layers["model.conv1"].activation, nn.ReLU)
    assert isinstance(layers["model.layer1.0.conv2"].activation, nn.Identity)


def test_surgery_changes_nothing_while_all_filters_are_on():
    dense = resnet20(num_classes=4).eval()
    network = DynamicPruner(dense, mass=None)
    assert not network.training
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), network.recording("target"):
        assert_same(network(x), dense(x))
    assert len(network.masked_layers()) == 19


def test_surgery_masks_before_other_activations():
    """A mask before SiLU is a mask after it, and the target sees what comes after."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    network = DynamicPruner(plain, mass=0.7, skip=())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), network.recording("target"):
        y, mask = network(x), network.records()["model.0"].mask.flatten(1)
        assert_same(y, plain(x) * mask)
        assert torch.equal(mask, mass_mask(filter_response(plain[:3](x)), 0.7))


def test_shared_and_unnormalised_convolutions_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.bn(self.conv(F.relu(self.bn(self.conv(x))))))

    with pytest.raises(ValueError, match="'conv' runs more than once"):
        DynamicPruner(Twice())
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with pytest.raises(ValueError, match="'0' must be followed by a BatchNorm2d alone; name it in `skip`"):
        DynamicPruner(plain)
    assert list(DynamicPruner(plain, skip=("0",)).masked_layers()) == ["model.2"]
    with pytest.raises(ValueError, match="no convolution to mask"):
        DynamicPruner(plain, skip=("*",))
    with pytest.raises(ValueError, match="holds no Conv2d"):
        DynamicPruner(nn.Linear(3, 3))


@pytest.mark.parametrize("kind", ["vgg", "mobilenetv1", "resnet"])
def test_dense_checkpoints_of_the_authors_fit(kind):
    build = {
        "vgg": lambda masked: VGG((4, "M", 6, "M"), masked=masked),
        "mobilenetv1": lambda masked: MobileNetV1(width=0.125, masked=masked),
        "resnet": lambda masked: CifarResNet(8, width=4, masked=masked),
    }[kind]
    torch.manual_seed(1)
    dense = build(False)
    old = {}
    for key, value in dense.state_dict().items():
        if kind == "vgg":
            for i, at in ((0, 0), (2, 4)):
                key = key.replace(f"features.{i}.conv", f"features.module.{at}#")
                key = key.replace(f"features.{i}.bn", f"features.module.{at + 1}#")
            key = key.replace("#", "")
        elif kind == "mobilenetv1" and key.startswith("model."):
            _, i, part, rest = key.split(".")
            block, first = (int(i) + 1) // 2, 3 if int(i) > 0 and int(i) % 2 == 0 else 0
            key = f"model.{block}.{first + (part == 'bn')}.{rest}"
        elif kind == "resnet":
            key = key.replace("masked_conv.conv", "conv1").replace("masked_conv.bn", "bn1")
            for n in "12":
                key = key.replace(f"masked_conv{n}.conv", f"conv{n}").replace(f"masked_conv{n}.bn", f"bn{n}")
        old["module." + key] = value
    other = load_official(build(False), old)
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match=r"missing: .*mask\.model\.1Conv2dMask"):
        load_official(build(True), old)


def test_second_names_of_saved_twice_tensors_are_dropped():
    network = CifarResNet(8, width=4)
    state = network.state_dict()
    aliases = {k.replace("masked_conv1.conv", "conv1"): v for k, v in state.items() if "masked_conv1.conv" in k}
    load_official(CifarResNet(8, width=4), {**state, **aliases})


def test_detached_shortcut_stops_gradients_through_shape_changes():
    gradients = []
    for detach in (False, True):
        torch.manual_seed(0)
        network = CifarResNet(8, width=4, masked=False, detach_shortcut=detach).train()
        network(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients.append(network.masked_conv.conv.weight.grad)
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-6


def test_copies_after_a_training_step_leave_the_graph_behind():
    network = VGG((4,), num_classes=3).train()
    network(torch.randn(2, 3, 8, 8))
    twin = copy.deepcopy(network)
    network.mask_loss().backward()
    with pytest.raises(RuntimeError, match="No masks are on record"):
        twin.mask_loss()


def test_refusals():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    for mass in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"`mass` must be in \[0, 1\]"):
            MaskedConv(conv, norm, mass=mass)
    with pytest.raises(ValueError, match="`mode` must be one of 'decoupled', 'joint'"):
        MaskedConv(conv, norm, mode="both")
    with pytest.raises(ValueError, match="leaves no input for a predictor of 512 channels"):
        MaskPredictor(512, 4, embedding=100)
    with pytest.raises(ValueError, match="needs pixels to look at"):
        MaskPredictor(3, 4)(torch.zeros(1, 3, 0, 4))
    with pytest.raises(ValueError, match="`depth` must be 6n"):
        CifarResNet(18)
    with pytest.raises(ValueError, match="at least 32 pixels a side"), torch.device("meta"):
        ftwt_vgg11_bn()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="size 3 on axis 1"):
        VGG((4,))(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="at least one convolution"):
        VGG(("M",))
    network = VGG((4,))
    with pytest.raises(RuntimeError, match=r"\.eval\(\)"):
        network.compile()
    with pytest.raises(TypeError, match="takes no arguments"):
        network.eval().compile(backend="eager")
    with pytest.raises(RuntimeError, match="cannot be trained"):
        network.compile().train()
    with pytest.raises(ValueError, match="`flops` must be one of"):
        network.estimate_flops([torch.zeros(1, 3, 8, 8)], flops="true")
    with pytest.raises(TypeError, match="unexpected keyword argument 'masss'"):
        VGG((4,), masss=0.5)
