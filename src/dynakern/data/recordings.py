"""Read single recordings: WAV files, folders of frames, point clouds."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np

from dynakern.data.images import read_image

__all__ = ["read_frames", "read_points", "read_wav"]

_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip


def read_wav(path: str | os.PathLike[str]) -> tuple[np.ndarray, int]:
    """Read a WAV file of 16-bit samples; several channels are averaged.

    Returns:
        Samples in [-1, 1), ``(L,)``, float32, and the sampling rate in Hz.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no WAV file with 16-bit PCM samples, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise ValueError(f"{path}: 16-bit samples are needed, got {8 * file.getsampwidth()} bit.")
            frames, channels, rate = file.readframes(file.getnframes()), file.getnchannels(), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: not a WAV file with PCM samples: {error}.") from error
    samples = np.frombuffer(frames, "<i2").astype(np.float32) / 32768
    if len(samples) == 0:
        raise ValueError(f"{path}: the recording is empty.")
    return samples.reshape(-1, channels).mean(1), rate


def read_frames(path: str | os.PathLike[str], *, num_frames: int = 16, size: int = 224) -> np.ndarray:
    """Read evenly spaced frames of a folder of pictures, in the order of their names.

    Args:
        path: The folder.
        num_frames: Frames T.
        size: Side S of the centre square that each is brought to.

    Returns:
        ``(1, 3, T, S, S)``, float32 in [0, 1].

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds fewer pictures than frames.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"No folder {path}.")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp", ".webp"))
    if len(files) < num_frames:
        raise ValueError(f"{path} must hold at least {num_frames} pictures, got {len(files)}.")
    chosen = np.linspace(0, len(files) - 1, num_frames).round().astype(int)
    return np.stack([read_image(files[i], size=size) for i in chosen], 1)[None]


def read_points(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a point cloud: the first three columns of a ``.npy`` array, or x, y, z of a ``.ply`` file's vertices.

    Returns:
        ``(N, 3)``, float32, finite.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, holds no points, or a coordinate is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    if path.suffix == ".npy":
        try:
            points = np.load(path, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read without unpickling, which is refused: {error}.") from error
        if points.ndim != 2 or points.shape[1] < 3:
            raise ValueError(f"{path}: an array (N, 3) is needed, got {points.shape}.")
    elif path.suffix == ".ply":
        points = _read_ply(path)
    else:
        raise ValueError(f"{path}: a .npy or .ply file is needed.")
    points = points[:, :3].astype(np.float32)
    if len(points) == 0:
        raise ValueError(f"{path} holds no points.")
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(1))[0])
        raise ValueError(f"{path}: point {row} is not finite.")
    return points


def _read_ply(path: Path) -> np.ndarray:
    """Return x, y and z of the vertices, the first element of the file."""
    content = path.read_bytes()
    head, mark, body = content.partition(b"end_header\n")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not mark or lines[:1] != [["ply"]]:
        raise ValueError(f"{path} is no PLY file.")
    form = next((fields[1] for fields in lines if fields[:1] == ["format"]), "")
    elements = [fields for fields in lines if fields[:1] == ["element"]]
    if not elements or elements[0][1] != "vertex":
        raise ValueError(f"{path}: the vertices must come first.")
    start = lines.index(elements[0]) + 1
    stop = lines.index(elements[1]) if len(elements) > 1 else len(lines)
    fields = [line for line in lines[start:stop] if line[:1] == ["property"]]
    names, count = [f[-1] for f in fields], int(elements[0][2])
    if any(f[1] not in _PLY_TYPES for f in fields) or not {"x", "y", "z"} <= set(names):
        raise ValueError(f"{path}: vertices with plain properties x, y and z are needed, got {', '.join(names)}.")
    if form == "ascii":
        rows = [line.split()[: len(names)] for line in body.decode("ascii").splitlines()[:count]]
        short = next((i for i, row in enumerate(rows) if len(row) < len(names)), None)
        if short is not None:
            raise ValueError(f"{path}: {count} vertices are announced, vertex {short} has {len(rows[short])} numbers.")
        table = np.array(rows, dtype=np.float64).reshape(-1, len(names))
        columns = {name: table[:, i] for i, name in enumerate(names)}
    else:
        order = {"binary_little_endian": "<", "binary_big_endian": ">"}.get(form)
        if order is None:
            raise ValueError(f"{path}: format {form!r} is not known.")
        kind = np.dtype([(name, order + _PLY_TYPES[f[1]]) for name, f in zip(names, fields, strict=True)])
        if len(body) < count * kind.itemsize:
            raise ValueError(f"{path}: {count} vertices are announced, the file ends before.")
        columns = np.frombuffer(body, kind, count)
    if len(columns["x"]) < count:
        raise ValueError(f"{path}: {count} vertices are announced, {len(columns['x'])} found.")
    return np.stack([np.asarray(columns[axis], dtype=np.float64) for axis in "xyz"], 1)
