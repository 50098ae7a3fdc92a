"""The event-camera model of events.py against a loop over every pixel, and its command line."""

import itertools
import math
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import events
from events import accumulate, camera, log_intensity, main, read_events, saccade


@st.composite
def movies(draw):
    """Two to five frames of up to 4 x 4 pixels, luma or RGB, at growing times in whole microseconds."""
    shape = draw(st.sampled_from([(1, 1), (2, 3), (4, 4), (2, 2, 3)]))
    count = draw(st.integers(2, 5))
    values = draw(hnp.arrays(np.uint8, (count, *shape), elements=st.integers(0, 255)))
    gaps = draw(st.lists(st.integers(1, 10**5), min_size=count, max_size=count))
    return list(zip(np.cumsum(gaps).tolist(), values, strict=True))


def slow_log(pixel) -> float:
    luma = 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2] if np.ndim(pixel) else float(pixel)
    return math.log(luma) if luma > 20 else luma * math.log(20) / 20


def slow_camera(movie, C):
    """One pixel after the other, one crossing after the other: (x, y, t, p), t not rounded."""
    found = []
    height, width = movie[0][1].shape[:2]
    for y in range(height):
        for x in range(width):
            level = slow_log(movie[0][1][y, x])
            for (start, before), (end, after) in itertools.pairwise(movie):
                a, b = slow_log(before[y, x]), slow_log(after[y, x])
                while abs(b - level) >= C * (1 - 1e-9):
                    level += math.copysign(C, b - level)
                    found.append((x, y, start + (level - a) / (b - a) * (end - start), int(b > a)))
    return found


@given(movies(), st.sampled_from([0.2, 0.13, 1.0]))
def test_the_camera_is_the_slow_loop_over_pixels(movie, C):
    made, slow = camera(iter(movie), C), slow_camera(movie, C)
    assert len(made) == len(slow)
    assert (np.diff(made.t) >= 0).all() and made.unit == "us"
    rows = sorted(zip(*(column.tolist() for column in (made.x, made.y, made.p, made.t)), strict=True))
    for (x, y, p, t), row in zip(rows, sorted((x, y, p, t) for x, y, t, p in slow), strict=True):
        assert (x, y, p) == row[:3] and abs(t - row[3]) <= 0.5 + 1e-6


@given(movies())
def test_a_pixel_s_events_follow_its_log_intensity_within_the_threshold(movie):
    for shown in range(2, len(movie) + 1):
        total = 0.2 * accumulate(camera(movie[:shown]), *movie[0][1].shape[:2], "signed")
        rise = log_intensity(movie[shown - 1][1]) - log_intensity(movie[0][1])
        assert (abs(total - rise) < 0.2 + 1e-9).all()


def test_the_response_is_linear_below_and_logarithmic_above():
    luma = np.array([[0, 10, 20, 40, 255]], dtype=np.uint8)
    expected = [0, math.log(20) / 2, math.log(20), math.log(40), math.log(255)]
    assert np.allclose(log_intensity(luma), [expected], rtol=1e-12)
    assert np.allclose(log_intensity(np.repeat(luma[..., None], 3, axis=2)), [expected], rtol=1e-12)


def test_the_worked_example():
    frames = [(0, np.full((1, 1), 50.0)), (100, np.full((1, 1), 50.0 * math.exp(0.5)))]
    made = camera(frames)
    assert made.t.tolist() == [40, 80] and made.p.tolist() == [1, 1]


@given(hnp.arrays(np.uint8, (5, 7, 3)), st.integers(0, 5))
def test_a_constant_scene_gives_no_event(image, seed):
    assert len(camera([(0, image), (10, image), (20, image)], spread=0.05, seed=seed)) == 0
    assert len(camera(saccade(np.full((5, 7, 3), image[0, 0])))) == 0


def test_the_saccade_goes_round_and_comes_back():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    frames = list(saccade(image, radius=2.0, duration=90_000))
    times = np.array([time for time, _ in frames])
    assert times[0] == 0 and times[-1] == 90_000 and (np.diff(times) > 0).all()
    assert np.allclose(frames[0][1], frames[-1][1])
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert np.allclose(frames[0][1][4:, :], luma[2:-2, :]) or np.allclose(frames[0][1][:-4, :], luma[2:-2, :])
    assert all(frame.shape == (20, 30) for _, frame in frames)


def test_a_saccade_of_no_radius_shows_the_image_itself():
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    frames = list(saccade(image, radius=0))
    assert len(frames) >= 2 and all(np.allclose(frame, image @ events.LUMA) for _, frame in frames)


def test_events_of_a_saccade_lie_at_the_edges():
    image = np.full((40, 40, 3), 30, dtype=np.uint8)
    image[10:30, 10:30] = 200
    E_v = accumulate(camera(saccade(image)), 40, 40)
    assert E_v[7:13, 10:30].sum() > 0 and E_v[14:26, 14:26].sum() == 0 and E_v[:6].sum() == 0


def test_spread_changes_thresholds_pixel_by_pixel_and_is_seeded():
    frames = [(0, np.full((50, 50), 30.0)), (1000, np.full((50, 50), 200.0))]
    per_pixel = [accumulate(camera(frames, spread=spread, seed=seed), 50, 50) for spread, seed in
                 ((0, 0), (0.03, 0), (0.03, 0), (0.03, 1))]  # fmt: skip
    assert np.ptp(per_pixel[0]) == 0 < np.ptp(per_pixel[1])
    assert np.array_equal(per_pixel[1], per_pixel[2]) and not np.array_equal(per_pixel[1], per_pixel[3])
    assert abs(per_pixel[1].mean() / per_pixel[0].mean() - 1) < 0.1


