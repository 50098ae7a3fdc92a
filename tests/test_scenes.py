"""The scenes of examples/: what they show, what they ask, and where their events lie."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import scenes
from epvlm import read_clip
from events import read_events
from scenes import (
    CLIP_KINDS,
    COLOURS,
    FRAMES,
    KINDS,
    PERIOD,
    SHAPES,
    SPELLS,
    Scene,
    Thing,
    choose,
    clip,
    film,
    questions,
    record,
    render,
    scene,
    shown,
)

SEEDS = st.integers(0, 10**6)


def still(*things) -> Scene:
    """A scene from (shape, colour, x, y, moves), each 40 pixels wide, in 196 x 196 pixels."""
    made = (Thing(shape, colour, x, y, 40, (5.0, 0.0) if moves else (0, 0), 1) for shape, colour, x, y, moves in things)
    return Scene(196, 196, tuple(made), 1)


def asked(scene: Scene) -> dict[str, tuple]:
    return {question.text: (question.answer, question.kind, question.moving) for question in questions(scene)}


@given(SEEDS)
def test_a_seed_is_a_scene(seed):
    made = scene(seed)
    assert made == scene(seed) != scene(seed + 1)
    assert np.array_equal(render(made), render(scene(seed)))
    assert questions(made) == questions(scene(seed)) and choose(questions(made), 8, 1) == choose(questions(made), 8, 1)
    assert 2 <= len(made.things) <= 4 and made.height % 28 == made.width % 28 == 0
    assert 112 <= min(made.size) and max(made.size) <= 224
    assert {thing.moves for thing in made.things} == {True, False}
    assert len({thing.name for thing in made.things}) == len(made.things)


@given(SEEDS)
def test_things_are_inside_apart_and_of_their_colour(seed):
    made = scene(seed)
    image = render(made).astype(int)
    for thing in made.things:
        half = thing.size / 2
        assert half <= thing.x <= made.width - half and half <= thing.y <= made.height - half
        for other in made.things:
            apart = max(abs(thing.x - other.x), abs(thing.y - other.y))
            assert other is thing or apart > (thing.size + other.size) / 2
        centre = image[int(thing.y), int(thing.x)]
        nearest = min(COLOURS, key=lambda name: np.abs(centre / max(centre) - np.divide(COLOURS[name], 255)).sum())
        assert nearest == thing.colour


@given(SEEDS)
def test_events_lie_where_things_move_and_nowhere_else(seed):
    made = scene(seed)
    E_v = replace(record(made), sensor=(made.width, made.height)).accumulate()
    rest = E_v.copy()
    for thing in made.things:
        if thing.moves:
            reach = thing.size / 2 + 11  # it comes from up to 8 pixels away
            rows = slice(max(0, int(thing.y - reach)), int(thing.y + reach) + 1)
            columns = slice(max(0, int(thing.x - reach)), int(thing.x + reach) + 1)
            assert E_v[rows, columns].sum() > 20
            rest[rows, columns] = 0
    assert rest.sum() == 0


@given(SEEDS)
def test_a_seed_is_a_clip(seed):
    made = clip(seed)
    assert made == clip(seed) != clip(seed + 1)
    assert 2 <= len(made.things) <= 3 and FRAMES[0] <= made.frames <= FRAMES[1]
    movers = [thing for thing in made.things if thing.moves]
    assert 1 <= len(movers) <= 2 and len({thing.spell for thing in movers}) == len(movers)
    assert 112 <= min(made.size) and max(made.size) <= 168 and made.height % 28 == made.width % 28 == 0
    frames = list(film(made))
    assert len(frames) == made.frames and np.array_equal(frames[-1], render(made))
    seen = shown(made)
    assert seen.times.tolist() == [PERIOD * k for k in range(made.frames)]
    assert all(np.array_equal(seen.frame(k), frame) for k, frame in enumerate(frames))


@given(SEEDS)
def test_things_of_a_clip_stay_inside_and_apart_and_rest_outside_their_spell(seed):
    made = clip(seed)
    for time in np.linspace(-1, 0, 9):
        for thing in made.things:
            (x, y), half = thing.place(time), thing.size / 2
            assert half <= x <= made.width - half and half <= y <= made.height - half
            start, end = thing.spell
            assert thing.place(time) == thing.place(min(max(time, start), end))
            for other in made.things:
                u, v = other.place(time)
                assert other is thing or max(abs(x - u), abs(y - v)) > (thing.size + other.size) / 2
    for thing in made.things:
        (x, y), (u, v) = thing.place(-1), thing.place(0)
        along = {"right": u - x, "left": x - u, "down": v - y, "up": y - v, "nowhere": 0}
        assert max(along, key=along.get) == thing.way or not thing.moves
        assert (thing.place(-0.5) == (u, v)) == (not thing.moves or thing.spell == SPELLS["stop"])
        assert (thing.place(-0.5) == (x, y)) == (not thing.moves or thing.spell == SPELLS["start"])


@given(SEEDS)
def test_events_of_a_clip_lie_where_and_when_things_move(seed):
    made = clip(seed)
    seen, length = record(made), PERIOD * (made.frames - 1)
    expected = np.zeros(len(seen), dtype=bool)
    for thing in made.things:
        places, reach = np.array([thing.place(-1), thing.place(0)]), thing.size / 2 + 3
        (left, top), (right, bottom) = places.min(axis=0) - reach, places.max(axis=0) + reach
        start, end = ((edge + 1) * length for edge in thing.spell)
        near = (left <= seen.x) & (seen.x <= right) & (top <= seen.y) & (seen.y <= bottom)
        during = near & (start - PERIOD / 4 <= seen.t) & (seen.t <= end + PERIOD / 4)  # frames lie between
        assert during.sum() > 50 or not thing.moves
        expected |= during & thing.moves
    assert expected.all()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_and_fill_their_size(shape):
    blank = render(Scene(112, 112, (), 1)).astype(int)
    covered = {}
    for name in SHAPES:
        image = render(Scene(112, 112, (Thing(name, "yellow", 56, 56, 60, (0, 0), 1),), 1)).astype(int)
        covered[name] = np.abs(image - blank).sum(axis=2) > 40
    rows, columns = covered[shape].nonzero()
    assert 48 <= np.ptp(rows) <= 61 and 48 <= np.ptp(columns) <= 61
    assert all((covered[shape] ^ covered[name]).sum() > 200 for name in SHAPES if name != shape)


def test_answers_written_out():
    made = asked(
        still(("circle", "red", 40, 40, True), ("square", "blue", 150, 100, True), ("cross", "red", 90, 160, False))
    )
    assert made["what colour is the circle?"] == ("red", "colour", True)
    assert made["what colour is the cross?"] == ("red", "colour", False)
    assert made["what shape is the blue thing?"] == ("square", "shape", True)
    assert "what shape is the red thing?" not in made
    assert made["how many things are red?"] == ("2", "count", None)
    assert made["how many things are blue?"] == ("1", "count", True)
    assert made["how many things are a triangle?"] == ("0", "count", None)
    assert made["is the red circle left or right?"] == ("left", "place", True)
    assert made["is the red circle high or low?"] == ("high", "place", True)
    assert made["is the red cross high or low?"] == ("low", "place", False)
    assert "is the red cross left or right?" not in made and "is the blue square high or low?" not in made
    assert made["what is left of the red cross?"] == ("red circle", "relation", None)
    assert made["what is right of the red cross?"] == ("blue square", "relation", None)
    assert made["what is above the blue square?"] == ("red circle", "relation", True)
    assert made["what is below the blue square?"] == ("red cross", "relation", None)
    assert "what is left of the blue square?" not in made  # there are two
    assert "what is left of the red circle?" not in made  # there is none


def test_a_relation_in_doubt_is_not_asked():
    made = asked(still(("circle", "red", 100, 40, True), ("square", "blue", 95, 150, True)))
    assert "what is left of the red circle?" not in made and "what is right of the blue square?" not in made
    assert made["what is above the blue square?"][0] == "red circle"


@given(SEEDS)
def test_every_answer_follows_from_the_things(seed):
    """Read back from the words of question and answer alone."""
    made = scene(seed)
    named = {thing.name: thing for thing in made.things}

    def meant(words: list[str]) -> list[Thing]:
        return [t for t in made.things if {t.shape, t.colour, "thing"} >= set(words)]

    for question in questions(made):
        words = question.text.rstrip("?").split()
        if question.kind == "count":
            assert int(question.answer) == sum(words[-1] in (thing.shape, thing.colour) for thing in made.things)
        elif question.kind in ("colour", "shape"):
            (thing,) = [t for t in made.things if (t.shape if question.kind == "colour" else t.colour) in words]
            assert question.answer == getattr(thing, question.kind) and question.moving == thing.moves
        elif question.kind == "place":
            (thing,) = meant(words[2:-3])
            share = {"l": thing.x / made.width, "h": thing.y / made.height}[words[-3][0]]
            assert question.answer == (words[-3] if share < 1 / 3 else words[-1]) and not 1 / 3 < share < 2 / 3
        else:
            (thing,) = meant(words[words.index("the") + 1 :])
            other = named[question.answer]
            axis, sign = {"left": ("x", -1), "right": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[words[2]]
            ahead = [t for t in made.things if sign * (getattr(t, axis) - getattr(thing, axis)) > 0]
            assert ahead == [other] and question.moving in (thing.moves, None)


def test_answers_about_a_clip_written_out():
    right, up = (20.0, 1.0), (1.0, -20.0)
    red = Thing("circle", "red", 40, 40, 40, right, 1, SPELLS["stop"])
    blue = Thing("cross", "blue", 150, 150, 40, up, 1)
    green = Thing("cross", "green", 40, 150, 40, (0, 0), 1)
    made = asked(Scene(196, 196, (red, blue, green), 1, frames=4))
    assert made["which way does the red circle move?"] == ("right", "way", True)
    assert made["which way does the blue cross move?"] == ("up", "way", True)
    assert made["which way does the green cross move?"] == ("nowhere", "nowhere", False)
    assert made["what stops?"] == ("red circle", "stop", True)
    assert made["what stands still?"] == ("green cross", "still", False)
    assert made["what colour is the circle?"] == ("red", "colour", True)
    assert not {"what moves?", "what starts?", "is the red circle left or right?"} & set(made)
    assert "what stops?" not in asked(Scene(196, 196, (red, blue, green), 1, frames=3))
    alone = asked(Scene(196, 196, (replace(red, spell=SPELLS["start"]), green), 1, frames=8))
    assert alone["what moves?"] == ("red circle", "what", True)
    assert alone["what colour is the thing that moves?"] == ("red", "what", True)
    assert alone["which way does the thing that moves move?"] == ("right", "which", True)
    assert "what starts?" not in alone  # "what moves?" would tell it


def test_kinds_of_clips_are_chosen_in_turn():
    chosen = Counter()
    for seed in range(300):
        chosen.update(q.kind for q in choose(questions(clip(seed)), 8, seed, CLIP_KINDS))
    assert set(chosen) == set(CLIP_KINDS) and min(chosen.values()) > 60


def test_kinds_and_answers_are_chosen_in_turn():
    chosen = Counter()
    for seed in range(200):
        everything = questions(scene(seed))
        eight = choose(everything, 8, seed)
        assert len(eight) == min(8, len(everything)) == len(set(eight)) and set(eight) <= set(everything)
        chosen.update(question.kind for question in eight)
    assert set(chosen) == set(KINDS) and min(chosen.values()) > 150


def test_the_command_writes_both_files_and_prints_the_questions(tmp_path):
    command = [sys.executable, scenes.__file__, "3", "--image", "a.png", "--events", "b.npy"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    made = scene(3)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), render(made))
    assert len(read_events(tmp_path / "b.npy")) == len(record(made))
    assert out.count("\n") == len(questions(made)) and all(q.text in out for q in questions(made))
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["a.png", "b.npy"]


def test_the_command_writes_a_clip(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert scenes.main(["8", "--clip", "--events", "b.npy"]) == 0
    out, made, read = capsys.readouterr().out, clip(8), read_clip(Path("clip.webp"))
    assert read.times.tolist() == [PERIOD * k for k in range(made.frames)]
    assert all(np.array_equal(read.frame(k), frame) for k, frame in enumerate(film(made)))
    assert len(read_events("b.npy")) == len(record(made)) and out.count("\n") == len(questions(made))
    assert scenes.main(["3", "--clip", "--image", "c.webp", "--events", "d.npy"]) == 2  # two frames are the same
    assert "give another seed" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["b.npy", "clip.webp"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-1"],
        ["-1", "--clip", "--image", "c.webp"],
        ["3", "--clip", "--image", "c.png"],
        ["3", "--events", "no/b.npy"],
        ["3", "--image", "b", "--events", "b"],
        ["x"],
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    try:
        status = scenes.main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("scenes: error: ")
    assert not list(tmp_path.iterdir())
