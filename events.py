"""From an event camera's recording to the mask: which cells of the image move most.

Equations: 5 (motion of a cell), 6 (the mask; as printed, and with an exact budget).

Glossary
    x, y, t, p       an event: column and row (pixels), time (microseconds), polarity (on or off)
    E_v              event map: events of a time window by pixel, (height, width) of the sensor, then resized, (T, H, W)
    cell             what the mask decides on: a group, 28 x 28 pixels (the default), or a patch, 14 x 14
    S                (T, cells_h, cells_w), Eq. 5: motion of each cell, in the unit of `resize`, of a clip per second
    G, w             of the same shape: novelty of each cell in the image, and its worth; ours, not the paper's
    tau              fraction kept, as in Eq. 6; `sparsity` = 1 - tau is the fraction dropped, as in Table 1
    M                (T, cells_h, cells_w) bool, Eq. 6's M_v^E: True keeps, False drops

What differs from the paper: ties at the quantile are broken so that the budget is met. Most cells of a real map hold no
event; the quantile is then 0, and Eq. 6 as printed keeps every cell. What is ours comes last.
"""

import math
import mimetypes
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np

NAMES = {  # of the columns of a recording
    "x": ("x", "x_pos", "xs"),
    "y": ("y", "y_pos", "ys"),
    "t": ("t", "timestamp", "timestamps", "ts", "time"),
    "p": ("p", "polarity", "polarities", "pol", "ps", "on", "is_increase"),
}
LAYOUTS = ("txyp", "xytp", "xypt")  # of a bare N x 4 array
MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1, "ns": 1e-3}
SENSORS = (128, 128), (240, 180), (304, 240), (320, 240), (346, 260), (640, 480), (1280, 720)  # often met, pixels
MOST, WIDEST = 10**8, 8192  # pixels of a sensor or a map, the largest x or y
CONVERT = "convert it: python examples/convert.py {} -o events.npy"
PICTURE = (
    'make a map of it: python -c "import sys, numpy as np; from PIL import Image; '
    "np.save('map.npy', np.asarray(Image.open(sys.argv[1]).convert('L')))\" {}"
)
RHO, ALPHA, BETA = 0.1, 0.3, 0.6  # of `worth`, chosen on made-up scenes that examples/evidence.py does not report
GREY = 128  # of 255, what `novelty` takes for pixels beyond the edge
REACH = 6  # where the kernel of `cover_mask` ends, in cells and in moments


