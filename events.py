"""From an event camera's recording to the mask: which cells of the image move most. And, where there is no such camera,
a model of one that makes the recording from images:

    python events.py frame.png -o events.npy
    python events.py a.png b.png c.png --fps 30 -o events.npy

Equations: 5 (motion of a cell), 6 (the mask; as printed, and with an exact budget).

Glossary
    x, y, t, p       an event: column and row (pixels), time (microseconds, or the file's unit), polarity (on or off)
    E_v              event map: events of a time window added up by pixel, first at the sensor's size, then the input's
    cell             what the mask decides on: a merge group, 28 x 28 pixels (the default), or a patch, 14 x 14
    S                (cells_h, cells_w), Eq. 5: L1 norm of E_v in each cell, in E_v's unit: that of `resize`
    tau              fraction kept, as in Eq. 6; `sparsity` = 1 - tau is the fraction dropped, as in Table 1
    mask             (cells_h, cells_w) bool, Eq. 6's M_v^E: True keeps, False drops
    L, C             log intensity of a pixel, and the change of it that makes an event: the camera's contrast threshold

What differs from the paper: events are counted whatever their polarity unless asked otherwise (signed sums cancel where
a pixel flickers), and ties at the quantile are broken so that the budget is met. Most cells of a real map hold no event
at all; Eq. 6 as printed then keeps every one of them.
"""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # while the libraries load
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

ALIASES = {
    "x": ("x", "x_pos", "xs"),
    "y": ("y", "y_pos", "ys"),
    "t": ("t", "timestamp", "timestamps", "ts", "time"),
    "p": ("p", "polarity", "polarities", "pol", "ps"),
}
MICROSECONDS = {"s": Fraction(10**6), "ms": Fraction(10**3), "us": Fraction(1), "ns": Fraction(1, 1000)}
MOST = 10**8  # events that the camera makes, pixels of a sensor or a map
LUMA = np.array([0.299, 0.587, 0.114])  # of RGB, ITU-R BT.601
LINEAR = 20  # luma below which the camera's response is linear
CONVERT = (
    'a pickled object, which is never loaded; if you trust it, convert it: python -c "import numpy as np; '
    "d = np.load('{0}', allow_pickle=True); d = d.item() if getattr(d, 'shape', 1) == () else d; "
    "names = d.dtype.names if hasattr(d, 'dtype') else d; "
    "np.savez('{1}-plain.npz', **{{k: np.array(np.asarray(d[k]).tolist()) for k in names}})\""
)
REFUSALS = (ValueError, OSError, MemoryError, ArithmeticError, RuntimeError)  # told in a line; torch's are RuntimeError


def fault(name, what: str, remedy: str) -> ValueError:
    """A refusal in one line."""
    return ValueError(f"{name}: {what}; {remedy}")


