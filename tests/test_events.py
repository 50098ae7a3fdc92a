"""Events to mask: the readers, accumulation, area-weighted resizing, Eq. 5 and Eq. 6."""

import io
import math
import pickle
import shlex
import subprocess
import sys
import warnings
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from events import Events, accumulate, budget_mask, event_map, literal_mask, motion, read_events, resize, spread_order
from strategies import SPARSITIES, XYTP, motions, recordings, untied_motions


def stream(*rows, dtype=XYTP):
    return np.array(list(rows), dtype=dtype)


def columns(events: Events) -> list:
    return [np.asarray(c).tolist() for c in (events.x, events.y, events.t, events.p)]


def slow_count(rows, width, height, signed=False):
    """E_v by a loop."""
    E_v = [[0] * width for _ in range(height)]
    for x, y, _, p in rows.tolist():
        E_v[y][x] += (1 if p > 0 else -1) if signed else 1
    return np.array(E_v)


def slow_resize(E_v, height, width):
    """Every old pixel's share of every new pixel, as fractions: the overlap of their intervals on each axis."""

    def overlap(a, b, source, target):
        return max(
            Fraction(0),
            min(Fraction(a + 1, source), Fraction(b + 1, target)) - max(Fraction(a, source), Fraction(b, target)),
        )

    rows, cols = E_v.shape
    out = [[Fraction(0)] * width for _ in range(height)]
    for (r, c), value in np.ndenumerate(E_v):
        for u in range(height):
            for v in range(width):
                out[u][v] += int(value) * overlap(r, u, rows, height) * rows * overlap(c, v, cols, width) * cols
    return out


# Readers


ROWS = stream((3, 1, 0, 0), (5, 2, 40, 1), (3, 0, 90, 1), (0, 2, 250, 0))
EXPECTED = [[3, 5, 3, 0], [1, 2, 0, 2], [0, 40, 90, 250], [0, 1, 1, 0]]


@pytest.mark.parametrize(
    "names", ["x y t p", "t x y p", "p t y x", "x_pos y_pos timestamp polarity", "X Y ts pol", "ts x_pos y_pos pol"]
)
def test_structured_arrays_in_any_field_order(tmp_path, names):
    kinds = {"x": "<u2", "y": "<u2", "t": "<i8", "p": "<i2"}
    fields = {name: next(k for k in ("x", "y", "p", "t") if name.lower().startswith(k)) for name in names.split()}
    rows = np.empty(len(ROWS), dtype=[(name, kinds[k]) for name, k in fields.items()])
    for name, k in fields.items():
        rows[name] = ROWS[k]
    np.save(tmp_path / "e.npy", rows)
    assert columns(read_events(tmp_path / "e.npy")) == EXPECTED
    assert columns(read_events(rows)) == EXPECTED


@pytest.mark.parametrize("order", ["xytp", "txyp", "xypt", "tpxy", "pxyt"])
@pytest.mark.parametrize("dtype", ["<i8", ">f8", "<u4"])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_bare_columns_are_found(tmp_path, order, dtype, layout):
    bare = np.array(np.stack([ROWS[c] for c in order], axis=1).astype(dtype), order=layout)
    np.save(tmp_path / "e.npy", bare)
    assert columns(read_events(tmp_path / "e.npy")) == EXPECTED
    assert columns(read_events(bare, order=order)) == EXPECTED


