"""Any table of images, events and questions: what is read, asked, written, resumed and printed."""

import contextlib
import fcntl
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import islice
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
from camera import CameraOptions, camera, saccade
from common import TINY, Answers, accuracy, difference, read_answers, save_events
from epvlm import EPVLM, Options, Sampling
from vit import Clip

SCRIPT = Path(evaluate.__file__)
README = SCRIPT.parent / "README.md"
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMON = ("--model", str(TINY), "--max-new-tokens", "8", "--device", "cpu")
SCORES = ["exact % (95 %)", "beside dense", "right of asked", "choice % (95 %)", "beside dense", "right of asked"]


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
    8: "neither a JSON object nor",
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
    costs = ["not asked", "tokens", "TFLOPs", "linear TFLOPs", "first token, s"]
    assert head == ["sparsity", "rule", "group", *SCORES, *costs]
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
    ours, theirs = [(0, 2), (1, 1), (1, 1)], [(2, 2), (1, 1), (0, 1)]  # by image; row 3 counts on neither side
    assert half[3:6] == [accuracy(ours), difference(ours, theirs), "2 of 4"]
    ours, theirs = [(2, 2), (1, 1), (0, 1)], [(2, 2), (1, 1), (1, 1)]
    assert half[6:9] == [accuracy(ours), difference(ours, theirs), "3 of 4"]
    assert half[9:] == [1, "12.5", "2.5", "1.75", "1.500"]


def test_without_the_dense_run_nothing_stands_beside_it():
    _, (line,) = evaluate.table_of([record(0, 0.5)])
    assert line[4] == line[7] == "–"
    _, (line,) = evaluate.table_of([{**bad_record(), "error": "x"}])
    assert line[3] == "none asked" and line[9] == 1


def test_any_word_may_name_a_group():
    made = [record(0, 0.5, group="all"), record(2, 0.5, group="|"), record(4, 0.5)]
    assert [(line[2], line[5]) for line in evaluate.table_of(made)[1]] == [
        ("all", "3 of 3"), ("all", "1 of 1"), ("|", "1 of 1")
    ]  # fmt: skip
    assert evaluate.checked({"group": " at \n night "})["group"] == "at night" and evaluate.checked({})["group"] == ""


def bad_record() -> dict:
    return {"row": 0, "image": 0, "group": "", "sparsity": 0.5, "rule": "exact"}


# Going on, and several processes


def test_it_goes_on_after_a_kill_at_any_moment(folder, single, tmp_path):
    """Killed after some answers, or some time: whatever was answered stays as it was, and nothing is asked twice."""
    arguments = ("--data", folder / "questions.jsonl", "--output", tmp_path / "run", *RULES, "--resume")
    command, path, seen = [sys.executable, SCRIPT, *COMMON, *arguments], tmp_path / "run" / "answers.jsonl", []
    chance = random.Random(0)
    for _ in range(20):
        with subprocess.Popen(command, env=ALONE, stdout=-1, stderr=-1) as running:
            wanted, end = len(seen) + chance.randrange(1, 40), time.monotonic() + chance.choice([1000, 1, 2])
            while running.poll() is None:
                whole = path.read_bytes().count(b"\n") - 1 if path.exists() else -1
                if whole >= wanted or time.monotonic() > end:
                    running.kill()
                    break
                time.sleep(0.002)
        now = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        assert now[: len(seen)] == seen
        seen = now
        if len(seen) > 60:
            break
        if seen:
            with path.open("ab") as file:  # as if it had been killed in the midst of a line
                file.write(b'{"row": 11, "sparsity": 0.')
    done = call(*arguments)
    assert done.returncode == 0 and path.read_bytes().split(b"\n")[: len(seen)] == seen
    made = records(tmp_path / "run")
    assert lasting(made) == lasting(records(single[1])) and len(made) == len({str(r) for r in made}) == 80
    assert cells(done.stdout) == cells(single[0].stdout)


