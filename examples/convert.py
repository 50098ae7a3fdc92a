"""From the files that event cameras and data sets come in to the .npy that epvlm.py reads. Times are microseconds on
the recording's clock, for DSEC with t_offset added. A short window needs little memory.

    python examples/convert.py recording.raw -o events.npy --window 2s 2.05s
    python examples/convert.py events.h5 -o events.npy --rectify rectify_map.h5 --calibration cam_to_cam.yaml
"""

import argparse
import re
import subprocess
import sys
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from common import Parser, check_output, exit_status, reading, save_events, warnings_as_lines
from dsec import OTHER, Rectification, read_rectification
from epvlm import ORDERS, Options, microseconds, window_of
from events import LAYOUTS, MICROSECONDS, NAMES, Events, check_events, find_order, fractions, load, need

PIECE, MOST, EVER = 2**20, 10**8, (-np.inf, np.inf)  # events read at once, and written; the whole recording
READ = "Prophesee .raw (EVT2, EVT3) and .dat, .aedat4, .aedat (AEDAT 2), N-MNIST .bin, HDF5, and text in columns"
FAERY = """import sys, faery
stream = faery.events_stream_from_file(sys.argv[1], file_type=sys.argv[2], dimensions_fallback=(2048, 2048))
sys.stdout.buffer.write(b"%d %d\\n" % stream.dimensions())
sys.stdout.buffer.writelines(packet.tobytes() for packet in stream)"""


def find_reader(path: Path) -> Callable[[Path, argparse.Namespace], Iterator[Events]]:
    """Tells the kind of a file from its first bytes; a .bin has only its name."""
    need(path.is_file() and path.stat().st_size > 0, f"{path}: no such file, or an empty one; give a recording")
    with path.open("rb") as file:
        head = file.read(2**14)
    if head.startswith((b"\x93NUMPY", b"PK", b"\x80")):
        load(path)  # says what is wrong with a pickle
        raise ValueError(f"{path}: needs no conversion; give it to epvlm.py")
    version = re.match(rb"(?:%.*\n)*?% (?:evt |format EVT)(\d)\.?([1-9]?)", head)
    known = version is None or version[1] + version[2] in (b"2", b"3")
    need(known, f"{path}: EVT2 and EVT3 are read, not EVT2.1; convert it with OpenEB's metavision_file_to_dat")
    kinds = {
        read_hdf5: head.startswith(b"\x89HDF\r\n\x1a\n"),
        (lambda path, args: by_faery(path, "evt")): version,
        (lambda path, args: by_faery(path, "aedat")): head.startswith(b"#!AER-DAT4"),
        read_dat: head.startswith(b"% Data file"),
        read_aedat2: head.startswith(b"#!AER-DAT2"),
        read_bin: path.suffix.lower() == ".bin",
        read_text: head[:2] != b"#!" and re.fullmatch(rb"[\t\n\r -~\x80-\xff]*", head),
    }
    need(any(kinds.values()), f"{path}: is none of the kinds that are read: {READ}")
    return next(reader for reader, fits in kinds.items() if fits)


def records(file, kinds: list) -> Iterator[np.ndarray]:
    """The rest of a binary file, in structured arrays. Raises ValueError where it ends within a record."""
    dtype = np.dtype(kinds)
    while data := file.read(PIECE * dtype.itemsize):
        yield np.frombuffer(data, dtype)


def by_faery(path: Path, kind: str) -> Iterator[Events]:
    """EVT2, EVT3 (times up to 11 us off) and AEDAT 4. Of its own process, since a broken file can make faery abort."""
    command = [sys.executable, "-P", "-c", FAERY, str(path), kind]
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as child:
        sensor = tuple(map(int, child.stdout.readline().split()))
        for rows in records(child.stdout, [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("p", "u1")]):
            yield Events(*(rows[name] for name in "xytp"), str(path), None if sensor == (2048, 2048) else sensor)
        if child.wait():
            said.seek(0)
            reason = " ".join(said.read().decode(errors="replace").splitlines()[-1:]) or "faery failed"
            raise ImportError(reason, name="faery") if "No module named" in reason else RuntimeError(reason)


