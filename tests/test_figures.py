"""Fig. 1 to 3 of one's own input: the picture, and the dense answer beside the packed one."""

import itertools
import json
import re
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import epvlm
import figures
import tiny
from common import ROOT
from epvlm import EPVLM, Options, Sampling
from events import read_events
from figures import main, picture
from strategies import SPARSITIES
from vit import Clip, VisionTransformer

QUESTION = "What is moving?"
INPUT = ["image.png", "events.npy", "--model", "model"]
COMPARE = ["compare", *INPUT, "--max-new-tokens", "6", QUESTION]


def lines(capsys) -> tuple[list[str], list[str]]:
    return tuple(text.splitlines() for text in capsys.readouterr())


def panels(whole: Image.Image, width: int, height: int, columns: int = 3, row: int = 0) -> list[np.ndarray]:
    """Those of a row, apart by 8 pixels or a 32nd of their width."""
    gap = max(8, width // 32)
    lefts, top = [gap + n * (width + gap) for n in range(columns)], gap + row * (height + gap)
    return [np.asarray(whole.crop((left, top, left + width, top + height))).astype(int) for left in lefts]


# Fig. 1


@pytest.mark.parametrize("cell", ["group", "patch"])
def test_the_picture_shows_the_image_the_events_and_what_is_kept(checkpoint, cell):
    model, image = checkpoint.model, tiny.noise(112, 84)
    rows = [(5, 5, 0, 1)] * 4 + [(60, 40, 1, 0)] * 4 + [(9, 70, 2, 1), (9, 70, 2, 0)]
    rows = np.array(rows, dtype=[(name, int) for name in "xytp"])
    left, middle, right = panels(picture(model, image, rows, Options(cell=cell)), 112, 84)
    assert np.array_equal(left, np.asarray(image))
    grey = np.asarray(image.convert("L").convert("RGB")).astype(int)
    changed = (middle != grey).any(axis=2)
    assert {tuple(place) for place in np.argwhere(changed).tolist()} == {(5, 5), (40, 60), (70, 9)}
    on, off, both = middle[5, 5], middle[40, 60], middle[70, 9]
    assert on.tolist() == [0xFF, 0x20, 0x10] and off.tolist() == [0x10, 0x60, 0xFF]  # red and blue, and between them
    assert min(both[0], both[2]) > both[1] + 20
    keep = model.look(image, rows, Options(cell=cell)).keep[0]
    kept = np.kron(keep.numpy(), np.ones((14, 14), dtype=bool))
    assert np.array_equal(right[kept], left[kept])
    assert abs(right[~kept] - (0.25 * left[~kept] + 0.75 * np.array([0x10, 0x30, 0x28]))).max() <= 1


def test_the_caption_has_the_counts_and_the_colours(checkpoint, monkeypatch):
    model, image, captions = checkpoint.model, Image.new("RGB", (112, 84), "red"), []
    write = ImageDraw.ImageDraw.multiline_text
    record = lambda self, xy, text, *rest: captions.append(text) or write(self, xy, text, *rest)  # noqa: E731
    monkeypatch.setattr(ImageDraw.ImageDraw, "multiline_text", record)
    for E_v, words in ((np.eye(84, 112), "events, red on, blue off;"), (None, "middle: events; right")):
        picture(model, image, E_v, Options())
        assert str(model.look(image, E_v)) in captions[-1] and words in captions[-1]


def test_more_events_are_drawn_stronger_and_small_numbers_as_large_ones(checkpoint):
    image = Image.new("RGB", (112, 84), "white")
    E_v = np.zeros((84, 112))
    E_v[10, :9], E_v[20, 20], E_v[30, 30] = 8, 1, -2
    drawn = [panels(picture(checkpoint.model, image, scale * E_v, Options()), 112, 84)[1] for scale in (1, 1e-6, 1e6)]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])
    strong, weak, off = drawn[0][10, 5], drawn[0][20, 20], drawn[0][30, 30]
    assert strong[1] < weak[1] < 230 and strong[0] == weak[0] == 255 and off[2] == 255 > off[0]