def test_two_processes_give_the_same_table(folder, single, tmp_path):
    locale = {"PYTHONIOENCODING": "ascii"}  # which has no dash
    done = script("--data", folder / "questions.jsonl", "--output", tmp_path, *RULES, processes=2, env=locale)
    assert done.returncode == 0 and cells(done.stdout) == cells(single[0].stdout), done.stderr
    assert done.stdout.partition("\n\n")[2] == single[0].stdout.partition("\n\n")[2]
    assert 20 < len(records(tmp_path, "answers.1.jsonl")) < 60
    assert lasting(records(tmp_path)) == lasting(records(single[1]))


@pytest.mark.parametrize("processes", [0, 2])
def test_any_number_of_processes_goes_on_where_others_stopped(folder, single, tmp_path, processes):
    """Each machine may have its own folder: what stands in any of the files is not asked again."""
    settings, *lines = (single[1] / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_bytes(settings + b"".join(lines[:20]))
    (tmp_path / "answers.1.jsonl").write_bytes(settings + b"".join(lines[30:40]))
    (tmp_path / "answers.7.jsonl").write_bytes(settings + b"".join(lines[38:50]) + b'{"row"')
    start = script if processes else call
    more = {"processes": processes} if processes else {}
    done = start("--data", folder / "questions.jsonl", "--output", tmp_path, *RULES, "--resume", **more)
    assert done.returncode == 0 and cells(done.stdout) == cells(single[0].stdout), done.stderr
    made = records(tmp_path)
    assert lasting(made) == lasting(records(single[1]))
    assert all(json.loads(line) in made for line in lines[:20] + lines[30:50])  # with their seconds: not asked again


def test_a_longer_run_takes_over_a_shorter_one(folder, single, tmp_path):
    arguments = ("--data", folder / "questions.jsonl", "--output", tmp_path)
    short = call(*arguments, "--limit", 3, "--sparsity", 0.5, 0.5)
    first = records(tmp_path)
    assert cells(short.stdout)[0][5] == f"{sum(r['exact'] for r in first)} of 3" and len(first) == 3
    again = call(*arguments, *RULES, "--resume")
    assert cells(again.stdout) == cells(single[0].stdout) and all(record in records(tmp_path) for record in first)
    short = ("--limit", 3, "--sparsity", 0.5, "--resume", "--device", "none")  # all answered: there needs no model
    assert call(*arguments, *short).stdout.count("\n") == 5


def test_what_was_an_error_is_tried_again(folder, tmp_path):
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    jsonl(tmp_path / "a.jsonl", {"image": "0.png", "events": "0.npy", "question": "what?", "answer": "x"})
    arguments = ("--data", tmp_path / "a.jsonl", "--output", tmp_path, "--sparsity", 0.5, "--resume")
    for _ in range(2):
        done = call(*arguments)
        assert done.returncode == 0 and "0.npy: cannot be read as events" in done.stdout
        assert ["error" in record for record in records(tmp_path)] == [True]
    (tmp_path / "0.npy").write_bytes((folder / "0.npy").read_bytes())
    done = call(*arguments)
    assert "Not asked" not in done.stdout and ["error" in record for record in records(tmp_path)] == [True, False]
    assert cells(done.stdout)[0][9] == "0"


def test_two_runs_do_not_share_a_folder(folder, single, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes((single[1] / "answers.jsonl").read_bytes()[:3000])
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = call("--data", folder / "questions.jsonl", "--output", tmp_path, *RULES, "--resume")
    assert done.returncode == 2 and "another run is writing it" in done.stderr and done.stderr.count("\n") == 1
    assert path.stat().st_size == 3000


def test_every_setting_must_be_the_same_to_go_on(folder, single, tmp_path):
    first, rest = (single[1] / "answers.jsonl").read_bytes().split(b"\n", 1)
    kept = json.loads(first)["settings"]
    names = {each.name for kind in (Options, Sampling) for each in fields(kind)} - {"sparsity", "rule"}
    assert set(kept) >= {"model", "revision", "data", "camera", "radius", "threshold", "dtype", *names}
    for key in kept:
        other = json.dumps({"settings": {**kept, key: "other"}}).encode()
        (tmp_path / "answers.3.jsonl").write_bytes(other + b"\n" + rest)
        with pytest.raises(ValueError, match=f"made with {key} 'other', not "):
            Answers(tmp_path, 0, kept)
    arguments = ("--data", folder / "questions.jsonl", "--output", single[1], *RULES)
    for changed, words in (
        (("--max-new-tokens", 9), "made with max_new_tokens 8, not 9"),
        (("--data", jsonl(tmp_path / "a.jsonl", {"image": "x", "question": "what?", "answer": "a"})), "made with data"),
        (("--camera",), "made with camera False, not True"),
    ):
        done = call(*arguments, "--resume", *changed)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert "has answers already; add --resume" in call(*arguments).stderr


GOOD = json.dumps(record(0, 0.5)).encode()


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b"{}\n", b'{"settings": 1}\n', b"[]\n", b"\n", b"\xff\n"]
    + [b'{"settings": {"rows": 1}}\n' + line + b"\n" for line in (
        b"", b"{}", b"1", b"[]", b'{"row": 0}', GOOD[:-1])],
)  # fmt: skip
def test_a_file_of_something_else_is_left_alone(folder, tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    done = call("--data", folder / "questions.jsonl", "--output", tmp_path, "--resume")
    assert done.returncode == 2 and "holds other things than answers" in done.stderr and done.stderr.count("\n") == 1
    assert path.read_bytes() == content


TORN = [b"", b'{"set', b'{"settings": {"ro', b'{"settings": {"rows": 2}}', b'{"settings": {}}\n{']


@pytest.mark.parametrize("torn", TORN)
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_an_empty_folder_or_a_first_line_cut_off_starts_afresh(folder, tmp_path, torn, resume):
    (tmp_path / "answers.jsonl").write_bytes(torn)
    arguments = ("--limit", 1, "--sparsity", 0, *resume)
    assert call("--data", folder / "questions.jsonl", "--output", tmp_path, *arguments).returncode == 0
    assert len(records(tmp_path)) == 1


# What a row may hold


def views(monkeypatch) -> list:
    """What `look` is given from here on, and the settings."""
    given, look = [], EPVLM.look
    monkeypatch.setattr(EPVLM, "look", lambda *args: given.append(args[1:]) or look(*args))
    return given


def ask(tmp_path: Path, *rows, options=(), data="a.jsonl") -> list[dict]:
    """The records of rows at sparsity 0.5, unless `options` say otherwise."""
    output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    data = jsonl(tmp_path / data, *rows) if rows else tmp_path / data
    done = call("--data", data, "--output", output, "--sparsity", 0.5, *options)
    assert done.returncode == 0, done.stderr
    return records(output)


def test_an_image_is_looked_at_once_for_all_its_questions(folder, monkeypatch, tmp_path):
    given, read = views(monkeypatch), []
    whole = evaluate.read_image
    monkeypatch.setattr(evaluate, "read_image", lambda path: read.append(path) or whole(path))
    plain = [{"image": str(folder / f"{n % 2}.png"), "question": f"what is {n}?", "answer": "x"} for n in range(6)]
    events = [{**row, "events": str(folder / row["image"].replace("png", "npy"))} for row in plain]
    made = ask(tmp_path, *events, *plain, {**events[0], "window": [0, 9000]}, options=("--sparsity", 0, 0.5, *RULES))
    assert len(made) == 3 * 13 and len(given) == 3 * 5  # two images with events, two without, and one with a window
    assert len(read) == 5 and [row["image"] for row in made if row["rule"] == "dense"].count(0) == 7


def test_parquet_gives_what_json_gives(folder, single, tmp_path):
    made = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines() if line != "{"]
    for row in made:
        content = (folder / row["image"]).read_bytes()
        row |= {"image": {"bytes": content, "path": row["image"]}, "events": str(folder / row.get("events", "0.npy"))}
        row |= {"answer": row.get("answer"), "window": None}
    (tmp_path / "data" / "deep").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(made[:5]), tmp_path / "data" / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(made[5:]), tmp_path / "data" / "deep" / "b.parquet", row_group_size=3)
    done = call("--data", tmp_path / "data", "--output", tmp_path / "out", *RULES)
    assert done.returncode == 0 and [row[3:] for row in cells(done.stdout) if row[2] == "all"][1:] == [
        [*row[3:9], "3", *row[10:]] for row in cells(single[0].stdout) if row[2] == "all"
    ][1:]  # fmt: skip
    assert "- a.parquet:4: answer [None]" in done.stdout and "- b.parquet:2: the image: cannot be read" in done.stdout
    bare = [{**row, "image": row["image"]["bytes"]} for row in made]
    parquet.write_table(pyarrow.Table.from_pylist(bare), tmp_path / "bare.parquet")
    assert cells(call("--data", tmp_path / "bare.parquet", "--output", tmp_path / "bare", *RULES).stdout) == cells(
        done.stdout
    )


