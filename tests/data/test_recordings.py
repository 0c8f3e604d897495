"""Readers of single recordings."""

from __future__ import annotations

import wave

import numpy as np
import pytest
from PIL import Image

from dynakern.data.recordings import read_frames, read_points, read_wav


def write_wav(path, samples, rate=8000, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2" if width == 2 else "u1").tobytes())


def test_wav_channels_are_averaged(tmp_path):
    write_wav(tmp_path / "a.wav", np.array([[16384, 0], [-16384, -16384]]))
    samples, rate = read_wav(tmp_path / "a.wav")
    assert rate == 8000
    assert samples.tolist() == [0.25, -0.5]
    with pytest.raises(FileNotFoundError, match=r"No file .*b\.wav"):
        read_wav(tmp_path / "b.wav")
    (tmp_path / "c.wav").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a WAV file"):
        read_wav(tmp_path / "c.wav")
    write_wav(tmp_path / "d.wav", np.zeros((4, 1)), width=1)
    with pytest.raises(ValueError, match="got 8 bit"):
        read_wav(tmp_path / "d.wav")
    write_wav(tmp_path / "e.wav", np.zeros((0, 1)))
    with pytest.raises(ValueError, match="is empty"):
        read_wav(tmp_path / "e.wav")


def test_frames_are_evenly_spaced(tmp_path):
    for i in range(7):
        Image.new("RGB", (10, 8), (i * 20, 0, 0)).save(tmp_path / f"{i:02d}.png")
    clip = read_frames(tmp_path, num_frames=4, size=6)
    assert clip.shape == (1, 3, 4, 6, 6)
    np.testing.assert_allclose(clip[0, 0, :, 0, 0] * 255, [0, 40, 80, 120], atol=1e-4)
    with pytest.raises(ValueError, match="at least 8 pictures, got 7"):
        read_frames(tmp_path, num_frames=8)
    with pytest.raises(FileNotFoundError, match="No folder"):
        read_frames(tmp_path / "none")


HEADER = (
    "ply\nformat {}\ncomment x\nelement vertex 2\nproperty float x\nproperty float y\nproperty double z\nend_header\n"
)


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_of_every_format(tmp_path, form):
    points = np.array([[1, 2, 3], [-0.5, 0.25, 4]])
    header = HEADER.format(f"{form} 1.0").encode()
    if form == "ascii":
        body = b"1 2 3\n-0.5 0.25 4\n"
    else:
        order = "<" if "little" in form else ">"
        kind = np.dtype([("x", order + "f4"), ("y", order + "f4"), ("z", order + "f8")])
        body = np.array([tuple(p) for p in points], kind).tobytes()
    (tmp_path / "a.ply").write_bytes(header + body)
    np.testing.assert_array_equal(read_points(tmp_path / "a.ply"), points)
    (tmp_path / "b.ply").write_bytes(header + body[: len(body) // 2])
    with pytest.raises(ValueError, match="2 vertices are announced"):
        read_points(tmp_path / "b.ply")


def test_arrays_of_points(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(8.0).reshape(2, 4))
    assert read_points(tmp_path / "a.npy").tolist() == [[0, 1, 2], [4, 5, 6]]


def test_refusals_of_points(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file"):
        read_points(tmp_path / "none.npy")
    np.save(tmp_path / "a.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(N, 3\) is needed, got \(2, 2\)"):
        read_points(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array([[0, np.nan, 0]]))
    with pytest.raises(ValueError, match="point 0 is not finite"):
        read_points(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((0, 3)))
    with pytest.raises(ValueError, match="holds no points"):
        read_points(tmp_path / "c.npy")
    np.save(tmp_path / "d.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="without unpickling"):
        read_points(tmp_path / "d.npy")
    (tmp_path / "e.ply").write_text("nothing")
    with pytest.raises(ValueError, match="no PLY file"):
        read_points(tmp_path / "e.ply")
    (tmp_path / "f.ply").write_text(HEADER.format("ascii 1.0").replace("float y", "list uchar int y"))
    with pytest.raises(ValueError, match="plain properties x, y and z"):
        read_points(tmp_path / "f.ply")
    (tmp_path / "g.xyz").write_text("0 0 0")
    with pytest.raises(ValueError, match=r"a .npy or .ply"):
        read_points(tmp_path / "g.xyz")
