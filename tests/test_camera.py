"""The event-camera model against a loop over every pixel, and its command line."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import camera as module
from camera import LUMA, CameraOptions, camera, log_intensity, main, movie, saccade
from events import Events, budget_mask, motion, read_events, resize
from vit import Clip


def added_up(recording: Events, height: int, width: int, polarity: str = "count") -> np.ndarray:
    """E_v at the sensor's size."""
    return replace(recording, sensor=(width, height)).accumulate(polarity)


def extent(recording: Events) -> tuple[int, int, int, int]:
    """Smallest and largest x, smallest and largest y."""
    return tuple(int(end) for column in (recording.x, recording.y) for end in (column.min(), column.max()))


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
    made, slow = camera(iter(movie), CameraOptions(C)), slow_camera(movie, C)
    assert len(made) == len(slow)
    assert (np.diff(made.t) >= 0).all()
    rows = sorted(zip(*(column.tolist() for column in (made.x, made.y, made.p, made.t)), strict=True))
    for (x, y, p, t), row in zip(rows, sorted((x, y, p, t) for x, y, t, p in slow), strict=True):
        assert (x, y, p) == row[:3] and abs(t - row[3]) <= 0.5 + 1e-6


@given(movies())
def test_a_pixel_s_events_follow_its_log_intensity_within_the_threshold(movie):
    for shown in range(2, len(movie) + 1):
        total = 0.2 * added_up(camera(movie[:shown]), *movie[0][1].shape[:2], "signed")
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
    assert len(camera([(0, image), (10, image), (20, image)], CameraOptions(spread=0.05, seed=seed))) == 0
    assert len(camera(saccade(np.full((5, 7, 3), image[0, 0])))) == 0


@pytest.mark.parametrize("radius", [0.3, 2.0, 3.5])
def test_the_saccade_carries_a_dot_around_its_place(radius):
    image = np.zeros((25, 31, 3), dtype=np.uint8)
    image[12, 15] = 255
    frames = list(saccade(image, radius, duration=90_000))
    times, shown = np.array([time for time, _ in frames]), np.array([frame for _, frame in frames])
    assert times[0] == 0 and times[-1] == 90_000 and np.allclose(np.diff(times), times[1])
    assert shown.shape == (len(frames), 25, 31) and np.allclose(shown[0], shown[-1])
    rows, columns = np.indices((25, 31))
    mass = shown.sum(axis=(1, 2))
    path = np.stack(((shown * columns).sum(axis=(1, 2)) / mass - 15, (shown * rows).sum(axis=(1, 2)) / mass - 12), 1)
    assert np.allclose(mass, 255) and np.allclose(path.mean(axis=0)[0], 0, atol=1e-9)
    third = (len(frames) - 1) // 3
    corners = path[[0, third, 2 * third]]
    assert np.allclose(np.linalg.norm(corners, axis=1), radius) and np.allclose(corners.sum(axis=0), 0)
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert np.allclose(steps, steps[0]) and 0.2 < steps[0] <= 0.5


def test_a_saccade_of_no_radius_shows_the_image_itself():
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    frames = list(saccade(image, radius=0))
    assert len(frames) >= 2 and all(np.allclose(frame, image @ LUMA) for _, frame in frames)


def test_events_of_a_saccade_lie_at_the_edges():
    image = np.full((40, 40, 3), 30, dtype=np.uint8)
    image[10:30, 10:30] = 200
    E_v = added_up(camera(saccade(image)), 40, 40)
    assert E_v[7:13, 10:30].sum() > 0 and E_v[14:26, 14:26].sum() == 0 and E_v[:6].sum() == 0


def thresholds(rise: float, seed: int) -> np.ndarray:
    """Each pixel's, (60, 60): when its first event comes while its log intensity goes from 0 to `rise` in a second."""
    frames = [(0, np.full((60, 60), 90.0)), (10**6, np.full((60, 60), 90 * math.exp(rise)))]
    made = camera(frames, CameraOptions(spread=0.03, seed=seed))
    first = np.zeros((60, 60))
    first[made.y[::-1], made.x[::-1]] = made.t[::-1] / 10**6  # the earliest is written last
    return first


def test_spread_is_that_of_the_thresholds_for_either_polarity_and_is_seeded():
    on, off = thresholds(1, seed=0), thresholds(-1, seed=0)
    for found in (on, off):
        assert abs(found.mean() - 0.2) < 0.003 and abs(found.std() - 0.03) < 0.003
    assert abs(np.corrcoef(on.ravel(), off.ravel())[0, 1]) < 0.1  # drawn apart
    assert np.array_equal(on, thresholds(1, seed=0)) and not np.array_equal(on, thresholds(1, seed=1))


def test_no_threshold_is_under_a_tenth():
    frames = [(0, np.full((50, 50), 30.0)), (9, np.full((50, 50), 81.0))]
    per_pixel = added_up(camera(frames, CameraOptions(spread=5.0)), 50, 50)
    assert per_pixel.max() == math.floor(math.log(81 / 30) / 0.02)