def test_text_that_is_no_utf8_is_a_bad_row(tmp_path, folder):
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    good = pyarrow.table([pyarrow.array(["0.png"]), pyarrow.array(["q?"]), pyarrow.array(["a"])], COLUMNS)
    table = pyarrow.concat_tables([pyarrow.table([pyarrow.array(["0.png"]), bad, pyarrow.array(["a"])], COLUMNS), good])
    parquet.write_table(table, tmp_path / "bad.parquet")
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    assert [record.get("error") for record in ask(tmp_path, data="bad.parquet")] == [None, evaluate.NO_ROW]


COLUMNS = ["image", "question", "answer"]


@pytest.mark.parametrize(
    "fields, options",
    [
        ({"window": [1000, 9000]}, {"window": (1000, 9000)}),
        ({"window": ["1ms", "0.009s"]}, {"window": (1000, 9000)}),
        ({"homography": [[1, 0, 3], [0, 1, 5]]}, {"homography": [[1, 0, 3], [0, 1, 5], [0, 0, 1]]}),
        ({"homography": "h.txt"}, {"homography": [[1, 0, 3], [0, 1, 5], [0, 0, 1]]}),
        ({"homography": "h.npy"}, {"homography": [[1, 0, 3], [0, 1, 5], [0, 0, 1]]}),
    ],
)
def test_a_window_and_a_homography_of_its_own(folder, tmp_path, monkeypatch, fields, options):
    (tmp_path / "h.txt").write_text("1 0 3\n0 1 5\n")
    np.save(tmp_path / "h.npy", np.array([[1, 0, 3], [0, 1, 5], [0, 0, 1.0]]))
    given, files = views(monkeypatch), {"image": str(folder / "0.png"), "events": str(folder / "0.npy")}
    row = {**files, "question": "what?", "answer": "x"}
    flags = ("--window", "1000", "2000", "--cell", "patch")
    ask(tmp_path, {**row, **fields}, options=flags)
    usual = {"window": [1000, 2000], "cell": "patch"}
    assert given[0][2] == Options(0.5, **{**usual, **options})


