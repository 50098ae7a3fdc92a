"""An ideal event camera: the recording it would make of a still image that a small saccade moves, or of a movie.

    python examples/camera.py image.png -o events.npy
    python examples/camera.py a.png b.png c.png --fps 30 -o events.npy

The paper takes events as given; this stands in where no event camera was there. A pixel compares its log intensity with
its level at its last event, and sends an event at each further C crossed, at the time that linear interpolation between
the frames gives: a camera without delay or blur.

Glossary
    frame            (H, W, 3) RGB or (H, W) luma, 0 to 255, with its time in microseconds
    L                (H, W), log intensity of a pixel: see `log_intensity`
    C                change of L that makes an event, the contrast threshold; each pixel has two, for on and for off
    level            (H, W), L of each pixel at its last event
    p                polarity of an event: 1 where L rises, 0 where it falls
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common import Parser, check_output, exit_status, save_events, warnings_as_lines
from epvlm import add_flags, chosen, flag, read_clip
from events import Events, need
from vit import Clip, read_image

MOST = 10**8  # events of a recording
LUMA = np.array([0.299, 0.587, 0.114])  # of RGB, ITU-R BT.601
LINEAR = 20  # luma below which the response is linear
RADIUS = 2.0  # of a saccade, pixels
FPS = 30.0


def check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} {value:g}: give {least:g} to {most:g}")


@dataclass(frozen=True)
class CameraOptions:
    """How the pixels respond. Raises ValueError that names what is out of range."""

    threshold: float = flag(0.2, "C, in log intensity", type=float)
    spread: float = flag(0.0, "standard deviation of C among pixels", type=float)
    noise: float = flag(0.0, "meaningless events, per pixel and second", type=float)
    seed: int = flag(0, "of spread and noise", type=int)

    def __post_init__(self):
        check_range("threshold", self.threshold, 1e-3, 10)
        check_range("spread", self.spread, 0, 10)
        check_range("noise", self.noise, 0, 1e6)
        check_range("seed", self.seed, 0, 1e18)


def log_intensity(frame: np.ndarray) -> np.ndarray:
    """A pixel's response to light: frame (H, W, 3) RGB or (H, W) luma, 0 to 255; returns (H, W) float64.
    The logarithm above LINEAR, below it a straight line through the origin, as v2e: dark pixels are noise."""
    luma = frame @ LUMA if frame.ndim == 3 else frame.astype(np.float64)
    return np.where(luma > LINEAR, np.log(np.maximum(luma, LINEAR)), luma * (math.log(LINEAR) / LINEAR))


IDEAL = CameraOptions()


def camera(frames: Iterable[tuple[float, np.ndarray]], options: CameraOptions = IDEAL) -> Events:
    """The events of a movie, in order of time.

    frames: (time in microseconds, frame as in `log_intensity`), two or more. Example, C = 0.2, log intensity 0 to 0.5
    in 100 us: events at 40 and 80 us. Raises ValueError for frames that differ in size or do not follow in time, and
    for more than MOST events."""
    rng, found, held = np.random.default_rng(options.seed), [], 0
    responses = ((time, log_intensity(frame)) for time, frame in frames)
    first = last = next(responses, (0, np.zeros((0, 0))))
    level, C = first[1], options.threshold
    on, off = (np.maximum(rng.normal(C, options.spread, level.shape), C / 10) for _ in range(2))  # each pixel's C
    for now in responses:
        check_follows(last, now)
        *events, level = crossings(level, np.where(now[1] > level, on, -off), last, now)
        found.append(events)
        held, last = held + len(events[0]), now
        check_count(held)
    if not found:
        raise ValueError("an event camera needs two frames or more")
    found.append(noise(rng, options.noise, level.shape, (first[0], last[0])))
    x, y, t, p = (np.concatenate(column) for column in zip(*found, strict=True))
    order, t = np.argsort(t, kind="stable"), np.rint(t).astype(np.int64)
    return Events(*(column[order] for column in (x, y, t, p)), name="the event camera")


def check_follows(last: tuple[float, np.ndarray], now: tuple[float, np.ndarray]) -> None:
    (before, was), (time, L) = last, now
    if L.shape != was.shape or not before < time < 2**53:
        what = "a frame of {1} x {0} pixels at {2:g} us follows one of {4} x {3} at {5:g} us"
        raise ValueError(
            what.format(*L.shape, time, *was.shape, before) + "; give frames of one size, in order of time"
        )


def check_count(events: float) -> None:
    if not events <= MOST:
        remedy = f"the most is {MOST:.0e}; raise threshold, lower noise, or make the images smaller"
        raise ValueError(f"{events:.3g} events; {remedy}")


def crossings(level, step, last, now):
    """x, y, time and polarity of every crossing of level + step, level + 2 step, ... between two frames, and the level
    reached. level, step (H, W), step of the sign of the change; last and now are (time, log intensity (H, W))."""
    (start, before), (end, after) = last, now
    crossed = np.floor((after - level) / step + 1e-9).clip(0)  # to reach a level is to cross it
    check_count(crossed.sum())
    crossed = crossed.astype(np.int32)
    y, x = crossed.nonzero()
    count = crossed[y, x]
    nth = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count) + 1  # 1, 2, ... for each pixel
    y, x = np.repeat(y.astype(np.int32), count), np.repeat(x.astype(np.int32), count)
    part = (level[y, x] + nth * step[y, x] - before[y, x]) / (after[y, x] - before[y, x])
    return x, y, start + part.clip(0, 1) * (end - start), (step[y, x] > 0).astype(np.uint8), level + crossed * step


def noise(rng: np.random.Generator, rate: float, shape: tuple[int, int], span: tuple[float, float]):
    """x, y, time and polarity of events that mean nothing, `rate` per pixel and second."""
    check_count(expected := rate * math.prod(shape) * (span[1] - span[0]) / 1e6)
    n = rng.poisson(expected)
    x, y = rng.integers(0, [[shape[1]], [shape[0]]], (2, n), dtype=np.int32)
    return x, y, rng.uniform(*span, n), rng.integers(0, 2, n, dtype=np.uint8)


def saccade(image: np.ndarray, radius: float = RADIUS, duration: float = 1e5) -> Iterator[tuple[float, np.ndarray]]:
    """Frames for `camera` from a still image (H, W, 3): its luma, moved once around an equilateral triangle about its
    true place, `radius` pixels from it at the corners, by at most half a pixel a frame; `duration` in microseconds."""
    check_range("radius", radius, 0, 64)
    luma, margin = image @ LUMA, math.ceil(radius) + 1
    padded = np.pad(luma, margin, mode="edge")
    corners = radius * np.exp(2j * np.pi * np.arange(4) / 3 + 0.5j * np.pi)
    steps = 3 * max(1, math.ceil(2 * 3**0.5 * radius))
    for step, place in enumerate(np.interp(np.linspace(0, 3, steps + 1), np.arange(4), corners)):
        (row, down), (column, right) = (divmod(margin - shift, 1) for shift in (place.imag, place.real))
        shown = padded[int(row) : int(row) + len(luma) + 1, int(column) : int(column) + luma.shape[1] + 1]
        shown = (1 - down) * shown[:-1] + down * shown[1:]
        yield duration * step / steps, (1 - right) * shown[:, :-1] + right * shown[:, 1:]


def movie(clip: Clip) -> Iterator[tuple[float, np.ndarray]]:
    """Frames for `camera`, read one by one, all of one size and scaled alike. Raises ValueError that names a file."""
    for number, time in enumerate(clip.times):
        check_single(clip.frames[number])
        yield float(time), np.asarray(clip.frame(number))
        if sys.stderr.isatty():
            print(f"\rframe {number + 1}\033[K", end="\r", file=sys.stderr, flush=True)


def check_single(source) -> None:
    """Raises ValueError for a file of several images."""
    if not callable(source):
        with contextlib.suppress(OSError), Image.open(source) as file:  # `read_image` says what is wrong
            if getattr(file, "n_frames", 1) > 1:
                raise ValueError(f"{source}: holds {file.n_frames} images; save each as a file of its own")


def run(args: argparse.Namespace) -> None:
    """The command line's work: images in, a recording out."""
    options = chosen(args, CameraOptions)
    check_output(args.output, ".npy", args.images)
    with warnings_as_lines("camera"):
        if len(args.images) > 1:
            need(args.times is None, "times is for a folder of frames; leave it out")
            clip = Clip.at_rate(args.images, FPS if args.fps is None else args.fps)
        else:
            clip = read_clip(Path(args.images[0]), args.times, args.fps)
        if clip is None:
            check_single(args.images[0])
            frames = saccade(np.asarray(read_image(args.images[0])), RADIUS if args.radius is None else args.radius)
        else:
            need(args.radius is None, "radius is for a single image; leave it out")
            frames = movie(clip)
        events = camera(frames, options)
    save_events(events, args.output)
    hint = "" if len(events) else ": no pixel changed so much, lower --threshold"
    print(f"wrote {len(events)} events to {args.output}{hint}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Makes a recording of a still image or of frames; returns the exit status."""
    parser = Parser("camera", description="An ideal event camera: images to a recording.", allow_abbrev=False)
    add = parser.add_argument
    add("images", nargs="+", help="an image, which a small saccade moves; or frames; or a clip, as epvlm.py takes it")
    add("-o", "--output", type=Path, required=True, help="the recording, .npy")
    add("--times", metavar="FILE", help="a folder's times, one a line, or start and end of exposure")
    add("--fps", type=float, help=f"frames a second (default: {FPS:g} for several images)")
    add("--radius", type=float, help=f"of a single image's saccade, in pixels (default: {RADIUS:g})")
    add_flags(parser, CameraOptions)
    return exit_status("camera", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
