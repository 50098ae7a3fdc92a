"""Measures what sparsity costs on your own questions: a table of images, events, questions and answers.

    python examples/evaluate.py --data questions.jsonl --output DIR --sparsity 0 0.5 0.7 --rule exact cover
    torchrun --nproc-per-node 4 examples/evaluate.py ...          the same, the images dealt out to 4 processes

README.md, Your own questions, says what a row of the data may hold and what the table shows. Every answer is at once a
line of DIR/answers.jsonl, and --resume goes on after an interruption at any moment.

Glossary
    row      fields of KINDS, and `number` (from 0), `at` (for messages), `folder` (where its paths begin); one that
             cannot be asked has `error` in the place of the fields
    look     what decides what is looked at, fields of LOOK: once for all questions that share it
    job      one question at one sparsity by one rule; the answer, or the error, makes it a record
    exact    right by one rule of realworldqa.py; `choice` by the other
"""

import argparse
import fcntl
import hashlib
import json
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from io import BytesIO
from itertools import chain, count, product
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import distributed

from camera import RADIUS, CameraOptions, camera, movie, saccade
from common import Parser, accuracy, add_model, difference, exit_status, load, markdown, one_line, warnings_as_lines
from epvlm import EPVLM, Options, Sampling, View, add_flags, chosen, microseconds, read_input, scale
from events import RULES, need, read_events
from realworldqa import choice, exact, normalise, options
from vit import Clip, read_image

KINDS = {"image": (str, bytes), "frames": (str, list), "times": (str, list), "fps": (int, float), "events": (str,),
         "window": (list,), "homography": (str, list), "question": (str,), "answer": (str, int, float, list),
         "choices": (list,), "group": (str, int)}  # fmt: skip
LOOK = ("image", "frames", "times", "fps", "events", "window", "homography")
RECORD = {"row", "image", "group", "sparsity", "rule", "exact", "choice", "tokens", "linear", "flops", "seconds"}
FAULTS = (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError, argparse.ArgumentTypeError)  # of a row
NO_ROW = "not a JSON object"


# Rows


def find(data: str, revision: str | None = None) -> list[Path]:
    """The files of a file, a folder, or a dataset on the hub, which is downloaded. Raises ValueError."""
    place = Path(data).expanduser().absolute()
    try:
        if not place.exists():
            place = Path(snapshot_download(data, repo_type="dataset", revision=revision, allow_patterns="*.parquet"))
    except Exception as error:  # whatever the hub's client, its network library and the disk raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"{data}: neither here nor a dataset that can be downloaded ({reason}); correct it") from None
    files = [place] if place.is_file() else sorted(place.rglob("*.parquet"))
    need(bool(files), f"{data}: no .parquet file in it; give the file, or a folder that holds it")
    return files


def rows(files: list[Path]) -> Iterator[dict]:
    """All rows in order, read one by one. Raises ValueError for a broken file."""
    number = count()
    for path in files:
        with path.open("rb") as file:
            whole = parquet_rows(path) if file.peek(4)[:4] == b"PAR1" or path.suffix == ".parquet" else file
            for place, read in enumerate(whole, 1):
                if not isinstance(read, bytes) or read.strip():
                    named = {"number": next(number), "at": f"{path.name}:{place}", "folder": path.parent}
                    yield checked(read) | named


def parquet_rows(path: Path) -> Iterator:
    try:
        from pyarrow import ArrowException, parquet

        yield from parquet.ParquetFile(path).iter_batches(1)
    except ImportError:
        raise ValueError("pyarrow is not installed; pip install -r examples/requirements.txt") from None
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole parquet file ({one_line(error)}); fetch it again") from None


