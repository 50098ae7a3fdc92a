"""EP-VLM: answers a question about an image or a clip by looking only at patches where an event camera saw motion.

    python epvlm.py image.png events.npy "What is moving?"

First look, then ask; each step names the module that holds its equations:

    image, events   -> E_v, S, M_v^E    event map, motion of each cell, mask           events.py   Eq. 5, 6
                    -> X~_v             the patches the mask keeps                     vit.py      Eq. 7
    view, question  -> R~^2D, Z_v, H_v  their positions, the transformer, the merger   vit.py      Eq. 8, 9, 10
                    -> X_a              f(concat(H_v, H_q)), the answer                llm.py      Eq. 4

The glossaries are in those modules. What differs from plain Qwen2-VL: the mask. With nothing dropped this is plain
Qwen2-VL. Without events nothing is dropped, except by the rule `cover`, which is ours and then sees the image alone.
"""

import argparse
import contextlib
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain, islice, pairwise, permutations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence
from tokenizers.decoders import DecodeStream
from torch import Tensor

import weights
from events import MICROSECONDS, RULES, budget, event_maps, motion, need, novelty, read_events, resize, summary, worth
from llm import SYSTEM, KVCache, generate, mrope_positions, prompt_ids, sampler
from vit import Clip, packed_patches, read_image, smart_resize

FRAME_PIXELS = 100352, 602112  # of a clip's frame, at least and at most, as in Qwen2VLVideoProcessor
GROUNDING = {f"<|{name}_{side}|>" for name in ("object_ref", "box", "quad") for side in ("start", "end")}
VIDEOS = ".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg"
FRAMES = ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".jp2", ".gif"  # in a folder
ORDERS = tuple(map("".join, permutations("xytp")))
NO_QUESTION = "no question; give one after the events, or one a line on standard input"


def flag(default, help: str, **reading):
    """A field of a dataclass that is also a flag of the command line; `reading` is for argparse."""
    return field(default=default, metadata={"help": help, **reading})