@dataclass(frozen=True, eq=False)
class Events:
    """A recording, N events in any order. The columns are views of the file or the caller's array, never written to."""

    name: str
    x: np.ndarray  # (N,) pixels
    y: np.ndarray  # (N,) pixels
    t: np.ndarray  # (N,) in `unit`
    p: np.ndarray  # (N,) 0 / 1, -1 / +1 or bool
    unit: str = "us"  # a key of MICROSECONDS

    def __len__(self) -> int:
        return len(self.t)

    def span(self) -> tuple[float, float]:
        """First and last time, in microseconds."""
        return tuple(float(Fraction(end.item()) * MICROSECONDS[self.unit]) for end in (self.t.min(), self.t.max()))

    @cached_property
    def extent(self) -> tuple[int, int, int, int]:
        """Smallest and largest x, smallest and largest y."""
        return tuple(int(end) for column in (self.x, self.y) for end in (column.min(), column.max()))

    def check_inside(self, height: int, width: int) -> None:
        """Raises ValueError, telling their extent, if events lie outside a sensor of this size."""
        left, right, top, bottom = self.extent if len(self) else (0, 0, 0, 0)
        if min(left, top) < 0 or right >= width or bottom >= height:
            extent = f"events cover x {left} to {right} and y {top} to {bottom}, not inside {width} x {height} pixels"
            remedy = "drop those below 0" if min(left, top) < 0 else "give the sensor's size: --sensor WxH"
            remedy += ", or exchange x and y" if 0 <= left <= right < height and 0 <= top <= bottom < width else ""
            raise fault(self.name, extent, remedy)

    def within(self, start: float, end: float) -> "Events":
        """The events from `start` to `end`, both included, in microseconds on the recording's clock.

        Raises ValueError if the times are no window, or if the recording has events but none inside."""
        if not -math.inf < start <= end < math.inf:
            raise ValueError(f"window {start:g} {end:g}: the start must not lie after the end, both in microseconds")
        low, high = (Fraction(float(edge)) / MICROSECONDS[self.unit] for edge in (start, end))
        low, high = (math.ceil(low), math.floor(high)) if self.t.dtype.kind in "iu" else (float(low), float(high))
        chosen = (self.t >= low) & (self.t <= high)
        if len(self) and not chosen.any():
            times = (np.format_float_positional(time, trim="-") for time in (start, end, *self.span()))
            told = "no event from {} to {} us, it goes from {} to {} us".format(*times)
            raise fault(self.name, told, "change --window or --time-unit")
        return Events(self.name, *(column[chosen] for column in (self.x, self.y, self.t, self.p)), self.unit)


def read_events(source, order: str | None = None, time_unit: str | None = None) -> Events | np.ndarray:
    """Reads a recording, or an event map that is already accumulated (returned as it is, (H, W) numbers).

    source: a path, an array, or Events already read. Arrays and .npy: a structured array with fields in any order (see
    ALIASES); a bare N x 4 array, whose columns are found or told by `order` (such as "txyp"); any other two-dimensional
    array is a map. .npz: `event_data` (N-ImageNet), or x, y, t, p, or a single array. time_unit is that of the file: s,
    ms, us (the default) or ns. Raises ValueError naming the file and the remedy. Nothing is ever unpickled."""
    if isinstance(source, Events):
        return source
    if time_unit not in (None, *MICROSECONDS):
        raise ValueError(f"time unit {time_unit!r}: give one of {', '.join(MICROSECONDS)}")
    if order is not None and sorted(order) != sorted("xytp"):
        raise ValueError(f"order {order!r}: give the letters x, y, t, p once each, such as txyp")
    if not isinstance(source, str | Path | np.ndarray):
        raise ValueError(f"events of type {type(source).__name__}: give a path, a numpy array, or none")
    name, data = ("the events", source) if isinstance(source, np.ndarray) else (str(source), _load(Path(source)))
    if isinstance(data, np.ndarray) and not data.dtype.names:
        if data.ndim != 2 or data.dtype.kind not in "biuf":
            told = "give x, y, t, p as fields or N x 4, or a map H x W (of a stack of maps, np.abs(stack).sum(axis=0))"
            raise fault(name, f"shape {data.shape} of {data.dtype}", told)
        if data.shape[1] != 4:  # not events, so a map
            if not 0 < data.size <= MOST or max(data.shape) > 20 * min(data.shape) or order is not None:
                raise fault(name, f"shape {data.shape} is neither N x 4 events nor a map of an image", "reshape it")
            if data.dtype.kind == "f" and not np.isfinite(data).all():
                raise fault(name, "the event map holds NaN or infinity", "replace them")
            return data
        data = dict(zip(order or _order(name, data), data.T, strict=True))
    events = Events(name, *(np.ravel(data[field]) for field in _fields(name, data)), time_unit or "us")
    _check_events(events)
    if time_unit is None and _fractions(events.t) and np.ptp(events.t) < 1e6:
        told = f"{name}: times have fractions and span only {np.ptp(events.t):.6g}; taken as microseconds"
        warnings.warn(f"{told}, if they are not, say --time-unit s, ms or ns (us silences this)", stacklevel=2)
    return events


