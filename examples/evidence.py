"""Which patches to keep? Accuracy of the tiny Qwen2-VL on held-out scenes, by how the kept groups are chosen.

    python examples/evidence.py                    2,000 questions and more, a few minutes
    python examples/evidence.py --questions 200    fewer

The table goes to standard output, as Markdown. The selectors keep the same number of groups of 28 x 28 pixels, with
three exceptions: literal Eq. 6 also keeps what ties, 14-pixel cells keep every group with a patch that is kept, and a
smaller image has the largest grid of at most so many groups that stretches the image by at most 1.5.

Columns
    moving, still    correct answers of a hundred, to questions about moving and about still things, with the 95 %
                     interval (see `accuracy` in common.py)
    how many, all    the same, to questions that count, to which all things matter; and to all questions
    tokens           visual tokens in the prompt, mean
    MFLOPs           up to the first token of the answer, attention included, mean
    ms               processor time of one question alone, one thread: mask, packing, transformer, first token; median
"""

import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import scenes
from camera import CameraOptions
from common import TINY, Parser, accuracy, exit_status
from epvlm import EPVLM, Options, Sampling, View
from events import Events, budget
from train_tiny import score

SPARSITIES = (0.3, 0.5, 0.7, 0.9)
QUESTIONS = 8  # of a scene, at most
TIMED = 20  # scenes


