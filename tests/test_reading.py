"""What helps to see what happens: `--picture`, `--compare`, and questions one after another about one image."""

import io
import itertools
import json
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import epvlm
from epvlm import EPVLM, main
from strategies import SPARSITIES
from vit import VisionTransformer

ROOT = Path(epvlm.__file__).parent
QUESTIONS = ["What is moving?", "The red circle moves.", "left of the small square?"]
SETTINGS = ["--model", "model", "--max-new-tokens", "6"]


def lines(capsys) -> tuple[list[str], list[str]]:
    return tuple(text.splitlines() for text in capsys.readouterr())


def asking(monkeypatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(text))))


def first_scores(model: EPVLM, prompt, seen) -> torch.Tensor:
    """Of the first four tokens of an answer."""
    scores = []
    list(model._decode(prompt, 4, lambda logits: scores.append(logits) or int(logits.argmax()), seen))
    return torch.stack(scores)


# Questions one after another


@given(SPARSITIES, st.lists(st.sampled_from(["", "Hi", *QUESTIONS, "x" * 90]), min_size=1, max_size=3))
def test_a_question_after_the_image_was_seen_is_as_good_as_one_with_it(checkpoint, sparsity, questions):
    model, image = checkpoint[2], Image.effect_noise((112, 84), 90)
    E_v = np.random.default_rng(0).integers(0, 3, (84, 112))
    first = model.prompt(image, E_v, "another question", sparsity)
    seen = model.see(first)
    held = seen.held.clone()
    for question in questions:
        prompt, whole = model.with_question(first, question), model.prompt(image, E_v, question, sparsity)
        assert torch.equal(prompt.input_ids, whole.input_ids)
        assert torch.equal(prompt.position_ids, whole.position_ids)
        alone, after = (first_scores(model, prompt, cache) for cache in (None, seen))
        assert (alone - after).abs().max() <= 1e-4 * alone.abs().max()
        assert list(model.tokens(prompt, 4, seen=seen)) == list(model.tokens(whole, 4))
    assert torch.equal(seen.held, held) and seen.filled == first.image_end  # no answer writes to it


def test_the_image_is_seen_once_and_the_text_after_it_alone_is_read(checkpoint):
    model = checkpoint[2]
    prompt = model.prompt(Image.new("RGB", (112, 84), "red"), None, "")
    calls, read = [], []
    hooks = [
        model.vit.register_forward_hook(lambda *_: calls.append(1)),
        model.llm.model["layers"][0].register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1])),
    ]
    seen = model.see(prompt)
    for question in QUESTIONS:
        asked = model.with_question(prompt, question)
        next(model.tokens(asked, 1, seen=seen))
        assert read[-1] == len(asked.input_ids) - prompt.image_end
    for hook in hooks:
        hook.remove()
    assert len(calls) == 1 and read[0] == prompt.image_end and len(read) == 4


def test_lines_of_a_pipe_are_questions(files, capsys, monkeypatch):
    alone = []
    for question in QUESTIONS:
        assert main(["image.png", "events.npy", question, *SETTINGS]) == 0
        alone += lines(capsys)[0]
    asking(monkeypatch, "\n\n  ".join(QUESTIONS).encode())
    assert main(["image.png", "events.npy", *SETTINGS]) == 0
    out, err = lines(capsys)
    assert out == alone and err[2:] == ["stopped after 6 tokens"] * len(alone)
    kept = r"kept 24 of 48 patches \(6 of 12 tokens\), 100 events in 0.1 ms, [\d.]+ of [\d.]+ MFLOPs"
    assert re.fullmatch(kept, err[0]) and re.fullmatch(r"read in \d+\.\d\d s", err[1])


@pytest.mark.parametrize("text, words", [(b"", "no question"), (b"\xff\n", "UTF-8"), (b"x" * 2**19, "exceed")])
def test_what_is_no_question_is_refused(files, capsys, monkeypatch, text, words):
    asking(monkeypatch, text)
    monkeypatch.setattr(EPVLM, "from_pretrained", EPVLM.from_pretrained if text else lambda *_: pytest.fail("fetched"))
    assert main(["image.png", "events.npy", *SETTINGS]) == 2
    out, err = lines(capsys)
    assert out == [] and err[-1].startswith("epvlm: error: ") and any(words in line for line in err)


def test_after_a_question_that_is_none_the_next_one_is_answered(files, capsys, monkeypatch):
    asking(monkeypatch, b"What is moving?\n\xff\nWhat is moving?\n")
    assert main(["image.png", "events.npy", *SETTINGS]) == 2
    out, err = lines(capsys)
    assert len(out) == 2 and out[0] == out[1]
    assert err[3].startswith("epvlm: question 2: question") and "1 of 3 questions" in err[5]


