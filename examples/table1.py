"""Table 1 of the paper: what Qwen2-VL costs at each sparsity, and how well it answers RealWorldQA.

    python examples/table1.py costs
    python examples/table1.py accuracy --model Qwen/Qwen2-VL-2B-Instruct --data xai-org/RealworldQA
    torchrun --nproc-per-node 4 examples/table1.py accuracy ...         the same, the rows dealt out to 4 processes

`costs` needs no weights. `accuracy` needs `pip install -r examples/requirements.txt`. The tables go to standard output,
as Markdown; realworldqa.py has the scoring rules, `exact` and `choice`.

Two counts of FLOPs, a multiply-add being two
    linear           linear layers only, lm_head at every position: what the paper's counter saw, since it does not look
                     into fused attention
    all              what runs up to the first token of the answer: attention too, but lm_head and the last layer's
                     queries and MLP at the last position alone
MACs are half of each.

RealWorldQA has no events: without recordings (--events) the event camera of camera.py makes them from the still image
and a small saccade. Every answer is at once a line of the file that --answers names, so that --resume goes on after an
interruption at any moment. Seconds are those of mask, prompt and answer, without those of making the events.
"""

import argparse
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from camera import RADIUS, CameraOptions, camera, saccade
from common import Parser, accuracy, add_model, check_output, exit_status
from epvlm import EPVLM, Options, Sampling, add_flags, chosen
from events import EventMap, Events, budget, read_events
from llm import Decoder, DecoderConfig
from vit import VisionConfig, VisionTransformer, read_image

try:
    import realworldqa
except ModuleNotFoundError as error:
    if error.name != "pyarrow":
        raise
    realworldqa = None  # then `costs` alone

MODELS = {
    "2B": DecoderConfig(151936, 1536, 8960, 28, 12, 2, rms_norm_eps=1e-6, tie_word_embeddings=True),
    "7B": DecoderConfig(152064, 3584, 18944, 28, 28, 4, rms_norm_eps=1e-6),
    "72B": DecoderConfig(152064, 8192, 29568, 80, 64, 8, rms_norm_eps=1e-6),
}
SPARSITIES = (0.0, 0.3, 0.5, 0.7)
ENCLOSING = 2  # tokens of text that enclose the image: <|vision_start|> and <|vision_end|>


@dataclass(frozen=True)
class Printed:
    """A row of the paper's Table 1."""

    params: float  # billions
    accuracy: float  # per cent
    flops: float  # T
    macs: float  # T


PAPER = {
    ("2B", 0.0): Printed(2.21, 62.9, 14.7, 7.4),
    ("2B", 0.3): Printed(2.21, 62.7, 10.3, 5.2),
    ("2B", 0.5): Printed(2.21, 61.4, 7.4, 3.7),
    ("2B", 0.7): Printed(2.21, 59.1, 4.5, 2.2),
    ("7B", 0.0): Printed(8.29, 70.1, 31.1, 15.5),
    ("7B", 0.3): Printed(8.29, 67.3, 24.7, 12.3),
    ("7B", 0.5): Printed(8.29, 67.2, 17.9, 8.9),
    ("7B", 0.7): Printed(8.29, 64.8, 11.1, 5.5),
}


# Costs


def modules(config: DecoderConfig) -> tuple[VisionTransformer, Decoder]:
    """Our own modules at a published size, on the meta device: shapes without weights."""
    with torch.device("meta"):
        return VisionTransformer(VisionConfig(hidden_size=config.hidden_size)), Decoder(config)


def both_counts(vit: VisionTransformer, llm: Decoder, patches: int, groups: int, text: int) -> tuple[int, int]:
    """FLOPs of a prompt by the two counts, "linear" and "all". text: its tokens besides the `groups` of the image."""
    tokens, seen = groups + text, vit.flops([patches], groups)
    return seen[0] + llm.flops(tokens, scored=tokens)[0], sum(seen) + sum(llm.flops(tokens))