@dataclass(frozen=True, eq=False)
class Events:
    """A recording, n events in any order. The columns are views of the file or the caller's array, never written to."""

    x: np.ndarray  # (n,) pixels
    y: np.ndarray  # (n,) pixels
    t: np.ndarray  # (n,) microseconds
    p: np.ndarray  # (n,) 0 / 1, -1 / +1 or bool
    name: str = "the events"
    sensor: tuple[int, int] | None = None  # (width, height) in pixels, once aligned
    window: tuple[float, float] | None = None  # (start, end) in microseconds, the window they were cut from, or None

    def __len__(self) -> int:
        return len(self.t)

    @cached_property
    def in_order(self) -> bool:
        return bool((self.t[1:] >= self.t[:-1]).all())

    @cached_property
    def span(self) -> tuple[float, float]:
        """First and last time, in microseconds."""
        if not len(self):
            return 0.0, 0.0
        first, last = self.t[[0, -1]] if self.in_order else (self.t.min(), self.t.max())
        return float(first), float(last)

    @cached_property
    def extent(self) -> tuple[int, int, int, int]:
        """Smallest and largest x, then y."""
        return tuple(int(end) for column in (self.x, self.y) for end in (column.min(), column.max()))

    def align(self, size: tuple[int, int], sensor: tuple[int, int] | None = None, mapped: bool = False) -> "Events":
        """The recording on its sensor (width, height) in pixels, which sees what an image of `size` shows, as the paper
        asks; None for one of the image's size. If it is `mapped` by a homography, the sensor may see anything, and None
        is up to the largest x and y. Raises ValueError for events outside it. Warns of a doubtful one."""
        reach = (self.extent[1] + 1, self.extent[3] + 1) if mapped and len(self) else size
        check_sensor(self, *(sensor or reach))  # with all events, also those that `cut` leaves out
        if len(self) and not mapped:
            check_view(self, size, sensor)
        return replace(self, sensor=tuple(sensor or reach))

    def cut(self, edges: np.ndarray | None) -> list["Events"]:
        """The events of each moment, perhaps none, from one edge to the next in microseconds, edges (T + 1,), the last
        one included; None for a single moment with all of them. Raises, or warns, as `check_window` does."""
        check_clock(self, edges)
        if edges is None:
            return [self]
        order = slice(None) if self.in_order else np.argsort(self.t, kind="stable")
        x, y, t, p = (column[order] for column in (self.x, self.y, self.t, self.p))
        cuts = [*np.searchsorted(t, edges[:-1]), np.searchsorted(t, edges[-1], side="right")]
        check_window(self, edges, cuts[-1] - cuts[0])
        spans = zip(pairwise(cuts), pairwise(edges.tolist()), strict=True)
        return [replace(self, x=x[a:b], y=y[a:b], t=t[a:b], p=p[a:b], window=window) for (a, b), window in spans]

    def accumulate(self, polarity: str = "count") -> np.ndarray:
        """E_v at the sensor's size, (height, width) int64: events by pixel, or on minus off ("signed")."""
        width, height = self.sensor
        E_v, at_once = np.zeros(height * width, dtype=np.int64), max(2**18, height * width)  # what fits the cache
        for start in range(0, len(self), at_once):
            x, y, p = (column[start : start + at_once] for column in (self.x, self.y, self.p))
            pixel = y.astype(np.int64) * width + x.astype(np.int64)
            counted = np.bincount(pixel, minlength=E_v.size)
            if polarity == "signed":  # on - off = 2 on - all
                counted = 2 * np.bincount(pixel[p > 0], minlength=E_v.size) - counted
            E_v += counted
        return E_v.reshape(height, width)


@dataclass(frozen=True, eq=False)
class EventMap:
    """E_v already accumulated, or any other (height, width) numbers that say what matters where."""

    values: np.ndarray
    name: str = "the event map"

    @property
    def sensor(self) -> tuple[int, int]:
        return self.values.shape[::-1]  # (width, height)

    def align(self, size: tuple[int, int], sensor: tuple[int, int] | None = None, mapped: bool = False) -> "EventMap":
        """Itself: it shows what the image shows. Raises ValueError for another sensor."""
        need(tuple(sensor or self.sensor) == self.sensor, f"{summary([self])} has only its own size; leave sensor out")
        if not self.values.any():
            warnings.warn("the event map is zero everywhere; it cannot say which cells matter", stacklevel=3)
        return self

    def cut(self, edges: np.ndarray | None) -> list["EventMap"]:
        """Itself, the only moment. Raises ValueError for a clip, or a window."""
        need(edges is None, f"{summary([self])} has no times; leave window out, and give a clip a recording")
        return [self]

    def accumulate(self, polarity: str = "count") -> np.ndarray:
        """The map itself, (height, width), in its own dtype; polarity does not apply."""
        return self.values


