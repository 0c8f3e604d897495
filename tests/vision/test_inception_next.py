"""InceptionNeXt: the mixer's branches, published sizes, fusing, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynakern import create_model, load_official
from dynakern.measure import count_flops, count_parameters
from dynakern.testing import assert_same, randn
from dynakern.vision import InceptionDWConv2d, InceptionNeXt

SIZES = {  # name: millions of parameters, billions of multiply-adds, side
    "inception_next_atto": (4.157, 0.503, 224),
    "inception_next_tiny": (28.056, 4.189, 224),
    "inception_next_small": (49.374, 8.356, 224),
    "inception_next_base": (86.672, 14.841, 224),
    "inception_next_base_384": (86.672, 43.603, 384),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    millions, billions, side = SIZES[name]
    with torch.device("meta"):
        model = create_model(name).eval()
        flops = count_flops(lambda: model(torch.zeros(1, 3, side, side)))
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert flops / 2e9 == pytest.approx(billions, abs=2e-3)


def test_branches_of_the_mixer():
    torch.manual_seed(0)
    mixer, x = InceptionDWConv2d(16, 3, 5, 0.25).double(), randn(2, 16, 7, 6, requires_grad=False)
    y = mixer(x)
    assert torch.equal(y[:, :4], x[:, :4])
    for start, conv, padding in ((4, mixer.dwconv_hw, 1), (8, mixer.dwconv_w, (0, 2)), (12, mixer.dwconv_h, (2, 0))):
        part = F.conv2d(x[:, start : start + 4], conv.weight, conv.bias, padding=padding, groups=4)
        assert_same(y[:, start : start + 4], part)


def test_features_and_no_classifier():
    model = InceptionNeXt((1, 1), (16, 32), mlp_ratios=(2, 2), num_classes=0, in_chans=1).eval()
    x = torch.zeros(2, 1, 33, 40)
    assert [tuple(m.shape) for m in model.forward_intermediates(x)] == [(2, 16, 8, 10), (2, 32, 4, 5)]
    assert model(x).shape == (2, 32)
    assert model.fuse()(x).shape == (2, 32)


def test_fused_network_has_no_norms_between_maps_and_fewer_parameters():
    model = InceptionNeXt((1, 1), (16, 32), mlp_ratios=(2, 2)).eval()
    fused = model.fuse()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert sum(p.numel() for p in fused.parameters()) < count_parameters(model)


def test_a_new_head_keeps_its_weights_when_a_checkpoint_is_loaded():
    sizes = {"depths": (1, 1), "dims": (16, 32), "mlp_ratios": (2, 2)}
    trained, mine = InceptionNeXt(**sizes, num_classes=5), InceptionNeXt(**sizes, num_classes=3)
    with pytest.warns(UserWarning, match="fc2"):
        load_official(mine, trained.state_dict())
    assert_same(mine.head.fc1.weight, trained.head.fc1.weight)


def test_drop_path_rates_grow():
    model = InceptionNeXt((1, 2), (16, 32), mlp_ratios=(2, 2), drop_path_rate=0.2)
    assert [b.drop_path.rate for s in model.stages for b in s.blocks] == pytest.approx([0.0, 0.1, 0.2])


def test_refusals():
    with pytest.raises(ValueError, match="`square_kernel_size` must be odd, got 4"):
        InceptionDWConv2d(16, 4)
    with pytest.raises(ValueError, match="`band_kernel_size` must be odd, got 10"):
        InceptionDWConv2d(16, 3, 10)
    with pytest.raises(ValueError, match=r"in \(0, 1/3\], got 0.5"):
        InceptionDWConv2d(16, branch_ratio=0.5)
    with pytest.raises(ValueError, match="leaves none to a branch"):
        InceptionDWConv2d(4, branch_ratio=0.125)
    with pytest.raises(ValueError, match="one entry a stage, got 2, 2 and 4"):
        InceptionNeXt((1, 1), (16, 32))
    model = InceptionNeXt((1, 1), (16, 32), mlp_ratios=(2, 2))
    with pytest.raises(ValueError, match="size 3 on axis 1"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="at least 8 x 8 pixels"):
        model(torch.zeros(1, 3, 32, 7))
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\)|must have shape"):
        model(torch.zeros(3, 32, 32))