def read_dat(path: Path, args: argparse.Namespace) -> Iterator[Events]:
    """Prophesee's .dat, event types 0 (N-CARS) and 12: t, then 14 bits of x, 14 of y, and p."""
    with path.open("rb") as file:
        head = re.match(rb"(?:%.*\n)*", file.read(2**14))[0]
        file.seek(len(head))
        fits = file.read(2) in (b"\0\b", b"\x0c\b") and b"% Version 1" not in head
        need(fits, f"{path}: holds no events of type 0 or 12 in 8 bytes, version 2; no others are read")
        sides = [int(n) for side in (b"Width", b"Height") for n in re.findall(rb"% " + side + rb" (\d+)", head)[:1]]
        for rows in records(file, [("t", "<u4"), ("xyp", "<u4")]):
            x, y, p = (rows["xyp"] >> low & mask for low, mask in ((0, 0x3FFF), (14, 0x3FFF), (28, 1)))
            yield Events(x, y, rows["t"], p, str(path), tuple(sides) if len(sides) == 2 else None)


def read_aedat2(path: Path, args: argparse.Namespace) -> Iterator[Events]:
    """AEDAT 2 of a DVS128, whose addresses count x and y from the other end and invert the polarity."""
    with path.open("rb") as file:
        head = re.match(rb"(?:#.*\n)*", file.read(2**20))[0]
        file.seek(len(head))
        other = re.search(rb"AEChip: (?!\S*DVS128)", head)
        for rows in records(file, [("address", ">u4"), ("t", ">i4")]):
            need(not other and rows["address"].max() < 2**16, f"{path}: is not of a DVS128; save it as .aedat4")
            rows = rows[rows["address"] < 2**15]  # the others are signals from outside
            x, y, p = (mask - (rows["address"] >> low & mask) for low, mask in ((1, 127), (8, 127), (0, 1)))
            yield Events(x, y, rows["t"], p, str(path), (128, 128))


def read_bin(path: Path, args: argparse.Namespace) -> Iterator[Events]:
    """N-MNIST's: x, y, then 1 bit of p and 23 of t. Where y is 240, no event, 2**13 us are added from there on."""
    rows = np.frombuffer(path.read_bytes(), [("x", "u1"), ("y", "u1"), ("pt", "u1", 3)])
    pt, wraps = rows["pt"] @ np.array([2**16, 2**8, 1]), rows["y"] == 240
    t = (pt & 0x7FFFFF) + 2**13 * np.cumsum(wraps)
    need(10 * (t[1:] < t[:-1]).sum() <= len(t), f"{path}: its times are in disorder; of .bin only N-MNIST's is read")
    yield Events(*(column[~wraps] for column in (rows["x"], rows["y"], t, pt >> 23)), str(path))


def whole_microseconds(t: np.ndarray, unit: str | None, path: Path, offset=0) -> np.ndarray:
    """Times and an `offset` in `unit`, added, as int64. None: if t are floats, seconds, else microseconds."""
    scale = MICROSECONDS[unit or ("s" if t.dtype.kind == "f" else "us")]
    fine = t.dtype.kind in "iuf" and (not len(t) or -(2**62) < t.min() * scale <= t.max() * scale < 2**62)
    need(fine, f"{path}: holds times that are no numbers, or too large; drop them, or give --time-unit")
    return np.rint(t * scale).astype(np.int64) + np.rint(offset * scale).astype(np.int64)


def pick(names: list[str]) -> list[str]:
    """The names that mean x, y, t and p; none if one is missing or ambiguous."""
    found = [[name for name in names if name.lower() in usual] for usual in NAMES.values()]
    return [each[0] for each in found] if all(len(each) == 1 for each in found) else []


