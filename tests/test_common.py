"""What the example scripts share: files written whole, warnings as lines, the interval of a share."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from common import ROOT, accuracy, check_output, difference, warnings_as_lines, write_whole


@pytest.mark.parametrize(
    "scenes, expected",
    [
        ([], "none asked"),
        ([(0, 0)], "none asked"),
        ([(1, 1)] * 50 + [(0, 1)] * 50, "50.0 (40.4–59.6)"),  # Wilson's interval of 50 of 100
        ([(1, 1)] * 100, "100.0 (96.3–100.0)"),
        ([(0, 1)] * 30, "0.0 (0.0–11.4)"),  # not -0.0
        ([(1, 1)] * 90 + [(0, 1)] * 10, "90.0 (82.6–94.5)"),
        ([(8, 8)] * 50 + [(0, 8)] * 50, "50.0 (40.4–59.6)"),  # 800 questions, alike in each scene, count as 100
        ([(1, 2)] * 50, "50.0 (40.4–59.6)"),  # and never as more than independent ones
    ],
)
def test_accuracy_comes_with_its_interval(scenes, expected):
    assert accuracy(scenes) == expected


@pytest.mark.parametrize(
    "ours, other, expected",
    [
        ([], [], "none asked"),
        ([(0, 0)], [(0, 0)], "none asked"),
        ([(8, 8), (0, 8)], [(8, 8), (0, 8)], "+0.0 [+0.0, +0.0]"),  # whatever the scenes differ in
        ([(1, 1)] * 100, [(1, 1)] * 80 + [(0, 1)] * 20, "+20.0 [+12.2, +27.8]"),  # 1.96 sqrt(0.2 * 0.8 / 100)
        ([(1, 1)] * 80 + [(0, 1)] * 20, [(1, 1)] * 100, "-20.0 [-27.8, -12.2]"),
        ([(8, 8)] * 100, [(8, 8)] * 80 + [(0, 8)] * 20, "+20.0 [+12.2, +27.8]"),  # alike in a scene: they count once
        ([(1, 2), (0, 0)], [(0, 2), (0, 0)], "+50.0 [+50.0, +50.0]"),  # a scene of which nothing was asked
    ],
)
def test_differences_are_paired(ours, other, expected):
    assert difference(ours, other) == expected


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.npy"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match=r"out\.npy: cannot be written \(No space left on device\); make room"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "out.npy"
    path.write_bytes(b"old")
    code = (
        "import sys, time; from pathlib import Path; from common import write_whole\n"
        "def write(file):\n file.write(b'half'); file.flush(); print(flush=True); time.sleep(60)\n"
        "write_whole(Path(sys.argv[1]), write)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=ROOT / "examples", stdout=subprocess.PIPE) as running:
        running.stdout.read(1)
        running.kill()
    assert path.read_bytes() == b"old"


def test_a_link_stays_and_what_it_names_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("real.npy").write_bytes(b"old")
    Path("link.npy").symlink_to("real.npy")
    assert check_output(Path("link.npy")) == tmp_path / "real.npy"
    write_whole(Path("link.npy"), lambda file: file.write(b"new"))
    assert Path("link.npy").is_symlink() and Path("real.npy").read_bytes() == b"new"


@pytest.mark.parametrize(
    "name, words",
    [("photo.jpg", "it is written as .npy; name it so"), ("a.npy", "is one of the inputs"),
     ("link.npy", "is one of the inputs"), ("no/b.npy", "cannot be written there"), (".", "cannot be written there"),
     ("/dev/null", "cannot be written there")],
)  # fmt: skip
def test_a_name_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    Path("a.npy").write_bytes(b"")
    Path("link.npy").symlink_to("a.npy")
    with pytest.raises(ValueError, match=f"^{name}: {words}"):
        check_output(Path(name), ".npy", ["a.npy", "none"])
    assert check_output(Path("B.NPY"), ".npy", ["a.npy"]) == tmp_path / "B.NPY"


def test_each_warning_is_one_line_and_an_error_stands_alone(capsys):
    with warnings_as_lines("program"):
        for message in ("one", "two", "one"):
            warnings.warn(message, stacklevel=1)
    assert capsys.readouterr().err == "program: warning: one\nprogram: warning: two\n"
    with pytest.raises(ValueError), warnings_as_lines("program"):
        warnings.warn("one", stacklevel=1)
        raise ValueError
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", ["camera", "figures", "train_tiny"])  # other tests run the others
def test_a_script_runs_from_any_folder(tmp_path, script):
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"usage: {script} ")