def test_noise_has_its_rate_and_is_seeded():
    frames = [(0, np.full((40, 60), 99)), (500_000, np.full((40, 60), 99))]
    made, again, other = (camera(frames, noise=4.0, seed=seed) for seed in (3, 3, 4))
    expected = 4.0 * 40 * 60 * 0.5
    assert abs(len(made) - expected) < 5 * expected**0.5
    assert np.array_equal(made.t, again.t) and not np.array_equal(made.t[:50], other.t[:50])
    assert set(made.p.tolist()) == {0, 1} and made.extent == (0, 59, 0, 39)
    assert (np.diff(made.t) >= 0).all() and 0 <= made.t[0] and made.t[-1] <= 500_000


@pytest.mark.parametrize("fault", [{"C": 0}, {"C": math.nan}, {"C": math.inf}, {"spread": -1}, {"noise": -1}])
def test_settings_out_of_range_are_refused(fault):
    with pytest.raises(ValueError, match="threshold"):
        camera([(0, np.zeros((2, 2))), (1, np.zeros((2, 2)))], **fault)


@pytest.mark.parametrize(
    "movie", [[], [(0, (2, 2))], [(0, (2, 2)), (0, (2, 2))], [(5, (2, 2)), (1, (2, 2))], [(0, (2, 2)), (1, (2, 3))]]
)
def test_frames_that_are_no_movie_are_refused(movie):
    with pytest.raises(ValueError, match="frame"):
        camera([(time, np.zeros(shape)) for time, shape in movie])


# The command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three frames of a square that moves, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        image = np.full((30, 40, 3), 40, dtype=np.uint8)
        image[10:20, 10 + 3 * number : 20 + 3 * number] = 220
        Image.fromarray(image).save(f"{number}.png")
    return tmp_path


def told(capsys, *arguments) -> tuple[int, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert out == ""
    return status, err


def test_a_movie_becomes_a_recording(folder, capsys):
    assert told(capsys, "0.png", "1.png", "2.png", "--fps", "50", "-o", "events.npy") == (0, ANY)
    made = read_events("events.npy")
    expected = camera((20_000 * n, np.asarray(Image.open(f"{n}.png"))) for n in range(3))
    assert all(np.array_equal(getattr(made, c), getattr(expected, c)) for c in "xytp") and len(made) > 100
    assert 0 < made.span()[0] < made.span()[1] <= 40_000 and made.extent == (10, 25, 10, 19)
    assert np.load("events.npy").dtype.names == ("x", "y", "t", "p")


def test_a_still_image_becomes_a_recording(folder, capsys):
    status, err = told(capsys, "0.png", "-o", "events.npy")
    assert status == 0 and err == f"wrote {len(read_events('events.npy'))} events to events.npy\n"
    expected = camera(saccade(np.asarray(Image.open("0.png"))))
    assert np.array_equal(np.load("events.npy")["t"], expected.t)


def test_options_reach_the_camera(folder, capsys):
    sizes = {}
    for options in ("", "--threshold 0.4", "--spread 0.1", "--noise 50", "--noise 50 --seed 1", "--radius 4"):
        assert told(capsys, "0.png", "-o", "events.npy", *options.split())[0] == 0
        sizes[options] = Path("events.npy").read_bytes()
    assert len(set(sizes.values())) == 6 and len(sizes["--threshold 0.4"]) < len(sizes[""]) < len(sizes["--noise 50"])


def test_an_upright_recording_of_a_photograph_on_its_side(folder, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open("2.png").save("turned.png", exif=exif)  # its square: columns 16 to 25, rows 10 to 19
    assert told(capsys, "turned.png", "-o", "events.npy")[0] == 0
    extent = read_events("events.npy").extent
    assert extent[1] <= 21 and 24 <= extent[3] <= 27


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("no.png",), "no.png: no such file"),
        (("0.png", "no.png"), "no.png: no such file"),
        (("0.png", "small.png"), "small.png: 8 x 9 pixels, but 40 x 30 in 0.png"),
        (("0.png", "text.png"), "text.png: not an image"),
        (("0.png", "1.png", "--fps", "0"), "--fps 0"),
        (("0.png", "1.png", "--fps", "nan"), "--fps nan"),
        (("0.png", "--radius", "-1"), "radius -1"),
        (("0.png", "--radius", "nan"), "radius nan"),
        (("0.png", "--threshold", "0"), "threshold 0"),
        (("0.png", "--noise", "1e30"), "lam value too large"),
        (("0.png", "--seed", "-1"), "non-negative"),
        (("0.png", "-o", "0.png"), "0.png: is one of the images"),
        (("0.png", "-o", "no/events.npy"), "no/"),
        (("0.png", "--fps", "x"), "invalid float value"),
        ((), "required"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, arguments, words):
    Image.new("RGB", (8, 9)).save("small.png")
    Path("text.png").write_text("no picture")
    Path("events.npy").write_bytes(b"old")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, err = told(capsys, "-o", "events.npy", *arguments)
    assert status == 2 and err.startswith("events: error: ") and err.count("\n") == 1 and words in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interruption_while_writing_leaves_the_old_file(folder, capsys, monkeypatch):
    Path("events.npy").write_bytes(b"old")

    def stop(file, rows):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", stop)
    assert told(capsys, "0.png", "-o", "events.npy") == (130, "")
    assert Path("events.npy").read_bytes() == b"old" and len(list(folder.iterdir())) == 4