def find_table(node, order: str | None):
    """How to read x, y, t, p of rows a to b from an HDF5 node, and how many there are; None if it is no recording."""
    if hasattr(node, "keys"):
        columns = {key: each for key, each in node.items() if getattr(each, "ndim", 0) == 1}
        keys = pick(list(columns))
        return (lambda a, b: [columns[key][a:b] for key in keys], len(columns[keys[2]])) if keys else None
    if getattr(node, "ndim", 0) == 2 and node.shape[1] == 4 and "event" in node.name.rpartition("/")[2]:
        order = order or find_order(node[:PIECE], f"{node.file.filename}: {node.name}")
        return lambda a, b: node[a:b].T[[order.index(name) for name in "xytp"]], len(node)


def read_hdf5(path: Path, args: argparse.Namespace) -> Iterator[Events]:
    """DSEC, MVSEC, M3ED, v2e, E2VID and the like: x, y, t, p in a group, or N x 4, perhaps for each of two cameras."""
    import hdf5plugin  # noqa: F401, I001 (teaches h5py how DSEC and M3ED are compressed)
    import h5py

    with h5py.File(path) as file:
        nodes, other = [file], OTHER[args.camera]
        file.visititems(lambda name, node: nodes.append(node))
        tables = {node.name: table for node in nodes if (table := find_table(node, args.order))}
        mine = [name for name in tables if other not in name.split("/")]
        told = f"{len(mine)} recordings of the {args.camera} camera in {', '.join(tables or (n.name for n in nodes))}"
        need(len(mine) == 1, f"{path}: holds {told}; give --camera, or a file with x, y, t, p in one group")
        (rows, count), offset = tables[mine[0]], file["t_offset"][()] if "t_offset" in file else 0
        sensor = tuple(int(side) for side in file.attrs.get("sensor_resolution", ())[::-1]) or None  # was height, width

        def piece(a: int, b: int) -> Events:
            x, y, t, p = rows(a, b)
            return Events(x, y, whole_microseconds(t, args.time_unit, path, offset), p, str(path), sensor)

        cuts, at = zip((bisect_left, bisect_right), args.window, strict=True), lambda row: piece(row, row + 1).t[0]
        times = [at(row) for row in np.linspace(0, count - 1, 65, dtype=int)] if count and args.window != EVER else []
        need(times == sorted(times), f"{path}: its times are in disorder; leave window out, and give it to epvlm.py")
        start, end = (cut(range(count), edge, key=at) for cut, edge in cuts)
        yield from (piece(a, min(a + PIECE, end)) for a in range(start, end, PIECE))
        yield from (piece(row, row + 1) for row in (0, count - 1) if start == end and count)  # for the span


