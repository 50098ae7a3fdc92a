"""Which patches to keep? Accuracy of the tiny Qwen2-VL on held-out scenes, by how the kept groups are chosen.

    python examples/evidence.py                    2,000 questions and more, a few minutes
    python examples/evidence.py --questions 200    fewer

The table goes to standard output, as Markdown. Every selector keeps the same number of groups of 28 x 28 pixels but
those that cannot: literal Eq. 6 keeps what ties, 14-pixel cells keep a group of which any patch is kept, and a smaller
image has the number of groups that comes nearest from below.

Columns
    moving, still    right answers to questions about moving and about still things, of a hundred, with the half-width
                     of Wilson's 95 % interval
    tokens           visual tokens in the prompt, mean
    FLOPs            of the prompt up to its first answer token, attention included, mean, in millions
    ms               processor time of one question alone: mask, packing, transformer and first token; median
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scenes
from epvlm import EPVLM, Prompt
from events import Events
from llm import mrope_positions
from train_tiny import ask, score

TINY = Path(__file__).resolve().parent / "tiny"
SPARSITIES = (0.3, 0.5, 0.7, 0.9)
QUESTIONS = 8  # of a scene, at most
TIMED = 20  # scenes


@dataclass
class Sample:
    """What a selector may look at: a held-out scene as the program gets it."""

    image: Image.Image
    events: Events
    seed: int
    questions: list[scenes.Question]

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.height, self.image.width


def dense(model: EPVLM, sample: Sample, sparsity: float, question: str) -> Prompt:
    return model.prompt(sample.image, None, question)


def events(model: EPVLM, sample: Sample, sparsity: float, question: str, **options) -> Prompt:
    return model.prompt(sample.image, sample.events, question, sparsity, sensor=sample.image.size, **options)


def literal(model: EPVLM, sample: Sample, sparsity: float, question: str) -> Prompt:
    return events(model, sample, sparsity, question, ties="literal")


def cells(model: EPVLM, sample: Sample, sparsity: float, question: str) -> Prompt:
    return events(model, sample, sparsity, question, cell="patch")


def recomputed(model: EPVLM, sample: Sample, sparsity: float, question: str) -> Prompt:
    """The groups that events keep, but numbered as if they were the image's first: Eq. 8 broken."""
    prompt = events(model, sample, sparsity, question)
    first = torch.arange(prompt.keep.numel()).view(prompt.keep.shape) < prompt.keep.sum()
    after = len(prompt.input_ids) - prompt.image_start - int(prompt.keep.sum())
    positions = mrope_positions(prompt.image_start, first, after)
    patches = first.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return replace(prompt, keep=first, keep_patches=patches, position_ids=positions)


def mapped(model: EPVLM, sample: Sample, sparsity: float, question: str, E_v: np.ndarray) -> Prompt:
    """Groups with most of any map of the image, in the place of E_v."""
    return model.prompt(sample.image, E_v, question, sparsity)


def random(model: EPVLM, sample: Sample, sparsity: float, question: str) -> Prompt:
    return mapped(model, sample, sparsity, question, np.random.default_rng(sample.seed).random(sample.shape))


def spread(model: EPVLM, sample: Sample, sparsity: float, question: str) -> Prompt:
    return mapped(model, sample, sparsity, question, np.ones(sample.shape))  # all tie: the evenly spread order decides


def gradient(model: EPVLM, sample: Sample, sparsity: float, question: str) -> Prompt:
    down, right = np.gradient(np.asarray(sample.image.convert("L"), dtype=np.float64))
    return mapped(model, sample, sparsity, question, np.hypot(down, right))


def smaller(model: EPVLM, sample: Sample, sparsity: float, question: str) -> Prompt:
    kept = int(events(model, sample, sparsity, question).keep.sum())
    return model.prompt(sample.image, None, question, min_pixels=784, max_pixels=784 * kept)


SELECTORS: dict[str, Callable] = {
    "events (ours)": events,
    "events, literal Eq. 6": literal,
    "events, 14 px cells": cells,
    "events, positions recomputed": recomputed,
    "image gradient": gradient,
    "evenly spread": spread,
    "random": random,
    "smaller image, dense": smaller,
}


