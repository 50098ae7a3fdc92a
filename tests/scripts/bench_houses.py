"""Two checkouts of this repository against each other, on the same checkpoint and machine.

    git worktree add /tmp/old COMMIT
    python tests/scripts/bench_houses.py /tmp/old . /tmp/random-2B

In every round each checkout runs once, in a fresh process, the one that ran second in the round before first. A process
loads the checkpoint (`random_checkpoint.py` writes one), answers up to the first token, which is timed from the
process's start, and then measures the others. Prints a Markdown table: each checkout's medians, and the median of the
rounds' ratios. Times go from image and event map to the first token, the choice of patches included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

CHILD = """
import sys; sys.path.insert(0, sys.argv[1])
import json, statistics, time
import numpy as np
from PIL import Image
from epvlm import EPVLM

def tokens(sparsity, count):
    E_v, question = map if sparsity else None, "What is moving?"
    if not hasattr(EPVLM, "look"):  # before images were looked at
        return model.tokens(model.prompt(image, E_v, question, sparsity, max_pixels=10**9), count)
    view = model.look(image, E_v, epvlm.Options(sparsity=sparsity, max_pixels=10**9))
    return model.tokens(view, question, epvlm.Sampling(max_new_tokens=count))

def first(sparsity):
    start = time.perf_counter()
    next(tokens(sparsity, 1))
    return time.perf_counter() - start

import epvlm
rng, side = np.random.default_rng(0), 14 * 32  # 1024 patches
image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
map = rng.random((side // 28, side // 28)).repeat(28, 0).repeat(28, 1)  # no two cells tie
model = EPVLM.from_pretrained(sys.argv[2], device="cpu")
model.ends = model.stop = set()  # random weights may say anything; `stop` is its older name
next(tokens(0, 1))
found = {"process start to first token, s": time.time() - float(sys.argv[3])}
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
found["peak resident memory, GiB"] = int(peak.split()[1]) / 2**20
for sparsity in (0, 0.5, 0.7):
    found[f"first token, 1024 patches, sparsity {sparsity}, s"] = first(sparsity)
times = [time.perf_counter() for _ in tokens(0.5, 49)]
found["decoding, tokens a second"] = 1 / statistics.median(np.diff(times))
print(json.dumps(found))
"""


def measure(checkout: str, checkpoint: str) -> dict[str, float]:
    """One process of a checkout."""
    command = [sys.executable, "-c", CHILD, checkout, checkpoint, str(time.time())]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="folder of a checkout")
    parser.add_argument("new", help="folder of the other")
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    rounds, pair = [], [args.old, args.new]
    for number in range(args.rounds):
        order = pair[:: -1 if number % 2 else 1]
        rounds.append({checkout: measure(checkout, args.checkpoint) for checkout in order})
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    print(f"| what | {args.old} | {args.new} | ratio |\n|---|---|---|---|")
    for what in rounds[0][args.old]:
        old, new = ([found[checkout][what] for found in rounds] for checkout in pair)
        ratio = statistics.median(b / a for a, b in zip(old, new, strict=True))
        print(f"| {what} | {statistics.median(old):.2f} | {statistics.median(new):.2f} | {ratio:.3f} |")
    print(f"\nMedians of {args.rounds} rounds; ratio: the second over the first.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
