"""Read labelled images: a folder or zip with one folder a class, or an npz archive; and single pictures."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

__all__ = ["LabelledImages", "load_digits", "read_image", "read_labelled_images"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "validation", "valid")


@dataclass(frozen=True)
class LabelledImages:
    """Images with one label each.

    Attributes:
        images: ``(N, C, H, W)``, float32, finite; 8-bit pictures are scaled to [0, 1].
        labels: ``(N,)``, strings.
        is_test: ``(N,)``, whether an image belongs to the published test part; None where there is no such part.
        source: Where they came from.
    """

    images: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray | None
    source: str


def load_digits() -> LabelledImages:
    """Return the 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, ``(N, 1, 8, 8)`` in [0, 1].

    Source: E. Alpaydin and C. Kaynak, 1998, doi:10.24432/C50P49 (CC BY 4.0).
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return LabelledImages(
        (data.images[:, None] / 16).astype(np.float32), data.target.astype(str), None, "scikit-learn digits"
    )


def read_image(path: str | os.PathLike[str], *, size: int | None = None, channels: int = 3) -> np.ndarray:
    """Read a picture.

    Args:
        path: PNG, JPEG or another format that Pillow reads.
        size: Resize the shorter side to this and cut the centre square; as it is by default.
        channels: 3 for colours, 1 for grey.

    Returns:
        ``(C, H, W)``, float32 in [0, 1].

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no picture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    return _decode(path.read_bytes(), str(path), "RGB" if channels == 3 else "L", size)


def _decode(content: bytes, name: str, mode: str, size: int | None) -> np.ndarray:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as opened:
            picture = opened.convert(mode)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name}: not a picture that can be read: {error}.") from error
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.float32) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def read_labelled_images(path: str | os.PathLike[str], *, size: int | None = None) -> LabelledImages:
    """Read labelled images, by what the path is.

    - a folder, or a zip, with one folder of pictures a class; or such folders in ``train`` and ``test`` (or ``val``).
    - ``NAME.npz``: ``X`` ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` with C in {1, 3}, and ``y`` ``(N,)``;
      optionally ``X_test`` and ``y_test``. Integers are divided by 255.

    Args:
        path: The folder or file.
        size: Resize and cut pictures to squares of this side; needed if they differ in size.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The content cannot be read; the message names the file and what was expected.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No file or folder {path}.")
    if path.is_dir():
        data = _from_pictures(_folder(path), str(path), size)
    elif path.suffix == ".zip":
        data = _from_pictures(_archive(path), str(path), size)
    elif path.suffix == ".npz":
        data = _read_npz(path, size)
    else:
        raise ValueError(f"{path}: a folder with one folder a class, a .zip of it or a .npz file is needed.")
    classes = sorted(set(data.labels.tolist()))
    if len(classes) < 2:
        raise ValueError(f"{path} must hold at least two classes, got {classes}.")
    return data


Pictures = list[tuple[PurePosixPath, Callable[[], bytes]]]


def _folder(path: Path) -> Pictures:
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))
    return [(PurePosixPath(f.relative_to(path).as_posix()), f.read_bytes) for f in files]


def _archive(path: Path) -> Pictures:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in _SUFFIXES and "__MACOSX" not in n)
            contents = {n: archive.read(n) for n in names}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no zip archive: {error}.") from error
    return [(PurePosixPath(n), lambda n=n: contents[n]) for n in names]


def _from_pictures(pictures: Pictures, source: str, size: int | None) -> LabelledImages:
    if not pictures:
        raise ValueError(f"{source} holds no pictures ({', '.join(_SUFFIXES)}).")
    parts = [_part(name) for name, _ in pictures]
    if any(len(name.parts) < 2 for name, _ in pictures):
        bad = next(name for name, _ in pictures if len(name.parts) < 2)
        raise ValueError(f"{source}: every picture must lie in the folder of its class, {bad} lies in none.")
    split = all(part is not None for part in parts) and len(set(parts)) == 2
    rows: list[np.ndarray] = []
    for name, read in pictures:
        row = _decode(read(), f"{source}, {name}", "RGB", size)
        if rows and row.shape != rows[0].shape:
            raise ValueError(
                f"{source}: pictures differ in size, {name} has {row.shape[1]} x {row.shape[2]} pixels and the first "
                f"{rows[0].shape[1]} x {rows[0].shape[2]}: give a size to bring them to."
            )
        rows.append(row)
    is_test = np.array([part == "test" for part in parts]) if split else None
    return LabelledImages(np.stack(rows), np.array([name.parent.name for name, _ in pictures]), is_test, source)


def _part(name: PurePosixPath) -> str | None:
    for folder in name.parts[:-2]:
        if folder.lower() in _TRAIN + _TEST:
            return "train" if folder.lower() in _TRAIN else "test"
    return None


def _read_npz(path: Path, size: int | None) -> LabelledImages:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read without unpickling, which is refused: {error}.") from error
    missing = {"X", "y"} - set(arrays)
    if missing:
        raise ValueError(f"{path} must hold the arrays X and y, missing: {', '.join(sorted(missing))}.")
    found = list(_npz_parts(path, arrays, size))
    is_test = np.repeat([False, True], [len(y) for _, y in found]) if len(found) == 2 else None
    images = np.concatenate([x for x, _ in found])
    return LabelledImages(images, np.concatenate([y for _, y in found]), is_test, str(path))


def _npz_parts(path: Path, arrays: dict[str, np.ndarray], size: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for x_name, y_name in (("X", "y"), ("X_test", "y_test")):
        if x_name not in arrays:
            continue
        x, y = arrays[x_name], arrays.get(y_name, np.zeros(0))
        if y.shape != (len(x),):
            raise ValueError(f"{path}: {y_name} must have one label for each of {len(x)} images, got {y.shape}.")
        if x.ndim == 3:
            x = x[:, None]
        elif x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
            x = x.transpose(0, 3, 1, 2)
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"{path}: {x_name} must be (N, H, W), (N, H, W, C) or (N, C, H, W) with C in 1, 3, got {x.shape}."
            )
        images = x.astype(np.float32) / (255 if np.issubdtype(x.dtype, np.integer) else 1)
        if not np.isfinite(images).all():
            index = int(np.flatnonzero(~np.isfinite(images).all((1, 2, 3)))[0])
            raise ValueError(f"{path}: {x_name}[{index}] is not finite.")
        yield (images if size is None else _resized(images, size)), y.astype(str)


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    import torch

    found = torch.nn.functional.interpolate(torch.from_numpy(images), (size, size), mode="bilinear", antialias=True)
    return found.numpy()