@given(SPARSITIES, st.integers(0, 2**32 - 1), st.sampled_from([(56, 56), (28, 280), (280, 28), (300, 200)]))
def test_any_map_can_be_drawn(checkpoint, sparsity, seed, size):
    model, image = checkpoint.model, tiny.noise(*size)
    E_v, options = np.random.default_rng(seed).integers(-2, 3, (9, 11)) * (seed % 3), Options(sparsity, min_pixels=784)
    with warnings.catch_warnings(action="ignore"):  # of a map without events
        whole, view = picture(model, image, E_v, options), model.look(image, E_v, options)
    height, width = (14 * side for side in view.keep.shape[1:])
    seen = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    assert np.array_equal(panels(whole, width, height)[0], seen)


@pytest.mark.parametrize(
    "flags, options",
    [([], {}), (["--window", "1000", "1030"], {"window": (1000, 1030)}),
     (["--sensor", "168x224"], {"sensor": (168, 224)}),
     (["--sparsity", "0.8", "--cell", "patch"], {"sparsity": 0.8, "cell": "patch"})],
)  # fmt: skip
def test_the_command_draws_what_the_files_hold(files, capsys, flags, options):
    Path("out.png").write_bytes(b"old")
    assert main(["picture", *INPUT, "-o", "out.png", *flags]) == 0 and lines(capsys) == ([], [])
    model = EPVLM.from_pretrained("model")
    image = Image.open("image.png")
    for events in ("events.npy", np.load("events.npy"), read_events("events.npy")):
        drawn = picture(model, image, events, Options(**options))
        assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(drawn))
    assert not list(Path().glob(".out*"))


@pytest.mark.parametrize("frames, shown", [(5, [0, 1, 2]), (20, [0, 1, 3, 4, 5, 6, 8, 9])])
def test_a_clip_is_a_strip(checkpoint, frames, shown):
    """Of each moment, or of eight, the first frame, its own events over it, and what is kept of it."""
    model = checkpoint.model
    clip = Clip.at_rate([tiny.noise(112, 84, seed) for seed in range(frames)], 25)
    rows = np.zeros(frames, dtype=[(name, int) for name in "xytp"])
    rows["x"], rows["t"] = 5 * np.arange(frames), 40_000 * np.arange(frames)  # an event for each frame
    options = Options(min_pixels=784, max_pixels=112 * 84)
    whole, view = picture(model, clip, rows, options), model.look(clip, rows, options)
    first, middle, last = (panels(whole, 112, 84, len(shown), row) for row in range(3))
    for place, moment in enumerate(shown):
        pixels = np.asarray(clip.frames[2 * moment]).astype(int)
        assert np.array_equal(first[place], pixels)
        grey = np.asarray(clip.frames[2 * moment].convert("L").convert("RGB")).astype(int)
        changed = np.argwhere((middle[place] != grey).any(axis=2)).tolist()
        assert changed == [[0, 5 * n] for n in range(2 * moment, min(2 * moment + 2, frames))]
        kept = np.kron(view.keep[moment].numpy(), np.ones((14, 14), dtype=bool))
        assert np.array_equal(last[place][kept], pixels[kept])
        assert (last[place][~kept].sum() < pixels[~kept].sum()) or kept.all()


def test_a_list_of_frames_can_be_drawn(files):
    for n in range(3):
        tiny.noise(84, 112, n).save(f"{n}.png")
    Path("list.txt").write_text("".join(f"{1000 + 40 * n} {n}.png\n" for n in range(3)))
    assert main(["picture", "list.txt", "events.npy", "--model", "model", "-o", "out.png"]) == 0
    assert Image.open("out.png").height > 3 * 112


def test_a_dense_image_can_be_drawn(files):
    assert main(["picture", "image.png", "none", "--model", "model", "-o", "out.png"]) == 0
    left, middle, right = panels(Image.open("out.png"), 84, 112)
    assert np.array_equal(left, right) and (middle[..., 0] == middle[..., 1]).all()


