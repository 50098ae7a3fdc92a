"""The paper's figures, of one's own input.

    python examples/figures.py picture image.png events.npy -o picture.png
    python examples/figures.py compare image.png events.npy "What is moving?"

`picture` draws Fig. 1: the image as the model gets it, the events over it, and what is kept. `compare` answers as in
Fig. 2 and 3, from the dense image first, then from the packed one: the answers go to standard output, and a table of
what dropping saves to standard error. With `--model examples/tiny` both run in seconds and download nothing.

Columns of the table
    first token, s   seconds from the image and events in memory: choosing, packing, the transformer, the first token
    answer, s        the same to the last token
    FLOPs            up to the first token, attention included
"""

import argparse
import math
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import Parser, add_model, check_output, exit_status, load, warnings_as_lines, write_whole
from epvlm import (
    EPVLM,
    Options,
    Sampling,
    View,
    add_flags,
    add_input,
    announce,
    chosen,
    evenly,
    read_input,
    scale,
    show,
)
from events import event_maps, read_events, resize
from vit import Clip

ON, OFF, DROPPED = "#ff2010", "#1060ff", "#103028"  # colours of a picture; both polarities at once are purple


# Fig. 1


def picture(model: EPVLM, image, events, options: Options) -> Image.Image:
    """The image as the model gets it; the events over it, on in red and off in blue; the image with what is dropped
    darkened. Below, the counts. Of a clip, the first frame of each moment, or of eight moments that are evenly chosen,
    from left to right. image, events, options: as in `EPVLM.look`, which raises and warns."""
    clip = Clip.of(image).within(options.window)
    events = None if events is None else read_events(events, options.order, options.time_unit)
    view = model.look(clip, events, options)
    H, W = (model.vit.config.patch_size * side for side in view.keep.shape[1:])  # pixels
    if events is not None:
        with warnings.catch_warnings(action="ignore"):  # `look` has given them
            mapped, size = options.homography, clip.size
            moments = events.align(size, options.sensor, mapped is not None).cut(clip.edges)
            maps = (event_maps(moments, p, options.hot_pixels, mapped, size)[0] for p in ("count", "signed"))
            E_v = list(zip(*maps, strict=True))
    columns = []
    for moment in evenly(clip.moments, 8):
        seen = Image.fromarray(clip.pixels(moment, H, W)[0].numpy())
        middle = seen.convert("L").convert("RGB")
        if events is not None:
            draw_events(middle, *(resize(each, H, W) for each in E_v[moment]))
        columns.append((seen, middle, darken(seen, view.keep[moment].numpy())))
    legend = "events" if events is None else "events, red on, blue off"
    if clip.still:
        return grid(columns, f"{view}\nleft: the image; middle: {legend}; right: dropped patches darkened")
    return grid(
        list(zip(*columns, strict=True)), f"{view}\ntop: the frames; middle: {legend}; below: dropped patches darkened"
    )


def draw_events(image: Image.Image, count: np.ndarray, signed: np.ndarray) -> None:
    """Draws E_v over an image, by its two polarities, (H, W) each: the colour is the share of on, the strength is the
    count beside that of busy pixels."""
    count = np.abs(count)
    strength = count / (np.quantile(count[count > 0], 0.9) if count.any() else 1)
    on = grey((count + signed) / np.where(count > 0, 2 * count, 1))
    colours = Image.composite(*(Image.new("RGB", image.size, colour) for colour in (ON, OFF)), on)
    image.paste(colours, mask=grey((count > 0) * (0.3 + 0.7 * strength.clip(0, 1))))


def darken(image: Image.Image, keep: np.ndarray) -> Image.Image:
    """The image with the patches dark that `keep` (grid_h, grid_w) bool drops."""
    dark = Image.blend(image, Image.new("RGB", image.size, DROPPED), 0.75)
    return Image.composite(image, dark, grey(keep).resize(image.size, Image.Resampling.NEAREST))


def grey(values: np.ndarray) -> Image.Image:
    """0 to 1 as 8-bit grey."""
    return Image.fromarray(np.rint(255 * values).astype(np.uint8))


