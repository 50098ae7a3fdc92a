"""The event path on the clock: ten million events, from a structured .npy in the page cache to the mask.

    python tests/scripts/bench_events.py

Beside our accumulation run numpy's add.at, as much event-camera code has it, numpy's histogram2d and, where it is
installed, tonic's to_frame; all in turn, medians of --rounds. A sensor of 640 x 480 pixels.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from events import Events, budget_mask, motion, read_events, resize

WIDTH, HEIGHT = 640, 480


def recording(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = np.empty(count, [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "u1")])
    rows["x"], rows["y"] = rng.integers(0, WIDTH, count), rng.integers(0, HEIGHT, count)
    rows["t"], rows["p"] = np.sort(rng.integers(0, 10**6, count)), rng.integers(0, 2, count)
    return rows


def to_mask(path: Path) -> np.ndarray:
    """What the program does with a recording."""
    E_v = resize(ours(read_events(path)), 476, 644)[None]  # (1, H, W)
    return budget_mask(motion(E_v, 28), 0.5)


def ours(events: Events) -> np.ndarray:
    return events.align((WIDTH, HEIGHT)).accumulate()


def add_at(events: Events) -> np.ndarray:
    counts = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    np.add.at(counts, (events.y, events.x), 1)
    return counts


def histogram(events: Events) -> np.ndarray:
    edges = np.arange(HEIGHT + 1), np.arange(WIDTH + 1)
    return np.histogram2d(events.y, events.x, edges)[0].astype(np.int64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    ways = {"accumulate (ours)": ours, "np.add.at": add_at, "np.histogram2d": histogram}
    try:
        from tonic.transforms import ToFrame

        frame = ToFrame((WIDTH, HEIGHT, 2), n_time_bins=1)
        ways["tonic ToFrame"] = lambda rows: frame(rows)[0].sum(0)
    except ImportError:
        print("tonic is not installed: left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        path, took, rows = Path(folder) / "events.npy", defaultdict(list), recording(args.events)
        np.save(path, rows)
        expected = add_at(read_events(path))
        for _ in range(args.rounds):
            start = time.perf_counter()
            to_mask(path)
            took["file to mask (ours)"].append(time.perf_counter() - start)
            for name, way in ways.items():
                events = rows if "tonic" in name else read_events(path)  # anew, since events remember their extent
                start = time.perf_counter()
                counts = way(events)
                took[name].append(time.perf_counter() - start)
                assert np.array_equal(counts, expected), name
    print("| what | ms | million events/s | times ours |\n|---|---|---|---|")
    for name, times in took.items():
        middle = statistics.median(times)
        ratio = "" if "mask" in name else f"{statistics.median(np.array(times) / took['accumulate (ours)']):.1f}"
        print(f"| {name} | {1e3 * middle:.0f} | {args.events / middle / 1e6:.0f} | {ratio} |")
    print(f"\n{args.events} events, medians of {args.rounds} rounds.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
