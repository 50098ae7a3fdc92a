"""Recordings of every kind, made here or real, against what they hold; windows, units, and what is refused."""

import io
import json

import faery
import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert
from convert import READ, main
from events import read_events
from strategies import recordings

RNG = np.random.default_rng(0)
COUNT = 3000
T = np.sort(RNG.integers(1000, 200_000, COUNT))
X, Y, P = RNG.integers(0, 34, COUNT), RNG.integers(0, 30, COUNT), RNG.integers(0, 2, COUNT)
ALL, SENSOR = (X, Y, T, P), (64, 48)


def bits(*fields) -> np.ndarray:
    """One word for each event, from (value, lowest bit) of its fields."""
    return sum(np.asarray(value, dtype=np.uint64) << np.uint64(low) for value, low in fields)


def evt2(x, y, t, p, head="% evt 2.0\n") -> bytes:
    """A word for the upper bits of t before each event."""
    words = np.stack([bits((8, 28), (t >> 6, 0)), bits((p, 28), (t & 63, 22), (x, 11), (y, 0))], axis=1)
    return head.encode() + words.astype("<u4").tobytes()


def evt3(x, y, t, p, head="% format EVT3;height=48;width=64\n% geometry 64x48\n% end\n") -> bytes:
    """Upper bits of t, lower bits of t, y, then x with p, for each event."""
    words = [bits((8, 12), (t >> 12, 0)), bits((6, 12), (t & 4095, 0)), bits((y, 0)), bits((2, 12), (p, 11), (x, 0))]
    return head.encode() + np.stack(words, axis=1).astype("<u2").tobytes()


def dat(x, y, t, p, kind=12, head="% Data file containing CD events.\n% Version 2\n% Height 48\n% Width 64\n") -> bytes:
    words = np.stack([t, bits((x, 0), (y, 14), (p, 28))], axis=1).astype("<u4")
    return head.encode() + bytes([kind, 8]) + words.tobytes()


def aedat2(x, y, t, p, chip="ch.unizh.ini.jaer.chip.retina.DVS128") -> bytes:
    """With a signal from outside before the first event."""
    words = np.stack([bits((1 - p, 0), (127 - x, 1), (127 - y, 8)), t], axis=1)
    words = np.concatenate([np.array([[2**15, 0]], dtype=words.dtype), words])
    return f"#!AER-DAT2.0\r\n# AEChip: {chip}\r\n".encode() + words.astype(">u4").tobytes()


def nmnist(x, y, t, p) -> bytes:
    """Its clock gets 2**13 us twice, at an event with y = 240, the second time at the end."""
    half = len(t) // 2
    late = t - np.where(np.arange(len(t)) < half, 0, 2**13)
    rows = np.stack([x, y, p << 7 | late >> 16, late >> 8 & 255, late & 255], axis=1).astype(np.uint8)
    wrap = np.array([[0, 240, 0, 0, 0]], dtype=np.uint8)
    wrap[0, 2:] = rows[half, 2:] & [127, 255, 255]
    return np.concatenate([rows[:half], wrap, rows[half:]]).tobytes()


def text(*columns, head="", mark=" ", whole=True) -> bytes:
    file = io.StringIO()
    np.savetxt(file, np.stack(columns, axis=1), fmt="%d" if whole else "%.9g", delimiter=mark)
    return (head + file.getvalue()).encode()


def hdf5(change) -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as h5:
        change(h5)
    return file.getvalue()


def group(h5, where: str, *columns, names="xytp", **options) -> None:
    for name, column in zip(names, columns, strict=True):
        h5.create_dataset(f"{where}/{name}", data=column, **options)


def dsec(h5) -> None:
    columns = (X.astype("u2"), Y.astype("u2"), (T - 1000).astype("u4"), P.astype("u1"))
    group(h5, "events", *columns, chunks=(256,), **hdf5plugin.Blosc(cname="zstd"))
    h5["t_offset"], h5["ms_to_idx"] = np.int64(1000), np.zeros(10, dtype="u8")


def m3ed(h5) -> None:
    for camera, x in (("left", X), ("right", X[::-1])):
        group(h5, f"prophesee/{camera}", x.astype("u2"), Y.astype("u2"), T, P.astype("i1"))
    h5["ovc/ts"] = np.arange(3)


