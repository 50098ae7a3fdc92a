"""Measures what sparsity costs on your own questions: a table of images, events, questions and answers.

    python examples/evaluate.py --data questions.jsonl --output DIR --sparsity 0 0.5 0.7 --rule exact cover
    torchrun --nproc-per-node 4 examples/evaluate.py ...          the same, the images dealt out to 4 processes

README.md, Your own questions, says what a row may hold, what the table shows, and how --resume goes on.

Glossary
    row      its fields (see KINDS), or `error`, why it cannot be asked; `number` from 0, `at` for messages, `folder`
    look     the fields that say what is looked at (LOOK): it is done once for all questions that share it
    record   one question at one sparsity by one rule (then it is a job), and the answer, or `error`
"""

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from itertools import chain, count, islice, product
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image

import common
from camera import RADIUS, CameraOptions, camera, movie, saccade
from epvlm import EPVLM, Options, Sampling, View, add_flags, chosen, microseconds, read_input, scale
from events import RULES, need, read_events
from realworldqa import choice, exact, normalise, options
from vit import Clip, read_image

KINDS = {"image": (str, bytes), "frames": (str, list), "times": (str, list), "fps": (int, float), "events": (str,),
         "window": (list,), "homography": (str, list), "question": (str,), "answer": (str, int, list),
         "choices": (list,), "group": (str, int)}  # fmt: skip
LOOK = ("image", "frames", "times", "fps", "events", "window", "homography")
NO_ROW = "neither a JSON object nor a readable row of parquet"
SETTING = itemgetter("sparsity", "rule")


def find(data: str, revision: str | None = None) -> list[Path]:
    """The files of a file, a folder, or a dataset on the hub, which is downloaded. Raises ValueError."""
    place = Path(data).expanduser()
    try:
        if not place.exists():
            place = Path(snapshot_download(data, repo_type="dataset", revision=revision, allow_patterns="*.parquet"))
    except Exception as error:  # whatever the hub's client, its network library and the disk raise
        reason = f"{type(error).__name__}: {common.one_line(error)}"
        raise ValueError(f"{data}: neither here nor a dataset that can be downloaded ({reason}); correct it") from None
    files = [place] if place.is_file() else sorted(place.rglob("*.parquet"))
    need(bool(files), f"{data}: no .parquet file in it; give the file, or a folder that holds it")
    return files


def rows(files: list[Path]) -> Iterator[dict]:
    """All rows in order, read one by one. Raises ValueError for a broken file."""
    number = count()
    for path in files:
        with path.open("rb") as file:
            parquet = file.peek(4)[:4] == b"PAR1" or path.suffix == ".parquet"
            for place, read in enumerate(parquet_rows(path) if parquet else file, 1):
                if not (isinstance(read, bytes) and read.isspace()):
                    named = {"number": next(number), "at": f"{path.name}:{place}", "folder": path.parent}
                    yield named | checked(parsed(read))


def parquet_rows(path: Path) -> Iterator:
    with common.reading(path, "requirements.txt"):
        from pyarrow import parquet

        yield from parquet.ParquetFile(path).iter_batches(1)


def parsed(read) -> dict | None:
    """A line of JSON, or a row of parquet, of which other columns may hold what Python lacks; None if it is broken."""
    try:
        if isinstance(read, bytes):
            return json.loads(read)
        return {name: read[n].to_pylist()[0] if name in KINDS else None for n, name in enumerate(read.schema.names)}
    except (ValueError, RecursionError):
        return None


def checked(found) -> dict:
    """The filled fields, the question with its choices, the answer as a list of texts; or the error."""
    row = {"group": ""}
    try:
        need(isinstance(found, dict), NO_ROW)
        if unknown := ", ".join(sorted(found.keys() - KINDS.keys())):
            warnings.warn(f"the data have fields that are not used: {unknown}", stacklevel=2)
        if isinstance(image := found.get("image"), dict):  # as the hub has it
            found["image"] = image.get("bytes") or image.get("path")
        filled = {name: value for name in KINDS if (value := found.get(name)) not in (None, "", b"", [])}
        if type(filled.get("group")) in KINDS["group"]:
            row["group"] = filled["group"] = " ".join(str(filled["group"]).split())
        for name, value in filled.items():
            kinds = " or ".join(kind.__name__ for kind in KINDS[name])
            need(type(value) in KINDS[name], f"{name} {value!r:.60}: give {kinds}")
        need(("image" in filled) != ("frames" in filled), "give image or frames, one of them")
        return filled | row | question_of(filled)
    except (ValueError, TypeError) as error:
        return row | {"error": common.one_line(error)}


