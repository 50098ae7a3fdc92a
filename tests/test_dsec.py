"""Where DSEC's events lie in its images: the homography, by hand and of a real calibration, and the converter."""

import h5py
import numpy as np
import pytest
import yaml

from convert import main
from dsec import at_infinity, read_rectification
from events import Events


def calibration(angle: float) -> dict:
    """What cam_to_cam.yaml holds. The middle of the events' pixels is (32, 24), of the images' (64, 48); the latter are
    half as wide. Both images are turned by `angle`, in two steps: T_10 and R_rect0 back, T_32 back and R_rect2."""
    cos, sin = np.cos(angle / 2), np.sin(angle / 2)
    half, one = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]), np.eye(3).tolist()
    turns = {"T_10": half, "T_32": half.T, "R_rect0": half.T, "R_rect2": half}
    turns = {name: turn.tolist() for name, turn in turns.items()} | {"R_rect1": one, "R_rect3": one}
    event, frame = {"camera_matrix": [100, 100, 32, 24]}, {"camera_matrix": [200, 200, 64, 48], "resolution": [128, 96]}
    lenses = {"camRect0": event, "camRect1": frame, "camRect2": frame, "camRect3": event}
    return {"intrinsics": lenses, "extrinsics": turns}


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Of the converter: a map of 64 x 48 pixels that moves all by one to the right, and a half turn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibration.yaml").write_text(yaml.safe_dump(calibration(np.pi)))
    with h5py.File("map.h5", "w") as file:
        file["rectify_map"] = np.stack(np.meshgrid(np.arange(64.0) + 1, np.arange(48.0)), axis=-1).astype("f4")
    return "-o", "out.npy", "--rectify", "map.h5", "--calibration", "calibration.yaml"


def write(*events) -> str:
    """A file of (x, y) at 0, 1, ... us, with a t_offset of 10 us."""
    with h5py.File("events.h5", "w") as file:
        columns = [
            *np.array(events, dtype="u2").T,
            np.arange(len(events), dtype="u4"),
            np.ones(len(events), dtype="u1"),
        ]
        for name, column in zip("xytp", columns, strict=True):
            file[f"events/{name}"] = column
        file["t_offset"] = 10
    return "events.h5"


@pytest.mark.parametrize("camera", ["left", "right"])
def test_at_infinity(camera):
    """A quarter turn: (42, 24), right of the middle by a tenth of the distance, goes below it, to (64, 48 + 20)."""
    u, v, w = at_infinity(calibration(np.pi / 2), camera) @ [42, 24, 1]
    np.testing.assert_allclose([u / w, v / w], [64, 68])


@pytest.mark.parametrize("camera", ["left", "right"])
def test_real_calibration(data, camera):
    """The homography that README.md of the data gives, the same for both cameras."""
    folder = data / "recordings" / "formats"
    known = [[1.96471, -0.012294, 63.108], [-1.5e-5, 1.95597, 145.738], [-8.7e-7, -1.63e-5, 1]]
    place = read_rectification(folder / "rectify_map.h5", folder / "cam_to_cam.yaml", camera)
    np.testing.assert_allclose(place.H / place.H[2, 2], known, rtol=1e-2, atol=5e-6)
    assert place.size == (1440, 1080)
    u, v, w = place.H @ [*place.map[240, 320], 1]
    events = Events(np.array([320]), np.array([240]), np.zeros(1), np.ones(1))
    assert place.lands(events).tolist() == [round(v / w) * 1440 + round(u / w)]


@pytest.mark.parametrize("camera", ["left", "right"])
def test_convert(flags, capsys, camera):
    """x' = 64 - 2 (x + 1 - 32) and y' = 48 - 2 (y - 24), in an image of 128 x 96; those outside are counted."""
    events = write((0, 1), (30, 24), (62, 47), (62, 0), (63, 20))  # y' of the fourth is 96
    assert main([events, *flags, "--camera", camera]) == 0
    rows = np.load("out.npy")
    assert [tuple(row)[:3] for row in rows.tolist()] == [(126, 94, 10), (66, 48, 11), (2, 2, 12), (0, 56, 14)]
    line = "wrote 4 events to out.npy: x 0 to 126, y 2 to 94, 10 to 14 us; 1 lay outside the image of 128 x 96\n"
    assert capsys.readouterr().err == line
    assert main([events, *flags, "--camera", camera, "--window", "10", "12"]) == 0
    assert "0 lay outside" in capsys.readouterr().err  # of those in the window


def test_convert_text(flags, tmp_path):
    """Whose numbers are read as floats."""
    (tmp_path / "events.txt").write_text("1 30 24 1\n2 62 47 0\n")
    assert main(["events.txt", *flags]) == 0
    assert np.load("out.npy").tolist() == [(66, 48, 1, 1), (2, 2, 2, 0)]


def test_not_of_this_camera(flags, tmp_path, capsys):
    """Events outside the map, events that all miss the image, and a map that seems to be of the other camera."""
    assert main([write((64, 20)), *flags]) == 2
    assert "covers x 64 to 64 and y 20 to 20, the map 64 x 48 pixels; give the map of this" in capsys.readouterr().err
    assert main([write((10, 0), (20, 0)), *flags]) == 2
    assert "events.h5: all 2 events lie outside the image" in capsys.readouterr().err
    (tmp_path / "right").mkdir()
    (tmp_path / "map.h5").rename(tmp_path / "right" / "map.h5")
    flags = [flag.replace("map.h5", "right/map.h5") for flag in flags]
    assert main([write((10, 20)), *flags, "--camera", "right"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([write((10, 20)), *flags]) == 0
    assert "warning: right/map.h5: is it the right camera's? camera is left" in capsys.readouterr().err


@pytest.mark.parametrize("name, content", [("calibration.yaml", b"intrinsics: 3"), ("map.h5", b""), ("map.h5", None)])
def test_refused(flags, tmp_path, capsys, name, content):
    """A file that is broken, empty, or without what it should hold."""
    recording = write((10, 20))
    (tmp_path / name).write_bytes((tmp_path / recording).read_bytes() if content is None else content)
    assert main([recording, *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"convert: error: {name}: cannot be read ("), said


def test_both_or_none(flags, capsys):
    assert main([write((10, 20)), *flags[:4]]) == 2
    assert capsys.readouterr().err == "convert: error: rectify and calibration need each other; give both\n"
