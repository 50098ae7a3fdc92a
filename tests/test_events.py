"""From a recording to the mask: reading, aligning, accumulating and resizing events, Eq. 5 and Eq. 6."""

import io
import itertools
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import warnings
import zipfile
from contextlib import nullcontext
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import oracles
from events import (
    ALPHA,
    BETA,
    GREY,
    LAYOUTS,
    MICROSECONDS,
    RHO,
    RULES,
    EventMap,
    Events,
    budget,
    budget_mask,
    cover_mask,
    event_maps,
    is_hot,
    literal_mask,
    mend,
    motion,
    novelty,
    read_events,
    resize,
    spread_order,
    summary,
    worth,
)
from strategies import (
    CLIP,
    SPARSITIES,
    XYTP,
    cells,
    edges,
    hot_maps,
    images,
    motions,
    recordings,
    untied_motions,
    worths,
)


def rows_of(*rows, dtype=XYTP) -> np.ndarray:
    return np.array(list(rows), dtype=dtype)


def columns(events: Events) -> list:
    return [np.asarray(column).tolist() for column in (events.x, events.y, events.t, events.p)]


def count(rows: np.ndarray, width: int, height: int, polarity: str = "count") -> np.ndarray:
    """E_v of a recording from a sensor of that size, without its warnings."""
    with warnings.catch_warnings(action="ignore"):
        return read_events(rows).align((width, height)).accumulate(polarity)


def slow_count(rows: np.ndarray, width: int, height: int, polarity: str = "count") -> np.ndarray:
    """The same by a loop."""
    E_v = [[0] * width for _ in range(height)]
    for x, y, _, p in rows.tolist():
        E_v[y][x] += 1 if p > 0 or polarity == "count" else -1
    return np.array(E_v)


def fired(counts: np.ndarray, p: int = 0) -> np.ndarray:
    """A recording that has `counts` (height, width) of events at its pixels, all of one polarity."""
    rows = np.zeros(counts.sum(), XYTP)
    rows["y"], rows["x"] = np.divmod(np.repeat(np.arange(counts.size), counts.ravel()), counts.shape[1])
    rows["t"], rows["p"] = np.arange(len(rows)), p
    return rows


def slow_resize(E_v: np.ndarray, height: int, width: int) -> list[list[Fraction]]:
    """Every old pixel's share of every new pixel: the overlap of their intervals on each axis."""

    def overlap(a, b, source, target):
        end = min(Fraction(a + 1, source), Fraction(b + 1, target))
        return max(Fraction(0), end - max(Fraction(a, source), Fraction(b, target)))

    rows, cols = E_v.shape
    out = [[Fraction(0)] * width for _ in range(height)]
    for ((r, c), value), u, v in itertools.product(np.ndenumerate(E_v), range(height), range(width)):
        out[u][v] += int(value) * overlap(r, u, rows, height) * rows * overlap(c, v, cols, width) * cols
    return out


# Reading: which column is which


ROWS = rows_of((3, 1, 0, 0), (5, 2, 40, 1), (3, 0, 90, 1), (0, 2, 250, 0))
EXPECTED = [[3, 5, 3, 0], [1, 2, 0, 2], [0, 40, 90, 250], [0, 1, 1, 0]]


@pytest.mark.parametrize(
    "names",
    ["x y t p", "t x y p", "p t y x", "x_pos y_pos timestamp polarity", "X Y ts pol", "ts x_pos y_pos pol",
     "xs ys timestamps ps", "polarities time y x", "t x y on", "x y timestamp is_increase"],
)  # fmt: skip
@pytest.mark.parametrize("stored", ["structured", "npz", "npz of N x 1"])
def test_fields_by_their_usual_names_in_any_order(tmp_path, names, stored):
    column = {"on": "p", "is_increase": "p"}
    named = {name: ROWS[column.get(name, name.lower()[0])] for name in names.split()}
    if stored == "structured":
        rows = np.rec.fromarrays(list(named.values()), names=list(named))
        np.save(tmp_path / "e.npy", rows)
        assert columns(read_events(rows)) == columns(read_events(tmp_path / "e.npy")) == EXPECTED
    else:
        shape = (-1, 1) if stored == "npz of N x 1" else (-1,)
        np.savez(tmp_path / "e.npz", **{name: column.reshape(shape) for name, column in named.items()})
        assert columns(read_events(tmp_path / "e.npz")) == EXPECTED


@pytest.mark.parametrize("order", ["".join(order) for order in itertools.permutations("xytp")])
@pytest.mark.parametrize("dtype", ["<i8", ">f8", "<u4"])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_bare_columns_in_a_layout_in_use_are_found_and_others_asked_for(tmp_path, order, dtype, layout):
    bare = np.array(np.stack([ROWS[c] for c in order], axis=1).astype(dtype), order=layout)
    np.save(tmp_path / "e.npy", bare)
    assert columns(read_events(bare, order=order)) == EXPECTED
    if order in LAYOUTS:
        assert columns(read_events(tmp_path / "e.npy")) == EXPECTED
    elif order not in ("tyxp", "yxtp", "yxpt"):  # x and y look alike, x is taken to come first
        with pytest.raises(ValueError, match="order"):
            read_events(tmp_path / "e.npy")