def checked(read) -> dict:
    """The fields that are filled of a line of JSON or a row of parquet, choices within the question; or the error."""
    group = ""
    try:
        try:
            found = json.loads(read.decode("utf-8-sig")) if isinstance(read, bytes) else read.to_pylist()[0]
        except (ValueError, RecursionError):
            found = None
        need(isinstance(found, dict), NO_ROW)
        if unknown := ", ".join(found.keys() - KINDS.keys()):
            warnings.warn(f"no fields of a row, and not used: {unknown}", stacklevel=2)
        row = {name: value for name in KINDS if (value := bare(found.get(name))) not in (None, "", b"", [])}
        group = str(row.get("group", ""))
        for name, value in row.items():
            kinds = " or ".join(kind.__name__ for kind in KINDS[name])
            need(isinstance(value, KINDS[name]) and not isinstance(value, bool), f"{name} {value!r:.60}: give {kinds}")
        need(("image" in row) != ("frames" in row), "give image or frames, one of them")
        need(bool(row.get("question", "").strip()), "no question")
        return row | {"group": group} | keyed(row)
    except (ValueError, TypeError) as error:
        return {"group": group, "error": one_line(error)}


def keyed(row: dict) -> dict:
    """The question with its choices, and the right answers as texts."""
    keys, shown = row.get("answer"), texts("choices", row.get("choices", []))
    keys, question = texts("answer", keys if isinstance(keys, list) else [keys]), row["question"]
    if shown and not options(question):
        need(1 < len(shown) < 27, f"{len(shown)} choices: give 2 to 26")
        lettered = [f"{chr(ord('A') + n)}. {text}" for n, text in enumerate(shown)]
        question = "\n".join([question, *lettered, "Answer with the letter of the correct option."])
    for key in keys if shown else ():
        fine = normalise(key, question).upper() in options(question)
        need(fine, f"answer {key!r:.60}: give one of the choices, or its letter")
    return {"question": question, "answer": keys}


def texts(name: str, values: list) -> list[str]:
    for value in values:
        fine = isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip()
        need(bool(fine), f"{name} {value!r:.60}: give a text, or a list of them")
    return [" ".join(value.split()) if isinstance(value, str) else f"{value:.12g}" for value in values]


def bare(value):
    """Bytes or a path in the place of {"bytes": …, "path": …}, which the hub's columns of images hold."""
    if isinstance(value, list):
        return [bare(each) for each in value]
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


def index(files: list[Path]) -> tuple[list[dict], str]:
    """All rows, with the texts `look` and `image` in the place of what is looked at; rows of one look have the same.
    And a digest of all."""
    table, whole = [], hashlib.sha256()
    for row in rows(files):
        look = [row.pop(name, None) for name in LOOK]
        look = json.loads(json.dumps(look, default=lambda image: hashlib.sha256(image).hexdigest()))
        folder = str(row.pop("folder"))
        whole.update(json.dumps([look, row]).encode())
        table.append(row | {"look": str([folder, look]), "image": str([folder, look[:2]])})
    fine = any(row.get("error") != NO_ROW for row in table)
    need(fine, f"{files[0]}: neither parquet with rows nor JSON Lines; give a file with one JSON object a line")
    return table, whole.hexdigest()[:16]


# Asking


