"""The class and the command line: look, ask, several questions, what is printed, and how the program ends."""

import argparse
import dataclasses
import fcntl
import io
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import types
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import epvlm
import hub
import tiny
import weights
from epvlm import EPVLM, Clip, Options, Sampling, main
from events import RULES, EventMap, budget, cover_mask, event_maps, motion, novelty, read_events, resize, worth
from fuzz import READERS, fuzz
from oracles import group_rows
from strategies import SPARSITIES, XYTP
from vit import VisionTransformer, read_image

ROOT = Path(epvlm.__file__).resolve().parent
TINY = ROOT / "examples" / "tiny"
QUESTION = "What is moving?"
QUESTIONS = [QUESTION, "The red circle moves.", "left of the small square?"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 84, 3), dtype=np.uint8))
MODEL = ("--model", "model", "--max-new-tokens")
ASK = (QUESTION, *MODEL, "1")
FRAMES = [tiny.noise(84, 112, n).point(lambda level: level & 128) for n in range(9)]  # of 8 colours, few enough for GIF
DURATIONS = [40, 50, 40, 50, 40, 50, 40, 50, 40]  # milliseconds
TIMES = 1000 * np.cumsum([0, *DURATIONS[:-1]])
SMALL = {"min_pixels": 3136, "max_pixels": 12544}
KEPT = "kept 24 of 48 patches (6 of 12 tokens), 100 events in 0.1 ms"


def program(*arguments, **options) -> subprocess.Popen:
    """The command line in a process of its own, its output in pipes unless `options` say otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, str(ROOT / "epvlm.py"), *arguments], **options)


def lines(capsys) -> tuple[list[str], list[str]]:
    """What was printed since the last call, on standard output and on standard error."""
    return tuple(text.splitlines() for text in capsys.readouterr())


def refused(capsys, *arguments) -> str:
    """Runs the command line in this process; checks that it ends as every error must, and returns its one line."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("epvlm: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def kept(err: list[str]) -> str:
    """What the lines on standard error say was kept, without the figures of cost, whose form is checked."""
    form = r"(.*), \d+\.\d\d of \d+\.\d\d [MGT]FLOPs", r"first token after \d+\.\d\d s", r"stopped after \d+ tokens?"
    found = [re.fullmatch(*pair) for pair in zip(form, err, strict=False)]
    assert 2 <= len(err) <= 3 and all(found), err
    return found[0][1]


def changed(model: EPVLM, **settings) -> EPVLM:
    """The same weights with other settings of the checkpoint."""
    return EPVLM(replace(model.checkpoint, **settings))