DOUBTS = {
    "unsorted time": [[1, 1, 50, 0], [2, 5, 20, 1], [1, 3, 90, 1], [4, 0, 10, 0]],
    "reversed time": [[1, 1, 90, 0], [2, 5, 20, 1], [1, 3, 10, 1], [4, 0, 5, 0]],
    "all times equal": [[1, 1, 7, 0], [2, 5, 7, 1], [1, 3, 7, 1], [4, 0, 7, 0]],
    "two sorted columns of one range": [[1, 1, 1, 0], [2, 5, 2, 1], [3, 3, 3, 1]],
    "one event": [[1, 1, 7, 0]],
    "pixels read row by row": [[3, 60, 0, 1], [1, 61, 5, 0], [2, 119, 19, 1]],
    "x may be time": [[10, 20, 100, 1], [200, 30, 150, 1]],
    "few rows, x sorted, time not": [[1, 5, 30, 1], [2, 3, 10, 0], [3, 4, 20, 1]],
    "rows sorted by y": [[n % 7, n // 7, (n * 37) % 150, n % 2] for n in range(100)],
    "times equal, y sorted": [[3, 1, 5, 1], [1, 2, 5, 0], [2, 30, 5, 1]],
    "times 0 come first, y sorted": [[0, (n * 37) % 150, n, n % 2] for n in range(200)],
    "times 0 come third, y first and sorted": [[n, (n * 37) % 150, 0, n % 2] for n in range(200)],
    "time has less range than x": [[(n * 37) % 200, (n * 11) % 100, n, n % 2] for n in range(50)],
}


@pytest.mark.parametrize("case", DOUBTS)
def test_a_doubt_about_bare_columns_asks_for_the_order(case):
    rows = np.array(DOUBTS[case])
    with pytest.raises(ValueError, match="order"):
        read_events(rows)
    assert columns(read_events(rows, order="xytp")) == rows.T.tolist()


@pytest.mark.parametrize("x", [[1.5, 2.5], [2.5, 1.5], np.arange(20) + 0.5])
def test_fractions_of_a_pixel_are_never_taken_for_times(x):
    rows = np.stack((x, [3.25] * len(x), 100 * np.arange(len(x)), np.arange(len(x)) % 2), axis=1)
    for order in (None, "xytp"):
        with pytest.raises(ValueError, match=r"order|fractions"):
            read_events(rows, order)


def test_seconds_and_repeated_times_are_found():
    seconds = np.array([[5, 9, 0.1, 0], [3, 7, 0.15, 1], [8, 1, 0.3, 1]])
    assert read_events(seconds, time_unit="s").t.tolist() == [100_000, 150_000, 300_000]
    wider = np.array([[1, 1, 0.1, 0], [2, 5, 0.2, 1], [30, 3, 0.25, 1]])  # x is sorted and has more range
    with pytest.raises(ValueError, match=r"order|fractions"):
        read_events(wider, time_unit="s")
    assert read_events(wider, "xytp", "s").t.tolist() == [100_000, 200_000, 250_000]
    repeated = np.array([[9, 1, 10, 0], [2, 5, 10, 1], [1, 3, 90, 1], [4, 0, 90, 0]])
    assert read_events(repeated).t.tolist() == [10, 10, 90, 90]
    sorted_x = np.array([[1, 9, 100, 0], [2, 7, 200, 1], [3, 1, 300, 1]])
    assert read_events(sorted_x).t.tolist() == [100, 200, 300]


def test_archives(tmp_path):
    plain = {name: ROWS[name] for name in "xytp"}
    folder = {f"events/{name}": ROWS[name] for name in "xytp"}
    for arrays in (
        {"event_data": ROWS, "label": np.int64(3)},  # N-ImageNet
        {"events": ROWS, "width": np.int64(6), "t": np.zeros(2)},
        {"arr_0": ROWS},
        {**plain, "meta": np.array([None])},  # an object that is not read
        {**folder, "ms_to_idx": np.arange(9)},
    ):
        for save in (np.savez, np.savez_compressed):
            save(tmp_path / "e.npz", **arrays)
            assert columns(read_events(tmp_path / "e.npz")) == EXPECTED


def test_what_has_been_read_is_returned():
    events = read_events(ROWS)
    assert read_events(events) is events
    values = EventMap(np.eye(5))
    assert read_events(values) is values


@pytest.mark.parametrize("values", [np.arange(12.0).reshape(2, 6) - 3, np.eye(5, dtype=bool), np.ones((3, 60), "u1")])
def test_a_map_is_taken_as_it_is(tmp_path, values):
    np.save(tmp_path / "map.npy", values)
    E_v, (height, width) = read_events(tmp_path / "map.npy"), values.shape
    for aligned in (E_v.align((99, 77)), E_v.align((99, 77), (width, height))):
        assert isinstance(aligned, EventMap) and summary([aligned]) == f"an event map of {width} x {height}"
        found = aligned.accumulate()
        assert found.dtype == values.dtype and np.array_equal(found, values)


@pytest.mark.parametrize("bad", [
    np.array([]), np.array(3), np.zeros((2, 3, 5)), np.zeros((0, 5)), np.full((5, 5), math.nan), np.ones((5, 5), "c8"),
    *(np.ones(shape) for shape in [(4, 500), (500, 3), (500, 5), (1, 100)]), np.array([["a", "b"]]),
    np.broadcast_to(np.ones(1), (20_000, 6_000)),
    *(np.ones((3, 4), int).astype(dtype) for dtype in ("U3", "S2", "M8[s]", "c8", "O")),
])  # fmt: skip
def test_arrays_that_are_neither_events_nor_a_map_are_refused(bad):
    with warnings.catch_warnings(action="error"), pytest.raises(ValueError, match=r"^the events: "):
        read_events(bad)


# Reading: files that are not what they seem


def test_pickles_are_refused_and_never_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Trap()))
    np.save(tmp_path / "array.npy", np.array([Trap()], dtype=object))
    np.save(tmp_path / "dict.npy", {"x": Trap()})
    np.save(tmp_path / "fields.npy", ROWS.astype([(name, object) for name in "xytp"]))
    np.savez(tmp_path / "zip.npz", event_data=np.array([Trap()], dtype=object))
    for path in list(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=str(path)):
            read_events(path)
    assert not (tmp_path / "sprung").exists()


BROKEN = {
    "empty": b"",
    "half a magic": b"\x93NUM",
    "text": b"1 2 3 4\n",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "no archive": b"PK\x03\x04broken",
    "half a header": b"\x93NUMPY\x01\x00v\x00{'descr': ",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(tmp_path, content):
    path = tmp_path / "e.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        read_events(path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name), lambda path: None])
def test_what_is_no_file_is_named(tmp_path, make):
    """A pipe would be waited for, for ever."""
    make(tmp_path / "e.npy")
    with pytest.raises(ValueError, match=str(tmp_path / "e.npy")):
        read_events(tmp_path / "e.npy")


def test_files_that_hold_less_than_they_say_are_named(tmp_path):
    np.save(tmp_path / "short.npy", ROWS)
    os.truncate(tmp_path / "short.npy", (tmp_path / "short.npy").stat().st_size - 5)
    np.savez_compressed(tmp_path / "damaged.npz", event_data=np.random.default_rng(0).integers(0, 9, (999, 4)))
    data = bytearray((tmp_path / "damaged.npz").read_bytes())
    data[100:140] = b"\xff" * 40
    (tmp_path / "damaged.npz").write_bytes(data)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)})
    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as archive:
        archive.writestr("event_data.npy", header.getvalue())
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("event_data", b"no array")
    bomb(tmp_path / "bomb.npz")
    for path in list(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=str(path)):
            read_events(path)