def mvsec(h5) -> None:
    for camera, x in (("left", X), ("right", X[::-1])):
        h5[f"davis/{camera}/events"] = np.stack([x, Y, T / 1e6 + 1.5e9, 2 * P - 1], axis=1)
    h5["davis/left/imu"] = np.zeros((9, 6))


def e2vid(h5) -> None:
    group(h5, "events", X.astype("i2"), Y.astype("i2"), T / 1e6, P > 0, names=("xs", "ys", "ts", "ps"))
    h5.attrs["sensor_resolution"] = SENSOR[::-1]


MADE = {  # name: (bytes, sensor)
    "evt2.raw": (evt2(*ALL), None),
    "evt3.raw": (evt3(*ALL), SENSOR),
    "type12.dat": (dat(*ALL), SENSOR),
    "type0.dat": (dat(*ALL, kind=0, head="% Data file containing Event2d events.\n% Version 2\n"), None),
    "dvs128.aedat": (aedat2(*ALL), (128, 128)),
    "nmnist.bin": (nmnist(X, Y, T + 2**13, P), None),
    "dsec.h5": (hdf5(dsec), None),
    "m3ed.h5": (hdf5(m3ed), None),
    "mvsec.hdf5": (hdf5(mvsec), None),
    "e2vid.h5": (hdf5(e2vid), SENSOR),
    "v2e.h5": (hdf5(lambda h5: h5.create_dataset("events", data=np.stack([T, X, Y, P], 1).astype("u4"))), None),
    "seconds.txt": (text(T / 1e6, X, Y, P, whole=False), None),
    "whole.csv": (text(X, Y, P, T, mark=","), None),
    "sensor.txt": (text(T / 1e6, X, Y, P, head="64 48\n", whole=False), SENSOR),
    "named.csv": (text(P, Y, T, X, np.arange(COUNT), head="polarity,y,timestamp,x,row\n", mark=","), None),
    "hash.txt": (text(T / 1e6, X, Y, P, head="# made\n#  t[s] x y p\n", whole=False), None),
    "metavision.csv": (text(X, Y, P, T, head="% camera EVK4\n", mark=","), None),
    "semicolon.csv": (text(X, Y, T, 2 * P - 1, mark=";", head="\ufeffx;y;t;p\n"), None),
}
SHIFT = {"nmnist.bin": 2**13, "mvsec.hdf5": 1_500_000_000_000_000}  # of the times above


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Writes a file, converts it, and gives the exit status, what stderr says, and the rows written, if any."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, content: bytes, *flags: str):
        (tmp_path / name).write_bytes(content)
        status = main([name, "-o", "out.npy", *flags])
        rows = np.load("out.npy") if (tmp_path / "out.npy").exists() else None
        assert sorted(tmp_path.glob(".*")) == []
        return status, capsys.readouterr().err, rows

    return run


def assert_rows(rows, x, y, t, p) -> None:
    assert rows.dtype == [("x", "<i4"), ("y", "<i4"), ("t", "<i8"), ("p", "u1")]
    for name, column in zip("xytp", (x, y, t, p), strict=True):
        np.testing.assert_array_equal(rows[name], column, err_msg=name)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("piece", [convert.PIECE, 64], ids=["whole", "pieces"])
def test_made(run, monkeypatch, name, piece):
    """Whole and in small pieces, every event arrives, and a window keeps those in it, both ends included."""
    monkeypatch.setattr(convert, "PIECE", piece)
    content, sensor = MADE[name]
    t = T + SHIFT.get(name, 0)
    status, said, rows = run(name, content)
    assert status == 0, said
    assert_rows(rows, X, Y, t, P)
    line = f"wrote {COUNT} events to out.npy: x 0 to 33, y 0 to 29, {t[0]} to {t[-1]} us"
    assert said == line + ("; the sensor is {0} x {1} (--sensor {0}x{1})".format(*sensor) if sensor else "") + "\n"
    start, end = int(t[100]), int(t[150])
    _, said, rows = run(name, content, "--window", f"{start / 1000:.3f}ms", str(end))
    inside = (t >= start) & (t <= end)
    assert_rows(rows, *(column[inside] for column in (X, Y, t, P)))


def test_aedat4(run, tmp_path):
    events = np.zeros(COUNT, dtype=faery.EVENTS_DTYPE)
    events["x"], events["y"], events["t"], events["on"] = X, Y, T, P
    faery.events_stream_from_array(events, dimensions=SENSOR).to_file(tmp_path / "made.aedat4")
    status, said, rows = run("a.aedat4", (tmp_path / "made.aedat4").read_bytes())
    assert status == 0 and said.endswith("; the sensor is 64 x 48 (--sensor 64x48)\n")
    assert_rows(rows, *ALL)