def asking(monkeypatch, text: bytes) -> None:
    """Puts `text` on standard input, as a pipe would."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(text))))


# Options and Sampling


OUT_OF_RANGE = {
    Options: {
        "sparsity": (1.0, -0.1, float("nan")),
        "cell": ("pixel",),
        "rule": ("none",),
        "hot_pixels": ("drop",),
        "polarity": ("both",),
        "homography": (np.eye(4), np.zeros((3, 3)), np.full((3, 3), np.nan), "nowhere.txt", [[1, 0], [0, 1]], [["a"]]),
        "window": ((9, 5), (float("nan"), 5), (0, float("inf"))),
        "order": ("txy", "txyy"),
        "time_unit": ("h",),
    },
    Sampling: {
        "max_new_tokens": (0, -1),
        "temperature": (-1, float("nan"), float("inf")),
        "top_p": (0, 1.1, float("nan")),
        "repetition_penalty": (0, -1, float("nan"), float("inf")),
    },
}
OUT_OF_RANGE = [(kind, name, value) for kind, of in OUT_OF_RANGE.items() for name in of for value in of[name]]


@pytest.mark.parametrize("kind, name, value", OUT_OF_RANGE)
def test_what_is_out_of_range_is_named(kind, name, value):
    with pytest.raises(ValueError, match=f"{name}[ :]"):
        kind(**{name: value})


@pytest.mark.parametrize("kind", [Options, Sampling])
def test_options_are_frozen(kind):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), fields(kind)[0].name, 0.25)


FLAGS = {  # field: the words of its flag, its value
    "sparsity": (["0.75"], 0.75),
    "cell": (["patch"], "patch"),
    "rule": (["literal"], "literal"),
    "hot_pixels": (["mend"], "mend"),
    "polarity": (["signed"], "signed"),
    "sensor": (["84x112"], (84, 112)),
    "homography": (["shift.txt"], ((1, 0, -10), (0, 1, 0), (0, 0, 1))),
    "window": (["1s", "1049000"], [1e6, 1049000.0]),
    "order": (["ptyx"], "ptyx"),
    "time_unit": (["ms"], "ms"),
    "min_pixels": (["784"], 784),
    "max_pixels": (["6272"], 6272),
    "system": (["Be brief."], "Be brief."),
    "max_new_tokens": (["5"], 5),
    "temperature": (["1.5"], 1.5),
    "top_p": (["0.9"], 0.9),
    "seed": (["3"], 3),
    "repetition_penalty": (["1.1"], 1.1),
}


def test_every_field_is_a_flag_that_reaches_the_model(files, capsys, monkeypatch):
    seen, look, tokens = [], EPVLM.look, EPVLM.tokens
    monkeypatch.setattr(EPVLM, "look", lambda *given: seen.append(given[-1]) or look(*given))
    monkeypatch.setattr(EPVLM, "tokens", lambda *given: seen.append(given[-1]) or tokens(*given))
    command = ["image.png", "events.npy", QUESTION, "--model", "model", "--dtype", "float32"]
    Path("shift.txt").write_text("1 0 -10\n0 1 0\n")
    assert main(command) == 0
    assert seen == [Options(), Sampling()] and lines(capsys)
    words = [word for name, (value, _) in FLAGS.items() for word in (f"--{name.replace('_', '-')}", *value)]
    assert main([*command, *words]) == 0
    out, err = capsys.readouterr()
    expected = [kind(**{each.name: FLAGS[each.name][1] for each in fields(kind)}) for kind in (Options, Sampling)]
    assert seen[2:] == expected
    assert out == EPVLM.from_pretrained("model").answer("image.png", "events.npy", QUESTION, *expected) + "\n"
    assert (
        ", 50 events in 49.0 ms, {} of them outside the image, ".format((np.load("events.npy")["x"][:50] < 10).sum())
        in err
    )


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for each in (*fields(Options), *fields(Sampling)):
        assert re.search(rf"--{each.name.replace('_', '-')} (?:(?!--).)*\(default: ", text), each.name
        assert each.default is None or f"(default: {each.default})" in text


# Look


@pytest.mark.parametrize("cell, S", [("group", (1, 4, 3)), ("patch", (1, 8, 6))])
def test_shapes_of_a_view(files, cell, S):
    view = EPVLM.from_pretrained("model").look(Image.open("image.png"), np.load("events.npy"), Options(cell=cell))
    assert (view.keep.shape, view.groups.shape, view.S.shape) == ((1, 8, 6), (1, 4, 3), S)
    assert view.keep.dtype == view.groups.dtype == torch.bool and view.S.dtype == np.float64
    assert view.patches.shape == (24, 1176) and view.patches.dtype == torch.float32
    assert view.S.sum() == 100 * 112 * 84  # in 1 / (H W) of an event
    assert view.keep[0, :4].all() and not view.keep[0, 4:].any()  # the upper half is where the events are
    assert str(view) == KEPT and view.cache is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        view.keep = None


@given(
    st.tuples(st.integers(28, 200), st.integers(28, 200)),
    st.integers(0, 2**32 - 1),
    SPARSITIES,
    st.sampled_from(["group", "patch"]),
    st.sampled_from(list(RULES)),
)
def test_a_view_keeps_the_patches_of_the_cells_its_rule_keeps(checkpoint, size, seed, sparsity, cell, rule):
    model, image = checkpoint.model, tiny.noise(*size)
    E_v = np.random.default_rng(seed).integers(-1, 3, (9, 11))
    view, dense = model.look(image, E_v, Options(sparsity, cell, rule)), model.look(image)
    H, W = (14 * side for side in dense.keep.shape[1:])
    cells = np.abs(resize(E_v, H, W)).reshape(view.S.shape[1], -1, view.S.shape[2], W // view.S.shape[2])
    assert np.array_equal(view.S[0], cells.sum(axis=(1, 3)))  # Eq. 5
    side = W // view.S.shape[2]
    w = worth(view.S, novelty(np.asarray(image.resize((W, H), Image.Resampling.BICUBIC)), None, side)[None])
    mask = RULES[rule](w if rule == "cover" else view.S, 1 - sparsity)  # Eq. 6
    assert np.array_equal(view.keep, np.kron(mask, np.ones((1, 2, 2))) if cell == "group" else mask)
    assert np.array_equal(view.groups, view.keep.numpy().reshape(1, H // 28, 2, W // 28, 2).any(axis=(2, 4)))
    assert torch.equal(view.patches, dense.patches[group_rows(view.keep)])  # Eq. 7


def test_without_events_all_is_kept(files):
    model = EPVLM.from_pretrained("model")
    dense, zero = model.look("image.png"), model.look("image.png", "events.npy", Options(sparsity=0))
    assert dense.S is None and str(dense) == "kept 48 of 48 patches (12 of 12 tokens), no events"
    assert dense.keep.all() and dense.groups.all()
    assert torch.equal(dense.patches, zero.patches) and torch.equal(dense.keep, zero.keep)
    assert model.look("image.png", None, Options(rule="literal")).keep.all()


@given(
    st.tuples(st.integers(28, 200), st.integers(28, 200)),
    SPARSITIES,
    st.sampled_from(["group", "patch"]),
    st.booleans(),
)
def test_a_rule_that_covers_needs_no_events(checkpoint, size, sparsity, cell, plain):
    """It keeps exactly the budget of groups, or of patches; by what is new in the image, evenly if nothing is."""
    model, image = checkpoint.model, Image.new("RGB", size) if plain else tiny.noise(*size)
    view, dense = model.look(image, None, Options(sparsity, cell, "cover")), model.look(image)
    H, W = (14 * side for side in dense.keep.shape[1:])
    G = novelty(np.asarray(image.resize((W, H), Image.Resampling.BICUBIC)), None, 28 if cell == "group" else 14)[None]
    mask = cover_mask(worth(None, G), 1 - sparsity)
    assert np.array_equal(view.groups if cell == "group" else view.keep, mask)
    assert mask.sum() == budget(G.size, 1 - sparsity) and len(view.patches) == mask.sum() * (
        4 if cell == "group" else 1
    )
    assert view.S is None and str(view).endswith(f"({view.tokens} of {view.groups.numel()} tokens), no events")
    assert torch.equal(view.patches, dense.patches[group_rows(view.keep)])  # at sparsity 0 those of the dense image
    assert sparsity or view.keep.all()


def test_covering_follows_the_image_and_the_events(checkpoint):
    """The lower right group is noise, the rest grey; the upper left one has the events."""
    image, E_v, options = Image.new("RGB", (84, 112), "#808080"), np.zeros((112, 84)), Options(0.9, rule="cover")
    image.paste(tiny.noise(28, 28), (56, 84))
    E_v[:28, :28] = 1
    still, both = (checkpoint.model.look(image, events, options).groups[0] for events in (None, E_v))
    assert still.sum() == both.sum() == 2
    assert still[3, 2] and not still[0, 0] and both[3, 2] and both[0, 0]
    for empty, words in ((np.zeros(0, XYTP), "no events at all"), (np.zeros((9, 9)), "zero everywhere")):
        with pytest.warns(UserWarning, match=words):
            view = checkpoint.model.look(image, empty, options)
        assert torch.equal(view.groups[0], still) and not view.S.any()


def test_a_hot_pixel_takes_a_place_unless_mended(files, capsys, monkeypatch):
    """It is far from the other events: mended, it counts as its silent neighbours do."""
    hot = np.zeros(1100, np.load("events.npy").dtype)
    hot[:100], hot["t"][100:], hot["x"][100:], hot["y"][100:] = np.load("events.npy"), 1050, 70, 100
    np.save("hot.npy", hot)
    seen, look = [], EPVLM.look
    monkeypatch.setattr(EPVLM, "look", lambda *given: seen.append(look(*given)) or seen[-1])
    for arguments in (["events.npy"], ["hot.npy"], ["hot.npy", "--hot-pixels", "mend"]):
        assert main(["image.png", *arguments, *ASK]) == 0
    without, kept, mended = (view.groups for view in seen)
    assert kept[0, 3, 2] and not without[0, 3, 2] and torch.equal(mended, without)
    assert np.array_equal(seen[2].S, seen[0].S)
    (warning,) = (line for line in lines(capsys)[1] if "warning" in line)
    assert re.match(r"epvlm: warning: hot.npy: 20 pixels hold over a quarter .* hot_pixels mend$", warning)


def test_inputs_are_paths_or_what_was_read_from_them(files):
    model, array = EPVLM.from_pretrained("model"), np.load("events.npy")
    expected = model.look("image.png", "events.npy")
    for image in (Path("image.png"), Image.open("image.png")):
        for events in (Path("events.npy"), array, read_events(array)):
            view = model.look(image, events)
            assert torch.equal(view.patches, expected.patches) and str(view) == str(expected)


def test_no_events_keep_evenly_spread_cells(checkpoint):
    keeps = []
    for empty, words in ((np.zeros(0, XYTP), "no events at all"), (np.zeros((9, 9)), "zero everywhere")):
        with pytest.warns(UserWarning, match=words):
            keeps.append(checkpoint.model.look(PICTURE, empty).keep[0])
    assert torch.equal(*keeps) and keeps[0].sum() == 24
    assert (keeps[0].sum(1) >= 1).all() and (keeps[0].sum(0) >= 1).all()


def test_a_map_needs_no_sensor_and_has_no_times(files):
    model, E_v = EPVLM.from_pretrained("model"), np.zeros((180, 240))
    E_v[100:] = 1
    view = model.look("image.png", E_v)
    assert not view.keep[0, :4].any() and view.keep[0, 4:].all() and "map of 240 x 180" in str(view)
    for again in (model.look("image.png", E_v, Options(sensor=[240, 180])), model.look("image.png", EventMap(E_v))):
        assert torch.equal(again.keep, view.keep)
    for options, words in (
        (Options(window=(0, 1)), "leave window out"),
        (Options(sensor=(180, 240)), "leave sensor out"),
    ):
        with pytest.raises(ValueError, match=words):
            model.look("image.png", E_v, options)


def test_the_sensor_may_be_of_another_size(files):
    events = np.load("events.npy")
    events["x"], events["y"] = events["x"] * 4, events["y"] * 4
    options = Options(sensor=(336, 448), window=np.array([0, 5000], np.float32))
    view = EPVLM.from_pretrained("model").look("image.png", events, options)
    assert view.keep[0, :4].all() and not view.keep[0, 4:].any()


def test_events_in_the_first_quarter_raise_doubts_about_the_sensor(files):
    model, events = EPVLM.from_pretrained("model"), np.load("events.npy")
    events["x"], events["y"] = events["x"] // 2, events["y"] // 2
    with pytest.warns(UserWarning, match="sensor"):
        model.look("image.png", events)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.look("image.png", events, Options(sensor=(84, 112)))
        model.look("image.png", "events.npy")
    with pytest.raises(ValueError, match="give its real size"):
        model.look("image.png", events, Options(sensor=(0, 0)))


def test_order_and_time_unit_reach_the_reader(checkpoint):
    bare = np.array([[1, 0.001, 5, 5], [1, 0.002, 2, 1]])
    options = Options(order="ptyx", time_unit="s", sensor=(84, 112))
    assert checkpoint.model.look(PICTURE, bare, options).source == "2 events in 1.0 ms"


def test_each_choice_changes_the_mask(checkpoint):
    """40 events that cancel, in the upper left; 20 of one sign in the lower right."""
    flicker = np.zeros(60, dtype=XYTP)
    flicker["t"], flicker["p"] = np.arange(60), np.arange(60) % 2
    flicker["x"][40:], flicker["y"][40:], flicker["p"][40:] = 80, 100, 1

    def groups(**options):
        return checkpoint.model.look(PICTURE, flicker, Options(**options)).groups[0]

    count, signed = groups(sparsity=0.95), groups(sparsity=0.95, polarity="signed")
    assert count[0, 0] and not count[3, 2] and signed[3, 2] and not signed[0, 0]
    assert groups(rule="literal").all() and groups(rule="exact").sum() == 6
    assert not torch.equal(groups(sensor=(168, 224)), groups())
    assert not groups(sparsity=0.95, window=(40, 59))[0, 0]


def test_pixel_limits_set_the_input_size(checkpoint):
    for options, grid in (
        (Options(), (1, 8, 6)),
        (Options(max_pixels=6272), (1, 6, 4)),
        (Options(min_pixels=40000), (1, 18, 14)),
    ):
        assert checkpoint.model.look(PICTURE, None, options).keep.shape == grid
    for options in (Options(max_pixels=784), Options(min_pixels=9000, max_pixels=8000)):
        with pytest.raises(ValueError, match=r"min_pixels \d+ .*max_pixels"):
            checkpoint.model.look(PICTURE, None, options)


def test_looking_runs_no_layer_and_dropping_saves_more_than_its_share(checkpoint):
    """A selector must not cost what it saves: `look` multiplies nothing, `logits` falls faster than the tokens."""
    model, image = checkpoint.model, tiny.noise(560, 560)
    E_v = np.random.default_rng(0).integers(0, 9, (560, 560))
    with FlopCounterMode(display=False) as looking:
        views = [model.look(image, E_v, Options(sparsity)) for sparsity in (0, 0.5, 0.75)]
    assert looking.get_total_flops() == 0
    costs = []
    for view in views:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it sees no fused attention
            model.logits(view, QUESTION)
        costs.append(counter.get_total_flops())
    assert costs[1] < costs[0] / 2 and costs[2] < costs[0] / 4


@pytest.mark.parametrize("usual", [True, False])
def test_another_system_turn_of_the_checkpoint_is_a_warning(checkpoint, usual):
    model = changed(checkpoint.model, usual_system=usual)
    for system in (None, "", "You are a robot."):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.look(PICTURE, None, Options(system=system))
        assert ["system" in str(warning.message) for warning in caught] == [True] * (not usual and system is None)


# Look at a clip


def filmed(seed: int, size: tuple[int, int], end: int, count: int = 300) -> np.ndarray:
    """Events at random places of a sensor of that size, from 90 ms before 0 to 90 ms after `end`, in any order."""
    rng, rows = np.random.default_rng(seed), np.zeros(count, [("x", "u2"), ("y", "u2"), ("t", "i8"), ("p", "i1")])
    for name, low, high in (("x", 0, size[0]), ("y", 0, size[1]), ("t", -90_000, end + 90_000), ("p", 0, 2)):
        rows[name] = rng.integers(low, high, count)
    return rows


@settings(max_examples=40)
@given(
    st.integers(2, 7),
    st.integers(0, 2**32 - 1),
    SPARSITIES,
    st.sampled_from(["group", "patch"]),
    st.sampled_from(list(RULES)),
    st.sampled_from(["count", "signed"]),
    st.sampled_from(["keep", "mend"]),
)
def test_a_view_of_a_clip_by_hand(checkpoint, count, seed, sparsity, cell, rule, polarity, hot):
    """The windows from the frames' times, S a rate, one budget over all moments, and the dense clip's patches."""
    model, rng = checkpoint.model, np.random.default_rng(seed)
    times = np.cumsum(rng.integers(1, 90_000, count)).astype(float)
    frames = [tiny.noise(84, 112, n) for n in rng.integers(0, 9, count).tolist()]
    rows, options = filmed(seed, (84, 112), int(times[-1])), Options(sparsity, cell, rule, hot, polarity, **SMALL)
    rows["x"][:60], rows["y"][:60] = 70, 100  # a hot pixel
    first, last = times[0] - (times[1] - times[0]) / 2, times[-1] + (times[-1] - times[-2]) / 2
    edges = [first, *((times[n - 1] + times[n]) / 2 for n in range(2, count, 2)), last]
    with warnings.catch_warnings(action="ignore"):
        view, dense = (model.look(Clip(frames, times), each, options) for each in (rows, None))
        dense = model.look(Clip(frames, times), None, Options(**SMALL))
        H, W = (14 * side for side in dense.keep.shape[1:])
        side, moments, S = 28 if cell == "group" else 14, [], []
        for n, (start, end) in enumerate(itertools.pairwise(edges), 1):
            inside = rows[(rows["t"] >= start) & ((rows["t"] <= end) if n == len(edges) - 1 else (rows["t"] < end))]
            moments.append(read_events(inside).align((84, 112)))
        for E_v, (start, end) in zip(event_maps(moments, polarity, hot)[0], itertools.pairwise(edges), strict=True):
            S.append(motion(resize(E_v, H, W)[None], side)[0] / float(f"{(end - start) / 1e6:.3g}"))
    assert np.allclose(view.S, S, rtol=1e-12, atol=0)
    w = view.S
    if rule == "cover":
        shown = [dense_frame(frame, H, W) for frame in frames[::2]]
        G = [novelty(frame, before, side) for frame, before in zip(shown, [None, *shown[:-1]], strict=True)]
        w = worth(view.S, np.stack(G))
    mask = RULES[rule](w, 1 - sparsity)
    assert np.array_equal(view.keep, mask.repeat(side // 14, 1).repeat(side // 14, 2))
    assert rule == "literal" or mask.sum() == budget(mask.size, 1 - sparsity)
    assert torch.equal(view.patches, dense.patches[group_rows(view.keep)])
    assert dense.keep.all() and dense.S is None


def dense_frame(frame: Image.Image, H: int, W: int) -> np.ndarray:
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, (H, W), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def test_motion_of_a_clip_is_a_rate(checkpoint):
    """Frames at 0, 40, 80, 120, 160 ms have windows of 80, 80 and 40 ms: the last moment of an odd clip counts double.
    An event each millisecond of -25 to 190 at one pixel is the same motion in each."""
    rows = np.zeros(216, filmed(0, (1, 1), 0).dtype)
    rows["t"], rows["x"], rows["y"] = 1000 * np.arange(-25, 191), 70, 100
    view = checkpoint.model.look(Clip(FRAMES[:5], 40_000 * np.arange(5)), rows, Options(sensor=(84, 112), **SMALL))
    H, W = (14 * side for side in view.keep.shape[1:])
    totals = view.S.sum(axis=(1, 2)) / (H * W)
    assert totals.tolist() == pytest.approx([1000, 1000, 1025])  # the last window has both its ends
    assert str(view).endswith(", 201 events in 200.0 ms, 5 frames")


@pytest.mark.parametrize("rule", ["exact", "literal"])
def test_one_budget_over_the_whole_clip(checkpoint, monkeypatch, rule):
    """All that moves is in the second of four moments, so all that is kept; the others are not even resized. That a
    moment has no events is normal and does not warn."""
    clip, rows = Clip(FRAMES[:8], 40_000 * np.arange(8)), filmed(0, (84, 112), 0, 3000)
    rows["t"] = np.arange(3000) * 20 + 65_000
    read, pixels = [], Clip.pixels
    monkeypatch.setattr(Clip, "pixels", lambda *given: read.append(given[1]) or pixels(*given))
    with warnings.catch_warnings(action="error"):
        view = checkpoint.model.look(clip, rows, Options(0.8, rule=rule, **SMALL))
    kept, cells = view.groups.sum(dim=(1, 2)).tolist(), view.groups.numel()
    assert kept == [0, budget(cells, 0.2), 0, 0] and read == [1]


def test_a_clip_without_any_event_warns_once_and_keeps_places_that_change(checkpoint):
    clip, options, rows = Clip(FRAMES[:8], 40_000 * np.arange(8)), Options(0.75, **SMALL), filmed(0, (84, 112), 0, 2)
    rows["t"], rows["x"], rows["y"] = (-(10**6), 10**6), 80, 100  # before and after
    for events, words in ((rows, "no event from -20000 to 300000 us"), (rows[:0], "no events at all")):
        with pytest.warns(UserWarning) as caught:
            view = checkpoint.model.look(clip, events, options)
        assert len(caught) == 1 and words in str(caught[0].message)
        assert not view.S.any() and view.groups.any(dim=0).all()  # of each moment another quarter
        assert view.tokens == budget(view.groups.numel(), 0.25)


def test_frames_are_paths_or_images(files):
    model, times, rows = EPVLM.from_pretrained("model"), TIMES[:5], filmed(0, (84, 112), 180_000)
    for n, frame in enumerate(FRAMES):
        frame.save(f"{n}.png")
    views = [
        model.look(Clip([read(f"{n}.png") for n in range(5)], times), rows, Options(**SMALL))
        for read in (str, Path, Image.open)
    ]
    for view in views[1:]:
        assert torch.equal(view.patches, views[0].patches) and torch.equal(view.keep, views[0].keep)
        assert np.array_equal(view.S, views[0].S) and str(view) == str(views[0])
    assert Clip is epvlm.Clip and len(views[0].keep) == 3
    with pytest.raises(ValueError, match="frame 2: 84 x 28 pixels of 8 bits, the first has 84 x 112"):
        model.look(Clip([FRAMES[0], tiny.noise(84, 28)], [0, 1]))


def test_a_window_holds_frames_and_events(checkpoint):
    """The clip's own, or that of the options: the same."""
    frames, times, window = FRAMES[:6], 40_000 * np.arange(6), (40_000, 160_000)
    rows = filmed(0, (84, 112), 200_000)
    inside = ((rows["t"] >= window[0]) & (rows["t"] <= window[1])).sum()
    for clip, options in (
        (Clip(frames, times), Options(window=window, **SMALL)),
        (Clip(frames, times, window), Options(**SMALL)),
        (Clip(frames, times, (0, 1)), Options(window=np.array(window), **SMALL)),
    ):
        view = checkpoint.model.look(clip, rows, options)
        assert str(view).endswith(f", {inside} events in 120.0 ms, 4 frames") and len(view.keep) == 2
        only = checkpoint.model.look(Clip(frames[1:5], times[1:5]), None, Options(**SMALL)).patches
        assert torch.equal(view.patches, only[group_rows(view.keep)])


