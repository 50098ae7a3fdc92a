"""Ours against transformers on the same weights: time to the first token, decoding, loading, memory.

    python tests/scripts/random_checkpoint.py 2B /tmp/random-2B --tokenizer path/to/tokenizer.json
    python tests/scripts/bench_transformers.py /tmp/random-2B

All run in one process, in turn, `--rounds` times; the tables, in Markdown on standard output, have the medians and the
medians of the rounds' ratios. Ours is timed from image (or frames) and events to the first token, the choice of patches
included; transformers (sdpa), always dense, from patches that are ready. Beside ours stands its limit: the linear
layers and the products of attention alone, on the same weights, which do not stay in the cache. A first token that
misses its aim gets a profile.

On the CPU the int8 weights of examples/int8.py run too, and fresh processes, which are timed from their start to their
first token, with the weights in the page cache. Nothing but the benchmark should use the processors: the share that
others use is measured, and from 5 % on the program refuses to begin, unless --busy.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import int8
from bench_clip import inputs as clip_inputs
from common import ROOT, markdown
from epvlm import EPVLM, Options, Sampling, View
from vit import ROWS, SCORES

QUESTION, LATER = "What is moving?", "And in which direction does the thing on the left move?"
TOKENS = 16  # decoded
CLIP = "8 frames"  # of 448 x 448 pixels
DECODING, START, MEMORY = "≥ 1.15", "≤ 0.80", "weights + 0.45"  # aims; for the first token see AIMS
INT8_DECODING, INT8_FIRST, INT8_MEMORY = "≥ 1.60", "≤ 1.15", "≤ 0.60"


@dataclass(frozen=True)
class Case:
    """A first token of ours, beside a dense one of transformers."""

    shown: int | str  # so many patches, or CLIP
    sparsity: float
    rule: str = "exact"
    aim: float | None = field(default=None, compare=False)  # of the ratio

    def __str__(self) -> str:
        shown = f"{self.shown} patches" if self.shown != CLIP else CLIP
        how = f"sparsity {self.sparsity}" if self.sparsity else "dense"
        return f"{shown}, {how}{', cover' * (self.rule == 'cover')}"


AIMS = {1024: (0.90, 0.45, 0.29), 4096: (0.82, 0.34, 0.185), CLIP: (0.85, 0.45, 0.21)}


def cases(shown: int | str) -> list[Case]:
    dense, half, most = AIMS.get(shown, (None,) * 3)
    sparsest = Case(shown, 0.8 if shown == CLIP else 0.7, aim=most)
    return [Case(shown, 0, aim=dense), Case(shown, 0.5, aim=half), Case(shown, 0.5, "cover", half), sparsest]


@cache
def inputs(shown: int | str) -> tuple:
    """An image of noise and an event map in which no two cells have the same motion; or a clip and a million events."""
    if shown == CLIP:
        return clip_inputs(1_000_000)
    side, rng = 14 * round(shown**0.5), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    return image, rng.random((side // 28, side // 28)).repeat(28, 0).repeat(28, 1)


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def gpu_memory(first: Callable, shown) -> str:
    """GiB that a GPU needs for it, besides what it holds already."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first(shown)
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"


