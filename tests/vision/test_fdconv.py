"""FDConv: against the published equations written out, its groups, conversions, caches, folded norms, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynakern import create_model, load_official
from dynakern.layers.resnet import ResNet, resnet18, resnet50
from dynakern.measure import count_parameters
from dynakern.testing import assert_same, randn
from dynakern.vision import FDConv, FDConvResNet, convert_to_fdconv
from dynakern.vision.fdconv import BandModulation, classify_images, frequency_order
from dynakern.vision.fdconv.bands import _nearest


def noisy(module, seed=0, std=0.5):
    """Give every parameter and statistic a value of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), alpha=std)
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.1)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
    return module


def layer(I=5, O=6, k=3, **options):
    torch.manual_seed(0)
    options = {"kernel_num": 3, "min_channels": 1, "padding": k // 2, **options}
    return noisy(FDConv(I, O, k, dtype=torch.float64, **options)).eval()


def naive_bands(x, fbm, masks=None):
    """The modulation of the bands by transforms, with masks resized as the official code resizes them."""
    H, W = x.shape[2:]
    h, w = fbm.cached_size or (H, W)
    freq = torch.stack(torch.meshgrid(torch.fft.fftfreq(h), torch.fft.rfftfreq(w), indexing="ij")).abs().amax(0)
    X, before, y = torch.fft.rfft2(x, norm="ortho"), x, 0
    for k, conv in zip(fbm.k_list, fbm.freq_weight_conv_list, strict=False):
        mask = (freq < 0.5 / k + 1e-8).float()[None, None]
        mask = F.interpolate(mask, size=(H, W // 2 + 1), mode="nearest")[0, 0].double()
        low = torch.fft.irfft2(X * mask, s=(H, W), norm="ortho")
        y, before = y + naive_gate(x, conv, fbm) * (before - low), low
    if fbm.lowfreq_att:
        return y + naive_gate(x, fbm.freq_weight_conv_list[-1], fbm) * before
    return y + before


def naive_gate(x, conv, fbm):
    z = conv(x)
    act = {"sigmoid": lambda z: 2 * z.sigmoid(), "tanh": lambda z: 1 + z.tanh()}
    gate = act.get(fbm.act, lambda z: z.softmax(1) * z.shape[1])(z)
    return gate.repeat_interleave(x.shape[1] // fbm.groups, 1)


def naive_layer(x, m):
    """The layer as its equations say, one image after the other."""
    (O, I, k), K, R = (m.out_channels, m.in_channels, m.kernel_size[0]), m.kernel_num, m.param_ratio
    gate, rows, half = m.KSM_Global(x.mean((2, 3), keepdim=True)), O * k, I * k // 2 + 1
    n = int(m.param_reduction * rows * half)
    groups = frequency_order(rows, I * k)[:n].long().view(K, -1)
    y = []
    for b in range(len(x)):
        S = torch.zeros(rows * half, dtype=torch.complex128)
        for r in range(R):
            D = torch.view_as_complex(m.dft_weight[r])
            for q in range(K):
                part = D.flatten()[groups[q]] if m.param_reduction == 1 else D.view(K, -1)[q]
                S = S.index_add(0, groups[q], gate.kernel[b, r * K + q] * m.alpha * part)
        kernel = torch.fft.irfft2(S.view(rows, half), s=(rows, I * k)).view(O, k, I, k).permute(0, 2, 1, 3)
        for name, shape in (("channel", (1, I, 1, 1)), ("filter", (O, 1, 1, 1)), ("spatial", (1, 1, k, k))):
            if getattr(gate, name) is not None:
                kernel = kernel * getattr(gate, name)[b].view(shape)
        if hasattr(m, "KSM_Local"):
            u = F.layer_norm(x[b].mean((1, 2)), (I,), m.KSM_Local.norm.weight, m.KSM_Local.norm.bias)
            z = m.KSM_Local.conv(u[None, None])[0].view(O, k, k, I).permute(0, 3, 1, 2)
            kernel = kernel * (2 * z.sigmoid() if m.ksm_local_act == "sigmoid" else 1 + z.tanh())
        bands = naive_bands(x[b : b + 1], m.FBM) if hasattr(m, "FBM") else x[b : b + 1]
        y.append(F.conv2d(bands, kernel, m.bias, m.stride, m.padding, m.dilation))
    return torch.cat(y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_num": 1},
        {"kernel_num": 9, "param_ratio": 2},
        {"k": 1, "kernel_num": 2, "stride": 2},
        {"k": 1, "kernel_num": 2, "padding": 1},
        {"k": 1, "kernel_num": 2, "use_fbm_if_k_in": (1,)},
        {"k": 1, "kernel_num": 2, "stride": 2, "use_fbm_for_stride": True},
        {"kernel_num": None},
        {"stride": (2, 1), "dilation": (1, 2), "padding": (0, 2)},
        {"padding": 0, "bias": False},
        {"param_reduction": 0.5, "kernel_num": 2},
        {"param_reduction": 0.5, "kernel_num": 2, "fix_reduction": True, "param_ratio": 2},
        {"ksm_global_act": "tanh", "ksm_local_act": "tanh", "temp": 2.0, "kernel_temp": 0.5},
        {"ksm_global_act": "softmax", "ksm_only_kernel_att": True, "use_ksm_local": False},
        {"spatial_group": 5, "fbm_act": "softmax", "lowfreq_att": True, "k_list": (2, 3), "mask": "exact"},
        {"spatial_group": 100, "fbm_act": "tanh", "spatial_kernel": 5, "mask": (48, 40)},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(4, 4), (13, 10)], ids=str)
def test_equals_the_published_equations(options, size):
    m, x = layer(**options), randn(2, 5, *size, requires_grad=False)
    with torch.no_grad():
        expected = naive_layer(x, m)
        assert_same(m(x), expected)  # from the cache
    assert_same(m(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 5), (7, 7), (16, 14), (33, 64), (64, 64), (100, 75)], ids=str)
@pytest.mark.parametrize("mask", ["cached64", "exact", (63, 31)], ids=str)
def test_bands_equal_transforms(size, mask):
    fbm = noisy(BandModulation(2, k_list=(1, 2, 4, 8), mask=mask, dtype=torch.float64))
    x = randn(2, 2, *size, requires_grad=False)
    assert_same(fbm(x), naive_bands(x, fbm))


def test_lookup_of_the_nearest_entry_is_that_of_interpolate():
    for source in (64, 33):
        entries = torch.arange(float(source))[None, None]
        for size in range(1, 300):
            assert _nearest(source, size) == F.interpolate(entries, size=size, mode="nearest")[0, 0].long().tolist()


def test_bands_add_up_and_start_as_the_identity():
    x = randn(1, 3, 20, 24, requires_grad=False)
    fbm = BandModulation(3, dtype=torch.float64)
    assert_same(fbm(x), x, rtol=1e-4)
    lows = fbm.low_passes(x)
    assert_same(lows[2], fbm.low_passes(lows[2])[0], rtol=1e-9)  # what is low stays
    wave = torch.cos(2 * torch.pi * 9 / 32 * torch.arange(32.0)).expand(1, 3, 32, 32).double()
    assert float(fbm.low_passes(wave)[0].abs().max()) < 1e-6  # above a quarter of a cycle a pixel


def test_groups_are_disjoint_and_cover_all_frequencies():
    m = layer(O=8, kernel_num=4)
    with torch.no_grad():
        kernels = m._mix(torch.eye(4, dtype=torch.float64))
    spectra = torch.fft.fft2(kernels.view(4, 24, 15)).abs()
    overlap = torch.einsum("qhw,phw->qp", spectra, spectra)
    assert float((overlap - overlap.diag().diag()).abs().max()) < 1e-12 * float(overlap.max())
    order = frequency_order(24, 15)
    assert sorted(order.tolist()) == list(range(24 * 8))
    f = torch.stack(torch.meshgrid(torch.fft.fftfreq(24), torch.fft.rfftfreq(15), indexing="ij")).norm(dim=0).flatten()
    assert bool((f[order.long()].diff() >= -1e-6).all())


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_a_converted_convolution_stays_itself(k, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 48, k, padding=k // 2, **options).double()
    m, x = FDConv.from_conv(conv, kernel_num=16).eval(), randn(2, 32, 12, 12, requires_grad=False)
    assert_same(m(x), conv(x), rtol=1e-4)
    assert_same(m.kernels(x)[1], conv.weight, rtol=1e-4)
    twice = FDConv.from_conv(conv, kernel_num=16, param_ratio=2).eval()
    assert_same(twice.kernels(x)[0], 2 * conv.weight, rtol=1e-4)


def test_reduction_keeps_low_frequencies():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, dtype=torch.float64)
    x = randn(1, 6, 5, 5, requires_grad=False)
    short = FDConv.from_conv(conv, kernel_num=2, param_reduction=0.5, min_channels=1, use_ksm_local=False)
    fixed = FDConv.from_conv(
        conv, kernel_num=2, param_reduction=0.5, min_channels=1, use_ksm_local=False, fix_reduction=True
    )
    assert short.dft_weight.shape == (1, 18 * 10 // 2, 2)
    assert_same(fixed.kernels(x), short.kernels(x) * (3 * 2 / 0.5), rtol=1e-4)
    S = torch.fft.rfft2(conv.weight.permute(0, 2, 1, 3).reshape(18, 18)).flatten()
    S = S.index_fill(0, frequency_order(18, 18)[90:].long(), 0).view(18, 10)
    low = torch.fft.irfft2(S, s=(18, 18)).view(6, 3, 6, 3).transpose(1, 2)
    assert_same(fixed.kernels(x)[0] * 0.5, low, rtol=1e-4)


def test_gradients():
    m = layer(3, 4, kernel_num=2, lowfreq_att=True).train()
    inputs = [randn(2, 3, 5, 4), *m.parameters()]

    def f(x, *parameters):
        named = dict(zip((n for n, _ in m.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(m, named, x)

    assert torch.autograd.gradcheck(f, inputs, atol=1e-5, fast_mode=True)
    m = layer(3, 4, k=1, kernel_num=2, param_reduction=0.5, use_ksm_local=False)
    assert torch.autograd.gradcheck(m, randn(2, 3, 5, 4), atol=1e-5)


@pytest.mark.parametrize("kernel_num", [3, 9])  # kept as kernels, kept as coefficients
def test_the_cache_follows_the_parameter(kernel_num):
    m, x = layer(kernel_num=kernel_num), randn(2, 5, 6, 6, requires_grad=False)
    with torch.inference_mode():
        before = m(x)
    with torch.no_grad():
        assert torch.equal(m(x), before)
        m.dft_weight.mul_(2)
        m.bias.zero_()
        after = m(x)
        assert_same(after, naive_layer(x, m))
        assert not torch.allclose(after, before)
    m.load_state_dict({**m.state_dict(), "dft_weight": m.dft_weight.detach() / 2})
    with torch.no_grad():
        assert_same(m(x), after / 2)
        assert_same(m.float()(x.float()).double(), after / 2, rtol=1e-5)
    m(x.float()).sum().backward()  # nothing of inference mode is left over


def test_spatial_parameter_gives_the_same_layer():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(4, 6, 3, dtype=torch.float64), randn(2, 4, 6, 6, requires_grad=False)
    pair = [FDConv.from_conv(conv, kernel_num=3, min_channels=1, convert_param=c) for c in (True, False)]
    pair[1].load_state_dict({**pair[0].state_dict(), "weight": conv.weight.detach()}, strict=False)
    assert "dft_weight" not in pair[1].state_dict()
    for m in pair:
        noisy(m.KSM_Global)
        m.eval()
    assert_same(pair[1](x), pair[0](x))


def test_other_groups_by_explicit_indices():
    m, x = layer(), randn(2, 5, 6, 6, requires_grad=False)
    half = 5 * 3 // 2 + 1
    order = frequency_order(18, 15).long()
    indices = torch.stack([order // half, order % half]).view(1, 2, 3, -1)
    same = layer(indices=indices)
    assert_same(same(x), m(x))
    shuffled = layer(indices=indices.flip(2))
    assert not torch.allclose(shuffled(x), m(x))
    assert set(m.state_dict()) == set(shuffled.state_dict())
    with pytest.raises(ValueError, match=r"`indices` must have shape \(1, 2, 3, 48\)"):
        layer(indices=indices[:, :, :2])
    with pytest.raises(ValueError, match="every frequency at most once"):
        layer(indices=torch.zeros_like(indices))


def test_a_norm_folds_into_the_layer():
    for options in ({}, {"bias": False, "k": 1, "kernel_num": 2}, {"min_channels": 10}):
        m, norm = layer(**options), noisy(nn.BatchNorm2d(6, dtype=torch.float64)).eval()
        x = randn(2, 5, 6, 6, requires_grad=False)
        fused = m.fuse_norm(norm)
        assert_same(fused(x), norm(m(x)))
        assert_same(fused.fuse_norm(norm)(x), norm(norm(m(x))))
        assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())


def test_one_image_in_training_uses_the_running_statistics():
    m, x = layer(), randn(1, 5, 6, 6, requires_grad=False)
    expected, before = m(x), m.KSM_Global.bn.running_mean.clone()
    assert_same(m.train()(x), expected)
    assert torch.equal(m.KSM_Global.bn.running_mean, before)


def test_low_precision_and_autocast():
    m, x = layer(20, 20, kernel_num=2, min_channels=16).float(), randn(2, 20, 8, 8, requires_grad=False).float()
    expected = m(x)
    half = copy.deepcopy(m).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_same(half.float(), expected, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(m(x).float(), expected, rtol=0.05)
        assert m.FBM.low_passes(x)[0].dtype == torch.float32


def test_parameters_are_those_of_the_paper():
    m = FDConv(64, 64, 3, kernel_num=64, device="meta")
    assert count_parameters(m) == 46_526
    assert m.dft_weight.numel() == 37_248
    assert count_parameters(nn.Conv2d(64, 64, 3, device="meta")) == 36_928
    plain = FDConv(16, 64, 3, device="meta")
    assert not plain.dynamic
    assert count_parameters(plain) == count_parameters(nn.Conv2d(16, 64, 3, device="meta"))


@pytest.mark.slow
def test_the_paper_s_backbone_adds_few_parameters():
    model = create_model("fdconv_resnet50", device="meta")
    more = count_parameters(model) - count_parameters(resnet50(device="meta"))
    assert more == pytest.approx(3.6e6, rel=0.05)
    assert not isinstance(model.layer1[0].downsample[0], FDConv)
    assert model.layer1[0].conv2.dft_weight.shape == (1, 192, 97, 2)


@pytest.mark.parametrize("name", ["fdconv_resnet18", "fdconv_resnet34"])
def test_variants(name):
    model = create_model(name, device="meta", num_classes=7)
    assert type(model.layer2[1].conv2) is FDConv
    assert type(model.conv1) is nn.Conv2d
    assert model.fc.weight.shape == (7, 512)
    assert {key.replace("dft_weight", "weight") for key in model.state_dict()} >= set(
        resnet18(device="meta").state_dict()
    )


def small(**options):
    torch.manual_seed(0)
    options = {"widths": (18, 20), "num_classes": 3, "stem": "cifar", **options}
    return ResNet("basic", (1, 1), **options)


def test_conversion_of_a_network():
    net, x = small().eval(), randn(2, 3, 8, 8, dtype=torch.float32, requires_grad=False)
    with torch.no_grad():
        expected = net(x)
        converted = convert_to_fdconv(net, kernel_num=4)
        assert_same(converted(x), expected, rtol=1e-3)
    kinds = {name: type(m) for name, m in converted.named_modules() if isinstance(m, nn.Conv2d | FDConv)}
    assert kinds["conv1"] is nn.Conv2d  # three input channels
    assert kinds["layer2.0.conv1"] is kinds["layer2.0.downsample.0"] is FDConv
    assert not any(isinstance(m, FDConv) for m in net.modules())
    kept = convert_to_fdconv(net, kernel_num=4, exclude=("*.downsample.*", "layer1.*"))
    assert sum(isinstance(m, FDConv) for m in kept.modules()) == 2
    assert isinstance(convert_to_fdconv(net.layer1[0].conv1, kernel_num=6), FDConv)
    with pytest.raises(ValueError, match=r"Layer 'layer1\.0\.conv1': `kernel_num` must divide"):
        convert_to_fdconv(net, kernel_num=11)


def test_checkpoints_of_plain_networks_and_detectors():
    net, x = small().eval(), randn(2, 3, 8, 8, dtype=torch.float32, requires_grad=False)
    model = FDConvResNet("basic", (1, 1), kernel_num=6, widths=(18, 20), num_classes=3, stem="cifar")
    with torch.no_grad():
        assert_same(load_official(model, net.state_dict()).eval()(x), net(x), rtol=1e-3)
    own = {f"backbone.{key}": value for key, value in model.state_dict().items() if not key.startswith("fc.")}
    bare = FDConvResNet("basic", (1, 1), kernel_num=6, widths=(18, 20), num_classes=0, stem="cifar").eval()
    load_official(bare, {**own, "neck.conv.weight": torch.zeros(1)})
    with torch.no_grad():
        assert_same(bare(x), model.forward_features(x).mean((2, 3)))
    with pytest.raises(ValueError, match=r"missing: layer1\.0\.conv1\.dft_weight"):
        load_official(model, {key: value for key, value in model.state_dict().items() if "dft_weight" not in key})


@pytest.mark.parametrize("size", [8, 32, 64])
def test_factory_suits_small_images(size):
    model = classify_images(in_chans=1, img_size=size, num_classes=5)
    assert 2e5 < count_parameters(model) < 1e6
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 5)


def test_refusals():
    with pytest.raises(ValueError, match="`groups` must be 1, got 4"):
        FDConv(32, 32, 3, groups=4)
    with pytest.raises(ValueError, match="must be zeros, given in pixels"):
        FDConv(32, 32, 3, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="must be zeros, given in pixels"):
        FDConv(32, 32, 3, padding="same")
    with pytest.raises(ValueError, match="must be square"):
        FDConv(32, 32, (1, 3))
    with pytest.raises(ValueError, match=r"divide the 4704 frequencies, got 5; near divisors: \[1, 2, 3, 4, 6, 7"):
        FDConv(32, 32, 3, kernel_num=5)
    with pytest.raises(ValueError, match="fits the kernel attention only"):
        FDConv(32, 32, 3, ksm_global_act="softmax")
    with pytest.raises(ValueError, match="must divide the 32 channels, got 5"):
        FDConv(32, 32, 3, spatial_group=5)
    with pytest.raises(ValueError, match="must ascend"):
        FDConv(32, 32, 3, k_list=(4, 2))
    with pytest.raises(ValueError, match=r"`param_reduction` must be in \(0, 1\]"):
        FDConv(32, 32, 3, param_reduction=1.5)
    with pytest.raises(ValueError, match="without convert_param"):
        FDConv(32, 32, 3, param_reduction=0.5, convert_param=False)
    with pytest.warns(UserWarning, match="plain convolution for a kernel of 5"):
        FDConv(32, 32, 5)
    m = FDConv(20, 20, 1)
    with pytest.raises(ValueError, match="`x` must have size 20 on axis 1"):
        m(torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="floating-point"):
        m(torch.zeros(1, 20, 8, 8, dtype=torch.complex64))
    with pytest.raises(ValueError, match="its kernel is `weight`"):
        FDConv(3, 20, 1).kernels(torch.zeros(1, 3, 8, 8))