# Ask


def test_shapes_of_prompt_and_logits(checkpoint):
    model = checkpoint.model
    view = model.look(PICTURE, np.eye(112, 84))
    ids, positions = model.prompt(view, QUESTION)
    assert ids.dtype == positions.dtype == torch.int64 and positions.shape == (3, len(ids))
    assert int((ids == model.image_pad).sum()) == int(view.groups.sum()) == 6
    logits = model.logits(view, QUESTION)
    assert logits.shape == (len(ids), model.llm.config.vocab_size) and logits.dtype == torch.float32


@pytest.mark.parametrize(
    "system, begins",
    [
        (None, f"<|im_start|>system\n{epvlm.SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"),
        ("<|im_end|>", "<|im_start|>system\n<|im_end|><|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"),
        ("", "<|im_start|>user\n<|vision_start|><|image_pad|>"),
    ],
)
def test_the_system_turn_is_fixed_when_looking(checkpoint, system, begins):
    model = checkpoint.model
    ids, _ = model.prompt(model.look(PICTURE, None, Options(system=system)), QUESTION)
    text = model.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text.startswith(begins) and text.endswith(f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    turns = int((ids == model.tokenizer.token_to_id("<|im_end|>")).sum())
    assert turns == (1 if system == "" else 2)  # one spelt in the text stays text


@pytest.mark.parametrize("special", [True, False])
def test_a_question_may_spell_the_image(files, capsys, special):
    """Where tokenizer.json says that its token is not special, the text has one of it."""
    path, question = Path("model/tokenizer.json"), "What is <|image_pad|> here?"
    added = json.loads(path.read_text())["added_tokens"]
    tiny.edit(path, added_tokens=[{**t, "special": special or t["content"] != "<|image_pad|>"} for t in added])
    model = EPVLM.from_pretrained("model")
    view = model.look("image.png", "events.npy")
    ids, _ = model.prompt(view, question)
    assert int((ids == model.image_pad).sum()) == view.tokens + (not special)
    answer = list(model.tokens(view, question, Sampling(6)))
    assert answer == list(model.tokens(model.read(view), question, Sampling(6)))
    assert main(["image.png", "events.npy", question, *MODEL, "6"]) == 0
    assert capsys.readouterr().out == "".join(model.pieces(answer)) + "\n"


def test_tokens_end_with_the_end_token_or_at_the_limit(checkpoint):
    model = checkpoint.model
    view = model.look(PICTURE)
    first, second, *more = model.tokens(view, QUESTION, Sampling(max_new_tokens=9))
    assert len(more) == 7 and first != second
    ending = changed(model, ends=frozenset({second}))
    assert list(ending.tokens(view, QUESTION)) == [first, second]
    assert first == int(model.logits(view, QUESTION)[-1].argmax())


def test_an_answer_is_its_stream_and_its_tokens(checkpoint):
    model, sampling = checkpoint.model, Sampling(max_new_tokens=9)
    view = model.look(PICTURE, np.eye(112, 84), Options(sparsity=0.25))
    pieces = list(model.stream(view, QUESTION, sampling))
    assert "".join(pieces) == model.answer(PICTURE, np.eye(112, 84), QUESTION, Options(sparsity=0.25), sampling)
    assert pieces == list(model.pieces(model.tokens(view, QUESTION, sampling)))


@given(st.text(max_size=40))
def test_pieces_are_whole_utf8(checkpoint, text):
    """Byte-level tokens split characters; a piece never ends inside one."""
    model = checkpoint.model
    tokens = model.tokenizer.encode(text, add_special_tokens=False).ids
    pieces = list(model.pieces(iter(tokens)))
    assert "".join(pieces) == model.tokenizer.decode(tokens)
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_an_answer_cut_inside_a_character_still_ends(checkpoint):
    tokens = checkpoint.model.tokenizer.encode("a动", add_special_tokens=False).ids[:-1]
    assert "".join(checkpoint.model.pieces(iter(tokens))).rstrip("\ufffd") == "a"


def test_of_special_tokens_those_of_grounding_are_shown(checkpoint):
    model, grounding = checkpoint.model, "<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    model.tokenizer.encode_special_tokens = False
    tokens = model.tokenizer.encode(f"<|im_start|>{grounding}<|vision_pad|><|im_end|><|endoftext|>").ids
    assert "".join(model.pieces(iter(tokens))) == grounding


@pytest.mark.parametrize("penalty, expected", [(None, 1.5), (1.25, 1.25)])
def test_sampling_reaches_the_sampler(checkpoint, monkeypatch, penalty, expected):
    """With the checkpoint's repetition penalty unless there is one."""
    model, given, sampler = changed(checkpoint.model, repetition_penalty=1.5), [], epvlm.sampler
    monkeypatch.setattr(epvlm, "sampler", lambda sampling, ids: given.append(sampling) or sampler(sampling, ids))
    model.answer(PICTURE, None, "", sampling=Sampling(1, 0.5, 0.25, 9, penalty))
    assert given == [Sampling(1, 0.5, 0.25, 9, expected)]


def test_the_same_seed_gives_the_same_answer(checkpoint):
    model, image = checkpoint.model, Image.new("RGB", (84, 56), "red")
    first, again, other = (model.answer(image, None, "?", sampling=Sampling(12, 2.0, seed=n)) for n in (3, 3, 4))
    assert first == again != other


def test_threads_do_not_disturb_each_other(checkpoint):
    """Two objects of one checkpoint, and one object used by two: each answers as it does alone."""
    models = [checkpoint.model, EPVLM.from_pretrained(checkpoint.folder, device="cpu")]
    maps = np.random.default_rng(0).random((8, 84, 112))
    found = [None] * len(maps)

    def ask(n):
        sampling = Sampling(8, temperature=1.0, seed=n)
        return models[n % 2].answer(PICTURE, maps[n], f"What {n}? <|im_end|>", Options(n / 10), sampling)

    def work(n):
        for _ in range(3):
            found[n] = ask(n)

    alone = [ask(n) for n in range(len(maps))]
    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(maps))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_reading_adds_the_cache_alone(checkpoint):
    model, view = checkpoint.model, checkpoint.model.look(PICTURE, np.eye(112, 84))
    read = model.read(view)
    assert all(getattr(read, each.name) is getattr(view, each.name) for each in fields(view) if each.name != "cache")
    assert view.cache is None and str(read) == str(view)
    assert torch.equal(model.logits(read, QUESTION), model.logits(view, QUESTION))
    assert model.flops(read, QUESTION) == model.flops(view, QUESTION)
    again = model.read(read)
    assert torch.equal(again.cache.held, read.cache.held) and again.cache.filled == read.cache.filled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.05)])