def bomb(path):
    """A small archive of 64 MiB of zeros."""
    np.savez_compressed(path, event_data=np.zeros((2**21, 4)))


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
def test_damaged_files_are_read_or_named(tmp_path, save):
    """300 files with one to three bytes changed: each is read, or refused with its name; nothing else comes out."""
    rng, path = np.random.default_rng(0), tmp_path / ("e.npy" if save is np.save else "e.npz")
    save(path, ROWS)
    whole, refused = np.frombuffer(path.read_bytes(), np.uint8), 0
    for _ in range(300):
        damaged = whole.copy()
        count = rng.integers(1, 4)
        damaged[rng.integers(0, len(whole), count)] = rng.integers(0, 256, count)
        path.write_bytes(damaged.tobytes())
        try:
            with warnings.catch_warnings(action="ignore"):
                read_events(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert 100 < refused < 300


def test_a_recording_is_mapped_not_read(tmp_path):
    np.save(tmp_path / "e.npy", np.zeros(3, XYTP))
    base = read_events(tmp_path / "e.npy").x
    while not isinstance(base, np.memmap) and base.base is not None:
        base = base.base
    assert isinstance(base, np.memmap) or "mmap" in type(base).__name__


# What messages say: here and nowhere else


def two(**columns) -> np.ndarray:
    """Two events, with some columns replaced."""
    usual = {"x": [0, 1], "y": [0, 1], "t": [0, 1000], "p": [0, 1]}
    return np.rec.fromarrays((usual | columns).values(), names="x,y,t,p")


def file(name, write):
    """A function of a folder that writes a file there and returns its path."""
    return lambda folder: (write(folder / name), folder / name)[1]


def in_order(rows):
    """A function of a folder that reads the array with an order."""
    return lambda folder: read_events(rows, "txyp")


ODD = np.zeros(2, [(name, int) for name in ("x", "y", "t", "ts", "p")])  # two columns of time
TALL = rows_of((9, 20, 0, 0), (3, 39, 500, 0))
LONG = file("e.npz", lambda path: np.savez(path, x=[0, 1, 2], y=[0, 1], t=[0, 1], p=[0, 1]))
TEXT = file("e.csv", lambda path: path.write_text("t,x,y,p\n1,2,3,1\n"))
PICKLE = file("e.npy", lambda path: np.save(path, {"x": 1}))
POLARITIES = "; store polarities as 0 and 1, -1 and +1, or bool"
WHOLE = "); give a whole .npy or .npz (README.md, Input, says how to convert a pickle)"
CLOCKS = "; change window or time_unit, or add the clocks' offset, which DSEC and others keep apart (t_offset)"
OUTSIDE = "events cover x 3 to 9 and y 20 to 39, not inside {} pixels; give the camera's size as sensor, WIDTHxHEIGHT"
HOT = fired(np.where(np.arange(1200).reshape(30, 40) < 20, 22, 1))
MAP = "an event map of 5 x 5 has only its own size; leave sensor out"

MESSAGES = [  # how it ends, what is read, how it is aligned
    ("p goes from 0 to 3" + POLARITIES, two(p=[0, 3]), None),
    ("p goes from -1 to 0" + POLARITIES, two(p=[-1, 0]), None),
    ("p goes from -2 to 1" + POLARITIES, two(p=[-2, 1]), None),
    ("p goes from 0.5 to 1.0" + POLARITIES, two(p=[0.5, 1]), None),
    ("t holds NaN or infinity; drop those events", two(t=[0, math.nan]), None),
    ("t holds NaN or infinity; drop those events", two(t=[-math.inf, 0]), None),
    ("x holds fractions of a pixel; round them", two(x=[0.5, 1]), None),
    ("y holds fractions of a pixel; round them", two(y=[0.5, 1]), None),
    ("the events: t is of type <U4; store numbers", two(t=["now", "then"]), None),
    ("x has 3 values, t 2; store as many of each", LONG, None),
    ("2 columns for t among x, y, t, ts, p; name them x, y, t, p, or store a single array", ODD, None),
    ("no columns for t among x, y, p; name them x, y, t, p, or store a single array", ODD[["x", "y", "p"]], None),
    ("which of its columns are x, y, t, p is uncertain; give order, such as txyp", np.zeros((3, 4)), None),
    ("map of an image; reshape it (a stack: np.abs(stack).sum(axis=0))", np.zeros((5, 30, 40)), None),
    ("the events: holds NaN or infinity; replace them", np.full((5, 5), math.nan), None),
    ("events of type list: give a path, a numpy array, or none", [[1, 2, 3, 1]], None),
    ("events of type Tensor: give a path, a numpy array, or none", torch.ones(3, 4), None),
    ("the events: shape (5, 5) of float64 is not N x 4 events; leave order out", in_order(np.ones((5, 5))), None),
    ("the events: shape (3,) of int64 is not N x 4 events; leave order out", in_order(np.arange(3)), None),
    ("e.npy: cannot be read as events (no such file" + WHOLE, lambda folder: folder / "e.npy", None),
    (": cannot be read as events (not a file" + WHOLE, lambda folder: folder, None),
    ("/e.csv -o events.npy", TEXT, None),
    (WHOLE, PICKLE, None),
    ("bytes, over 20 times its size" + WHOLE, file("e.npz", bomb), None),
    (OUTSIDE.format("40 x 30") + ", or exchange x and y", TALL, ((40, 30),)),
    (OUTSIDE.format("20 x 30"), TALL, ((40, 30), (20, 30))),
    ("events cover x -1 to 0 and y 0 to 1, not inside 9 x 9 pixels; drop those below 0", two(x=[-1, 0]), ((9, 9),)),
    ("a sensor of 0 x 9; give its real size", two(), ((9, 9), (0, 9))),
    ("a sensor of 99999 x 99999; give its real size", two(), ((9, 9), (99_999, 99_999))),
    ("no event from 2000 to 4000.5 us, it goes from 0 to 1000 us" + CLOCKS, two(), ((2, 2),), (2000, 4000.5)),
    ("no event from 2 to 7 us, it goes from 0 to 1000 us; they cannot say which cells matter", two(), ((2, 2),),
     (2, 7)),
    ("no event from 2000 to 9000 us, it goes from 0 to 1000 us" + CLOCKS, two(), ((2, 2),), (2000, 5000, 9000)),
    ("no event from 2 to 7 us, it goes from 0 to 1000 us; they cannot say which cells matter", two(), ((2, 2),),
     (2, 4, 7)),
    *[("an event map of 5 x 5 has no times; leave window out, and give a clip a recording", np.ones((5, 5)), ((9, 9),),
       cuts) for cuts in ((0, 1), (0, 1, 2))],
    (MAP, EventMap(np.eye(5)), ((9, 9), (9, 9))),
    ("x goes up to 8193, and no sensor has so many pixels; undo an underflow or a scale", two(x=[0, 8193]), None),
    ("y goes up to 65535, and no sensor has so many pixels; undo an underflow or a scale",
     two(y=np.array([0, 65535], "u2")), None),
    ("fills over half of it, which then counts as motion; if no events are there, give np.abs(map.astype(float) - "
     "255); if it is a mask, give it as bool", np.where(np.eye(5), 0, 255).astype("u1"), None),
    ("give np.abs(map.astype(float) - 1234567.5); if it is a mask, give it as bool", np.where(np.eye(5), 0, 1234567.5),
     None),
    ("/e.png", file("e.png", Image.new("RGB", (9, 9)).save), None),
    ("/e.raw -o events.npy", file("e.raw", lambda path: path.write_bytes(b"% evt 3.0")), None),
    # warnings
    ("the events: times span only 99; taken as microseconds, if they are not, give time_unit s, ms or ns (us silences "
     "this)", two(t=[1, 100]), None),
    ("its clock jumps back by 900 us, over half of its span; did it wrap? give the part before or after",
     two(t=np.array([1000, 100], "u4")), ((2, 2),)),
    ("5.2 s of events for a single image; give window, or frame, around it", two(t=[0, 5_200_000]), ((2, 2),)),
    *[(f"the events: events fill a sensor of {sensor[0]} x {sensor[1]}, the image is {size[0]} x {size[1]}; if the "
       "camera is that, give sensor {}x{}".format(*sensor), two(x=[0, sensor[0] - 3], y=[0, sensor[1] - 1]), (size,))
      for sensor, size in (((346, 260), (640, 480)), ((240, 180), (346, 260)), ((1280, 720), (1920, 1080)))],
    ("the events: times have fractions and span only 0.25; taken as microseconds, if they are not, give time_unit s, "
     "ms or ns (us silences this)", two(t=[0.25, 0.5]), None),
    ("the events: no events at all; they cannot say which cells matter", ODD[:0][list("xytp")], ((9, 9),)),
    ("all events lie in the image's first quarter; if the event camera is smaller, give its size as sensor", two(),
     ((9, 9),)),
    ("a sensor of 8 x 2 pixels, an image of 4 x 3; they must show the same", two(), ((4, 3), (8, 2))),
    ("the event map is zero everywhere; it cannot say which cells matter", np.zeros((5, 5)), ((9, 9),)),
    ("the events: 20 pixels hold over a quarter of the events; if they are hot, give hot_pixels mend", HOT,
     ((40, 30),)),
]  # fmt: skip


@pytest.mark.parametrize("words, source, alignment, window", [(*row, None)[:4] for row in MESSAGES])
def test_messages(tmp_path, words, source, alignment, window):
    with warnings.catch_warnings(action="error"), pytest.raises((ValueError, UserWarning)) as raised:
        events = read_events(source(tmp_path) if callable(source) else source)
        event_maps(events.align(*alignment).cut(window and np.array(window)), "count", "keep")
    assert str(raised.value).endswith(words) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "source, size, window",
    [
        (two(t=[0, 60_000_000]), (2, 2), (0, 1000)),  # long, but with a window
        (two(t=[0, 5_000_000]), (2, 2), None),
        (two(t=[0, 100]), (2, 2), None),
        (rows_of((0, 0, 0, 1), (1, 1, 1000, 1), (1, 1, 500, 1)), (2, 2), None),  # back by just half
        (two(x=[0, 331], y=[0, 251]), (640, 480), None),  # 96 % of 346 x 260
        (two(x=[0, 8192]), (8193, 2), None),
        (np.r_[np.arange(101), np.full(99, 50)].reshape(10, 20), (20, 10), None),  # just half of it
    ],
)
def test_what_may_be_right_does_not_warn(source, size, window):
    with warnings.catch_warnings(action="error"):
        event_maps(read_events(source).align(size).cut(window and np.array(window)), "count", "keep")