def question_of(row: dict) -> dict:
    """The question with its choices, and all answers that count as right. Raises ValueError."""
    question, keys, shown = row.get("question", ""), row.get("answer"), row.get("choices", [])
    keys = keys if isinstance(keys, list) else [keys]
    need(bool(question.strip()), "no question")
    fine = all(type(text) in (str, int) and str(text).strip() for text in keys + shown)
    need(fine, f"answer {keys!r:.60}, choices {shown!r:.60}: give texts")
    keys, shown = ([" ".join(str(text).split()) for text in part] for part in (keys, shown))
    if shown and not options(question):
        need(1 < len(shown) < 27, f"{len(shown)} choices: give 2 to 26")
        lettered = "".join(f"{chr(ord('A') + n)}. {text}\n" for n, text in enumerate(shown))
        question += f"\n{lettered}Answer with the letter of the correct option."
    known = options(question)
    fits = [normalise(key, question).upper() in known for key in keys]
    fits += [known.get(key.upper(), key) == key for key in keys if key in known.values()]  # else another's letter
    need(not shown or all(fits), f"answer {', '.join(keys):.60}: give one of the choices, or its letter")
    return {"question": question, "answer": keys}


def index(files: list[Path]) -> tuple[list[dict], str]:
    """All rows, with a digest in the place of bytes, and as text what is looked at and its image; a digest of all."""
    table, whole = [], hashlib.sha256()
    for row in rows(files):
        folder, image = row.pop("folder"), row.get("image")
        if isinstance(image, bytes):
            row["image"] = hashlib.sha256(image).hexdigest()
        whole.update(json.dumps(row, default=str).encode())
        row["look"] = str([folder, *map(row.get, LOOK)])
        row["image"] = str([not isinstance(image, bytes) and folder, *map(row.get, LOOK[:2])])
        table.append(row)
    fine = any(row.get("error") != NO_ROW for row in table)
    need(fine, f"{files[0]}: no rows in it; give JSON Lines, one object a line, or parquet")
    return table, whole.hexdigest()[:16]


# Asking


