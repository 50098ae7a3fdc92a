"""The README: its table of equations, its worked example, its commands' files."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

from epvlm import EPVLM

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| \$.*\$.*\|.*\| (`\w+\.py`: .*?) \| `(.*?)::(.*?)` \|$", README, re.MULTILINE)


def test_every_equation_has_a_row():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 11))


@pytest.mark.parametrize("number, places, path, name", ROWS, ids=[row[0] for row in ROWS])
def test_functions_cite_their_equation_and_tests_exist(number, places, path, name):
    for place in places.split("; "):
        module, functions = place.split(": ")
        for function in functions.split(", "):
            found = importlib.import_module(module.strip("`").removesuffix(".py"))
            for part in function.strip("`").split("."):
                found = getattr(found, part)
            cited = re.findall(r"Eq\. (\d+(?:(?:, | and )\d+)*)", inspect.getsource(found))
            assert number in re.findall(r"\d+", " ".join(cited)), f"{function} does not cite Eq. {number}"
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_the_worked_example_is_true():
    example = doctest.DocTestParser().get_doctest(README, {}, "README", "README.md", 0)
    assert len(example.examples) == 16
    told = []
    failed, tried = doctest.DocTestRunner().run(example, out=told.append)
    assert (failed, tried) == (0, 16), "".join(told)


def test_what_is_said_of_the_picture():
    model = EPVLM.from_pretrained(ROOT / "examples" / "tiny", device="cpu")
    cells = model.prompt(ROOT / "examples" / "scene.png", ROOT / "examples" / "events.npy", "").S > 0
    assert (cells.sum(), cells.size) == (13, 64) and "Thirteen of its 64 cells have events" in README


def test_the_lines_of_python_run_and_print_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    lines = re.search(r"```python\n(from epvlm .*?)```", README, re.DOTALL)[1]
    exec(lines, {})
    out = capsys.readouterr().out
    assert re.search(r"^print\(prompt\)  # (.*)$", lines, re.MULTILINE)[1] in out
    assert out.startswith("red\n") and "yellow\n" in out and (tmp_path / "picture.png").is_file()


def test_the_commands_name_files_that_exist():
    named = set(re.findall(r"python ((?:examples/|tests/)?\w+\.py)", README))
    assert {"epvlm.py", "events.py", "examples/evidence.py", "examples/table1.py"} <= named
    assert all((ROOT / file).is_file() for file in named)