def test_a_gpu_answers_as_the_cpu_does(dtype, tolerance):
    cpu, gpu = (EPVLM.from_pretrained(TINY, device=device, dtype=dtype) for device in ("cpu", "cuda"))
    assert EPVLM.from_pretrained(TINY).weight.is_cuda
    clip, maps = Clip.at_rate(FRAMES, 25), np.random.default_rng(0).random((112, 84))
    views = [cpu.look(PICTURE, maps, Options(0.5, cell=cell)) for cell in ("group", "patch")]
    views += [cpu.look(clip, None, Options(0.5, rule="cover", **SMALL)), cpu.look(clip, None, Options(**SMALL))]
    for view in views:
        scores, expected = gpu.logits(view, QUESTION), cpu.logits(view, QUESTION)
        assert scores.is_cuda and (scores.cpu() - expected).abs().max() <= tolerance * expected.abs().max()
        asked = Sampling(8, repetition_penalty=1.2)
        alone, later = list(gpu.tokens(view, QUESTION, asked)), list(gpu.tokens(gpu.read(view), QUESTION, asked))
        if dtype == "float32":
            assert alone == later == list(cpu.tokens(view, QUESTION, asked))
        drawn = Sampling(8, temperature=1.0)
        assert list(gpu.tokens(view, QUESTION, drawn)) == list(gpu.tokens(view, QUESTION, drawn))


# Room


REMEDY = r"give max_pixels (\d+) or less, or sparsity (0\.\d\d) or more, with events or the rule cover"
LARGE = Options(max_pixels=10**7)


@pytest.fixture(scope="module")
def shipped():
    """The model of examples/tiny, which has a context of 1024."""
    return EPVLM.from_pretrained(TINY, device="cpu")


@pytest.mark.parametrize(
    "side, free, over", [(1400, 10**12, "the model's 1024"), (840, 3 * 10**7, "0.0279 GiB of free")]
)
def test_what_is_too_long_is_refused_with_what_brings_it_under(shipped, monkeypatch, side, free, over):
    """By the context, and by the memory where that is less; before the image is resized."""
    tokens = (side // 28) ** 2

    def look(pixels: int, E_v=None, sparsity=0.5):
        options = Options(float(sparsity), max_pixels=int(pixels))
        return shipped.look(Image.new("RGB", (side, side)), E_v, options)

    monkeypatch.setattr(weights, "free_memory", lambda device: free)
    with monkeypatch.context() as patched:
        patched.setattr(epvlm.Clip, "pixels", lambda *_: pytest.fail("worked"))
        with pytest.raises(ValueError, match=f"^{tokens} tokens of the image and 21 of text exceed {over}") as caught:
            look(10**7)
    pixels, sparsity = re.search(REMEDY, str(caught.value)).groups()
    E_v = np.ones((50, 50))
    for view in (look(pixels), look(10**7, E_v, sparsity)):
        shipped.prompt(view, "what?")
    for more in ((1.4 * int(pixels),), (10**7, E_v, float(sparsity) - 0.2)):
        with pytest.raises(ValueError, match="exceed"):
            look(*more)


@settings(max_examples=10)
@given(st.integers(900, 1800), st.integers(900, 1800))
def test_what_brings_it_under_does_so_for_any_image(shipped, width, height):
    image = Image.new("RGB", (width, height))
    with pytest.raises(ValueError, match=REMEDY) as caught:
        shipped.look(image, None, LARGE)
    pixels, sparsity = re.search(REMEDY, str(caught.value)).groups()
    for view in (
        shipped.look(image, None, Options(max_pixels=int(pixels))),
        shipped.look(image, np.ones((50, 50)), replace(LARGE, sparsity=float(sparsity))),
    ):
        assert len(shipped.prompt(view, "")[0]) + 127 <= 1024  # with the usual answer


@settings(max_examples=10)
@given(st.integers(24, 31), st.integers(24, 31))
def test_what_brings_it_under_counts_the_question(shipped, down, across):
    """An image that has room with a short question, and none with a long one."""
    image, question = Image.new("RGB", (28 * across, 28 * down)), "x" * (1024 - down * across)
    with pytest.raises(ValueError, match=REMEDY) as caught:
        shipped.prompt(shipped.look(image, None, LARGE), question)
    pixels, sparsity = re.search(REMEDY, str(caught.value)).groups()
    for view in (
        shipped.look(image, None, Options(max_pixels=int(pixels))),
        shipped.look(image, np.ones((50, 50)), replace(LARGE, sparsity=float(sparsity))),
    ):
        assert len(shipped.prompt(view, question)[0]) + 127 <= 1024


@settings(max_examples=40)
@given(st.integers(3, 120), st.sampled_from([{}, {"max_pixels": 10**7}, {"min_pixels": 40_000}]), st.integers(24, 40))
def test_what_brings_a_clip_under_does_so(shipped, count, limits, log2):
    """Fewer pixels, though fewer than a frame's usual least, or fewer frames: by the context, and by the memory."""

    def look(count, options):
        view = shipped.look(Clip([Image.new("RGB", (700, 560))] * count, np.arange(count)), None, options)
        return shipped.prompt(view, "what?")

    options = Options(**limits)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weights, "free_memory", lambda device: 2**log2)
        patched.setattr(epvlm, "packed_patches", lambda *_: None)  # it takes long, and does not count
        try:
            look(count, options)
            return
        except ValueError as error:
            told = str(error)
        assert re.match(r"\d+ tokens of the (clip|image) and \d+ of text exceed ", told)
        pixels, frames = (re.search(rf"{name} (\d+) or", told) for name in ("max_pixels", "frames"))
        assert pixels or log2 < 26
        if pixels and "min_pixels" not in limits:
            look(count, replace(options, max_pixels=int(pixels[1])))
        if frames:
            assert 2 <= int(frames[1]) < count
            look(int(frames[1]), options)


def test_a_rule_that_covers_makes_room_without_events(shipped):
    image = Image.new("RGB", (1400, 1400))
    assert shipped.look(image, None, replace(LARGE, sparsity=0.7, rule="cover")).tokens == 750
    with pytest.raises(ValueError, match="2500 tokens of the image"):
        shipped.look(image, None, replace(LARGE, sparsity=0.7))


def test_what_is_too_long_is_refused_before_any_work(shipped, monkeypatch):
    view = shipped.look(Image.new("RGB", (560, 560)), None, LARGE)
    monkeypatch.setattr(VisionTransformer, "forward", lambda *_: pytest.fail("worked"))
    for ask in (lambda view, text: next(shipped.tokens(view, text)), shipped.logits, shipped.flops):
        with pytest.raises(ValueError, match="shorten the question") as caught:
            ask(view, "x" * 1100)
        assert "0.100" not in str(caught.value)  # the text alone is too long: no sparsity helps


def test_an_answer_ends_where_the_context_does(checkpoint, monkeypatch):
    model, view = checkpoint.model, checkpoint.model.look(PICTURE)
    monkeypatch.setattr(epvlm, "sampler", lambda *_: lambda logits: 5)
    monkeypatch.setattr(model.llm, "config", replace(model.llm.config, max_position_embeddings=100))
    tokens = model.tokens(view, QUESTION, Sampling(max_new_tokens=10**30))
    assert len(list(tokens)) == 100 - len(model.prompt(view, QUESTION)[0])


# The command line: what it prints


def test_the_answer_is_on_stdout_and_the_rest_on_stderr(files):
    with program("image.png", "events.npy", QUESTION, *MODEL, "9", "--device", "cpu") as running:
        out, err = (text.decode() for text in running.communicate(timeout=120))
    model = EPVLM.from_pretrained("model", device="cpu")
    view = model.look("image.png", "events.npy")
    assert running.returncode == 0
    assert out == "".join(model.stream(view, QUESTION, Sampling(9))) + "\n"
    assert kept(err.splitlines()) == KEPT
    packed, dense = model.flops(view, QUESTION)
    assert f" {packed / 1e6:.2f} of {dense / 1e6:.2f} MFLOPs\n" in err and 0 < packed < dense


def test_the_two_lines_of_the_example(capsys, monkeypatch):
    monkeypatch.setattr(epvlm, "time", types.SimpleNamespace(perf_counter=itertools.count(5, 0.0156).__next__))
    scene = [str(ROOT / "examples" / name) for name in ("scene.png", "events.npy")]
    assert main([*scene, "what colour is the circle?", "--model", str(TINY), "--device", "cpu"]) == 0
    assert capsys.readouterr() == (
        "red\n",
        "kept 128 of 256 patches (32 of 64 tokens), 2110 events in 38.7 ms, 371.77 of 779.45 MFLOPs\n"
        "first token after 0.02 s\n",
    )