@given(recordings(min_size=1), st.sampled_from([dat, aedat2, lambda x, y, t, p: text(t, x, y, p, head="t x y p\n")]))
def test_any_recording(tmp_path, recording, encode):
    columns = [recording[0][name].astype(np.int64) for name in "xytp"]
    (tmp_path / "a").write_bytes(encode(*columns))
    assert main([str(tmp_path / "a"), "-o", str(tmp_path / "out.npy")]) == 0
    assert_rows(np.load(tmp_path / "out.npy"), *columns)


TRUE = (
    "evt2_sparklers.raw evt3.raw evt3_pedestrians.raw evk4_evt3.raw ncars.dat gen1_td.dat nmnist.bin dvs128.aedat"
    " davis.aedat4 dsec_like_events.h5 mvsec_like.hdf5 m3ed_like.h5 v2e_like.h5 e2vid_like.h5"
)


@pytest.mark.parametrize("name", TRUE.split())
def test_real(data, tmp_path, name):
    """Real files hold what independent decoders read; times of EVT3 within 20 us."""
    folder = data / "recordings" / "formats"
    truth = json.loads((folder / "truth.json").read_text())
    assert set(truth) == set(TRUE.split())
    assert main([str(folder / name), "-o", str(tmp_path / "out.npy")]) == 0
    rows, true = np.load(tmp_path / "out.npy"), truth[name]
    t, near = rows["t"], 20 if "evt3" in name else 0
    for axis in "xy":
        assert [rows[axis].min(), rows[axis].max(), rows[axis].sum()] == true[axis]
    assert (len(rows), np.count_nonzero(rows["p"])) == (true["events"], true["on"])
    assert np.abs(t[[0, -1]] - true["t_us"]).max() <= near
    assert abs((t - t[0]).sum() - true["t_sum_minus_first"]) <= near * len(rows)
    assert len(read_events(tmp_path / "out.npy")) == len(rows)


def test_real_text(data, tmp_path):
    folder = data / "recordings"
    assert main([str(folder / "slider_depth" / "events_chunk.txt"), "-o", str(tmp_path / "out.npy")]) == 0
    rows, true = np.load(tmp_path / "out.npy"), np.load(folder / "slider_depth" / "events_xypt_us.npy")
    assert_rows(rows, *(true[name] for name in "xytp"))
    assert main([str(folder / "formats" / "sample.csv"), "-o", str(tmp_path / "out.npy")]) == 0
    assert_rows(np.load(tmp_path / "out.npy"), *[np.arange(100)] * 3, 0)