def test_clips_are_seen_as_the_command_line_sees_them(folder, tmp_path, monkeypatch):
    given = views(monkeypatch)
    (tmp_path / "frames").mkdir()
    names = [f"frames/{n}.png" for n in range(6)]
    for name in names:
        (tmp_path / name).write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "list.txt").write_text("".join(f"{n * 10000} {name}\n" for n, name in enumerate(names)))
    (tmp_path / "times.txt").write_text("".join(f"{n * 10000}\n" for n in range(6)))
    times = [n * 10000 for n in range(6)]
    row = {"events": str(folder / "0.npy"), "question": "what?", "answer": "x"}
    each = [{"frames": names, "times": times}, {"frames": names, "fps": 100}, {"frames": "frames", "fps": 100},
            {"frames": "frames", "times": "times.txt"}, {"frames": "list.txt"}]  # fmt: skip
    made = ask(tmp_path, *({**row, **fields} for fields in each), options=("--min-pixels", 784))
    assert not any("error" in record for record in made), made
    for n, (clip, events, _) in enumerate(given):
        chosen = [0, 1, 2, 3, 4, 5] if n < 2 else [0, 2, 3, 5]  # two a second, at least 4
        assert isinstance(clip, Clip) and clip.times.tolist() == [times[n] for n in chosen] and len(events) > 0
        assert [Path(frame).name for frame in clip.frames] == [f"{n}.png" for n in chosen]
    assert [record["tokens"] for record in made[:2]] == [made[0]["tokens"]] * 2 and len({r["image"] for r in made}) == 3