def jobs(table: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """What each record begins with, `image` being the first row that has the same; of a bad row the whole record.
    Sparsity 0 is asked once, whatever the rules."""
    images: dict[str, int] = {}
    for row in table[: args.limit]:
        image, error = images.setdefault(row["image"], row["number"]), {k: row[k] for k in ("error",) if k in row}
        for sparsity in args.sparsities:
            for rule in args.rules if sparsity else ["dense"]:
                job = {"row": row["number"], "image": image, "group": row["group"], "sparsity": sparsity, "rule": rule}
                yield job | error


def by_job(records: Iterable[dict]) -> dict[tuple, dict]:
    return {(record["row"], record["sparsity"], record["rule"]): record for record in records}


def ask(model: EPVLM, row: dict, those: list[dict], table: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """The records of jobs that share the look of `row`."""
    seen, events, alike = None, None, defaultdict(list)
    for job in those:
        alike[job["sparsity"], job["rule"]].append(job)
    for (sparsity, rule), here in alike.items():
        view = None
        for job in here:
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", UserWarning)
                    if view is None:
                        how = options_of(row, sparsity, rule, args)
                        seen = seen or picture(row, how)
                        events = events or (events_of(row, seen, how, args) if sparsity else None)
                        start = time.perf_counter()
                        view = model.read(model.look(seen, events if sparsity else None, how))
                        if model.weight.is_cuda:
                            torch.cuda.synchronize()
                        start = time.perf_counter() - start
                    found = answer(model, view, table[job["row"]], chosen(args, Sampling))
                found["seconds"] += start
                yield job | found | ({"warning": one_line(caught[0].message)} if caught else {})
            except FAULTS as error:
                yield job | {"error": one_line(error)}


def options_of(row: dict, sparsity: float, rule: str, args: argparse.Namespace) -> Options:
    own = {"sparsity": sparsity} | ({"rule": rule} if sparsity else {})
    if "window" in row:
        own["window"] = tuple(microseconds(str(time)) for time in row["window"])
    if "homography" in row:
        own["homography"] = str(row["folder"] / given) if isinstance(given := row["homography"], str) else given
    if args.camera and "events" not in row:  # these have the image's pixels, and those of a still a clock of their own
        own |= dict.fromkeys(("sensor", "homography") if "frames" in row else ("sensor", "homography", "window"))
    return replace(chosen(args, Options), **own)


def picture(row: dict, how: Options) -> Image.Image | Clip:
    """What is looked at."""
    folder, frames, times, fps = (row.get(name) for name in ("folder", "frames", "times", "fps"))
    if "image" in row:
        return opened(folder, row["image"])
    if isinstance(frames, list):
        need((times is None) != (fps is None), "frames: give times or fps, one of them")
        frames = [partial(opened, folder, each) for each in frames]
        return Clip(frames, np.array(times)) if fps is None else Clip.at_rate(frames, fps)
    named = {"image": folder / frames, "times": times and folder / times, "fps": fps, "frames": None, "frame": None}
    clip = read_input(argparse.Namespace(**named, window=how.window))
    need(isinstance(clip, Clip), f"{frames}: a still image; give it as image")
    return clip


def opened(folder: Path, image: str | bytes) -> Image.Image:
    try:
        return read_image(folder / image if isinstance(image, str) else Image.open(BytesIO(image)))
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise ValueError(f"the image's bytes cannot be read ({one_line(error)})") from None


def events_of(row: dict, seen: Image.Image | Clip, how: Options, args: argparse.Namespace):
    """A recording, or what the event camera makes, or None."""
    if "events" in row:
        return read_events(row["folder"] / row["events"], how.order, how.time_unit)
    frames = movie(seen) if isinstance(seen, Clip) else saccade(np.asarray(seen), args.radius)
    return camera(frames, CameraOptions(args.threshold)) if args.camera else None


def answer(model: EPVLM, view: View, row: dict, sampling: Sampling) -> dict:
    """Asks about what has been read; what a record needs of it."""
    start = time.perf_counter()
    tokens = model.tokens(view, row["question"], sampling)
    first, seconds = next(tokens), time.perf_counter() - start
    text, length = "".join(model.pieces(chain([first], tokens))), len(model.prompt(view, row["question"])[0])
    right = {rule.__name__: any(rule(row["question"], key, text) for key in row["answer"]) for rule in (exact, choice)}
    linear = model.vit.flops(view.keep.sum(dim=(1, 2)).tolist(), view.tokens)[0] + model.llm.flops(length, length)[0]
    costs = {"tokens": view.tokens, "linear": linear, "flops": model.flops(view, row["question"])[0]}
    return {"answer": text, "key": row["answer"], **right, **costs, "seconds": seconds}


# Answers


class Answers:
    """DIR/answers.jsonl: a line with the settings, then one for each answer. Each further process has a file of its own,
    answers.1.jsonl, ...; in the end the first process adds all answers to answers.jsonl."""

    def __init__(self, folder: Path, rank: int, settings: dict):
        """Takes the process's file. Raises ValueError if another run has it."""
        self.path, self.settings = folder / (f"answers.{rank}.jsonl" if rank else "answers.jsonl"), settings
        folder.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.path}: another run is writing it; wait for it, or end it") from None

    def read(self) -> list[dict]:
        """The answers in the folder. Raises ValueError if any were given under other settings. An unfinished last line
        of the own file goes: the process was killed while it wrote."""
        found = []
        for path in parts(self.path.parent):
            was, records = read_answers(path)
            for key, now in self.settings.items() if records else ():
                other = f"made with {key} {was.get(key)!r}, not {now!r}"
                need(was.get(key) == now, f"{path}: {other}; go on with the same, or give another --output")
            if path == self.path:
                self.file.truncate(path.read_bytes().rfind(b"\n") + 1 if records else 0)
            found += records
        return found

    def append(self, record: dict) -> None:
        lines = [record] if os.path.getsize(self.path) else [{"settings": self.settings}, record]
        whole = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        if self.file.write(whole) != len(whole):  # a single write: a kill leaves all or nothing of it
            raise OSError(f"{self.path}: the disk is full; make room, and go on with --resume")


def parts(folder: Path) -> list[Path]:
    return [path for path in (folder / "answers.jsonl", *sorted(folder.glob("answers.[0-9]*.jsonl"))) if path.exists()]


def read_answers(path: Path) -> tuple[dict, list[dict]]:
    """Settings and records, without an unfinished last line. Raises ValueError for anything else."""
    start, (*lines, rest) = b'{"settings": ', path.read_bytes().split(b"\n")
    try:
        need(bool(lines) or rest[: len(start)] == start[: len(rest)], "")
        settings, records = json.loads(lines[0])["settings"] if lines else {}, [json.loads(line) for line in lines[1:]]
        need(isinstance(settings, dict) and all(record.keys() >= RECORD for record in records), "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: holds something else than answers; give another --output") from None
    return settings, records


# The table


def table_of(records: list[dict]) -> str:
    """A row for each sparsity and rule, and below it one for each group."""
    asked = [record for record in records if "error" not in record]
    unit, prefix = scale(max((record["flops"] for record in asked), default=1))
    head = ["sparsity", "rule", "group"]
    head += [text for rule in ("exact", "choice") for text in (f"{rule} % (95 %)", "ahead of dense", "right of asked")]
    head += ["not asked", "tokens", f"{prefix}FLOPs", "first token, s"]
    dense, lines = {record["row"]: record for record in asked if record["rule"] == "dense"}, []
    groups = [None, *sorted({record["group"] for record in records} - {""})]
    settings = dict.fromkeys((record["sparsity"], record["rule"]) for record in records)
    for (sparsity, rule), group in product(settings, groups):
        every = [record for record in records if (record["sparsity"], record["rule"]) == (sparsity, rule)]
        every = [record for record in every if group in (None, record["group"])]
        here = [record for record in every if "error" not in record]
        pairs = [(record, dense[record["row"]]) for record in here if sparsity and record["row"] in dense]
        cells = [f"{sparsity:g}", rule, group or "all"]
        for score in ("exact", "choice"):
            ahead = difference(*(by_image(part, score) for part in zip(*pairs, strict=True))) if pairs else "–"
            right = f"{sum(record[score] for record in here)} of {len(here)}"
            cells += [accuracy(by_image(here, score)), ahead, right]
        tokens, flops, seconds = ([record[key] for record in here] for key in ("tokens", "flops", "seconds"))
        costs = [f"{np.mean(tokens):.1f}", f"{np.mean(flops) / unit:.2f}", f"{np.median(seconds):.3f}"] if here else []
        lines.append([*cells, len(every) - len(here), *(costs or "–––")])
    return markdown(head, lines)


def by_image(records: Iterable[dict], score: str) -> list[tuple[int, int]]:
    """Right and asked of each image."""
    found = defaultdict(list)
    for record in records:
        found[record["image"]].append(record[score])
    return [(sum(right), len(right)) for right in found.values()]


def report(records: list[dict], table: list[dict]) -> None:
    """Prints the table, what could not be asked, and what came with a warning."""
    print(table_of(records))
    for key, title in (("error", "Not asked, and not counted"), ("warning", "Asked with a warning")):
        lines = dict.fromkeys(f"- {table[record['row']]['at']}: {record[key]}" for record in records if key in record)
        print(f"\n{title}:\n\n" + "\n".join(lines) if lines else "", end="\n" if lines else "")


# The command line


def processes(args: argparse.Namespace) -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says, else alone; each takes a device of its own."""
    given = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    rank, world, local = (int(os.environ.get(name, usual)) for name, usual in given)
    if world > 1:
        fine = args.device in (None, "cpu", "cuda")
        need(fine, f"device {args.device}: each process has its own; give cpu or cuda")
        if args.device == "cuda" or (args.device is None and torch.cuda.is_available()):
            args.device = f"cuda:{local}"
            torch.cuda.set_device(local)
        distributed.init_process_group("gloo", timeout=timedelta(days=30))  # they wait for the slowest
    return rank, world


def gathered(records: Iterable[dict], world: int) -> list[dict]:
    """Those of all processes, in each of them."""
    found = [list(records)] * world
    if world > 1:
        distributed.all_gather_object(found, found[0])
    return list(chain(*found))


def run(args: argparse.Namespace) -> None:
    """Asks what has not been asked yet, and prints the table of all answers."""
    options, sampling, _ = (
        chosen(args, Options),
        chosen(args, Sampling),
        next(saccade(np.zeros((1, 1, 3)), args.radius)),
    )
    for sparsity in args.sparsities:
        replace(options, sparsity=sparsity)
    rank, world = processes(args)
    with warnings_as_lines("evaluate"):
        files = find(args.data, args.data_revision)
        table, digest = index(files)
    need(args.resume or not parts(args.output), f"{args.output}: has answers; go on with --resume, or give another")
    gathered([], world)  # all have looked before one makes a file
    settings = {"data": digest, "threshold": CameraOptions(args.threshold).threshold, **vars(options), **vars(sampling)}
    settings |= {name: getattr(args, name) for name in ("model", "revision", "dtype", "camera", "radius")}
    settings = {name: settings[name] for name in settings if name not in ("sparsity", "rule")}  # they may be others
    answers = Answers(args.output, rank, json.loads(json.dumps(settings, default=str)))
    known, todo, looks = by_job(gathered(answers.read(), world)), by_job(jobs(table, args)), defaultdict(list)
    for key, job in todo.items():
        if "error" not in job and key not in known:
            looks[table[job["row"]]["look"]].append(job)
    mine, made = {those[0]["row"]: those for those in list(looks.values())[rank::world]}, []
    model, total = load(args) if mine else None, sum(map(len, mine.values()))
    for row in rows(files) if mine else ():
        for record in ask(model, row, mine.get(row["number"], ()), table, args):
            made.append(record)
            if "error" not in record:
                answers.append(record)
            if rank == 0 and sys.stderr.isatty():
                end = "" if len(made) < total else "\r\033[K"
                print(f"\r\033[K{len(made)} of {total} questions{end}", end="", file=sys.stderr, flush=True)
    known = {**todo, **known, **by_job(gathered(made, world))}
    if rank == 0:
        held = by_job(read_answers(answers.path)[1])
        for key, record in known.items():
            if key not in held and "answer" in record:
                answers.append(record)
        report([known[key] for key in todo], table)


def main(argv: list[str] | None = None) -> int:
    """Asks the questions of a table at each sparsity by each rule; returns the exit status."""
    about = "Measures what sparsity costs on questions of your own."
    parser = Parser("evaluate", description=about, allow_abbrev=False, conflict_handler="resolve")
    add_model(parser)
    for kind in (Options, Sampling):
        add_flags(parser, kind)
    parser.set_defaults(sparsity=Options.sparsity, rule=Options.rule)
    add = parser.add_argument
    add("--data", required=True, help="JSON Lines, parquet, a folder of parquet files, or a dataset of such on the hub")
    add("--data-revision", help="branch, tag or commit of that dataset")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the answers; it may be missing")
    add("--sparsity", dest="sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.7], help="(default: 0 0.5 0.7)")
    add("--rule", dest="rules", choices=tuple(RULES), nargs="+", default=["exact"], help="(default: exact)")
    add("--camera", action="store_true", help="rows without events get those of an event camera, see camera.py")
    add("--radius", type=float, default=RADIUS, help="of its saccade over a still, pixels (default: %(default)s)")
    add("--threshold", type=float, default=CameraOptions.threshold, help="its contrast (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the answers in the folder")
    add("--limit", type=int, help="ask of the first rows only")
    return exit_status("evaluate", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
