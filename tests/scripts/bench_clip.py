"""How fast is a clip? Eight frames of 448 x 448 and a million events: choosing, and the first token.

    python tests/scripts/bench_clip.py /tmp/random-2B

The ways are timed in turn, each round; the table has the medians, and the medians of the rounds' ratios. Choosing goes
from frames and events in memory to the packed patches.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from epvlm import EPVLM, Clip, Options, Sampling
from events import Events

SIDE, FRAMES, QUESTION = 448, 8, "What is moving?"
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=1_000_000)
    args = parser.parse_args()
    model, (clip, events) = EPVLM.from_pretrained(args.model), inputs(args.events)
    took = {name: [] for name in WAYS}
    for _ in range(args.rounds):
        for name, options in WAYS.items():
            start = time.perf_counter()
            view = model.look(clip, None if options is None else events, options or Options())
            chosen = time.perf_counter()
            next(model.tokens(view, QUESTION, Sampling(max_new_tokens=1)))
            took[name].append((chosen - start, time.perf_counter() - start, view, model.flops(view, QUESTION)))
    print(
        "| sparsity | tokens | choosing, s | first token, s | share | FLOPs, share | choosing, % of the first token |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, rounds in took.items():
        look, first = (statistics.median(part) for part in list(zip(*rounds, strict=True))[:2])
        share = statistics.median(one[1] / dense[1] for one, dense in zip(rounds, took["dense"], strict=True))
        part = statistics.median(100 * one[0] / one[1] for one in rounds)
        view, (kept, dense) = rounds[0][2:]
        print(f"| {name} | {view.tokens} | {look:.3f} | {first:.2f} | {share:.3f} | {kept / dense:.3f} | {part:.1f} |")


if __name__ == "__main__":
    main()