@pytest.mark.parametrize("changed", [{}, {"radius": 0.5}, {"threshold": 0.7}])
def test_the_camera_makes_events_of_a_still(folder, tmp_path, monkeypatch, changed):
    given, row = views(monkeypatch), {"image": str(folder / "0.png"), "question": "what?", "answer": "x"}
    flags = [word for name, value in changed.items() for word in (f"--{name}", value)]
    own = {**row, "events": str(folder / "0.npy"), "window": [0, 9000]}
    ask(tmp_path, row, own, options=("--camera", "--sensor", "500x500", *flags, "--sparsity", 0, 0.5))
    frames = saccade(np.asarray(Image.open(folder / "0.png")), changed.get("radius", 2))
    expected = camera(frames, CameraOptions(changed.get("threshold", 0.2)))
    (_, none, _), (_, made, how), (_, _, dense), (_, recorded, there) = given
    assert none is None and np.array_equal(made.t, expected.t) and len(made) == len(expected)
    assert how == Options(0.5) and there == replace(dense, sparsity=0.5) == Options(
        0.5, sensor=(500, 500), window=(0, 9000)
    )
    assert recorded.name.endswith("0.npy")


def test_the_camera_sees_all_frames_of_a_clip(folder, tmp_path, monkeypatch):
    given, clip = views(monkeypatch), tmp_path / "clip"
    clip.mkdir()
    for n, (_, luma) in enumerate(islice(saccade(np.asarray(Image.open(folder / "0.png"))), 6)):
        Image.fromarray(luma.round().astype(np.uint8)).save(clip / f"{n}.png")
    row = {"frames": "clip", "fps": 100, "question": "what?", "answer": "x"}
    ask(
        tmp_path, row, {**row, "frames": [f"clip/{n}.png" for n in range(6)]}, options=("--camera", "--min-pixels", 784)
    )
    (some, events, _), (every, same, _) = given
    assert (len(some.frames), len(every.frames)) == (4, 6) and np.array_equal(events.t, same.t) and len(events) > 0


def test_choices_become_a_part_of_the_question(folder, tmp_path, monkeypatch):
    asked, row = [], {"image": str(folder / "0.png"), "question": "what?"}
    monkeypatch.setattr(EPVLM, "tokens", lambda self, view, question, sampling: asked.append(question) or iter([0]))
    monkeypatch.setattr(EPVLM, "pieces", lambda self, tokens: ["I think B"])
    lettered = "which?\n(A) left\n(B) right"
    made = ask(tmp_path, {**row, "choices": ["red", "light \n blue"], "answer": "light blue"},
               {**row, "choices": [1, 2, 3], "answer": [2, "C"]}, {**row, "choices": ["x", "y"], "answer": "A"},
               {**row, "question": lettered, "choices": ["left", "right"], "answer": "right"},
               {**row, "answer": ["no", "I think  b."]}, {**row, "answer": 5})  # fmt: skip
    end = "Answer with the letter of the correct option."
    assert asked == [f"what?\nA. red\nB. light blue\n{end}", f"what?\nA. 1\nB. 2\nC. 3\n{end}",
                     f"what?\nA. x\nB. y\n{end}", lettered, "what?", "what?"]  # fmt: skip
    assert [(record["exact"], record["choice"]) for record in made] == [
        (False, True), (False, True), (False, False), (False, True), (True, True), (False, False)
    ]  # fmt: skip