def read_text(path: Path, args: argparse.Namespace) -> Iterator[Events]:
    """Four columns, or more under a head that names them. A head of two numbers is the sensor's size."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        sensor, names, words = None, [], []
        for line in file:
            words = re.split(r"\s*[,;]\s*|\s+", re.sub(r'\[.*?\]|["#%]', "", line).strip())
            if not re.fullmatch(r"[-+]?\.?\d[-+.\deE]*", words[0]):
                names, words = words if pick(words) else names, []
            elif len(words) == 2 and all(map(str.isdigit, words)):
                sensor = tuple(map(int, words))
            elif line[0] not in "#%":
                break
        need(len(words) == len(names or "xytp"), f"{path}: has no row of four numbers; these are read: {READ}")
        mark, lines = next((mark for mark in ",;" if mark in line), None), chain([line], file)
        blocks = iter(lambda: list(islice(lines, PIECE // 4)), [])
        tables = (np.loadtxt(block, delimiter=mark, ndmin=2) for block in blocks)
        first = next(tables)
        usual = first[0, 0] < first[-1, 0] and (first[1:, 0] >= first[:-1, 0]).all() and np.abs(first[:, 3]).max() <= 1
        order = args.order or ("" if names else LAYOUTS[0] if usual else find_order(first, str(path)))
        columns = [order.index(name) for name in order and "xytp"] or [names.index(name) for name in pick(names)]
        parts = fractions(first[:, columns[2]]) or set(words[columns[2]]) & set(".eE")
        unit = args.time_unit or ("s" if parts else "us")
        for rows in chain([first], tables):
            x, y, t, p = rows[:, columns].T
            yield Events(x, y, whole_microseconds(t, unit, path), p, str(path), sensor)


def collect(pieces: Iterator[Events], args: argparse.Namespace, place: Rectification | None) -> tuple[Events, int]:
    """The events in the window, at the image's pixels if there is a `place`, and how many lay outside the image."""
    name, (start, end), found, count, spans, outside = str(args.recording), args.window, [], 0, [], 0
    for piece in filter(len, pieces):
        check_events(piece)
        x, y, t, sensor = piece.x, piece.y, piece.t.astype(np.int64), piece.sensor
        inside = (t >= start) & (t <= end)
        if place:
            lands, sensor = place.lands(piece), place.size
            y, x = np.divmod(lands, sensor[0])
            outside += int((inside & (lands < 0)).sum())
            inside &= lands >= 0
        found.append([column[inside] for column in (x, y, t, piece.p > 0)])
        count, spans = count + int(inside.sum()), [*spans, *piece.span]
        need(count <= MOST, f"{name}: holds over {MOST:.0e} events; give a shorter --window")
        if sys.stderr.isatty():
            print(f"\r{count} events\033[K", end="\r", file=sys.stderr, flush=True)
        if count and piece.span[0] > end:  # what comes is later still
            break
    need(spans, f"{name}: holds no event; give another recording")
    need(count or not outside, f"{name}: all {outside} events lie outside the image; give the map of this --camera")
    told = f"no event from {start:.16g} to {end:.16g} us, it goes from {min(spans):.16g} to {max(spans):.16g} us"
    need(count, f"{name}: {told}; change window, or time_unit")
    return Events(*map(np.concatenate, zip(*found, strict=True)), name, sensor), outside


def run(args: argparse.Namespace) -> None:
    """The command line's work: a recording in, a .npy out."""
    args.window = Options(window=window_of(args)).window or EVER
    need((args.rectify is None) == (args.calibration is None), "rectify and calibration need each other; give both")
    check_output(args.output, ".npy", map(str, filter(None, (args.recording, args.rectify, args.calibration))))
    with warnings_as_lines("convert"):
        place = read_rectification(args.rectify, args.calibration, args.camera) if args.rectify else None
        with reading(args.recording):
            events, outside = collect(find_reader(args.recording)(args.recording, args), args, place)
    save_events(events, args.output)
    told = f"wrote {len(events)} events to {args.output}: " + "x {} to {}, y {} to {}".format(*events.extent)
    told += ", {:.0f} to {:.0f} us".format(*events.span)
    size = "; {2} lay outside the image of {0} x {1}" if place else "; the sensor is {0} x {1} (--sensor {0}x{1})"
    print(told + (size.format(*events.sensor, outside) if events.sensor else ""), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Converts a recording; returns the exit status."""
    parser = Parser("convert", description=f"Converts a recording: {READ}.", allow_abbrev=False)
    add = parser.add_argument
    add("recording", type=Path, help="the file")
    add("-o", "--output", type=Path, required=True, help="the events, .npy")
    add("--window", type=microseconds, nargs=2, metavar=("START", "END"), help="in us, or with a unit (default: all)")
    add("--frame", metavar="FILE:N", help="in the place of window: from frame N - 1 of a list of times to frame N")
    add("--time-unit", choices=MICROSECONDS, help="of text and HDF5 (default: whole numbers us, others s)")
    add("--order", choices=ORDERS, metavar="txyp", help="of text and N x 4, such as txyp (default: found, if clear)")
    add("--camera", choices=("left", "right"), default="left", help="which, if there are two (default: left)")
    add("--rectify", type=Path, metavar="FILE", help="DSEC's rectify_map.h5: places events in the image")
    add("--calibration", type=Path, metavar="FILE", help="DSEC's cam_to_cam.yaml, for --rectify")
    return exit_status("convert", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
