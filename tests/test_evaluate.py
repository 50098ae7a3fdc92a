"""Any table of images, events and questions: what is read, asked, written, resumed and printed."""

import contextlib
import fcntl
import io
import json
import os
import random
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import common
import evaluate
import scenes
from camera import CameraOptions, camera, saccade, save_events
from common import TINY, accuracy, difference, read_answers
from epvlm import EPVLM, Options, Sampling
from vit import Clip

SCRIPT = Path(evaluate.__file__)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMON = ("--model", str(TINY), "--max-new-tokens", "8", "--device", "cpu")
HEAD = ["sparsity", "rule", "group", "exact % (95 %)", "beside dense", "right of asked", "choice % (95 %)",
        "beside dense", "right of asked", "not asked", "tokens", "MFLOPs", "linear MFLOPs", "first token, s"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    usual = torch.get_num_threads()
    torch.set_num_threads(1)  # the tiny model is slow where threads wait for a busy core
    yield
    torch.set_num_threads(usual)


def call(*arguments, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The command in this process, which is faster than `script`."""
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            status = evaluate.main([*COMMON, *map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def script(*arguments, processes=0, cwd=None, env=None, **kwargs) -> subprocess.CompletedProcess:
    deal = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *deal, str(SCRIPT), *COMMON, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**ALONE, **(env or {})}, **kwargs)


def cells(markdown: str) -> list[list[str]]:
    """The rows of the table, without its head and the seconds, which no two runs share."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")][:-1] for line in lines[2:]]


def lasting(records: list[dict]) -> list[dict]:
    """All but the seconds, in order."""
    kept = [{key: value for key, value in record.items() if key != "seconds"} for record in records]
    return sorted(kept, key=lambda record: (record["row"], record["sparsity"], record["rule"]))


def records(folder: Path, name: str = "answers.jsonl") -> list[dict]:
    return read_answers(folder)[folder / name][1]


def jsonl(path: Path, *made) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in made))
    return path


