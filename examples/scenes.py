"""Scenes made up from a seed: things of a colour and a shape before a textured background, some moving, some still.

Each scene gives an RGB frame, the events an ideal camera records while the moving things move, and questions with short
answers. A clip is a scene with several frames, and asks what moves where, what stops and what starts. Training scenes
have the seeds from TRAIN on, held-out scenes those below.

    python examples/scenes.py 7 --image scene.png --events events.npy
    python examples/scenes.py 7 --clip --image clip.webp --events clip.npy

write held-out scene 7, or clip 7 as an animated image, and print its questions.

Glossary
    thing            a circle, square, triangle or cross; x, y its centre, size its width, all in pixels of the frame
    frame            time 0 is the frame that is shown; the motion before it (times -1 to 0) makes the events; the
                     frames of a clip are evenly spread from -1 to 0
    spell            from when to when a thing moves: in a clip all the time, or it stops halfway, or starts halfway
    moving           of a question: True if all the things it needs move, False if all stand still, else None
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from camera import IDEAL, CameraOptions, camera
from common import Parser, check_output, exit_status, save_events, write_whole
from events import Events
from vit import Clip

TRAIN = 1_000_000  # the first seed of a training scene
COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 70, 215),
    "yellow": (225, 205, 50),
    "purple": (160, 55, 190),
    "cyan": (60, 195, 205),
}
SHAPES = ("circle", "square", "triangle", "cross")
THINGS = (2, 4)  # in a scene
SIDES = (4, 8)  # the frame's smallest and largest side, in groups of 28 pixels
KINDS = ("colour", "shape", "place", "count", "relation")
CLIP_KINDS = ("way", "nowhere", "which", "what", "still", "stop", "start", "colour", "shape", "count")
CLIP_THINGS, CLIP_SIDES, FRAMES = (2, 3), (4, 6), (4, 8)  # of a clip, least and most
SPELLS = {"go": (-1.0, 0.0), "stop": (-1.0, -0.5), "start": (-0.5, 0.0)}
PERIOD = 40_000  # microseconds between two frames of a clip
WAYS = ("right", "down", "left", "up")  # by quarter turns from the x axis
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    x: float
    y: float
    size: float
    velocity: tuple[float, float]  # pixels from time -1 to 0; (0, 0) stands still
    texture: int  # seed
    spell: tuple[float, float] = SPELLS["go"]

    def place(self, time: float) -> tuple[float, float]:
        """Its centre at a time from -1 to 0."""
        start, end = self.spell
        past = min(max(time, start), end) - end
        return self.x + self.velocity[0] * past, self.y + self.velocity[1] * past

    @property
    def way(self) -> str:
        """Which way it moves, by the nearest axis."""
        turns = round(2 * np.arctan2(self.velocity[1], self.velocity[0]) / np.pi)
        return WAYS[turns % 4] if self.moves else "nowhere"

    @property
    def moves(self) -> bool:
        return self.velocity != (0, 0)

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Question:
    text: str
    answer: str
    kind: str  # one of KINDS, of a clip one of CLIP_KINDS
    moving: bool | None


@dataclass(frozen=True)
class Scene:
    height: int
    width: int
    things: tuple[Thing, ...]
    texture: int  # seed
    frames: int = 1

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


def scene(seed: int, things: tuple[int, int] = THINGS, size: tuple[int, int] | None = None) -> Scene:
    """The scene of a seed, with the least and the most `things`; of two or more some move and some stand still.

    size: (height, width) in pixels, drawn unless given; the things must find room in it.
    """
    if seed < 0:
        raise ValueError(f"seed {seed}: give 0 or more")
    rng = np.random.default_rng(seed)
    height, width = size or (28 * int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, 2))
    places: list[tuple[float, float, float]] = []
    while not places:  # until the things have found room
        places = _places(rng, height, width, int(rng.integers(things[0], things[1] + 1)))
    names = _names(rng, len(places))
    moving = rng.permutation(np.arange(len(places)) < rng.integers(1, max(2, len(places))))
    made = []
    for (x, y, across), (colour, shape), moves in zip(places, names, moving, strict=True):
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(4, 8)
        velocity = (float(speed * np.cos(angle)), float(speed * np.sin(angle))) if moves else (0, 0)
        made.append(Thing(shape, colour, x, y, across, velocity, int(rng.integers(2**31))))
    return Scene(height, width, tuple(made), int(rng.integers(2**31)))


def _places(rng, height: int, width: int, count: int) -> list[tuple[float, float, float]]:
    """Centres and sizes of things that do not touch when shown; none if some find no room."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(60):
        size = rng.uniform(0.30, 0.42) * min(height, width)
        margin = size / 2 + 2
        x, y = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
        if all(max(abs(x - u), abs(y - v)) > (size + other) / 2 + 4 for u, v, other in placed):
            placed.append((x, y, size))
        if len(placed) == count:
            return placed
    return []