def costs(patches: int, text: int) -> None:
    if patches < 4 or patches % 4 or text < 1:
        raise ValueError(f"patches {patches} and text {text}: give a multiple of 4, and 1 or more")
    print(f"{patches} patches ({patches // 4} tokens), {text} tokens of text and {ENCLOSING} that enclose the image.\n")
    heads = ["model", "sparsity", "params B", "paper"]
    heads += [f"{unit} T {which}" for unit in ("FLOPs", "MACs") for which in ("linear", "paper", "difference", "all")]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    remarks = []
    for name, config in MODELS.items():
        vit, llm = modules(config)
        params = sum(parameter.numel() for part in (vit, llm) for parameter in part.parameters()) / 1e9
        found = {}
        for sparsity in SPARSITIES:
            groups = budget(patches // 4, 1 - sparsity)
            found[sparsity] = [n / 1e12 for n in both_counts(vit, llm, 4 * groups, groups, text + ENCLOSING)]
            print(f"| {' | '.join(cost_cells(name, sparsity, params, *found[sparsity]))} |")
        remarks += misfits(name, found)
        saved = (f"{1 - found[0.5][n] / found[0.0][n]:.1%}" for n in (0, 1))
        remarks.append("{}: sparsity 0.5 saves {} of the linear layers' FLOPs, {} of all.".format(name, *saved))
    for name, how in (("2B", "as parts of the dense one"), ("7B", "in points")):
        dense, half = (PAPER[name, sparsity].accuracy for sparsity in (0.0, 0.5))
        lost = f"at 0.5 {dense - half:.1f} points, {(dense - half) / dense:.1%} of {dense}"
        remarks.append(f"{name}: the paper prints losses of accuracy {how}; {lost}.")
    print("\n" + "\n".join(f"- {line}" for line in remarks))


def cost_cells(name: str, sparsity: float, params: float, linear: float, everything: float) -> list[str]:
    printed = PAPER.get((name, sparsity))
    cells = [name, f"{sparsity:g}", f"{params:.2f}", f"{printed.params:.2f}" if printed else "–"]
    for share, paper in ((1, printed and printed.flops), (0.5, printed and printed.macs)):
        beside = [f"{paper:.1f}", f"{share * linear - paper:+.2f}"] if printed else ["–", "–"]
        cells += [f"{share * linear:.2f}", *beside, f"{share * everything:.2f}"]
    return cells


def misfits(name: str, found: dict[float, list[float]]) -> Iterator[str]:
    """Cells of the paper that are not what its count gives, to the digit."""
    for sparsity, (linear, _) in found.items():
        if printed := PAPER.get((name, sparsity)):
            for what, paper, ours in (("FLOPs", printed.flops, linear), ("MACs", printed.macs, linear / 2)):
                if f"{ours:.1f}" != f"{paper:.1f}":
                    yield f"{name} at {sparsity:g}: the paper prints {paper} T {what}, its count gives {ours:.2f}."


# Accuracy


def run(args: argparse.Namespace) -> None:
    """Asks what has not been asked yet, and prints the table of all answers."""
    check(args)
    rank, world, device = processes(args.device)
    recordings = recorded(args.events) if args.events else None
    files = realworldqa.find(args.data, args.data_revision)
    total = realworldqa.count(files)
    answers = realworldqa.Answers(args.answers, rank, {"rows": total, **settings(args)})
    if not args.resume:
        answers.refuse_old()
    shared([], world)  # all have looked before one makes a file
    answers.open()
    known = shared(answers.read(), world)
    units = [(row, sparsity) for row in range(min(args.limit or total, total)) for sparsity in args.sparsity]
    mine = deal([unit for unit in units if "exact" not in known.get(unit, {})], rank, world)  # errors are tried again
    model = EPVLM.from_pretrained(args.model, args.revision, device, args.dtype)
    own = []
    for number, row in realworldqa.rows(files, set(mine)):
        for record in ask(model, row, mine[number], partial(events_of, args, recordings, number), args):
            own.append({"row": number, **record})
            answers.append(own[-1])
            if sys.stderr.isatty() and rank == 0:
                show([*known.values(), *own], len(own), sum(map(len, mine.values())))
    known = shared([*known.values(), *own], world)
    if rank == 0:
        answers.join([known[unit] for unit in sorted(known)])
    if world > 1:
        dist.barrier()  # only when it is joined may the others' files go
        dist.destroy_process_group()
    if rank:
        answers.own.unlink(missing_ok=True)
    else:
        params = sum(parameter.numel() for part in (model.vit, model.llm) for parameter in part.parameters())
        report([known[unit] for unit in units], args.sparsity, params)


def deal(units: list[tuple[int, float]], rank: int, world: int) -> dict[int, list[float]]:
    """The rows of this process, dealt out like cards, each with its sparsities."""
    pending: dict[int, list[float]] = {}
    for row, sparsity in units:
        pending.setdefault(row, []).append(sparsity)
    return {row: pending[row] for row in list(pending)[rank::world]}


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags out of range or out of place, before any work."""
    if realworldqa is None:
        raise ValueError("pyarrow is not installed; pip install -r examples/requirements.txt")
    args.sparsity = list(dict.fromkeys(args.sparsity))
    for sparsity in args.sparsity:
        options(args, sparsity)
    chosen(args, Sampling)
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit {args.limit}: give 1 or more")
    if args.events is None and (args.sensor or args.window or args.time_unit or args.order):
        raise ValueError("sensor, window, time_unit and order are for recorded events; leave them out")
    check_output(args.answers)
    CameraOptions(args.threshold)
    next(saccade(np.zeros((1, 1, 3)), args.radius))


def options(args: argparse.Namespace, sparsity: float) -> Options:
    return chosen(argparse.Namespace(**{**vars(args), "sparsity": sparsity}), Options)


def settings(args: argparse.Namespace) -> dict:
    """What answers depend on, as JSON gives it back."""
    names = ["model", "revision", "data", "data_revision", "events", "radius", "threshold", "dtype"]
    names += [each.name for kind in (Options, Sampling) for each in fields(kind) if each.name != "sparsity"]
    return json.loads(json.dumps({name: getattr(args, name) for name in names}, default=str))


def processes(device: str | None) -> tuple[int, int, str | None]:
    """This process's rank, how many there are, and its device: as torchrun says, else alone."""
    rank, world, local = (
        int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if world > 1:
        gpu = device == "cuda" or (device is None and torch.cuda.is_available())
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device {device}: among several processes each has its own; give cpu or cuda")
        device = f"cuda:{local}" if gpu else "cpu"
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=30))  # they wait for the slowest
    return rank, world, device


