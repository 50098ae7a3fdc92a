"""Table 1: the costs to the digit, and the paper's figures beside the answers that evaluate.py wrote."""

import contextlib
import io
import json
import subprocess
from pathlib import Path

import pytest

import table1
import weights
from events import budget
from llm import DecoderConfig
from table1 import MODELS, PAPER, PARAMS, SPARSITIES, modules
from vit import VisionConfig


def call(*arguments) -> subprocess.CompletedProcess:
    """The command in this process, which is faster."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = table1.main([*map(str, arguments)])
        except SystemExit as stop:
            status = stop.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


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
            row, (_, printed, macs) = found[name, sparsity], PAPER[name, sparsity]
            assert row[0] == row[1] == params == f"{PARAMS[name]:.2f}"
            assert round(float(row[2]), 1) == value and float(row[3]) == printed
            assert float(row[4]) == pytest.approx(float(row[2]) - printed, abs=0.011)
            assert float(row[6]) == pytest.approx(float(row[2]) / 2, abs=0.011) and float(row[7]) == macs
            vit, llm = modules(MODELS[name])
            groups = budget(1764, 1 - sparsity)
            everything = sum(vit.flops([4 * groups], groups) + llm.flops(groups + 62)) / 1e12
            assert row[5] == f"{everything:.2f}" and float(row[9]) == pytest.approx(everything / 2, abs=0.006)
    saved = [1 - float(found[name, 0.5][n]) / float(found[name, 0.0][n]) for name in ("2B", "7B") for n in (2, 5)]
    assert [round(100 * part) for part in saved] == [49, 59, 49, 55]  # as the README says


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


def record(row: int, sparsity: float, **changed) -> dict:
    plain = {"row": row, "image": row, "group": "night", "sparsity": sparsity, "rule": "exact" if sparsity else "dense",
             "answer": "C.", "key": ["C"], "exact": True, "choice": True, "tokens": 10, "linear": 10**12,
             "flops": 2 * 10**12, "seconds": 1.0}  # fmt: skip
    return {**plain, **changed}


def write(folder: Path, records: list[dict], model: str, name: str = "answers.jsonl") -> Path:
    lines = [{"settings": {"model": model}}, *records]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "model, flags, name",
    [("Qwen/Qwen2-VL-2B-Instruct", (), "2B"), ("/data-2B/Qwen2-VL-7B-Instruct", (), "7B"), ("tiny", (), None),
     ("tiny", ("--size", "7B"), "7B"), ("Qwen2-VL-72B", (), None)],
)  # fmt: skip
def test_the_papers_figures_stand_beside_the_answers(tmp_path, model, flags, name):
    error = {
        key: value for key, value in record(1, 0.5).items() if key in ("row", "image", "group", "sparsity", "rule")
    }
    write(tmp_path, [record(0, 0.5, exact=False), {**error, "error": "no"}, record(0, 0.0), record(1, 0.0)], model)
    write(tmp_path, [record(0, 0.5, exact=False), record(0, 0.9)], model, "answers.1.jsonl")  # of another process
    done = call("accuracy", tmp_path, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    found = cells(done.stdout)
    assert [row[:3] for row in found] == [["0", "dense", "all"], ["0.5", "exact", "all"], ["0.9", "exact", "all"]]
    assert [row[5] for row in found] == ["2 of 2", "0 of 1", "1 of 1"] and [row[9] for row in found] == ["0", "1", "0"]
    for row, sparsity in zip(found, (0.0, 0.5, 0.9), strict=True):
        assert row[-3:] == [*map(str, PAPER.get((name, sparsity), "–––"))]


def test_a_folder_without_answers_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none", write(tmp_path, [], "tiny")):
        done = call("accuracy", folder)
        assert done.returncode == 2 and "no answers there" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "answers.jsonl").write_text("my notes\n")
    assert "holds other things than answers" in call("accuracy", tmp_path).stderr
