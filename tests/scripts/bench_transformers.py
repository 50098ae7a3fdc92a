"""Ours against transformers on the same weights: time to the first token, decoding, loading, memory.

    python tests/scripts/random_checkpoint.py 2B /tmp/random-2B --tokenizer path/to/tokenizer.json
    python tests/scripts/bench_transformers.py /tmp/random-2B

Both run in one process, in turn, `--rounds` times; the table, in Markdown on standard output, has the medians and the
median of the ratios. Ours is timed from image and event map to the first token, the choice of patches included;
transformers (sdpa) from patches that are ready. Loading is timed from the start of a fresh process to its first token,
with the weights in the page cache. Nothing but the benchmark should use the processors: the share of others is
measured, and from 5 % on the program refuses to begin, unless --busy.

Limits, measured in the same run: what products, attention and reading memory reach here at best.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from epvlm import EPVLM, Options, Sampling, View

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is moving?"
TOKENS = 16  # decoded
SPARSITIES = (0.5, 0.7)
TARGETS = {("dense", 1024): 0.90, (0.5, 1024): 0.45, (0.7, 1024): 0.28, ("dense", 4096): 0.85, (0.5, 4096): 0.36,
           (0.7, 4096): 0.19}  # fmt: skip


def inputs(patches: int) -> tuple[Image.Image, np.ndarray]:
    """A square image of so many patches, and an event map in which no two cells have the same motion."""
    side = 14 * round(patches**0.5)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    return image, rng.random((side // 28, side // 28)).repeat(28, 0).repeat(28, 1)


class Ours:
    def __init__(self, checkpoint: str, dtype: str, device: str):
        self.model = EPVLM.from_pretrained(checkpoint, device=device, dtype=dtype)
        self.model.ends = set()  # random weights may say anything

    def first(self, patches: int, sparsity: float) -> float:
        """Seconds of one run to the first token."""
        image, E_v = inputs(patches)
        start = time.perf_counter()
        next(self.model.tokens(self.look(image, E_v, sparsity), QUESTION, Sampling(max_new_tokens=1)))
        return time.perf_counter() - start

    def look(self, image: Image.Image, E_v: np.ndarray, sparsity: float) -> View:
        return self.model.look(image, E_v if sparsity else None, Options(sparsity=sparsity, max_pixels=10**9))

    def flops(self, patches: int, sparsity: float) -> int:
        return self.model.flops(self.look(*inputs(patches), sparsity), QUESTION)[0]

    def decode(self, patches: int) -> float:
        """Median seconds of a token after the first."""
        times, view = [], self.look(*inputs(patches), 0)
        for _ in self.model.tokens(view, QUESTION, Sampling(max_new_tokens=1 + TOKENS)):
            times.append(time.perf_counter())
        return statistics.median(np.diff(times))


class Theirs:
    def __init__(self, checkpoint: str, dtype: str, device: str, ours: Ours):
        from transformers import Qwen2VLForConditionalGeneration

        kind = getattr(torch, dtype)
        load = Qwen2VLForConditionalGeneration.from_pretrained
        self.model = load(checkpoint, dtype=kind, attn_implementation="sdpa").to(device).eval()
        self.ours, self.device = ours, device

    def given(self, patches: int) -> dict:
        view = self.ours.look(*inputs(patches), 0)
        ids = self.ours.model.prompt(view, QUESTION)[0][None].to(self.device)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            "pixel_values": view.patches.to(self.device, self.model.dtype),
            "image_grid_thw": torch.tensor([view.keep.shape], device=self.device),
            "do_sample": False,
            "eos_token_id": None,
        }

    def first(self, patches: int) -> float:
        given = self.given(patches)
        start = time.perf_counter()
        self.model.generate(**given, max_new_tokens=1)
        return time.perf_counter() - start

    def decode(self, patches: int) -> float:
        class Watch:
            def __init__(self):
                self.times = []

            def put(self, _):
                self.times.append(time.perf_counter())

            def end(self):
                pass

        watch = Watch()
        self.model.generate(**self.given(patches), max_new_tokens=1 + TOKENS, streamer=watch)
        return statistics.median(np.diff(watch.times[1:]))  # the first is the prompt's own


def limits(dtype: str) -> dict[str, float]:
    """GFLOP/s of products and of fused attention, GB/s of a one-row product and of reading, at 2B's shapes."""
    kind = getattr(torch, dtype)
    x, w = torch.randn(1024, 1280).to(kind), torch.randn(5120, 1280).to(kind)
    q = torch.randn(1, 16, 2048, 80).to(kind)
    rows, many = torch.randn(1, 1536).to(kind), [torch.randn(8960, 1536).to(kind) for _ in range(12)]
    size = sum(weight.numel() * weight.element_size() for weight in many) / 1e9
    return {
        "products, GFLOP/s": 2 * 1024 * 1280 * 5120 / 1e9 / clock(lambda: F.linear(x, w)),
        "fused attention, GFLOP/s": 4 * 2048**2 * 1280 / 1e9 / clock(lambda: F.scaled_dot_product_attention(q, q, q)),
        "one-row product, GB/s": size / clock(lambda: [F.linear(rows, weight) for weight in many]),
        "two-row product, GB/s": size / clock(lambda: [F.linear(rows.expand(2, -1), weight) for weight in many]),
        "reading, GB/s": size / clock(lambda: [weight.view(torch.int64).max() for weight in many]),
    }