# Time


@pytest.mark.parametrize("unit", MICROSECONDS)
@pytest.mark.parametrize("kind", ["f8", "i8"])
def test_windows_are_microseconds_whatever_the_file_stores(unit, kind):
    us = np.array([0, 1_000_000, 2_000_000, 67_000_000, 67_000_001])
    stored = np.array([float(int(time) / MICROSECONDS[unit]) for time in us])
    rows = np.zeros(5, dtype=[("x", int), ("y", int), ("t", kind), ("p", int)])
    rows["t"], rows["x"] = stored if kind == "f8" else np.round(stored), np.arange(5)
    with warnings.catch_warnings(action="error"):  # the unit is given: no warning
        events = read_events(rows, time_unit=unit)
    inside = events.cut(np.array((1_000_000, 67_000_000)))[0]
    assert inside.x.tolist()[:3] == [1, 2, 3]
    if kind == "f8" or unit in ("us", "ns"):
        assert inside.x.tolist() == [1, 2, 3] and summary([inside]) == "3 events in 66000.0 ms"
        assert events.cut(np.array((67_000_001, 67_000_001)))[0].x.tolist() == [4]
        assert events.span == pytest.approx((0, 67_000_001))


@given(recordings(min_size=1), st.integers(-10, 10**6), st.integers(0, 10**6))
def test_a_window_holds_both_its_ends(recording, start, length):
    rows, _ = recording
    inside = [row for row in rows.tolist() if start <= row[2] <= start + length]
    if inside:
        found = read_events(rows).cut(np.array((start, start + length)))[0]
        assert columns(found) == [list(column) for column in zip(*inside, strict=True)]
    else:
        lies_within = rows["t"].min() <= start + length and start <= rows["t"].max()
        outcome = pytest.warns(UserWarning) if lies_within else pytest.raises(ValueError, match="window")
        with outcome:
            read_events(rows).cut(np.array((start, start + length)))
    whole = read_events(rows)
    assert len(whole.cut(np.array(whole.span))[0]) == len(rows)  # the last timestamp is not lost


@given(recordings(), st.data())
def test_cutting_is_the_loop_over_events_and_windows(recording, data):
    """In any order of the events; one on an edge counts once, in the later window, on the last edge in the last."""
    rows, _ = recording
    cuts = data.draw(edges(rows))
    rows = rows[data.draw(st.permutations(range(len(rows))))]
    rows.flags.writeable = False
    expected = [[] for _ in cuts[1:]]
    for row in sorted(rows.tolist(), key=lambda row: row[2]):
        if cuts[0] <= row[2] <= cuts[-1]:
            expected[min(sum(row[2] >= edge for edge in cuts), len(expected)) - 1].append(row)
    if len(rows) and not (rows["t"].min() <= cuts[-1] and cuts[0] <= rows["t"].max()):
        with pytest.raises(ValueError, match="add the clocks' offset"):
            read_events(rows).cut(cuts)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moments = read_events(rows, time_unit="us").cut(cuts)
    back = max((int(a) - int(b) for a, b in itertools.pairwise(rows["t"])), default=0)
    wrapped = back > 0 and 2 * back > int(rows["t"].max()) - int(rows["t"].min())
    told = ["did it wrap? give the part before or after"] * wrapped
    if len(rows) and not any(expected):
        told += ["they cannot say which cells matter"]
    elif len(rows) and len(cuts) > 2:
        common = min(rows["t"].max(), cuts[-1]) - max(rows["t"].min(), cuts[0])
        told += ["are they on one clock, in one unit?"] * bool(common < (cuts[-1] - cuts[0]) / 10)
    assert [str(warning.message).rpartition("; ")[2] for warning in caught] == told
    assert [columns(each) for each in moments] == [[[row[n] for row in each] for n in range(4)] for each in expected]
    assert [each.window for each in moments] == list(itertools.pairwise(cuts.tolist()))


def test_a_sorted_recording_is_cut_into_views():
    """One of 10 million events, mapped from a file, is neither copied nor searched once for each window."""
    rows = np.zeros(1000, XYTP)
    rows["t"] = np.arange(1000)
    events = read_events(rows)
    moments = events.cut(np.linspace(0, 999, 9))
    assert [len(each) for each in moments] == [125] * 8
    assert all(np.shares_memory(getattr(each, name), getattr(events, name)) for each in moments for name in "xytp")


def test_a_window_between_whole_times():
    rows = rows_of((0, 0, 10, 0), (1, 0, 20, 0), (2, 0, 30, 0))
    assert read_events(rows, time_unit="ms").cut(np.array((10_001, 29_999)))[0].x.tolist() == [1]


def test_large_clocks_are_exact_to_a_quarter_of_a_microsecond():
    """Nanoseconds since 1970: more than 32 bits, and than float64 holds exactly."""
    start = 1_700_000_000_000_000  # microseconds
    events = read_events(two(t=1000 * start + np.array([0, 1000])), time_unit="ns")
    assert events.cut(np.array((start, start)))[0].x.tolist() == [0]
    assert events.cut(np.array((start + 1, start + 1)))[0].x.tolist() == [1]
    assert events.span == (start, start + 1)


@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_windows_on_whole_microseconds_of_a_large_clock_are_exact(dtype):
    rng = np.random.default_rng(0)
    times = 1_700_000_000_000_000 + np.cumsum(rng.integers(1, 4, 300))  # microseconds
    events = read_events(
        np.rec.fromarrays([np.arange(300), [0] * 300, (1000 * times).astype(dtype), [1] * 300], names="x,y,t,p"),
        time_unit="ns",
    )
    assert events.t.astype(np.int64).tolist() == times.tolist()
    for first, last in np.sort(rng.integers(0, 300, (200, 2))).tolist():
        inside = events.cut(np.array((float(times[first]), float(times[last]))))[0]
        assert inside.x.tolist() == list(range(first, last + 1))


@pytest.mark.parametrize("dtype", ["f2", "f4", "i2", "u1"])
def test_small_dtypes_of_times_do_not_overflow(dtype):
    assert read_events(two(t=np.array([0, 200], dtype)), time_unit="s").span == (0, 200_000_000)


@pytest.mark.parametrize("times", [[9, 5, 2, 2], [4, 4, 4, 4]])
def test_reversed_and_equal_times_lose_nothing(times):
    rows = ROWS.copy()
    rows["t"] = times
    assert len(read_events(rows).cut(np.array((2, 9)))[0]) == 4
    assert np.array_equal(count(rows, 6, 3), slow_count(ROWS, 6, 3))


def test_only_fractions_over_a_short_range_without_a_unit_warn():
    with pytest.warns(UserWarning, match="time_unit"):
        assert read_events(two(t=[0.25, 0.5])).span == (0.25, 0.5)  # and no guess is made
    with warnings.catch_warnings(action="error"):
        read_events(two(t=[0.25, 0.5]), time_unit="us")
        read_events(two(t=[0.25, 2e6]))
        read_events(two())


