"""What every image network offers to ``dynakern compare classify-images``: any small image, and a width to match."""

from __future__ import annotations

import pytest
import torch

from dynakern.catalog import SYSTEMS
from dynakern.measure import count_parameters
from dynakern.models import import_string

FACTORIES = [(s.slug, s.tasks["classify-images"]) for s in SYSTEMS if "classify-images" in s.tasks]


@pytest.mark.parametrize(("slug", "factory"), FACTORIES, ids=[slug for slug, _ in FACTORIES])
def test_factory_takes_small_images_and_a_width(slug, factory):
    build = import_string(factory)
    for side, channels in ((16, 1), (32, 3)):
        torch.manual_seed(0)
        model = build(in_chans=channels, img_size=side, num_classes=7)
        assert 5e4 < count_parameters(model) < 2e6
        x = torch.randn(4, channels, side, side)
        assert model.train()(x).shape == (4, 7)
        with torch.no_grad():
            assert torch.isfinite(model.eval()(x)).all()
    sizes = [count_parameters(build(in_chans=1, img_size=16, num_classes=7, width=w)) for w in (0.5, 1.0, 2.0)]
    assert sizes[0] < sizes[1] < sizes[2]