@pytest.mark.parametrize(
    "output, words",
    [("p.jpg", "p.jpg: it is written as .png"), ("image.png", "image.png: is one of the inputs"),
     ("e.png", "e.png: is one of the inputs"), ("no/p.png", "no/p.png: cannot be written there")],
)  # fmt: skip
def test_a_picture_that_cannot_be_written_is_refused_before_work(files, capsys, monkeypatch, output, words):
    Path("events.npy").rename("e.png")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    monkeypatch.setattr(EPVLM, "from_pretrained", lambda *_: pytest.fail("loaded"))
    assert main(["picture", "image.png", "e.png", "-o", output]) == 2
    (line,) = lines(capsys)[1]
    assert line.startswith("figures: error: ") and words in line
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_an_error_leaves_the_old_picture(files, capsys, monkeypatch):
    Path("out.png").write_bytes(b"old")

    def half(_, file, kind):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    assert main(["picture", *INPUT, "-o", "out.png"]) == 2
    assert Path("out.png").read_bytes() == b"old" and not list(Path().glob(".out*"))


def test_a_warning_is_a_line_and_an_error_stands_alone(files, capsys):
    np.save("none.npy", np.zeros((112, 84)))
    assert main(["picture", "image.png", "none.npy", "--model", "model", "-o", "out.png"]) == 0
    (line,) = lines(capsys)[1]
    assert line.startswith("figures: warning: the event map is zero everywhere")
    assert main(["picture", "image.png", "none.npy", "--model", "./nowhere", "-o", "out.png"]) == 2
    assert len(lines(capsys)[1]) == 1


def test_the_readme_s_picture_is_what_its_command_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Path("README.md").read_text() + Path("examples/README.md").read_text()
    command = re.search(r"python examples/figures\.py (picture .*examples/picture\.png.*)", text)[1]
    assert main(shlex.split(command.replace("examples/picture.png", str(tmp_path / "drawn.png")))) == 0
    shown, drawn = (Image.open(path) for path in ("examples/picture.png", tmp_path / "drawn.png"))
    for one, other in zip(panels(shown, 224, 224), panels(drawn, 224, 224), strict=True):
        assert np.array_equal(one, other)
    assert shown.size == drawn.size and np.mean(np.asarray(shown) != np.asarray(drawn)) < 0.02  # the letters may differ


# Fig. 2 and 3


def test_both_answers_and_what_they_cost(files, capsys, monkeypatch):
    expected = []
    for events in ("none", "events.npy"):
        assert epvlm.main(["image.png", events, QUESTION, "--model", "model", "--max-new-tokens", "6"]) == 0
        expected += lines(capsys)[0]
    loaded, passes, see, load = [], [], VisionTransformer.forward, EPVLM.from_pretrained
    monkeypatch.setattr(VisionTransformer, "forward", lambda *given: passes.append(given) or see(*given))
    monkeypatch.setattr(EPVLM, "from_pretrained", lambda *given: loaded.append(given) or load(*given))
    assert main(COMPARE) == 0
    out, err = lines(capsys)
    assert out == expected and len(loaded) == 1
    assert len(passes) == 3  # one to have all in memory, then two that count
    assert err[0].startswith("kept 48 of 48 patches (12 of 12 tokens), no events, ")
    assert err[3].startswith("kept 24 of 48 patches (6 of 12 tokens), 100 events")
    assert all(err[n].startswith("first token after ") and err[n + 1] == "stopped after 6 tokens" for n in (1, 4))
    names, *rows = (line.split() for line in err[6:])
    assert names[:3] == ["patches", "tokens", "MFLOPs"]
    (dense, *d), (packed, *p), (ratio, *r) = ([name, *map(float, row)] for name, *row in rows)
    assert (dense, packed, ratio) == ("dense", "packed", "ratio")
    assert d[:2] == [48, 12] and p[:2] == [24, 6] and r[:2] == [0.5, 0.5]
    model = load("model")
    flops = model.flops(model.look("image.png", "events.npy"), QUESTION)
    assert [p[2], d[2]] == [round(n / 1e6, 2) for n in flops] and r[2] == round(flops[0] / flops[1], 2)
    assert all(first <= whole for _, _, _, first, whole in (d, p))


