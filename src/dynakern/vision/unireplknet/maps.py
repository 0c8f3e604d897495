"""Other modalities as maps for a convolutional network: spectrograms, the frames of a clip, views of a point cloud."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynakern.checks import check_choice, check_finite, check_floating, check_positive, check_shape
from dynakern.layers.resnet import BasicBlock

__all__ = ["PointProjection", "audio_to_map", "log_mel", "video_to_map", "view_rotations"]


def log_mel(waveform: Tensor | np.ndarray, sample_rate: int, *, num_mel: int = 128) -> Tensor:
    r"""Return the logarithm of the power in mel bands of 25 ms windows every 10 ms, as the Kaldi tools do.

    The mean of the recording is removed, then that of each window; windows are pre-emphasised by 0.97, multiplied by a
    Hann window and padded to a power of two; triangular bands reach from 20 Hz to half the sampling rate, equally wide
    on :math:`1127 \ln(1 + f / 700)`. There is no dither and no energy. Only whole windows count.

    Args:
        waveform: Samples, ``(L,)``, finite, at least one window.
        sample_rate: In Hz.
        num_mel: Bands F.

    Returns:
        ``(T, F)``, float32.

    Raises:
        ValueError: The recording is shorter than a window, not finite or not one-dimensional.

    Source: the Kaldi speech recognition toolkit, ``compute-fbank-feats``.
    """
    check_positive("sample_rate", sample_rate, integer=True)
    check_positive("num_mel", num_mel, integer=True)
    x = torch.as_tensor(waveform, dtype=torch.float64)
    check_shape("waveform", x, "L")
    check_finite("waveform", x)
    size, hop = round(0.025 * sample_rate), round(0.010 * sample_rate)
    if len(x) < size:
        raise ValueError(f"`waveform` must hold a window of {size} samples, got {len(x)}.")
    frames = (x - x.mean()).unfold(0, size, hop)  # (T, size)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    frames = (frames - 0.97 * before) * torch.hann_window(size, periodic=False, dtype=x.dtype)
    length = 2 ** math.ceil(math.log2(size))
    power = torch.fft.rfft(frames, n=length).abs().square()  # (T, length / 2 + 1)
    bands = _mel_bands(num_mel, length, sample_rate)
    return torch.log((power @ bands.T).clamp_min(torch.finfo(torch.float32).eps)).float()


def _mel_bands(num_mel: int, length: int, sample_rate: int) -> Tensor:
    """Return the weights of the frequencies in each band, ``(num_mel, length / 2 + 1)``."""

    def mel(frequency: Tensor) -> Tensor:
        return 1127 * torch.log1p(frequency / 700)

    ends = mel(torch.tensor([20.0, sample_rate / 2], dtype=torch.float64))
    step = (ends[1] - ends[0]) / (num_mel + 1)
    left = ends[0] + step * torch.arange(num_mel, dtype=torch.float64)[:, None]
    at = mel(torch.arange(length // 2 + 1, dtype=torch.float64) * sample_rate / length)
    rising, falling = (at - left) / step, (left + 2 * step - at) / step
    weights = torch.minimum(rising, falling).clamp_min(0)
    weights[:, -1] = 0  # the highest frequency belongs to no band, as there
    return weights


def audio_to_map(features: Tensor, *, frames: int = 128, mean: float = -6.845978, std: float = 5.5654526) -> Tensor:
    """Turn log-mel features into maps: cut or padded with zeros to ``frames``, standardised, frequency upwards.

    Args:
        features: ``(B, T, F)`` or ``(T, F)``.
        frames: Frames of a map.
        mean: Of the data set; the default is that of Speech Commands, as is the next.
        std: Of the data set; features are divided by twice this.

    Returns:
        ``(B, 1, F, frames)``.

    Raises:
        ValueError: The shape does not fit.
    """
    x = features.unsqueeze(0) if features.ndim == 2 else features
    check_shape("features", x, "B T F")
    check_positive("frames", frames, integer=True)
    check_positive("std", std)
    x = F.pad(x[:, :frames], (0, 0, 0, max(0, frames - x.shape[1])))
    return ((x - mean) / (2 * std)).transpose(1, 2).unsqueeze(1)


def video_to_map(clip: Tensor, *, layout: Literal["raw", "grid"] = "raw") -> Tensor:
    """Lay the frames of a clip out as one map.

    Args:
        clip: ``(B, C, T, H, W)`` with T a square number G^2, such as 16.
        layout: ``"grid"``: frames side by side, G in a row, as the paper says; ``"raw"``: a reshape of memory, as the
            authors' code does and their weights need, in which a row of the map holds G rows of one frame.

    Returns:
        ``(B, C, G H, G W)``.

    Raises:
        ValueError: The shape does not fit, or T is no square number.
    """
    check_choice("layout", layout, ("raw", "grid"))
    dims = check_shape("clip", clip, "B C T H W")
    g = math.isqrt(dims["T"])
    if g * g != dims["T"] or g == 0:
        raise ValueError(f"`clip` must have a square number of frames, got shape {tuple(clip.shape)}.")
    shape = (dims["B"], dims["C"], g * dims["H"], g * dims["W"])
    if layout == "raw":
        return clip.reshape(shape)
    return clip.unflatten(2, (g, g)).permute(0, 1, 2, 4, 3, 5).reshape(shape)


# Turns about x, y and z in units of pi: the views in the order in which they are used.
_VIEWS = (
    (0, 0, 0.5), (0.5, 0, 0.5), (1, 0, 0.5), (1.5, 0, 0.5), (1.25, -0.25, 0.5),
    (1.25, 0.25, 0.5), (1.75, -0.25, 0.5), (1.75, 0.25, 0.5), (0, -0.5, 0.5), (0, 0.5, 0.5),
)  # fmt: skip


def view_rotations(num_views: int) -> Tensor:
    """Return the rotation of each view, ``Rx Ry Rz``, ``(num_views, 3, 3)``, float32.

    Raises:
        ValueError: There are only 10 views.
    """
    check_positive("num_views", num_views, integer=True)
    if num_views > len(_VIEWS):
        raise ValueError(f"`num_views` must be at most {len(_VIEWS)}, got {num_views}.")
    found = []
    for angles in _VIEWS[:num_views]:
        (cx, sx), (cy, sy), (cz, sz) = ((math.cos(a * math.pi), math.sin(a * math.pi)) for a in angles)
        x = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        z = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        found.append(x @ y @ z)
    return torch.stack(found)


class _ViewFusion(nn.Module):
    """Let the views of a cloud see each other: patches of all through one transformer layer, back, and joined."""

    def __init__(self, channels: int, img_size: int, num_views: int, *, width: int = 128, num_heads: int = 8) -> None:
        super().__init__()
        self.num_views, self.num_heads, self.img_size, inner = num_views, num_heads, img_size, num_heads * width
        self.patches = nn.Conv2d(channels, width, 7, stride=7, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * inner, bias=False), nn.Linear(inner, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.up = nn.Conv2d(width, channels, 3, padding=1)
        self.join = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B V, C, S, S)`` of ``(B V, C, S, S)``."""
        maps = self.patches(x)
        side = maps.shape[2:]
        tokens = maps.flatten(2).transpose(1, 2)  # (B V, P, 128)
        tokens = tokens.unflatten(0, (-1, self.num_views)).flatten(1, 2)  # all views of a cloud side by side
        q, k, v = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        tokens = tokens + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        tokens = tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        maps = tokens.unflatten(1, (self.num_views, -1)).flatten(0, 1).transpose(1, 2).unflatten(2, side)
        maps = F.gelu(self.up(F.interpolate(maps, size=self.img_size)))
        return F.gelu(self.join(torch.cat([maps, x], 1)))