def _load(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """What a .npy or .npz file holds."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        with path.open("rb") as file:
            magic = file.read(6)
        if not magic.startswith((b"\x93NUMPY", b"PK", b"\x80")):  # the last a pickle, which np.load refuses
            raise ValueError("neither .npy nor .npz; README.md tells how to convert text, CSV and HDF5")
        data = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(data, np.ndarray):
            return data
        with data:
            size = sum(member.file_size for member in data.zip.infolist())
            if size > max(2**25, 20 * path.stat().st_size):
                raise ValueError(f"it unpacks to {size} bytes, over 20 times its size; store it as .npy")
            known = [name for name in data.files if any(_plain(name) in aliases for aliases in ALIASES.values())]
            names = ["event_data"] if "event_data" in data.files else known if len(known) >= 4 else data.files
            arrays = {name: data[name] for name in names}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError(f"it holds {', '.join(names)}, which are no arrays")
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays
    except FileNotFoundError:
        raise fault(path, "no such file", "give a .npy or .npz of events, or none") from None
    except Exception as error:  # numpy, zipfile, zlib and tokenize raise of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) and "object" in reason.lower():
            reason = CONVERT.format(path, path.stem)
        elif ";" not in reason:  # no remedy yet
            reason += "; give a whole .npy or .npz of events"
        raise ValueError(f"{path}: cannot be read as events: {reason}") from None


def _fields(name: str, data) -> list[str]:
    """The keys of x, y, t, p in a structured array or a dict, by their usual names."""
    present = data.dtype.names if isinstance(data, np.ndarray) else list(data)
    found = [
        [key for key in present if key.lower() in aliases] or [key for key in present if _plain(key) in aliases]
        for aliases in ALIASES.values()
    ]
    for column, keys in zip(ALIASES, found, strict=True):
        if len(keys) != 1:
            told = f"{len(keys) or 'no'} columns for {column} among {', '.join(present) or 'none at all'}"
            raise fault(name, told, "name them x, y, t, p, or store a single array")
    return [key for keys in found for key in keys]


def _plain(key: str) -> str:
    """The name of a column without the folder some files have it in: "events/X" is "x"."""
    return key.lower().rpartition("/")[2]


def _order(name: str, rows: np.ndarray) -> str:
    """What the columns of an N x 4 array are, such as "txyp".

    Polarity is the column that holds only -1, 0 and 1. Time is, of those that never decrease, the one of largest range.
    Of the other two x comes first, as in every layout in use. A doubt is an error, not a guess:
    - another column that never decreases is constant, has over a tenth of time's range, or alone has fractions;
    - times without fractions have a smaller range than another column, and are fewer than 8 or mostly repeated."""
    if not len(rows):
        return "xytp"
    columns = dict(enumerate(rows.T))
    polar = [c for c, v in columns.items() if -1 <= v.min() <= v.max() <= 1 and not _fractions(v)]
    ranges = {c: float(v.max()) - float(v.min()) for c, v in columns.items() if c not in polar}
    rising = [c for c in ranges if (columns[c][1:] >= columns[c][:-1]).all()]
    time = max(rising, key=ranges.get, default=None)
    certain = len(polar) == 1 and bool(ranges.get(time))
    if certain:
        values, exact = columns[time], _fractions(columns[time])
        rivals = [c for c in rising if c != time]
        certain = all(0 < 10 * ranges[c] <= ranges[time] and _fractions(columns[c]) <= exact for c in rivals)
        moving = len(values) >= 8 and 2 * np.count_nonzero(values[1:] != values[:-1]) >= len(values)
        certain = certain and (exact or moving or ranges[time] == max(ranges.values()))
    if not polar:
        raise fault(name, "no column holds polarities alone", "store them as 0 and 1, or -1 and +1")
    if not certain:
        raise fault(name, "which of its columns are x, y, t, p is uncertain", "say it, as in --order txyp")
    x, y = (c for c in columns if c not in (time, polar[0]))
    return "".join({x: "x", y: "y", time: "t", polar[0]: "p"}[c] for c in columns)


def _fractions(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and bool((values != np.floor(values)).any())


def _check_events(events: Events) -> None:
    """Raises ValueError for columns no sensor could have written."""
    name, p = events.name, events.p
    for column, kinds in {"x": "iuf", "y": "iuf", "t": "iuf", "p": "biuf"}.items():
        values = getattr(events, column)
        if values.dtype.kind not in kinds or values.dtype.itemsize > 8:
            raise fault(name, f"{column} is of type {values.dtype}", "store numbers")
        if len(values) != len(events):
            raise fault(name, f"{len(values)} values of {column} but {len(events)} of t", "store as many of each")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise fault(name, f"{column} holds NaN or infinity", "drop those events")
        if column in "xy" and _fractions(values):
            raise fault(name, f"{column} holds fractions of a pixel", "round them to whole pixels")
    low, high = (p.min(), p.max()) if len(p) else (0, 1)
    if low < -1 or high > 1 or _fractions(p) or (low < 0 and (p == 0).any()):
        raise fault(name, f"polarities from {low} to {high}", "store 0 and 1, -1 and +1, or bool")


def accumulate(events: Events, height: int, width: int, polarity: str = "count") -> np.ndarray:
    """E_v at the sensor's size, (height, width) int64: events by pixel, or on minus off ("signed").

    Raises ValueError if events lie outside."""
    events.check_inside(height, width)
    counts, at_once = np.zeros(height * width, dtype=np.int64), max(2**18, height * width)  # what fits the cache
    for start in range(0, len(events), at_once):
        x, y, p = (column[start : start + at_once] for column in (events.x, events.y, events.p))
        pixel = y.astype(np.int64) * width + x.astype(np.int64)
        counted = np.bincount(pixel, minlength=counts.size)
        if polarity == "signed":  # on - off = 2 on - all
            counted = 2 * np.bincount(pixel[p > 0], minlength=counts.size) - counted
        counts += counted
    return counts.reshape(height, width)


def event_map(events: Events | np.ndarray, sensor, size, window, polarity: str = "count") -> tuple[np.ndarray, str]:
    """E_v at the sensor's size, and in words what it was made of.

    sensor: (width, height) in pixels, or None for `size`, that of the image. window: (start, end) in microseconds, or
    None for all. polarity: see `accumulate`. A map is taken as it is. Raises ValueError for events outside the sensor
    and a window without any; warns of no events at all, and where the sensor is likely smaller than the image."""
    if isinstance(events, Events):
        width, height = sensor or size
        if min(width, height) < 1 or width * height > MOST:
            raise ValueError(f"a sensor of {width} x {height} pixels; give its real size")
        events.check_inside(height, width)  # all of them, also outside the window: is this the sensor's size?
        doubt = ""
        if not sensor and len(events) and 2 * events.extent[1] < width and 2 * events.extent[3] < height:
            doubt = f"all events lie in the first quarter of the image's {width} x {height} pixels"
            doubt += "; if the event camera is smaller, say --sensor WxH"
        elif not 2 / 3 <= width * size[1] / (height * size[0]) <= 3 / 2:  # of its shape to the image's
            doubt = f"a sensor of {width} x {height} pixels, an image of {size[0]} x {size[1]}; they must show the same"
        if doubt:
            warnings.warn(f"{events.name}: {doubt}", stacklevel=3)
        shown = events if window is None else events.within(*window)
        start, end = window if window is not None else shown.span() if len(shown) else (0, 0)
        E_v, empty = accumulate(shown, height, width, polarity), not len(events)
        source = f"{len(shown)} events in {(end - start) / 1000:.1f} ms"
    else:
        E_v, empty = events, not events.any()
        source = f"an event map of {events.shape[1]} x {events.shape[0]}"
        if window is not None or (sensor and tuple(sensor) != events.shape[::-1]):
            raise ValueError(f"{source} has no times and only its own size; leave --window and --sensor out")
    if empty:
        warnings.warn("there are no events at all; the cells that are kept mean nothing", stacklevel=3)
    return E_v, source


def resize(E_v: np.ndarray, height: int, width: int) -> np.ndarray:
    """E_v at the model's input size, (height, width) float64, weighted by area: a pixel's events spread evenly over
    what it covers, so that none is skipped when shrinking.

    The unit is 1 / (height * width) of an event: counts stay whole numbers, cells with equal counts stay equal and
    empty ones zero. Example, one row: [3, 1] to 3 pixels gives [6, 4, 2], the sum times 3."""
    return _resize_rows(_resize_rows(E_v.astype(np.float64), height).T, width).T


def _resize_rows(rows: np.ndarray, target: int) -> np.ndarray:
    """Cuts the axis at every edge of both grids; each piece lies in one old row and in one new one."""
    source = len(rows)
    edges = np.union1d(np.arange(source + 1) * target, np.arange(target + 1) * source)
    pieces = rows[edges[:-1] // target] * np.diff(edges)[:, None]
    return np.add.reduceat(pieces, np.searchsorted(edges, np.arange(target) * source), axis=0)


def motion(E_v: np.ndarray, side: int) -> np.ndarray:
    """Eq. 5: S, the L1 norm of E_v in each cell of `side` pixels. E_v (H, W), whole cells; returns (H/side, W/side), in
    the unit of E_v."""
    cells_h, cells_w = E_v.shape[0] // side, E_v.shape[1] // side
    return np.abs(E_v).reshape(cells_h, side, cells_w, side).sum(axis=(1, 3))  # Eq. 5


def budget(cells: int, tau: float) -> int:
    """How many of n cells Eq. 6 keeps if none tie: n - ceil((1 - tau)(n - 1)), its quantile linearly interpolated."""
    return cells - math.ceil(round((1 - tau) * (cells - 1), 9))  # 9 decimals: 1 - 0.7 is not 0.3 in floating point


def literal_mask(S: np.ndarray, tau: float) -> np.ndarray:
    """Eq. 6 as printed: keep where S reaches its (1 - tau) quantile. All that tie with the least that does are kept."""
    return S >= np.sort(S, axis=None)[-budget(S.size, tau)]  # Eq. 6


def budget_mask(S: np.ndarray, tau: float) -> np.ndarray:
    """Eq. 6 with ties broken by a fixed, evenly spread order: keeps exactly `budget` cells. Without ties it is
    `literal_mask`; more sparsity keeps a subset."""
    most_first = np.lexsort((spread_order(*S.shape).ravel(), -S.ravel()))
    mask = np.zeros(S.size, dtype=bool)
    mask[most_first[: budget(S.size, tau)]] = True  # Eq. 6
    return mask.reshape(S.shape)


def spread_order(cells_h: int, cells_w: int) -> np.ndarray:
    """A rank for each cell, (cells_h, cells_w) int64, such that every first part of the order covers the grid evenly:
    the Bayer matrix of ordered dithering. Example, 2 x 2: [[0, 2], [3, 1]], a chessboard's one colour first."""
    row, column = np.indices((cells_h, cells_w))
    rank = np.zeros((cells_h, cells_w), dtype=np.int64)
    for bit in range((max(cells_h, cells_w) - 1).bit_length()):  # the lowest bit of a coordinate decides most
        rank = 4 * rank + 2 * ((row ^ column) >> bit & 1) + (row >> bit & 1)
    return rank


def read_image(image: str | Path | Image.Image) -> Image.Image:
    """An image file or a PIL image of any mode, upright, as 8-bit RGB.

    Transparency is laid on white. Grey of more than 8 bits is scaled by the bits in use, the fewest of 8, 10, 12, 14
    and 16 that hold its largest value: cameras store 10 or 12 in files of 16. A warning says how many, and so does
    `info["bits"]`. Raises ValueError that names a file that is no whole image."""
    name = "the image" if isinstance(image, Image.Image) else str(image)
    try:
        if not isinstance(image, Image.Image) and Path(image).exists() and not Path(image).is_file():
            raise ValueError("not a file")
        image = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
        bits = 8
        if image.mode[0] in "IF":  # 16 bits of grey; some formats open as 32
            grey = np.asarray(image).astype(np.int64)
            if image.mode == "F" or not 0 <= grey.min() <= grey.max() <= 65535:
                raise ValueError("grey of unknown range")
            bits = next(bits for bits in (8, 10, 12, 14, 16) if grey.max() < 2**bits)
            warnings.warn(f"{name}: grey values up to {grey.max()} are taken as {bits} bits", stacklevel=2)
            image = Image.fromarray((grey * 255 // (2**bits - 1)).astype(np.uint8))
        if image.mode.endswith(("A", "a")) or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
        image.info["bits"] = bits
        return image
    except FileNotFoundError:
        raise fault(name, "no such file", "give the path of an image") from None
    except Exception as error:  # Pillow's readers raise of many kinds
        told = f"not an image that can be read ({' '.join(str(error).split())})"
        raise fault(name, told, "give an 8-bit PNG or JPEG") from None


def log_intensity(frame: np.ndarray) -> np.ndarray:
    """A pixel's response to light: frame (H, W, 3) RGB or (H, W) luma, 0 to 255; returns (H, W) float64.
    The logarithm above LINEAR, below it a straight line through the origin, as v2e: dark pixels are noise."""
    luma = frame @ LUMA if frame.ndim == 3 else frame.astype(np.float64)
    return np.where(luma > LINEAR, np.log(np.maximum(luma, LINEAR)), luma * (math.log(LINEAR) / LINEAR))


def camera(
    frames: Iterable[tuple[float, np.ndarray]], C: float = 0.2, spread: float = 0.0, noise: float = 0.0, seed: int = 0
) -> Events:
    """The events an ideal event camera would see, in order of time.

    frames: (time in microseconds, frame as in `log_intensity`), two or more. A pixel remembers the level of its last
    event and sends one at each further C that its log intensity, linear between frames, rises (p = 1) or falls (p = 0).
    spread: standard deviation of C among pixels, for either polarity. noise: events per pixel and second that mean
    nothing. Example, C = 0.2, log intensity 0 to 0.5 in 100 us: events at 40 and 80 us. Raises ValueError for settings
    out of range, frames that differ in size or do not follow in time, and more than MOST events."""
    limits = (("threshold", C, 1e-3, 10), ("spread", spread, 0, 10), ("noise", noise, 0, 1e6), ("seed", seed, 0, 1e18))
    for setting in limits:
        _check_setting(*setting)
    rng, found, held = np.random.default_rng(seed), [], 0
    shown = ((time, log_intensity(frame)) for time, frame in frames)
    first = last = next(shown, (0, np.zeros((0, 0))))
    level = first[1]  # (H, W)
    on, off = (np.maximum(rng.normal(C, spread, level.shape), C / 10) for _ in range(2))  # thresholds, likewise
    for now in shown:
        (before, was), (time, L) = last, now
        if L.shape != was.shape or not before < time < 2**53:
            told = "a frame of {1} x {0} pixels at {2:g} us follows one of {4} x {3} at {5:g} us"
            raise ValueError(told.format(*L.shape, time, *was.shape, before))
        *crossings, level = _crossings(level, np.where(L > level, on, -off), last, now)
        found.append(crossings)
        held, last = held + len(crossings[0]), now
        _check_count(held)
    if not found:
        raise ValueError("an event camera needs two frames or more")
    _check_count(expected := noise * level.size * (last[0] - first[0]) / 1e6)
    n = rng.poisson(expected)
    place = rng.integers(0, [[level.shape[1]], [level.shape[0]]], (2, n), dtype=np.int32)
    found.append((*place, rng.uniform(first[0], last[0], n), rng.integers(0, 2, n, dtype=np.uint8)))
    x, y, t, p = (np.concatenate(column) for column in zip(*found, strict=True))
    order, t = np.argsort(t, kind="stable"), np.rint(t).astype(np.int64)
    return Events("the event camera", *(column[order] for column in (x, y, t, p)))


def _check_setting(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"--{name} {value:g}: give {least:g} to {most:g}")


def _check_count(events: float) -> None:
    if not events <= MOST:
        told = f"at most {MOST:.0e} find room; raise --threshold, lower --noise, or make the images smaller"
        raise ValueError(f"{events:.3g} events, but {told}")


def _crossings(level, step, last, now):
    """x, y, time and polarity of every crossing of level + step, level + 2 step, ... between two frames, and the level
    reached. level, step (H, W), step of the sign of the change; last and now are (time, log intensity (H, W))."""
    (start, before), (end, after) = last, now
    crossed = np.floor((after - level) / step + 1e-9).clip(0)  # to reach a level is to cross it
    _check_count(crossed.sum())
    crossed = crossed.astype(np.int32)
    y, x = crossed.nonzero()
    count = crossed[y, x]
    nth = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + 1  # 1, 2, ... for each pixel
    y, x = np.repeat(y.astype(np.int32), count), np.repeat(x.astype(np.int32), count)
    part = (level[y, x] + nth * step[y, x] - before[y, x]) / (after[y, x] - before[y, x])
    return x, y, start + part.clip(0, 1) * (end - start), (step[y, x] > 0).astype(np.uint8), level + crossed * step


def saccade(image: np.ndarray, radius: float = 2.0, duration: float = 100_000) -> Iterator[tuple[float, np.ndarray]]:
    """Frames for `camera` from a still image (H, W, 3): its luma, moved once around an equilateral triangle about its
    true place, `radius` pixels from it at the corners, by at most half a pixel a frame; `duration` in microseconds."""
    _check_setting("radius", radius, 0, 64)
    luma, margin = image @ LUMA, math.ceil(radius) + 1
    padded = np.pad(luma, margin, mode="edge")
    corners = radius * np.exp(2j * np.pi * np.arange(4) / 3 + 0.5j * np.pi)
    steps = 3 * max(1, math.ceil(2 * 3**0.5 * radius))
    for step, place in enumerate(np.interp(np.linspace(0, 3, steps + 1), np.arange(4), corners)):
        (row, down), (column, right) = (divmod(margin - shift, 1) for shift in (place.imag, place.real))
        shown = padded[int(row) : int(row) + len(luma) + 1, int(column) : int(column) + luma.shape[1] + 1]
        shown = (1 - down) * shown[:-1] + down * shown[1:]
        yield duration * step / steps, (1 - right) * shown[:, :-1] + right * shown[:, 1:]


def movie(paths: list[str], fps: float = 30.0) -> Iterator[tuple[float, np.ndarray]]:
    """Frames for `camera` from image files, read one by one. Raises ValueError that names the file."""
    _check_setting("fps", fps, 1e-3, 1e6)
    size = bits = None
    for number, path in enumerate(paths):
        image = read_image(path)
        size = size or image.size
        if image.size != size:
            told = "{} x {} pixels, but {} x {}".format(*image.size, *size)
            raise fault(path, f"{told} in {paths[0]}", "give frames of one size")
        if image.info["bits"] != (bits := bits or image.info["bits"]):  # frames scaled unlike would flicker
            told = f"grey of {image.info['bits']} bits, but of {bits} in {paths[0]}"
            raise fault(path, told, "scale all frames to 8 bits alike")
        with Image.open(path) as file:
            if getattr(file, "n_frames", 1) > 1:
                raise fault(path, f"holds {file.n_frames} images", "save each as a file of its own")
        yield 1e6 * number / fps, np.asarray(image)
        if sys.stderr.isatty():
            print(f"\rframe {number + 1}\033[K", end="\r", file=sys.stderr, flush=True)


def check_output(path: Path, suffix: str = "", inputs: Iterable[str] = ()) -> Path:
    """Where a file named so is written, links followed. Raises ValueError, before any work, where it cannot be, where
    one of the inputs is, and for a name that does not end in `suffix`."""
    place = Path(os.path.realpath(path))  # which, unlike Path's, raises nothing
    if not place.parent.is_dir() or (place.exists() and not place.is_file()):
        raise fault(path, "cannot be written there", "give a file's name in a folder that exists")
    if place in [Path(name).resolve() for name in inputs]:
        raise fault(path, "is one of the inputs", "give another name")
    if not path.name.lower().endswith(suffix):
        raise fault(path, f"it is written as {suffix}", "name it so")
    return place


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a file beside and renames it, so that `path` is the old file or the new one, never half."""
    place = check_output(path)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            write(file)
        beside.replace(place)
    except OSError as error:
        raise fault(path, f"cannot be written ({error.strerror or error})", "make room, or write elsewhere") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def save_events(events: Events, path: Path) -> None:
    """A structured .npy with fields x, y, t, p."""
    kinds = [("x", "<i4"), ("y", "<i4"), ("t", "<i8"), ("p", "u1")]
    rows = np.rec.fromarrays((events.x, events.y, events.t, events.p), dtype=kinds)
    write_whole(path, lambda file: np.save(file, rows))


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")


def exit_status(program: str, work: Callable[[], None]) -> int:
    """Does a command line's work. 0, or 2 for bad input (told in one line), 130 when interrupted, 1 when nobody reads
    its output any more."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (it stays open: the caller closed the real one)
    previous = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread() and previous not in (None, signal.SIG_IGN)
    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(end="\n" if sys.stderr.isatty() else "", file=sys.stderr)  # the shell's prompt gets a line of its own
        return 130
    except REFUSALS as error:
        told = " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(OSError):  # where it cannot be told, the status still says it
            print(f"{program}: error: {told}", file=sys.stderr, flush=True)
        return 2
    finally:
        if ours:
            signal.signal(signal.SIGINT, previous)


def run(args: argparse.Namespace) -> None:
    """The command line's work: images in, a recording out."""
    check_output(args.output, ".npy", args.images)
    single = len(args.images) == 1
    if (args.fps if single else args.radius) is not None:
        misplaced = "--fps is for several images" if single else "--radius is for a single image"
        raise ValueError(f"{misplaced}; leave it out")
    with warnings.catch_warnings(action="ignore"):  # Pillow's, of large images
        frames = movie(args.images, 30.0 if args.fps is None else args.fps)
        if single:
            frames = saccade(next(frames)[1], 2.0 if args.radius is None else args.radius)
        events = camera(frames, args.threshold, args.spread, args.noise, args.seed)
    save_events(events, args.output)
    hint = "" if len(events) else ": no pixel changed so much, lower --threshold"
    print(f"wrote {len(events)} events to {args.output}{hint}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Makes a recording of a still image or of frames; returns the exit status."""
    parser = Parser("events", description="An ideal event camera: images to a recording.", allow_abbrev=False)
    add = parser.add_argument
    add("images", nargs="+", help="one image, which a small saccade moves, or the frames of a movie")
    add("-o", "--output", type=Path, required=True, help="the recording, .npy")
    add("--fps", type=float, help="frames a second of a movie (default: 30)")
    add("--radius", type=float, help="of a single image's saccade, in pixels (default: 2)")
    add("--threshold", type=float, default=0.2, help="C, in log intensity (default: %(default)s)")
    add("--spread", type=float, default=0.0, help="standard deviation of C among pixels (default: %(default)s)")
    add("--noise", type=float, default=0.0, help="meaningless events a pixel and second (default: %(default)s)")
    add("--seed", type=int, default=0, help="of spread and noise (default: %(default)s)")
    return exit_status("events", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