FINE = {"image": "0.png", "events": "0.npy", "question": "what?", "answer": "x"}
FAULTS = [
    ([1], "neither a JSON object nor"),
    ('{"image": "0.png", "question"', "neither a JSON object nor"),
    ({**FINE, "image": None}, "give image or frames, one of them"),
    ({**FINE, "frames": ["0.png"], "fps": 1}, "give image or frames, one of them"),
    ({**FINE, "image": 5}, "image 5: give str or bytes"),
    ({**FINE, "image": "no.png"}, "no.png: cannot be read as an image"),
    ({**FINE, "image": "\0"}, "cannot be read as an image"),
    ({**FINE, "image": "0.npy"}, "0.npy: cannot be read as an image"),
    ({**FINE, "question": " "}, "no question"),
    ({**FINE, "question": ["what?"]}, "question ['what?']: give str"),
    ({**FINE, "answer": None}, "answer [None], choices []: give texts"),
    ({**FINE, "answer": [True]}, "answer [True], choices []: give texts"),
    ({**FINE, "answer": ["x", " "]}, "answer ['x', ' '], choices []: give texts"),
    ({**FINE, "answer": 1.5}, "answer 1.5: give str or int or list"),
    ({**FINE, "choices": ["x"]}, "1 choices: give 2 to 26"),
    ({**FINE, "choices": ["a", "b"]}, "answer x: give one of the choices, or its letter"),
    ({**FINE, "choices": ["x", "x"]}, "answer x: give one of the choices, or its letter"),
    ({**FINE, "choices": ["B", "A"], "answer": "A"}, "answer A: give one of the choices, or its letter"),
    ({**FINE, "choices": "xy"}, "choices 'xy': give list"),
    ({**FINE, "events": "no.npy"}, "no.npy: cannot be read as events (no such file)"),
    ({**FINE, "events": True}, "events True: give str"),
    ({**FINE, "window": [0]}, "not enough values"),
    ({**FINE, "window": [5, 1]}, "window 5 1: give a start and a later end"),
    ({**FINE, "window": ["5 s", "x"]}, "'x' is not a time"),
    ({**FINE, "homography": [[1, 2]]}, "homography"),
    ({**FINE, "homography": "no.txt"}, "no.txt"),
    ({**FINE, "homography": [[10**400, 0, 0], [0, 1, 0]]}, "too large"),
    ({**FINE, "group": ["a"]}, "group ['a']: give str or int"),
    ({**FINE, "question": "what? " * 5000}, "exceed the model's"),
    *(({**FINE, "image": None, **fields}, reason) for fields, reason in (
        ({"frames": ["0.png", "0.png"]}, "frames: give times or fps, one of them"),
        ({"frames": ["0.png", "0.png"], "times": [0, 1], "fps": 2}, "frames: give times or fps, one of them"),
        ({"frames": ["0.png", "0.png"], "times": [1, 1]}, "2 frames, 2 times; give as many, and rising times"),
        ({"frames": ["0.png", "0.png"], "times": [1, "x"]}, "could not convert"),
        ({"frames": ["0.png", "0.png"], "fps": 0}, "fps 0: give 0.001"),
        ({"frames": ["0.png", "0.png"], "fps": 10**400}, "too large"),
        ({"frames": [1, 2], "fps": 1}, "unsupported operand"),
        ({"frames": "0.png", "fps": 1}, "0.png: a still image"),
        ({"frames": "no"}, "no: cannot be read"),
    )),
]  # fmt: skip


