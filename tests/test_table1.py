"""Table 1: the costs to the digit, and a run on a small file like RealWorldQA."""

import argparse
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
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import scenes
import table1
import weights
from camera import CameraOptions, camera, saccade
from common import TINY, save_events
from epvlm import EPVLM, Options, Sampling
from events import budget
from llm import DecoderConfig
from realworldqa import Answers, count, find, rows
from table1 import MODELS, PAPER, SPARSITIES, modules
from vit import VisionConfig

SCRIPT = Path(table1.__file__)
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # the tiny model is slow where threads wait for a busy core
SETTINGS = [each.name for kind in (Options, Sampling) for each in fields(kind) if each.name != "sparsity"]


def call(*arguments, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """The command in this process, which is faster than `script`."""
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            status = table1.main([*map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def script(*arguments, processes=0, cwd=None, env=None, **kwargs) -> subprocess.CompletedProcess:
    deal = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *deal, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**ALONE, **(env or {})}, **kwargs)


def cells(markdown: str) -> list[list[str]]:
    """The rows of the table, without its head."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# Costs


def test_costs_are_those_of_the_paper_to_the_digit_where_it_agrees_with_itself():
    done = call("costs")
    assert (done.returncode, done.stderr) == (0, "")
    found = {(row[0], float(row[1])): row[2:] for row in cells(done.stdout)}
    assert set(found) == {(name, sparsity) for name in MODELS for sparsity in SPARSITIES}
    expected = {"2B": ("2.21", 14.7, 10.3, 7.4, 4.5), "7B": ("8.29", 34.9, 24.7, 17.9, 11.1)}
    for name, (params, *flops) in expected.items():
        for sparsity, value in zip(SPARSITIES, flops, strict=True):
            row, printed = found[name, sparsity], PAPER[name, sparsity]
            assert row[0] == params == f"{printed.params:.2f}"
            assert round(float(row[2]), 1) == value and float(row[3]) == printed.flops
            assert float(row[4]) == pytest.approx(float(row[2]) - printed.flops, abs=0.011)
            assert float(row[6]) == pytest.approx(float(row[2]) / 2, abs=0.011) and float(row[7]) == printed.macs
            vit, llm = modules(MODELS[name])
            groups = budget(1764, 1 - sparsity)
            everything = sum(vit.flops([4 * groups], groups) + llm.flops(groups + 62)) / 1e12
            assert row[5] == f"{everything:.2f}" and float(row[9]) == pytest.approx(everything / 2, abs=0.006)
    misfits = [line for line in done.stdout.splitlines() if "its count gives" in line]
    assert misfits == [
        "- 2B at 0: the paper prints 7.4 T MACs, its count gives 7.33.",
        "- 2B at 0.7: the paper prints 2.2 T MACs, its count gives 2.26.",
        "- 7B at 0: the paper prints 31.1 T FLOPs, its count gives 34.88.",
        "- 7B at 0: the paper prints 15.5 T MACs, its count gives 17.44.",
    ]
    assert "2B: sparsity 0.5 saves 49.3% of the linear layers' FLOPs, 59.3% of all." in done.stdout


def test_parameters_are_those_of_the_published_models():
    for name, expected in (("2B", 2_208_985_600), ("7B", 8_291_375_616), ("72B", 73_405_560_320)):
        parts = modules(MODELS[name])
        assert sum(parameter.numel() for part in parts for parameter in part.parameters()) == expected


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_published_configs(data, tmp_path, name):
    (tmp_path / "config.json").write_text((data / "qwen2-vl" / "layouts" / f"flat_{name}.json").read_text())
    vision, text = weights.read_config(tmp_path)
    assert weights.fill(DecoderConfig, text, tmp_path) == MODELS[name]
    assert weights.fill(VisionConfig, vision, tmp_path) == VisionConfig(hidden_size=MODELS[name].hidden_size)


def test_another_image_and_text_can_be_given_and_wrong_ones_are_refused():
    small = cells(call("costs", "--patches", 64, "--text", 5).stdout)
    vit, llm = modules(MODELS["2B"])
    linear = vit.flops([64], 16)[0] + llm.flops(16 + 5 + 2, 16 + 5 + 2)[0]
    assert small[0][4] == f"{linear / 1e12:.2f}"
    for wrong in (("--patches", 66), ("--patches", 0), ("--text", 0)):
        done = call("costs", *wrong)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


# Accuracy

COMMON = ("--model", str(TINY), "--max-new-tokens", "8", "--device", "cpu")


def table_of(made: list[dict], path: Path) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(made), path, row_group_size=3)
    return path


BAD = {
    4: "the row's question is None",
    7: "the image: cannot be read as an image",
    8: "the row's image is in no known format",
}


def row(seed: int, place: int) -> dict:
    """In RealWorldQA's columns."""
    made, file = scenes.scene(seed), io.BytesIO()
    question = scenes.questions(made)[place]
    Image.fromarray(scenes.render(made)).save(file, "PNG")
    picture = {"bytes": file.getvalue(), "path": f"{seed}.png"}
    return {"image": picture, "question": question.text, "answer": question.answer, "image_path": f"{seed}.png"}


@pytest.fixture(scope="module")
def rwqa(tmp_path_factory) -> Path:
    """12 rows, of which row 4 has no question, row 7 half an image, row 8 no image at all."""
    made = [row(seed, place) for seed in range(6) for place in (0, -1)]
    made[4]["question"] = None
    made[7]["image"] = {"bytes": made[7]["image"]["bytes"][:200], "path": "broken.png"}
    made[8]["image"] = {"bytes": b"text", "path": "text.png"}
    return table_of(made, tmp_path_factory.mktemp("rwqa") / "test.parquet")


def ask(rwqa: Path, *options, **how) -> subprocess.CompletedProcess:
    """In processes of their own where `how` has their number or environment."""
    start = script if how.keys() - {"cwd"} else call
    return start("accuracy", *COMMON, "--data", rwqa, *options, **how)


def records(path: Path) -> list[dict]:
    first, *found = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(first) == ["settings"]
    return found


def lasting(found: list[dict]) -> list[dict]:
    """All but the seconds, which no two runs share."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


def shown(markdown: str) -> list[list[str]]:
    """The table but its last column, the seconds, which no two runs share."""
    return [row[:-1] for row in cells(markdown)]


@pytest.fixture(scope="module")
def single(rwqa, tmp_path_factory):
    """The run of one process, and the folder with its answers.jsonl."""
    folder = tmp_path_factory.mktemp("single")
    done = ask(rwqa, cwd=folder)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done, folder


def test_every_question_is_asked_and_scored(rwqa, single):
    done, folder = single
    found, model = records(folder / "answers.jsonl"), EPVLM.from_pretrained(TINY, device="cpu")
    assert [(r["row"], r["sparsity"]) for r in found] == [(n, s) for n in range(12) for s in SPARSITIES]
    assert sorted({r["row"] for r in found if "error" in r}) == [4, 7, 8]
    asked = dict(rows([rwqa], set(range(12))))
    for record in found:
        row = asked[record["row"]]
        if record["row"] in BAD:
            assert record["error"].startswith(BAD[record["row"]])
            continue
        events = camera(saccade(np.asarray(row.image))) if record["sparsity"] else None
        view = model.look(row.image, events, Options(record["sparsity"]))
        text = "".join(model.stream(view, row.question, Sampling(max_new_tokens=8)))
        assert record["answer"] == text and record["key"] == row.answer and record["exact"] == (text == row.answer)
        assert (record["tokens"], record["of"]) == (int(view.groups.sum()), view.groups.numel())
        assert record["all"] == model.flops(view, row.question)[0]
        patches, length = len(view.patches), len(model.prompt(view, row.question)[0])
        linear = model.vit.flops([patches], record["tokens"])[0] + model.llm.flops(length, length)[0]
        assert record["linear"] == linear and record["tokens"] <= record["of"] and record["seconds"] > 0
    right = [r["exact"] for r in found if r["sparsity"] == 0 and "exact" in r]
    dense = cells(done.stdout)[0]
    assert len(right) == 9 and dense[4] == dense[6] == f"{sum(right)} of 9" and dense[2] == dense[7] == "–"
    assert "Not asked and not counted: 12 questions of 3 bad rows; row 4: the row's question is None" in done.stdout


def record(sparsity: float, **changed) -> dict:
    plain = {"row": 0, "sparsity": sparsity, "answer": "C.", "key": "C", "exact": True, "choice": True, "tokens": 10,
             "of": 20, "linear": 10**12, "all": 2 * 10**12, "seconds": 1.0}  # fmt: skip
    return {**plain, **changed}


def test_the_table_has_every_figure_in_its_place():
    made = [record(0.5), record(0.5, exact=False, tokens=20, all=4 * 10**12, seconds=2.0)]
    made += [record(0.5, exact=False, choice=False, tokens=30, linear=4 * 10**12, seconds=9.0), record(0.7)]
    head, _, *lines = table1.table(made, [0.7, 0.5, 0.3], 2_208_985_600).splitlines()
    names = [name.strip() for name in head.strip("|").split("|")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["0.7", "2.21", "2.21", "100.0 (20.7–100.0)", "1 of 1", "100.0 (20.7–100.0)", "1 of 1", "59.1", "10.0", "20.0",
         "1", "4.5", "0.5", "2.2", "2", "1.00"],
        ["0.5", "2.21", "2.21", "33.3 (6.1–79.2)", "1 of 3", "66.7 (20.8–93.9)", "2 of 3", "61.4", "20.0", "20.0",
         "2", "7.4", "1", "3.7", "2.667", "2.00"],
    ]  # fmt: skip
    assert names[:8] == ["sparsity", "params B", "paper", "exact % (95 %)", "right of asked", "choice % (95 %)",
                         "right of asked", "paper"]  # fmt: skip
    assert names[8:] == [
        "tokens",
        "of",
        "FLOPs T linear",
        "paper",
        "MACs T linear",
        "paper",
        "FLOPs T all",
        "s a question",
    ]


def test_nothing_asked_is_an_error_and_warnings_are_reported(capsys):
    with pytest.raises(ValueError, match="no question could be asked; row 0: too long"):
        table1.report([{"row": 0, "sparsity": 0.5, "error": "too long"}], [0.5], 1)
    table1.report([record(0.5), record(0.5, row=3, warning="no events at all")], [0.5], 1)
    assert "Asked with a warning: 1 questions; row 3: no events at all" in capsys.readouterr().out


def arguments(**changed) -> argparse.Namespace:
    camera = {"events": None, "radius": 2.0, "threshold": 0.2}
    return argparse.Namespace(**{**camera, **vars(Options()), **vars(Sampling(max_new_tokens=4)), **changed})


@pytest.mark.parametrize(
    "changed",
    [{"radius": 0.5}, {"threshold": 0.7}, {"cell": "patch"}, {"polarity": "signed"}, {"rule": "literal"},
     {"max_pixels": 28 * 28 * 9}, {"max_new_tokens": 1}],
)  # fmt: skip
def test_options_reach_the_question(rwqa, monkeypatch, changed):
    model, row, args = EPVLM.from_pretrained(TINY, device="cpu"), dict(rows([rwqa], {3}))[3], arguments(**changed)
    asked = []
    monkeypatch.setattr(model, "stream", lambda view, question, sampling: asked.append((view, sampling)) or ["x"])
    (made,) = table1.ask(model, row, [0.5], partial(table1.events_of, args, None, 3), args)
    events = camera(saccade(np.asarray(row.image), args.radius), CameraOptions(args.threshold))
    options = {key: value for key, value in changed.items() if key in vars(Options())}
    expected = model.look(row.image, events, Options(**options))
    plain = model.look(row.image, camera(saccade(np.asarray(row.image))))
    ((view, sampling),) = asked
    assert made["sparsity"] == 0.5 and sampling == Sampling(max_new_tokens=args.max_new_tokens)
    assert torch.equal(view.keep, expected.keep) and torch.equal(view.patches, expected.patches)
    if changed.keys() & {"radius", "threshold", "cell", "polarity", "max_pixels"}:  # or the test shows nothing
        assert view.patches.shape != plain.patches.shape or not torch.equal(view.patches, plain.patches)


def test_two_processes_do_the_same(rwqa, single, tmp_path):
    done = ask(rwqa, "--answers", "two.jsonl", processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["two.jsonl"]
    assert lasting(records(tmp_path / "two.jsonl")) == lasting(records(single[1] / "answers.jsonl"))
    assert shown(done.stdout) == shown(single[0].stdout)


def test_it_goes_on_after_a_kill_at_any_moment(rwqa, single, tmp_path):
    """Killed after some answers, or some time: whatever was answered stays as it was, and nothing is asked twice."""
    options, path, seen = ("--resume", "--answers", "a.jsonl"), tmp_path / "a.jsonl", []
    chance = random.Random(0)
    for _ in range(40):
        command = [sys.executable, str(SCRIPT), "accuracy", *COMMON, "--data", str(rwqa), *options]
        with subprocess.Popen(command, cwd=tmp_path, env=ALONE, stdout=-1, stderr=-1) as running:
            wanted, end = len(seen) + chance.randrange(1, 17), time.monotonic() + chance.choice([1000, 1, 2, 3])
            while running.poll() is None:
                whole = path.read_bytes().count(b"\n") - 1 if path.exists() else -1
                if whole >= wanted or time.monotonic() > end:
                    running.kill()
                    break
                time.sleep(0.002)
        now = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
        assert now[: len(seen)] == seen
        seen = now
        if len(seen) >= 36:
            break
        if seen:
            with path.open("ab") as file:  # as if it had been killed in the midst of a line
                file.write(b'{"row": 11, "sparsity": 0.')
    assert len(seen) >= 36
    done = ask(rwqa, *options, cwd=tmp_path)
    assert done.returncode == 0 and lasting(records(path)) == lasting(records(single[1] / "answers.jsonl"))
    assert shown(done.stdout) == shown(single[0].stdout)


def test_any_number_of_processes_goes_on_where_others_stopped(rwqa, single, tmp_path):
    lines = (single[1] / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:20]))
    (tmp_path / "a.rank1.jsonl").write_bytes(lines[0] + b"".join(lines[25:30]))
    (tmp_path / "a.rank7.jsonl").write_bytes(lines[0] + b"".join(lines[28:32]) + b'{"row"')
    done = ask(rwqa, "--resume", "--answers", "a.jsonl", processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    kept = records(tmp_path / "a.jsonl")
    assert lasting(kept) == lasting(records(single[1] / "answers.jsonl")) and shown(done.stdout) == shown(
        single[0].stdout
    )
    there = [json.loads(line) for line in lines[1:20] + lines[25:32]]
    assert all(record in kept for record in there)  # with their seconds: not asked again


def test_what_was_an_error_is_tried_again(rwqa, tmp_path):
    (tmp_path / "recorded").mkdir()
    save_events(scenes.record(scenes.scene(0)), tmp_path / "recorded" / "0.npy")
    options = ("--events", "recorded", "--limit", 2, "--sparsity", 0.5)
    assert "row 1: recorded: no recording of row 1" in ask(rwqa, *options, cwd=tmp_path).stdout
    save_events(scenes.record(scenes.scene(0)), tmp_path / "recorded" / "1.npy")
    done, found = ask(rwqa, *options, "--resume", cwd=tmp_path), records(tmp_path / "answers.jsonl")
    assert "Not asked" not in done.stdout and ["exact" in r for r in found] == [True, True]


def test_two_runs_do_not_share_a_file(rwqa, single, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((single[1] / "answers.jsonl").read_bytes()[:3000])
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = ask(rwqa, "--answers", path, "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "another run is writing it" in done.stderr
    assert path.stat().st_size == 3000


def test_every_setting_must_be_the_same_to_go_on(rwqa, single, tmp_path):
    first, rest = (single[1] / "answers.jsonl").read_bytes().split(b"\n", 1)
    kept = json.loads(first)["settings"]
    assert set(kept) >= {"model", "data", "events", "radius", "threshold", "dtype", *SETTINGS}
    for key in kept:
        path = tmp_path / "a.jsonl"
        path.write_bytes(json.dumps({"settings": {**kept, key: "other"}}).encode() + b"\n" + rest)
        answers = Answers(path, 0, kept)
        answers.open()
        with pytest.raises(ValueError, match=f"made with {key} 'other'"):
            answers.read()
        answers.file.close()


def test_a_longer_run_takes_over_a_shorter_one(rwqa, single, tmp_path):
    ask(rwqa, "--limit", 3, "--sparsity", 0.5, cwd=tmp_path)
    first = records(tmp_path / "answers.jsonl")
    assert [(r["row"], r["sparsity"]) for r in first] == [(0, 0.5), (1, 0.5), (2, 0.5)]
    done = ask(rwqa, "--resume", cwd=tmp_path)
    assert shown(done.stdout) == shown(single[0].stdout)
    assert all(record in records(tmp_path / "answers.jsonl") for record in first)


def test_recorded_events_are_taken_by_row(rwqa, tmp_path):
    (tmp_path / "recorded").mkdir()
    for number, name in ((0, "0.npy"), (1, "00001.npy"), (3, "3.npy")):
        save_events(scenes.record(scenes.scene(number // 2)), tmp_path / "recorded" / name)
    done = ask(rwqa, "--events", "recorded", "--limit", 4, "--sparsity", 0.5, "--cell", "patch", cwd=tmp_path)
    found = records(tmp_path / "answers.jsonl")
    assert done.returncode == 0 and found[2]["error"] == "recorded: no recording of row 2"
    model, asked = EPVLM.from_pretrained(TINY, device="cpu"), dict(rows([rwqa], {3}))[3]
    view = model.look(asked.image, tmp_path / "recorded" / "3.npy", Options(cell="patch"))
    assert found[3]["tokens"] == int(view.groups.sum()) and found[3]["all"] == model.flops(view, asked.question)[0]
    (tmp_path / "recorded" / "003.npz").write_bytes(b"")
    assert "row 3 has" in ask(rwqa, "--events", "recorded", "--resume", cwd=tmp_path).stderr


def test_bad_input_is_one_line_before_the_model_is_loaded(rwqa, single, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(rwqa.read_bytes()[:-100])
    table_of([{"image": b"", "answer": "1"}], tmp_path / "lacking.parquet")
    twice = [pyarrow.array([x]) for x in (b"", "q", "a", "a")]
    parquet.write_table(pyarrow.table(twice, ["image", "question", "answer", "answer"]), tmp_path / "double.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jsonl").write_text("hello\n")
    path = single[1] / "answers.jsonl"
    for arguments, words in (
        (("--data", tmp_path / "broken.parquet"), "not a parquet file"),
        (("--data", tmp_path / "lacking.parquet"), "has 0 columns question"),
        (("--data", tmp_path / "empty"), "no .parquet file"),
        (("--data", tmp_path / "double.parquet"), "has 2 columns answer"),
        (("--data", "no-such/dataset"), "no-such/dataset: neither a file nor"),
        (("--answers", path), "has answers already"),
        (("--answers", path, "--resume", "--model", TINY, "--max-new-tokens", 9), "made with max_new_tokens 8, not 9"),
        (("--answers", "text.jsonl", "--resume"), "something else than answers"),
        (("--answers", "no/such.jsonl"), "cannot be written there"),
        (("--events", "empty"), "no recording named by its row"),
        (("--sensor", "10x10"), "for recorded events"),
        (("--sparsity", 1), "must be in [0, 1)"),
        (("--limit", 0), "limit 0"),
        (("--threshold", 0), "threshold 0"),
        (("--radius", 99), "radius 99"),
    ):
        offline = {"env": {"HF_HUB_OFFLINE": "1"}} if "no-such/dataset" in arguments else {}
        done = ask(rwqa, "--model", "none", *arguments, cwd=tmp_path, **offline)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert words in done.stderr and done.stderr.startswith("table1: error: ") and done.stderr.count("\n") == 1
    assert (tmp_path / "text.jsonl").read_text() == "hello\n"


@pytest.mark.parametrize("command", ["costs", "accuracy"])
def test_only_accuracy_needs_pyarrow(tmp_path, command):
    (tmp_path / "pyarrow.py").write_text("raise ModuleNotFoundError(\"No module named 'pyarrow'\", name='pyarrow')")
    done = script(command, *["--data", "x"][: 2 * (command == "accuracy")], env={"PYTHONPATH": str(tmp_path)})
    if command == "costs":
        assert done.returncode == 0 and done.stdout.startswith("7056 patches")
    else:
        assert done.returncode == 2 and "pip install -r examples/requirements.txt" in done.stderr
        assert done.stderr.count("\n") == 1


def test_processes_take_a_gpu_each(monkeypatch):
    started = []
    monkeypatch.setattr(table1.dist, "init_process_group", lambda backend, timeout: started.append(backend))
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert table1.processes(None) == table1.processes("cuda") == (5, 8, "cuda:1")
    assert table1.processes("cpu") == (5, 8, "cpu")
    assert started == ["cuda:1", "nccl", "cuda:1", "nccl", "gloo"]
    with pytest.raises(ValueError, match="cuda:0"):
        table1.processes("cuda:0")


def test_a_dataset_in_the_hubs_cache_is_found(rwqa, tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "datasets--xai-org--RealworldQA"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    data = folder / "snapshots" / ("0" * 40) / "data"
    data.mkdir(parents=True)
    for part in (1, 0):
        (data / f"test-0000{part}-of-00002.parquet").symlink_to(rwqa)
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = ask("xai-org/RealworldQA", "--limit", 14, "--sparsity", 0.5, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    found = lasting(records(tmp_path / "answers.jsonl"))
    assert [r["row"] for r in found] == list(range(14)) and found[12] == {**found[0], "row": 12}
    assert [path.name for path in find(str(folder))] == [f"test-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert count([rwqa, rwqa]) == 24


def test_the_bar_shows_what_is_right_so_far(capsys):
    found = [{"sparsity": 0.5, "exact": True}, {"sparsity": 0.5, "exact": False}, {"sparsity": 0.7, "error": ""}]
    table1.show(found, 2, 4)
    assert capsys.readouterr().err == "\r\x1b[K[#####     ] 2/4 0.5: 50.0 % bad: 1"
    table1.show(found, 4, 4)
    assert capsys.readouterr().err.endswith("\r\x1b[K")


def test_the_bar_is_shown_on_a_terminal(rwqa, tmp_path):
    terminal, end = os.openpty()
    command = [sys.executable, str(SCRIPT), "accuracy", *COMMON, "--data", str(rwqa), "--limit", "2", "--sparsity", "0"]
    done = subprocess.run(command, stdout=-1, stderr=end, cwd=tmp_path)
    os.close(end)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert done.returncode == 0 and "] 1/2 0: " in shown and "] 2/2 0: " in shown and shown.endswith("\r\x1b[K")