def jobs(table: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """What each record begins with, `image` being the first row that has the same; of a bad row the whole record.
    Sparsity 0 is asked once, whatever the rules."""
    images: dict[str, int] = {}
    for row in table[: args.limit]:
        about = {"row": row["number"], "image": images.setdefault(row["image"], row["number"]), "group": row["group"]}
        for sparsity in args.sparsities:
            for rule in args.rules if sparsity else ["dense"]:
                bad = {"error": row["error"]} if "error" in row else {}
                yield {**about, "sparsity": sparsity, "rule": rule, **bad}


def asked(mine: dict[int, list[dict]], table: list[dict], files: list[Path], args) -> Iterator[dict]:
    """The records of jobs by the number of a row that has their look."""
    model, dark = common.load(args), sum("events" not in row for row in table[: args.limit] if "error" not in row)
    if dark and not args.camera and any(args.sparsities) and set(args.rules) != {"cover"}:
        told = "only the rule cover drops any of their patches; --camera makes events"
        warnings.warn(f"rows without events: {dark}; {told}", stacklevel=2)
    for row in islice(rows(files), max(mine) + 1):  # once more, for the images
        yield from ask(model, row, mine.get(row["number"], []), table, args)


def ask(model: EPVLM, row: dict, those: list[dict], table: list[dict], args: argparse.Namespace) -> Iterator[dict]:
    """The records of jobs that share the look of `row`."""
    seen, events, last = None, None, None
    for job in sorted(those, key=SETTING):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                if last != SETTING(job):
                    how = options_of(row, job, args)
                    seen = seen or picture(row, how)
                    events = events or (events_of(row, seen, how, args) if how.sparsity else None)
                    start = time.perf_counter()
                    view = model.read(model.look(seen, events, how))
                    if model.weight.is_cuda:
                        torch.cuda.synchronize(model.weight.device)
                    start, last = time.perf_counter() - start, SETTING(job)
                found = answer(model, view, table[job["row"]], chosen(args, Sampling))
            found["seconds"] += start
            yield job | found | ({"warning": common.one_line(caught[0].message)} if caught else {})
        except Exception as error:  # whatever is wrong with a row, the others are asked
            yield job | {"error": common.one_line(error)}


def options_of(row: dict, job: dict, args: argparse.Namespace) -> Options:
    own = {"sparsity": job["sparsity"]} | ({"rule": job["rule"]} if job["sparsity"] else {})
    if "window" in row:
        start, end = (microseconds(str(time)) for time in row["window"])
        own["window"] = start, end
    if given := row.get("homography"):
        own["homography"] = str(row["folder"] / given) if isinstance(given, str) else given
    if args.camera and "events" not in row:  # these have the image's pixels, and those of a still a clock of their own
        own |= dict.fromkeys(("sensor", "homography") if "frames" in row else ("sensor", "homography", "window"))
    return replace(chosen(args, Options), **own)


def picture(row: dict, how: Options, most: int | None = None) -> Image.Image | Clip:
    """What is looked at; of a clip from a file `most` frames, see `read_input`."""
    folder, image, frames, times, fps = (row.get(name) for name in ("folder", "image", "frames", "times", "fps"))
    if image:  # a path or bytes
        return read_image(folder / image if isinstance(image, str) else BytesIO(image))
    if isinstance(frames, str):
        named = {"image": folder / frames, "times": times and folder / times, "fps": fps, "frames": most}
        return read_input(argparse.Namespace(**named, frame=None, window=how.window))
    need((times is None) != (fps is None), "frames: give times or fps, one of them")
    frames = [folder / each for each in frames]
    return Clip.at_rate(frames, fps) if times is None else Clip(frames, np.array(times))


def events_of(row: dict, seen: Image.Image | Clip, how: Options, args: argparse.Namespace):
    """A recording, or what the event camera makes of the still, or of all frames; or None."""
    if "events" in row:
        return read_events(row["folder"] / row["events"], how.order, how.time_unit)
    if not args.camera:
        return None
    frames = movie(picture(row, how, sys.maxsize)) if "frames" in row else saccade(np.asarray(seen), args.radius)
    return camera(frames, CameraOptions(args.threshold))


def answer(model: EPVLM, view: View, row: dict, sampling: Sampling) -> dict:
    """Asks about what has been read; what a record needs of it."""
    start, question = time.perf_counter(), row["question"]
    tokens = model.tokens(view, question, sampling)
    first, seconds = next(tokens), time.perf_counter() - start
    text, length = "".join(model.pieces(chain([first], tokens))), len(model.prompt(view, question)[0])
    right = {rule.__name__: any(rule(question, key, text) for key in row["answer"]) for rule in (exact, choice)}
    linear = model.vit.flops(view.keep.sum(dim=(1, 2)).tolist(), view.tokens)[0] + model.llm.flops(length, length)[0]
    costs = {"tokens": view.tokens, "linear": linear, "flops": model.flops(view, question)[0], "seconds": seconds}
    return {"answer": text, "key": row["answer"], **right, **costs}


# The table


def table_of(records: list[dict]) -> tuple[list[str], list[list]]:
    """Its head and its rows: for each sparsity and rule, and below for each group."""
    asked, lines = [record for record in records if "error" not in record], []
    unit, prefix = scale(max((record["flops"] for record in asked), default=1))
    scores = [f"{score} % (95 %)|beside dense|right of asked" for score in ("exact", "choice")]
    head = ["sparsity|rule|group", *scores, f"not asked|tokens|{prefix}FLOPs|linear {prefix}FLOPs|first token, s"]
    dense = {record["row"]: record for record in asked if record["rule"] == "dense"}
    groups = [None, *sorted({record["group"] for record in records} - {""})]
    for setting, group in product(dict.fromkeys(map(SETTING, records)), groups):
        every = [each for each in records if SETTING(each) == setting and group in (None, each["group"])]
        here = [record for record in every if "error" not in record]
        pairs = [(record, dense[record["row"]]) for record in here if setting[0] and record["row"] in dense]
        cells = [f"{setting[0]:g}", setting[1], group or "all"]
        for score in ("exact", "choice"):
            both = [common.by_image(part, score) for part in zip(*pairs, strict=True)]
            right = f"{sum(record[score] for record in here)} of {len(here)}"
            cells += [common.accuracy(common.by_image(here, score)), common.difference(*both) if both else "–", right]
        lines.append([*cells, len(every) - len(here), *"––––"])
        if here:
            tokens, flops, linear = (np.mean([each[key] for each in here]) for key in ("tokens", "flops", "linear"))
            seconds = np.median([each["seconds"] for each in here])
            lines[-1][-4:] = f"{tokens:.1f}", f"{flops / unit:.4g}", f"{linear / unit:.4g}", f"{seconds:.3f}"
    return "|".join(head).split("|"), lines


def report(records: list[dict], table: list[dict]) -> None:
    """Prints the table, what could not be asked, and what came with a warning."""
    if hasattr(sys.stdout, "reconfigure"):  # whatever the locale and the data
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    print(common.markdown(*table_of(records)))
    for key, title in (("error", "Not asked, and not counted"), ("warning", "Asked with a warning")):
        lines = dict.fromkeys(f"- {table[record['row']]['at']}: {record[key]}" for record in records if key in record)
        if lines:
            print("", f"{title}:", "", *lines, sep="\n")


# The command line


def settings_of(args: argparse.Namespace) -> dict:
    """What answers depend on but data, sparsity and rule, as JSON gives it back. Raises ValueError for bad flags."""
    for sparsity in args.sparsities:
        options = replace(chosen(args, Options), sparsity=sparsity)
    next(saccade(np.zeros((1, 1, 3)), args.radius))
    need(args.limit is None or args.limit > 0, f"limit {args.limit}: give 1 or more")
    found = {name: getattr(args, name) for name in ("model", "revision", "dtype", "camera", "radius")}
    found |= {**vars(CameraOptions(args.threshold)), **vars(options), **vars(chosen(args, Sampling))}
    del found["sparsity"], found["rule"]
    return json.loads(json.dumps(found))


@common.warnings_as_lines("evaluate")
def run(args: argparse.Namespace) -> None:
    """Asks what has not been asked yet, and prints the table."""
    settings = settings_of(args)
    rank, world = common.process(args.device)
    if rank:
        warnings.simplefilter("ignore")  # the first process warns
    files = find(args.data, args.data_revision)
    table, settings["data"] = index(files)
    same = all(each == settings for each in common.gathered([settings], world))
    need(same, f"{args.data}: machines have other rows or settings; give all the same")
    answers = common.Answers(args.output, rank, settings)
    known, todo = common.by_job(common.gathered(answers.known, world)), common.by_job(jobs(table, args))
    need(args.resume or not known, f"{args.output}: has answers already; add --resume, or give another --output")
    looks = defaultdict(list)
    for key, job in todo.items():
        if "error" not in job and "answer" not in known.get(key, {}):
            looks[table[job["row"]]["look"]].append(job)
    mine = {those[0]["row"]: those for those in list(looks.values())[rank::world]}
    made, total = [], sum(map(len, mine.values()))
    for record in asked(mine, table, files, args) if mine else ():
        made.append(record)
        answers.add(record)
        if rank == 0 and sys.stderr.isatty():
            end = "\r\033[K" * (len(made) == total)
            print(f"\r\033[K{len(made)} of {total} questions", end=end, file=sys.stderr, flush=True)
    known = todo | common.by_job([*known.values(), *common.gathered(made, world)])
    if rank == 0:
        for record in known.values():
            answers.add(record)
        report(sorted((known[key] for key in todo), key=itemgetter("row")), table)


def main(argv: list[str] | None = None) -> int:
    """Measures what sparsity costs on questions of your own."""
    parser = common.Parser("evaluate", description=main.__doc__, allow_abbrev=False, conflict_handler="resolve")
    common.add_model(parser)
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
    return common.exit_status("evaluate", lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