def test_a_row_that_cannot_be_asked_is_listed_and_not_counted(folder, tmp_path):
    for name in ("0.png", "0.npy"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    jsonl(tmp_path / "a.jsonl", FINE, "", *(row for row, _ in FAULTS))
    done = call("--data", tmp_path / "a.jsonl", "--output", tmp_path, "--sparsity", 0.5)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = cells(done.stdout)
    assert line[5] == "0 of 1" and line[9] == str(len(FAULTS))
    listed = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    for number, ((row, reason), line) in enumerate(zip(FAULTS, listed, strict=True), 3):
        assert line.startswith(f"- a.jsonl:{number}: ") and reason in line, (row, line)
    assert len(records(tmp_path)) == len(FAULTS) + 1  # each with its reason


def test_what_is_likely_a_mistake_is_warned_of(folder, tmp_path):
    plain = {"image": str(folder / "0.png"), "question": "what?", "answer": "x"}
    data = jsonl(tmp_path / "a.jsonl", plain, {**plain, "evnts": "0.npy", "id": 5})
    done = call("--data", data, "--output", tmp_path / "a", "--sparsity", 0, 0.5)
    dark = "rows without events: 2; only the rule cover drops any of their patches; --camera makes events"
    unknown = "the data have fields that are not used: evnts, id"
    assert done.returncode == 0
    assert sorted(done.stderr.splitlines()) == [f"evaluate: warning: {text}" for text in sorted((dark, unknown))]
    assert call("--data", data, "--output", tmp_path / "b", "--sparsity", 0).stderr.count("\n") == 1
    assert call("--data", data, "--output", tmp_path / "c", "--camera").stderr.count("\n") == 1
    assert call("--data", data, "--output", tmp_path / "e", "--rule", "cover").stderr.count("\n") == 1
    Image.fromarray(np.full((56, 56), 40000, np.uint16)).save(tmp_path / "16.png")
    made = call("--data", jsonl(tmp_path / "b.jsonl", {**plain, "image": "16.png"}), "--output", tmp_path / "d").stdout
    assert "Asked with a warning:\n\n- b.jsonl:1: " in made and "16.png" in made


def test_bad_input_is_one_line_before_the_model_is_loaded(folder, single, tmp_path):
    good = parquet.write_table(pyarrow.table([[b""], ["q"], ["a"]], COLUMNS), tmp_path / "good.parquet")
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-100])
    parquet.write_table(pyarrow.table([pyarrow.array([], "str")] * 3, COLUMNS), tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("hello\n")
    (tmp_path / "nothing.jsonl").write_text("\n")
    (tmp_path / "array.json").write_text(json.dumps([FINE], indent=2))
    data, output = folder / "questions.jsonl", tmp_path / "out"
    for arguments, words in (
        (("--data", tmp_path / "broken.parquet"), "broken.parquet: cannot be read"),
        (("--data", tmp_path / "none.parquet"), "no rows in it"),
        (("--data", tmp_path / "empty"), "no .parquet file"),
        (("--data", tmp_path / "text.txt"), "no rows in it; give JSON Lines"),
        (("--data", tmp_path / "array.json"), "no rows in it; give JSON Lines"),
        (("--data", tmp_path / "nothing.jsonl"), "no rows in it"),
        (("--data", folder / "0.png"), "no rows in it"),
        (("--data", "no such/data/set"), "no such/data/set: neither here nor a dataset"),
        (("--output", tmp_path / "text.txt"), "text.txt"),
        (("--output", single[1]), "made with model"),
        (("--sparsity", 0, 1), "must be in [0, 1)"),
        (("--threshold", 0), "threshold 0"),
        (("--radius", 99), "radius 99"),
        (("--rule", "exact", "other"), "invalid choice"),
        (("--temperature", -1), "temperature -1"),
        (("--limit", 0), "limit 0"),
    ):
        done = call("--data", data, "--output", output, "--model", "none", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert words in done.stderr and done.stderr.startswith("evaluate: error: ") and done.stderr.count("\n") == 1
    assert good is None and not output.exists()


def test_other_columns_of_parquet_may_hold_what_python_lacks(folder, tmp_path):
    table = pyarrow.table([[(folder / "0.png").read_bytes()], ["q?"], ["a"]], COLUMNS)
    table = table.append_column("stamp", pyarrow.array([1], pyarrow.timestamp("ns")))
    parquet.write_table(table, tmp_path / "a.parquet")
    assert ["answer" in record for record in ask(tmp_path, data="a.parquet")] == [True]


def test_machines_with_other_rows_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "gathered", lambda records, world: [*records, {**records[0], "data": "other"}])
    done = call("--data", folder / "questions.jsonl", "--output", tmp_path / "out")
    assert done.returncode == 2 and "questions.jsonl: machines have other rows or settings" in done.stderr
    assert not (tmp_path / "out").exists()


def test_only_parquet_needs_pyarrow(folder, tmp_path, monkeypatch):
    parquet.write_table(pyarrow.table([[b""], ["q"], ["a"]], COLUMNS), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = call("--data", tmp_path / "a.parquet", "--output", tmp_path / "a")
    assert done.returncode == 2 and "pip install -r examples/requirements.txt" in done.stderr
    limit = ("--limit", 1, "--sparsity", 0)
    assert call("--data", folder / "questions.jsonl", "--output", tmp_path / "b", *limit).returncode == 0


def test_a_dataset_in_the_hubs_cache_is_found(folder, tmp_path):
    """RealWorldQA as the hub has it: two files, a column that is not used, questions with lettered options."""
    cache = tmp_path / "hub" / "datasets--xai-org--RealworldQA"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    data = cache / "snapshots" / ("0" * 40) / "data"
    data.mkdir(parents=True)
    for part in (1, 0):
        image = {"bytes": (folder / f"{part}.png").read_bytes(), "path": f"{part}.webp"}
        row = {
            "image": image,
            "question": "Which?\n\nA. Left\nB. Right\nPlease answer.",
            "answer": "B",
            "image_path": "x",
        }
        parquet.write_table(pyarrow.Table.from_pylist([row] * 2), data / f"test-0000{part}-of-00002.parquet")
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = script("--data", "xai-org/RealworldQA", "--output", tmp_path / "out", "--camera", "--sparsity", 0.5, env=env)
    assert (
        done.returncode == 0
        and done.stderr == "evaluate: warning: the data have fields that are not used: image_path\n"
    )
    assert [record["image"] for record in records(tmp_path / "out")] == [0, 0, 2, 2] and "Not asked" not in done.stdout


def test_processes_take_a_gpu_each(monkeypatch):
    started = []
    monkeypatch.setattr(common.distributed, "init_process_group", lambda backend, timeout: started.append(backend))
    monkeypatch.setattr(common.distributed, "destroy_process_group", lambda: started.append("end"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    monkeypatch.setattr(common.atexit, "register", lambda end: end())
    for device, own in ((None, [1]), ("cuda", [1]), ("cpu", []), ("cuda:0", [])):
        assert common.process(device) == (5, 8) and started == [*own, "gloo", "end"]
        started.clear()


def test_progress_is_shown_on_a_terminal(folder, tmp_path):
    terminal, end = os.openpty()
    arguments = ("--data", folder / "questions.jsonl", "--output", tmp_path, "--limit", "2", "--sparsity", "0")
    done = subprocess.run([sys.executable, SCRIPT, *COMMON, *arguments], stdout=-1, stderr=end, env=ALONE)
    os.close(end)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert done.returncode == 0 and "1 of 2 questions" in shown and shown.endswith("2 of 2 questions\r\x1b[K")


def test_the_worked_example_of_the_readme(tmp_path, monkeypatch):
    """The folder, its questions, the command, and all it prints but the seconds."""
    (section,) = re.findall(r"^## Your own questions\n(.*?)^### ", README.read_text(), re.MULTILINE | re.DOTALL)
    quoted = re.findall(r"^ {4}(.*)$", section, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(README.parent)
    assert quoted[0] == "mkdir mine" and not (tmp_path / "mine").mkdir()
    for command in quoted[1:3]:
        assert scenes.main(shlex.split(command)[2:]) in (0, None)
    jsonl(tmp_path / "mine" / "questions.jsonl", *(line for line in quoted if line.startswith("{")))
    (command,) = (line for line in quoted if "evaluate.py" in line)
    done = call(*shlex.split(command)[2:])
    assert done.returncode == 0 and cells(done.stdout) == cells(section)
    assert done.stdout.splitlines()[:2] == [line for line in section.splitlines() if line.startswith("|")][:2]
    listed = [line for line in done.stdout.splitlines() if line and not line.startswith("|")]
    assert listed == quoted[-2:]
