"""Which patches to keep? Accuracy of the tiny Qwen2-VL on held-out scenes, by how the kept groups are chosen.

    python examples/evidence.py                    2,000 questions and more about stills, some minutes
    python examples/evidence.py clips              the same about clips
    python examples/evidence.py --questions 200    fewer

The tables go to standard output, as Markdown. The selectors keep the same number of groups of 28 x 28 pixels, with
three exceptions: Eq. 6 as printed also keeps what ties, 14-pixel cells keep every group with a patch that is kept, and
a smaller image has the largest grid of at most so many groups that stretches the image by at most 1.5. Of a clip, rules
that keep the first moment whole cannot keep fewer tokens than that, and have no row there.

Columns
    moving, still    correct answers of a hundred, to questions about moving and about still things, with the 95 %
                     interval (see `accuracy` in common.py)
    how many, all    the same, to questions that count, to which all things matter; and to all questions
    small, large     all questions about frames whose smaller side has four groups, and six or more
    way, what        of clips: which way something moves; what moves, and its colour
    stop and start   what stops halfway, or starts, while another thing moves too
    moving, still    of clips: colours and shapes of moving things; all questions about still things, "nowhere" included
    tokens           visual tokens in the prompt, mean
    MFLOPs           up to the first token of the answer, attention included, mean
    ms               processor time of one question and its answer, one thread: mask, packing, model; median

A difference is paired: both rules answered the same questions. `difference` in common.py says how its interval is made.
"""

import math
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import scenes
from camera import CameraOptions
from common import TINY, Parser, accuracy, difference, exit_status, markdown
from epvlm import EPVLM, Options, View, evenly
from events import GREY, EventMap, Events, budget, budget_mask, cover_mask, motion, novelty, worth
from llm import prompt_ids
from rope2d import group_order, pack, rotate
from train_tiny import score
from vit import Attention, Clip, packed_patches

SPARSITIES = (0.3, 0.5, 0.7, 0.9)
QUESTIONS = 8  # of a scene, at most
TIMED = 20  # scenes
HOT, TIMES = 20, 2000  # pixels that fire without a cause, and how often each
SHIFT = 0.05  # of the frame's sides


