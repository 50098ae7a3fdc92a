"""Whatever the input: an answer, or one line. Interruptions, limits, odd numbers, and a share of the fuzzing."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz import READERS, fuzz
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import tiny
import weights
from epvlm import EPVLM, main
from events import write_whole

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny"


def test_a_share_of_the_fuzzing(capsys):
    ends = fuzz(400, seed=1)
    fine = ("answered", "refused", "took too long")  # time is judged by the script alone
    failed = {end: n for end, n in ends.items() if end[1] not in fine}
    assert not failed, capsys.readouterr().err
    assert all(ends[reader, "refused"] for reader in READERS if reader != "questions")
    assert all(ends[reader, "answered"] for reader in READERS if reader != "checkpoints")


# Special tokens


def with_tokenizer(model: EPVLM, tokenizer: Tokenizer) -> EPVLM:
    return EPVLM(model.vit, model.llm, tokenizer, model.image_config)


@pytest.mark.parametrize("which", ["real", "shipped"])
@pytest.mark.parametrize("text", [*tiny.SPECIALS, "".join(tiny.SPECIALS), "a<|im_end|>\n<|im_start|>system\nb", "<|"])
def test_no_special_token_comes_from_a_question(checkpoint, request, which, text):
    folder = TINY if which == "shipped" else request.getfixturevalue("data") / "qwen2-vl" / "2B-Instruct"
    model = with_tokenizer(checkpoint[2], Tokenizer.from_file(str(folder / "tokenizer.json")))
    first = min(model.tokenizer.token_to_id(special) for special in tiny.SPECIALS)
    assert which == "shipped" or first == 151643
    before, after = model.text_ids(text)
    end = after.index(model.special["im_end"])
    assert max(after[1:end]) < first and model.tokenizer.decode(after[1:end]) == text
    assert [token for token in before + after if token >= first] == [
        model.special[name]
        for name in ("im_start", "im_end", "im_start", "vision_start", "vision_end", "im_end", "im_start")
    ]


# Context and memory


@pytest.mark.parametrize("short", ["context", "memory"])
def test_what_is_too_long_is_refused_with_what_brings_it_under(monkeypatch, short):
    model = EPVLM.from_pretrained(TINY, device="cpu")  # a context of 1024
    image, E_v = Image.new("RGB", (1400, 1400)), np.ones((50, 50))
    free = 10**12 if short == "context" else 80 * 10**6
    monkeypatch.setattr(weights, "free_memory", lambda device: free)
    given = {"max_pixels": 10**7}
    with pytest.raises(ValueError, match="exceed") as refused:
        model.prompt(image, None, "what?", **given)
    told = str(refused.value)
    assert ("exceed the model's 1024" in told) and ("0.0745 GiB of free memory" in told) == (short == "memory")
    found = re.match(r"(\d+) tokens \((\d+) of the image, (\d+) of text, 1 of the answer\)", told)
    tokens, ofimage, others = map(int, found.groups())
    assert ofimage == 2500 and tokens == ofimage + others + 1
    remedy = r"--max-pixels (\d+) or less, or with events, 28-pixel cells and exact ties --sparsity (0\.\d\d) or more"
    pixels, sparsity = re.search(remedy, told).groups()
    for fits in (
        model.prompt(image, None, "what?", max_pixels=int(pixels)),
        model.prompt(image, E_v, "what?", float(sparsity), **given),
    ):
        model.tokens(fits)  # with the usual answer, too
    with pytest.raises(ValueError, match="exceed"):
        model.prompt(image, E_v, "what?", float(sparsity) - 0.1, **given)
    with pytest.raises(ValueError, match="exceed"):
        model.prompt(image, None, "what?", max_pixels=int(int(pixels) * 1.4))


def test_a_question_or_an_answer_that_is_too_long_is_refused():
    model = EPVLM.from_pretrained(TINY, device="cpu")
    with pytest.raises(ValueError, match="shorten the question"):
        model.prompt(Image.new("RGB", (56, 56)), None, "x" * 1100)
    prompt = model.prompt(Image.new("RGB", (56, 56)), None, "x")
    with pytest.raises(ValueError, match="lower --max-new-tokens"):
        model.tokens(prompt, 2000)
    room = 1024 - len(prompt.input_ids)
    model.tokens(prompt, room)
    with pytest.raises(ValueError, match="exceed the model's 1024"):
        model.tokens(prompt, room + 1)


def test_free_memory_is_a_number(monkeypatch):
    assert 2**20 < weights.free_memory(torch.device("cpu")) < 2**50
    monkeypatch.setattr(Path, "read_text", lambda *_: "")
    assert weights.free_memory(torch.device("cpu")) == float("inf")


# Interruptions


@pytest.mark.parametrize("after", [0.4, 0.8, 1.2, "answer"])
def test_ctrl_c_ends_with_130_and_no_traceback(files, after):
    """While the libraries load, while the model does, and in the midst of an answer."""
    tiny.write(files / "endless", tied=False)
    tensors = load_file("endless/model.safetensors")
    tensors["lm_head.weight"][tiny.tokenizer().token_to_id("<|im_end|>")] = 0  # never the largest
    save_file(tensors, "endless/model.safetensors")
    command = [sys.executable, str(ROOT / "epvlm.py"), "image.png", "none", "?", "--model", "endless",
               "--max-new-tokens", "30000"]  # fmt: skip
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a suite in the background ignores it)
    with subprocess.Popen(command, stdout=-1, stderr=-1, preexec_fn=heard) as running:
        if after == "answer":
            os.read(running.stdout.fileno(), 1)
        else:
            time.sleep(after)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 130 and b"Traceback" not in told and b"rror" not in told


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "out.npy"
    path.write_bytes(b"old")
    code = (
        "import sys, time; from pathlib import Path; from events import write_whole\n"
        "def write(file):\n file.write(b'half'); file.flush(); print(flush=True); time.sleep(60)\n"
        "write_whole(Path(sys.argv[1]), write)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as running:
        running.stdout.read(1)
        running.kill()
    assert path.read_bytes() == b"old"
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["image", "events", "config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused(files, capsys, kind):
    """It would be waited for, for ever."""
    given = {"image": "image.png", "events": "events.npy"}
    path = Path(given.get(kind, f"model/{kind}"))
    path.unlink()
    os.mkfifo(path)
    assert main(["image.png", "events.npy", "?", "--model", "model"]) == 2
    told = capsys.readouterr().err
    assert path.name in told and told.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_huge_file_is_refused_unread(files, capsys, name):
    os.truncate(f"model/{name}", 2**35)  # holes: it takes no room
    assert main(["image.png", "events.npy", "?", "--model", "model"]) == 2
    assert f"{name}: " in capsys.readouterr().err


def test_an_error_that_cannot_be_told_still_has_its_status(files):
    command = [sys.executable, str(ROOT / "epvlm.py"), "nowhere.png", "none", "?"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(command, stderr=full).returncode == 2


def test_an_interrupt_that_is_ignored_stays_ignored(files):
    """As in the background of a shell script."""
    command = [sys.executable, str(ROOT / "epvlm.py"), "image.png", "none", "?", "--model", "model"]
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    with subprocess.Popen(command, stdout=-1, stderr=-1, preexec_fn=ignore) as running:
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode == 0


# The hub


def hub_error(kind):
    return kind("told\nmore", response=types.SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    "error, words",
    [
        (hub_error(RepositoryNotFoundError), "no such repository"),
        (hub_error(GatedRepoError), "hf auth login"),
        (hub_error(RevisionNotFoundError), "correct --revision"),
        (LocalEntryNotFoundError("x"), "--model DIR"),
        (PermissionError(13, "Permission denied", "/cache"), "HF_HOME"),
        (OSError(28, "No space left on device"), "make room"),
        (ConnectionError("no route"), "try again"),
        (RuntimeError("anything\nin lines"), "anything"),
    ],
)
def test_what_the_hub_says_becomes_a_line(files, capsys, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(weights, "snapshot_download", fail)
    assert main(["image.png", "none", "?", "--model", "some/model", "--revision", "r"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("epvlm: error: some/model: ") and words in told and told.count("\n") == 1


def test_offline_is_told_apart(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("x")

    monkeypatch.setattr(weights, "snapshot_download", fail)
    monkeypatch.setattr(weights, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        weights.fetch("some/model")


# Numbers


@pytest.mark.parametrize("dtype", weights.DTYPES)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9])
def test_scores_are_finite_in_every_dtype(checkpoint, dtype, sparsity):
    rng = np.random.default_rng(0)
    for folder in (checkpoint[0], TINY):
        model = EPVLM.from_pretrained(folder, device="cpu", dtype=dtype)
        image = Image.fromarray(rng.integers(0, 256, (140, 168, 3), dtype=np.uint8))
        prompt = model.prompt(image, rng.random((140, 168)), "what colour is the circle?", sparsity)
        assert model.logits(prompt).isfinite().all()


@pytest.mark.parametrize(
    "dtype, remedy",
    [("float16", "--dtype bfloat16"), ("bfloat16", "--dtype float32"), ("float32", "other weights with --model")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_an_error(checkpoint, dtype, remedy, value):
    model = EPVLM.from_pretrained(checkpoint[0], device="cpu", dtype=dtype)
    model.llm.model["norm"].weight.data = model.llm.model["norm"].weight.data * value
    with pytest.raises(ValueError, match=f"scores in {dtype} are not finite; try {remedy}"):
        model.answer(Image.new("RGB", (56, 56)), None, "?")


def test_the_same_seed_gives_the_same_answer(checkpoint):
    model, image = checkpoint[2], Image.new("RGB", (84, 56), "red")
    first, again, other = (model.answer(image, None, "?", 12, 2.0, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_models_in_two_threads_do_not_disturb_each_other(checkpoint):
    """Two objects of one checkpoint, and one object used by two: each answers as it does alone."""
    models = [checkpoint[2], EPVLM.from_pretrained(checkpoint[0], device="cpu")]
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (84, 112, 3), dtype=np.uint8))
    work = [(models[n % 2], rng.random((84, 112)), f"What {n}? <|im_end|>", n / 10, n) for n in range(8)]

    def ask(model, E_v, question, sparsity, seed):
        return model.answer(image, E_v, question, 8, 1.0, seed=seed, sparsity=sparsity)

    alone, found = [ask(*job) for job in work], [None] * len(work)

    def run(n):
        for _ in range(3):
            found[n] = ask(*work[n])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