def read_events(source, order: str | None = None, time_unit: str | None = None) -> Events | EventMap:
    """Reads a recording, or an event map that is already accumulated.

    source: a path, an array, or events already read. Arrays and .npy: a structured array with fields in any order (see
    NAMES); a bare N x 4 array, its columns in one of LAYOUTS or as `order` says (such as "ptyx"); any other (H, W)
    array is a map. .npz: `event_data` (N-ImageNet), `events`, or x, y, t, p, or a single array. time_unit of the file:
    s, ms, us or ns; None means us. Raises ValueError that names file and remedy. Nothing is ever unpickled."""
    if isinstance(source, Events | EventMap):
        return source
    typed = isinstance(source, str | Path | np.ndarray)
    need(typed, f"events of type {type(source).__name__}: give a path, a numpy array, or none")
    name, data = ("the events", source) if isinstance(source, np.ndarray) else (str(source), load(Path(source)))
    if isinstance(data, np.ndarray) and not data.dtype.names:
        if data.ndim != 2 or data.shape[1] != 4 or data.dtype.kind not in "biuf":
            need(order is None, f"{name}: shape {data.shape} of {data.dtype} is not N x 4 events; leave order out")
            return EventMap(check_map(data, name))
        data = dict(zip(order or find_order(data, name), data.T, strict=True))
    events = Events(*(np.ravel(data[key]) for key in find_columns(data, name)), name)
    check_events(events)
    check_times(events, time_unit)
    if time_unit in (None, "us"):
        return events
    if time_unit == "ns" and events.t.dtype.kind in "iu":  # a clock since 1970 has more digits than float64
        whole, rest = np.divmod(events.t, 1000)
        return replace(events, t=whole + rest / 1000)
    return replace(events, t=np.round(events.t.astype(np.float64) * MICROSECONDS[time_unit], 3))  # to a nanosecond


def summary(moments: list[Events] | list[EventMap], outside: float = 0) -> str:
    """What `cut` gave, in words, and how much of it lies outside the image."""
    first, last, what = moments[0], moments[-1], "them"
    if isinstance(first, EventMap):
        text, what = "an event map of {} x {}".format(*first.sensor), "its sum"
    else:
        length = (last.window or last.span)[1] - (first.window or first.span)[0]
        text = f"{sum(map(len, moments))} events in {length / 1000:.1f} ms"
    return text + (f", {outside:.16g} of {what} outside the image" if outside else "")