BAD = {  # lines of `folder`, and why they cannot be asked
    4: "answer [None], choices []: give texts",
    7: "broken.png: cannot be read as an image",
    8: "not a JSON object",
    13: "no.npy: cannot be read as events (no such file)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four scenes with three questions each, groups by whether what is asked about moves; four bad rows, one of which
    can be asked at sparsity 0."""
    folder = tmp_path_factory.mktemp("folder")
    made = []
    for seed in range(4):
        scene = scenes.scene(seed)
        Image.fromarray(scenes.render(scene)).save(folder / f"{seed}.png")
        save_events(scenes.record(scene), folder / f"{seed}.npy")
        for question in random.Random(seed).sample(scenes.questions(scene), 3):
            row = {
                "image": f"{seed}.png",
                "events": f"{seed}.npy",
                "question": question.text,
                "answer": question.answer,
            }
            made.append({**row, "group": question.kind})
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    made.insert(3, {"image": "0.png", "question": "what?", "group": "other"})
    made.insert(6, {**made[0], "image": "broken.png"})
    made.insert(7, "{")
    made.insert(12, {**made[0], "events": "no.npy"})
    jsonl(folder / "questions.jsonl", *made)
    return folder


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """The run of one process, and its folder."""
    output = tmp_path_factory.mktemp("single") / "new" / "run"
    done = call("--data", folder / "questions.jsonl", "--output", output, "--rule", "exact", "cover")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done, output


RULES = ("--rule", "exact", "cover")


def test_every_question_is_asked_as_the_class_answers_it(folder, single):
    model, sampling = EPVLM.from_pretrained(TINY, device="cpu"), Sampling(max_new_tokens=8)
    lines = (folder / "questions.jsonl").read_text().splitlines()
    found = {(r["row"], r["sparsity"], r["rule"]): r for r in records(single[1])}
    settings = [(0.0, "dense"), *((sparsity, rule) for sparsity in (0.5, 0.7) for rule in ("exact", "cover"))]
    assert set(found) == {(row, *setting) for row in range(len(lines)) for setting in settings}
    for (row, sparsity, rule), record in found.items():
        if row + 1 in BAD and (row, sparsity) != (12, 0):
            assert BAD[row + 1] in record["error"]
            continue
        asked = json.loads(lines[row])
        events = None if rule == "dense" else folder / asked["events"]
        options = Options(sparsity, rule="exact" if rule == "dense" else rule)
        view = model.read(model.look(folder / asked["image"], events, options))
        text = "".join(model.stream(view, asked["question"], sampling))
        assert (record["answer"], record["key"], record["exact"]) == (text, [asked["answer"]], text == asked["answer"])
        assert record["tokens"] == view.tokens and record["flops"] == model.flops(view, asked["question"])[0]
        length = len(model.prompt(view, asked["question"])[0])
        linear = model.vit.flops([len(view.patches)], view.tokens)[0] + model.llm.flops(length, length)[0]
        assert record["linear"] == linear and record["group"] == asked["group"] and record["seconds"] > 0


def test_the_table_counts_what_was_asked(folder, single):
    table, made = cells(single[0].stdout), records(single[1])
    groups = sorted({record["group"] for record in made} - {""})
    assert len(groups) > 2 and [row[2] for row in table] == ["all", *groups] * 5
    assert [tuple(row[:2]) for row in table[:: len(groups) + 1]] == [
        ("0", "dense"), ("0.5", "exact"), ("0.5", "cover"), ("0.7", "exact"), ("0.7", "cover")
    ]  # fmt: skip
    assert [row[9] for row in table if row[2] == "all"] == ["3", "4", "4", "4", "4"]
    assert {row[9] for row in table if row[2] == "other"} == {"1"}
    for row in table:
        here = [r for r in made if f"{r['sparsity']:g}" == row[0] and r["rule"] == row[1] and "answer" in r]
        here = [r for r in here if row[2] in ("all", r["group"])]
        assert row[5] == row[8] == f"{sum(r['exact'] for r in here)} of {len(here)}"
        assert row[10] == (f"{np.mean([r['tokens'] for r in here]):.1f}" if here else "–")
    listed = [line for line in single[0].stdout.splitlines() if line.startswith("- ")]
    assert [line.split(": ")[0] for line in listed] == [f"- questions.jsonl:{number}" for number in BAD]
    assert all(reason in line for reason, line in zip(BAD.values(), listed, strict=True))


def record(row: int, sparsity: float, **changed) -> dict:
    plain = {"row": row, "image": row // 2, "group": "", "sparsity": sparsity, "rule": "exact" if sparsity else "dense",
             "answer": "C.", "key": ["C"], "exact": True, "choice": True, "tokens": 10, "linear": 10**12,
             "flops": 2 * 10**12, "seconds": 1.0}  # fmt: skip
    return {**plain, **changed}


def test_the_table_has_every_figure_in_its_place():
    made = [record(row, 0) for row in range(4)] + [record(4, 0, exact=False)]
    made += [record(0, 0.5, exact=False, tokens=20, flops=4 * 10**12, seconds=2.0), record(1, 0.5, exact=False)]
    made += [record(2, 0.5, linear=4 * 10**12, seconds=9.0), record(4, 0.5, choice=False)]
    bad = {key: value for key, value in record(3, 0.5).items() if key in ("row", "image", "group", "sparsity", "rule")}
    head, (dense, half) = evaluate.table_of([*made, bad | {"error": "too long"}])
    assert head == [name.replace("MF", "TF") for name in HEAD]
    whole = accuracy([(2, 2), (2, 2), (0, 1)]), accuracy([(2, 2), (2, 2), (1, 1)])
    assert dense == [
        "0",
        "dense",
        "all",
        whole[0],
        "–",
        "4 of 5",
        whole[1],
        "–",
        "5 of 5",
        0,
        "10.0",
        "2",
        "1",
        "1.000",
    ]
    right = [(0, 2), (1, 1), (1, 1)], [(2, 2), (1, 1), (0, 1)]  # by image: of row 3 nothing, on both sides
    assert half[3:6] == [accuracy(right[0]), difference([(0, 2), (1, 1), (1, 1)], [(2, 2), (1, 1), (0, 1)]), "2 of 4"]
    assert half[6:9] == [accuracy([(2, 2), (1, 1), (0, 1)]), difference([(2, 2), (1, 1), (0, 1)], [(2, 2), (1, 1), (1, 1)]),
                         "3 of 4"]  # fmt: skip
    assert half[9:] == [1, "12.5", "2.5", "1.75", "1.500"]


def test_without_the_dense_run_nothing_stands_beside_it():
    _, (line,) = evaluate.table_of([record(0, 0.5)])
    assert line[4] == line[7] == "–"
    _, (line,) = evaluate.table_of([{**bad_record(), "error": "x"}])
    assert line[3] == "none asked" and line[9] == 1


def bad_record() -> dict:
    return {"row": 0, "image": 0, "group": "", "sparsity": 0.5, "rule": "exact"}