def size(text: str) -> tuple[int, int]:
    if not (match := re.fullmatch(r"(\d+)[xX](\d+)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 240x180")
    return int(match[1]), int(match[2])


def microseconds(text: str) -> float:
    """A time, in microseconds or with a unit: "0.01s" is 10000."""
    try:
        number, unit = re.fullmatch(r"(.+?)(s|ms|us|ns)?", text).groups()
        return round(float(number) * MICROSECONDS[unit or "us"], 3)
    except (AttributeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, such as 12000, 12ms or 0.012s") from None


def read_homography(source) -> tuple[tuple[float, ...], ...]:
    """3 x 3 numbers from an array or a file, .npy or rows of text; an affine matrix, 2 x 3, gets the row 0 0 1."""
    path = str(source) if isinstance(source, str | Path) else ""
    try:
        if path.lower().endswith(".npy"):
            source = np.load(path, allow_pickle=False)
        elif path:
            source = np.loadtxt(Path(path).read_text(encoding="utf-8-sig").replace(",", " ").splitlines())
        rows = np.array(source, dtype=np.float64)
        rows = np.vstack([rows, [0, 0, 1]]) if rows.shape == (2, 3) else rows
        need(rows.shape == (3, 3), f"its shape is {rows.shape}")
        need(np.isfinite(rows).all() and np.linalg.matrix_rank(rows) == 3, "it has no inverse")
    except Exception as error:  # numpy, zipfile and tokenize raise errors of many kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"homography {path or 'array'}: {reason}; give three rows of three finite numbers") from None
    return tuple(map(tuple, rows.tolist()))


@dataclass(frozen=True)
class Options:
    """How `look` chooses patches. Raises ValueError that names what is out of range."""

    sparsity: float = flag(0.5, "fraction of cells dropped, in [0, 1); 0 keeps everything", type=float)
    cell: str = flag("group", "the mask decides on 28 x 28 pixels, or on 14 x 14", choices=("group", "patch"))
    rule: str = flag("exact", "Eq. 6 with ties broken, Eq. 6 as printed, or ours", choices=tuple(RULES))
    hot_pixels: str = flag("keep", "pixels that fire without a cause; mend lowers them", choices=("keep", "mend"))
    polarity: str = flag("count", "every event counts, or on and off cancel", choices=("count", "signed"))
    sensor: tuple[int, int] | None = flag(None, "event camera's (default: the image's)", type=size, metavar="WxH")
    homography: tuple | None = flag(None, "3 x 3, sensor's pixels to the image's (default: a scale)", metavar="FILE")
    window: tuple | None = flag(None, "us or 12ms (default: all)", type=microseconds, nargs=2, metavar=("START", "END"))
    order: str | None = flag(None, "columns of a bare N x 4 array (default: found)", choices=ORDERS, metavar="txyp")
    time_unit: str | None = flag(None, "unit of the file's times (default: us)", choices=tuple(MICROSECONDS))
    min_pixels: int | None = flag(None, "smallest model input, pixels (default: the checkpoint's)", type=int)
    max_pixels: int | None = flag(None, "largest model input, pixels (default: the checkpoint's)", type=int)
    system: str | None = flag(None, f"system turn, empty for none (default: {SYSTEM})")

    def __post_init__(self):
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata.get("choices", ())
            known = not choices or value in (*choices, each.default)
            need(known, f"{each.name} {value!r}: give one of {', '.join(choices)}")
        need(0 <= self.sparsity < 1, f"sparsity {self.sparsity} must be in [0, 1), the fraction dropped")
        if self.homography is not None:
            object.__setattr__(self, "homography", read_homography(self.homography))
        if self.window is not None and not -math.inf < self.window[0] <= self.window[1] < math.inf:
            raise ValueError("window {:g} {:g}: give a start and a later end, in microseconds".format(*self.window))


@dataclass(frozen=True)
class Sampling:
    """How words are chosen. Raises ValueError that names what is out of range."""

    max_new_tokens: int = flag(128, "longest answer, tokens", type=int)
    temperature: float = flag(0.0, "0 takes the likeliest token", type=float)
    top_p: float = flag(1.0, "draws from the likeliest tokens, up to this probability", type=float)
    seed: int = flag(0, "seed for drawing tokens", type=int)
    repetition_penalty: float | None = flag(None, "1 for none (default: the checkpoint's)", type=float)

    def __post_init__(self):
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        need(self.max_new_tokens >= 1, f"max_new_tokens {self.max_new_tokens} must be at least 1")
        need(0 <= self.temperature < math.inf, f"temperature {self.temperature} must be 0 or above")
        need(0 < self.top_p <= 1, f"top_p {self.top_p} must be in (0, 1]")
        need(0 < penalty < math.inf, f"repetition_penalty {penalty} must be above 0")


@dataclass(frozen=True, eq=False)
class View:
    """What was seen of an image: Eq. 5 to 7. As text, the line about what was kept."""

    patches: Tensor  # (N', 1176) float32, X~_v of Eq. 7
    keep: Tensor  # (T, grid_h, grid_w) bool, M_v^E by patch
    groups: Tensor  # (T, groups_h, groups_w) bool, True where a group has a token
    S: np.ndarray | None  # (T, cells_h, cells_w) float64, Eq. 5, see events.py; None without events
    source: str  # what was looked at, such as "37142 events in 20.0 ms, 5 frames at 25 a second"
    system: str | None  # the system turn, see Options
    start: int  # how many tokens of the prompt stand before the image's
    pad: int  # the token that stands for each group: that of an image, or of a clip
    cache: KVCache | None = None  # keys and values of all that stands before the question, once `EPVLM.read`

    def __str__(self) -> str:
        patches = f"{len(self.patches)} of {self.keep.numel()} patches"
        return f"kept {patches} ({self.tokens} of {self.groups.numel()} tokens), {self.source}"

    @property
    def tokens(self) -> int:
        return int(self.groups.sum())


class EPVLM:
    """A Qwen2-VL checkpoint that can skip patches: `look` at an image, then ask about what was seen."""

    def __init__(self, checkpoint: weights.Checkpoint):
        self.checkpoint, self.vit, self.llm = checkpoint, checkpoint.vit, checkpoint.llm
        self.tokenizer, self.image_config = checkpoint.tokenizer, checkpoint.image_config
        self.weight = self.vit.patch_embed.proj.weight  # its dtype and device are the model's
        self.image_pad, self.video_pad = map(self.tokenizer.token_to_id, ("<|image_pad|>", "<|video_pad|>"))
        self.ends = {self.tokenizer.token_to_id("<|im_end|>"), *checkpoint.ends}  # token ids that end an answer

    @classmethod
    def from_pretrained(cls, model: str | Path, revision: str | None = None, device=None, dtype=None) -> "EPVLM":
        """Loads a folder, or a hub id at a `revision` (branch, tag or commit). device: None takes a CUDA GPU, else the
        CPU. dtype: a torch.dtype or its name, None the checkpoint's own. Raises ValueError that names a fault."""
        return cls(weights.load(model, revision, device, dtype))

    def look(self, image: str | Path | Image.Image | Clip, events=None, options: Options = Options()) -> View:
        """Chooses the patches of an image or a clip by its events; no layer of the model runs. events: a path, an
        array, or what `events.read_events` made of one; None drops nothing, except by the rule "cover", which then sees
        the image alone. Raises ValueError that names the value and the remedy. Warns of what is likely a mistake."""
        clip = Clip.of(image).within(options.window)
        T, (H, W), config = clip.moments, self.input_size(clip, options), self.vit.config
        patch, merge, group = config.patch_size, config.spatial_merge_size, config.group_size  # pixels, patches, pixels
        tau = 1.0 if events is None and options.rule != "cover" else 1 - options.sparsity  # fraction kept, as in Eq. 6
        before, after = prompt_ids(self.tokenizer, "", options.system)
        dense = T * H * W // group**2  # tokens; ties, and cells of a patch, may keep more than the budget
        self.check_room(budget(dense, tau), dense, len(before) + len(after), T)
        side = group if options.cell == "group" else patch  # of a cell, in pixels
        S, M, source = None, np.ones((T, H // side, W // side), dtype=bool), "no events"
        if events is not None:
            events = read_events(events, options.order, options.time_unit)
            moments = events.align(clip.size, options.sensor, options.homography is not None).cut(clip.edges)
            maps, outside = event_maps(moments, options.polarity, options.hot_pixels, options.homography, clip.size)
            source = summary(moments, outside)
            E_v = (resize(each, H, W)[None] for each in maps)
            S = np.concatenate([motion(E_t, side) for E_t in E_v]) / clip.seconds  # Eq. 5: (T, cells_h, cells_w)
        if tau < 1 and options.rule == "cover":  # ours, in the place of Eq. 6
            frames = (clip.pixels(t, H, W)[0].clone().numpy() for t in range(T))  # the first of each moment
            G = np.stack([novelty(frame, last, side) for last, frame in pairwise(chain([None], frames))])
            M = RULES["cover"](worth(S, G), tau)
        elif tau < 1:
            M = RULES[options.rule](S, tau)  # Eq. 6: (T, cells_h, cells_w) bool
        keep = torch.from_numpy(M.repeat(side // patch, 1).repeat(side // patch, 2))  # (T, grid_h, grid_w)
        groups = keep.view(T, H // group, merge, W // group, merge).any(dim=4).any(dim=2)  # (T, groups_h, groups_w)
        patches = packed_patches(clip, keep, config, self.image_config)  # Eq. 7: (N', 1176)
        if options.system is None and not self.checkpoint.usual_system:
            warnings.warn("the chat template has another system turn; give it as system (--system TEXT)", stacklevel=2)
        pad = self.image_pad if clip.still else self.video_pad
        return View(patches, keep, groups, S, f"{source}{clip}", options.system, len(before), pad)

    def input_size(self, clip: Clip, options: Options) -> tuple[int, int]:
        """(H, W) in pixels, by the limits of the options, else of the checkpoint, which are narrower for a frame."""
        config, least, most = self.image_config, options.min_pixels, options.max_pixels
        low, high = config.min_pixels, config.max_pixels if most is None else most
        if not clip.still:
            low = max(low, FRAME_PIXELS[0]) if high >= 2 * FRAME_PIXELS[0] else low  # rounding up may double an area
            high = high if most is not None else min(high, FRAME_PIXELS[1])
        limits = replace(config, min_pixels=low if least is None else least, max_pixels=high)
        return smart_resize(*clip.size[::-1], self.vit.config.group_size, limits)

    def prompt(self, view: View, question: str) -> tuple[Tensor, Tensor]:
        """What the decoder is given: ids (L,) int64, their dense positions, packed, (3, L) int64. See `check_room`."""
        before, after = prompt_ids(self.tokenizer, question, view.system)
        self.check_room(view.tokens, view.groups.numel(), len(before) + len(after), len(view.groups))
        ids = torch.tensor([*before, *[view.pad] * view.tokens, *after])
        return ids, mrope_positions(len(before), view.groups, len(after))

    def check_room(self, kept: int, dense: int, text: int, T: int) -> None:
        """Raises ValueError, with what then fits, if `kept` of the `dense` tokens of T moments and `text` tokens exceed
        the model's context or, roughly, the free memory."""
        llm, vision, limit = self.llm.config, self.vit.config, self.llm.config.max_position_embeddings
        held = 2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim  # numbers of a token, in the cache
        at_once = 4 * llm.hidden_size + 3 * llm.intermediate_size + 48 * vision.embed_dim  # and in a layer
        token, pixels = (held + at_once) * self.weight.element_size(), 24 * vision.group_size**2 / T  # bytes
        free = weights.free_memory(self.weight.device)
        room = int(min(limit, (free - dense * pixels) // token)) - text - 1  # tokens of the image
        over = f"the model's {limit}" if kept + text >= limit else f"{free / 2**30:.3g} GiB of free memory"
        smaller = int(min(limit, free // (token + pixels))) - text - 128  # leaves space for a usual answer
        hundredths = math.ceil(100 * (1 - (room - 127) / dense))
        remedies = [f"give max_pixels {smaller * vision.group_size**2 // T} or less"] * (smaller > T)
        remedies += [f"frames {smaller * T // dense * 2} or fewer"] * (T > 1 and smaller * T >= dense)
        remedies += [f"sparsity 0.{hundredths:02} or more, with events or the rule cover"] * (hundredths < 100)
        remedies = ", or ".join([*remedies, "shorten the question or the system turn"])
        kind = "image" if T == 1 else "clip"
        need(kept <= room, f"{kept} tokens of the {kind} and {text} of text exceed {over}; {remedies}")

    def embed(self, view: View, ids: Tensor) -> Tensor:
        """concat(H_v, H_q) of Eq. 4, with H_v in the places of the image's tokens: (1, L, hidden_size)."""
        H_v = self.vit(view.patches.to(self.weight)[None], view.keep)  # Eq. 8, 9, 10
        concat = self.llm.embed(ids[None])  # H_q
        concat[:, view.start : view.start + view.tokens] = H_v  # Eq. 4
        return concat

    @torch.inference_mode()
    def read(self, view: View) -> View:
        """The view with the keys and values of all that stands before the question: more questions are cheap."""
        ids, positions = self.prompt(view, "")
        end = view.start + view.tokens
        cache = KVCache(self.llm.config, end, like=self.weight)
        self.llm(self.embed(view, ids[:end]), positions[:, :end], cache, wanted=1)
        return replace(view, cache=cache)

    @torch.inference_mode()
    def logits(self, view: View, question: str) -> Tensor:
        """Scores of the next token at every position of the prompt, (L, vocab_size) float32."""
        ids, positions = self.prompt(view, question)
        return self.llm.logits(self.llm(self.embed(view, ids), positions))[0]

    @torch.inference_mode()
    def tokens(self, view: View, question: str, sampling: Sampling = Sampling()) -> Iterator[int]:
        """The answer's token ids as they are decided, the end token included; at most `max_new_tokens`, and what the
        model's context holds. Raises ValueError: at the first `next` as `prompt` does, later for scores not finite."""
        ids, positions = self.prompt(view, question)
        if sampling.repetition_penalty is None:
            sampling = replace(sampling, repetition_penalty=self.checkpoint.repetition_penalty)
        limit = min(sampling.max_new_tokens, self.llm.config.max_position_embeddings - len(ids))
        start = view.cache.filled if view.cache else 0
        hidden = self.llm.embed(ids[None, start:]) if start else self.embed(view, ids)
        cache = KVCache(self.llm.config, len(ids) + limit, hidden, view.cache)
        for token in islice(generate(self.llm, hidden, positions[:, start:], cache, sampler(sampling, ids)), limit):
            yield token
            if token in self.ends:
                return

    def stream(self, view: View, question: str, sampling: Sampling = Sampling()) -> Iterator[str]:
        """The answer as text, in pieces that are whole UTF-8; joined they are the answer."""
        return self.pieces(self.tokens(view, question, sampling))

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Token ids as text, in pieces of whole UTF-8, without special tokens but GROUNDING, or a half character."""
        added, stream = self.tokenizer.get_added_tokens_decoder(), DecodeStream(skip_special_tokens=False)
        for token in tokens:
            shown = token not in added or not added[token].special or added[token].content in GROUNDING
            if shown and (text := stream.step(self.tokenizer, token)):  # None while a character is split
                yield text

    def answer(self, image, events, question: str, options=Options(), sampling=Sampling()) -> str:
        """X_a of Eq. 4 as text: `look`, then `stream`."""
        return "".join(self.stream(self.look(image, events, options), question, sampling))

    def flops(self, view: View, question: str) -> tuple[int, int]:
        """FLOPs up to the first token, attention included: (kept, dense), of this view and with nothing dropped."""
        text, (T, h, w) = len(self.prompt(view, question)[0]) - view.tokens, view.keep.shape
        cases = (view.keep.sum(dim=(1, 2)).tolist(), view.tokens), ([h * w] * T, view.groups.numel())
        return tuple(sum(self.vit.flops(n_t, tokens) + self.llm.flops(text + tokens)) for n_t, tokens in cases)


# The command line


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """A flag for each field of Options or Sampling."""
    for each in fields(options):
        shown = "" if each.default is None else " (default: %(default)s)"
        how = {**each.metadata, "help": each.metadata["help"] + shown, "default": each.default}
        parser.add_argument(f"--{each.name.replace('_', '-')}", **how)


def add_input(parser: argparse.ArgumentParser) -> None:
    """The argument and flags of `read_input`, which also heeds the window of Options."""
    parser.add_argument("image", help="image file; or a clip: a folder, a list of `time name`, an animated file")
    parser.add_argument("--times", metavar="FILE", help="a folder's times, one a line, or start and end of exposure")
    parser.add_argument("--fps", type=float, help="frames a second, in the place of times")
    parser.add_argument("--frame", metavar="FILE:N", help="the window goes from frame N - 1 of a list to frame N")
    parser.add_argument("--frames", type=int, help="how many to take of a clip (default: two a second, at least 4)")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model."""
    parser.add_argument("--model", default="Qwen/Qwen2-VL-2B-Instruct", help="folder or hub id (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=tuple(weights.DTYPES), help="default: the checkpoint's")


def chosen(args: argparse.Namespace, options: type):
    """Options or Sampling as the command line has them."""
    return options(**{each.name: getattr(args, each.name) for each in fields(options)})


def exit_status(program: str, work: Callable[[], None]) -> int:
    """Does a script's work and returns its exit status: 0, 2 for bad input (in one line), 130 when interrupted, 1 when
    nobody reads its output any more."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (the caller closed it: print would take stdout)
    try:
        work()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
        return 1
    except KeyboardInterrupt:
        print(end="\n" if sys.stderr.isatty() else "", file=sys.stderr)  # the shell's prompt gets a line of its own
        return 130
    except (ValueError, OSError, MemoryError, ArithmeticError, RuntimeError) as error:  # torch's are RuntimeError
        print(f"{program}: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def warnings_as_lines(program: str) -> Iterator[None]:
    """Prints what the block warns of when it ends, a line on stderr for each message; after an error nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"{program}: warning: {message}", file=sys.stderr, flush=True)


def read_input(args: argparse.Namespace) -> Image.Image | Clip:
    """What the flags of `add_input` name: an image, or some frames of a clip, evenly chosen. `frame` sets `window`."""
    args.window = window_of(args)
    clip = read_clip(Path(args.image), args.times, args.fps)
    if clip is None:
        need(args.frames is None, f"{args.image}: a still image; leave frames out")
        return read_image(args.image)
    clip = clip.within(args.window)
    count = max(4, round(np.ptp(clip.times) / 500_000)) if args.frames is None else args.frames
    need(count >= 1, f"frames {count}: give 1 or more")
    numbers = evenly(len(clip.frames), count)
    return replace(clip, frames=[clip.frames[n] for n in numbers], times=clip.times[numbers])


def evenly(total: int, count: int) -> np.ndarray:
    """So many of the numbers from 0 to total - 1, or all of them, both ends included: 5 and 3 give 0, 2 and 4."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(int)


def read_clip(path: Path, times: str | None = None, fps: float | None = None) -> Clip | None:
    """All frames of a folder, of a list with `time name` on each line, or of an animated file; None for a still image.
    times: a file that has them; fps: frames a second, in their place. Raises ValueError that names the file."""
    if path.is_dir():
        named = (file for file in path.iterdir() if file.suffix.lower() in FRAMES and not file.name.startswith("."))
        frames, clock, unit = sorted(filter(Path.is_file, named), key=by_number), None, ""
        need(bool(frames), f"{path}: a folder without images; give one with frames")
    elif path.suffix.lower() in VIDEOS:
        command = f"mkdir frames && ffmpeg -i {shlex.quote(str(path))} -r 10 frames/%06d.png"
        raise ValueError(f"{path}: a video; make a folder of its frames ({command}), and give that with --fps 10")
    elif path.suffix.lower() == ".txt":
        frames, clock, unit = read_list(path)
    else:
        (frames, clock), unit = animation(path), " at their own times"
    if not frames:
        if times is not None or fps is not None:
            read_image(path)
            raise ValueError(f"{path}: a still image; leave times and fps out")
        return None
    need(times is None or fps is None, "times and fps: give one of them")
    if fps is not None:
        return Clip.at_rate(frames, fps)
    if times is not None:
        clock, unit = in_microseconds(read_words(times), times)
    need(clock is not None, f"{path}: its frames have no times; give --times FILE, or --fps")
    try:
        return Clip(frames, clock, clock=unit)
    except ValueError as error:
        raise ValueError(f"{times or path}: {error}") from None


def window_of(args: argparse.Namespace) -> tuple[float, float] | None:
    """The flag window, or for FILE:N, the flag frame, microseconds of the frames N - 1 and N, counted from 0, of a list
    or a file of times or exposures. Raises ValueError."""
    need(args.window is None or args.frame is None, "window and frame: give one of them")
    if (frame := args.frame) is None:
        return args.window
    path, _, number = frame.rpartition(":")
    need(path != "" and number.isdecimal(), f"frame {frame}: give FILE:N, such as images.txt:17")
    words = read_words(path, most=1)
    named = any(re.search(r"[^-+.\deE\s]", word) for word in words[:, -1])  # `time name`
    times, _ = in_microseconds(words[:, :1] if named else words, path)
    need(1 <= int(number) < len(times), f"frame {frame}: {path} has frames 0 to {len(times) - 1}; give N from 1")
    return float(times[int(number) - 1]), float(times[int(number)])


def by_number(path: Path) -> list:
    """For sorting: frame2 comes before frame10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_list(path: Path) -> tuple[list[Path], np.ndarray, str]:
    """The frames of a list that are there, by their names relative to it or beside it, their times in microseconds, and
    the unit they had. Warns of those that are missing."""
    words = read_words(path, most=1)
    need(words.shape[1] == 2, f"{path}: a line is not `time name`; correct it")
    times, unit = in_microseconds(words[:, :1], path)
    names = [Path(name.strip().replace("\\", "/")) for name in words[:, 1]]
    places = [(path.parent / name, path.parent / name.name) for name in names]
    found = [next(filter(os.path.isfile, pair), None) for pair in places]
    there = np.array([frame is not None for frame in found])
    need(there.any(), f"{path}: none of its {len(found)} frames is there; give their names relative to the list")
    if missing := len(found) - there.sum():
        warnings.warn(f"{path}: {missing} of {len(found)} frames are missing, and left out", stacklevel=2)
    return [frame for frame in found if frame], times[there], unit


def animation(path: Path) -> tuple[list, np.ndarray | None]:
    """The frames of an animated file, read when needed, and their times in microseconds; of another image neither."""
    shown = []  # milliseconds of each frame
    with contextlib.suppress(Exception):  # `read_image` says what is wrong
        need(path.is_file(), "a pipe would be waited for")
        with Image.open(path) as file:
            for page in ImageSequence.Iterator(file) if getattr(file, "n_frames", 1) > 1 else ():
                page.load()
                shown.append(page.info.get("duration"))
    if len(shown) < 2 or None in shown:  # the pages of a document have no times
        return [], None
    times, opened = 1000.0 * np.cumsum([0, *shown[:-1]]) if min(shown) > 0 else None, []
    return [partial(read_page, path, n, opened) for n in range(len(shown))], times


def read_page(path: Path, n: int, opened: list[Image.Image]) -> Image.Image:
    """The n-th image of a file, which stays open: going back, Pillow starts anew."""
    if not opened or n < opened[0].tell():
        opened[:] = [Image.open(path)]
    opened[0].seek(n)
    return opened[0].copy()


def read_words(path: str | Path, most: int = -1) -> np.ndarray:
    """The words of a text file, (lines, words), cut at spaces or commas, `most` times at most; # begins a comment."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").replace(",", " ").splitlines()
        rows = [line.split(maxsplit=most) for line in lines if line.strip() and not line.lstrip().startswith("#")]
        need(len({len(row) for row in rows}) == 1, "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not lines of as many words each"
        raise ValueError(f"{path}: cannot be read ({reason}); give lines that begin with a time") from None
    return np.array(rows)


def in_microseconds(words: np.ndarray, name: str | Path) -> tuple[np.ndarray, str]:
    """A time for each row of one number, or of two, the start and end of an exposure; and the unit they had: seconds if
    any is not a whole number, else microseconds."""
    try:
        ends = words.astype(np.float64)
        need(ends.shape[1] == 1 or (ends.shape[1] == 2 and (np.diff(ends.ravel()) >= 0).all()), "")
        times = ends.mean(axis=1)
        need(np.isfinite(times).all(), "")
    except ValueError:
        told = "a line is not a time, or the start and end of an exposure that follows the one before"
        raise ValueError(f"{name}: {told}; correct it") from None
    whole = all(word.lstrip("+-").isdigit() for word in words.flat)
    return np.round(times * (1 if whole else 1e6), 3), f" at times in {'microseconds' if whole else 'seconds'}"


def run(args: argparse.Namespace, load: Callable) -> None:
    """The command line's work. What is small is read first: a mistake there should not wait for a download."""
    if hasattr(sys.stdout, "reconfigure"):  # answers are UTF-8, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8")
    with warnings_as_lines("epvlm"):
        image, options, sampling = read_input(args), chosen(args, Options), chosen(args, Sampling)
        events = None if args.events == "none" else read_events(args.events, options.order, options.time_unit)
        need(args.question is not None or (sys.stdin and (sys.stdin.isatty() or sys.stdin.buffer.peek())), NO_QUESTION)
        model = load(args.model, args.revision, args.device, args.dtype)
        start = time.perf_counter()
        view = model.look(image, events, options)
        flops = model.flops(view, args.question or "")
    announce(model, view, flops)
    if args.question is not None:
        show(model, view, args.question, sampling, start)
        return
    view, failed, asked = model.read(view), 0, 0
    for asked, question in enumerate(lines(), 1):
        try:
            show(model, view, question, sampling, time.perf_counter())
        except ValueError as error:
            failed += 1
            print(f"epvlm: question {asked}: {error}", file=sys.stderr)
    if not sys.stdin.isatty() and (failed or not asked):
        raise ValueError(f"{failed} of {asked} questions could not be answered; correct them" if asked else NO_QUESTION)


def scale(flops: int) -> tuple[float, str]:
    """How many FLOPs make a unit, and its prefix."""
    return (1e12, "T") if flops >= 1e12 else (1e9, "G") if flops >= 1e9 else (1e6, "M")


def announce(model: EPVLM, view: View, flops: tuple[int, int]) -> None:
    """Says on stderr what was kept and what it will cost, and from here on shows the progress. flops: see EPVLM."""
    unit, prefix = scale(flops[1])
    print(f"{view}, {flops[0] / unit:.2f} of {flops[1] / unit:.2f} {prefix}FLOPs", file=sys.stderr, flush=True)
    show_progress(model)


def lines() -> Iterator[str]:
    """The lines of standard input that are not empty; on a terminal it asks for them."""
    ask = "question: " if sys.stdin.isatty() else ""
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    while print(end=ask, file=sys.stderr, flush=True) or (line := sys.stdin.readline()):
        if line := line.strip():
            yield line
    print(end="\n" if ask else "", file=sys.stderr)


def show(model: EPVLM, view: View, question: str, sampling: Sampling, start: float) -> tuple[float, float]:
    """Prints an answer as it comes; on stderr, when its first token came and where it was cut. Returns the seconds from
    `start` to its first token and to its last."""
    shown, seconds = [], []  # token ids; the time from `start` to each

    def tokens() -> Iterator[int]:
        for token in model.tokens(view, question, sampling):
            seconds.append(time.perf_counter() - start)
            if not shown:
                print(f"first token after {seconds[0]:.2f} s", file=sys.stderr, flush=True)
            shown.append(token)
            yield token

    try:
        for piece in model.pieces(tokens()):
            print(piece, end="", flush=True)
    finally:
        print(end="\n" if shown else "", flush=True)
    if shown[-1] not in model.ends:
        print(f"stopped after {len(shown)} token{'s' * (len(shown) > 1)}", file=sys.stderr, flush=True)
    return seconds[0], seconds[-1]


def show_progress(model: EPVLM) -> None:
    """Counts on a terminal the layers that have read the prompt; the last one clears the line."""
    layers = [*model.vit.blocks, *model.llm.model["layers"]] if sys.stderr.isatty() else []

    def count(number: int) -> None:
        text = f"\rlayer {number} of {len(layers)}" if number < len(layers) else "\r\033[K"
        print(text, end="", file=sys.stderr, flush=True)
        hooks[number - 1].remove()

    hooks = [layer.register_forward_hook(lambda *_, n=n: count(n)) for n, layer in enumerate(layers, 1)]


def main(argv: list[str] | None = None, load: Callable | None = None) -> int:
    """Answers questions about an image; returns the exit status. load: in the place of `EPVLM.from_pretrained`."""
    parser = argparse.ArgumentParser("epvlm", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = lambda text: parser.exit(2, f"epvlm: error: {' '.join(text.split())} (--help lists the options)\n")
    add_input(parser)
    parser.add_argument("events", help="recording or event map, .npy or .npz; or none")
    parser.add_argument("question", nargs="?", help="if left out, questions are read from standard input, one a line")
    add_model(parser)
    add_flags(parser, Options)
    add_flags(parser, Sampling)
    parse = parser.parse_intermixed_args  # the question may follow options
    return exit_status("epvlm", lambda: run(parse(argv), load or EPVLM.from_pretrained))


if __name__ == "__main__":
    sys.exit(main())
