"""The pipeline as a class and as a command line: what it prints, and how it ends when given something it cannot use."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

import epvlm
from epvlm import EPVLM, main
from llm import sampler
from strategies import XYTP
from vit import smart_resize

PROGRAM = Path(epvlm.__file__)
QUESTION = "What is moving?"
ASK = (QUESTION, "--model", "model", "--max-new-tokens", "1")


def program(*arguments, env=None, **options):
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, **options)


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


# What it prints


def told(line: str) -> str:
    """What stderr says was kept, without the figures of cost, whose form is checked."""
    cost = r"\d+\.\d\d of \d+\.\d\d [MGT]FLOPs\nfirst token after \d+\.\d\d s\n(stopped after \d+ tokens?\n)?"
    match = re.fullmatch(rf"(.*), {cost}", line)
    assert match, line
    return match[1]


def test_the_answer_is_on_stdout_and_the_rest_on_stderr(files):
    done = program("image.png", "events.npy", QUESTION, "--model", "model", "--max-new-tokens", "9", "--device", "cpu")
    model = EPVLM.from_pretrained("model", device="cpu")
    assert done.returncode == 0
    assert done.stdout == model.answer("image.png", "events.npy", QUESTION, max_new_tokens=9) + "\n"
    assert told(done.stderr) == "kept 24 of 48 patches (6 of 12 tokens), 100 events in 0.1 ms"
    packed, dense = model.flops(model.prompt("image.png", "events.npy", QUESTION))
    assert f" {packed / 1e6:.2f} of {dense / 1e6:.2f} MFLOPs\n" in done.stderr and 0 < packed < dense


def test_options_reach_the_model(files, capsys):
    arguments = ["image.png", "events.npy", QUESTION, "--model", "model", "--max-new-tokens", "5", "--sparsity", "0.75"]
    arguments += ["--cell", "patch", "--ties", "exact", "--polarity", "signed", "--window", "1000", "1049"]
    arguments += ["--temperature", "1.5", "--top-p", "0.9", "--seed", "3", "--dtype", "float32"]
    arguments += ["--sensor", "84x112", "--max-pixels", "6272"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    model = EPVLM.from_pretrained("model", dtype="float32")
    options = {"sparsity": 0.75, "cell": "patch", "polarity": "signed", "window": (1000, 1049), "max_pixels": 6272}
    sampling = {"max_new_tokens": 5, "temperature": 1.5, "top_p": 0.9, "seed": 3}
    assert out == model.answer("image.png", "events.npy", QUESTION, **sampling, **options) + "\n"
    prompt = model.prompt("image.png", "events.npy", QUESTION, **options)
    assert told(err) == str(prompt) and ", 50 events in 0.0 ms" in err


def test_none_is_the_dense_image(files, capsys):
    assert main(["image.png", "none", QUESTION, "--model", "model", "--max-new-tokens", "1"]) == 0
    assert told(capsys.readouterr().err) == "kept 48 of 48 patches (12 of 12 tokens), no events"


def test_the_prompt_holds_what_is_promised(files):
    model = EPVLM.from_pretrained("model")
    prompt = model.prompt(Image.open("image.png"), np.load("events.npy"), QUESTION)
    length, kept = len(prompt.input_ids), int(prompt.keep.sum())
    assert prompt.keep.shape == (4, 3) and prompt.keep.dtype == torch.bool and kept == 6
    assert prompt.patches.shape == (4 * kept, 1176) and prompt.patches.dtype == torch.float32
    assert (
        prompt.position_ids.shape == (3, length) and prompt.input_ids.dtype == prompt.position_ids.dtype == torch.int64
    )
    assert prompt.keep[:2].all() and not prompt.keep[2:].any()  # the upper half is where the events are
    assert model.logits(prompt).shape == (length, model.llm.config.vocab_size)
    with pytest.raises(dataclasses.FrozenInstanceError):
        prompt.keep = None


def test_no_events_at_all_warns_and_keeps_evenly_spread_cells(files, capsys):
    np.save("empty.npy", np.load("events.npy")[:0])
    assert main(["image.png", "empty.npy", QUESTION, "--model", "model", "--max-new-tokens", "1"]) == 0
    warning, kept = capsys.readouterr().err.split("\n", 1)
    assert warning.startswith("epvlm: warning: ") and "no events at all" in warning
    assert told(kept) == "kept 24 of 48 patches (6 of 12 tokens), 0 events in 0.0 ms"
    with pytest.warns(UserWarning, match="no events"):
        keep = EPVLM.from_pretrained("model").prompt("image.png", "empty.npy", QUESTION).keep
    assert (keep.sum(1) >= 1).all() and (keep.sum(0) >= 1).all()
    for empty in (np.zeros((0, 4)), np.zeros((9, 9))):
        with pytest.warns(UserWarning, match="no events"):
            assert torch.equal(EPVLM.from_pretrained("model").prompt("image.png", empty, QUESTION).keep, keep)


def test_a_map_needs_no_sensor_and_has_no_times(files):
    model, E_v = EPVLM.from_pretrained("model"), np.zeros((180, 240))
    E_v[100:] = 1
    prompt = model.prompt("image.png", E_v, QUESTION)
    assert not prompt.keep[:2].any() and prompt.keep[2:].all() and "map of 240 x 180" in str(prompt)
    assert torch.equal(model.prompt("image.png", E_v, QUESTION, sensor=[240, 180]).keep, prompt.keep)
    for options in ({"window": (0, 1)}, {"sensor": (180, 240)}):
        with pytest.raises(ValueError, match="leave --window and --sensor out"):
            model.prompt("image.png", E_v, QUESTION, **options)


def test_the_sensor_may_be_of_another_size(files):
    model = EPVLM.from_pretrained("model")
    events = np.load("events.npy")
    events["x"], events["y"] = events["x"] * 4, events["y"] * 4
    prompt = model.prompt("image.png", events, QUESTION, sensor=(336, 448), window=np.array([0, 5000], np.float32))
    assert prompt.keep[:2].all() and not prompt.keep[2:].any()


def test_progress_counts_the_layers_and_clears_its_line(files, capsys):
    model = EPVLM.from_pretrained("model")
    prompt = model.prompt("image.png", "events.npy", QUESTION)
    epvlm.show_progress(model)
    model.logits(prompt)
    shown = "".join(f"\rlayer {n} of 4" for n in (1, 2, 3, 4)) + "\r\033[K"
    assert capsys.readouterr().err == shown
    model.logits(prompt)
    assert capsys.readouterr().err == ""


def test_a_recording_in_the_image_s_first_quarter_asks_whether_the_sensor_is_smaller(files):
    model, events = EPVLM.from_pretrained("model"), np.load("events.npy")
    events["x"], events["y"] = events["x"] // 2, events["y"] // 2
    with pytest.warns(UserWarning, match="--sensor"):
        model.prompt("image.png", events, QUESTION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prompt("image.png", events, QUESTION, sensor=(84, 112))
        model.prompt("image.png", np.load("events.npy"), QUESTION)
    with pytest.raises(ValueError, match="give its real size"):
        model.prompt("image.png", events, QUESTION, sensor=(0, 0))


def test_what_exceeds_the_context_is_refused_before_the_work(files):
    model = EPVLM.from_pretrained("model")
    prompt = model.prompt("image.png", "events.npy", QUESTION)
    fits = model.llm.config.max_position_embeddings - len(prompt.input_ids)
    with pytest.raises(ValueError, match=r"exceed the model's 32768; lower --max-new-tokens"):
        model.tokens(prompt, fits + 1)
    next(model.tokens(prompt, fits))
    with pytest.raises(ValueError, match=r"exceed the model's 32768; give --max-pixels \d+ or less, or with"):
        model.prompt("image.png", None, QUESTION, min_pixels=10**8, max_pixels=10**9)


def test_choosing_patches_runs_no_layer_of_the_model_and_dropping_them_saves_more(files):
    """A selector must not cost what it saves: `prompt` multiplies nothing, `logits` falls faster than the tokens."""
    model = EPVLM.from_pretrained("model")
    image = Image.effect_noise((560, 560), 50)
    events = np.random.default_rng(0).integers(0, 9, (560, 560))
    with FlopCounterMode(display=False) as choosing:
        prompts = [model.prompt(image, events, QUESTION, sparsity=sparsity) for sparsity in (0, 0.5, 0.75)]
    assert choosing.get_total_flops() == 0
    costs = []
    for prompt in prompts:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it sees no fused attention
            model.logits(prompt)
        costs.append(counter.get_total_flops())
    assert costs[1] < costs[0] / 2 and costs[2] < costs[0] / 4


# What reaches what


def test_special_tokens_are_no_part_of_the_answer(checkpoint):
    model = checkpoint[2]
    tokens = [*model.tokenizer.encode("Hi").ids, model.special["im_end"]]
    assert "".join(model.pieces(iter(tokens))) == "Hi"


def test_order_and_time_unit_reach_the_reader(files, capsys):
    bare = np.array([[5, 5, 0.001, 1], [1, 2, 0.002, 1]])[:, [3, 2, 1, 0]]
    np.save("bare.npy", bare)
    prompt = EPVLM.from_pretrained("model").prompt("image.png", bare, "", order="ptyx", time_unit="s", sensor=(84, 112))
    assert prompt.source == "2 events in 1.0 ms"
    assert main(["image.png", "bare.npy", *ASK, "--order", "ptyx", "--time-unit", "s"]) == 0
    assert "2 events in 1.0 ms" in capsys.readouterr().err


def test_each_choice_changes_the_mask(files, capsys):
    flicker = np.zeros(60, dtype=XYTP)  # 40 events that cancel upper left, 20 of one sign lower right
    flicker["t"], flicker["p"] = np.arange(60), np.arange(60) % 2
    flicker["x"][40:], flicker["y"][40:], flicker["p"][40:] = 80, 100, 1
    np.save("flicker.npy", flicker)
    model = EPVLM.from_pretrained("model")
    keep = {rule: model.prompt("image.png", flicker, "", 0.95, polarity=rule).keep for rule in ("count", "signed")}
    assert keep["count"][0, 0] and not keep["signed"][0, 0] and keep["signed"][3, 2]
    assert model.prompt("image.png", flicker, "", 0.5, ties="literal").keep.all()

    def shown(*options):
        assert main(["image.png", "flicker.npy", *ASK, *options]) == 0
        return capsys.readouterr().err

    assert "(12 of 12 tokens)" in shown("--ties", "literal")
    prompts = []
    original = EPVLM.prompt
    EPVLM.prompt = lambda *a, **k: prompts.append(original(*a, **k)) or prompts[-1]
    try:
        shown("--polarity", "signed", "--sparsity", "0.95")
        shown("--sensor", "168x224")
    finally:
        EPVLM.prompt = original
    assert torch.equal(prompts[0].keep, keep["signed"])
    assert torch.equal(prompts[1].keep, model.prompt("image.png", flicker, "", sensor=(168, 224)).keep)
    assert not torch.equal(prompts[1].keep, model.prompt("image.png", flicker, "").keep)


def test_the_class_refuses_what_the_parser_would(checkpoint):
    folder, _, model = checkpoint
    picture = Image.new("RGB", (56, 56))
    for options in ({"cell": "pixel"}, {"ties": "none"}, {"polarity": "both"}):
        with pytest.raises(ValueError, match=r"give .* or "):
            model.prompt(picture, None, "", **options)
    with pytest.raises(ValueError, match="max-new-tokens 0"):
        list(model.tokens(model.prompt(picture, None, ""), 0))
    with pytest.raises(ValueError, match="dtype 'int8'"):
        EPVLM.from_pretrained(folder, dtype="int8")


@pytest.mark.parametrize("option", [("--sparsity", "2"), ("--temperature", "-1")])
def test_small_mistakes_are_told_before_the_model_is_fetched(files, capsys, monkeypatch, option):
    monkeypatch.setattr(EPVLM, "from_pretrained", lambda *_: pytest.fail("fetched"))
    assert main(["image.png", "none", *ASK, *option]) == 2


@pytest.mark.parametrize("option", [("--sensor", "0x5"), ("--spars", "0.5")])
def test_more_words_the_parser_refuses(files, capsys, option):
    with pytest.raises(SystemExit) as stop:
        main(["image.png", "none", *ASK, *option])
    assert stop.value.code == 2


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
def test_how_the_program_ends(monkeypatch, capsys, error, status, line):
    def fail(_):
        raise error

    monkeypatch.setattr(epvlm, "run", fail)
    assert main(["i", "e", "q"]) == status
    assert capsys.readouterr() == ("", line)


def test_the_command_line_passes_its_dtype(files, monkeypatch):
    given = []

    def load(*arguments):
        given.append(arguments)
        raise ValueError("stop")

    monkeypatch.setattr(EPVLM, "from_pretrained", load)
    main(["image.png", "none", *ASK, "--revision", "r", "--device", "cpu", "--dtype", "float16"])
    assert given == [("model", "r", "cpu", "float16")]


def test_pieces_are_flushed_as_they_come(files, monkeypatch):
    flushed = []

    def shown(*_, end="\n", flush=False, **__):
        flushed.extend([flush] if end == "" else [])

    monkeypatch.setattr(epvlm, "print", shown, raising=False)
    main(["image.png", "none", *ASK])
    assert flushed and all(flushed)


def test_top_p_and_seed_reach_the_sampler(checkpoint, monkeypatch):
    model, given = checkpoint[2], []
    monkeypatch.setattr(epvlm, "sampler", lambda *a: given.append(a) or sampler())
    model.answer(Image.new("RGB", (56, 56)), None, "", 1, 0.5, 0.25, 9)
    assert [values[:4] for values in given] == [(0.5, 0.25, 9, 1.0)]


def test_a_closed_pipe_ends_with_status_1(monkeypatch):
    def fail(_):
        raise BrokenPipeError

    monkeypatch.setattr(epvlm, "run", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    assert main(["i", "e", "q"]) == 1


# Streaming and choosing


@given(st.text(max_size=40))
def test_pieces_are_whole_utf8_and_join_to_the_answer(checkpoint, text):
    """Byte-level tokens split characters; a piece never ends inside one."""
    _, _, model = checkpoint
    tokens = model.tokenizer.encode(text, add_special_tokens=False).ids

    pieces = list(model.pieces(iter(tokens)))
    assert "".join(pieces) == model.tokenizer.decode(tokens)
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_an_answer_cut_inside_a_character_still_ends(checkpoint):
    _, _, model = checkpoint
    tokens = model.tokenizer.encode("动", add_special_tokens=False).ids[:-1]

    assert "".join(model.pieces(iter(tokens))) == "\ufffd"


@given(
    st.floats(0.1, 5), st.floats(0.01, 1), st.integers(0, 2**32), st.lists(st.floats(-9, 9), min_size=2, max_size=20)
)
def test_tokens_are_drawn_from_the_smallest_set_that_holds_top_p(temperature, top_p, seed, values):
    logits = torch.tensor(values)
    choose = epvlm.sampler(temperature, top_p, seed)
    drawn = [choose(logits) for _ in range(5)]
    probability = torch.softmax(logits / temperature, -1)
    for token in drawn:  # what is likelier than a drawn token holds less than top_p together
        assert probability[probability > probability[token]].sum() < top_p + 1e-5
    again = epvlm.sampler(temperature, top_p, seed)
    assert [again(logits) for _ in range(5)] == drawn


def test_drawing_follows_the_probabilities():
    logits, choose = torch.tensor([0.0, 1.0, 2.0]), epvlm.sampler(2.0, 1.0, seed=0)
    counts = torch.bincount(torch.tensor([choose(logits) for _ in range(20_000)]), minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.softmax(logits / 2, -1), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "settings", [(-1, 1), (float("nan"), 1), (float("inf"), 1), (1, 0), (1, 1.1), (1, float("nan"))]
)
def test_settings_of_the_drawing_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="temperature"):
        epvlm.sampler(*settings)


@pytest.mark.parametrize("temperature, top_p", [(5e-324, 1), (1e-45, 1), (1, 5e-324), (1e300, 1), (1e-300, 1e-300)])
def test_extreme_settings_still_draw(temperature, top_p):
    token = epvlm.sampler(temperature, top_p)(torch.tensor([1.0, 30.0, 2.0]))
    assert token == 1 or temperature == 1e300


def test_a_tiny_top_p_is_greedy(files):
    model = EPVLM.from_pretrained("model")
    prompt = model.prompt("image.png", "events.npy", QUESTION)
    assert list(model.tokens(prompt, 6, temperature=1.0, top_p=1e-9)) == list(model.tokens(prompt, 6))


# smart_resize


@pytest.mark.parametrize(
    "size, expected",
    [
        ((42, 70), (56, 56)),
        ((14, 300), (28, 280)),
        ((112, 112), (112, 112)),
        ((5, 9), (56, 84)),
        ((28, 5600), (28, 5600)),
    ],
)
def test_sizes_round_half_to_even_within_the_limits(size, expected):
    assert smart_resize(*size, 28, 3136, 12845056) == expected


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_sizes_are_those_of_transformers_and_whole_groups(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="over 200"):
            smart_resize(height, width, 28, 3136, 1003520)
        return
    h, w = smart_resize(height, width, 28, 3136, 1003520)
    assert (h, w) == theirs(height, width, 28, 3136, 1003520)
    assert h % 28 == w % 28 == 0


# Bad input


BAD_INPUT = {  # what the line must hold -> arguments
    ("nowhere.png", "no such file"): ("nowhere.png", "none", *ASK),
    ("text.png", "give an 8-bit PNG"): ("text.png", "none", *ASK),
    ("cut.png", "truncated"): ("cut.png", "none", *ASK),
    ("empty", "not an image"): ("empty", "none", *ASK),
    ("over 200 : 1", "crop"): ("thin.png", "none", *ASK),
    ("nowhere.npy", ".npz of events, or none"): ("image.png", "nowhere.npy", *ASK),
    ("text.npy", "neither .npy nor .npz"): ("image.png", "text.npy", *ASK),
    ("pickled.npy", "never loaded", "allow_pickle=True"): ("image.png", "pickled.npy", *ASK),
    ("wide.npy", "x 700 to 700", "84 x 112", "--sensor WxH"): ("image.png", "wide.npy", *ASK),
    ("1000 to 1099 us", "--window"): ("image.png", "events.npy", *ASK, "--window", "5", "9"),
    ("window 9 5",): ("image.png", "events.npy", *ASK, "--window", "9", "5"),
    ("sparsity 1.0", "[0, 1)"): ("image.png", "events.npy", *ASK, "--sparsity", "1"),
    ("sparsity -0.1",): ("image.png", "events.npy", *ASK, "--sparsity", "-0.1"),
    ("sparsity nan",): ("image.png", "events.npy", *ASK, "--sparsity", "nan"),
    ("--sparsity", "'half'"): ("image.png", "events.npy", *ASK, "--sparsity", "half"),
    ("--cell", "'pixel'", "group"): ("image.png", "events.npy", *ASK, "--cell", "pixel"),
    ("--sensor", "'240'", "240x180"): ("image.png", "events.npy", *ASK, "--sensor", "240"),
    ("--min-pixels 9000", "--max-pixels 8000", "change one"): (
        "image.png",
        "none",
        *ASK,
        "--min-pixels",
        "9000",
        "--max-pixels",
        "8000",
    ),
    ("--max-new-tokens", "'0'"): ("image.png", "none", *ASK, "--max-new-tokens", "0"),
    ("temperature -1.0",): ("image.png", "none", *ASK, "--temperature", "-1"),
    ("empty", "no config.json"): ("image.png", "none", QUESTION, "--model", "./empty"),
    ("./nowhere", "no such folder"): ("image.png", "none", QUESTION, "--model", "./nowhere"),
    ("required: events",): ("image.png",),
    ("--compare", "no events; give both"): ("image.png", "none", *ASK, "--compare"),
    ("p.jpg", "written as .png"): ("image.png", "events.npy", *ASK, "--picture", "p.jpg"),
    ("image.png", "one of the inputs"): ("image.png", "events.npy", *ASK, "--picture", "image.png"),
    ("no/p.png", "a folder that exists"): ("image.png", "events.npy", *ASK, "--picture", "no/p.png"),
    ("question", "UTF-8"): ("image.png", "none", "broken \udcff", "--model", "model"),
    ("device 'meta'", "try cpu"): ("image.png", "none", *ASK, "--device", "meta"),
    ("--sensor", "'00x180'"): ("image.png", "events.npy", *ASK, "--sensor", "00x180"),
    ("exceed the model's 32768",): ("image.png", "none", *ASK, "--max-new-tokens", "900000000"),
    ("--max-new-tokens", "999999999"): ("image.png", "none", *ASK, "--max-new-tokens", "1" + "0" * 30),
    ("~nosuchuser",): ("image.png", "none", QUESTION, "--model", "~nosuchuser/model"),
    ("device 'abacus'", "try cpu"): ("image.png", "none", *ASK, "--device", "abacus"),
}


@pytest.fixture
def bad_files(files):
    """The folder of `files`, with files in it that cannot be used."""
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(Path("image.png").read_bytes()[:5000])
    Path("text.npy").write_text("1 2 3 4")
    Path("empty").mkdir()
    np.save("pickled.npy", {"x": 1})
    np.save("wide.npy", np.array([(9, 700, 3, 1)], dtype=[("t", int), ("x", int), ("y", int), ("p", int)]))
    Image.new("RGB", (1, 500)).save("thin.png")
    events = np.load("events.npy").astype([("t", "f8"), ("x", "u2"), ("y", "u2"), ("p", "?")])
    events["t"] /= 1e6
    np.save("seconds.npy", events)


@pytest.mark.parametrize("words, arguments", BAD_INPUT.items(), ids=[" ".join(words) for words in BAD_INPUT])
def test_every_bad_input_is_one_line_and_status_2(bad_files, capsys, words, arguments):
    line = refused(capsys, *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("option", [("--window", "5", "9"), ("--max-new-tokens", "900000000")])
def test_an_error_stands_alone_without_the_warning_before_it(bad_files, capsys, option):
    refused(capsys, "image.png", "seconds.npy", *ASK, *option)


def test_a_broken_checkpoint_is_one_line_and_status_2(files, capsys):
    Path("model/model.safetensors").write_bytes(b"nothing")
    assert "model.safetensors" in refused(capsys, "image.png", "none", *ASK)


def test_an_error_in_a_process_of_its_own_has_no_traceback(files):
    done = program("nowhere.png", "events.npy", QUESTION)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "epvlm: error: nowhere.png: no such file; give the path of an image\n"


def test_no_network_and_nothing_cached(files):
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(files / "cache"), "HF_HOME": str(files / "home")}
    done = program("image.png", "events.npy", QUESTION, env=env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "Qwen/Qwen2-VL-2B-Instruct: not in the local cache" in done.stderr and "--model DIR" in done.stderr


def test_a_cached_download_loads_through_its_symbolic_links(files):
    """huggingface_hub's cache: snapshots/COMMIT/file is a link to ../../blobs/HASH."""
    repository, commit = files / "cache" / "models--tiny--model", "0" * 40
    for folder in ("blobs", f"snapshots/{commit}", "refs"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(Path("model").iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (repository / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{number}")
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(files / "cache")}
    common = ("image.png", "events.npy", QUESTION, "--max-new-tokens", "5", "--model")
    cached, local = program(*common, "tiny/model", "--revision", "main", env=env), program(*common, "model")
    assert (cached.returncode, cached.stdout, told(cached.stderr)) == (0, local.stdout, told(local.stderr))
    other = program(*common, "tiny/model", "--revision", "other", env=env)
    assert other.returncode == 2 and "not in the local cache" in other.stderr


def test_a_closed_pipe_ends_silently(files):
    command = [
        sys.executable,
        str(PROGRAM),
        "image.png",
        "none",
        QUESTION,
        "--model",
        "model",
        "--max-new-tokens",
        "4000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.read(1)
        running.stdout.close()
        assert told(running.stderr.read()) == "kept 48 of 48 patches (12 of 12 tokens), no events"
        assert running.wait() == 1


def test_the_real_frame_and_window(checkpoint, data, capsys):
    folder = data / "recordings" / "slider_depth"
    status = main([str(folder / "frame_00000002.png"), str(folder / "events_xypt_us.npy"), QUESTION, "--model",
                   str(checkpoint[0]), "--window", "67500", "87500", "--max-new-tokens", "2"])  # fmt: skip
    assert status == 0
    assert told(capsys.readouterr().err) == "kept 108 of 216 patches (27 of 54 tokens), 6957 events in 20.0 ms"