def test_noise_has_its_rate_and_is_seeded():
    frames = [(0, np.full((40, 60), 99)), (500_000, np.full((40, 60), 99))]
    made, again, other = (camera(frames, CameraOptions(noise=4.0, seed=seed)) for seed in (3, 3, 4))
    expected = 4.0 * 40 * 60 * 0.5
    assert abs(len(made) - expected) < 5 * expected**0.5
    assert np.array_equal(made.t, again.t) and not np.array_equal(made.t[:50], other.t[:50])
    assert set(made.p.tolist()) == {0, 1} and extent(made) == (0, 59, 0, 39)
    assert (np.diff(made.t) >= 0).all() and 0 <= made.t[0] and made.t[-1] <= 500_000


@pytest.mark.parametrize(
    "name, value",
    [("threshold", 0), ("threshold", math.nan), ("threshold", 1e-9), ("spread", -1), ("spread", math.inf),
     ("noise", -1), ("noise", 1e30), ("seed", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} .*: give"):
        CameraOptions(**{name: value})


@pytest.mark.parametrize("fault", [{"threshold": 0.001}, {"noise": 1e6}])
def test_too_many_events_are_refused_before_they_are_made(fault, monkeypatch):
    monkeypatch.setattr(module, "MOST", 1000)
    frames = [(0, np.full((9, 9), 20.0)), (10**6, np.full((9, 9), 30.0))]
    assert len(camera(frames)) == 2 * 81
    with pytest.raises(ValueError, match=r"the most is 1e\+03; raise threshold, lower noise"):
        camera(frames, CameraOptions(**fault))
    with pytest.raises(ValueError, match="the most is"):
        camera([(t, np.full((9, 9), 20.0 + 200 * (t % 2))) for t in range(9)])


def test_no_event_is_later_than_its_frame():
    level = 50 * math.exp(0.2 * (1 - 1.5e-9)), 50 * math.exp(0.2 * (1 - 0.5e-9))
    made = camera([(0, np.full((1, 1), 50.0)), (100, np.full((1, 1), level[0])), (200, np.full((1, 1), level[1]))])
    assert len(made) == 1 and 100 <= made.t[0] <= 200


@pytest.mark.parametrize(
    "movie", [[], [(0, (2, 2))], [(0, (2, 2)), (0, (2, 2))], [(5, (2, 2)), (1, (2, 2))], [(0, (2, 2)), (1, (2, 3))]]
)
def test_frames_that_are_no_movie_are_refused(movie):
    with pytest.raises(ValueError, match="frame"):
        camera([(time, np.zeros(shape)) for time, shape in movie])


@pytest.mark.parametrize("time", [math.nan, math.inf, 1e300])
def test_times_that_no_clock_shows_are_refused(time):
    with pytest.raises(ValueError, match="frame"):
        camera([(0, np.zeros((2, 2))), (time, np.ones((2, 2)))])


def test_a_frame_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="nan events"):
        camera([(0, np.ones((2, 2))), (1, np.full((2, 2), math.nan))])


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
    assert 0 < made.span[0] < made.span[1] <= 40_000 and extent(made) == (10, 25, 10, 19)
    assert np.load("events.npy").dtype.names == ("x", "y", "t", "p")


def test_a_clip_becomes_a_recording(folder, capsys):
    """By a list of times, a folder with times or a rate, or an animated file: as of its frames, named one by one."""
    frames = [Image.open(f"{n}.png") for n in range(3)]
    assert told(capsys, "0.png", "1.png", "2.png", "--fps", "50", "-o", "expected.npy") == (0, ANY)
    Path("times.txt").write_text("0\n20000\n40000\n")
    Path("list.txt").write_text("0.00 0.png\n0.02 1.png\n0.04 2.png\n")
    frames[0].save("a.webp", save_all=True, append_images=frames[1:], duration=20, lossless=True)
    (folder / "frames").mkdir()
    for n in range(3):
        frames[n].save(f"frames/{n}.png")
    for source in (["list.txt"], ["frames", "--times", "times.txt"], ["frames", "--fps", "50"], ["a.webp"]):
        assert told(capsys, *source, "-o", "events.npy") == (0, ANY)
        assert Path("events.npy").read_bytes() == Path("expected.npy").read_bytes()


def test_wide_grey_is_scaled_alike_in_all_frames(folder, capsys):
    for name, most in (("ten", 1000), ("also ten", 900), ("twelve", 3000)):
        Image.fromarray(np.linspace(0, most, 1200).astype(np.uint16).reshape(30, 40)).save(f"{name}.png")
    assert [frame.max() for _, frame in movie(Clip(["ten.png", "also ten.png"], [0, 1]))] == [
        1000 * 255 // 1023,
        900 * 255 // 1023,
    ]
    assert told(capsys, "ten.png", "also ten.png", "-o", "events.npy") == (0, ANY)
    for frames, bits in ((("ten", "twelve"), (12, 10)), (("0", "ten"), (10, 8))):
        status, err = told(capsys, *(f"{name}.png" for name in frames), "-o", "events.npy")
        fault = "{}.png: 40 x 30 pixels of {} bits, the first has 40 x 30 pixels of {} bits"
        assert status == 2 and fault.format(frames[1], *bits) in err and err.count("\n") == 1


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


def test_no_event_at_all_is_told_with_the_remedy(folder, capsys):
    status, err = told(capsys, "0.png", "0.png", "-o", "events.npy")
    assert status == 0 and err.startswith("wrote 0 events") and "lower --threshold" in err
    assert len(read_events("events.npy")) == 0


def test_an_upright_recording_of_a_photograph_on_its_side(folder, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open("2.png").save("turned.png", exif=exif)  # its square: columns 16 to 25, rows 10 to 19
    assert told(capsys, "turned.png", "-o", "events.npy")[0] == 0
    _, right, _, bottom = extent(read_events("events.npy"))
    assert right <= 21 and 24 <= bottom <= 27


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("no.png",), "no.png: cannot be read as an image (there is no such file)"),
        (("0.png", "no.png"), "no.png: cannot be read as an image (there is no such file)"),
        (("0.png", "small.png"), "small.png: 8 x 9 pixels of 8 bits, the first has 40 x 30 pixels of 8 bits"),
        (("0.png", "text.png"), "text.png: cannot be read as an image"),
        (("0.png", "1.png", "--fps", "0"), "fps 0"),
        (("0.png", "1.png", "--fps", "nan"), "fps nan"),
        (("0.png", "--radius", "-1"), "radius -1: give"),
        (("0.png", "--radius", "nan"), "radius nan"),
        (("0.png", "--threshold", "0"), "threshold 0"),
        (("0.png", "--threshold", "1e-30"), "threshold 1e-30: give 0.001 to 10"),
        (("0.png", "--noise", "1e30"), "noise 1e+30: give 0 to 1e+06"),
        (("0.png", "--seed", "-1"), "seed -1: give 0 to"),
        (("0.png", "--fps", "30"), "0.png: a still image; leave times and fps out"),
        (("0.png", "1.png", "--radius", "1"), "radius is for a single image; leave it out"),
        (("moves.gif",), "moves.gif: holds 2 images"),
        (("0.png", "1.png", "--times", "t.txt"), "times is for a folder of frames"),
        ((".", "--fps", "9", "--radius", "1"), "radius is for a single image"),
        ((".",), ".: its frames have no times; give --times FILE, or --fps"),
        (("0.png", "-o", "photo.jpg"), "photo.jpg: it is written as .npy; name it so"),
        (("0.png", "1.png", "--fps", "1e-15"), "fps 1e-15"),
        (("0.png", "-o", "0.png"), "0.png: is one of the inputs"),
        (("0.png", "-o", "no/events.npy"), "no/events.npy: cannot be written there"),
        (("0.png", "--fps", "x"), "invalid float value"),
        ((), "required"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(folder, capsys, arguments, words):
    Image.new("RGB", (8, 9)).save("small.png")
    Path("text.png").write_text("no picture")
    Path("events.npy").write_bytes(b"old")
    Image.new("L", (8, 9)).save("moves.gif", save_all=True, append_images=[Image.new("L", (8, 9), 200)])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, err = told(capsys, "-o", "events.npy", *arguments)
    assert status == 2 and err.startswith("camera: error: ") and err.count("\n") == 1 and words in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_interruption_while_writing_leaves_the_old_file(folder, capsys, monkeypatch):
    Path("events.npy").write_bytes(b"old")

    def stop(file, rows):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", stop)
    assert told(capsys, "0.png", "-o", "events.npy") == (130, "")
    assert Path("events.npy").read_bytes() == b"old" and len(list(folder.iterdir())) == 4


def test_it_keeps_nearly_what_a_real_event_camera_keeps(data):
    """Five frames of slider_depth, against the events recorded between them: the cells that half a budget keeps."""
    folder = data / "recordings/slider_depth"
    times = [1e6 * float(line.split()[0]) for line in (folder / "images.txt").read_text().splitlines()[:5]]
    frames = [np.asarray(Image.open(folder / f"frame_{n:08}.png").convert("RGB")) for n in range(5)]
    made, real = camera(zip(times, frames, strict=True)), read_events(folder / "events_xypt_us.npy")
    for start, end in itertools.pairwise(times):
        shown = (added_up(recording.cut(np.array((start, end)))[0], 180, 240) for recording in (made, real))
        S = [motion(resize(E_v, 168, 224)[None], 28) for E_v in shown]
        both = np.logical_and(*(budget_mask(cells, 0.5) for cells in S))
        assert both.sum() >= 0.8 * budget_mask(S[0], 0.5).sum()
        assert np.corrcoef(S[0].ravel(), S[1].ravel())[0, 1] > 0.85