def grid(rows: list[tuple[Image.Image, ...]], caption: str) -> Image.Image:
    """Rows of panels of one size, the caption below."""
    width, height = rows[0][0].size
    gap, font = max(8, width // 32), ImageFont.load_default(max(14, width // 20))
    *_, across, down = map(math.ceil, ImageDraw.Draw(rows[0][0]).multiline_textbbox((0, 0), caption, font))
    across, bottom = max(len(rows[0]) * (width + gap), across + gap), len(rows) * (height + gap)
    whole = Image.new("RGB", (across + gap, bottom + down + 2 * gap), "white")
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            whole.paste(panel, (gap + c * (width + gap), gap + r * (height + gap)))
    ImageDraw.Draw(whole).multiline_text((gap, bottom + gap), caption, "black", font)
    return whole


# Fig. 2 and 3


class Look(NamedTuple):
    view: View
    seconds: float  # that it took to look


class Cost(NamedTuple):
    patches: int
    tokens: int
    flops: int
    first: float  # seconds to the first token
    whole: float  # seconds to the last


def look(model: EPVLM, name: str, image, events, options: Options) -> Look:
    start = time.perf_counter()
    try:
        view = model.look(image, events, options)
    except ValueError as error:
        raise ValueError(f"the {name} answer: {error}") from None
    return Look(view, time.perf_counter() - start)


def warm_up(model: EPVLM, question: str) -> None:
    """Answers from one group, so that what is timed after it finds weights and libraries in memory."""
    view = model.look(Image.new("RGB", (28, 28)), np.ones((28, 28)), Options(min_pixels=1, system=""))
    list(model.tokens(view, question, Sampling(max_new_tokens=1)))


def compare(model: EPVLM, dense: Look, packed: Look, question: str, sampling: Sampling) -> str:
    """Prints the dense answer, then the packed one; returns the table of what they cost. Raises ValueError, before
    either, where one has no room."""
    looks, flops, costs = {"dense": dense, "packed": packed}, {}, []
    for name, each in looks.items():
        try:
            flops[name] = model.flops(each.view, question)
        except ValueError as error:
            raise ValueError(f"the {name} answer: {error}") from None
    for name, each in looks.items():
        announce(model, each.view, flops[name])
        ends = show(model, each.view, question, sampling, start=time.perf_counter() - each.seconds)
        costs.append(Cost(len(each.view.patches), each.view.tokens, flops[name][0], *ends))
    return table(*costs)


def table(dense: Cost, packed: Cost) -> str:
    """What the two cost, and the ratios."""
    unit, prefix = scale(dense.flops)
    lines = [f"{'':6}  patches   tokens  {prefix}FLOPs  first token, s  answer, s"]
    for name, cost in (("dense", dense), ("packed", packed)):
        counts = f"{name:6}{cost.patches:9}{cost.tokens:9}{cost.flops / unit:8.2f}"
        lines.append(f"{counts}{cost.first:16.3f}{cost.whole:11.3f}")
    ratios = (p / d for p, d in zip(packed, dense, strict=True))
    return "\n".join([*lines, "{:6}{:9.2f}{:9.2f}{:8.2f}{:16.2f}{:11.2f}".format("ratio", *ratios)])


# The command line. What is small is read first: a mistake there should not wait for a download.


def run_picture(args: argparse.Namespace) -> None:
    check_output(args.output, ".png", (args.image, args.events))
    with warnings_as_lines("figures"):
        image, options = read_input(args), chosen(args, Options)
        events = None if args.events == "none" else read_events(args.events, options.order, options.time_unit)
        drawn = picture(load(args), image, events, options)
    write_whole(args.output, lambda file: drawn.save(file, "PNG"))


def run_compare(args: argparse.Namespace) -> None:
    if args.events == "none" and args.rule != "cover":
        raise ValueError("compare needs events, or the rule cover; give a recording or an event map")
    with warnings_as_lines("figures"):
        image, options, sampling = read_input(args), chosen(args, Options), chosen(args, Sampling)
        events = None if args.events == "none" else read_events(args.events, options.order, options.time_unit)
        model = load(args)
        warm_up(model, args.question)
        dense = look(model, "dense", image, None, replace(options, rule="exact"))
        packed = look(model, "packed", image, events, options)
    print(compare(model, dense, packed, args.question, sampling), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Draws a picture or compares two answers; returns the exit status."""
    parser = Parser("figures", description="The paper's figures, of one's own input.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="picture | compare")
    drawing = commands.add_parser("picture", help="Fig. 1: the image, its events, what is kept", allow_abbrev=False)
    comparing = commands.add_parser("compare", help="Fig. 2 and 3: the dense and the packed answer", allow_abbrev=False)
    for command, work in ((drawing, run_picture), (comparing, run_compare)):
        command.set_defaults(work=work)
        add_input(command)
        command.add_argument("events", help="recording or event map, .npy or .npz; or none")
        add_model(command)
        add_flags(command, Options)
    drawing.add_argument("-o", "--output", type=Path, required=True, help="the picture, .png")
    comparing.add_argument("question", help="what to ask")
    add_flags(comparing, Sampling)
    args = parser.parse_args(argv)
    return exit_status("figures", lambda: args.work(args))


if __name__ == "__main__":
    sys.exit(main())