def test_maps_that_stay_valid():
    """Smooth ones, noise, constant ones, binary ones with half of it empty; a light ground once it is taken away."""
    rng, busy = np.random.default_rng(0), np.random.default_rng(1).random((30, 40)) < 0.2
    ground = np.where(busy, 9, 255)
    valid = [np.full((30, 40), 7), np.full((30, 40), True), np.arange(1200.0).reshape(30, 40)]
    valid += [rng.normal(size=(30, 40)), rng.integers(0, 256, (30, 40), dtype="u1")]
    valid += [np.repeat([[0, 1]], 30, 0).repeat(20, 1), busy, ~busy, np.where(busy, -3, 0)]
    for values in valid:
        assert np.array_equal(read_events(values).values, values)
    for dtype in ("u1", "i8", "f4"):
        with pytest.raises(ValueError, match=r"np.abs\(map.astype\(float\) - 255\)"):
            read_events(ground.astype(dtype))
        assert np.array_equal(read_events(np.abs(ground.astype(dtype).astype(float) - 255)).values, 246.0 * busy)


def test_a_picture_of_events_becomes_a_map_by_the_command_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.where(np.eye(28), 200, 0).astype("u1")).convert("RGB").save("it's one.png")
    with pytest.raises(ValueError, match="make a map of it: python -c") as raised:
        read_events("it's one.png")
    command = shlex.split(str(raised.value).partition("make a map of it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert np.array_equal(read_events("map.npy").values, 200 * np.eye(28))


# Aligning


def test_a_recording_is_aligned_with_the_image_or_its_sensor():
    events = read_events(ROWS)
    assert summary([events]) == "4 events in 0.2 ms" and events.span == (0, 250)
    aligned = events.align((6, 3))
    assert aligned.sensor == (6, 3) and aligned.window is None and aligned.accumulate().shape == (3, 6)
    (aligned,) = events.align((60, 30), (6, 3)).cut(np.array((40, 1040)))
    assert aligned.sensor == (6, 3) and columns(aligned) == [column[1:] for column in EXPECTED]
    assert summary([aligned]) == "3 events in 1.0 ms" and aligned.window == (
        40,
        1040,
    )  # the window's length, not the span's
    assert events.sensor is None and len(events) == 4


def test_a_recording_without_events():
    with pytest.warns(UserWarning, match="^the events: "):
        (aligned,) = read_events(ROWS[:0]).align((6, 3)).cut(np.array((0, 500)))
    assert len(aligned) == 0 and summary([aligned]) == "0 events in 0.5 ms"
    assert aligned.span == (0, 0) and aligned.accumulate().tolist() == [[0] * 6] * 3


@pytest.mark.parametrize("place", [(-1, 0), (0, -1), (6, 0), (0, 3)])
def test_events_outside_the_sensor_are_refused(place):
    rows = rows_of((0, 0, 0, 0), (*place, 1, 0), dtype=[(name, int) for name in "xytp"])
    for size, sensor in (((6, 3), None), ((600, 300), (6, 3))):
        with pytest.raises(ValueError, match="6 x 3"):
            read_events(rows).align(size, sensor)


@pytest.mark.parametrize(
    "size, sensor, doubtful",
    [
        ((40, 30), None, False),
        ((40, 30), (42, 30), False),
        ((40, 30), (60, 45), False),
        ((40, 30), (400, 300), False),  # given, not guessed
        ((40, 30), (30, 40), True),
        ((40, 30), (80, 20), True),
        ((60, 40), None, True),  # nothing beyond the first quarter
        ((58, 100), None, False),
    ],
)
def test_a_sensor_that_seems_wrong_warns(size, sensor, doubtful):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_events(rows_of((29, 19, 0, 0))).align(size, sensor)
    assert [str(warning.message).startswith("the events: ") for warning in caught] == [True] * doubtful


# A homography


def slow_map(rows, homography, size, polarity="count") -> np.ndarray:
    """Each event by itself: E_v of the image, (height, width) of `size`."""
    E_v = np.zeros(size[::-1])
    for x, y, _, p in rows.tolist():
        u, v, w = (row[0] * x + row[1] * y + row[2] for row in homography)
        if w > 0 and 0 <= round(u / w) < size[0] and 0 <= round(v / w) < size[1]:
            E_v[round(v / w), round(u / w)] += 1 if polarity == "count" else 2 * p - 1
    return E_v


@given(recordings(min_size=1), st.sampled_from(["count", "signed"]), st.data())
def test_moving_the_sensors_pixels_is_moving_each_event(recording, polarity, data):
    """A camera turned, scaled, cut or seen aslant; whole numbers over 64, so that both round alike."""
    (rows, sensor), scale = recording, st.sampled_from([-128, -64, -16, 0, 16, 64, 192])
    H = np.array(
        [[data.draw(scale), data.draw(scale), 64 * data.draw(st.integers(-20, 40))] for _ in "xy"] + [[0, 0, 64]]
    )
    H[2, :2] = data.draw(st.tuples(*[st.integers(-2, 8)] * 2))
    assume(np.linalg.matrix_rank(H) == 3)
    size, given = (data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))), data.draw(st.booleans())
    expected = slow_map(rows, H.tolist(), size, polarity)
    inside = slow_map(rows, H.tolist(), size).sum()
    with warnings.catch_warnings(action="ignore"):
        events = read_events(rows).align(size, sensor if given else None, mapped=True)
    assert events.sensor == (sensor if given else (rows["x"].max() + 1, rows["y"].max() + 1))
    try:
        (E_v,), outside = event_maps([events], polarity, "keep", H, size)
    except ValueError as error:
        assert "inverse" in str(error) and (2 * inside < len(rows) or " of the image; perhaps" in str(error))
        return
    assert np.array_equal(E_v, expected) and outside == len(rows) - inside <= len(rows) / 2


WIDE, TALLER = (40, 30), (30, 40)
CAMERAS = {  # homography, the image's size, and where x 3, y 5 of a sensor of 40 x 30 lies in it
    "mirrored": ([[-1, 0, 39], [0, 1, 0], [0, 0, 1]], WIDE, (36, 5)),
    "upside down": ([[-1, 0, 39], [0, -1, 29], [0, 0, 1]], WIDE, (36, 24)),
    "transposed": ([[0, 1, 0], [1, 0, 0], [0, 0, 1]], TALLER, (5, 3)),
    "turned": ([[0, -1, 29], [1, 0, 0], [0, 0, 1]], TALLER, (24, 3)),
    "cut": ([[1, 0, -2], [0, 1, -4], [0, 0, 1]], (36, 22), (1, 1)),
    "larger, by another lens": ([[4, 0, 8], [0, 4, 4], [0, 0.004, 1.02]], (160, 120), (19, 23)),
}


@pytest.mark.parametrize("homography, size, place", CAMERAS.values(), ids=CAMERAS)
def test_cameras_beside_the_image(homography, size, place):
    events = read_events(rows_of(*[(3, 5, n, 1) for n in range(200)])).align(size, WIDE, mapped=True)
    maps, outside = event_maps([events], "count", "keep", homography, size)
    assert outside == 0 and np.argwhere(next(maps)).tolist() == [list(place[::-1])]
    with pytest.raises(ValueError, match="perhaps homography is the inverse") if size == (160, 120) else nullcontext():
        event_maps([events], "count", "keep", np.linalg.inv(homography), size)