@dataclass
class Tally:
    """One row of the table, as it fills."""

    right: dict[bool, list[bool]] = field(default_factory=lambda: defaultdict(list))  # by whether things move
    tokens: list[int] = field(default_factory=list)  # by question
    flops: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def samples(count: int):
    """Held-out scenes until they have `count` questions or more."""
    seed = asked = 0
    while asked < count:
        scene = scenes.scene(seed)
        questions = [question for question in scenes.questions(scene) if question.moving is not None]
        questions = scenes.choose(questions, QUESTIONS, seed)
        if questions:
            yield Sample(Image.fromarray(scenes.render(scene)), scenes.record(scene), seed, questions)
        seed, asked = seed + 1, asked + len(questions)


@torch.inference_mode()
def examine(model: EPVLM, choose: Callable, sample: Sample, sparsity: float, tally: Tally, costs: dict) -> None:
    """Asks all the questions of a sample, once its groups are chosen."""
    prompt = choose(model, sample, sparsity, sample.questions[0].text)
    H_v = model.vit(prompt.patches[None], prompt.keep_patches)
    _, right = score(model, H_v, prompt.keep, *ask(model, sample.questions))
    for question, ok in zip(sample.questions, right.tolist(), strict=True):
        tally.right[question.moving].append(ok)
    size = len(prompt.patches), len(prompt.input_ids)
    if size not in costs:
        costs[size] = flops(model, prompt)
    tally.flops.append(costs[size])
    tally.tokens.append(int(prompt.keep.sum()))


def flops(model: EPVLM, prompt: Prompt) -> int:
    """Counted while it runs, with attention as plain products: the counter sees nothing of the fused kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next(model.tokens(prompt, max_new_tokens=1))
    return counter.get_total_flops()


def clock(model: EPVLM, choose: Callable, sample: Sample, sparsity: float) -> float:
    """Processor seconds from image and events to the first token of an answer."""
    start = time.process_time()
    next(model.tokens(choose(model, sample, sparsity, sample.questions[0].text), max_new_tokens=1))
    return time.process_time() - start


def accuracy(answers: list[bool]) -> str:
    """Right answers of a hundred, with half of Wilson's 95 % interval: "97.1 ± 1.0"."""
    n, z = len(answers), 1.96
    if not n:
        return "none asked"
    p = sum(answers) / n
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return f"{100 * p:.1f} ± {100 * half:.1f}"


def table(tallies: dict[tuple[float, str], Tally]) -> str:
    lines = ["| sparsity | groups chosen by | moving | still | tokens | MFLOPs | ms |", "|---|---|---|---|---|---|---|"]
    for (sparsity, name), tally in tallies.items():
        costs = f"{np.mean(tally.tokens):.1f} | {np.mean(tally.flops) / 1e6:.0f} | {1e3 * np.median(tally.seconds):.1f}"
        lines.append(
            f"| {sparsity:g} | {name} | {accuracy(tally.right[True])} | {accuracy(tally.right[False])} | {costs} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy by how the kept groups are chosen, as a Markdown table.")
    parser.add_argument("--questions", type=int, default=2000, help="at least so many (default: %(default)s)")
    parser.add_argument("--model", default=TINY, help="a checkpoint trained on the scenes (default: examples/tiny)")
    args = parser.parse_args()
    model, costs = EPVLM.from_pretrained(args.model, device="cpu"), {}
    rows = {(0.0, "dense"): dense} | {(s, name): choose for s in SPARSITIES for name, choose in SELECTORS.items()}
    tallies = {row: Tally() for row in rows}
    asked = 0
    for number, sample in enumerate(samples(args.questions)):
        for (sparsity, name), choose in rows.items():
            examine(model, choose, sample, sparsity, tallies[sparsity, name], costs)
            if number < TIMED:
                tallies[sparsity, name].seconds.append(clock(model, choose, sample, sparsity))
        asked += len(sample.questions)
        if sys.stderr.isatty():
            done = min(1, asked / args.questions)
            bar = f"{'#' * int(40 * done):40}"
            print(f"\r[{bar}] {asked} questions, {number + 1} scenes", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    moving = len(tallies[0.0, "dense"].right[True])
    print(f"{asked} questions about {number + 1} held-out scenes, {moving} of them about moving things.\n")
    print(table(tallies))


if __name__ == "__main__":
    main()