@pytest.mark.parametrize("text", [b"\n", b" \n\n"])
def test_empty_lines_are_no_questions(files, capsys, monkeypatch, text):
    asking(monkeypatch, text)
    assert main(["image.png", "events.npy", *SETTINGS]) == 2
    assert "no question; give one" in lines(capsys)[1][-1]


def test_what_was_seen_of_another_image_is_refused(checkpoint):
    model = checkpoint[2]
    one, other = (model.prompt(Image.new("RGB", size, "red"), None, "") for size in ((112, 84), (112, 112)))
    for prompt, seen in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="another prompt's"):
            model.tokens(prompt, seen=model.see(seen))


def test_seconds_spent_on_the_prompt_count(checkpoint, capsys, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(epvlm.time, "perf_counter", lambda: next(clock))
    prompt = checkpoint[2].prompt(Image.new("RGB", (112, 84), "red"), None, "")
    *_, first, whole = epvlm.say(checkpoint[2], prompt, 100, {"max_new_tokens": 1})
    assert (first, whole) == (101, 102)


def test_progress_is_shown_where_the_image_is_read(files, capsys, monkeypatch):
    asking(monkeypatch, b"What is moving?\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["image.png", "events.npy", *SETTINGS]) == 0
    assert "layer 4 of 4\r\033[K" in capsys.readouterr().err


def test_an_error_in_the_midst_of_an_answer_ends_its_line(checkpoint, capsys):
    model = checkpoint[2]

    def tokens():
        yield from model.tokenizer.encode("half").ids
        raise ValueError("not finite")

    with pytest.raises(ValueError):
        epvlm.show(model, tokens(), 9)
    assert capsys.readouterr().out == "half\n"


def test_a_line_without_end_is_refused(files, capsys, monkeypatch):
    asking(monkeypatch, b"x" * 2**20 + b"What is moving?\nWhat is moving?\n")
    assert main(["image.png", "events.npy", *SETTINGS]) == 2
    out, err = lines(capsys)
    assert out == [] and "a line of over 1 MiB" in err[-1]


def test_the_question_may_follow_options(files, capsys):
    assert main(["--sparsity", "0.3", "image.png", "events.npy", *SETTINGS, "What is moving?"]) == 0
    assert len(lines(capsys)[0]) == 1


def test_standard_input_that_is_closed(files, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["image.png", "events.npy", *SETTINGS]) == 2
    assert "no question" in lines(capsys)[1][0]


def test_a_terminal_is_asked_and_goes_on_after_a_mistake(files):
    """Answers on stdout alone; the end of input (Ctrl-D) ends it with status 0."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "epvlm.py"), "image.png", "events.npy", *SETTINGS]
    os.write(ours, b"What is moving?\n" + b"\xff\n" + b"The red circle moves.\n\x04")
    done = subprocess.run(command, stdin=theirs, capture_output=True, timeout=120)
    os.close(ours), os.close(theirs)
    out, err = done.stdout, done.stderr
    assert done.returncode == 0 and len(out.decode().splitlines()) == 2
    told = err.decode().splitlines()
    assert told[0].startswith("kept 24 of 48 patches") and err.count(b"question: ") == 4
    assert any("UTF-8" in line for line in told) and b"Traceback" not in err


# The dense and the packed answer


def test_both_answers_and_what_they_cost(files, capsys, monkeypatch):
    expected = []
    for events in ("none", "events.npy"):
        assert main(["image.png", events, QUESTIONS[0], *SETTINGS]) == 0
        expected += lines(capsys)[0]
    texts, loaded, passes, see = [], [], [], VisionTransformer.forward
    monkeypatch.setattr(VisionTransformer, "forward", lambda *given: passes.append(given) or see(*given))
    text_ids, load = EPVLM.text_ids, EPVLM.from_pretrained
    monkeypatch.setattr(EPVLM, "text_ids", lambda *given: texts.append(given) or text_ids(*given))
    monkeypatch.setattr(EPVLM, "from_pretrained", lambda *given: loaded.append(given) or load(*given))
    assert main(["image.png", "events.npy", QUESTIONS[0], *SETTINGS, "--compare"]) == 0
    out, err = lines(capsys)
    assert out == expected and len(texts) == len(loaded) == 1
    assert err[0].startswith("kept 48 of 48 patches (12 of 12 tokens), no events")
    assert err[3].startswith("kept 24 of 48 patches (6 of 12 tokens), 100 events")
    names, *rows = (line.split() for line in err[6:])
    assert names[:3] == ["patches", "tokens", "MFLOPs"]
    (dense, *d), (packed, *p), (ratio, *r) = ([name, *map(float, row)] for name, *row in rows)
    assert (dense, packed, ratio) == ("dense", "packed", "ratio")
    assert d[:2] == [48, 12] and p[:2] == [24, 6] and r[:2] == [0.5, 0.5]
    model = load("model")
    flops = model.flops(model.prompt("image.png", "events.npy", QUESTIONS[0]))
    assert len(passes) == 3  # one to have all in memory, then two that count
    assert [p[2], d[2]] == [round(n / 1e6, 2) for n in flops] and r[2] == round(flops[0] / flops[1], 2)
    assert all(first <= whole for _, _, _, first, whole in (d, p))


def test_a_comparison_needs_a_question(files, capsys):
    assert main(["image.png", "events.npy", *SETTINGS, "--compare"]) == 2
    assert "--compare: there is no question" in lines(capsys)[1][0]


def test_events_are_checked_before_the_dense_image_is_answered(files, capsys):
    assert main(["image.png", "events.npy", "?", *SETTINGS, "--compare", "--window", "5", "6"]) == 2
    out, err = lines(capsys)
    assert out == [] and len(err) == 1 and "no event from 5 to 6 us" in err[0]


def test_a_dense_image_without_room_is_told_what_helps(files, capsys, monkeypatch):
    """Which a sparsity does not: the packed prompt has room."""
    config = json.loads(Path("model/config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 250  # about 270 tokens of the image, or half of them
    Path("model/config.json").write_text(json.dumps(config))
    command = ["image.png", "events.npy", "?", *SETTINGS, "--min-pixels", "200704"]
    assert main(command) == 0 and lines(capsys)[0]
    assert main(["image.png", "none", *command[2:]]) == 2 and "--sparsity" in lines(capsys)[1][0]
    assert main([*command, "--compare"]) == 2
    out, err = lines(capsys)
    assert out == [] and len(err) == 1 and err[0].endswith(", or leave --compare out") and "--sparsity" not in err[0]


# The picture


def panels(whole: Image.Image, width: int, height: int) -> list[np.ndarray]:
    """The three of them, apart by 8 pixels or a 32nd of their width."""
    gap = max(8, width // 32)
    lefts = gap, width + 2 * gap, 2 * width + 3 * gap
    return [np.asarray(whole.crop((left, gap, left + width, gap + height))).astype(int) for left in lefts]


@pytest.mark.parametrize("cell", ["group", "patch"])
def test_the_picture_shows_the_image_the_events_and_what_is_kept(checkpoint, cell):
    model, image = checkpoint[2], Image.effect_noise((112, 84), 90).convert("RGB")
    rows = [(5, 5, 0, 1)] * 4 + [(60, 40, 1, 0)] * 4 + [(9, 70, 2, 1), (9, 70, 2, 0)]
    rows = np.array(rows, dtype=[(name, int) for name in "xytp"])
    prompt = model.prompt(image, rows, "", cell=cell)
    left, middle, right = panels(model.picture(prompt, image, epvlm.read_events(rows)), 112, 84)
    assert np.array_equal(left, np.asarray(image))
    grey = np.asarray(image.convert("L").convert("RGB")).astype(int)
    changed = (middle != grey).any(axis=2)
    assert {tuple(place) for place in np.argwhere(changed).tolist()} == {(5, 5), (40, 60), (70, 9)}
    on, off, both = middle[5, 5], middle[40, 60], middle[70, 9]
    assert on.tolist() == [0xFF, 0x20, 0x10] and off.tolist() == [0x10, 0x60, 0xFF]  # red and blue, and between them
    assert min(both[0], both[2]) > both[1] + 20
    kept = np.kron(prompt.keep_patches.numpy(), np.ones((14, 14), dtype=bool))
    assert np.array_equal(right[kept], left[kept])
    assert abs(right[~kept] - (0.25 * left[~kept] + 0.75 * np.array([0x10, 0x30, 0x28]))).max() <= 1


def told_below(monkeypatch) -> list[str]:
    """What is written into pictures from now on."""
    texts, write = [], ImageDraw.ImageDraw.multiline_text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "multiline_text",
        lambda self, xy, text, *rest: texts.append(text) or write(self, xy, text, *rest),
    )
    return texts


def test_the_caption_has_the_counts_and_the_colours(checkpoint, monkeypatch):
    model, image, texts = checkpoint[2], Image.new("RGB", (112, 84), "red"), told_below(monkeypatch)
    for E_v, words in ((np.eye(84, 112), "events, red on, blue off;"), (None, "middle: events; right")):
        prompt = model.prompt(image, E_v, "")
        model.picture(prompt, image, E_v)
        assert str(prompt) in texts[-1] and words in texts[-1]


def test_more_events_are_drawn_stronger_and_small_numbers_as_large_ones(checkpoint):
    model, image = checkpoint[2], Image.new("RGB", (112, 84), "white")
    E_v = np.zeros((84, 112))
    E_v[10, :9], E_v[20, 20], E_v[30, 30] = 8, 1, -2
    drawn = []
    for scale in (1, 1e-6, 1e6):
        prompt = model.prompt(image, scale * E_v, "")
        drawn.append(panels(model.picture(prompt, image, scale * E_v), 112, 84)[1])
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])
    strong, weak, off = drawn[0][10, 5], drawn[0][20, 20], drawn[0][30, 30]
    assert strong[1] < weak[1] < 230 and strong[0] == weak[0] == 255 and off[2] == 255 > off[0]


@given(SPARSITIES, st.integers(0, 2**32 - 1), st.sampled_from([(56, 56), (28, 280), (280, 28), (300, 200)]))
def test_any_map_can_be_drawn(checkpoint, sparsity, seed, size):
    model, image = checkpoint[2], Image.effect_noise(size, 90).convert("RGB")
    E_v = np.random.default_rng(seed).integers(-2, 3, (9, 11)) * (seed % 3)
    with warnings.catch_warnings(action="ignore"):
        prompt = model.prompt(image, E_v, "", sparsity, min_pixels=784)
    whole = model.picture(prompt, image, E_v)
    width, height = (14 * side for side in reversed(prompt.keep_patches.shape))
    seen = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    assert np.array_equal(panels(whole, width, height)[0], seen)


def test_a_picture_of_files_is_that_of_what_they_hold(files):
    model = EPVLM.from_pretrained("model")
    prompt = model.prompt("image.png", "events.npy", "")
    drawn = (model.picture(prompt, *given) for given in (("image.png", "events.npy"),
             (Image.open("image.png"), np.load("events.npy"))))  # fmt: skip
    assert np.array_equal(*map(np.asarray, drawn))


@pytest.mark.parametrize("options", [[], ["--compare"], ["--window", "1000", "1030"], ["--sensor", "168x224"]])
def test_the_picture_that_is_written_is_that_of_the_packed_prompt(files, capsys, options):
    Path("out.png").write_bytes(b"old")
    assert main(["image.png", "events.npy", "?", *SETTINGS, *options, "--picture", "out.png"]) == 0
    model, given = EPVLM.from_pretrained("model"), {}
    given |= (
        {"window": (1000, 1030)} if "--window" in options else {"sensor": (168, 224)} if "--sensor" in options else {}
    )
    prompt = model.prompt("image.png", "events.npy", "?", **given)
    drawn = model.picture(prompt, "image.png", "events.npy", **given)
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(drawn)) and not list(Path().glob(".out*"))


def test_a_dense_image_can_be_drawn(files, capsys):
    assert main(["image.png", "none", "?", *SETTINGS, "--picture", "out.png"]) == 0
    left, middle, right = panels(Image.open("out.png"), 84, 112)
    assert np.array_equal(left, right) and (middle[..., 0] == middle[..., 1]).all()


def test_a_recording_is_not_drawn_over(files, capsys):
    Path("events.npy").rename("e.png")
    before = Path("e.png").read_bytes()
    assert main(["image.png", "e.png", "?", *SETTINGS, "--picture", "e.png"]) == 2
    assert Path("e.png").read_bytes() == before and "one of the inputs" in capsys.readouterr().err


def test_an_error_leaves_the_old_picture(files, capsys, monkeypatch):
    Path("out.png").write_bytes(b"old")

    def half(_, file, kind):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", half)
    assert main(["image.png", "events.npy", "?", *SETTINGS, "--picture", "out.png"]) == 2
    assert Path("out.png").read_bytes() == b"old" and not list(Path().glob(".out*"))


def test_the_readme_s_picture_is_what_its_command_draws(tmp_path, monkeypatch, capsys):
    command = re.search(r"python epvlm\.py (.*) --picture (\S+)\n", (ROOT / "README.md").read_text())
    monkeypatch.chdir(ROOT)
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command[1])]
    assert main([*words, "--picture", str(tmp_path / "drawn.png")]) == 0
    shown, drawn = (Image.open(path) for path in (ROOT / command[2], tmp_path / "drawn.png"))
    for one, other in zip(panels(shown, 224, 224), panels(drawn, 224, 224), strict=True):
        assert np.array_equal(one, other)
    assert shown.size == drawn.size and np.mean(np.asarray(shown) != np.asarray(drawn)) < 0.02  # the letters may differ
    assert f"]({command[2]})" in (ROOT / "README.md").read_text()