# The authors' names of the parts of the fusion, and ours.
_FUSION = {
    "conv1.": "patches.",
    "transformer.layers.0.0.norm.": "norm1.",
    "transformer.layers.0.0.fn.to_qkv.": "qkv.",
    "transformer.layers.0.0.fn.to_out.0.": "out.",
    "transformer.layers.0.1.norm.": "norm2.",
    "transformer.layers.0.1.fn.net.0.": "fc1.",
    "transformer.layers.0.1.fn.net.3.": "fc2.",
    "conv2.0.": "up.",
    "conv3.0.": "join.",
}


def convert_state_dict(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn the authors' names of the fusion of views into ours; all others are the same."""
    new = {}
    for key, value in state.items():
        for theirs, ours in _FUSION.items():
            key = key.replace(f"fusion.{theirs}", f"fusion.{ours}")
        new[key] = value
    return new


class PointProjection(nn.Module):
    r"""Turn point clouds into pictures from several sides, with learned colours.

    Every point gets a feature from its neighbours; for each view the features are added up in a 3x3 neighbourhood of
    the cell that the turned point falls into, and a small convolutional network makes a picture of three channels.

    Args:
        num_neighbors: Nearest points k, the point itself included.
        trans_dim: Width t of the first map.
        graph_dim: Width of a point's feature, and of the picture before its last map; a multiple of 4.
        img_size: Side of the pictures.
        obj_size: Side S of the square that the cloud fills, even.
        num_views: Views V, at most 10.
        fusion: Let the views of a cloud see each other, by one transformer layer over patches of 7 x 7 pixels.

    Raises:
        ValueError: A size does not fit.

    Source: the projection of P2P (Wang et al., 2022, arXiv:2208.02812) as used by arXiv:2311.15599.
    """

    def __init__(
        self,
        *,
        num_neighbors: int = 32,
        trans_dim: int = 8,
        graph_dim: int = 64,
        img_size: int = 224,
        obj_size: int = 224,
        num_views: int = 4,
        fusion: bool = False,
    ) -> None:
        super().__init__()
        if obj_size > img_size or obj_size % 2 or obj_size < 8:
            raise ValueError(f"`obj_size` must be even, from 8 to `img_size` {img_size}, got {obj_size}.")
        if graph_dim % 4:
            raise ValueError(f"`graph_dim` must be a multiple of 4, got {graph_dim}.")
        self.num_neighbors, self.img_size, self.obj_size = num_neighbors, img_size, obj_size
        self.input_trans = nn.Conv1d(3, trans_dim, 1)
        self.graph_layer = nn.Sequential(
            nn.Conv2d(2 * trans_dim, graph_dim, 1, bias=False), nn.GroupNorm(4, graph_dim), nn.LeakyReLU(0.2)
        )
        self.proj_layer = nn.Conv1d(graph_dim, graph_dim, 1)
        self.img_block = nn.Sequential(BasicBlock(graph_dim, graph_dim), nn.Conv2d(graph_dim, graph_dim, 1))
        self.fusion = _ViewFusion(graph_dim, img_size, num_views) if fusion else nn.Identity()
        self.img_layer = nn.Conv2d(graph_dim, 3, 1)
        self.register_buffer("rotations", view_rotations(num_views), persistent=False)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1), persistent=False)
        self.rotations: Tensor
        self.mean: Tensor
        self.std: Tensor

    def point_features(self, points: Tensor) -> Tensor:
        """Return the features of points ``(B, N, 3)``: ``(B, C, N)``."""
        f = self.input_trans(points.transpose(1, 2))  # (B, t, N)
        near = torch.cdist(points, points).topk(self.num_neighbors, dim=-1, largest=False).indices  # (B, N, k)
        index = near.unsqueeze(1).expand(-1, f.shape[1], -1, -1)
        neighbors = f.unsqueeze(2).expand(-1, -1, f.shape[2], -1).gather(3, index)  # (B, t, N, k)
        own = f.unsqueeze(3).expand_as(neighbors)
        return self.proj_layer(self.graph_layer(torch.cat([neighbors - own, own], 1)).amax(-1))

    def rotate(self, points: Tensor) -> Tensor:
        """Return the points as each view sees them, ``(B V, N, 3)``."""
        turned = torch.einsum("bnj,vij->bvni", points, self.rotations.to(points))
        return turned.flatten(0, 1) - points.new_tensor((0.0, 0.0, -1.4))

    def cells(self, turned: Tensor) -> Tensor:
        """Return the cells that points ``(B V, N, 3)`` are added to, rows times S plus columns: ``(B V, N, 9)``."""
        xy, size = turned[..., :2], self.obj_size
        low, high = xy.amin(1, keepdim=True), xy.amax(1, keepdim=True)
        step = (high - low).amax(-1, keepdim=True) / (size - 3)
        offsets = torch.cartesian_prod(*[torch.arange(-1, 2, device=xy.device)] * 2)  # (9, 2)
        cell = torch.floor((xy - low) / step).long().unsqueeze(2) + offsets + 1  # (B V, N, 9, 2)
        middle = (cell.amax((1, 2), keepdim=True) + cell.amin((1, 2), keepdim=True)).div(2, rounding_mode="floor")
        cell = cell + size // 2 - 1 - middle
        return cell[..., 0] * size + cell[..., 1]

    def forward(self, points: Tensor) -> Tensor:
        """Return pictures ``(B V, 3, img_size, img_size)`` of clouds, normalised as for ImageNet.

        Args:
            points: ``(B, N, 3)``, at least ``num_neighbors`` points.

        Raises:
            ValueError: The shape does not fit, or there are too few points.
        """
        check_floating("points", points)
        dims = check_shape("points", points, "B N 3")
        if dims["N"] < self.num_neighbors:
            raise ValueError(f"`points` must hold at least {self.num_neighbors} points, got {dims['N']}.")
        f, cells = self.point_features(points), self.cells(self.rotate(points))
        views, side = len(self.rotations), self.obj_size
        f = f.repeat_interleave(views, 0).unsqueeze(-1).expand(-1, -1, -1, 9).flatten(2)  # (B V, C, 9 N)
        index = cells.flatten(1).unsqueeze(1).expand_as(f)
        image = f.new_zeros(*f.shape[:2], side * side).scatter_add(2, index, f).unflatten(2, (side, side))
        margin = self.img_size - side
        image = F.pad(image, (margin // 2, margin - margin // 2) * 2)
        colours = torch.sigmoid(self.img_layer(self.fusion(self.img_block(image))))
        return (colours - self.mean) / self.std
