"""Readers of labelled images: folders, archives, arrays; what is wrong is named."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from PIL import Image

from dynakern.data.images import load_digits, read_image, read_labelled_images


def picture(path, colour, size=(6, 5)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for index in range(2):
        picture(tmp_path / "red" / f"{index}.png", (255, 0, 0))
        picture(tmp_path / "blue" / f"{index}.png", (0, 0, 255))
    return tmp_path


def test_folder_and_zip_hold_the_same(folder, tmp_path_factory):
    data = read_labelled_images(folder)
    assert data.images.shape == (4, 3, 5, 6)
    assert data.images.dtype == np.float32
    assert data.labels.tolist() == ["blue", "blue", "red", "red"]
    assert data.is_test is None
    np.testing.assert_array_equal(data.images[:, :, 2, 2], [[0, 0, 1]] * 2 + [[1, 0, 0]] * 2)
    archive = tmp_path_factory.mktemp("zip") / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.rglob("*.png"):
            file.write(path, path.relative_to(folder))
    np.testing.assert_array_equal(read_labelled_images(archive).images, data.images)


def test_train_and_test_folders_are_the_published_parts(tmp_path):
    for part in ("train", "test"):
        for label in ("a", "b"):
            picture(tmp_path / part / label / "0.png", (1, 2, 3))
    data = read_labelled_images(tmp_path)
    assert sorted(zip(data.labels, data.is_test, strict=True)) == [("a", False), ("a", True), ("b", False), ("b", True)]


def test_sizes_must_agree_or_be_brought_together(folder):
    picture(folder / "red" / "odd.png", (255, 0, 0), size=(9, 9))
    with pytest.raises(ValueError, match=r"odd.png has 9 x 9 pixels and the first 5 x 6: give a size"):
        read_labelled_images(folder)
    assert read_labelled_images(folder, size=4).images.shape == (5, 3, 4, 4)


@pytest.mark.parametrize("shape", [(4, 7, 6), (4, 7, 6, 3), (4, 3, 7, 6)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays(tmp_path, shape, dtype):
    x = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    np.savez(tmp_path / "a.npz", X=x, y=[0, 1, 0, 1], X_test=x[:2], y_test=[1, 0])
    data = read_labelled_images(tmp_path / "a.npz")
    assert data.images.shape == (6, 1 if len(shape) == 3 else 3, 7, 6)
    assert data.is_test.tolist() == [False] * 4 + [True] * 2
    assert data.labels.tolist() == list("010110")
    assert float(data.images.max()) == pytest.approx(x.max() / (255 if dtype == np.uint8 else 1))


def test_digits_and_single_pictures(tmp_path):
    assert load_digits().images.shape == (1797, 1, 8, 8)
    assert load_digits().images.max() == 1
    picture(tmp_path / "p.png", (255, 0, 0), size=(20, 10))
    assert read_image(tmp_path / "p.png").shape == (3, 10, 20)
    assert read_image(tmp_path / "p.png", size=8, channels=1).shape == (1, 8, 8)


def test_refusals(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="No file or folder"):
        read_labelled_images(tmp_path / "none")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken.png: not a picture"):
        read_image(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"folder of its class, broken.png lies in none"):
        read_labelled_images(tmp_path)
    (tmp_path / "broken.png").unlink()
    (tmp_path / "bad.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is no zip archive"):
        read_labelled_images(tmp_path / "bad.zip")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a .zip of it or a .npz"):
        read_labelled_images(tmp_path / "a.txt")
    np.savez(tmp_path / "b.npz", X=np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="missing: y"):
        read_labelled_images(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", X=np.full((2, 4, 4), np.nan), y=[0, 1])
    with pytest.raises(ValueError, match=r"X\[0\] is not finite"):
        read_labelled_images(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", X=np.zeros((2, 4, 4)), y=[0, 0])
    with pytest.raises(ValueError, match=r"at least two classes, got \['0'\]"):
        read_labelled_images(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", X=np.zeros((2, 4)), y=[0, 1])
    with pytest.raises(ValueError, match=r"X must be \(N, H, W\)"):
        read_labelled_images(tmp_path / "e.npz")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        read_labelled_images(empty)
