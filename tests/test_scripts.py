"""The scripts of tests/scripts that measure: they run, with the tiny model, and print their tables."""

import subprocess
import sys

import pytest

from common import ROOT, TINY

CASES = [
    (
        ["bench_transformers.py", TINY, "--patches", "64", "--rounds", "1", "--busy"],
        [
            "| first token, 64 patches, sparsity 0.5, cover, s |",
            "| first token, 8 frames, sparsity 0.8, s |",
            "| a later question about 64 patches, s |",
            "| decoding, tokens a second |",
            "| 64 patches, sparsity 0.7 |",
            "| 64 patches, sparsity 0.5 | int8 | bfloat16 | ratio | aim |",
            "Share of other processes by round:",
        ],
    ),
    (["bench_clip.py", TINY, "--rounds", "1"], ["| dense | 256 |", "| 0.5 | 128 |", "| 0.5, cover | 128 |"]),
    (["check_int8.py", TINY], ["| float32 | 0.0000 |", "| int8 | 0.0"]),
    (["check_int8.py", "--questions", "20"], ["| float32 |", "| bfloat16 |", "| int8 |"]),
]


@pytest.mark.parametrize("command, begins", CASES)
def test_it_prints_its_tables(command, begins):
    script, *arguments = command
    command = [sys.executable, ROOT / "tests" / "scripts" / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert all(any(line.startswith(begin) for line in lines) for begin in begins), done.stdout