@pytest.mark.parametrize(
    "why, bare",
    {
        "unsorted time": [[1, 1, 50, 0], [2, 5, 20, 1], [1, 3, 90, 1], [4, 0, 10, 0]],
        "reversed time": [[1, 1, 90, 0], [2, 5, 20, 1], [1, 3, 10, 1], [4, 0, 5, 0]],
        "all times equal": [[1, 1, 7, 0], [2, 5, 7, 1], [1, 3, 7, 1], [4, 0, 7, 0]],
        "two sorted columns of one range": [[1, 1, 1, 0], [2, 5, 2, 1], [3, 3, 3, 1]],
        "sorted x wider than seconds": [[1, 1, 0.1, 0], [2, 5, 0.2, 1], [30, 3, 0.25, 1]],
        "two columns like polarity": [[0, 3, 10, 0], [1, 5, 20, 1], [0, 4, 30, 1]],
        "one event": [[1, 1, 7, 0]],
        "pixels read row by row": [[3, 60, 0, 1], [1, 61, 5, 0], [2, 119, 19, 1]],
        "x may be time": [[10, 20, 100, 1], [200, 30, 150, 1]],
        "few rows, x sorted, time not": [[1, 5, 30, 1], [2, 3, 10, 0], [3, 4, 20, 1]],
        "rows sorted by y": [[n % 7, n // 7, (n * 37) % 150, n % 2] for n in range(100)],
        "times equal, y sorted": [[3, 1, 5, 1], [1, 2, 5, 0], [2, 30, 5, 1]],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_uncertain_columns_ask_for_the_order(why, bare):
    with pytest.raises(ValueError, match="--order"):
        read_events(np.array(bare))
    assert columns(read_events(np.array(bare), order="xytp", time_unit="us"))[2] == [row[2] for row in bare]


@pytest.mark.parametrize("x", [[1.5, 2.5], [2.5, 1.5], np.arange(20) + 0.5])
def test_fractions_of_a_pixel_are_never_taken_for_times(x):
    rows = np.stack((x, [3.25] * len(x), 100 * np.arange(len(x)), np.arange(len(x)) % 2), axis=1)
    with pytest.raises(ValueError, match=r"--order|fractions of a pixel"):
        read_events(rows)
    with pytest.raises(ValueError, match="fractions of a pixel"):
        read_events(rows, order="xytp")


def test_without_polarities_the_order_is_no_help():
    with pytest.raises(ValueError, match="no column holds polarities alone; store them as 0 and 1"):
        read_events(np.array([[1, 9, 100, 1], [2, 7, 200, 2], [3, 1, 300, 1]]))


@pytest.mark.parametrize("order", ["xyt", "xytt", "tpqy", ""])
def test_an_order_is_the_four_letters(order):
    with pytest.raises(ValueError, match="once each"):
        read_events(np.zeros((3, 4)), order=order)


def test_time_may_be_seconds_and_x_may_happen_to_be_sorted():
    seconds = np.array([[5, 9, 0.1, 0], [3, 7, 0.15, 1], [8, 1, 0.3, 1]])
    assert columns(read_events(seconds, time_unit="s"))[2] == [0.1, 0.15, 0.3]
    counter = np.array([[(n * 37) % 200, (n * 11) % 100, n, n % 2] for n in range(50)])  # a time of small range
    assert columns(read_events(counter))[2] == list(range(50))
    assert columns(read_events(np.array([[1, 9, 100, 0], [2, 7, 200, 1], [3, 1, 300, 1]])))[2] == [100, 200, 300]


def test_an_order_is_not_for_maps():
    with pytest.raises(ValueError, match="neither N x 4 events nor a map"):
        read_events(np.ones((50, 5)), order="txyp")


@pytest.mark.parametrize("shape", [(4, 500), (500, 3), (500, 5), (1, 100)])
def test_arrays_of_no_image_s_shape_are_not_taken_for_maps(shape):
    with pytest.raises(ValueError, match="neither N x 4 events nor a map"):
        read_events(np.ones(shape))


def test_n_imagenet_and_plain_npz(tmp_path):
    np.savez_compressed(tmp_path / "n.npz", event_data=ROWS, label=np.int64(3))
    assert columns(read_events(tmp_path / "n.npz")) == EXPECTED
    np.savez(tmp_path / "c.npz", polarity=ROWS["p"], x=ROWS["x"], y=ROWS["y"], timestamp=ROWS["t"])
    assert columns(read_events(tmp_path / "c.npz")) == EXPECTED
    np.savez(tmp_path / "m.npz", meta=np.array([None]), **{c: ROWS[c] for c in "xytp"})  # an object no one needs
    assert columns(read_events(tmp_path / "m.npz")) == EXPECTED
    np.savez(tmp_path / "one.npz", ROWS)
    assert columns(read_events(tmp_path / "one.npz")) == EXPECTED


def test_an_accumulated_map_is_taken_as_it_is(tmp_path):
    E_v = np.arange(12.0).reshape(2, 6) - 3
    np.save(tmp_path / "map.npy", E_v)
    assert np.array_equal(read_events(tmp_path / "map.npy"), E_v)


@pytest.mark.parametrize("p", [[0, 1, 1, 0], [-1, 1, 1, -1], [False, True, True, False], [0.0, 1.0, 1.0, 0.0]])
def test_polarities_mean_the_same_however_stored(p):
    events = Events("e", ROWS["x"], ROWS["y"], ROWS["t"], np.array(p), "us")
    assert np.array_equal(accumulate(events, 3, 6, "signed"), slow_count(ROWS, 6, 3, signed=True))


@pytest.mark.parametrize(
    "message, rows",
    [
        ("polarities from 0 to 3", stream((0, 0, 0, 3), (0, 0, 1, 0))),
        ("polarities from -1 to 1", stream((0, 0, 0, -1), (0, 0, 1, 0), (0, 0, 2, 1))),
        ("t holds NaN", stream((0, 0, math.nan, 0), dtype=[("x", int), ("y", int), ("t", float), ("p", int)])),
        ("t holds NaN or inf", stream((0, 0, math.inf, 0), dtype=[("x", int), ("y", int), ("t", float), ("p", int)])),
        ("x holds fractions", stream((0.5, 0, 1, 0), dtype=[("x", float), ("y", int), ("t", int), ("p", int)])),
        ("t is of type", stream((0, 0, "now", 0), dtype=[("x", int), ("y", int), ("t", "U5"), ("p", int)])),
        (
            "2 columns for t among x, y, t, ts, p",
            stream((0, 0, 0, 0, 0), dtype=[(k, int) for k in ("x", "y", "t", "ts", "p")]),
        ),
        ("no columns for t among x, y, p", stream((0, 0, 0), dtype=[("x", int), ("y", int), ("p", int)])),
    ],
)
def test_what_no_sensor_writes_is_refused(message, rows):
    with pytest.raises(ValueError, match=message):
        read_events(rows)


@pytest.mark.parametrize(
    "bad", [np.array([]), np.array(3), np.zeros((2, 3, 5)), np.array([["a", "b"]]), np.full((5, 5), math.nan)]
)
def test_what_is_neither_events_nor_a_map_is_refused(bad):
    with pytest.raises(ValueError, match="the events: "):
        read_events(bad)


@pytest.mark.parametrize("kind", ["dict", "raw", "structured"])
def test_pickles_are_refused_with_the_line_that_converts_them(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "raw":
        Path("dict.npy").write_bytes(pickle.dumps({"x": ROWS["x"], "y": ROWS["y"], "ts": ROWS["t"], "pol": ROWS["p"]}))
    elif kind == "structured":
        np.save("dict.npy", ROWS.astype([(name, object) for name in "xytp"]))
    else:
        np.save("dict.npy", {name: list(ROWS[name]) for name in "xytp"})
    with pytest.raises(ValueError, match=r"never loaded; .*python -c") as refusal:
        read_events("dict.npy")
    command = shlex.split(str(refusal.value).split("convert it: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert columns(read_events("dict-plain.npz")) == EXPECTED


def test_no_pickle_is_ever_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Trap()))
    np.save(tmp_path / "array.npy", np.array([Trap()], dtype=object))
    np.savez(tmp_path / "zip.npz", event_data=np.array([Trap()], dtype=object))
    for name in ("raw.npy", "array.npy", "zip.npz"):
        with pytest.raises(ValueError, match="never loaded"):
            read_events(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUM", b"1 2 3 4\n", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00v\x00{'descr': "]
)
def test_broken_files_are_named(tmp_path, content):
    (tmp_path / "e.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"e\.npy: cannot be read as events"):
        read_events(tmp_path / "e.npy")


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_damaged_files_are_read_or_named(tmp_path, save):
    """300 files with a few bytes changed: each is read, or refused with its name; nothing else comes out."""
    rng, path = np.random.default_rng(0), tmp_path / ("e.npy" if save is np.save else "e.npz")
    save(path, ROWS)
    whole, refused = np.frombuffer(path.read_bytes(), np.uint8), 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_events(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize("source", [[[1, 2, 3, 4]], {"x": [1]}, 5])
def test_sources_of_another_type_are_refused(source):
    with pytest.raises(ValueError, match="give a path, a numpy array, or none"):
        read_events(source)


def test_a_truncated_recording_is_named(tmp_path):
    np.save(tmp_path / "e.npy", ROWS)
    whole = (tmp_path / "e.npy").read_bytes()
    (tmp_path / "e.npy").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"e\.npy"):
        read_events(tmp_path / "e.npy")


# Time


UNITS = {"s": 10**6, "ms": 10**3, "us": 1, "ns": Fraction(1, 1000)}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["f8", "i8"])
def test_windows_are_microseconds_whatever_the_file_stores(unit, kind):
    us = np.array([0, 1_000_000, 2_000_000, 67_000_000, 67_000_001])
    stored = np.array([float(Fraction(int(v)) / UNITS[unit]) for v in us])
    stored = stored if kind == "f8" else np.round(stored).astype("i8")
    rows = np.zeros(5, dtype=[("x", int), ("y", int), ("t", kind), ("p", int)])
    rows["t"], rows["x"] = stored, np.arange(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the unit is told: no warning
        events = read_events(rows, time_unit=unit)
    assert events.within(1_000_000, 67_000_000).x.tolist()[:3] == [1, 2, 3]
    if kind == "f8" or unit in ("us", "ns"):
        assert events.within(1_000_000, 67_000_000).x.tolist() == [1, 2, 3]
        assert events.within(67_000_001, 67_000_001).x.tolist() == [4]
        assert events.span() == pytest.approx((0, 67_000_001))


@given(recordings(min_size=1), st.integers(-10, 10**6), st.integers(0, 10**6))
def test_a_window_holds_both_its_ends(recording, start, length):
    rows, _ = recording
    inside = [row for row in rows.tolist() if start <= row[2] <= start + length]
    if inside:
        assert columns(read_events(rows).within(start, start + length)) == [list(c) for c in zip(*inside, strict=True)]
    else:
        with pytest.raises(ValueError, match=f"goes from {rows['t'].min()} to {rows['t'].max()} us"):
            read_events(rows).within(start, start + length)
    whole = read_events(rows)
    assert len(whole.within(*whole.span())) == len(rows)  # the last timestamp is not lost


def test_large_clocks_stay_exact():
    """Nanoseconds since 1970 exceed what float64 holds exactly."""
    t = 1_700_000_000_000_000_000 + np.array([0, 999, 1000, 1001])
    events = Events("e", np.arange(4), np.zeros(4, int), t, np.zeros(4, int), "ns")
    assert events.within(1_700_000_000_000_000, 1_700_000_000_000_001).x.tolist() == [0, 1, 2]


def test_reversed_and_equal_times_lose_nothing():
    for times in ([9, 5, 2, 2], [4, 4, 4, 4]):
        rows = ROWS.copy()
        rows["t"] = times
        assert len(read_events(rows).within(2, 9)) == 4
        assert np.array_equal(accumulate(read_events(rows), 3, 6), slow_count(ROWS, 6, 3))


@pytest.mark.parametrize("window", [(5, 4), (math.nan, 4), (0, math.inf)])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(ValueError, match="the start must not lie after the end"):
        read_events(ROWS).within(*window)


def test_fractions_in_a_short_range_warn_and_name_the_option():
    rows = stream((0, 0, 0.25, 0), (0, 0, 0.5, 0), dtype=[("x", int), ("y", int), ("t", float), ("p", int)])
    with pytest.warns(UserWarning, match="--time-unit"):
        events = read_events(rows)
    assert events.span() == (0.25, 0.5)  # and no guess is made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_events(rows, time_unit="us")
        rows["t"] *= 1e8
        read_events(rows)


# Corners of the readers


def test_window_edges_between_whole_times():
    rows = np.array([(0, 0, 10, 0), (1, 0, 20, 0), (2, 0, 30, 0)], dtype=XYTP)
    assert read_events(rows, time_unit="ms").within(10_001, 29_999).x.tolist() == [1]


def test_window_from_minus_infinity():
    with pytest.raises(ValueError, match="window -inf"):
        read_events(np.zeros(2, XYTP)).within(-np.inf, 5)


def test_a_window_of_an_empty_recording_is_empty():
    assert len(read_events(np.zeros(0, XYTP)).within(0, 5)) == 0


def test_a_time_unit_that_is_none():
    with pytest.raises(ValueError, match="time unit 'min': give one of s, ms, us, ns"):
        read_events(np.zeros(2, XYTP), time_unit="min")


def test_columns_in_a_folder(tmp_path):
    np.savez(tmp_path / "e.npz", **{f"events/{name}": ROWS[name] for name in "xytp"}, ms_to_idx=np.arange(9))
    assert columns(read_events(tmp_path / "e.npz")) == EXPECTED
    np.savez(tmp_path / "e.npz", **{name: ROWS[name] for name in "xytp"}, **{"gt/x": np.arange(9)})
    assert columns(read_events(tmp_path / "e.npz")) == EXPECTED


@pytest.mark.parametrize("name, content", [("e.h5", b"\x89HDF\r\n\x1a\n"), ("e.csv", b"t,x,y,p\n1,2,3,1\n")])
def test_other_formats_are_told_where_they_are_converted(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"README\.md tells how to convert text, CSV and HDF5$"):
        read_events(tmp_path / name)


def test_a_stack_of_maps_is_told_how_to_become_one():
    with pytest.raises(ValueError, match=r"np\.abs\(stack\)\.sum\(axis=0\)"):
        read_events(np.zeros((5, 30, 40)))


def test_columns_of_n_x_1_and_every_alias(tmp_path):
    column = np.arange(3)[:, None]
    for names in (("xs", "ys", "timestamps", "ps"), ("x", "y", "time", "polarities"), ("x_pos", "y_pos", "ts", "pol")):
        np.savez(tmp_path / "e.npz", **dict(zip(names, (column, column, column, column % 2), strict=True)))
        read = read_events(tmp_path / "e.npz")
        assert read.t.tolist() == [0, 1, 2] and read.p.tolist() == [0, 1, 0]


def test_a_bool_map():
    assert read_events(np.eye(5, dtype=bool)).dtype == bool


def test_damaged_archives_are_named(tmp_path):
    np.savez_compressed(tmp_path / "z.npz", event_data=np.random.default_rng(0).integers(0, 9, (999, 4)))
    data = bytearray((tmp_path / "z.npz").read_bytes())
    data[100:140] = b"\xff" * 40
    (tmp_path / "z.npz").write_bytes(data)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("event_data.npy", header.getvalue())
    for name in ("z.npz", "m.npz"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as events"):
            read_events(tmp_path / name)


def test_times_may_repeat_when_columns_are_found():
    bare = np.array([[9, 1, 10, 0], [2, 5, 10, 1], [1, 3, 90, 1], [4, 0, 90, 0]])
    assert read_events(bare).t.tolist() == [10, 10, 90, 90]


def _rows(**columns):
    return {name: np.asarray(columns.get(name, [0, 1])) for name in "xytp"}


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"x": [0, 1, 2]}, "3 values of x but 2 of t"),
        ({"y": [0.5, 1]}, "y holds fractions"),
        ({"p": [-2, 1]}, "polarities from -2"),
        ({"p": [0.5, 1]}, "polarities from 0.5"),
    ],
)
def test_more_that_no_sensor_writes(tmp_path, columns, message):
    np.savez(tmp_path / "e.npz", **_rows(**columns))
    with pytest.raises(ValueError, match=message):
        read_events(tmp_path / "e.npz")


def test_an_empty_map():
    with pytest.raises(ValueError, match="neither N x 4 events nor a map"):
        read_events(np.zeros((0, 5)))


def test_fractions_over_a_long_range_do_not_warn(tmp_path):
    np.savez(tmp_path / "e.npz", **_rows(t=[0.25, 2e6]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_events(tmp_path / "e.npz")


def test_events_outside_the_sensor_count_outside_the_window_too():
    rows = np.array([(0, 0, 0, 0), (99, 0, 50, 0)], dtype=XYTP)
    with pytest.raises(ValueError, match="--sensor"):
        event_map(read_events(rows), (9, 9), None, (0, 10))


def test_exchanged_coordinates_are_told_apart_from_a_wrong_size():
    rows = np.array([(9, 20, 0, 0), (3, 39, 50, 0)], dtype=XYTP)
    with pytest.raises(ValueError, match="--sensor WxH, or exchange x and y"):
        event_map(read_events(rows), None, (40, 30), None)
    with pytest.raises(ValueError, match=r"--sensor WxH$"):
        event_map(read_events(rows), None, (20, 30), None)


@pytest.mark.parametrize("sensor, warned", [((40, 30), 0), ((42, 30), 0), ((60, 45), 0), ((30, 40), 1), ((80, 20), 1)])
def test_another_shape_than_the_image_s_warns(sensor, warned):
    rows = read_events(np.array([(29, 19, 0, 0)], dtype=XYTP))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        event_map(rows, sensor, (40, 30), None)
    assert len(caught) == warned and all("must show the same" in str(warning.message) for warning in caught)


def test_small_dtypes_of_a_map_do_not_overflow():
    assert resize(np.full((2, 2), 200, np.uint8), 3, 3).tolist() == [[1800.0 / 9 * 4] * 3] * 3


def test_a_recording_is_mapped_not_read(tmp_path):
    np.save(tmp_path / "e.npy", np.zeros(3, XYTP))
    base = read_events(tmp_path / "e.npy").x
    while not isinstance(base, np.memmap) and base.base is not None:
        base = base.base
    assert isinstance(base, np.memmap) or "mmap" in type(base).__name__


def test_the_budget_is_not_off_by_rounding():
    S = np.arange(11.0).reshape(1, 11)  # 0.7 * 10 is 7, but (1 - (1 - 0.7)) * 10 is not
    for sparsity in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
        assert budget_mask(S, 1 - sparsity).sum() == literal_mask(S, 1 - sparsity).sum() == 11 - round(sparsity * 10)


# Accumulation


@given(recordings(), st.booleans())
def test_accumulation_is_the_loop(recording, signed):
    rows, (width, height) = recording
    E_v = accumulate(read_events(rows), height, width, "signed" if signed else "count")
    assert E_v.dtype == np.int64
    assert np.array_equal(E_v, slow_count(rows, width, height, signed))
    if not signed:
        assert E_v.sum() == len(rows)


@given(recordings(min_size=2), st.randoms(use_true_random=False))
def test_event_order_does_not_matter_and_nothing_is_written_to(recording, random):
    rows, (width, height) = recording
    shuffled = rows[random.sample(range(len(rows)), len(rows))]
    before = shuffled.copy()
    shuffled.flags.writeable = False
    assert np.array_equal(
        accumulate(read_events(shuffled), height, width), accumulate(read_events(rows), height, width)
    )
    assert np.array_equal(shuffled, before)


@pytest.mark.parametrize("polarity", ["count", "signed"])
def test_many_events_are_added_up_in_pieces(polarity):
    """600,000 events on 3 x 6 pixels: more than one piece."""
    rng, rows = np.random.default_rng(0), np.zeros(600_000, XYTP)
    rows["x"], rows["y"], rows["p"] = (
        rng.integers(0, 6, 600_000),
        rng.integers(0, 3, 600_000),
        rng.integers(0, 2, 600_000),
    )
    expected = np.zeros((3, 6), dtype=np.int64)
    np.add.at(expected, (rows["y"], rows["x"]), 1 if polarity == "count" else 2 * rows["p"] - 1)
    assert np.array_equal(accumulate(read_events(rows), 3, 6, polarity), expected)


def test_counts_do_not_overflow():
    """40,000 events on one pixel are more than int16 holds; with uint8 coordinates y * width would wrap at 256."""
    rows = np.zeros(40_000, dtype=[("x", "u1"), ("y", "u1"), ("t", "i8"), ("p", "?")])
    rows["x"], rows["y"] = 200, 150
    E_v = accumulate(read_events(rows), 180, 240)
    assert E_v[150, 200] == 40_000 == E_v.sum()
    assert accumulate(read_events(rows), 180, 240, "signed")[150, 200] == -40_000


@pytest.mark.parametrize("place", [(-1, 0), (0, -1), (6, 0), (0, 3)])
def test_events_outside_the_sensor_are_an_error_that_tells_their_extent(place):
    rows = np.array([(0, 0, 0, 0), (*place, 1, 0)], dtype=[("x", int), ("y", int), ("t", int), ("p", int)])
    x, y = sorted((0, place[0])), sorted((0, place[1]))
    remedy = "drop those below 0" if min(place) < 0 else "--sensor"
    with pytest.raises(ValueError, match=f"x {x[0]} to {x[1]} and y {y[0]} to {y[1]}.*6 x 3.*{remedy}"):
        accumulate(read_events(rows), 3, 6)


# Resizing


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(-5, 10**6)),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_resizing_is_weighted_by_area_and_exact(E_v, height, width):
    resized = resize(E_v, height, width)
    unit = height * width
    assert resized.tolist() == [[float(value * unit) for value in row] for row in slow_resize(E_v, height, width)]
    assert resized.sum() == E_v.sum() * unit  # no event is lost or counted twice


def test_resize_example():
    assert resize(np.array([[3, 1]]), 1, 3).tolist() == [[6, 4, 2]]


def test_no_event_is_skipped_when_shrinking():
    """One event on each pixel in turn of a 50 x 70 sensor always leaves its whole mass on 3 x 4 pixels."""
    for y, x in np.ndindex(50, 70):
        E_v = np.zeros((50, 70), dtype=np.int64)
        E_v[y, x] = 1
        assert resize(E_v, 3, 4).sum() == 12


# Eq. 5 and 6


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.integers(-9, 9)),
    st.integers(1, 3),
)
def test_eq5_is_the_l1_norm_of_each_cell(cells, cell):
    E_v = np.kron(cells, np.ones((cell, cell)))
    assert np.array_equal(motion(E_v, cell), np.abs(cells) * cell * cell)
    E_v[0, 0] -= 100
    assert motion(E_v, cell)[0, 0] == abs(cells[0, 0] - 100) + abs(cells[0, 0]) * (cell * cell - 1)


@given(recordings(min_size=1), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_moved_event_changes_only_the_cells_it_left_and_entered(recording, cells_h, cells_w, data):
    rows, (width, height) = recording
    moved = rows.copy()
    n = data.draw(st.integers(0, len(rows) - 1))
    moved["x"][n], moved["y"][n] = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    S, S_moved = (
        motion(resize(accumulate(read_events(r), height, width), 28 * cells_h, 28 * cells_w), 28) for r in (rows, moved)
    )
    touched = np.zeros((cells_h, cells_w), dtype=bool)
    for row in (rows[n], moved[n]):  # the cells a pixel overlaps, its area being stretched over them
        u = slice(int(row["y"]) * cells_h // height, -(-(int(row["y"]) + 1) * cells_h // height))
        v = slice(int(row["x"]) * cells_w // width, -(-(int(row["x"]) + 1) * cells_w // width))
        touched[u, v] = True
    assert np.array_equal(S[~touched], S_moved[~touched])
    assert S.sum() == S_moved.sum()


@given(untied_motions(), SPARSITIES)
def test_without_ties_both_masks_are_eq6(S, sparsity):
    exact, literal = budget_mask(S, 1 - sparsity), literal_mask(S, 1 - sparsity)
    assert np.array_equal(exact, literal)
    place = Fraction(round(sparsity * (S.size - 1), 9))  # Eq. 6 by hand: the interpolated quantile, in fractions
    ordered = sorted(Fraction(int(v)) for v in S.ravel())
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    quantile = low + (place - math.floor(place)) * (high - low)
    assert exact.tolist() == [[Fraction(int(v)) >= quantile for v in row] for row in S]


@given(motions(), SPARSITIES)
def test_the_exact_mask_keeps_the_budget_and_the_most_motion(S, sparsity):
    mask = budget_mask(S, 1 - sparsity)
    assert mask.sum() == S.size - math.ceil(round(sparsity * (S.size - 1), 9)) >= 1
    if not mask.all():
        assert S[mask].min() >= S[~mask].max()


@given(motions(), SPARSITIES)
def test_the_literal_mask_keeps_all_ties(S, sparsity):
    mask = literal_mask(S, 1 - sparsity)
    assert (mask & budget_mask(S, 1 - sparsity)).sum() == budget_mask(S, 1 - sparsity).sum()
    if not mask.all():
        assert S[mask].min() > S[~mask].max()
    if (S == 0).mean() > sparsity + 1 / S.size:
        assert mask.all()  # what the exact budget is for


@given(motions(), SPARSITIES, SPARSITIES)
def test_more_sparsity_keeps_a_subset(S, one, other):
    less, more = sorted((one, other))
    for rule in (budget_mask, literal_mask):
        assert not (rule(S, 1 - more) & ~rule(S, 1 - less)).any()


@given(motions(), SPARSITIES, st.integers(1, 1000))
def test_a_common_scale_changes_no_mask(S, sparsity, scale):
    assert np.array_equal(budget_mask(S, 1 - sparsity), budget_mask(S * scale, 1 - sparsity))


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 1))
def test_ties_are_broken_evenly(cells_h, cells_w, tau):
    """Of an empty map, any part of the grid keeps about its share: within the grain of a 4 x 4 Bayer matrix."""
    assert sorted(spread_order(cells_h, cells_w).ravel()) == sorted(set(spread_order(cells_h, cells_w).ravel()))
    mask = budget_mask(np.zeros((cells_h, cells_w)), tau)
    assume(cells_h >= 8 and cells_w >= 8)
    for u in (0, cells_h - cells_h // 8 * 4):
        for v in (0, cells_w - cells_w // 8 * 4):
            part = mask[u : u + cells_h // 8 * 4, v : v + cells_w // 8 * 4]
            assert abs(part.mean() - mask.mean()) <= 0.25


def test_spread_order_example():
    assert spread_order(2, 2).tolist() == [[0, 2], [3, 1]]


def test_the_real_recording(data):
    """6,957 events lie in the 20 ms around frame 2, counted here from the text file the array was made of."""
    folder = data / "recordings" / "slider_depth"
    events = read_events(folder / "events_xypt_us.npy")
    text = np.loadtxt(folder / "events_chunk.txt")
    chosen = text[(text[:, 0] >= 0.0675) & (text[:, 0] <= 0.0875)]
    shown = events.within(67500, 87500)
    assert len(shown) == len(chosen) == 6957
    E_v = accumulate(shown, 180, 240)
    assert np.array_equal(E_v, slow_count(np.array([tuple(r) for r in chosen[:, [1, 2, 0, 3]]], dtype=XYTP), 240, 180))
    found = read_events(text, time_unit="s")  # t x y p in seconds: the columns are found
    assert np.array_equal(accumulate(found.within(67500, 87500), 180, 240), E_v)