@dataclass
class Sample:
    """What a selector may look at: a held-out scene as the program gets it."""

    image: Image.Image | Clip
    events: Events
    seed: int
    questions: list[scenes.Question]

    @cached_property
    def noisy(self) -> Events:
        """The same motion, seen by a worse camera."""
        return scenes.record(scenes.scene(self.seed), CameraOptions(spread=0.05, noise=2.0, seed=self.seed))

    @property
    def shape(self) -> tuple[int, int]:
        return self.image.height, self.image.width

    def budget(self, sparsity: float) -> int:
        """Groups that Eq. 6 keeps when nothing ties."""
        return budget(self.image.height // 28 * (self.image.width // 28), 1 - sparsity)


class ClipSample(Sample):
    """The same of a held-out clip."""

    @property
    def cells(self) -> tuple[int, int, int]:
        return self.image.moments, self.image.size[1] // 28, self.image.size[0] // 28

    @cached_property
    def blocks(self) -> np.ndarray:
        """Pixels by cell, (T, 2, cells_h, cells_w, 28 * 28 * 3): the two frames of each moment."""
        T, rows, columns = self.cells
        X_v = np.stack([self.image.pixels(t, 28 * rows, 28 * columns).numpy() for t in range(T)]).astype(np.float32)
        split = X_v.reshape(T, 2, rows, 28, columns, 28, 3).swapaxes(3, 4)
        return split.reshape(T, 2, rows, columns, -1)


@dataclass(frozen=True, eq=False)
class Pruned(View):
    """A view of a rule that reads the transformer's output: the transformer has read all `patches` (`keep` is all
    True), the decoder gets only `groups`."""

    H_v: Tensor | None = None  # (1, groups kept, hidden_size)


def dense(model: EPVLM, sample: Sample, sparsity: float) -> View:
    return model.look(sample.image)


def by_events(model: EPVLM, sample: Sample, sparsity: float, recording=None, **options) -> View:
    """By the scene's events, or by another recording of it; `rule` exact unless the options say otherwise."""
    recording = sample.events if recording is None else recording
    return model.look(sample.image, recording, Options(sparsity, sensor=sample.image.size, **options))


def without_eq8(model: EPVLM, sample: Sample, sparsity: float) -> View:
    """The groups that events keep, but numbered as if they were the image's first in the transformer of Eq. 9; in the
    decoder each stands where it does in the image."""
    view = by_events(model, sample, sparsity)
    first = torch.arange(view.groups.numel()).view(view.groups.shape) < view.groups.sum()
    return replace(view, keep=first.repeat_interleave(2, 1).repeat_interleave(2, 2))


def recomputed(model: EPVLM, sample: Sample, sparsity: float) -> View:
    """The same, and numbered so in the decoder too."""
    view = without_eq8(model, sample, sparsity)
    return replace(view, groups=view.keep[:, ::2, ::2])


def by_map(model: EPVLM, sample: Sample, sparsity: float, values: np.ndarray) -> View:
    """By any numbers in the place of E_v."""
    return model.look(sample.image, EventMap(values), Options(sparsity))


def by_chance(model: EPVLM, sample: Sample, sparsity: float) -> View:
    return by_map(model, sample, sparsity, np.random.default_rng((sample.seed, 1)).random(sample.shape))


def spread(model: EPVLM, sample: Sample, sparsity: float) -> View:
    return by_map(model, sample, sparsity, np.ones(sample.shape))  # all tie: the evenly spread order decides


def gradient(model: EPVLM, sample: Sample, sparsity: float) -> View:
    down, right = np.gradient(np.asarray(sample.image.convert("L"), dtype=np.float64))
    return by_map(model, sample, sparsity, np.hypot(down, right))


def redundancy(model: EPVLM, sample: Sample, sparsity: float) -> View:
    """After PixelPrune: what differs least from its left or upper neighbour goes first."""
    return by_map(model, sample, sparsity, novelty(np.asarray(sample.image), None, 28))


def cover_without_events(model: EPVLM, sample: Sample, sparsity: float) -> View:
    return model.look(sample.image, None, Options(sparsity, rule="cover"))


def spacing(model: EPVLM, sample: Sample, sparsity: float) -> View:
    """All cells are worth the same to `cover`."""
    flat = Image.new("RGB", sample.image.size, (GREY,) * 3)
    view = cover_without_events(model, replace(sample, image=flat), sparsity)
    return replace(view, patches=pack(dense(model, sample, 0).patches, group_order(view.keep)))


def spaced(received: np.ndarray, tau: float) -> np.ndarray:
    return cover_mask(worth(None, received), tau)


@torch.inference_mode()
def attention(model: EPVLM, sample: Sample, sparsity: float, rule=budget_mask) -> View:
    """In the manner of FoPru: the whole transformer runs; what its last layer attends to most stays."""
    view, given = dense(model, sample, sparsity), []
    hook = model.vit.blocks[-1].attn.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    H_v = model.vit(view.patches[None], view.keep)
    hook.remove()
    by_group = received(model.vit.blocks[-1].attn, *given[:3]).view(*view.groups.shape, -1).sum(dim=-1)
    groups = torch.from_numpy(rule(by_group.numpy(), 1 - sparsity))
    return Pruned(**vars(replace(view, groups=groups)), H_v=H_v[:, groups.flatten()])


def received(layer: Attention, z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Attention that each patch gets from all patches in all heads, (N,)."""
    q, k, _ = layer.qkv(z).unflatten(-1, (3, layer.num_heads, -1)).unbind(-3)  # each (1, N, heads, head_dim)
    scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q, cos, sin), rotate(k, cos, sin))
    return (scores * q.shape[-1] ** -0.5).softmax(dim=-1).sum(dim=(0, 1, 2))


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


def hot(sample: Sample) -> Events:
    """The recording with some pixels that fire all the time."""
    seen, rng, (height, width) = sample.events, np.random.default_rng((sample.seed, 2)), sample.shape
    y, x = np.divmod(rng.choice(height * width, HOT, replace=False).repeat(TIMES), width)
    t, p = rng.uniform(*seen.span, len(x)), rng.integers(0, 2, len(x))
    columns = ((seen.x, x), (seen.y, y), (seen.t, t), (seen.p, p))
    return Events(*(np.concatenate(pair) for pair in columns), "with hot pixels")


def shifted(sample: Sample) -> Events:
    """The recording of a camera that points further up and left: all events lie further down and right."""
    seen, (height, width) = sample.events, sample.shape
    x, y = seen.x.astype(int) + round(SHIFT * width), seen.y.astype(int) + round(SHIFT * height)
    inside = (x < width) & (y < height)
    return Events(x[inside], y[inside], seen.t[inside], seen.p[inside], "shifted")


def mirrored(sample: Sample) -> Events:
    return replace(sample.events, x=sample.shape[1] - 1 - sample.events.x.astype(int))


def faulty(model: EPVLM, sample: Sample, sparsity: float, fault: Callable[[Sample], Events], **options) -> View:
    return by_events(model, sample, sparsity, fault(sample), **options)


# For clips; `dense`, `by_events` and `cover_without_events` serve them too


def kept(model: EPVLM, sample: ClipSample, M: np.ndarray) -> View:
    """The view of a mask (T, cells_h, cells_w)."""
    keep, (before, _) = torch.from_numpy(M.repeat(2, 1).repeat(2, 2)), prompt_ids(model.tokenizer, "")
    patches = packed_patches(sample.image, keep, model.vit.config, model.image_config)
    return View(patches, keep, torch.from_numpy(M), None, "", None, len(before), model.video_pad)


def clip_by(model: EPVLM, sample: ClipSample, sparsity: float, value: Callable) -> View:
    """By any numbers (T, cells_h, cells_w) in the place of S."""
    return kept(model, sample, budget_mask(value(sample, 1 - sparsity), 1 - sparsity))


def rates(sample: ClipSample) -> np.ndarray:
    """S of Eq. 5, for frames of whole cells, which are not resized."""
    moments = sample.events.align(sample.image.size).cut(sample.image.edges)
    return motion(np.stack([each.accumulate() for each in moments]), 28) / sample.image.seconds


def each_moment(model: EPVLM, sample: ClipSample, sparsity: float) -> View:
    return kept(model, sample, np.concatenate([budget_mask(S_t[None], 1 - sparsity) for S_t in rates(sample)]))


def first_whole(values: np.ndarray) -> np.ndarray:
    values[0] = np.inf
    return values


def change(sample: ClipSample, tau: float) -> np.ndarray:
    """EVS (arXiv 2510.14624): L1 change of a cell's pixels from the moment before; the first moment is whole."""
    changed = np.abs(np.diff(sample.blocks, axis=0, prepend=0)).sum(axis=(1, 4))
    return first_whole(changed)


def runs(sample: ClipSample, tau: float) -> np.ndarray:
    """RLT (arXiv 2411.05222), DTD of TimeChat-Online (arXiv 2504.17343): mean difference of a moment's last frame and
    the first one of the moment before; they have a threshold in the place of our budget."""
    values = np.full(sample.cells, np.inf)
    values[1:] = np.abs(sample.blocks[1:, 1] - sample.blocks[:-1, 0]).mean(axis=3)
    return values


def from_frame_to_frame(sample: ClipSample, tau: float) -> np.ndarray:
    """What events see, from frames: the larger change of a cell's pixels within a moment, or since the one before."""
    frames = sample.blocks.reshape(-1, *sample.blocks.shape[2:])
    changed = np.abs(np.diff(frames, axis=0)).sum(axis=3)
    return np.concatenate([changed[:1], changed]).reshape(-1, 2, *changed.shape[1:]).max(axis=1)


def whole_moments(sample: ClipSample, tau: float) -> np.ndarray:
    values = np.zeros(sample.cells)
    values[evenly(len(values), max(1, round(tau * len(values))))] = 1
    return values


def fewer_frames(model: EPVLM, sample: ClipSample, sparsity: float) -> View:
    """As with --frames: evenly chosen, with both ends."""
    frames, times = sample.image.frames, sample.image.times
    numbers = evenly(len(frames), 2 * round((1 - sparsity) * sample.image.moments))
    return model.look(Clip([frames[n] for n in numbers], times[numbers]))


def smaller_frames(model: EPVLM, sample: ClipSample, sparsity: float) -> View:
    T, rows, columns = sample.cells
    height, width = shrunk(28 * rows, 28 * columns, budget(T * rows * columns, 1 - sparsity) // T)
    frames = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in sample.image.frames]
    small = Clip(frames, sample.image.times)
    return model.look(small, options=Options(min_pixels=height * width, max_pixels=height * width))


SELECTORS: dict[str, Callable] = {  # of model, sample and sparsity; a rule of one's own goes here
    "Eq. 6, ties broken": by_events,
    "Eq. 6, as printed": partial(by_events, rule="literal"),
    "Eq. 6, 14 px cells": partial(by_events, cell="patch"),
    "Eq. 6, without Eq. 8": without_eq8,
    "Eq. 6, positions recomputed": recomputed,
    "cover": partial(by_events, rule="cover"),
    "cover, without events": cover_without_events,
    "cover, spacing alone": spacing,
    "pixel redundancy": redundancy,
    "attention received": attention,
    "attention received, spaced": partial(attention, rule=spaced),
    "image gradient": gradient,
    "evenly spread": spread,
    "random": by_chance,
    "smaller image, dense": smaller,
}
CLIP_SPARSITIES = (0.5, 0.75, 0.875)
four_moments = partial(scenes.clip, frames=(7, 8))
WITH_EVENTS: dict[str, Callable] = {
    "Eq. 6 over the clip": by_events,
    "Eq. 6 for each moment": each_moment,
    "first moment whole, then Eq. 6": partial(clip_by, value=lambda sample, tau: first_whole(rates(sample))),
    "cover": partial(by_events, rule="cover"),
}
WITHOUT_EVENTS: dict[str, Callable] = {
    "cover, without events": cover_without_events,
    "pixels, EVS": partial(clip_by, value=change),
    "pixels, RLT and DTD": partial(clip_by, value=runs),
    "pixels, frame to frame": partial(clip_by, value=from_frame_to_frame),
    "whole moments": partial(clip_by, value=whole_moments),
    "fewer frames, dense": fewer_frames,
    "smaller frames, dense": smaller_frames,
    "evenly spread": partial(clip_by, value=lambda sample, tau: np.ones(sample.cells)),
    "random": partial(clip_by, value=lambda sample, tau: np.random.default_rng((sample.seed, 1)).random(sample.cells)),
}
CLIP_SELECTORS = WITH_EVENTS | WITHOUT_EVENTS
WHOLE = (  # not below a moment
    "first moment whole, then Eq. 6", "pixels, EVS", "pixels, RLT and DTD", "whole moments", "fewer frames, dense",
)  # fmt: skip
FAULTS: dict[str, dict] = {  # of the recording; the arguments of `faulty`
    "noisy camera": {"fault": lambda sample: sample.noisy},
    f"{HOT} hot pixels": {"fault": hot},
    f"{HOT} hot pixels, mended": {"fault": hot, "hot_pixels": "mend"},
    f"shifted by {SHIFT:.0%}": {"fault": shifted},
    "mirrored": {"fault": mirrored},
}
FAULTY = {  # the rules they happen to
    (fault, name): partial(faulty, rule=rule, **given)
    for fault, given in FAULTS.items()
    for name, rule in (("Eq. 6, ties broken", "exact"), ("cover", "cover"))
}
COMPARED = [  # with `cover`; they have as many tokens as it, or fewer
    "Eq. 6, ties broken", "cover, without events", "cover, spacing alone", "pixel redundancy", "attention received",
    "attention received, spaced", "image gradient", "evenly spread", "random", "smaller image, dense",
]  # fmt: skip


@dataclass
class Tally:
    """One row of the table, as it fills."""

    right: dict[str, list] = field(default_factory=lambda: defaultdict(list))  # column: (right, asked) by scene
    tokens: list[int] = field(default_factory=list)  # by scene, as all below
    flops: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def shares(self, columns: Iterable[str]) -> list[str]:
        return [accuracy(self.right[name]) for name in columns]

    def ahead(self, other: "Tally", columns: Iterable[str]) -> list[str]:
        """Points by which it is ahead of another."""
        return [difference(self.right[name], other.right[name]) for name in columns]

    def cost(self) -> str:
        seconds = 1e3 * np.median(self.seconds)
        return f"{np.mean(self.tokens):.1f} / {np.mean(self.flops) / 1e6:.0f} / {seconds:.1f}"


COLUMNS: dict[str, Callable[[scenes.Question], bool]] = {
    "moving": lambda question: question.kind != "count" and question.moving,
    "still": lambda question: question.kind != "count" and not question.moving,
    "how many": lambda question: question.kind == "count",
    "all": lambda question: True,
}
FRAMES: dict[str, Callable[[Sample], bool]] = {  # all questions about some of the scenes
    "small": lambda sample: min(sample.shape) // 28 == 4,
    "large": lambda sample: min(sample.shape) // 28 >= 6,
}
CLIP_COLUMNS: dict[str, Callable[[scenes.Question], bool]] = {
    "way": lambda question: question.kind in ("way", "which"),
    "what": lambda question: question.kind == "what",
    "stop and start": lambda question: question.kind in ("stop", "start"),
    "moving": lambda question: question.kind in ("colour", "shape") and question.moving,
    "still": lambda question: not question.moving,
    "all": lambda question: True,
}


def chosen(scene: scenes.Scene, seed: int) -> list[scenes.Question]:
    """Questions that are about moving or about still things; of a still scene also those that count."""
    still = scene.frames == 1
    fit = [q for q in scenes.questions(scene) if (still if q.kind == "count" else q.moving is not None)]
    return scenes.choose(fit, QUESTIONS, seed, scenes.KINDS if still else scenes.CLIP_KINDS)


def samples(count: int, make: Callable[[int], scenes.Scene] = scenes.scene) -> Iterator[Sample]:
    """Held-out scenes, or clips, until they have `count` questions or more."""
    asked = 0
    for seed in range(scenes.TRAIN):
        scene = make(seed)
        questions, recording = chosen(scene, seed), scenes.record(scene)
        if scene.frames == 1:
            yield Sample(Image.fromarray(scenes.render(scene)), recording, seed, questions)
        else:
            yield ClipSample(scenes.shown(scene), recording, seed, questions)
        asked += len(questions)
        if asked >= count:
            return


@torch.inference_mode()
def answers(model: EPVLM, view: View, questions: list[scenes.Question]) -> list[bool]:
    """Whether each of the questions about a view is answered correctly."""
    H_v = view.H_v if isinstance(view, Pruned) else model.vit(view.patches[None], view.keep)
    return score(model, H_v, view.groups, questions)[1].tolist()


def examine(model: EPVLM, choose: Callable, sample, sparsity: float, tally: Tally) -> list[bool]:
    """Asks all the questions of a sample, once its groups are chosen; returns which answers are right."""
    view, still = choose(model, sample, sparsity), not isinstance(sample, ClipSample)
    right = answers(model, view, sample.questions)
    for name, belongs in (COLUMNS if still else CLIP_COLUMNS).items():
        known = [ok for question, ok in zip(sample.questions, right, strict=True) if belongs(question)]
        tally.right[name].append((sum(known), len(known)))
    for name, belongs in FRAMES.items() if still else ():
        tally.right[name].append((sum(right), len(right)) if belongs(sample) else (0, 0))
    tally.flops.append(model.flops(view, sample.questions[0].text)[0])
    tally.tokens.append(view.tokens)
    return right


def clock(model: EPVLM, choose: Callable, sample, sparsity: float) -> float:
    """Processor seconds from image and events to one answer, read in one pass."""
    sample = replace(sample, events=replace(sample.events))  # without what is cached: span, blocks
    start = time.process_time()
    answers(model, choose(model, sample, sparsity), sample.questions[:1])
    return time.process_time() - start


def guesses(questions: list[scenes.Question], seen: list[scenes.Question], columns=COLUMNS) -> list[str]:
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
    for belongs in columns.values():
        right = [given[form(q)].most_common(1)[0][0] == q.answer for q in questions if belongs(q)]
        shares.append(f"{100 * np.mean(right):.1f}" if right else "none asked")
    return shares


def tables(tallies: dict[tuple, Tally], guessed: list[str]) -> Iterator[str]:
    """Right answers by sparsity; how `cover` differs; what a faulty recording does; the costs."""
    columns = (*COLUMNS, *FRAMES)
    for sparsity in SPARSITIES:
        rows = [[name, *tallies[sparsity, name].shares(columns)] for name in SELECTORS]
        yield f"Right answers at sparsity {sparsity:g}:\n\n" + markdown(["groups chosen by", *columns], rows)
    whole = tallies[0, "dense"]
    rows = [["dense", *whole.shares(columns)], ["guessing", *guessed, "", ""]]
    yield "Right answers with nothing dropped, and without an image:\n\n" + markdown(["", *columns], rows)
    rows = [
        [f"{sparsity:g}", name, *tallies[sparsity, "cover"].ahead(tallies[sparsity, name], columns)]
        for sparsity, name in product(SPARSITIES, COMPARED)
    ]
    yield "Points that cover is ahead of other rules:\n\n" + markdown(["sparsity", "other rule", *columns], rows)
    head = ["fault of the recording", "rule", *(f"{sparsity:g}" for sparsity in SPARSITIES[1:])]
    sound = [(("none", name), name) for name in ("Eq. 6, ties broken", "cover", "cover, without events")]
    for which, what in (("moving", "moving things"), ("all", "all questions")):
        rows = [
            [*words, *(share for sparsity in SPARSITIES[1:] for share in tallies[sparsity, key].shares([which]))]
            for words, key in (*sound, *((fault, fault) for fault in FAULTY))
        ]
        yield f"Right answers to {what} by sparsity, when something is wrong:\n\n" + markdown(head, rows)
    rows = [[name, *(tallies[sparsity, name].cost() for sparsity in SPARSITIES)] for name in SELECTORS]
    head = ["groups chosen by", *(f"{sparsity:g}" for sparsity in SPARSITIES)]
    yield f"Tokens / MFLOPs / ms by sparsity; dense {whole.cost()}:\n\n" + markdown(head, rows)


def clip_tables(tallies: dict[tuple, Tally], guessed: list[str]) -> Iterator[str]:
    """Right answers and costs by sparsity; how the rules by events differ from the best one without."""
    head, dense = ["tokens chosen by", *CLIP_COLUMNS, "tokens / MFLOPs / ms"], tallies[0, "dense"]
    rows = [["dense", *dense.shares(CLIP_COLUMNS), dense.cost()], ["guessing", *guessed, ""]]
    yield "Right answers with nothing dropped, and without a clip:\n\n" + markdown(head, rows)
    differences = []
    for sparsity in CLIP_SPARSITIES:
        found = {name: tally for (at, name), tally in tallies.items() if at == sparsity}
        rows = [[name, *tally.shares(CLIP_COLUMNS), tally.cost()] for name, tally in found.items()]
        yield f"Right answers at {1 - sparsity:.1%} of the tokens:\n\n" + markdown(head, rows)
        plain = filter(found.get, WITHOUT_EVENTS)
        best = max(plain, key=lambda name: sum(right for right, _ in found[name].right["all"]))
        for name in filter(found.get, WITH_EVENTS):
            differences.append([f"{1 - sparsity:.1%}", name, best, *found[name].ahead(found[best], CLIP_COLUMNS)])
    head = ["tokens", "rule", "best rule without events", *CLIP_COLUMNS]
    yield "Points that rules by events are ahead of the best rule without:\n\n" + markdown(head, differences)


def kinds(questions: list[scenes.Question], right: list[bool]) -> str:
    """Right and asked of each kind of question, in words."""
    order = dict.fromkeys((*scenes.KINDS, *scenes.CLIP_KINDS))
    asked = Counter(question.kind for question in questions)
    known = Counter(question.kind for question, ok in zip(questions, right, strict=True) if ok)
    shares = ", ".join(f"{kind} {known[kind]} of {asked[kind]}" for kind in order if asked[kind])
    return f"{sum(right)} of {len(right)} ({100 * np.mean(right):.1f} %): {shares}"


@dataclass
class Exhibit:
    """What is asked about, and how the groups are chosen."""

    what: str
    make: Callable[[int], scenes.Scene]  # of a seed
    rows: dict[tuple, Callable]  # (sparsity, name): of model, sample and sparsity
    columns: dict
    tables: Callable[[dict, list[str]], Iterator[str]]


def still_exhibit() -> Exhibit:
    rows = {(0, "dense"): dense}
    rows |= {(sparsity, name): choose for sparsity in SPARSITIES for name, choose in SELECTORS.items()}
    rows |= {(sparsity, fault): choose for sparsity in SPARSITIES[1:] for fault, choose in FAULTY.items()}
    return Exhibit("scenes", scenes.scene, rows, COLUMNS, tables)


def clip_exhibit() -> Exhibit:
    rows = {(0, "dense"): dense}
    pairs = product(CLIP_SPARSITIES, CLIP_SELECTORS.items())
    rows |= {(sparsity, name): choose for sparsity, (name, choose) in pairs if sparsity <= 0.75 or name not in WHOLE}
    return Exhibit("clips", four_moments, rows, CLIP_COLUMNS, clip_tables)


def run(exhibit: Exhibit, count: int, checkpoint: str | Path) -> None:
    if count < 1:
        raise ValueError(f"questions {count}: give 1 or more")
    torch.set_num_threads(1)
    model = EPVLM.from_pretrained(checkpoint, device="cpu")
    tallies, questions, right = {row: Tally() for row in exhibit.rows}, [], []
    for number, sample in enumerate(samples(count, exhibit.make), 1):
        for (sparsity, name), choose in exhibit.rows.items():
            with warnings.catch_warnings(action="ignore"):  # of hot pixels
                known = examine(model, choose, sample, sparsity, tallies[sparsity, name])
                if sparsity == 0:
                    right += known
                if number <= TIMED and name not in FAULTY:
                    tallies[sparsity, name].seconds.append(clock(model, choose, sample, sparsity))
        questions += sample.questions
        if sys.stderr.isatty():
            bar = "#" * min(40, 40 * len(questions) // count)
            told = f"{len(questions)} questions, {number} {exhibit.what}"
            print(f"\r[{bar:40}] {told}", end="\r", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\033[K", end="", file=sys.stderr)
    asked = ", ".join(f"{sum(map(belongs, questions))} {name}" for name, belongs in exhibit.columns.items())
    print(f"Questions about {number} held-out {exhibit.what}: {asked}.\nDense, right: {kinds(questions, right)}.")
    trained = range(scenes.TRAIN, scenes.TRAIN + 500)
    seen = [question for seed in trained for question in chosen(exhibit.make(seed), seed)]
    print(*("", *exhibit.tables(tallies, guesses(questions, seen, exhibit.columns))), sep="\n\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("evidence", description="Accuracy by how the kept groups are chosen, as Markdown tables.")
    parser.add_argument(
        "about", nargs="?", choices=("stills", "clips"), default="stills", help="(default: %(default)s)"
    )
    parser.add_argument("--questions", type=int, default=2000, help="at least so many (default: %(default)s)")
    parser.add_argument("--model", default=TINY, help="a checkpoint trained on the scenes (default: examples/tiny)")
    args = parser.parse_args(argv)
    exhibit = clip_exhibit() if args.about == "clips" else still_exhibit()
    return exit_status("evidence", lambda: run(exhibit, args.questions, args.model))


if __name__ == "__main__":
    sys.exit(main())