@pytest.mark.parametrize("name", ["evt21.raw", "pickled_dict.npy", "pickled_bins.npz", "cam_to_cam.yaml"])
def test_real_refused(data, tmp_path, capsys, name):
    """EVT2.1 by name, pickles without opening them."""
    assert main([str(data / "recordings" / "formats" / name), "-o", str(tmp_path / "out.npy")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and {"e": "EVT2.1", "p": "pickle", "c": READ}[name[0]] in said


@pytest.mark.parametrize("unit, scale", [("s", 10**6), ("ms", 1000), ("us", 1)])
def test_time_unit(run, unit, scale):
    """Whole numbers and fractions in the unit that is given; ns are rounded."""
    t = np.arange(COUNT)
    _, _, rows = run("a.txt", text(t, X, Y, P), "--time-unit", unit)
    assert_rows(rows, X, Y, t * scale, P)
    h5 = hdf5(lambda h5: group(h5, "events", X, Y, t / 4, P))
    _, _, rows = run("a.h5", h5, "--time-unit", unit, "--window", "0", f"{scale * 10}")
    inside = (whole := np.rint(t * scale / 4)) <= scale * 10
    assert_rows(rows, *(column[inside] for column in (X, Y, whole, P)))
    _, _, rows = run("a.h5", hdf5(lambda h5: group(h5, "events", X, Y, t * 1000 + 600, P)), "--time-unit", "ns")
    assert_rows(rows, X, Y, t + 1, P)


@pytest.mark.parametrize("t, offset, shift", [(T / 1e6, 5, 5 * 10**6), (T, 5.0, 5), (T.astype("u8"), 2**40, 2**40)])
def test_offset(run, t, offset, shift):
    """t_offset is in the unit of t, also of seconds, with a named type beside."""

    def change(h5):
        group(h5, "events", X, Y, t, P)
        h5["t_offset"], h5["kind"] = offset, np.dtype("i4")

    _, _, rows = run("a.h5", hdf5(change))
    assert_rows(rows, X, Y, T + shift, P)


def test_text_of_whole_seconds_under_a_comment_of_numbers(run):
    rows = run("a.txt", b"# 9 9 9 1\n1.0 3 4 1\n2.0 5 6 0\n")[2]
    assert_rows(rows, [3, 5], [4, 6], [10**6, 2 * 10**6], [1, 0])


def test_a_name_that_holds_the_other_cameras(run):
    content = hdf5(lambda h5: group(h5, "copyright/events", *ALL))
    assert_rows(run("a.h5", content)[2], *ALL)


def test_a_whole_file_may_be_in_disorder(run):
    assert_rows(run("a.h5", hdf5(lambda h5: group(h5, "events", X, Y, T[::-1], P)))[2], X, Y, T[::-1], P)


def test_order_and_camera(run):
    _, _, rows = run("a.txt", text(P, Y, X, T), "--order", "pyxt")
    assert_rows(rows, *ALL)
    table = np.stack([P, T, Y, X], axis=1)
    _, _, rows = run("a.h5", hdf5(lambda h5: h5.create_dataset("events", data=table)), "--order", "ptyx")
    assert_rows(rows, *ALL)
    for name in ("m3ed.h5", "mvsec.hdf5"):
        _, _, rows = run(name, MADE[name][0], "--camera", "right")
        assert_rows(rows, X[::-1], Y, T + SHIFT.get(name, 0), P)


MAP = b"\x93NUMPY\1\0\x3a\0{'descr': '<i4', 'fortran_order': False, 'shape': (1, 1)}\n\0\0\0\0"
REFUSED = {
    "empty.raw": (b"", (), "no such file, or an empty one"),
    "unknown.xyz": (bytes(range(256)), (), READ),
    "words.txt": (b"a recording of events\n", (), READ),
    "aedat3.aedat": (b"#!AER-DAT3.1\r\n\x00\x01", (), READ),
    "evt21.raw": (b"% evt 2.1\n% end\n" + bytes(80), (), "not EVT2.1; convert it with"),
    "evt21b.raw": (b"% integrator Prophesee\n% format EVT21;height=48;width=64\n", (), "not EVT2.1; convert it with"),
    "bare.raw": (evt2(*ALL, head=""), (), READ),
    "wide.raw": (evt3(X + 64, Y, T, P), (), "x overflow"),
    "none.raw": (b"% evt 3.0\n% end\n", (), "holds no event"),
    "cut.dat": (dat(*ALL)[:-3], (), "cut short"),
    "cut.aedat": (aedat2(*ALL)[:-3], (), "cut short"),
    "cut.bin": (nmnist(*ALL)[:-3], (), "cut short"),
    "cut.h5": (hdf5(dsec)[:-999], (), "cut short"),
    "cut.txt": (text(T, X, Y, P) + b"200001 3", (), "cut short"),
    "trigger.dat": (dat(*ALL, kind=14), (), "type 0 or 12"),
    "old.dat": (dat(*ALL, head="% Data file\n% Version 1\n"), (), "version 2; no others"),
    "davis.aedat": (aedat2(*ALL, chip="eu.seebetter.ini.chips.davis.Davis240C"), (), "not of a DVS128"),
    "noise.bin": (RNG.bytes(5000), (), "times are in disorder"),
    "no.h5": (hdf5(lambda h5: h5.create_dataset("image", data=X)), (), "0 recordings of the left camera in /, /image"),
    "left.h5": (hdf5(lambda h5: group(h5, "dvs/left", *ALL)), ("--camera", "right"), "give --camera"),
    "two.h5": (hdf5(lambda h5: [group(h5, name, *ALL) for name in "ab"]), (), "holds 2 recordings"),
    "nan.h5": (hdf5(lambda h5: group(h5, "events", X, Y, T * np.nan, P)), (), "times that are no numbers"),
    "disorder.h5": (hdf5(lambda h5: group(h5, "events", X, Y, T[::-1], P)), ("--window", "0", "9999"), "in disorder"),
    "short.h5": (hdf5(lambda h5: group(h5, "events", X[:-1], Y, T, P)), (), "x has 2999 values"),
    "images.txt": (b"0.003811000 images/frame_0.png\n0.1 images/frame_1.png\n", (), "no row of four numbers"),
    "three.txt": (text(T, X, Y), (), "no row of four numbers"),
    "order.txt": (text(Y, X, T % 7, P * 3), (), "give order"),
    "polarity.txt": (text(T, X, Y, P), ("--order", "xytp"), "x goes up to"),
    "scaled.txt": (text(T, X * 320, Y, P), (), "no sensor has so many pixels"),
    "late.dat": (dat(*ALL), ("--window", "1s", "2e6"), f"from 1000000 to 2000000 us, it goes from {T[0]} to {T[-1]}"),
    "late.h5": (hdf5(dsec), ("--window", "1s", "2e6"), f"from 1000000 to 2000000 us, it goes from {T[0]} to {T[-1]}"),
    "back.dat": (dat(*ALL), ("--window", "2", "1"), "window: give a start and a later end"),
    "pickle.npy": (b"\x80\x04.", (), "says how to convert a pickle"),
    "good.npy": (MAP, (), "needs no conversion; give it to epvlm.py"),
    "same.npy": (dat(*ALL), ("-o", "same.npy"), "one of the inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(run, name):
    content, flags, words = REFUSED[name]
    status, said, rows = run(name, content, *flags)
    assert status == 2 and rows is None and said.count("\n") == 1 and words in said, said


@pytest.mark.parametrize("name", [name for name in MADE if not name.endswith(("raw", "csv", "txt"))])
def test_damaged(run, name):
    """Of a file that is cut or changed anywhere, it writes what it can read, or says in one line why it cannot."""
    rng, content = np.random.default_rng(0), MADE[name][0]
    for case in range(40):
        damaged = bytearray(content[: rng.integers(len(content)) if case % 2 else None])
        for place in rng.integers(len(damaged) or 1, size=10 if damaged else 0):
            damaged[place] = rng.integers(256)
        status, said, _ = run(name, bytes(damaged))
        assert said.count("\n") == 1 and said.startswith(("wrote", "convert: error: ")[status // 2]), said


@pytest.mark.parametrize(
    "program, words",
    [
        ("import os; os.abort()", "cannot be read (faery failed); it may be damaged"),
        ("import sys; sys.stdout.buffer.write(b'64 48\\n' + bytes(130)); raise SystemExit('panicked')", "(panicked)"),
        ("import no_such_package", "needs faery; pip install -r examples/requirements-convert.txt"),
    ],
    ids=["crash", "late", "missing"],
)
def test_library_in_a_process_of_its_own(run, monkeypatch, program, words):
    monkeypatch.setattr(convert, "FAERY", program)
    status, said, rows = run("a.raw", MADE["evt2.raw"][0])
    assert status == 2 and rows is None and said.count("\n") == 1 and words in said, said


@pytest.mark.parametrize("package", ["h5py", "hdf5plugin"])
def test_missing_package(run, monkeypatch, package):
    content, _ = MADE["dsec.h5"]
    monkeypatch.setitem(convert.sys.modules, package, None)
    status, said, _ = run("a.h5", content)
    assert status == 2
    assert said == f"convert: error: a.h5: needs {package}; pip install -r examples/requirements-convert.txt\n"


def test_most(run, monkeypatch):
    monkeypatch.setattr(convert, "MOST", 100)
    status, said, _ = run("a.dat", dat(*ALL))
    assert status == 2 and "holds over 1e+02 events; give a shorter --window" in said
    assert run("a.dat", dat(*ALL), "--window", str(T[10]), str(T[50]))[0] == 0


def test_a_window_that_misses_is_told_the_whole_span(run, monkeypatch):
    """Also if the first piece is past it."""
    monkeypatch.setattr(convert, "PIECE", 64)
    for name in ("type12.dat", "dsec.h5", "hash.txt"):
        status, said, _ = run(name, MADE[name][0], "--window", "0", "5")
        assert status == 2 and f"no event from 0 to 5 us, it goes from {T[0]} to {T[-1]} us" in said


def test_progress_on_a_terminal(run, monkeypatch):
    monkeypatch.setattr(convert.sys.stderr, "isatty", lambda: True, raising=False)
    assert f"\r{COUNT} events\033[K\r" in run("a.dat", dat(*ALL))[1]
