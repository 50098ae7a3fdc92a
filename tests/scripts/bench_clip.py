"""How long does choosing the patches of a clip take? Eight frames of 448 x 448, from frames and events in memory.

    python tests/scripts/bench_clip.py /tmp/random-2B

The ways are timed in turn, each round; the table has the medians. bench_transformers.py times the first tokens.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from epvlm import EPVLM, Clip, Options
from events import Events

SIDE, FRAMES = 448, 8
WAYS = {"dense": None, "0.5": Options(0.5), "0.8": Options(0.8), "0.5, cover": Options(0.5, rule="cover")}


def inputs(events: int) -> tuple[Clip, Events]:
    """Frames of noise, and events that are as likely everywhere."""
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(FRAMES)]
    x, y = rng.integers(0, SIDE, (2, events), dtype=np.uint16)
    t, p = np.sort(rng.integers(0, FRAMES * 40_000, events)), rng.integers(0, 2, events, dtype=np.uint8)
    return Clip.at_rate(frames, 25), Events(x, y, t, p)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a checkpoint in the shapes of Qwen2-VL-2B")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--events", type=int, default=1_000_000)
    args = parser.parse_args()
    model, (clip, events) = EPVLM.from_pretrained(args.model), inputs(args.events)
    took, tokens = {name: [] for name in WAYS}, {}
    for _ in range(args.rounds):
        for name, options in WAYS.items():
            given = replace(events) if options else None  # nothing is known of it yet
            start = time.perf_counter()
            tokens[name] = model.look(clip, given, options or Options()).tokens
            took[name].append(time.perf_counter() - start)
    print("| sparsity | tokens | choosing, s |\n|---|---|---|")
    for name, seconds in took.items():
        print(f"| {name} | {tokens[name]} | {statistics.median(seconds):.3f} |")


if __name__ == "__main__":
    main()