def clock(work) -> float:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


OURS = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy as np, time, torch
from PIL import Image
torch.set_num_threads(int(sys.argv[5]))
from epvlm import EPVLM, Options
model = EPVLM.from_pretrained(sys.argv[2], device="cpu", dtype=sys.argv[3])
given = np.load(sys.argv[4])
view = model.look(Image.fromarray(given["image"]), None, Options(max_pixels=10**9))
next(model.tokens(view, "What is moving?"))
print(time.time(), *[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""

THEIRS = """
import sys
import numpy as np, time, torch
torch.set_num_threads(int(sys.argv[5]))
from transformers import Qwen2VLForConditionalGeneration
dtype, given = getattr(torch, sys.argv[3]), np.load(sys.argv[4])
model = Qwen2VLForConditionalGeneration.from_pretrained(sys.argv[2], dtype=dtype, attn_implementation="sdpa").eval()
ids = torch.from_numpy(given["ids"])[None]
model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 151655).int(),
               pixel_values=torch.from_numpy(given["patches"]).to(dtype),
               image_grid_thw=torch.from_numpy(given["grid"])[None], do_sample=False, max_new_tokens=1)
print(time.time(), *[line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


def fresh(script: str, checkpoint: str, dtype: str, given: Path) -> tuple[float, float]:
    """Seconds from the start of a process to its first token, and its peak resident memory in GiB."""
    command = [sys.executable, "-c", script, str(ROOT), checkpoint, dtype, str(given), str(torch.get_num_threads())]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    end, peak = map(float, done.stdout.split())
    return end - start, peak / 2**20


class Watch:
    """The share of the processors that others use, since it was made or last asked."""

    def __init__(self):
        self.before = self.now()

    def now(self) -> tuple[float, float, float]:
        """Processor seconds of all, of this process and its children, and of the clock."""
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        own = os.times()
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return busy, own.user + own.system + own.children_user + own.children_system, time.monotonic()

    def others(self) -> float:
        busy, own, clock = (now - was for now, was in zip(self.now(), self.before, strict=True))
        self.before = self.now()
        return max(0.0, busy - own) / (clock * os.cpu_count())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint")
    add("--rounds", type=int, default=5)
    add("--patches", type=int, nargs="+", default=[1024, 4096])
    add("--dtype", default="bfloat16")
    add("--device", default="cpu")
    add("--busy", action="store_true", help="go on beside other processes")
    args = parser.parse_args()
    watch = Watch()
    time.sleep(2)
    if (share := watch.others()) >= 0.05 and not args.busy:
        print(f"other processes use {share:.0%} of the processors; stop them, or say --busy", file=sys.stderr)
        return 2
    told, noise = bench(args, watch)
    print("\n".join(told))
    print(f"\nShare of other processes by round: at most {max(noise):.1%}, median {statistics.median(noise):.1%}.")
    return 0


def bench(args, watch: Watch) -> tuple[list[str], list[float]]:
    ours = Ours(args.checkpoint, args.dtype, args.device)
    theirs = Theirs(args.checkpoint, args.dtype, args.device, ours)
    found, noise = defaultdict(list), []
    view = ours.look(*inputs(1024), 0)
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "given.npz"
    ids = ours.model.prompt(view, QUESTION)[0]
    np.savez(file, image=np.asarray(inputs(1024)[0]), ids=ids, patches=view.patches, grid=view.keep.shape)
    for number in range(-1, args.rounds):  # the first warms up
        for patches in args.patches:
            for sparsity in (0, *SPARSITIES):
                found[patches, sparsity].append(ours.first(patches, sparsity))
            found[patches, "theirs"].append(theirs.first(patches))
        found["decode", "ours"].append(ours.decode(args.patches[0]))
        found["decode", "theirs"].append(theirs.decode(args.patches[0]))
        for name, value in limits(args.dtype).items() if args.device == "cpu" else ():
            found["limit", name].append(value)
        if number < 0:
            found.clear()
            watch.others()
        else:
            noise.append(watch.others())
            print(f"round {number + 1} of {args.rounds}, others {noise[-1]:.1%}", file=sys.stderr, flush=True)
    told = table(args, ours, found)
    del ours, theirs
    if args.device == "cpu":
        told += loading(args, file)
    folder.cleanup()
    return told, noise


def loading(args, file: Path) -> list[str]:
    runs = [
        [fresh(script, args.checkpoint, args.dtype, file) for script in (OURS, THEIRS)] for _ in range(args.rounds + 1)
    ]
    seconds, peak = (np.median([[side[k] for side in run] for run in runs[1:]], axis=0) for k in (0, 1))
    size = sum(path.stat().st_size for path in Path(args.checkpoint).glob("*.safetensors")) / 2**30
    ratio = np.median([run[0][0] / run[1][0] for run in runs[1:]])
    above = (f"{gib:.2f} (weights + {gib - size:.2f})" for gib in peak)
    return [
        f"| process start to first token, s | {seconds[0]:.2f} | {seconds[1]:.2f} | {ratio:.2f} | ≤ 0.80 |",
        f"| peak resident memory, GiB | {' | '.join(above)} | {peak[0] / peak[1]:.2f} | weights + 0.45 |",
    ]


def table(args, ours: Ours, found: dict) -> list[str]:
    lines = [f"{k[1]}: {statistics.median(v):.1f}" for k, v in found.items() if k[0] == "limit"]
    lines = [f"Limits here, {args.dtype}: {'; '.join(lines)}.", ""] if lines else []
    lines += ["| what | ours | transformers | ratio | target |", "|---|---|---|---|---|"]
    for patches in args.patches:
        for sparsity in (0, *SPARSITIES):
            mine, other, dense = (found[patches, key] for key in (sparsity, "theirs", 0))
            ratio = statistics.median(a / b for a, b in zip(mine, other, strict=True))
            name = f"sparsity {sparsity}" if sparsity else "dense"
            target = TARGETS.get((sparsity or "dense", patches))
            cells = [f"first token, {patches} patches, {name}, s", f"{statistics.median(mine):.2f}"]
            cells += [f"{statistics.median(other):.2f}", f"{ratio:.3f}", f"≤ {target:.2f}" if target else ""]
            lines.append(f"| {' | '.join(cells)} |")
            if sparsity:
                share = ours.flops(patches, sparsity) / ours.flops(patches, 0)
                ratio = statistics.median(a / b for a, b in zip(mine, dense, strict=True))
                lines.append(f"| … ours sparse / ours dense | | | {ratio:.3f} | FLOPs: ≤ {share:.3f} |")
    mine, other = (1 / statistics.median(found["decode", who]) for who in ("ours", "theirs"))
    ratio = statistics.median(b / a for a, b in zip(found["decode", "ours"], found["decode", "theirs"], strict=True))
    return [*lines, f"| decoding, tokens a second | {mine:.2f} | {other:.2f} | {ratio:.2f} | ≥ 1.15 |"]


if __name__ == "__main__":
    sys.exit(main())