def test_a_homography_that_sees_little_or_nothing_is_refused():
    rows = rows_of(*[(x, y, 40 * y + x, 1) for y in range(30) for x in range(40)])
    events, maps = read_events(rows).align(WIDE, mapped=True), partial(event_maps, polarity="count", hot_pixels="keep")
    for scale, size, told in (
        (8, (160, 120), "300 of 1200 events fall inside the image; perhaps homography is the inverse"),
        (1, (160, 120), "40 x 30 sees 6.2% of the image; perhaps homography is the inverse, or give sensor"),
        (-1, (40, 30), "1 of 1200 events fall inside"),  # w > 0, and only the corner stays
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            maps([events], homography=np.diag([scale, scale, 1]), size=size)
    (E_v,), outside = maps([events], homography=np.diag([1, 1, 1]), size=(30, 30))
    assert outside == 300 and E_v.shape == (30, 30) and (E_v == 1).all()
    with pytest.raises(ValueError, match="0 of 1200 events"):  # behind the camera
        maps([events], homography=np.diag([-1, -1, -1]), size=WIDE)
    with warnings.catch_warnings(action="ignore"):
        empty = read_events(rows[:0]).align(WIDE, mapped=True)
    assert maps([empty], homography=np.eye(3), size=WIDE)[1] == 0


def test_hot_pixels_are_mended_before_they_are_moved():
    counts = np.random.default_rng(0).integers(0, 5, (30, 40))
    counts[7, 9] = 900
    moments = [read_events(fired(counts)).align(WIDE, mapped=True), EventMap(counts)]
    for moment in moments:
        maps, _ = event_maps([moment], "count", "mend", [[-1, 0, 39], [0, 1, 0], [0, 0, 1]], WIDE)
        assert np.array_equal(next(maps), mend_alone(counts)[:, ::-1])
    maps, outside = event_maps(moments[1:], "count", "keep", [[1, 0, 0], [0, 1, -1], [0, 0, 1]], WIDE)
    assert np.array_equal(next(maps), np.vstack([counts[1:], np.zeros((1, 40))])) and outside == counts[0].sum()
    told = f"an event map of 40 x 30, {counts[0].sum()} of its sum outside the image"
    assert summary(moments[1:], outside) == told


# Accumulation


@given(recordings(), st.sampled_from(["count", "signed"]))
def test_accumulation_is_the_loop(recording, polarity):
    rows, (width, height) = recording
    E_v = count(rows, width, height, polarity)
    assert E_v.dtype == np.int64
    assert np.array_equal(E_v, slow_count(rows, width, height, polarity))
    if polarity == "count":
        assert E_v.sum() == len(rows)


@pytest.mark.parametrize("p", [[0, 1, 1, 0], [-1, 1, 1, -1], [False, True, True, False], [0.0, 1.0, 1.0, 0.0]])
def test_polarities_mean_the_same_however_stored(p):
    events = Events(x=ROWS["x"], y=ROWS["y"], t=ROWS["t"], p=np.array(p)).align((6, 3))
    assert np.array_equal(events.accumulate("signed"), slow_count(ROWS, 6, 3, "signed"))


@given(recordings(min_size=2), st.randoms(use_true_random=False))
def test_event_order_does_not_matter_and_nothing_is_written_to(recording, random):
    rows, size = recording
    shuffled = rows[random.sample(range(len(rows)), len(rows))]
    before = shuffled.copy()
    shuffled.flags.writeable = False
    assert np.array_equal(count(shuffled, *size), count(rows, *size))
    assert np.array_equal(shuffled, before)


@pytest.mark.parametrize("polarity", ["count", "signed"])
def test_many_events_are_added_up_in_pieces(polarity):
    """600,000 events on 3 x 6 pixels: more than one piece."""
    rng, rows = np.random.default_rng(0), np.zeros(600_000, XYTP)
    for name, values in (("x", 6), ("y", 3), ("p", 2)):
        rows[name] = rng.integers(0, values, len(rows))
    expected = np.zeros((3, 6), dtype=np.int64)
    np.add.at(expected, (rows["y"], rows["x"]), 1 if polarity == "count" else 2 * rows["p"] - 1)
    assert np.array_equal(count(rows, 6, 3, polarity), expected)


def test_counts_do_not_overflow():
    """40,000 events on one pixel are more than int16 holds; with uint8 coordinates y * width would wrap at 256."""
    rows = np.zeros(40_000, dtype=[("x", "u1"), ("y", "u1"), ("t", "i8"), ("p", "?")])
    rows["x"], rows["y"] = 200, 150
    E_v = count(rows, 240, 180)
    assert E_v[150, 200] == 40_000 == E_v.sum()
    assert count(rows, 240, 180, "signed")[150, 200] == -40_000


# Hot pixels


def mend_alone(E_v):
    return mend(E_v, is_hot(np.abs(E_v, dtype=float)))


@given(hot_maps(), st.sampled_from(["i8", "i1", "u1", "?", "f4"]))
def test_mending_is_the_loop(E_v, dtype):
    """Of a map of any type; it is not written to."""
    E_v = E_v.astype(dtype) if dtype != "u1" else np.abs(E_v).astype(dtype)
    expected = oracles.mend(E_v.astype(float))
    E_v.flags.writeable = False
    assert np.array_equal(mend_alone(E_v), expected)


@given(hot_maps())
def test_mending_lowers_what_is_hot_and_nothing_else(E_v):
    mended, count = mend_alone(E_v), np.abs(E_v)
    hot = count > 10 * np.median(count[count > 0]) if count.any() else count > 0
    assert np.array_equal(mended[~hot], E_v[~hot])
    assert (np.abs(mended) <= count).all() and (mended * E_v >= 0).all()


@pytest.mark.parametrize(
    "E_v, expected",
    [
        ([[2, 1, 0], [1, -99, 3], [0, 2, 1]], [[2, 1, 0], [1, -3, 3], [0, 2, 1]]),  # the largest around it, its sign
        ([[1, 10, 1], [1, 1, 1]], [[1, 10, 1], [1, 1, 1]]),  # not over 10 times the median
        ([[1, 11, 1], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]]),
        ([[99, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], [[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]),  # silent neighbours
        ([[50, -80, 1, 1, 1]], [[50, -50, 1, 1, 1]]),  # of two that are hot the busier
        ([[0, 0], [0, 0]], [[0, 0], [0, 0]]),
        ([[7]], [[7]]),
    ],
)
def test_mending_examples(E_v, expected):
    with warnings.catch_warnings(action="error"):
        assert mend_alone(np.array(E_v)).tolist() == expected


@pytest.mark.parametrize("polarity", ["count", "signed"])
def test_hot_pixels_are_mended_where_events_are_accumulated(polarity):
    counts = np.ones((30, 40), dtype=int)
    counts[20, 10], counts[5, 5:8] = 2000, 3
    rows = np.concatenate([fired(counts), fired(counts[:9], p=1)])
    aligned, expected = read_events(rows).align((40, 30)), slow_count(rows, 40, 30, polarity)
    with warnings.catch_warnings(action="error"):
        (mended,) = event_maps([aligned], polarity, "mend")[0]
    expected[20, 10] = 1 if polarity == "count" else -1
    assert np.array_equal(mended, expected)
    assert np.array_equal(next(event_maps([EventMap(counts)], polarity, "mend")[0]), mend_alone(counts))
    with pytest.warns(UserWarning, match="the event map: 20 pixels hold"):
        assert np.array_equal(next(event_maps([EventMap(counts)], polarity, "keep")[0]), counts)


def test_hot_pixels_of_a_clip_are_those_of_all_moments_together():
    """In a short window the others have an event or none, and one of ten times as many stands out everywhere."""
    counts = np.ones((30, 40), dtype=int)
    counts[20, 10] = 15
    moments = [read_events(fired(counts)).align((40, 30)) for _ in range(3)]
    counts[4, 4], counts[20, 10] = 40, 1  # 42 in all, where the others have 3
    moments[1] = read_events(fired(counts)).align((40, 30))
    mended = list(event_maps(moments, "count", "mend")[0])
    assert [E_v[20, 10] for E_v in mended] == [1, 1, 1] and [E_v[4, 4] for E_v in mended] == [1, 1, 1]
    with pytest.warns(UserWarning) as caught:
        counts[7, 7] = 10**5
        for _ in event_maps([read_events(fired(counts)).align((40, 30))] * 3, "signed", "keep")[0]:
            pass
    assert len(caught) == 1


@pytest.mark.parametrize("polarity", ["count", "signed"])
@pytest.mark.parametrize("busiest, total, warns", [(251, 1000, True), (250, 1000, False), (251, 999, False)])
def test_twenty_pixels_over_a_quarter_of_a_thousand_events_warn(polarity, busiest, total, warns):
    """The 20 are spread over the sensor and hold 12 or 13 events each, others none or one."""
    pixels = np.random.default_rng(0).permutation(40 * 30)
    counts = np.zeros(40 * 30, dtype=int)
    counts[pixels[:20]] = busiest // 20
    counts[pixels[: busiest % 20]] += 1
    counts[pixels[20 : 20 + total - busiest]] = 1
    aligned = read_events(fired(counts.reshape(30, 40))).align((40, 30))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (E_v,) = event_maps([aligned], polarity, "keep")[0]
        event_maps([aligned], polarity, "mend")
    assert [str(warning.message) for warning in caught] == [
        "the events: 20 pixels hold over a quarter of the events; if they are hot, give hot_pixels mend"
    ] * warns
    assert np.array_equal(np.abs(E_v).ravel(), counts)


@pytest.mark.parametrize("width, height", [(1, 1), (19, 1), (4, 5)])
def test_a_sensor_of_at_most_twenty_pixels_warns_and_is_counted(width, height):
    counts = np.full((height, width), 1000)
    aligned = read_events(fired(counts)).align((width, height), (width, height))
    with pytest.warns(UserWarning, match="20 pixels hold over a quarter"):
        assert np.array_equal(next(event_maps([aligned], "count", "keep")[0]), counts)


# Resizing


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=st.integers(-5, 10**6)),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_resizing_is_weighted_by_area_and_exact(E_v, height, width):
    resized, unit = resize(E_v, height, width), height * width
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


def test_small_dtypes_of_a_map_do_not_overflow():
    resized = resize(np.full((2, 2), 200, np.uint8), 3, 3)
    assert resized.dtype == np.float64 and resized.tolist() == [[800.0] * 3] * 3


# Eq. 5


@given(hnp.arrays(np.float64, cells(CLIP), elements=st.integers(-9, 9)), st.integers(1, 3))
def test_eq5(cells, side):
    """Eq. 5 is the L1 norm of each cell: signs do not cancel, and moments stay apart."""
    E_v = np.kron(cells, np.ones((1, side, side)))
    assert np.array_equal(motion(E_v, side), np.abs(cells) * side * side)
    E_v[0, 0, 0] -= 100
    S = motion(E_v, side)
    assert S[0, 0, 0] == abs(cells[0, 0, 0] - 100) + abs(cells[0, 0, 0]) * (side * side - 1)
    assert np.array_equal(S.ravel()[1:], np.abs(cells).ravel()[1:] * side * side)


@given(recordings(min_size=1), st.integers(1, 3), st.integers(1, 3), st.data())
def test_a_moved_event_changes_only_the_cells_it_left_and_entered(recording, cells_h, cells_w, data):
    rows, (width, height) = recording
    moved, n = rows.copy(), data.draw(st.integers(0, len(rows) - 1))
    moved["x"][n], moved["y"][n] = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    maps = (resize(count(r, width, height), 28 * cells_h, 28 * cells_w) for r in (rows, moved))
    S, S_moved = (motion(E_v[None], 28)[0] for E_v in maps)
    touched = np.zeros((cells_h, cells_w), dtype=bool)
    for row in (rows[n], moved[n]):  # the cells a pixel overlaps, its area being stretched over them
        u = slice(int(row["y"]) * cells_h // height, -(-(int(row["y"]) + 1) * cells_h // height))
        v = slice(int(row["x"]) * cells_w // width, -(-(int(row["x"]) + 1) * cells_w // width))
        touched[u, v] = True
    assert np.array_equal(S[~touched], S_moved[~touched])
    assert S.sum() == S_moved.sum()


# Eq. 6


@given(untied_motions(), st.integers(0, 999))
def test_eq6(S, thousandths):
    """Without ties both masks are Eq. 6, S >= its interpolated quantile; the next cell below is 0.001 off at least."""
    sparsity = thousandths / 1000
    printed = S >= np.quantile(S, sparsity) - 1e-6
    assert np.array_equal(literal_mask(S, 1 - sparsity), printed)
    assert np.array_equal(budget_mask(S, 1 - sparsity), printed)


@given(motions(), SPARSITIES)
def test_the_exact_mask_keeps_the_budget_and_the_most_motion(S, sparsity):
    mask = budget_mask(S, 1 - sparsity)
    assert mask.shape == S.shape and mask.dtype == bool
    assert mask.sum() == budget(S.size, 1 - sparsity) == S.size - math.ceil(round(sparsity * (S.size - 1), 9)) >= 1
    if not mask.all():
        assert S[mask].min() >= S[~mask].max()


@given(motions(), SPARSITIES)
def test_the_literal_mask_keeps_all_ties(S, sparsity):
    mask = literal_mask(S, 1 - sparsity)
    assert not (budget_mask(S, 1 - sparsity) & ~mask).any()
    if not mask.all():
        assert S[mask].min() > S[~mask].max()
    if (S == 0).mean() > sparsity + 1 / S.size:
        assert mask.all()  # what the exact budget is for


@given(motions(), SPARSITIES, SPARSITIES)
def test_more_sparsity_keeps_a_subset(S, one, other):
    less, more = sorted((one, other))
    for rule in RULES.values():
        assert not (rule(S, 1 - more) & ~rule(S, 1 - less)).any()


@given(motions(), SPARSITIES, st.integers(1, 1000))
def test_a_common_scale_changes_no_mask(S, sparsity, scale):
    assert np.array_equal(budget_mask(S, 1 - sparsity), budget_mask(S * scale, 1 - sparsity))


def test_the_budget_is_not_off_by_rounding():
    S = np.arange(11.0).reshape(1, 1, 11)  # 0.7 * 10 is 7, but (1 - (1 - 0.7)) * 10 is not
    for sparsity in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9):
        kept = 11 - round(sparsity * 10)
        assert budget(11, 1 - sparsity) == kept
        assert budget_mask(S, 1 - sparsity).sum() == literal_mask(S, 1 - sparsity).sum() == kept


@given(st.integers(1, 3), st.integers(8, 40), st.integers(8, 40), st.floats(0.05, 1))
def test_ties_are_broken_evenly(T, cells_h, cells_w, tau):
    """Of an empty map, any part of the grid keeps about its share, within the grain of a 4 x 4 Bayer matrix, and any
    moment as much as another, but for a row and a column that an odd grid has more of one kind than of the other."""
    mask = budget_mask(np.zeros((T, cells_h, cells_w)), tau)
    kept = mask.sum(axis=(1, 2))
    assert kept.max() - kept.min() <= 1 + (cells_h % 2) * cells_w + (cells_w % 2) * cells_h
    for u in (0, cells_h - cells_h // 8 * 4):
        for v in (0, cells_w - cells_w // 8 * 4):
            part = mask[:, u : u + cells_h // 8 * 4, v : v + cells_w // 8 * 4]
            assert abs(part.mean() - mask.mean()) <= 0.25


@given(cells(CLIP))
def test_spread_order_ranks_each_cell_of_a_moment_differently(shape):
    order = spread_order(*shape)
    assert order.shape == shape and order.dtype == np.int64
    assert all(len(np.unique(moment)) == moment.size for moment in order)


def test_ties_show_other_places_from_moment_to_moment():
    """A quarter of each of four moments shows every place; without the shift it would be the same quarter each time."""
    assert budget_mask(np.zeros((4, 16, 16)), 0.25).any(axis=0).all()


def test_spread_order_example():
    assert spread_order(1, 2, 2).tolist() == [[[0, 2], [3, 1]]]


# A rule that covers


def tau_of(cells: int, keep: int) -> float:
    """A tau whose budget is `keep` of the cells."""
    tau = 1 - (cells - keep) / max(cells - 1, 1)
    assert budget(cells, tau) == keep
    return tau


@given(worths(), st.data())
def test_the_mask_that_covers_is_the_loop(w, data):
    keep = data.draw(st.integers(1, w.size))
    mask = cover_mask(w, tau_of(w.size, keep))
    assert mask.shape == w.shape and mask.dtype == bool
    assert np.array_equal(mask, oracles.cover(w, keep))


@given(st.integers(2, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1), st.data())
def test_the_mask_that_covers_a_clip_is_the_loop(T, cells_h, cells_w, seed, data):
    """No cells are equal: in two moments they may have one rank, and rounding would decide."""
    w = np.random.default_rng(seed).random((T, cells_h, cells_w))
    keep = data.draw(st.integers(1, w.size))
    assert np.array_equal(cover_mask(w, tau_of(w.size, keep)), oracles.cover(w, keep))


@given(worths(CLIP), SPARSITIES)
def test_the_mask_that_covers_keeps_the_budget_and_writes_to_nothing(w, sparsity):
    before = w.copy()
    mask = cover_mask(w, 1 - sparsity)
    assert mask.sum() == budget(w.size, 1 - sparsity) and np.array_equal(w, before)
    w.flags.writeable = False
    assert np.array_equal(cover_mask(w, 1 - sparsity), mask)


def test_covering_example():
    w = np.array([[[3.0, 2, 0, 2]]])
    kept = [cover_mask(w, tau_of(4, keep))[0, 0].nonzero()[0].tolist() for keep in (1, 2, 3, 4)]
    assert kept == [[0], [0, 3], [0, 1, 3], [0, 1, 2, 3]]


@given(st.integers(8, 12), st.integers(8, 12), st.floats(0.45, 0.95), st.data())
def test_of_two_equal_neighbours_the_second_waits_for_what_is_unexplained(cells_h, cells_w, less, data):
    """Neighbours in a row, in a column, or in time: what was kept just before is explained. Eq. 6 keeps both first. Far
    from them is a cell of less worth, which covering keeps instead of the second."""
    S = np.zeros((3, cells_h, cells_w))
    step = np.array(data.draw(st.sampled_from([(0, 0, 1), (0, 1, 0), (1, 0, 0)])))
    first = np.array([data.draw(st.integers(0, side - 1 - by)) for side, by in zip(S.shape, step, strict=True)])
    pair = [tuple(at.tolist()) for at in (first, first + step)]
    away = [at for at in np.ndindex(S.shape) if min(math.dist(at[1:], one[1:]) for one in pair) >= 4]
    far = data.draw(st.sampled_from(away))
    for at, value in zip((*pair, far), (1, 1, less), strict=True):
        S[at] = value
    tau = tau_of(S.size, 2)
    assert {tuple(at) for at in np.argwhere(budget_mask(S, tau)).tolist()} == set(pair)
    one, other = (tuple(at) for at in np.argwhere(cover_mask(S, tau)).tolist())
    assert far in (one, other) and ({one, other} - {far}) < set(pair)
    assert cover_mask(S, tau_of(S.size, 3))[tuple(zip(*pair, strict=True))].all()


@given(worths(), SPARSITIES, st.sampled_from([2.0**-60, 3, 1000, 2.0**60]))
def test_a_common_scale_changes_nothing_of_what_covers(w, sparsity, scale):
    assert np.array_equal(cover_mask(w * scale, 1 - sparsity), cover_mask(w, 1 - sparsity))


def novelties(X_v: np.ndarray, side: int) -> np.ndarray:
    """G of a clip, of which X_v (T, H, W, 3) has a frame for each moment."""
    return np.stack([novelty(frame, before, side) for frame, before in zip(X_v, [None, *X_v[:-1]], strict=True)])


@given(images())
def test_novelty_is_the_loop(image):
    X_v, side = image
    before = X_v.copy()
    X_v.flags.writeable = False
    assert novelties(X_v, side).tolist() == oracles.novelty(before, side).tolist()


@pytest.mark.parametrize("shade", [0, GREY - 1, GREY, 255])
def test_of_one_colour_only_the_first_cell_can_be_new(shade):
    G = novelties(np.full((2, 84, 56, 3), shade, np.uint8), 28)
    expected = np.zeros((2, 3, 2))
    expected[0, 0, 0] = abs(shade - 128) * 28 * 28 * 3
    assert np.array_equal(G, expected)


@pytest.mark.parametrize("inside, around", [(0, 255), (255, 0)])
def test_differences_of_uint8_do_not_wrap(inside, around):
    X_v = np.full((1, 42, 42, 3), around, np.uint8)
    X_v[:, 14:28, 14:28] = inside
    assert novelties(X_v, 14)[0].tolist() == [
        [(127 if around else 128) * 588, 0, 0],
        [0, 255 * 588, 0],  # the cell after it has one like itself above it
        [0, 0, 0],
    ]


@given(images(), st.data())
def test_a_cell_like_its_left_or_upper_neighbour_is_not_new(image, data):
    X_v, side = image
    T, rows, columns = X_v.shape[0], X_v.shape[1] // side, X_v.shape[2] // side
    places = [(r, c, *step) for r, c in np.ndindex(rows, columns) for step in ((0, 1), (1, 0))]
    places = [(r, c, down, right) for r, c, down, right in places if r >= down and c >= right]
    if places:
        row, column, down, right = data.draw(st.sampled_from(places))
        cells = X_v.reshape(T, rows, side, columns, side, 3)
        cells[:, row, :, column] = cells[:, row - down, :, column - right]
        assert (novelties(X_v, side)[:, row, column] == 0).all()


def test_worth_example():
    S, G = np.array([[[0.0, 4]]]), np.array([[[3, 1]]], dtype=np.uint64)
    expected = [RHO + 1.5 * BETA, RHO + 2 * ALPHA + 0.5 * BETA]
    assert worth(S, G).dtype == np.float64 and worth(S, G)[0, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("novel", [True, False])
@pytest.mark.parametrize("moving", [True, False, None])
def test_each_term_of_worth_has_its_share_whatever_its_unit(moving, novel):
    """On average; a term that is zero everywhere, or without events, is left out."""
    rng = np.random.default_rng(0)
    S = None if moving is None else moving * 28.0**2 * rng.integers(0, 99, (2, 3, 4))
    G = novel * rng.integers(0, 10**6, (2, 3, 4)).astype(np.uint64)
    with warnings.catch_warnings(action="error"):
        w = worth(S, G)
    assert w.shape == (2, 3, 4) and w.dtype == np.float64
    assert w.mean() == pytest.approx(RHO + ALPHA * bool(moving) + BETA * novel)
    assert (w == RHO).all() == (not moving and not novel) and w.min() >= RHO > 0
    if moving:
        assert np.allclose(worth(1000 * S, G), w)
    if novel:
        assert np.allclose(worth(S, G * np.uint64(1000)), w)


def test_the_real_recording(data):
    """6,957 events lie in the 20 ms around frame 2, counted here from the text file the array was made of."""
    folder = data / "recordings" / "slider_depth"
    text = np.loadtxt(folder / "events_chunk.txt")
    chosen = text[(text[:, 0] >= 0.0675) & (text[:, 0] <= 0.0875)]
    expected = slow_count(rows_of(*map(tuple, chosen[:, [1, 2, 0, 3]])), 240, 180)
    for events in (read_events(folder / "events_xypt_us.npy"), read_events(text, time_unit="s")):  # t x y p: found
        shown = events.align((240, 180)).cut(np.array((67500, 87500)))[0]
        assert len(shown) == len(chosen) == 6957 and summary([shown]) == "6957 events in 20.0 ms"
        assert np.array_equal(shown.accumulate(), expected)
