"""What the scripts of this folder share: the way to the modules of the root, files that are read and written whole, the
intervals of shares, and the file of answers. Every script imports it before it imports those modules.
"""

import atexit
import contextlib
import fcntl
import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import distributed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from epvlm import EPVLM, add_model, exit_status, warnings_as_lines  # noqa: E402, F401 (scripts take them from here)
from events import Events  # noqa: E402

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


@contextlib.contextmanager
def reading(path: Path, needed: str = "requirements-convert.txt") -> Iterator[None]:
    """Turns what libraries raise into a ValueError that names the file, and says how to get one that is missing."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{path}: needs {error.name}; pip install -r examples/{needed}") from None
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(
            f"{path}: cannot be read ({one_line(error)}); it may be damaged or cut short, copy it again"
        ) from None


def save_events(events: Events, path: Path) -> None:
    """A structured .npy with fields x, y, t, p."""
    kinds = [("x", "<i4"), ("y", "<i4"), ("t", "<i8"), ("p", "u1")]
    rows = np.rec.fromarrays((events.x, events.y, events.t, events.p), dtype=kinds)
    write_whole(path, lambda file: np.save(file, rows))


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
    low, high = (max(0.0, (middle + sign * half) / (1 + z * z / n)) for sign in (-1, 1))
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


def by_image(records: Iterable[dict], score: str) -> list[tuple[int, int]]:
    """Right by that score, and asked, of each image, for `accuracy`: from records as below."""
    found = {}
    for record in records:
        found.setdefault(record["image"], []).append(record[score])
    return [(sum(right), len(right)) for right in found.values()]


def markdown(head: Iterable, rows: Iterable[Iterable]) -> str:
    """A table."""
    lines = [[" ".join(str(cell).split()).replace("|", r"\|") for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def one_line(error: Exception | Warning) -> str:
    """What it says."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# The answers that evaluate.py writes and table1.py reads. A record is a dict with the number of a row, a sparsity, a
# rule, and what was answered, or the error. The first line of a file has the settings.

JOB = itemgetter("row", "sparsity", "rule")


def by_job(records: Iterable[dict]) -> dict[tuple, dict]:
    """An answer counts more than an error, which was tried again."""
    return {JOB(record): record for record in sorted(records, key=lambda record: "error" not in record)}


def read_answers(folder: Path) -> dict[Path, tuple[dict, list[dict]]]:
    """Settings and records of each file, without an unfinished last line. Raises ValueError for other things."""
    found, start = {}, b'{"settings": '
    for path in filter(os.path.exists, (folder / "answers.jsonl", *sorted(folder.glob("answers.[0-9]*.jsonl")))):
        *lines, rest = path.read_bytes().split(b"\n")
        try:
            settings, *records = [json.loads(line) for line in lines] or [{"settings": {}}]
            found[path] = dict(settings["settings"]), records
            by_job(records)  # each is a record
            if not lines and rest[: len(start)] != start[: len(rest)]:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: holds other things than answers; give another folder") from None
    return found


class Answers:
    """DIR/answers.jsonl. Each further process has a file of its own, answers.1.jsonl, ..., on whatever machine."""

    def __init__(self, folder: Path, rank: int, settings: dict):
        """Takes the process's file, and reads all in the folder. An unfinished last line goes: the process was killed
        while it wrote. Raises ValueError if another run has the file, or for records made under other settings."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / (f"answers.{rank}.jsonl" if rank else "answers.jsonl")
        self.file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.path}: another run is writing it; wait for it, or end it") from None
        found = read_answers(folder)
        for path, (was, records) in found.items():
            for key, now in settings.items() if records else ():
                other = f"made with {key} {was.get(key)!r}, not {now!r}"
                if was.get(key) != now:
                    raise ValueError(f"{path}: {other}; go on with the same, or give another folder")
        self.known = [record for _, records in found.values() for record in records]
        self.held = by_job(found[self.path][1])
        self.file.truncate(self.path.read_bytes().rfind(b"\n") + 1 if self.held else 0)
        if not self.held:
            self.write({"settings": settings})

    def add(self, record: dict) -> None:
        if self.held.get(JOB(record)) != record:
            self.held[JOB(record)] = record
            self.write(record)

    def write(self, line: dict) -> None:
        """Appends it in a single write: a kill leaves all of it or nothing."""
        whole = json.dumps(line).encode() + b"\n"
        if self.file.write(whole) != len(whole):
            raise OSError(f"{self.path}: the disk is full; make room, and go on with --resume")


def process(device: str | None) -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says, else alone. Each takes a GPU of its own, unless the
    flag `device` names another."""
    rank, world, local = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1:
        if device in (None, "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(local)  # which the name cuda then means
        distributed.init_process_group("gloo", timeout=timedelta(days=30))  # they wait for the slowest
        atexit.register(distributed.destroy_process_group)
    return rank, world


def gathered(records: Iterable[dict], world: int) -> list[dict]:
    """Those of all processes, in each of them."""
    found = [list(records)] * world
    if world > 1:
        distributed.all_gather_object(found, found[0])
    return list(chain(*found))
