"""The event-camera model of events.py against a loop over every pixel, and its command line."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import events
from events import accumulate, camera, log_intensity, saccade


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