def test_seconds_count_looking_and_not_loading(files, capsys, monkeypatch):
    clock, load, look = [0], EPVLM.from_pretrained, EPVLM.look

    def slow(work, seconds, *given):
        clock[0] += seconds
        return work(*given)

    monkeypatch.setattr(epvlm, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(EPVLM, "from_pretrained", lambda *given: slow(load, 100, *given))
    monkeypatch.setattr(EPVLM, "look", lambda *given: slow(look, 5, *given))
    assert main(["image.png", "none", *ASK]) == 0
    assert lines(capsys)[1][1] == "first token after 5.00 s"


def test_the_cost_is_printed_before_the_model_runs(files, capsys, monkeypatch):
    def run(*_):
        assert capsys.readouterr().err.endswith("MFLOPs\n")
        raise ValueError("ran")

    monkeypatch.setattr(VisionTransformer, "forward", run)
    assert main(["image.png", "none", *ASK]) == 2
    assert capsys.readouterr().err == "epvlm: error: ran\n"


@pytest.mark.parametrize(
    "limit, ends, line",
    [
        ("1", False, ["stopped after 1 token"]),
        ("3", False, ["stopped after 3 tokens"]),
        ("1", True, []),
        ("9", True, []),
    ],
)
def test_an_answer_that_was_cut_says_so(files, capsys, limit, ends, line):
    model = EPVLM.from_pretrained("model")
    first = next(model.tokens(model.look("image.png", "events.npy"), QUESTION))
    tiny.edit(Path("model/generation_config.json"), eos_token_id=[first] if ends else None)
    assert main(["image.png", "events.npy", QUESTION, *MODEL, limit]) == 0
    assert lines(capsys)[1][2:] == line


def test_the_default_model_comes_from_the_hub(files, folder, capsys):
    with hub.visit(folder, files / "cache") as fetched:
        assert main(["image.png", "events.npy", QUESTION, "--max-new-tokens", "3"]) == 0
    assert "model.safetensors" in fetched and Path("cache/models--Qwen--Qwen2-VL-2B-Instruct").is_dir()
    assert main(["image.png", "events.npy", QUESTION, "--model", str(folder), "--max-new-tokens", "3"]) == 0
    first, second, *_ = lines(capsys)[0]
    assert first == second


def test_none_is_the_dense_image(files, capsys):
    assert main(["image.png", "none", *ASK]) == 0
    assert kept(lines(capsys)[1]) == "kept 48 of 48 patches (12 of 12 tokens), no events"


def test_none_with_a_rule_that_covers_drops(files, capsys):
    assert main(["image.png", "none", *ASK, "--rule", "cover"]) == 0
    out, err = lines(capsys)
    assert kept(err) == "kept 24 of 48 patches (6 of 12 tokens), no events"
    model, options = EPVLM.from_pretrained("model"), Options(rule="cover")
    assert out == [model.answer("image.png", None, QUESTION, options, Sampling(1))]
    assert not torch.equal(model.look("image.png", None, options).keep, model.look("image.png", "events.npy").keep)


def test_the_real_frame_and_window(checkpoint, data, capsys):
    folder = data / "recordings" / "slider_depth"
    inputs = str(folder / "frame_00000002.png"), str(folder / "events_xypt_us.npy")
    settings = "--model", str(checkpoint.folder), "--window", "67500", "87500", "--max-new-tokens", "2"
    assert main([*inputs, QUESTION, *settings]) == 0
    assert kept(lines(capsys)[1]) == "kept 108 of 216 patches (27 of 54 tokens), 6957 events in 20.0 ms"


def test_the_question_may_follow_options(files, capsys):
    assert main(["--sparsity", "0.3", "image.png", "events.npy", *MODEL, "6", QUESTION]) == 0
    assert len(lines(capsys)[0]) == 1


def test_model_revision_device_and_dtype_reach_the_loader(files, monkeypatch):
    given = []

    def load(*arguments):
        given.append(arguments)
        raise ValueError("stop")

    monkeypatch.setattr(EPVLM, "from_pretrained", load)
    main(["image.png", "none", *ASK, "--revision", "r", "--device", "cpu", "--dtype", "float16"])
    main(["image.png", "none", QUESTION])
    assert given == [("model", "r", "cpu", "float16"), ("Qwen/Qwen2-VL-2B-Instruct", None, None, None)]


def test_system_turn_and_penalty_of_the_checkpoint_give_way_to_flags(files, capsys):
    tiny.edit(Path("model/chat_template.json"), chat_template="system\nYou are a robot.")
    tiny.edit(Path("model/generation_config.json"), repetition_penalty=1.5)
    model, shown = EPVLM.from_pretrained("model"), []
    for flags, system, penalty in (
        (["--system", ""], "", 1.5),
        (["--system", "You are a robot."], "You are a robot.", 1.5),
        (["--system", "", "--repetition-penalty", "1"], "", 1.0),
    ):
        assert main(["image.png", "none", QUESTION, *MODEL, "9", *flags]) == 0
        out, err = capsys.readouterr()
        expected = model.answer("image.png", None, QUESTION, Options(system=system), Sampling(9, 0, 1, 0, penalty))
        assert out == expected + "\n" and "warning" not in err
        shown.append(out)
    assert len(set(shown)) == 3
    assert main(["image.png", "none", *ASK]) == 0
    assert capsys.readouterr().err.count("epvlm: warning: ") == 1


def test_a_ten_bit_frame_says_how_it_was_read(files, capsys):
    grey = np.random.default_rng(0).integers(0, 1024, (112, 84)).astype(np.uint16)
    Image.fromarray(grey).save("ten.png")
    assert main(["ten.png", "events.npy", *ASK]) == 0
    warning, *err = lines(capsys)[1]
    assert warning == f"epvlm: warning: ten.png: grey values up to {grey.max()}, read as 10 bits" and kept(err) == KEPT


def test_each_warning_is_one_line_before_what_was_kept(files, capsys, monkeypatch):
    np.save("empty.npy", np.load("events.npy")[:0])
    look = EPVLM.look
    monkeypatch.setattr(EPVLM, "look", lambda *given: look(*given) and look(*given))  # warns twice
    assert main(["image.png", "empty.npy", *ASK]) == 0
    warning, *err = lines(capsys)[1]
    assert warning.startswith("epvlm: warning: empty.npy: no events at all; ")
    assert kept(err) == "kept 24 of 48 patches (6 of 12 tokens), 0 events in 0.0 ms"


def test_pieces_are_flushed_as_they_come(files, monkeypatch):
    flushed = []

    def shown(*_, end="\n", flush=False, **__):
        flushed.extend([flush] if end == "" else [])

    monkeypatch.setattr(epvlm, "print", shown, raising=False)
    main(["image.png", "none", *ASK])
    assert flushed and all(flushed)


@pytest.mark.parametrize("question", [[QUESTION], []])
def test_progress_counts_the_layers_once_and_clears_its_line(files, capsys, monkeypatch, question):
    asking(monkeypatch, b"What is moving?\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["image.png", "events.npy", *question, *MODEL, "6"]) == 0
    shown = r"\rlayer 1 of 4\rlayer 2 of 4\rlayer 3 of 4(\rlayer 4 of 4)?\r\033\[K"
    assert re.fullmatch(rf".*FLOPs\n{shown}first token after \S+ s\nstopped after 6 tokens\n", capsys.readouterr().err)


# The command line: questions from standard input


def test_lines_of_a_pipe_are_questions(files, capsys, monkeypatch):
    alone = []
    for question in QUESTIONS:
        assert main(["image.png", "events.npy", question, *MODEL, "6"]) == 0
        alone += lines(capsys)[0]
    asking(monkeypatch, b"\n \n" + "\n\n  ".join(QUESTIONS).encode())
    assert main(["image.png", "events.npy", *MODEL, "6"]) == 0
    out, err = lines(capsys)
    assert out == alone and err[0].startswith(f"{KEPT}, ")
    assert [re.sub(r"\d+\.\d\d", "", line) for line in err[1:]] == [
        "first token after  s",
        "stopped after 6 tokens",
    ] * 3


@pytest.mark.parametrize(
    "text, words",
    [
        (b"\n", "no question"),
        (b" \n\n", "no question"),
        (b"\xff\n", "UTF-8"),
        (b"x" * 2**20, "exceed"),
    ],
)
def test_a_pipe_without_a_question_to_answer_is_refused(files, capsys, monkeypatch, text, words):
    asking(monkeypatch, text)
    assert main(["image.png", "events.npy", *MODEL, "6"]) == 2
    err = lines(capsys)[1]
    assert err[-1].startswith("epvlm: error: ") and any(words in line for line in err)


@pytest.mark.parametrize("text", [b"", None])
def test_an_empty_or_closed_input_is_refused_before_the_model_is_loaded(files, capsys, monkeypatch, text):
    asking(monkeypatch, b"") if text is not None else monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(EPVLM, "from_pretrained", lambda *_: pytest.fail("loaded"))
    assert "no question; give one" in refused(capsys, "image.png", "events.npy", *MODEL, "6")


def test_after_a_question_that_cannot_be_answered_comes_the_next(files, capsys, monkeypatch):
    asking(monkeypatch, b"What is moving?\n\xff\nWhat is moving?\n")
    assert main(["image.png", "events.npy", *MODEL, "6"]) == 2
    out, err = lines(capsys)
    assert len(out) == 2 and out[0] == out[1]
    (line,) = (line for line in err if line.startswith("epvlm: question "))
    assert line.startswith("epvlm: question 2: ") and "UTF-8" in line
    assert re.match(r"epvlm: error: 1 .*of 3\b", err[-1])


def test_a_terminal_is_asked_until_its_end(files):
    """Only answers on stdout; the end of input (Ctrl-D) ends with status 0, whatever could not be answered."""
    ours, theirs = pty.openpty()
    os.write(ours, b"What is moving?\n" + b"\xff\n" + b"The red circle moves.\n\x04")
    with program("image.png", "events.npy", *MODEL, "6", stdin=theirs) as running:
        out, err = running.communicate(timeout=120)
    os.close(ours), os.close(theirs)
    assert running.returncode == 0 and len(out.decode().splitlines()) == 2
    assert err.decode().startswith(KEPT) and err.count(b"question: ") == 4
    assert err.endswith(b"question: \n") and b"UTF-8" in err and b"Traceback" not in err


@pytest.mark.parametrize("model, count", [("model", "6"), (str(TINY), "128")])
def test_a_pipe_is_utf8_whatever_the_locale(files, model, count):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = "image.png", "none", "--model", model, "--max-new-tokens", count
    question, found = "Où est l'été ?", []
    for locale in (plain, {"PYTHONUTF8": "1"}):
        with program(*arguments, stdin=subprocess.PIPE, env={**os.environ, **locale}) as running:
            out, err = running.communicate(question.encode(), timeout=120)
        found.append((running.returncode, out, err.count(b"\n")))
    expected = EPVLM.from_pretrained(model).answer("image.png", None, question, sampling=Sampling(int(count)))
    assert found[0] == found[1] and found[0][:2] == (0, expected.encode() + b"\n")


# The command line: sources of a clip


def source(image, **flags) -> Clip:
    """What the command line makes of its first argument and flags."""
    nothing = dict.fromkeys(("times", "fps", "frame", "frames", "window"))
    return epvlm.read_input(types.SimpleNamespace(**{**nothing, "image": image, **flags}))


def which(clip: Clip) -> list[int]:
    """The places of the clip's frames in FRAMES."""
    seen = [np.asarray(clip.frame(n)) for n in range(len(clip.frames))]
    return [next(n for n, frame in enumerate(FRAMES) if np.array_equal(frame, pixels)) for pixels in seen]


@pytest.fixture
def clips(files):
    """The folder of `files`, with FRAMES at TIMES in all the forms that are read."""
    Path("frames").mkdir()
    for n, frame in enumerate(FRAMES):
        frame.save(f"frames/{n:03}.png")
    rows = [(f"{t / 1e6:.9f}", t, f"{t - 500}, {t + 500}", f"{n:03}.png") for n, t in enumerate(TIMES.tolist())]
    write = {
        "frames/notes.md": "not a frame",
        "images.txt": "# time name\n\n" + "".join(f"{s} frames/{name}\n" for s, _, _, name in rows),
        "frames/flat.txt": "".join(f"{us}\timages/{name}\n" for _, us, _, name in rows),
        "us.txt": "".join(f"{us}\n" for _, us, _, _ in rows),
        "s.txt": "".join(f"{s}\n" for s, _, _, _ in rows),
        "dsec.txt": "# exposure_start, exposure_end\n" + "".join(f"{both}\n" for _, _, both, _ in rows),
    }
    for name, text in write.items():
        Path(name).write_text(text)
    for name, how in (("clip.gif", {}), ("clip.webp", {"lossless": True}), ("clip.png", {})):
        first, *others = (frame.copy() for frame in FRAMES)
        first.save(name, save_all=True, append_images=others, duration=DURATIONS, **how)
    return files


SOURCES = [  # first argument, flags, what the line about what was kept says of the times
    ("images.txt", {}, "times in seconds"),
    ("frames/flat.txt", {}, "times in microseconds"),  # in a folder of their own for the camera, here beside the list
    ("frames", {"times": "us.txt"}, "times in microseconds"),
    ("frames", {"times": "s.txt"}, "times in seconds"),
    ("frames", {"times": "dsec.txt"}, "times in microseconds"),  # halfway of the exposure
    ("clip.gif", {}, "their own times"),
    ("clip.webp", {}, "their own times"),
    ("clip.png", {}, "their own times"),
    ("frames", {"fps": 12.5}, "12.5 a second"),
    ("clip.gif", {"fps": 12.5}, "12.5 a second"),  # in the place of its own
    ("images.txt", {"fps": 12.5}, "12.5 a second"),
]


@pytest.mark.parametrize("name, flags, clock", SOURCES)
def test_sources_of_a_clip(clips, name, flags, clock):
    clip = source(name, **flags, frames=9)
    assert clip.times.tolist() == pytest.approx(80_000 * np.arange(9) if "fps" in flags else TIMES, abs=1e-6)
    assert which(clip) == list(range(9)) and str(clip) == f", 9 frames at {clock}"
    assert which(replace(clip, frames=clip.frames[::-1])) == list(range(9))[::-1]  # again, in any order
    five = source(name, **flags, frames=5)
    assert which(five) == [0, 2, 4, 6, 8] and np.array_equal(five.times, clip.times[::2])


def test_any_fraction_makes_times_seconds():
    for rows, times, unit in (
        ([["-40000"], ["0"], ["+5"]], [-40_000, 0, 5], "microseconds"),
        ([["1"], ["2.0"]], [1e6, 2e6], "seconds"),
        ([["1", "3"], ["4", "5.5"]], [2e6, 4.75e6], "seconds"),
    ):
        found, clock = epvlm.in_microseconds(np.array(rows), "t.txt")
        assert found.tolist() == times and clock == f" at times in {unit}"


@pytest.mark.parametrize(
    "flags, chosen",
    [
        ({"fps": 25}, [0, 3, 5, 8]),  # at least four
        ({"fps": 2}, [0, 1, 2, 3, 5, 6, 7, 8]),  # two a second of 4 seconds
        ({"fps": 4}, [0, 3, 5, 8]),
        ({"fps": 0.5}, list(range(9))),
        ({"fps": 25, "frames": 1}, [0]),
        ({"fps": 25, "frames": 2}, [0, 8]),
        ({"fps": 25, "frames": 3}, [0, 4, 8]),
        ({"fps": 25, "frames": 7}, [0, 1, 3, 4, 5, 7, 8]),
        ({"fps": 25, "frames": 100}, list(range(9))),
        ({"fps": 25, "window": (80_000, 320_000)}, [2, 4, 6, 8]),  # of those inside, both ends included
        ({"fps": 25, "window": (1, 200_000), "frames": 3}, [1, 3, 5]),
        ({"fps": 25, "window": (120_000, 120_000)}, [3]),
    ],
)
def test_frames_are_chosen_evenly_with_both_ends(clips, flags, chosen):
    clip = source("frames", **flags)
    assert which(clip) == chosen and clip.times.tolist() == [n * 1e6 / flags["fps"] for n in chosen]
    assert clip.window == flags.get("window")


def test_missing_frames_of_a_list_are_left_out_before_sampling(clips, capsys):
    for n in (0, 3, 8):
        Path(f"frames/{n:03}.png").unlink()
    with pytest.warns(UserWarning) as caught:
        clip = source("images.txt", frames=3)
    assert [str(each.message) for each in caught] == ["images.txt: 3 of 9 frames are missing, and left out"]
    assert which(clip) == [1, 4, 7] and clip.times.tolist() == pytest.approx(TIMES[[1, 4, 7]])  # of 1 2 4 5 6 7
    assert main(["images.txt", "none", *ASK]) == 0
    warning, *err = lines(capsys)[1]
    assert warning == "epvlm: warning: images.txt: 3 of 9 frames are missing, and left out"
    assert kept(err).endswith("no events, 4 frames at times in seconds")


@pytest.mark.parametrize("name", ["pages.tiff", "pair.mpo"])
def test_pages_without_times_are_a_still_image(files, name):
    first, *others = (frame.copy() for frame in FRAMES)
    first.save(name, save_all=True, append_images=others)
    assert np.array_equal(source(name), read_image(name)) and isinstance(source(name), Image.Image)


def test_a_clip_on_the_command_line_is_that_of_the_class(clips, capsys, monkeypatch):
    """With events, dense without, and asked several questions: frames and events of the window alone."""
    rows, window = filmed(0, (84, 112), 360_000), ("--window", "40000", "280000")
    rows = rows[np.argsort(rows["t"], kind="stable")]
    np.save("filmed.npy", rows)
    inside = ((rows["t"] >= 40_000) & (rows["t"] <= 280_000)).sum()
    model, clip = EPVLM.from_pretrained("model"), Clip([FRAMES[n] for n in (1, 3, 6)], TIMES[[1, 3, 6]])
    for events, array, told in (("filmed.npy", rows, f"{inside} events in 240.0 ms"), ("none", None, "no events")):
        view = model.look(clip, array, Options(window=(40_000, 280_000)))
        answers = ["".join(model.stream(view, question, Sampling(6))) for question in QUESTIONS]
        command = ["images.txt", events, *MODEL, "6", *window, "--frames", "3"]
        assert main([*command, QUESTION]) == 0
        out, err = capsys.readouterr()
        asking(monkeypatch, "\n".join(QUESTIONS).encode())
        assert main(command) == 0
        several, again = capsys.readouterr()
        assert out == answers[0] + "\n" and several == "".join(answer + "\n" for answer in answers)
        err = err.splitlines()
        assert kept(err) == f"{view} at times in seconds" and told in err[0] and again.startswith(kept(err))
        assert view.keep.all() == (array is None) and len(view.keep) == 2


def test_the_real_clip(checkpoint, data, capsys):
    """Its list names 87 frames, five of which are there; the windows are those that FACTS.md counted."""
    folder = data / "recordings" / "slider_depth"
    inputs = str(folder / "images.txt"), str(folder / "events_xypt_us.npy")
    command = [*inputs, *ASK[:1], "--model", str(checkpoint.folder), "--max-new-tokens", "2", "--frames", "5"]
    assert main(command) == 0
    warning, *err = lines(capsys)[1]
    assert warning.endswith("images.txt: 82 of 87 frames are missing, and left out")
    assert re.match(r"kept (\d+) of \d+ patches .*, 50000 events in 193.8 ms, 5 frames at times in seconds$", kept(err))


# The command line: alignment in space and time


@pytest.mark.parametrize(
    "text, us",
    [
        ("12000", 12_000),
        ("12000us", 12_000),
        ("10ms", 10_000),
        ("0.07s", 70_000),
        ("-5ms", -5000),
        ("1e6", 1e6),
        ("2e3ns", 2),
        ("1605537493.718345s", 1605537493718345),
    ],
)
def test_a_time_has_a_unit(text, us):
    assert epvlm.microseconds(text) == us


@pytest.mark.parametrize("text", ["", "ms", "10 min", "10m", "now", "1ss"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a time"):
        epvlm.microseconds(text)


def test_a_frame_is_a_window(files, capsys):
    """From a list, exposures on the clock of DSEC, and plain times; the same as the window that it stands for."""
    Path("images.txt").write_text("0.0 images/1.png\n0.00102 images/2 b.png\n0.00105 images/3.png\n")
    Path("exposures.txt").write_text("# start, end\n900, 910\n1010, 1030\n1045, 1055\n")
    Path("times.txt").write_text("0\n1020\n1050\n")
    for flags in (
        ["--window", "1020", "0.00105s"],
        *(["--frame", f"{name}.txt:2"] for name in ("images", "exposures", "times")),
    ):
        assert main(["image.png", "events.npy", *ASK, *flags]) == 0
        assert kept(lines(capsys)[1]).endswith("31 events in 0.0 ms")


@pytest.mark.parametrize("write", [
    lambda H: np.save("H", H), lambda H: np.save("H", H.astype("f4")), lambda H: np.savetxt("H", H, header="a comment"),
    lambda H: np.savetxt("H", H, delimiter=", "), lambda H: np.savetxt("H", H[:2]), lambda H: np.save("H", H[:2]),
    lambda H: Path("H").write_text("\ufeff-2e0,0,83\r\n0,2,.5\r\n", encoding="utf-8", newline=""),
    lambda H: (np.save("H", H), Path("H.npy").rename("H.NPY")),
])  # fmt: skip
def test_a_homography_is_read_from_a_file(files, write):
    H = np.array([[-2.0, 0, 83], [0, 2, 0.5], [0, 0, 1]])
    write(H)
    path = next(path for path in map(Path, ("H", "H.npy", "H.NPY")) if path.exists())
    for source in (str(path), path, H, H.tolist(), H[:2]):
        assert Options(homography=source).homography == tuple(map(tuple, H.tolist()))
    assert len({Options(homography=H), Options(homography=path)}) == 1  # it can be compared


@pytest.mark.parametrize("content", [
    b"PK\3\4", b"\x93NUMPY", b"\x93NUMPY\1\0\x06\0(((((\n",
    b"\x93NUMPY\1\0\x44\0{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}\n",
])  # fmt: skip
def test_a_damaged_homography_is_refused(files, capsys, content):
    """Also where numpy raises what is no ValueError."""
    Path("H.npy").write_bytes(content)
    assert main(["image.png", "events.npy", *ASK, "--homography", "H.npy"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("epvlm: error: homography H.npy: "), said


def test_mirrored_events_are_brought_back(files, capsys):
    """As if the event camera saw the image in a mirror, from another place, at half the size."""
    events, model = np.load("events.npy"), EPVLM.from_pretrained("model")
    events["x"], events["y"] = events["x"] // 2 * 2, events["y"] // 2 * 2
    seen = events.copy()
    seen["x"], seen["y"] = (83 - events["x"].astype(int)) // 2 + 7, events["y"] // 2
    np.save("aligned.npy", events), np.save("seen.npy", seen)
    H = [[-2, 0, 82 + 14], [0, 2, 0], [0, 0, 1]]
    expected = model.look("image.png", "aligned.npy")
    view = model.look("image.png", "seen.npy", Options(homography=H, sensor=(60, 60)))
    assert np.array_equal(view.S, expected.S) and torch.equal(view.patches, expected.patches)
    assert str(view) == str(expected)
    np.savetxt("H.txt", H)
    assert main(["image.png", "seen.npy", *ASK, "--homography", "H.txt"]) == 0
    assert kept(lines(capsys)[1]) == str(expected)
    with pytest.raises(ValueError, match="perhaps homography is the inverse"):
        model.look("image.png", "seen.npy", Options(homography=np.linalg.inv(H)))
    clip = Clip(FRAMES[:4], TIMES[:4])
    filming, mirrored = filmed(0, (84, 112), 160_000), filmed(0, (84, 112), 160_000)
    mirrored["x"] = 83 - mirrored["x"].astype(int)
    views = model.look(clip, filming), model.look(clip, mirrored, Options(homography=[[-1, 0, 83], [0, 1, 0]]))
    assert np.array_equal(views[0].S, views[1].S) and str(views[0]) == str(views[1])


# The command line: bad input


BAD_INPUT = [  # arguments, words of the one line
    (("nowhere.png", "none", *ASK), ("nowhere.png", "no such file")),
    (("text.png", "none", *ASK), ("text.png", "give an 8-bit PNG")),
    (("cut.png", "none", *ASK), ("cut.png", "truncated")),
    (("empty", "none", *ASK), ("empty: a folder without images",)),
    (("thin.png", "none", *ASK), ("over 200 : 1", "crop")),
    (("fifo", "none", *ASK), ("fifo", "cannot be read as an image")),
    (("image.png", "fifo", *ASK), ("fifo", "not a file")),
    (("image.png", "nowhere.npy", *ASK), ("nowhere.npy", "no such file")),
    (("image.png", "text.npy", *ASK), ("text.npy", "neither .npy nor .npz")),
    (("image.png", "pickled.npy", *ASK), ("pickled.npy", "pickle")),
    (("image.png", "wide.npy", *ASK), ("wide.npy", "x 700 to 700", "84 x 112", "sensor, WIDTHxHEIGHT")),
    (("image.png", "events.npy", *ASK, "--window", "5", "9"), ("1000 to 1100 us", "change window")),
    (("image.png", "events.npy", *ASK, "--window", "9", "5"), ("window 9 5",)),
    (("image.png", "events.npy", *ASK, "--window", "9", "5h"), ("argument --window: '5h' is not a time",)),
    (("image.png", "events.npy", *ASK, "--frame", "list.txt"), ("frame list.txt: give FILE:N",)),
    (("image.png", "events.npy", *ASK, "--frame", "list.txt:0"), ("frame list.txt:0", "frames 0 to 1", "from 1")),
    (("image.png", "events.npy", *ASK, "--frame", "list.txt:2"), ("frame list.txt:2", "frames 0 to 1", "from 1")),
    (("image.png", "events.npy", *ASK, "--frame", "gone:1"), ("gone: cannot be read",)),
    (("image.png", "events.npy", *ASK, "--frame", "list.txt:1", "--window", "5", "9"), ("window and frame: give one",)),
    (("image.png", "events.npy", *ASK, "--frame", "late.txt:1"), ("from 5000000 to 5040000 us", "1000 to 1100 us")),
    (("image.png", "events.npy", *ASK, "--homography", "no.txt"), ("homography no.txt: No such file", "three rows")),
    (("image.png", "events.npy", *ASK, "--homography", "text.png"), ("homography text.png", "three rows of three")),
    (("image.png", "events.npy", *ASK, "--homography", "pickled.npy"), ("homography pickled.npy", "three rows")),
    (("image.png", "events.npy", *ASK, "--homography", "map.npy"), ("homography map.npy: its shape is (9, 9)",)),
    (("image.png", "events.npy", *ASK, "--homography", "three.txt"), ("homography three.txt: it has no inverse",)),
    (("image.png", "none.raw", *ASK), ("none.raw: cannot be", "python examples/convert.py none.raw -o events.npy")),
    (("image.png", "image.png", *ASK), ("image.png: cannot be read as events", "make a map of it: python -c")),
    (("image.png", "seconds.npy", *ASK, "--window", "5", "9"), ("no event from 5 to 9 us",)),  # without its warning
    (("image.png", "seconds.npy", "x" * 40_000, *MODEL, "1"), ("exceed the model's 32768", "shorten the question")),
    (("image.png", "events.npy", *ASK, "--sparsity", "1"), ("sparsity 1.0", "[0, 1)")),
    (("image.png", "events.npy", *ASK, "--sparsity", "-0.1"), ("sparsity -0.1",)),
    (("image.png", "events.npy", *ASK, "--sparsity", "nan"), ("sparsity nan",)),
    (("image.png", "events.npy", *ASK, "--sparsity", "half"), ("--sparsity", "'half'")),
    (("image.png", "events.npy", *ASK, "--spars", "0.5"), ("unrecognized arguments: --spars",)),
    (("image.png", "events.npy", *ASK, "--cell", "pixel"), ("--cell", "'pixel'", "group")),
    (("image.png", "events.npy", *ASK, "--rule", "none"), ("--rule", "'none'", "literal")),
    (("image.png", "events.npy", *ASK, "--order", "xyz"), ("order", "'xyz'", "txyp")),
    (("image.png", "events.npy", *ASK, "--sensor", "240"), ("--sensor", "'240'")),
    (("image.png", "events.npy", *ASK, "--sensor", "00x180"), ("sensor", "0 x 180")),
    (("image.png", "none", *ASK, "--min-pixels", "9000", "--max-pixels", "8000"), ("min_pixels 9000", "8000")),
    (("image.png", "none", *ASK, "--min-pixels", "0"), ("min_pixels 0 must be at least 1",)),
    (("image.png", "none", *ASK, "--max-new-tokens", "0"), ("max_new_tokens 0",)),
    (("image.png", "none", *ASK, "--temperature", "-1"), ("temperature -1.0",)),
    (("image.png", "none", *ASK, "--repetition-penalty", "0"), ("repetition_penalty 0.0",)),
    (("image.png", "none", *ASK, "--seed", "x"), ("--seed", "'x'")),
    (("image.png", "none", *ASK, "--device", "abacus"), ("device 'abacus'", "try cpu")),
    (("image.png", "none", *ASK, "--dtype", "int8"), ("--dtype", "'int8'", "bfloat16")),
    (("image.png", "none", *ASK, "--model", "./empty"), ("empty/config.json", "no such file")),
    (("image.png", "none", *ASK, "--model", "./nowhere"), ("nowhere/config.json", "no such file")),
    (("image.png", "none", *ASK, "--model", "~nosuchuser/model"), ("~nosuchuser",)),
    (("image.png", "none", *ASK, "--model", "broken"), ("broken/model.safetensors",)),
    (("image.png", "none", "broken \udcff", *MODEL, "1"), ("broken", "UTF-8")),
    (("image.png",), ("required: events",)),
    (("image.png", "none", *ASK, "--frames", "2"), ("image.png: a still image", "leave frames out")),
    (("image.png", "none", *ASK, "--frames", "0"), ("image.png: a still image",)),
    (("image.png", "none", *ASK, "--fps", "0"), ("image.png: a still image",)),
    (("image.png", "none", *ASK, "--times", "nowhere"), ("image.png: a still image",)),
    (("clip.MP4", "none", *ASK), ("clip.MP4: a video", "ffmpeg -i clip.MP4 -r 10 frames/%06d.png", "--fps 10")),
    (("frames", "none", *ASK), ("frames: its frames have no times", "give --times FILE, or --fps")),
    (("frames", "none", *ASK, "--fps", "0"), ("fps 0: give 0.001 to 1000000",)),
    (("list.txt", "none", *ASK, "--fps", "0"), ("fps 0: give 0.001 to 1000000",)),
    (("frames", "none", *ASK, "--fps", "nan"), ("fps nan: give 0.001",)),
    (("frames", "none", *ASK, "--fps", "-25"), ("fps -25: give 0.001",)),
    (("frames", "none", *ASK, "--fps", "9", "--frames", "0"), ("frames 0: give 1 or more",)),
    (("list.txt", "none", *ASK, "--frames", "-1"), ("frames -1: give 1 or more",)),
    (("frames", "none", *ASK, "--fps", "9", "--window", "5", "9"), ("no frame from 5 to 9 us", "change window")),
    (("frames", "none", *ASK, "--times", "nowhere"), ("nowhere: cannot be read (No such file", "begin with a time")),
    (("frames", "none", *ASK, "--times", "events.npy"),
     ("events.npy: cannot be read (not lines of as many words each)",)),
    (("frames", "none", *ASK, "--times", "list.txt"), ("list.txt: a line is not a time, or the start and end",)),
    (("frames", "none", *ASK, "--times", "three.txt"), ("three.txt: a line is not a time, or the start and end",)),
    (("frames", "none", *ASK, "--times", "ragged.txt"),
     ("ragged.txt: cannot be read (not lines of as many words each)",)),
    (("frames", "none", *ASK, "--times", "infinite.txt"), ("infinite.txt: a line is not a time",)),
    (("frames", "none", *ASK, "--times", "comments.txt"),
     ("comments.txt: cannot be read (not lines of as many words each)",)),
    (("frames", "none", *ASK, "--times", "short.txt"), ("3 frames, 2 times; give as many",)),
    (("frames", "none", *ASK, "--times", "falling.txt"), ("3 frames, 3 times; give as many, and rising times",)),
    (("twice.txt", "none", *ASK), ("2 frames, 2 times", "rising times")),
    (("short.txt", "none", *ASK), ("short.txt: a line is not `time name`",)),
    (("comments.txt", "none", *ASK), ("comments.txt: cannot be read (not lines of as many words each)",)),
    (("gone.txt", "none", *ASK), ("gone.txt: none of its 2 frames is there", "relative to the list")),
    (("swapped.txt", "none", *ASK), ("swapped.txt: a line is not a time",)),
    (("nan.txt", "none", *ASK), ("nan.txt: a line is not a time",)),
    (("sizes", "none", *ASK, "--fps", "9", "--frames", "8"), (": 84 x 28 pixels of 8 bits", "one size")),
    (("list.txt", "map.npy", *ASK), ("an event map of 9 x 9 has no times", "give a clip a recording")),
    (("late.txt", "events.npy", *ASK), ("from 4980000 to 5060000 us", "1000 to 1100 us", "clocks' offset")),
    (("long", "none", *ASK, "--fps", "9", "--frames", "8", "--model", str(TINY), "--min-pixels", "602112",
      "--max-pixels", "700000"), ("tokens of the clip", "exceed the model's 1024", "frames 2 or fewer")),
]  # fmt: skip


@pytest.fixture
def bad_files(files):
    """The folder of `files`, with files in it that cannot be used."""
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("image.png").read_bytes()[:5000])
    Path("text.npy").write_text("1 2 3 4")
    Path("none.raw").write_text("% evt 3.0")
    Path("empty").mkdir()
    os.mkfifo("fifo")  # it would be waited for without end
    np.save("pickled.npy", {"x": 1})
    np.save("wide.npy", np.array([(9, 700, 3, 1)], dtype=[("t", int), ("x", int), ("y", int), ("p", int)]))
    Image.new("RGB", (1, 500)).save("thin.png")
    events = np.load("events.npy").astype([("t", "f8"), ("x", "u2"), ("y", "u2"), ("p", "?")])
    events["t"] /= 1e6
    np.save("seconds.npy", events)
    for name in ("frames", "sizes", "long"):
        Path(name).mkdir()
    for n, frame in enumerate(FRAMES[:8]):
        frame.save(f"long/{n}.png")
        frame.crop((0, 0, 84, 28 if n == 1 else 112)).save(f"sizes/{n}.png")
    for n in range(3):
        FRAMES[n].save(f"frames/{n}.png")
    np.save("map.npy", np.ones((9, 9)))
    texts = {
        "list": "0 frames/0.png\n40000 frames/1.png",
        "three": "0 1 2\n3 4 5\n6 7 8",
        "ragged": "0 1\n3\n6 7",
        "infinite": "0\n1\ninf",
        "comments": "# time name",
        "short": "0\n1",
        "falling": "0\n2\n1",
        "twice": "0 frames/0.png\n0 frames/1.png",
        "gone": "0 0.png\n1 1.png",
        "swapped": "frames/0.png 0",
        "nan": "nan frames/0.png",
        "late": "5.0 frames/0.png\n5.04 frames/1.png",
    }
    for name, text in texts.items():
        Path(f"{name}.txt").write_text(text)
    Path("broken").mkdir()
    for file in Path("model").iterdir():
        Path("broken", file.name).write_bytes(b"nothing" if file.suffix == ".safetensors" else file.read_bytes())


@pytest.mark.parametrize("arguments, words", BAD_INPUT, ids=[", ".join(words) for _, words in BAD_INPUT])
def test_bad_input_is_one_line_and_status_2(bad_files, capsys, arguments, words):
    line = refused(capsys, *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("status, words", [(404, "no such"), (401, "HF_TOKEN")])
def test_a_hub_that_refuses_is_one_line(files, folder, capsys, status, words):
    code = {"X-Error-Code": "RevisionNotFound"} if status == 404 else {}
    with hub.visit(folder, files / "cache", (status, code)):
        line = refused(capsys, "image.png", "none", *ASK, "--model", "some/model", "--revision", "r")
    assert line.startswith("epvlm: error: some/model: ") and words in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("image.png", "none", *ASK, "--sparsity", "2"),
        ("image.png", "none", *ASK, "--temperature", "-1"),
        ("nowhere.png", "none", *ASK),
        ("image.png", "nowhere.npy", *ASK),
    ],
)
def test_small_mistakes_are_found_before_the_model_is_loaded(files, capsys, monkeypatch, arguments):
    monkeypatch.setattr(EPVLM, "from_pretrained", lambda *_: pytest.fail("loaded"))
    refused(capsys, *arguments)


def test_a_share_of_the_fuzzing(capsys):
    ends = fuzz(200, seed=1)
    fine = ("answered", "refused", "took too long")  # time is judged by the script alone
    failed = {end: n for end, n in ends.items() if end[1] not in fine}
    assert not failed, capsys.readouterr().err
    assert all(ends[reader, "refused"] for reader in READERS if reader != "questions")
    assert all(ends[reader, "answered"] for reader in READERS if reader != "checkpoints")


# The command line: how it ends


@pytest.mark.parametrize(
    "error, status, line",
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError("disk\nfull"), 2, "epvlm: error: disk full\n"),
        (ValueError("a\n b"), 2, "epvlm: error: a b\n"),
        (MemoryError(), 2, "epvlm: error: MemoryError\n"),
        (RuntimeError("no room"), 2, "epvlm: error: no room\n"),
        (OverflowError("too large"), 2, "epvlm: error: too large\n"),
    ],
)
def test_how_an_error_ends(monkeypatch, capsys, error, status, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(epvlm, "run", fail)
    assert main(["i", "e", "q"]) == status
    assert capsys.readouterr() == ("", line)


def test_an_error_in_the_midst_of_an_answer_ends_its_line(files, capsys, monkeypatch):
    def tokens(model, *_):
        yield from model.tokenizer.encode("half").ids
        raise ValueError("not finite")

    monkeypatch.setattr(EPVLM, "tokens", tokens)
    assert main(["image.png", "none", *ASK]) == 2
    out, err = capsys.readouterr()
    assert out == "half\n" and err.endswith(" s\nepvlm: error: not finite\n")


def test_an_error_in_a_process_of_its_own_has_no_traceback(files):
    with program("nowhere.png", "events.npy", QUESTION) as running:
        out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (2, b"")
    assert err.startswith(b"epvlm: error: nowhere.png: ") and err.count(b"\n") == 1


def test_an_error_that_cannot_be_printed_still_has_a_status(files):
    with open("/dev/full", "w") as full, program("nowhere.png", "none", "?", stderr=full) as running:
        assert running.wait(60) > 0


@pytest.mark.parametrize("image, status", [("image.png", 0), ("nowhere.png", 2)])
def test_a_closed_standard_error_leaves_the_answer_alone(files, image, status):
    arguments = image, "events.npy", QUESTION, *MODEL, "9", "--device", "cpu"
    with program(*arguments, stderr=None, preexec_fn=lambda: os.close(2)) as running:  # as 2>&- does
        out, _ = running.communicate(timeout=120)
    model = EPVLM.from_pretrained("model", device="cpu")
    answer = model.answer("image.png", "events.npy", QUESTION, sampling=Sampling(9)) + "\n"
    assert (running.returncode, out.decode()) == (status, "" if status else answer)


@pytest.fixture
def endless(files):
    """Arguments of an answer that takes minutes."""
    tiny.write(files / "endless", tied=False)
    tensors = load_file("endless/model.safetensors")
    tensors["lm_head.weight"][tiny.tokenizer().token_to_id("<|im_end|>")] = 0  # never the largest
    save_file(tensors, "endless/model.safetensors")
    return "image.png", "none", "?", "--model", "endless", "--max-new-tokens"


def test_an_interrupted_answer_ends_with_130(endless):
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a suite in the background ignores it)
    with program(*endless, "30000", preexec_fn=heard) as running:
        os.read(running.stdout.fileno(), 1)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and b"Traceback" not in err and b"rror" not in err


def test_an_interrupt_instead_of_a_question_ends_with_130_and_its_line(files):
    """Ctrl-C on a terminal that the program has for itself."""

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    ours, theirs = pty.openpty()
    with program("image.png", "none", *MODEL, "6", stdin=theirs, stderr=theirs, preexec_fn=own_terminal) as running:
        os.close(theirs)
        shown = b""
        while not shown.endswith(b"question: "):
            shown += os.read(ours, 1000)
        os.write(ours, b"\x03")
        out, _ = running.communicate(timeout=60)
    assert (running.returncode, out, os.read(ours, 1000)) == (130, b"", b"^C\r\n")
    os.close(ours)


def test_an_ignored_interrupt_stays_ignored(endless):
    """As in the background of a shell script."""
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    with program(*endless, "100", preexec_fn=ignore) as running:
        os.read(running.stdout.fileno(), 1)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 0 and err.endswith(b"stopped after 100 tokens\n")


def test_a_closed_pipe_ends_with_1_and_without_a_word(endless):
    with program(*endless, "30000") as running:
        os.read(running.stdout.fileno(), 1)
        running.stdout.close()
        err = running.stderr.read().decode()
        assert kept(err.splitlines()) == "kept 48 of 48 patches (12 of 12 tokens), no events"
        assert running.wait(60) == 1