def clip(seed: int, things=CLIP_THINGS, frames=FRAMES, spells=tuple(SPELLS), size=None) -> Scene:
    """The clip of a seed: a scene with several frames, in which one or two things move, each with another of the
    `spells` if there are so many, and of three things at least one stands still.

    things, frames: the least and the most; size: as in `scene`."""
    if seed < 0:
        raise ValueError(f"seed {seed}: give 0 or more")
    rng = np.random.default_rng((seed, 1))
    height, width = size or (28 * int(side) for side in rng.integers(CLIP_SIDES[0], CLIP_SIDES[1] + 1, 2))
    paths: list[dict] = []
    while not paths:  # until the things have found room
        count = int(rng.integers(things[0], things[1] + 1))
        movers = int(rng.integers(1, min(count, 2) + 1))
        chosen = rng.choice(spells, movers, replace=len(spells) < movers)
        paths = _paths(rng, height, width, [*chosen, *[None] * (count - movers)])
    names = _names(rng, len(paths))
    made = [Thing(shape, colour, texture=int(rng.integers(2**31)), **path)
            for path, (colour, shape) in zip(paths, names, strict=True)]  # fmt: skip
    made = [made[k] for k in rng.permutation(len(made))]
    return Scene(height, width, tuple(made), int(rng.integers(2**31)), int(rng.integers(frames[0], frames[1] + 1)))


def _paths(rng, height: int, width: int, spells: list[str | None]) -> list[dict]:
    """Places and motions of things, a spell for each, None for one that stands still. They never touch, not even the
    place where another was; none if some find no room."""
    made: list[dict] = []
    boxes: list[tuple[float, ...]] = []  # what each sweeps over: left, top, right, bottom
    for _ in range(60):
        spell, short = spells[len(made)], min(height, width)
        size, (start, end) = rng.uniform(0.28, 0.38) * short, SPELLS[spell or "go"]
        angle = np.pi / 2 * rng.integers(4) + np.radians(rng.uniform(-20, 20))
        speed = rng.uniform(0.25, 0.5) * short if spell else 0
        velocity = (float(speed * np.cos(angle)), float(speed * np.sin(angle))) if spell else (0, 0)
        across, down = (part * (end - start) for part in velocity)  # it ends at x, y, and begins so far before
        margin = size / 2 + 2
        x = rng.uniform(margin + max(across, 0), width - margin + min(across, 0))
        y = rng.uniform(margin + max(down, 0), height - margin + min(down, 0))
        box = (min(x, x - across) - margin, min(y, y - down) - margin,
               max(x, x - across) + margin, max(y, y - down) + margin)  # fmt: skip
        if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in boxes):
            boxes.append(box)
            made.append({"x": x, "y": y, "size": size, "velocity": velocity, "spell": (start, end)})
        if len(made) == len(spells):
            return made
    return []


def _names(rng, count: int) -> list[tuple[str, str]]:
    """Colour and shape of each thing: no pair twice, but a colour or a shape alone is often shared."""
    names: list[tuple[str, str]] = []
    while len(names) < count:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if names and rng.random() < 0.6:
            shared = names[rng.integers(len(names))]
            colour, shape = (shared[0], shape) if rng.random() < 0.5 else (colour, shared[1])
        if (colour, shape) not in names:
            names.append((colour, shape))
    return names


def render(scene: Scene, time: float = 0.0) -> np.ndarray:
    """The scene at a time from -1 to 0, (height, width, 3) uint8."""
    return next(film(scene, (time,)))


def film(scene: Scene, times: Iterable[float] | None = None) -> Iterator[np.ndarray]:
    """The scene at several times, of a clip those of its frames unless given."""
    rng = np.random.default_rng(scene.texture)
    base, tint = rng.uniform(50, 110), rng.uniform(-8, 8, 3)
    ground = base + tint + 30 * _noise(rng, scene.height, scene.width, 12)[:, :, None]
    for time in np.linspace(-1, 0, scene.frames) if times is None else times:
        image = ground.copy()
        for thing in scene.things:
            _draw(image, thing, time)
        yield np.clip(image + 0.5, 0, 255).astype(np.uint8)