def shared(records: list[dict], world: int) -> dict[tuple[int, float], dict]:
    """The records of all processes, by row and sparsity; an answer counts more than an error."""
    parts = [records]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, records)
    found = sorted((record for part in parts for record in part), key=lambda record: "exact" in record)
    return {(record["row"], record["sparsity"]): record for record in found}


def recorded(folder: Path) -> dict[int, Path]:
    """Recordings by the number of their row, counted from 0: 7.npy, 00007.npy or 7.npz."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.np[yz]")):
        if path.stem.isdecimal() and found.setdefault(int(path.stem), path) != path:
            raise ValueError(f"{path}: row {int(path.stem)} has {found[int(path.stem)].name} already; remove one")
    if not found:
        raise ValueError(f"{folder}: no recording named by its row, such as 0.npy; give their folder")
    return found


def events_of(args, recordings: dict[int, Path] | None, number: int, image: Image.Image) -> Events | EventMap:
    """The recording of a row; without recordings the event camera's, of a saccade over its image."""
    if recordings is None:
        return camera(saccade(np.asarray(image), args.radius), CameraOptions(args.threshold))
    if number not in recordings:
        raise ValueError(f"{args.events}: no recording of row {number}")
    return read_events(recordings[number], args.order, args.time_unit)


def ask(model: EPVLM, row, sparsities: list[float], find: Callable, args) -> Iterator[dict]:
    """The answers about a realworldqa.Row at each sparsity; where it is bad, what is wrong with it. find: gives the
    events of its image."""
    events = None
    for sparsity in sparsities:
        try:
            if isinstance(row, ValueError):
                raise row
            row = row._replace(image=read_image(row.image))
            if sparsity and events is None:
                events = find(row.image)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                record = answer(
                    model, row, events if sparsity else None, options(args, sparsity), chosen(args, Sampling)
                )
            yield {"sparsity": sparsity, **record} | ({"warning": str(caught[0].message)} if caught else {})
        except (ValueError, MemoryError, torch.OutOfMemoryError) as error:
            yield {"sparsity": sparsity, "error": " ".join(str(error).split())[:300] or type(error).__name__}


def answer(model: EPVLM, row, events, options: Options, sampling: Sampling) -> dict:
    """Asks about a row once; what the table needs of it."""
    start = time.perf_counter()
    view = model.look(row.image, events, options)
    text = "".join(model.stream(view, row.question, sampling))
    seconds = time.perf_counter() - start
    groups, asked = int(view.groups.sum()), (row.question, row.answer, text)
    others = len(model.prompt(view, row.question)[0]) - groups  # tokens
    linear, everything = both_counts(model.vit, model.llm, len(view.patches), groups, others)
    return {"answer": text, "key": row.answer, "exact": realworldqa.exact(*asked), "choice": realworldqa.choice(*asked),
            "tokens": groups, "of": view.groups.numel(), "linear": linear, "all": everything,
            "seconds": round(seconds, 4)}  # fmt: skip