def load(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """What a .npy or .npz file holds. Raises ValueError that names the file, and for other files the command for it."""
    remedy = "give a whole .npy or .npz (README.md, Input, says how to convert a pickle)"
    try:
        need(path.is_file(), "not a file" if path.exists() else "no such file")
        with path.open("rb") as file:
            known = file.read(6).startswith((b"\x93NUMPY", b"PK", b"\x80"))  # the last a pickle, which np.load refuses
        if not known:
            image = (mimetypes.guess_type(path.name)[0] or "").startswith("image/")
            remedy = (PICTURE if image else CONVERT).format(shlex.quote(str(path)))
            raise ValueError("neither .npy nor .npz")
        data = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(data, np.ndarray):
            return data
        size = sum(member.file_size for member in data.zip.infolist())
        need(size <= max(2**25, 20 * path.stat().st_size), f"it unpacks to {size} bytes, over 20 times its size")
        named = [key for key in data.files if any(plain(key) in names for names in NAMES.values())]
        single = [key for key in ("event_data", "events") if key in data.files]
        keys = single[:1] or (named if len(named) >= 4 else data.files)
        arrays = {key: data[key] for key in keys}
        need(all(isinstance(array, np.ndarray) for array in arrays.values()), f"{', '.join(keys)} are no arrays")
        return next(iter(arrays.values())) if len(arrays) == 1 else arrays
    except Exception as error:  # numpy, zipfile, zlib and tokenize raise errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as events ({reason}); {remedy}") from None


def plain(key: str) -> str:
    """The name of a column without the folder some files have it in: "events/X" is "x"."""
    return key.lower().rpartition("/")[2]


def find_columns(data, name: str) -> list[str]:
    """The keys of x, y, t, p in a structured array or a dict, by their usual names."""
    present, keys = data.dtype.names if isinstance(data, np.ndarray) else list(data), []
    for column, names in NAMES.items():
        found = [key for key in present if plain(key) in names]
        told = f"{len(found) or 'no'} columns for {column} among {', '.join(present) or 'none at all'}"
        need(len(found) == 1, f"{name}: {told}; name them x, y, t, p, or store a single array")
        keys += found
    return keys


def find_order(rows: np.ndarray, name: str) -> str:
    """Which of LAYOUTS the columns of an N x 4 array are: polarity holds only -1, 0 and 1; time never decreases and has
    the largest range or fractions, and ten times the range it has in another layout that fits. Else ValueError asks."""
    if not len(rows):
        return LAYOUTS[0]
    fit, largest = [], (rows.max(axis=0).astype(np.float64) - rows.min(axis=0)).max()
    for layout in LAYOUTS:
        t, p = (rows[:, layout.index(column)] for column in "tp")
        if -1 <= p.min() <= p.max() <= 1 and not fractions(p) and (t[1:] >= t[:-1]).all():
            fit.append((float(t[-1]) - float(t[0]), fractions(t), layout))
    *others, (span, exact, layout) = sorted(fit) or [(0.0, False, "")]
    certain = span > 0 and (exact or span == largest) and all(0 < 10 * other[0] <= span for other in others)
    need(certain, f"{name}: which of its columns are x, y, t, p is uncertain; give order, such as txyp")
    return layout


def fractions(values: np.ndarray) -> bool:
    return values.dtype.kind == "f" and bool((values != np.floor(values)).any())


# What is refused


def need(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)


def check_map(values: np.ndarray, name: str) -> np.ndarray:
    """The map itself. Raises ValueError for what is no map of an image, and for a picture of one on a light ground."""
    what = f"{name}: shape {values.shape} of {values.dtype} is neither N x 4 events nor a map of an image"
    shaped = values.ndim == 2 and 0 < values.size <= MOST and max(values.shape) <= 20 * min(values.shape)
    need(shaped and values.dtype.kind in "biuf", f"{what}; reshape it (a stack: np.abs(stack).sum(axis=0))")
    need(values.dtype.kind != "f" or np.isfinite(values).all(), f"{name}: holds NaN or infinity; replace them")
    ground = np.median(values)  # a value that fills over half of it is the median
    filled = np.count_nonzero(values == ground)
    empty = values.dtype == bool or ground == 0 or 2 * filled <= values.size or filled == values.size
    remedy = f"if no events are there, give np.abs(map.astype(float) - {ground:.16g}); if it is a mask, give it as bool"
    need(empty, f"{name}: {ground:.16g} fills over half of it, which then counts as motion; {remedy}")
    return values


def check_events(events: Events) -> None:
    """Raises ValueError for columns that no sensor could have written."""
    for column in "xytp":
        values, name = getattr(events, column), f"{events.name}: {column}"
        numbers = values.dtype.kind in ("biuf" if column == "p" else "iuf") and values.dtype.itemsize <= 8
        need(numbers, f"{name} is of type {values.dtype}; store numbers")
        need(len(values) == len(events), f"{name} has {len(values)} values, t {len(events)}; store as many of each")
        low, high = (values.min(), values.max()) if len(values) else (0, 1)
        need(np.isfinite([low, high]).all(), f"{name} holds NaN or infinity; drop those events")
        need(column in "tp" or not fractions(values), f"{name} holds fractions of a pixel; round them")
        wide = f"{name} goes up to {high}, and no sensor has so many pixels; undo an underflow or a scale"
        need(column in "tp" or high <= WIDEST, wide)
    two = -1 <= low and high <= 1 and not fractions(values) and (low == 0 or not (values == 0).any())
    need(two, f"{name} goes from {low} to {high}; store polarities as 0 and 1, -1 and +1, or bool")


def check_sensor(events: Events, width: int, height: int) -> None:
    """Raises ValueError for events outside their sensor. Warns of none at all."""
    need(min(width, height) > 0 and width * height <= MOST, f"a sensor of {width} x {height}; give its real size")
    if not len(events):
        return warnings.warn(f"{events.name}: no events at all; they cannot say which cells matter", stacklevel=4)
    left, right, top, bottom = events.extent
    extent = f"events cover x {left} to {right} and y {top} to {bottom}, not inside {width} x {height} pixels"
    remedy = "give the camera's size as sensor, WIDTHxHEIGHT" if min(left, top) >= 0 else "drop those below 0"
    remedy += ", or exchange x and y" if 0 <= left <= right < height and 0 <= top <= bottom < width else ""
    need(0 <= left <= right < width and 0 <= top <= bottom < height, f"{events.name}: {extent}; {remedy}")


def check_view(events: Events, size: tuple[int, int], sensor: tuple[int, int] | None) -> None:
    """Warns of events, or a sensor, that seem not to see what an image of `size` shows."""
    (width, height), (right, bottom) = sensor or size, (events.extent[1] + 1, events.extent[3] + 1)
    alike = [(w, h) for w, h in (size, *SENSORS) if 0.97 * w <= right <= w and 0.97 * h <= bottom <= h]
    doubt = ""
    if not 2 / 3 <= width * size[1] / (height * size[0]) <= 3 / 2:
        doubt = f"a sensor of {width} x {height} pixels, an image of {size[0]} x {size[1]}; they must show the same"
    elif not sensor and alike and size not in alike:
        doubt = "events fill a sensor of {0} x {1}, the image is {2} x {3}; if the camera is that, give sensor {0}x{1}"
    elif not sensor and 2 * right <= width and 2 * bottom <= height:
        doubt = "all events lie in the image's first quarter; if the event camera is smaller, give its size as sensor"
    if doubt:
        warnings.warn(f"{events.name}: {doubt.format(*(alike or [size])[0], *size)}", stacklevel=4)


def check_landing(name: str, homography, count: np.ndarray, outside: float, size: tuple[int, int]) -> None:
    """Raises ValueError where few of the events, `count` by pixel, or little of the image is where the cameras meet."""
    inside, total = count.sum() - outside, count.sum()
    told = f"{name}: {inside:.16g} of {total:.16g} events fall inside the image; perhaps homography is the inverse"
    need(2 * inside >= total, told)
    x, y = np.meshgrid(*(np.linspace(0, side - 1, 100) for side in size))
    seen = (land(np.linalg.inv(homography), x, y, count.shape[::-1]) >= 0).mean()
    told = f"a sensor of {count.shape[1]} x {count.shape[0]} sees {seen:.1%} of the image"
    need(seen >= 0.1, f"{name}: {told}; perhaps homography is the inverse, or give sensor")


def check_hot(name: str, count: np.ndarray) -> None:
    """Warns where 20 pixels hold over a quarter of 1,000 events or more: in whole real recordings it is 0.1 to 11 %."""
    if count.sum() >= 1000 and 4 * np.partition(count, -min(20, count.size), axis=None)[-20:].sum() > count.sum():
        told = "20 pixels hold over a quarter of the events; if they are hot, give hot_pixels mend"
        warnings.warn(f"{name}: {told}", stacklevel=4)


def check_times(events: Events, time_unit: str | None) -> None:
    """Warns of times that seem to be of another unit."""
    short = 1e6 if events.t.dtype.kind == "f" else 100
    if time_unit is not None or len(events) < 2 or abs(float(events.t[-1]) - float(events.t[0])) >= short:
        return  # the span takes two passes
    span = events.span[1] - events.span[0]
    parts = span < short and fractions(events.t)
    if span < (1e6 if parts else 100):
        doubt = f"times {'have fractions and ' * parts}span only {span:.6g}; taken as microseconds"
        remedy = "if they are not, give time_unit s, ms or ns (us silences this)"
        warnings.warn(f"{events.name}: {doubt}, {remedy}", stacklevel=3)


def check_clock(events: Events, edges: np.ndarray | None) -> None:
    """Warns of a clock that jumps back, and of a long recording for an image of one moment."""
    length = events.span[1] - events.span[0]
    back = 0 if events.in_order else (events.t[:-1].astype(np.float64) - events.t[1:]).max()
    if 2 * back > length:
        told = f"its times jump back by {back:.16g} us, over half of its span"
        warnings.warn(f"{events.name}: {told}; if its clock wrapped, give the part before or after", stacklevel=4)
    if edges is None and length > 5e6:
        told = f"{length / 1e6:.1f} s of events for a single image; give window, or frame, around it"
        warnings.warn(f"{events.name}: {told}", stacklevel=4)


def check_window(events: Events, edges: np.ndarray, found: int) -> None:
    """Raises ValueError for a recording of another time. Warns of no event between the edges, of another span."""
    (start, end), (first, last) = edges[[0, -1]], events.span
    spans = f"from {start:.16g} to {end:.16g} us, it goes from {first:.16g} to {last:.16g} us"
    remedy = "change window or time_unit, or add the clocks' offset, which DSEC and others keep apart (t_offset)"
    need(not len(events) or (start <= last and first <= end), f"{events.name}: no event {spans}; {remedy}")
    if len(events) and not found:
        warnings.warn(f"{events.name}: no event {spans}; they cannot say which cells matter", stacklevel=4)
    elif len(events) and len(edges) > 2 and 10 * (min(last, end) - max(first, start)) < end - start:
        warnings.warn(f"{events.name}: a clip {spans}; are they on one clock, in one unit?", stacklevel=4)


# The equations


def event_maps(moments: list, polarity: str, hot_pixels: str, homography=None, size=None) -> tuple[Iterator, float]:
    """E_v of each moment, (height, width) of the sensor, or of an image of `size` (width, height) with a homography
    (3, 3) to it, see `land`; and how many events lie outside that image. The sensor's pixels are moved, not each event,
    and if the image has 16 times as many, each in `parts` x `parts` points: else some cells would get more pixels than
    others. hot_pixels "mend" mends by all moments. Raises ValueError for a homography that puts most elsewhere."""
    few = polarity == "count" and len(moments) <= 16  # held, and not counted twice
    maps = [each.accumulate() for each in moments] if few else (each.accumulate(polarity) for each in moments)
    count = sum(np.abs(E_v, dtype=np.float64) for E_v in (maps if few else (each.accumulate() for each in moments)))
    if hot_pixels == "mend":
        maps = map(partial(mend, hot=is_hot(count)), maps)
    else:
        check_hot(moments[0].name, count)
    if homography is None:
        return iter(maps), 0
    pixels, parts = np.flatnonzero(count), 2 * int((math.prod(size) / count.size) ** 0.5 / 4) + 1
    y, x = np.divmod(pixels, count.shape[1])
    down, right = (np.indices((parts, parts)).reshape(2, -1, 1) + 0.5) / parts - 0.5  # of a pixel; the middle one is 0
    lands = land(homography, x + right, y + down, size)  # (parts^2, pixels with events)
    outside = count.flat[pixels[lands[len(lands) // 2] < 0]].sum()
    check_landing(moments[0].name, homography, count, outside, size)
    inside = lands >= 0
    lands, pixels = lands[inside], np.broadcast_to(pixels, lands.shape)[inside]
    placed = (np.bincount(lands, E_v.ravel()[pixels], math.prod(size)) for E_v in maps)  # sums of what lands there
    return (E_v.reshape(size[::-1]) for E_v in placed), outside


def land(homography, x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Where points lie in an image of `size` (width, height), as row * width + column, int64; -1 is outside of it.
    [u v w] = homography [x y 1]; a point lies in column u / w, row v / w, rounded, if w > 0. Example: [[-1, 0, 3],
    [0, 1, 0], [0, 0, 1]] mirrors an image of 4 x 2; the point (1, 1) lies in column 2, row 1, so at 6."""
    u, v, w = np.tensordot(homography, [x, y, np.ones(x.shape)], 1)
    with np.errstate(all="ignore"):  # w = 0 is outside
        column, row = np.rint(u / w), np.rint(v / w)
        inside = (w > 0) & (column >= 0) & (column < size[0]) & (row >= 0) & (row < size[1])
        return np.where(inside, row * size[0] + column, -1).astype(np.int64)


def resize(E_v: np.ndarray, height: int, width: int) -> np.ndarray:
    """E_v at the model's input size, (height, width) float64, weighted by area: a pixel's events spread evenly over
    what it covers, so none is skipped when shrinking. The unit is 1 / (height * width) of an event: counts stay whole
    numbers, equal ones equal, and zero zero. Example, one row: [3, 1] to 3 pixels gives [6, 4, 2], the sum times 3."""
    rows = E_v.astype(np.float64)
    for old, new in zip(E_v.shape, (height, width), strict=True):  # cut at every edge of both grids: each piece lies in
        edges = np.union1d(np.arange(old + 1) * new, np.arange(new + 1) * old)  # one old row and one new row
        pieces = rows[edges[:-1] // new] * np.diff(edges)[:, None]
        rows = np.add.reduceat(pieces, np.searchsorted(edges, np.arange(new) * old), axis=0).T
    return rows


def motion(E_v: np.ndarray, side: int) -> np.ndarray:
    """Eq. 5: S, the L1 norm of E_v (T, H, W) in each cell of `side` pixels: (T, H/side, W/side), in E_v's unit."""
    T, H, W = E_v.shape
    return np.abs(E_v).reshape(T, H // side, side, W // side, side).sum(axis=(2, 4))  # Eq. 5


def budget(cells: int, tau: float) -> int:
    """How many of n cells Eq. 6 keeps if none tie. Sort S upwards, places 0 to n - 1. The quantile Q_(1 - tau) is
    interpolated at place h = (1 - tau)(n - 1), so S[floor h] <= Q <= S[ceil h]. Q is one of the two, or no cell's
    value lies between: both ways S >= Q is the same as S >= S[ceil h], true for the n - ceil h largest cells."""
    return cells - math.ceil(round((1 - tau) * (cells - 1), 9))  # 9 decimals: 1 - 0.7 is not 0.3 in floating point


def literal_mask(S: np.ndarray, tau: float) -> np.ndarray:
    """Eq. 6 as printed: True where S is at least its (1 - tau) quantile, which is the same as at least the `budget`-th
    largest S. Every cell that equals it is kept, so ties can keep more."""
    return S >= np.sort(S, axis=None)[-budget(S.size, tau)]  # Eq. 6: this value is at place ceil h


def budget_mask(S: np.ndarray, tau: float) -> np.ndarray:
    """Eq. 6 with ties broken by a fixed, evenly spread order: keeps exactly `budget` cells. Without ties it is
    `literal_mask`; a larger sparsity keeps a subset of these cells."""
    most_first = np.lexsort((spread_order(*S.shape).ravel(), -S.ravel()))
    M = np.zeros(S.size, dtype=bool)
    M[most_first[: budget(S.size, tau)]] = True  # Eq. 6
    return M.reshape(S.shape)


def spread_order(T: int, cells_h: int, cells_w: int) -> np.ndarray:
    """A rank for each cell, (T, cells_h, cells_w) int64: the first k cells cover the grid evenly, for every k. It is
    the Bayer matrix of ordered dithering, moved so that four moments show all places. 1 x 2 x 2: [[[0, 2], [3, 1]]]"""
    t, row, column = np.indices((T, cells_h, cells_w))
    row, column = row ^ (t >> 1 & 1), column ^ (t & 1)
    rank = np.zeros((T, cells_h, cells_w), dtype=np.int64)
    for bit in range((max(cells_h, cells_w) - 1).bit_length()):  # the lowest bit of a coordinate decides most
        rank = 4 * rank + 2 * ((row ^ column) >> bit & 1) + (row >> bit & 1)
    return T * rank + t


# Beyond the paper: a rule that covers, and hot pixels


def novelty(frame: np.ndarray, before: np.ndarray | None, side: int) -> np.ndarray:
    """G of a moment, (H/side, W/side): how much a cell differs from its left or upper neighbour, or in a clip from
    itself in the moment before, whichever is most similar: the L1 norm of their difference. frame, before (H, W, 3)
    uint8; beyond the edge all is GREY. After PixelPrune (arXiv 2604.00886), which drops what is like a neighbour."""
    H, W, _ = frame.shape
    padded = np.pad(frame, ((side, 0), (side, 0), (0, 0)), constant_values=GREY)
    others = [padded[side:, :-side], padded[:-side, side:], *([] if before is None else [before])]
    change = (np.maximum(frame, other) - np.minimum(frame, other) for other in others)  # |difference|; uint8 would wrap
    return np.min([each.reshape(H // side, side, W // side, side * 3).sum(axis=(1, 3)) for each in change], axis=0)


def worth(S: np.ndarray | None, G: np.ndarray) -> np.ndarray:
    """w = RHO + ALPHA S / mean(S) + BETA G / mean(G), (T, cells_h, cells_w) float64: what `cover_mask` shares out. A
    term is left out without events (S None), or where S or G is zero everywhere; RHO is the worth of an empty cell."""
    terms = [share * each / each.mean() for share, each in ((ALPHA, S), (BETA, G)) if each is not None and each.any()]
    return sum(terms, np.full(G.shape, RHO))


def cover_mask(w: np.ndarray, tau: float) -> np.ndarray:
    """Ours, not Eq. 6: keeps `budget` cells, one after another. u is what is left of w. Each step keeps the cell j with
    the largest sum of u_i k(i - j), and takes from each u_i its share k(i - j). k is a Gaussian with a deviation of one
    cell and one moment, 0 for a moment before j's (more moments: what moves is seen only once; fewer: what rests is
    seen twice). It is a product of a matrix for each axis, and ends at REACH, so a step changes only what is near.
    Equal sums go by `spread_order`. A larger sparsity keeps a subset. Example, w = [[[3, 2, 0, 2]]], k(1) = 0.61, k(2)
    = 0.14: first cell 0, then u = [0, 0.79, 0, 1.98], and cell 3."""
    distances = [np.abs(np.subtract.outer(range(n), range(n))) for n in w.shape]
    k = [np.exp(-(d**2) / 2) * (d <= REACH) for d in distances]
    k[0] = np.triu(k[0])  # what is kept explains what comes after it
    u, ties = w.astype(np.float64), 1e-9 * (w.max() or 1) * spread_order(*w.shape) / w.size
    gain = _sums(u, k, (slice(None),) * 3, (slice(None),) * 3) - ties
    for _ in range(budget(w.size, tau)):
        cell = np.unravel_index(gain.argmax(), w.shape)
        near, far, wide = (tuple(slice(max(0, x - r), x + r + 1) for x in cell) for r in (REACH, 2 * REACH, 3 * REACH))
        shares = (matrix[x, part] for matrix, x, part in zip(k, cell, near, strict=True))
        u[near] *= 1 - np.einsum("t,r,c->trc", *shares)
        ties[cell] = np.inf  # it is kept
        gain[far] = _sums(u, k, far, wide) - ties[far]
    return np.isinf(ties)


def _sums(u: np.ndarray, k: list[np.ndarray], to: tuple[slice, ...], of: tuple[slice, ...]) -> np.ndarray:
    """For each cell j in `to`, the sum of u_i k(i - j) over the cells i in `of`."""
    times, rows, columns = (matrix[part] for matrix, part in zip(k, zip(to, of, strict=True), strict=True))
    return np.tensordot(times, rows @ u[of] @ columns.T, 1)


def is_hot(count: np.ndarray) -> np.ndarray:
    """Where a count is over 10 times the median of those that are not zero."""
    return count > 10 * np.median(count[count > 0]) if count.any() else np.zeros(count.shape, dtype=bool)


def mend(E_v: np.ndarray, hot: np.ndarray) -> np.ndarray:
    """E_v (height, width), float64, with each hot pixel lowered to the largest of its eight neighbours, hot or not."""
    (height, width), E_v = E_v.shape, E_v.astype(np.float64)
    padded, places = np.pad(np.abs(E_v), 1), [(r, c) for r in range(3) for c in range(3) if (r, c) != (1, 1)]
    around = np.max([padded[r : r + height, c : c + width] for r, c in places], axis=0)
    return np.where(hot, np.sign(E_v) * np.minimum(np.abs(E_v), around), E_v)


# Functions of S and tau, `cover` of w and tau. A rule of one's own goes here.
RULES = {"exact": budget_mask, "literal": literal_mask, "cover": cover_mask}