def shown(scene: Scene) -> Clip:
    """A clip as the program takes it: its frames, and their times on the clock of `record`."""
    return Clip([Image.fromarray(frame) for frame in film(scene)], PERIOD * np.arange(scene.frames))


def record(scene: Scene, options: CameraOptions = IDEAL) -> Events:
    """The events of the motion that ends in the shown frame: nine frames in 40 ms; of a clip, those from its first
    frame to its last, by steps of a pixel at most."""
    steps, length = 8, PERIOD * max(1, scene.frames - 1)
    if scene.frames > 1:
        steps = int(max(8, *(np.ceil(np.hypot(*thing.velocity)) for thing in scene.things)))
    times = (k / steps - 1 for k in range(steps + 1))
    return camera(zip((length * k / steps for k in range(steps + 1)), film(scene, times), strict=True), options)


def _noise(rng, height: int, width: int, cell: float) -> np.ndarray:
    """Smooth noise from -1 to 1 with lumps of about `cell` pixels, (height, width)."""
    coarse = rng.uniform(-1, 1, (int(height / cell) + 3, int(width / cell) + 3)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def _draw(image: np.ndarray, thing: Thing, time: float) -> None:
    """Paints a thing with smooth edges; its texture moves with it."""
    rng = np.random.default_rng(thing.texture)
    reach = int(thing.size / 2 + 3)
    lumps = 1 + 0.2 * _noise(rng, 2 * reach + 8, 2 * reach + 8, 7)
    shade = np.array(COLOURS[thing.colour]) * rng.uniform(0.85, 1.15)
    x, y = thing.place(time)
    top, left = max(0, int(y) - reach), max(0, int(x) - reach)
    window = image[top : int(y) + reach + 1, left : int(x) + reach + 1]
    rows, columns = np.indices(window.shape[:2])
    down, right = rows + top - y, columns + left - x
    cover = np.clip(0.5 - _distance(thing.shape, right, down, thing.size / 2), 0, 1)[:, :, None]
    texture = _sample(lumps, down + reach + 4, right + reach + 4)[:, :, None]
    window[:] = (1 - cover) * window + cover * shade * texture


def _sample(texture: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Values of a texture between its pixels, bilinear; row and column of equal shape, inside."""
    i, j = row.astype(int), column.astype(int)
    a, b = row - i, column - j
    upper = (1 - b) * texture[i, j] + b * texture[i, j + 1]
    lower = (1 - b) * texture[i + 1, j] + b * texture[i + 1, j + 1]
    return (1 - a) * upper + a * lower


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape of half-width r around (0, 0), negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * r
    if shape == "triangle":  # upright, its base at the bottom
        return np.maximum(y - 0.8 * r, (1.8 * abs(x) - y - r) / (1 + 1.8**2) ** 0.5)
    arm = 0.3 * r  # cross
    return np.minimum(np.maximum(abs(x) - arm, abs(y) - r), np.maximum(abs(x) - r, abs(y) - arm))


def questions(scene: Scene) -> list[Question]:
    """All the questions that a scene answers without doubt."""
    found: list[Question] = []

    def ask(kind: str, text: str, answer: str, *needed: Thing) -> None:
        kinds = {thing.moves for thing in needed}
        found.append(Question(text, answer, kind, kinds.pop() if len(kinds) == 1 else None))

    for shape in SHAPES:
        alike = [thing for thing in scene.things if thing.shape == shape]
        ask("count", f"how many things are a {shape}?", str(len(alike)), *alike)
    for colour in COLOURS:
        alike = [thing for thing in scene.things if thing.colour == colour]
        ask("count", f"how many things are {colour}?", str(len(alike)), *alike)
    if scene.frames > 1:
        _ask_of_time(scene, ask)
    for thing in scene.things:
        by_shape = sum(other.shape == thing.shape for other in scene.things) == 1
        by_colour = sum(other.colour == thing.colour for other in scene.things) == 1
        if by_shape:
            ask("colour", f"what colour is the {thing.shape}?", thing.colour, thing)
        if by_colour:
            ask("shape", f"what shape is the {thing.colour} thing?", thing.shape, thing)
        if scene.frames > 1:
            continue  # in a clip, places are those of some time
        for name in (thing.name, *[thing.shape] * by_shape, *[f"{thing.colour} thing"] * by_colour):
            for text, low, high, place in (
                ("left or right", "left", "right", thing.x / scene.width),
                ("high or low", "high", "low", thing.y / scene.height),
            ):
                if not 1 / 3 < place < 2 / 3:
                    ask("place", f"is the {name} {text}?", low if place < 0.5 else high, thing)
            for relation, direction in RELATIONS.items():
                other = _only(scene, thing, direction)
                if other:
                    ask("relation", f"what is {relation} the {name}?", other.name, thing, other)
    return found


def _ask_of_time(scene: Scene, ask: Callable) -> None:
    """The questions that need several frames."""
    movers, still = ([thing for thing in scene.things if thing.moves == moves] for moves in (True, False))
    for thing in scene.things:
        ask("way" if thing.moves else "nowhere", f"which way does the {thing.name} move?", thing.way, thing)
    if len(movers) == 1:
        ask("which", "which way does the thing that moves move?", movers[0].way, movers[0])
        ask("what", "what moves?", movers[0].name, movers[0])
        ask("what", "what colour is the thing that moves?", movers[0].colour, movers[0])
    if len(still) == 1:
        ask("still", "what stands still?", still[0].name, still[0])
    for kind in ("stop", "start"):
        found = [thing for thing in movers if thing.spell == SPELLS[kind]]
        if len(found) == 1 < len(movers) and scene.frames > 3:  # else what moves at all would tell it
            ask(kind, f"what {kind}s?", found[0].name, found[0])


def choose(everything: list[Question], limit: int, seed: int = 0, order=KINDS) -> list[Question]:
    """Up to `limit` of a scene's questions: kinds in turn, and of a kind its answers in turn, so that none is rare.
    order: the kinds, CLIP_KINDS for a clip."""
    rng = np.random.default_rng(seed)
    shuffled = [everything[k] for k in rng.permutation(len(everything))]
    kinds: dict[str, list[Question]] = {str(kind): [] for kind in rng.permutation(order)}
    for kind in kinds:
        answers: dict[str, list[Question]] = {}
        for question in shuffled:
            if question.kind == kind:
                answers.setdefault(question.answer, []).append(question)
        kinds[kind] = _in_turn(answers.values())
    return _in_turn(kinds.values())[:limit]


def _in_turn(lists) -> list[Question]:
    """The first of every list, then the second of every list, and so on."""
    return [item for turn in zip_longest(*lists) for item in turn if item]


def _only(scene: Scene, thing: Thing, direction: tuple[int, int]) -> Thing | None:
    """The one thing that stands clearly in a direction from another; None if there are several, or one is in doubt."""
    ahead = {
        other: direction[0] * (other.x - thing.x) + direction[1] * (other.y - thing.y)
        for other in scene.things
        if other is not thing
    }
    clear = [other for other, distance in ahead.items() if distance > 0.3 * max(thing.size, other.size)]
    doubt = [other for other, distance in ahead.items() if other not in clear and distance > -0.1 * thing.size]
    return clear[0] if len(clear) == 1 and not doubt else None


def write(made: Scene, image: Path, events: Path) -> None:
    """Frame and events of a scene to files, its questions to standard output. A clip is written as an animated WebP,
    which loses nothing."""
    if check_output(image, ".webp" if made.frames > 1 else "") == check_output(events):
        raise ValueError(f"{image}: named twice; give --image and --events names of their own")
    frames = list(film(made)) if made.frames > 1 else [render(made)]
    if any(np.array_equal(*pair) for pair in pairwise(frames)):
        raise ValueError("in this clip everything rests for a while, and WebP merges such frames; give another seed")
    first, *others = map(Image.fromarray, frames)
    animated = {"save_all": True, "append_images": others, "duration": PERIOD // 1000, "lossless": True, "method": 6}
    write_whole(image, lambda file: first.save(file, "WEBP", **animated) if others else first.save(file, "PNG"))
    save_events(record(made), events)
    about = {True: "moving", False: "still", None: "moving and still, or nothing"}
    for question in questions(made):
        print(f"{question.text}  {question.answer}  ({question.kind}, {about[question.moving]})")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("scenes", description="Writes a scene's frame and events, and prints its questions.")
    parser.add_argument("seed", type=int, help=f"of the scene; below {TRAIN} it is a held-out one")
    parser.add_argument("--clip", action="store_true", help="several frames")
    parser.add_argument("--image", type=Path, help="default: scene.png, of a clip clip.webp")
    parser.add_argument("--events", type=Path, default=Path("events.npy"))
    args = parser.parse_args(argv)
    make, name = (clip, "clip.webp") if args.clip else (scene, "scene.png")
    return exit_status("scenes", lambda: write(make(args.seed), args.image or Path(name), args.events))


if __name__ == "__main__":
    sys.exit(main())