class Ours:
    def __init__(self, model: EPVLM):
        self.model, self.device = model, str(model.weight.device)
        self.row = 2 if self.device == "cpu" and model.weight.dtype == torch.bfloat16 else 1  # a row alone is doubled
        self.model.ends = set()  # random weights may say anything

    def look(self, case: Case) -> View:
        image, events = inputs(case.shown)
        options = Options(sparsity=case.sparsity, rule=case.rule, max_pixels=None if case.shown == CLIP else 10**9)
        return self.model.look(image, events if case.sparsity else None, options)

    def answer(self, view: View, question: str = QUESTION) -> int:
        return next(self.model.tokens(view, question, Sampling(max_new_tokens=1)))

    def first(self, case: Case) -> float:
        return seconds(lambda: self.answer(self.look(case)), self.device)

    def later(self, view: View) -> float:
        """Of a question about a view that has been read."""
        return seconds(lambda: self.answer(view, LATER), self.device)

    def decode(self, case: Case) -> float:
        """Median seconds of a token after the first."""
        ids = self.model.tokens(self.look(case), QUESTION, Sampling(max_new_tokens=1 + TOKENS))
        return statistics.median(np.diff([time.perf_counter() for _ in ids]))

    @torch.inference_mode()
    def limit(self, view: View) -> float:
        """Seconds of a first token's linear layers and attention products alone, made in the calls that it makes."""
        model, length = self.model, len(self.model.prompt(view, QUESTION)[0])
        some = cache(lambda *shape: torch.rand(shape).to(model.weight))  # so that only weights are cold
        rows, work = {"blocks": len(view.patches), "merger": view.tokens, "layers": length}, []
        *_, last = model.llm.model["layers"]
        alone = [last.self_attn.q_proj, last.self_attn.o_proj, *last.mlp.children()]  # of the last token alone
        for name, linear in (*model.vit.named_modules(), *model.llm.named_modules()):
            if isinstance(linear, nn.Linear) and not name.startswith("lm_head"):
                count = self.row if linear in alone else next(rows[part] for part in name.split(".") if part in rows)
                x = some(count, linear.in_features).split(ROWS if "fc" in name and self.device == "cpu" else count)
                work += [(F.linear, part, linear.weight) for part in x]
        vision, text = model.vit.config, model.llm.config
        for n in vision.depth * [n for n in view.keep.flatten(1).sum(dim=1).tolist() if n]:
            q = some(1, vision.num_heads, n, vision.embed_dim // vision.num_heads)
            work += blocks(q[0], some) if self.row == 2 else [(fused, q, q)]
        q = some(1, text.num_attention_heads, length, text.head_dim)
        work += [(causal, q, q)] * (text.num_hidden_layers - 1)
        work.append((F.linear, some(self.row, text.hidden_size), self.head()))
        return seconds(lambda: multiply(work), self.device)

    def head(self) -> torch.Tensor:
        llm = self.model.llm
        return (llm.model["embed_tokens"] if llm.config.tie_word_embeddings else llm.lm_head).weight

    @torch.inference_mode()
    def decode_limit(self) -> float:
        """Median seconds of the linear layers of a token after the first."""
        layers = [each.weight for each in self.model.llm.model["layers"].modules() if isinstance(each, nn.Linear)]
        work = [
            (F.linear, torch.rand(self.row, weight.shape[1]).to(weight), weight) for weight in (*layers, self.head())
        ]
        return statistics.median(seconds(lambda: multiply(work), self.device) for _ in range(TOKENS))

    def profile(self, case: Case) -> list[list[str]]:
        """Where the milliseconds of a first token go, by torch's operations."""
        kind = "CUDA" if self.device.startswith("cuda") else "CPU"
        with profile(activities={ProfilerActivity.CPU, getattr(ProfilerActivity, kind)}) as found:
            self.first(case)
        operations = [each for each in found.key_averages() if each.device_type.name == kind]
        key = "self_cpu_time_total" if kind == "CPU" else "self_device_time_total"
        spent = Counter({each.key.removeprefix("aten::"): getattr(each, key) / 1000 for each in operations})
        most = [*spent.most_common(8), ("all others", spent.total() - sum(ms for _, ms in spent.most_common(8)))]
        return [[name, f"{ms:.0f}", f"{ms / spent.total():.1%}"] for name, ms in most]


def multiply(products: list[tuple]) -> None:
    for product, x, w in products:
        product(x, w)  # and lets go of it, as a layer does


def blocks(q: torch.Tensor, some: Callable) -> list[tuple]:
    """As vit.attend multiplies, but for the softmax."""
    work = []
    for heads in q.split(torch.get_num_threads()):
        for part in heads.split(max(1, SCORES // q.shape[1]), dim=1):
            work += [(torch.bmm, part, heads.mT), (torch.bmm, some(*part.shape[:2], q.shape[1]), heads)]
    return work


def fused(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, k)


def causal(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, k, is_causal=True)


class Theirs:
    def __init__(self, checkpoint: str, dtype: str, device: str, ours: Ours):
        from transformers import Qwen2VLForConditionalGeneration

        kind = getattr(torch, dtype)
        load = Qwen2VLForConditionalGeneration.from_pretrained
        self.model = load(checkpoint, dtype=kind, attn_implementation="sdpa").to(device).eval()
        self.ours, self.device = ours, device

    def given(self, shown: int | str) -> dict:
        view = self.ours.look(Case(shown, 0))
        ids = self.ours.model.prompt(view, QUESTION)[0][None].to(self.device)
        pixels, kind, code = ("pixel_values_videos", "video", 2) if shown == CLIP else ("pixel_values", "image", 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": code * (ids == view.pad).int(),
            pixels: view.patches.to(self.device, self.model.dtype),
            f"{kind}_grid_thw": torch.tensor([view.keep.shape], device=self.device),
            "do_sample": False,
            "eos_token_id": None,
        }

    def first(self, shown: int | str) -> float:
        given = self.given(shown)
        return seconds(lambda: self.model.generate(**given, max_new_tokens=1), self.device)

    def decode(self, shown: int) -> float:
        class Clock:
            def __init__(self):
                self.times = []

            def put(self, _):
                self.times.append(time.perf_counter())

            def end(self):
                pass

        clock = Clock()
        self.model.generate(**self.given(shown), max_new_tokens=1 + TOKENS, streamer=clock)
        return statistics.median(np.diff(clock.times[1:]))  # the first is the prompt's own


OURS = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/examples"]
import numpy as np, time, torch
from PIL import Image
torch.set_num_threads(int(sys.argv[5]))
from epvlm import EPVLM, Options
if sys.argv[6] == "int8":
    from int8 import load
else:
    load = lambda model: EPVLM.from_pretrained(model, device="cpu", dtype=sys.argv[3])
model, given, sparsity = load(sys.argv[2]), np.load(sys.argv[4]), float(sys.argv[7])
options = Options(sparsity, max_pixels=10**9)
view = model.look(Image.fromarray(given["image"]), given["events"] if sparsity else None, options)
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


def fresh(script: str, checkpoint: str, dtype: str, given: Path, *how: str) -> tuple[float, float]:
    """Seconds from the start of a process to its first token, and its peak resident memory in GiB."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", script, str(ROOT), checkpoint, dtype, str(given), threads, *how]
    start = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
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
    for text in bench(args, watch):
        print(text, end="\n\n", flush=True)
    return 0


def bench(args, watch: Watch) -> Iterator[str]:
    models = {"ours": Ours(EPVLM.from_pretrained(args.checkpoint, device=args.device, dtype=args.dtype))}
    ours, noise = models["ours"], []
    theirs = Theirs(args.checkpoint, args.dtype, args.device, ours)
    if args.device == "cpu":
        models["int8"] = Ours(int8.load(args.checkpoint))
    compared, found = [case for shown in (*args.patches, CLIP) for case in cases(shown)], defaultdict(list)
    usual = Case(args.patches[0], 0.5)
    views = {case: ours.look(case) for case in compared}
    read = {name: each.model.read(views[usual]) for name, each in models.items()}
    for number in range(-1, args.rounds):  # the first warms up
        for case in compared:
            found["ours", case].append(ours.first(case))
            if case == usual and "int8" in models:
                found["int8", case].append(models["int8"].first(case))
            found["limit", case].append(ours.limit(views[case]))
        for shown in dict.fromkeys(case.shown for case in compared):
            found["theirs", shown].append(theirs.first(shown))
        for name, each in models.items():
            found[name, "later"].append(each.later(read[name]))
            found[name, "decode"].append(each.decode(usual))
        found["theirs", "decode"].append(theirs.decode(usual.shown))
        found["limit", "decode"].append(ours.decode_limit())
        if number < 0:
            found.clear()
            watch.others()
        else:
            noise.append(watch.others())
            print(f"round {number + 1} of {args.rounds}, others {noise[-1]:.1%}", file=sys.stderr, flush=True)
    yield beside_theirs(compared, found)
    yield of_dense(compared, found, {case: ours.model.flops(view, QUESTION) for case, view in views.items()})
    for case in compared:
        if case.aim and ratio(found["ours", case], found["theirs", case.shown]) > case.aim:
            yield markdown([f"{case}: operation", "ms", "share"], ours.profile(case))
    if args.device == "cpu":
        fresh_processes = starts(args, ours, usual)
        noise.append(watch.others())
        yield beside_fresh(args, *fresh_processes)
        yield beside_bfloat16(args, found, *fresh_processes)
    else:
        rows = [[case, gpu_memory(ours.first, case), gpu_memory(theirs.first, case.shown)] for case in compared]
        yield markdown(["peak memory above the weights, GiB", "ours", "transformers"], rows)
    yield f"Share of other processes by round: at most {max(noise):.1%}, median {statistics.median(noise):.1%}."


def ratio(mine: list[float], other: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


def pair(mine: list[float], other: list[float]) -> list[str]:
    return [f"{statistics.median(mine):.2f}", f"{statistics.median(other):.2f}", f"{ratio(mine, other):.3f}"]


def rates(mine: list[float], other: list[float]) -> list[str]:
    """The same of seconds for one, as so many a second."""
    return pair([1 / each for each in mine], [1 / each for each in other])


def beside_theirs(compared: list[Case], found: dict) -> str:
    rows = []
    for case in compared:
        mine, limit = found["ours", case], found["limit", case]
        aim = f"≤ {case.aim}" if case.aim else ""
        alone = f"{statistics.median(limit):.2f}", f"{ratio(limit, mine):.0%}"
        rows.append([f"first token, {case}, s", *pair(mine, found["theirs", case.shown]), aim, *alone])
    first = compared[0].shown
    later = pair(found["ours", "later"], found["theirs", first])
    rows.append([f"a later question about {first} patches, s", *later, "", "", ""])
    mine, limit = found["ours", "decode"], found["limit", "decode"]
    alone = f"{1 / statistics.median(limit):.2f}", f"{ratio(limit, mine):.0%}"
    rows.append(["decoding, tokens a second", *rates(mine, found["theirs", "decode"]), DECODING, *alone])
    return markdown(["what", "ours", "transformers", "ratio", "aim", "products alone", "their share of ours"], rows)


def of_dense(compared: list[Case], found: dict, flops: dict[Case, tuple[int, int]]) -> str:
    """Ours sparse beside ours dense."""
    rows = [
        [case, f"{ratio(found['ours', case], found['ours', Case(case.shown, 0)]):.3f}", f"{kept / dense:.3f}"]
        for case, (kept, dense) in flops.items()
        if case.sparsity
    ]
    return markdown(["share of our dense time", "", "FLOPs"], rows)


def starts(args, ours: Ours, usual: Case) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Fresh processes: their seconds to the first token, and their GiB, by round."""
    dense = ours.look(replace(usual, sparsity=0))
    (image, events), ids = inputs(usual.shown), ours.model.prompt(dense, QUESTION)[0]
    ways = {
        "ours": (OURS, "", "0"),
        "theirs": (THEIRS,),
        "ours, 0.5": (OURS, "", "0.5"),
        "int8, 0.5": (OURS, "int8", "0.5"),
    }
    with tempfile.TemporaryDirectory() as folder:
        file, seconds, peaks = Path(folder) / "given.npz", defaultdict(list), defaultdict(list)
        np.savez(file, image=image, events=events, ids=ids, patches=dense.patches, grid=dense.keep.shape)
        for number in range(-1, args.rounds):  # the first warms up
            for name, (script, *how) in ways.items():
                took, peak = fresh(script, args.checkpoint, args.dtype, file, *how)
                if number >= 0:
                    seconds[name].append(took)
                    peaks[name].append(peak)
    return seconds, peaks


def beside_fresh(args, seconds: dict, peaks: dict) -> str:
    """Fresh processes of ours and theirs, dense."""
    size = sum(path.stat().st_size for path in Path(args.checkpoint).glob("*.safetensors")) / 2**30
    above = [
        f"{gib:.2f} (weights + {gib - size:.2f})" for gib in map(statistics.median, (peaks["ours"], peaks["theirs"]))
    ]
    rows = [["process start to first token, s", *pair(seconds["ours"], seconds["theirs"]), START],
            ["peak resident memory, GiB", *above, f"{ratio(peaks['ours'], peaks['theirs']):.3f}", MEMORY]]  # fmt: skip
    return markdown([f"{args.patches[0]} patches, dense", "ours", "transformers", "ratio", "aim"], rows)


def beside_bfloat16(args, found: dict, seconds: dict, peaks: dict) -> str:
    """Ours in int8 beside ours."""
    usual = Case(args.patches[0], 0.5)
    rows = [["first token, s", *pair(found["int8", usual], found["ours", usual]), INT8_FIRST],
            ["a later question, s", *pair(found["int8", "later"], found["ours", "later"]), ""],
            ["decoding, tokens a second", *rates(found["int8", "decode"], found["ours", "decode"]), INT8_DECODING],
            ["process start to first token, s", *pair(seconds["int8, 0.5"], seconds["ours, 0.5"]), ""],
            ["peak resident memory, GiB", *pair(peaks["int8, 0.5"], peaks["ours, 0.5"]), INT8_MEMORY]]  # fmt: skip
    return markdown([f"{args.patches[0]} patches, sparsity 0.5", "int8", args.dtype, "ratio", "aim"], rows)


if __name__ == "__main__":
    sys.exit(main())