def show(records: list[dict], done: int, total: int) -> None:
    """The bar on a terminal, with the accuracy by `exact` so far at each sparsity."""
    right: dict[float, list[bool]] = {}
    for record in records:
        right.setdefault(record["sparsity"], []).extend([record["exact"]] if "exact" in record else [])
    shares = " ".join(
        f"{sparsity:g}: {100 * np.mean(known):.1f} %" for sparsity, known in sorted(right.items()) if known
    )
    bad = sum("error" in record for record in records)
    line = f"[{'#' * (10 * done // total):10}] {done}/{total} {shares}{f' bad: {bad}' if bad else ''}"
    width = shutil.get_terminal_size().columns
    end = "" if done < total else "\r\033[K"
    print(f"\r\033[K{line[: width - 1]}{end}", end="", file=sys.stderr, flush=True)


def report(records: list[dict], sparsities: list[float], params: int) -> None:
    """Prints the table, what could not be asked, and what came with a warning. ValueError if nothing could be asked."""
    answered = [record for record in records if "exact" in record]
    failed, warned = ([r for r in records if key in r] for key in ("error", "warning"))
    if not answered:
        raise ValueError(f"no question could be asked; row {failed[0]['row']}: {failed[0]['error']}")
    print(table(answered, sparsities, params))
    if failed:
        bad, first = len({record["row"] for record in failed}), f"row {failed[0]['row']}: {failed[0]['error']}"
        print(f"\nNot asked and not counted: {len(failed)} questions of {bad} bad rows; {first}")
    if warned:
        print(f"\nAsked with a warning: {len(warned)} questions; row {warned[0]['row']}: {warned[0]['warning']}")


def table(answered: list[dict], sparsities: list[float], params: int) -> str:
    """Markdown: a row for each sparsity."""
    heads = ("sparsity", "params B", "paper", "exact % (95 %)", "right of asked", "choice % (95 %)", "right of asked",
             "paper", "tokens", "of", "FLOPs T linear", "paper", "MACs T linear", "paper", "FLOPs T all",
             "s a question")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    name = next((name for (name, _), printed in PAPER.items() if printed.params == round(params / 1e9, 2)), None)
    for sparsity in sparsities:
        here = [record for record in answered if record["sparsity"] == sparsity]
        if not here:
            continue
        mean = {key: np.mean([record[key] for record in here]) for key in ("tokens", "of", "linear", "all")}
        paper = vars(PAPER.get((name, sparsity), Printed("–", "–", "–", "–")))
        cells = [f"{sparsity:g}", f"{params / 1e9:.2f}", paper["params"]]
        for rule in ("exact", "choice"):
            right = [record[rule] for record in here]
            cells += [accuracy([(ok, 1) for ok in right]), f"{sum(right)} of {len(right)}"]
        cells += [paper["accuracy"], f"{mean['tokens']:.1f}", f"{mean['of']:.1f}"]
        cells += [f"{mean['linear'] / 1e12:.4g}", paper["flops"], f"{mean['linear'] / 2e12:.4g}", paper["macs"]]
        cells += [f"{mean['all'] / 1e12:.4g}", f"{np.median([record['seconds'] for record in here]):.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    about = "The paper's Table 1: costs, and accuracy on RealWorldQA."
    parser = Parser("table1", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="costs | accuracy")
    about = "parameters, FLOPs and MACs; needs no weights"
    add = commands.add_parser("costs", help=about, allow_abbrev=False).add_argument
    add("--patches", type=int, default=7056, help="of the dense image (default: %(default)s)")
    add("--text", type=int, default=60, help="tokens of text (default: %(default)s)")
    about = "asks the questions of RealWorldQA"
    asked = commands.add_parser("accuracy", help=about, allow_abbrev=False, conflict_handler="resolve")
    add_model(asked)
    add_flags(asked, Options)
    add_flags(asked, Sampling)
    add = asked.add_argument
    add("--sparsity", type=float, nargs="+", default=list(SPARSITIES), help="one or more (default: 0 0.3 0.5 0.7)")
    add("--data", required=True, help="parquet file, folder of such, or dataset on the hub (xai-org/RealworldQA)")
    add("--data-revision", help="branch, tag or commit of that dataset")
    add("--answers", type=Path, default=Path("answers.jsonl"), help="file of all answers (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the answers of an interrupted run")
    add("--limit", type=int, help="ask of the first rows only")
    add("--events", type=Path, help="folder of recordings, 0.npy, 1.npy, ... by row (default: the event camera's)")
    add("--radius", type=float, default=RADIUS, help="of the event camera's saccade, pixels (default: %(default)s)")
    add("--threshold", type=float, default=CameraOptions.threshold, help="the event camera's (default: %(default)s)")
    args = parser.parse_args(argv)
    return exit_status("table1", lambda: costs(args.patches, args.text) if args.command == "costs" else run(args))


if __name__ == "__main__":
    sys.exit(main())
