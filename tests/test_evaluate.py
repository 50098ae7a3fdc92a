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
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import scenes
from camera import save_events
from common import TINY, Answers, accuracy, difference, read_answers
from epvlm import EPVLM, Options, Sampling

SCRIPT = Path(evaluate.__file__)
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
            wanted, end = len(seen) + chance.randrange(1, 25), time.monotonic() + chance.choice([1000, 1, 2])
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
    done = script("--data", folder / "questions.jsonl", "--output", tmp_path, *RULES, processes=2)
    assert done.returncode == 0 and cells(done.stdout) == cells(single[0].stdout), done.stderr
    assert done.stdout.partition("\n\n")[2] == single[0].stdout.partition("\n\n")[2]
    assert 20 < len(records(tmp_path, "answers.1.jsonl")) < 60
    assert lasting(records(tmp_path)) == lasting(records(single[1]))


@pytest.mark.parametrize("processes", [0, 3])
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
            Answers(tmp_path, 0, kept).read()
    arguments = ("--data", folder / "questions.jsonl", "--output", single[1], *RULES)
    for changed, words in (
        (("--max-new-tokens", 9), "made with max_new_tokens 8, not 9"),
        (("--data", jsonl(tmp_path / "a.jsonl", {"image": "x", "question": "what?", "answer": "a"})), "made with data"),
        (("--camera",), "made with camera False, not True"),
    ):
        done = call(*arguments, "--resume", *changed)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert "has answers already; go on with --resume" in call(*arguments).stderr


GOOD = json.dumps(record(0, 0.5)).encode()


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b"{}\n", b'{"settings": 1}\n', b"[]\n", b"\n", b"\xff\n"]
    + [b'{"settings": {"rows": 1}}\n' + line + b"\n" for line in (
        b"", b"{}", b"1", b"[]", b'{"row": 0}', GOOD.replace(b"tokens", b"spoken"), GOOD[:-1])],
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