def test_seconds_spent_on_looking_count(checkpoint, monkeypatch):
    clock, costs = itertools.count(), []
    monkeypatch.setattr(figures.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(figures, "table", lambda *both: costs.extend(both) or "")
    looks = [
        figures.look(checkpoint.model, "dense", Image.new("RGB", (112, 84), "red"), None, Options()) for _ in range(2)
    ]
    assert [look.seconds for look in looks] == [1, 1]
    looks[1] = looks[1]._replace(seconds=100)
    figures.compare(checkpoint.model, *looks, QUESTION, Sampling(max_new_tokens=2))
    assert [(cost.first, cost.whole) for cost in costs] == [(2, 3), (101, 102)]


def test_an_error_in_the_middle_of_an_answer_ends_its_line(checkpoint, capsys, monkeypatch):
    model, image = checkpoint.model, Image.new("RGB", (112, 84), "red")

    def half(*_):
        yield from model.tokenizer.encode("half").ids
        raise ValueError("not finite")

    monkeypatch.setattr(EPVLM, "tokens", half)
    dense = figures.look(model, "dense", image, None, Options())
    with pytest.raises(ValueError, match="not finite"):
        figures.compare(model, dense, dense, QUESTION, Sampling())
    assert capsys.readouterr().out == "half\n"


def test_progress_is_shown_of_both(files, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(COMPARE) == 0
    assert capsys.readouterr().err.count("layer 3 of 4") == 2


@pytest.mark.parametrize(
    "arguments, words",
    [(COMPARE[:-1], "required: question"), (["compare", "image.png", "none", "?"], "compare needs events"),
     ([*COMPARE, "--window", "5", "6"], "no event from 5 to 6 us"), ([*COMPARE, "--sparsity", "1"], "sparsity 1.0"),
     ([*COMPARE, "--top-p", "0"], "top_p 0.0"), (["compare", "no.png", *COMPARE[2:]], "no.png: "),
     ([*COMPARE[:-1], "broken \udcff"], "UTF-8"), ([], "required")],
)  # fmt: skip
def test_bad_input_is_one_line_before_any_answer(files, capsys, arguments, words):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = lines(capsys)
    assert (status, out, len(err)) == (2, [], 1) and err[0].startswith("figures") and words in err[0]


def test_a_dense_answer_without_room_is_refused_before_the_packed_one(files, capsys):
    config = json.loads(Path("model/config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 250  # about 270 tokens of the image, or half of them
    Path("model/config.json").write_text(json.dumps(config))
    flags = ["--model", "model", "--max-new-tokens", "6", "--min-pixels", "200704"]
    assert epvlm.main(["image.png", "events.npy", QUESTION, *flags]) == 0 and lines(capsys)[0]
    assert main([*COMPARE, "--min-pixels", "200704"]) == 2
    out, (line,) = lines(capsys)
    assert out == [] and line.startswith("figures: error: the dense answer: ") and "max_pixels" in line


def test_an_error_says_which_answer_it_is_of(checkpoint):
    with pytest.raises(ValueError, match=r"^the packed answer: an image of 1 x 500"):
        figures.look(checkpoint.model, "packed", Image.new("RGB", (1, 500)), None, Options())


def test_no_events_but_the_rule_that_covers(files, capsys):
    """The dense answer is then still dense."""
    assert main(["compare", "image.png", "none", *COMPARE[3:], "--rule", "cover"]) == 0
    _, err = capsys.readouterr()
    dense, packed = (f"kept {n} of 48 patches ({n // 4} of 12 tokens), no events" for n in (48, 24))
    assert dense in err and packed in err
