"""Other modalities as maps: mel bands of tones, layouts of clips, projections of points."""

from __future__ import annotations

import math

import pytest
import torch

from dynakern import load_official
from dynakern.testing import assert_same, randn
from dynakern.vision.unireplknet import PointProjection, audio_to_map, log_mel, video_to_map, view_rotations


@pytest.mark.parametrize("frequency", [300, 1000, 3000])
def test_a_tone_is_loudest_in_its_band(frequency):
    tone = torch.sin(2 * math.pi * frequency * torch.arange(16000) / 16000)
    features = log_mel(tone, 16000, num_mel=40)
    assert features.shape == (1 + (16000 - 400) // 160, 40)
    low, high = (1127 * math.log1p(f / 700) for f in (20, 8000))
    centres = low + (high - low) / 41 * torch.arange(1, 41)
    band = int((centres - 1127 * math.log1p(frequency / 700)).abs().argmin())
    assert (features.argmax(1) == band).all()


def test_log_mel_follows_its_definition():
    x = randn(700, requires_grad=False)
    features = log_mel(x, 16000, num_mel=8)
    frame = (x - x.mean())[160:560]
    frame = frame - frame.mean()
    frame = frame - 0.97 * torch.cat([frame[:1], frame[:-1]])
    n = torch.arange(400, dtype=torch.float64)
    spectrum = torch.fft.rfft(frame * (0.5 - 0.5 * torch.cos(2 * math.pi * n / 399)), 512).abs() ** 2
    mel = 1127 * torch.log1p(torch.arange(257, dtype=torch.float64) * 16000 / 512 / 700)
    low, high = (1127 * math.log1p(f / 700) for f in (20, 8000))
    step = (high - low) / 9
    weights = [(1 - (mel - low - (i + 1) * step).abs() / step).clamp_min(0) for i in range(8)]
    expected = torch.stack([(w[:-1] * spectrum[:-1]).sum() for w in weights]).log()
    assert_same(features[1], expected.float(), rtol=1e-5)


def test_silence_is_finite_and_constant_shifts_do_not_matter():
    assert torch.isfinite(log_mel(torch.zeros(1000), 16000)).all()
    x = randn(1000, requires_grad=False)
    assert_same(log_mel(x + 5, 16000), log_mel(x, 16000), rtol=1e-5)


def test_audio_maps_are_cut_padded_and_turned():
    features = torch.arange(12.0).reshape(4, 3)
    long = audio_to_map(features, frames=6, mean=1.0, std=2.0)
    assert long.shape == (1, 1, 3, 6)
    assert_same(long[0, 0, :, :4], ((features - 1) / 4).T)
    assert (long[..., 4:] == -0.25).all()
    assert audio_to_map(features.expand(2, -1, -1), frames=3).shape == (2, 1, 3, 3)


def test_video_layouts():
    clip = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(2, 3, 4, 2, 3)
    grid = video_to_map(clip, layout="grid")
    assert grid.shape == (2, 3, 4, 6)
    assert grid[0, 0].tolist() == [[0] * 3 + [1] * 3] * 2 + [[2] * 3 + [3] * 3] * 2
    raw = video_to_map(clip)
    assert raw[0, 0].tolist() == [[float(t)] * 6 for t in range(4)]
    with pytest.raises(ValueError, match="square number of frames"):
        video_to_map(clip[:, :, :3])


def test_rotations_turn():
    rotations = view_rotations(10).double()
    eye = torch.eye(3, dtype=torch.float64).expand(10, 3, 3)
    assert_same(rotations @ rotations.transpose(1, 2), eye, rtol=1e-6)
    assert_same(torch.linalg.det(rotations), torch.ones(10, dtype=torch.float64), rtol=1e-6)
    with pytest.raises(ValueError, match="at most 10, got 11"):
        view_rotations(11)


def small(**options):
    torch.manual_seed(0)
    sizes = {"num_neighbors": 4, "trans_dim": 4, "graph_dim": 8, "img_size": 20, "obj_size": 16}
    return PointProjection(**{**sizes, **options}).eval()


def test_points_fill_the_square_and_move_with_nothing():
    projection, points = small(num_views=2), torch.rand(2, 50, 3)
    cells = projection.cells(projection.rotate(points))
    assert cells.shape == (4, 50, 9)
    rows, columns = cells // 16, cells % 16
    assert int(torch.minimum(rows.min(), columns.min())) >= 0
    assert (
        int(torch.maximum(rows.amax((1, 2)) - rows.amin((1, 2)), columns.amax((1, 2)) - columns.amin((1, 2))).min())
        == 15
    )
    with torch.no_grad():
        assert projection(points).shape == (4, 3, 20, 20)
        assert_same(projection(points)[:2], projection(points[:1]), rtol=1e-4)  # clouds do not see each other


@pytest.mark.parametrize("fusion", [False, True])
def test_gradients_reach_the_projection(fusion):
    projection = small(fusion=fusion).train()
    projection(torch.rand(1, 30, 3)).sum().backward()
    assert all(p.grad is not None for p in projection.parameters())


def test_fused_views_see_each_other_and_other_clouds_do_not():
    projection, points = small(fusion=True, num_views=3), torch.rand(2, 30, 3)
    with torch.no_grad():
        whole = projection(points)
        assert_same(projection(points[:1]), whole[:3], rtol=1e-4)
    x = torch.randn(3, 8, 20, 20, requires_grad=True)
    (gradient,) = torch.autograd.grad(projection.fusion(x)[0].sum(), x)
    assert float(gradient[2].abs().max()) > 0  # another view of the same cloud


def test_fusion_loads_by_the_authors_names():
    source, target = small(fusion=True), small(fusion=True)
    theirs = {"patches": "conv1", "qkv": "transformer.layers.0.0.fn.to_qkv", "fc2": "transformer.layers.0.1.fn.net.3"}
    theirs |= {"norm1": "transformer.layers.0.0.norm", "norm2": "transformer.layers.0.1.norm", "up": "conv2.0"}
    theirs |= {"out": "transformer.layers.0.0.fn.to_out.0", "fc1": "transformer.layers.0.1.fn.net.0", "join": "conv3.0"}
    state = {}
    for key, value in source.state_dict().items():
        for ours, name in theirs.items():
            key = key.replace(f"fusion.{ours}.", f"fusion.{name}.")
        state[key] = value + 1
    load_official(target, state)
    assert_same(target.fusion.join.weight, source.fusion.join.weight + 1)


def test_refusals():
    with pytest.raises(ValueError, match="a window of 400 samples, got 10"):
        log_mel(torch.zeros(10), 16000)
    with pytest.raises(ValueError, match="`waveform` must be finite"):
        log_mel(torch.full((500,), float("nan")), 16000)
    with pytest.raises(ValueError, match="Did you mean 'grid'"):
        video_to_map(torch.zeros(1, 1, 4, 2, 2), layout="gird")
    with pytest.raises(ValueError, match="at least 4 points, got 3"):
        small()(torch.rand(1, 3, 3))
    with pytest.raises(ValueError, match="must be even, from 8"):
        small(obj_size=15)
    with pytest.raises(ValueError, match="must be a multiple of 4, got 6"):
        small(graph_dim=6)
