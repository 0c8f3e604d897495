"""LSNet: published sizes, the convolution's definition, attention biases, fusing, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynakern import create_model
from dynakern.measure import count_flops, count_parameters
from dynakern.testing import assert_same, randn
from dynakern.vision import LKP, LSConv, LSNet
from dynakern.vision.lsnet import _Attention, _offsets

SIZES = {  # name: millions of parameters, fused, billions of multiply-adds, of aggregation
    "lsnet_t": (11.410, 11.370, 0.315, 0.0007),
    "lsnet_s": (16.146, 16.098, 0.537, 0.0009),
    "lsnet_b": (23.314, 23.249, 1.241, 0.0038),
}
SMALL = {"num_heads": (2, 2, 2, 3), "key_dim": (8, 8, 8, 8), "num_classes": 5, "patch_size": 4}


def small(**options):
    torch.manual_seed(0)
    return LSNet((16, 24, 32, 48), (2, 2, 2, 2), **{**SMALL, "img_size": 32, **options})


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    millions, fused, billions, aggregation = SIZES[name]
    with torch.device("meta"):
        model = create_model(name).eval()
        flops = count_flops(lambda: model(torch.zeros(1, 3, 224, 224)))
        assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=1e-3)
        assert sum(p.numel() for p in model.fuse().parameters()) / 1e6 == pytest.approx(fused, abs=1e-3)
    assert flops / 2e9 == pytest.approx(billions + aggregation, abs=2e-3)


def test_convolution_follows_its_definition():
    torch.manual_seed(0)
    layer, x = LSConv(16).double().eval(), randn(2, 16, 5, 4, requires_grad=False)
    kernels = layer.lkp(x)
    assert kernels.shape == (2, 2, 9, 5, 4)
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    expected = torch.zeros_like(x)
    for c in range(16):
        for tap in range(9):
            rows, columns = slice(tap // 3, tap // 3 + 5), slice(tap % 3, tap % 3 + 4)
            expected[:, c] += padded[:, c, rows, columns] * kernels[:, c % 2, tap]
    assert_same(layer(x), layer.bn(expected) + x)


def test_kernels_depend_on_a_wide_neighbourhood():
    torch.manual_seed(0)
    perception, x = LKP(16).double().eval(), randn(1, 16, 16, 16)
    perception.norm = nn.Identity()  # which looks at the whole map
    (gradient,) = torch.autograd.grad(perception(x)[..., 8, 8].sum(), x)
    reached = gradient.abs().sum((0, 1)) > 0
    assert reached[5:12, 5:12].all()
    assert int(reached.sum()) == 49


def test_a_map_of_one_pixel_is_legal():
    assert torch.isfinite(LSConv(8).eval()(torch.randn(2, 8, 1, 1))).all()


def test_attention_biases_belong_to_offsets_and_resize():
    offsets = _offsets(2, 3)
    assert offsets.tolist()[0] == [0, 1, 2, 3, 4, 5]  # in order of first appearance
    assert torch.equal(offsets, offsets.T)
    torch.manual_seed(0)
    attention = _Attention(16, 8, 2, 3)
    nn.init.normal_(attention.attention_biases)
    same = attention._bias(3, 3)
    assert same.shape == (2, 9, 9)
    assert torch.equal(same[:, 0, 5], attention.attention_biases[:, 5])
    wide = attention._bias(5, 3)  # every second row of the larger map has the old offsets
    assert_same(wide[:, 0].unflatten(1, (5, 3))[:, ::2], same[:, 0].unflatten(1, (3, 3)))


def test_biases_loaded_in_eval_mode_count():
    model = small(img_size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    for name, parameter in model.named_parameters():
        if "pw2.bn.weight" in name or "proj.1.bn.weight" in name:
            nn.init.ones_(parameter)
    with torch.no_grad():
        before = model(x)
        state = {k: torch.randn_like(v) if "attention_biases" in k else v for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        assert float((model(x) - before).abs().max()) > 1e-6


def test_other_sizes_than_built_for():
    model = small().eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 64)).shape == (1, 5)
        assert torch.isfinite(model.fuse()(torch.randn(1, 3, 96, 64))).all()


def test_distillation_has_two_heads_in_training_and_their_mean_otherwise():
    model = small(distillation=True)
    x = torch.randn(2, 3, 32, 32)
    assert [y.shape for y in model(x)] == [(2, 5), (2, 5)]
    model.eval()
    with torch.no_grad():
        pooled = model.forward_features(x).mean((2, 3))
        assert_same(model(x), (model.head(pooled) + model.head_dist(pooled)) / 2)
        assert_same(model.fuse()(x), model(x), rtol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="even and divisible by `groups`, got 12 and 8"):
        LSConv(12)
    with pytest.raises(ValueError, match="`lks` must be odd, got 6"):
        LSConv(16, lks=6)
    with pytest.raises(ValueError, match="four entries"):
        LSNet((16, 24))
    with pytest.raises(ValueError, match="must be 2, 4 or 8, got 3"):
        small(patch_size=3)
    with pytest.raises(ValueError, match="size 3 on axis 1"):
        small()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(TypeError, match="`x` must have a floating"):
        small()(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
