"""What the scripts of this folder share: the way to the modules of the root, files written whole, and the intervals of
shares. Every script imports it before it imports those modules.
"""

import contextlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from epvlm import EPVLM, add_model, exit_status, warnings_as_lines  # noqa: E402, F401 (scripts take them from here)

TINY = ROOT / "examples" / "tiny"  # the checkpoint that train_tiny.py made


class Parser(ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the options)\n")


def load(args: Namespace) -> EPVLM:
    """The model that the flags of `add_model` name."""
    return EPVLM.from_pretrained(args.model, args.revision, args.device, args.dtype)


def check_output(path: Path, suffix: str = "", inputs: Iterable[str] = ()) -> Path:
    """Where a file of that name is written, links followed. Raises ValueError, before any work, where it cannot be, for
    one of the inputs, and for a name that does not end in `suffix`."""
    place = Path(os.path.realpath(path))  # which, unlike Path's, raises nothing
    if not place.parent.is_dir() or (place.exists() and not place.is_file()):
        raise ValueError(f"{path}: cannot be written there; give a file's name in a folder that exists")
    given = [Path(os.path.realpath(name)) for name in inputs]
    if place in given or (suffix == ".png" and place.parent in given):  # there it would be a frame
        raise ValueError(f"{path}: is one of the inputs, or among them; give another name")
    if not path.name.lower().endswith(suffix):
        raise ValueError(f"{path}: it is written as {suffix}; name it so")
    return place


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a file beside and renames it, so that `path` is the old file or the new one, never half."""
    place = check_output(path)
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            write(file)
        beside.replace(place)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{path}: cannot be written ({reason}); make room, or write elsewhere") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def accuracy(by_scene: list[tuple[int, int]]) -> str:
    """Right answers of a hundred and Wilson's 95 % interval, "97.1 (95.9–98.0)", from (right, asked) of each scene.

    Answers about one scene are not independent: n is the number of questions that, if they were, would vary as much."""
    right, n = (sum(part) for part in zip(*by_scene, strict=True)) if by_scene else (0, 0)
    if not n:
        return "none asked"
    p, z = right / n, 1.96
    variance = sum((ok - p * asked) ** 2 for ok, asked in by_scene) / n**2  # of p
    n = min(n, p * (1 - p) / variance) if variance else n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def difference(ours: list[tuple[int, int]], other: list[tuple[int, int]]) -> str:
    """Points by which ours is ahead of the other, with the 95 % interval, "+2.1 [+1.0, +3.2]", from (right, asked) of
    each scene, in the same order. It is paired by scene: what makes a scene hard for both does not count."""
    n, ahead = sum(asked for _, asked in ours), [a - b for (a, _), (b, _) in zip(ours, other, strict=True)]
    if not n:
        return "none asked"
    share = sum(ahead) / n
    half = 1.96 * sum((a - share * asked) ** 2 for a, (_, asked) in zip(ahead, ours, strict=True)) ** 0.5 / n
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * value for value in (share, share - half, share + half)))


def markdown(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    """A table."""
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def one_line(error: Exception | Warning) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