@dataclass
class Sample:
    """What a selector may look at: a held-out scene as the program gets it."""

    image: Image.Image
    events: Events
    noisy: Events  # the same motion, seen by a worse camera
    seed: int
    questions: list[scenes.Question]

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    def budget(self, sparsity: float) -> int:
        """Groups that Eq. 6 keeps when nothing ties."""
        return budget(self.image.height // 28 * (self.image.width // 28), 1 - sparsity)


def dense(model: EPVLM, sample: Sample, sparsity: float) -> View:
    return model.look(sample.image)


def events(model: EPVLM, sample: Sample, sparsity: float, **options) -> View:
    return model.look(sample.image, sample.events, Options(sparsity, sensor=sample.image.size, **options))


def noisy(model: EPVLM, sample: Sample, sparsity: float) -> View:
    return events(model, replace(sample, events=sample.noisy), sparsity)


def without_eq8(model: EPVLM, sample: Sample, sparsity: float) -> View:
    """The groups that events keep, but numbered as if they were the image's first in the transformer of Eq. 9; in the
    decoder each stands where it does in the image."""
    view = events(model, sample, sparsity)
    first = torch.arange(view.groups.numel()).view(view.groups.shape) < view.groups.sum()
    return replace(view, keep=first.repeat_interleave(2, 1).repeat_interleave(2, 2))


def recomputed(model: EPVLM, sample: Sample, sparsity: float) -> View:
    """The same, and numbered so in the decoder too."""
    view = without_eq8(model, sample, sparsity)
    return replace(view, groups=view.keep[:, ::2, ::2])


def random(model: EPVLM, sample: Sample, sparsity: float) -> View:
    chance = np.random.default_rng((sample.seed, 1)).random(sample.shape)
    return model.look(sample.image, chance, Options(sparsity))  # any map can stand in the place of E_v


def spread(model: EPVLM, sample: Sample, sparsity: float) -> View:
    equal = np.ones(sample.shape)  # all tie: the evenly spread order decides
    return model.look(sample.image, equal, Options(sparsity))


def gradient(model: EPVLM, sample: Sample, sparsity: float) -> View:
    down, right = np.gradient(np.asarray(sample.image.convert("L"), dtype=np.float64))
    return model.look(sample.image, np.hypot(down, right), Options(sparsity))


def smaller(model: EPVLM, sample: Sample, sparsity: float) -> View:
    height, width = shrunk(*sample.shape, sample.budget(sparsity))
    image = sample.image.resize((width, height), Image.Resampling.BICUBIC)
    return model.look(image, options=Options(min_pixels=height * width, max_pixels=height * width))


def shrunk(height: int, width: int, groups: int) -> tuple[int, int]:
    """The largest size in whole groups, of `groups` at most, that changes the ratio of the sides by 1.5 at most."""
    sizes = [(h, groups // h) for h in range(1, groups + 1)] + [(groups // w, w) for w in range(1, groups + 1)]
    stretch = {size: abs(math.log(size[0] * width / (size[1] * height))) for size in sizes}
    fit = [size for size in sizes if stretch[size] <= math.log(1.5)] or [min(sizes, key=stretch.get)]
    h, w = max(fit, key=lambda size: (size[0] * size[1], -stretch[size]))
    return 28 * h, 28 * w


SELECTORS: dict[str, Callable] = {  # of model, sample and sparsity; a rule of one's own goes here
    "events (ours)": events,
    "events, noisy camera": noisy,
    "events, literal Eq. 6": partial(events, rule="literal"),
    "events, 14 px cells": partial(events, cell="patch"),
    "events, without Eq. 8": without_eq8,
    "events, positions recomputed": recomputed,
    "image gradient": gradient,
    "evenly spread": spread,
    "random": random,
    "smaller image, dense": smaller,
}


@dataclass
class Tally:
    """One row of the table, as it fills."""

    right: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # column: (right, asked) by scene
    tokens: list[int] = field(default_factory=list)  # by scene, as all below
    flops: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


COLUMNS: dict[str, Callable[[scenes.Question], bool]] = {
    "moving": lambda question: question.kind != "count" and question.moving,
    "still": lambda question: question.kind != "count" and not question.moving,
    "how many": lambda question: question.kind == "count",
    "all": lambda question: True,
}


def chosen(scene: scenes.Scene, seed: int) -> list[scenes.Question]:
    """Questions of a scene that are about moving or about still things, or count."""
    fit = [q for q in scenes.questions(scene) if q.moving is not None or q.kind == "count"]
    return scenes.choose(fit, QUESTIONS, seed)


def samples(count: int) -> Iterator[Sample]:
    """Held-out scenes until they have `count` questions or more."""
    asked = 0
    for seed in range(scenes.TRAIN):
        scene = scenes.scene(seed)
        questions = chosen(scene, seed)
        recordings = scenes.record(scene), scenes.record(scene, CameraOptions(spread=0.05, noise=2.0, seed=seed))
        yield Sample(Image.fromarray(scenes.render(scene)), *recordings, seed, questions)
        asked += len(questions)
        if asked >= count:
            return


@torch.inference_mode()
def answers(model: EPVLM, view: View, questions: list[scenes.Question]) -> list[bool]:
    """Whether each of the questions about a view is answered correctly."""
    H_v = model.vit(view.patches[None], view.keep)
    return score(model, H_v, view.groups, questions)[1].tolist()


def examine(model: EPVLM, choose: Callable, sample: Sample, sparsity: float, tally: Tally) -> list[bool]:
    """Asks all the questions of a sample, once its groups are chosen; returns which answers are right."""
    view = choose(model, sample, sparsity)
    right = answers(model, view, sample.questions)
    for name, belongs in COLUMNS.items():
        known = [ok for question, ok in zip(sample.questions, right, strict=True) if belongs(question)]
        tally.right[name].append((sum(known), len(known)))
    tally.flops.append(model.flops(view, sample.questions[0].text)[0])
    tally.tokens.append(int(view.groups.sum()))
    return right


def clock(model: EPVLM, choose: Callable, sample: Sample, sparsity: float) -> float:
    """Processor seconds from image and events to the first token of an answer."""
    start = time.process_time()
    next(model.tokens(choose(model, sample, sparsity), sample.questions[0].text, Sampling(max_new_tokens=1)))
    return time.process_time() - start


def guesses(questions: list[scenes.Question], seen: list[scenes.Question]) -> list[str]:
    """By column, correct answers of a hundred for a guess: each form of question gets its most frequent answer in
    `seen`."""

    def form(question: scenes.Question) -> tuple[str, ...]:
        return tuple(
            word for word in question.text.split() if word.rstrip("?") not in (*scenes.COLOURS, *scenes.SHAPES)
        )

    given: dict[tuple, Counter] = defaultdict(Counter)
    for question in seen:
        given[form(question)][question.answer] += 1
    shares = []
    for belongs in COLUMNS.values():
        right = [given[form(q)].most_common(1)[0][0] == q.answer for q in questions if belongs(q)]
        shares.append(f"{100 * np.mean(right):.1f}" if right else "none asked")
    return shares


def table(tallies: dict[tuple[float, str], Tally], guessed: list[str]) -> str:
    """Markdown: a row for each tally, and one for guessing."""
    lines = [
        f"| sparsity | groups chosen by | {' | '.join(COLUMNS)} | tokens | MFLOPs | ms |",
        "|---" * (5 + len(COLUMNS)) + "|",
    ]
    for (sparsity, name), tally in tallies.items():
        cells = [f"{sparsity:g}", name, *(accuracy(tally.right[which]) for which in COLUMNS)]
        cells += [f"{np.mean(tally.tokens):.1f}", f"{np.mean(tally.flops) / 1e6:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{1e3 * np.median(tally.seconds):.1f}"]) + " |")
    return "\n".join([*lines, "| 1 | none: guessing | " + " | ".join(guessed) + " | 0 | | |"])


def kinds(questions: list[scenes.Question], right: list[bool]) -> str:
    """Right and asked of each kind of question, in words."""
    asked = Counter(question.kind for question in questions)
    known = Counter(question.kind for question, ok in zip(questions, right, strict=True) if ok)
    shares = ", ".join(f"{kind} {known[kind]} of {asked[kind]}" for kind in scenes.KINDS)
    return f"{sum(right)} of {len(right)} ({100 * np.mean(right):.1f} %): {shares}"


def run(count: int, checkpoint: str | Path) -> None:
    if count < 1:
        raise ValueError(f"questions {count}: give 1 or more")
    torch.set_num_threads(1)
    model = EPVLM.from_pretrained(checkpoint, device="cpu")
    rows = {(0.0, "all of them: dense"): dense}
    rows |= {(sparsity, name): choose for sparsity in SPARSITIES for name, choose in SELECTORS.items()}
    tallies, questions, right = {row: Tally() for row in rows}, [], []
    for number, sample in enumerate(samples(count), 1):
        for (sparsity, name), choose in rows.items():
            known = examine(model, choose, sample, sparsity, tallies[sparsity, name])
            right += known if sparsity == 0 else []
            if number <= TIMED:
                tallies[sparsity, name].seconds.append(clock(model, choose, sample, sparsity))
        questions += sample.questions
        if sys.stderr.isatty():
            bar = "#" * min(40, 40 * len(questions) // count)
            print(f"\r[{bar:40}] {len(questions)} questions, {number} scenes", end="\r", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\033[K", end="", file=sys.stderr)
    asked = ", ".join(f"{sum(map(belongs, questions))} {name}" for name, belongs in COLUMNS.items())
    print(f"Questions about {number} held-out scenes: {asked}.\nDense, right: {kinds(questions, right)}.\n")
    seen = [q for seed in range(scenes.TRAIN, scenes.TRAIN + 500) for q in chosen(scenes.scene(seed), seed)]
    print(table(tallies, guesses(questions, seen)))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("evidence", description="Accuracy by how the kept groups are chosen, as a Markdown table.")
    parser.add_argument("--questions", type=int, default=2000, help="at least so many (default: %(default)s)")
    parser.add_argument("--model", default=TINY, help="a checkpoint trained on the scenes (default: examples/tiny)")
    args = parser.parse_args(argv)
    return exit_status("evidence", lambda: run(args.questions, args.model))


if __name__ == "__main__":
    sys.exit(main())
