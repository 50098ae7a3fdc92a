"""EP-VLM: answers a question about an image by looking only at the patches where an event camera saw motion.

    python epvlm.py image.png events.npy "What is moving?"

The pipeline, top to bottom; each step names the module that holds its equations:

    image, events, question
      -> E_v, S, M_v^E      event map, motion of each cell, mask            events.py   Eq. 5, 6
      -> X~_v               the patches the mask keeps                      vit.py      Eq. 7
      -> R~^2D, Z_v, H_v    their positions, the transformer, the merger    vit.py      Eq. 8, 9, 10
      -> concat(H_v, H_q)   visual tokens in the midst of the text          here        Eq. 4
      -> X_a                the answer                                      llm.py      Eq. 4

Glossary
    N, N'            patches of the dense image, and patches kept
    L                tokens of the prompt: text, and one for each group (2 x 2 patches, 28 x 28 pixels) kept
    sparsity         fraction of cells dropped, as in Table 1; Eq. 6's tau = 1 - sparsity is the fraction kept
    keep             mask by group, (groups_h, groups_w) bool: True keeps, False drops; keep_patches the same by patch
    seen             keys and values of what stands before the question, to answer several about one image

What differs from plain Qwen2-VL: the mask. Without events, or at sparsity 0, this is plain Qwen2-VL. The paper's Fig. 1
is `EPVLM.picture`, its Fig. 2 and 3 are `--compare`.
"""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # while the libraries load
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import bisect
import math
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from torch import Tensor

import weights
from events import (
    MICROSECONDS,
    Events,
    Parser,
    budget,
    budget_mask,
    check_output,
    event_map,
    exit_status,
    literal_mask,
    motion,
    read_events,
    read_image,
    resize,
    write_whole,
)
from llm import Decoder, DecoderConfig, KVCache, generate, mrope_positions, sampler
from vit import ImageConfig, VisionConfig, VisionTransformer, packed_patches, smart_resize

DEFAULT_MODEL = "Qwen/Qwen2-VL-2B-Instruct"
RULES = {"exact": budget_mask, "literal": literal_mask}  # S, tau -> mask
CHOICES = {"cell": ("group", "patch"), "ties": tuple(RULES), "polarity": ("count", "signed")}
PROMPT_OPTIONS = ("cell", "ties", "polarity", "sensor", "window", "min_pixels", "max_pixels", "system")
ON, OFF, DROPPED = "#ff2010", "#1060ff", "#103028"  # colours of a picture; both polarities at once are purple
DENSE_BYTES = 24  # that a pixel of the dense image takes while patches are chosen
NO_QUESTION = "no question; give one after the events, or one a line on standard input"
GROUNDING = {f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad") for end in ("start", "end")}  # printed
SPECIAL = {name: f"<|{name}|>" for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad")}


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model is given. L counts the kept image tokens only; positions are those of the dense image, packed."""

    input_ids: Tensor  # (L,) int64
    position_ids: Tensor  # (3, L) int64, time, row, column
    patches: Tensor  # (N', 1176) float32, X~_v of Eq. 7
    keep: Tensor  # (groups_h, groups_w) bool, True where a group has a token
    keep_patches: Tensor  # (grid_h, grid_w) bool, M_v^E by patch
    image_start: int  # index of the first image token
    source: str  # where the mask comes from, such as "37142 events in 20.0 ms"
    S: np.ndarray | None  # (cells_h, cells_w) float64, Eq. 5, in 1 / (H W) of an event; None without events

    @property
    def tokens(self) -> int:
        """Of the image, those kept."""
        return int(self.keep.sum())

    @property
    def image_end(self) -> int:
        return self.image_start + self.tokens

    def __str__(self) -> str:
        patches = f"{len(self.patches)} of {self.keep_patches.numel()} patches"
        return f"kept {patches} ({self.tokens} of {self.keep.numel()} tokens), {self.source}"


class EPVLM:
    """A Qwen2-VL checkpoint that can skip patches. `from_pretrained` makes one, `answer` uses it."""

    def __init__(
        self, vit: VisionTransformer, llm: Decoder, tokenizer: Tokenizer, image_config: ImageConfig, stop=(),
        repetition_penalty: float = 1.0, template: str = "",
    ):  # fmt: skip
        self.vit, self.llm, self.tokenizer, self.image_config = vit, llm, tokenizer, image_config
        self.repetition_penalty = repetition_penalty
        self.usual = not template or weights.USUAL in template  # its system turn is the published models'
        added = tokenizer.get_added_tokens_decoder().items()
        self.silent = {token for token, text in added if text.special and text.content not in GROUNDING}
        self.special = {name: tokenizer.token_to_id(text) for name, text in SPECIAL.items()}
        self.stop = {self.special["im_end"], *stop}  # token ids that end an answer

    @property
    def _weight(self) -> Tensor:  # its dtype and device are the model's
        return self.vit.patch_embed.proj.weight

    @classmethod
    def from_pretrained(cls, model: str | Path, revision: str | None = None, device=None, dtype=None) -> "EPVLM":
        """Loads a checkpoint: a folder, or a hub id at a `revision`. device: None takes a CUDA GPU if there is one,
        else the CPU. dtype: a torch.dtype or its name, None the checkpoint's own. Raises ValueError naming a fault."""
        device, dtype = weights.placement(device, dtype)
        folder = weights.fetch(model, revision)
        vit, llm = build(folder)
        tokenizer = weights.read_tokenizer(folder, llm.config.vocab_size, SPECIAL.values())
        shapes = {name: tuple(tensor.shape) for name, tensor in published(vit, llm).items()}
        image_config = weights.read_image_config(folder, ImageConfig)
        (stop, penalty), template = weights.read_generation(folder), weights.read_template(folder)
        weights.fetch_weights(model, folder)
        tensors = weights.read_tensors(folder, shapes, llm.config.tie_word_embeddings, dtype, device)
        visual = {name.removeprefix("visual."): tensors.pop(name) for name in shapes if name.startswith("visual.")}
        for module, state in ((vit, visual), (llm, tensors)):
            module.load_state_dict(state, assign=True)
            module.requires_grad_(False).eval()
        return cls(vit, llm, tokenizer, image_config, stop, penalty, template)

    def prompt(
        self, image: str | Path | Image.Image, events: str | Path | np.ndarray | Events | None,
        question: str | tuple[list[int], list[int]], sparsity: float = 0.5, *, cell: str = "group",
        ties: str = "exact", polarity: str = "count", sensor: tuple[int, int] | None = None,
        window: tuple[float, float] | None = None, order: str | None = None, time_unit: str | None = None,
        min_pixels: int | None = None, max_pixels: int | None = None, system: str | None = None,
    ) -> Prompt:  # fmt: skip
        """Everything up to the model: the mask, the packed patches, the token ids and their dense positions.

        events: a path or an array (formats: `events.read_events`), None for the dense image. sparsity: fraction of
        cells dropped, in [0, 1). sensor: (width, height) in pixels, the image's size unless given. window: first and
        last time in microseconds. cell, ties, polarity: see CHOICES. Pixel limits: the checkpoint's unless given.
        system: see `text_ids`. The question may also be what `text_ids` made of it. Raises ValueError that names the
        value and the remedy."""
        check_choices(sparsity, cell=cell, ties=ties, polarity=polarity)
        if system is None and not self.usual:
            warnings.warn("this checkpoint's chat template has another system turn; give it by --system", stacklevel=2)
        image, config = read_image(image), self.vit.config
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        limits = {name: value or getattr(self.image_config, name) for name, value in limits.items()}
        patch, merge, group = config.patch_size, config.spatial_merge_size, config.group_size
        height, width = smart_resize(image.height, image.width, group, **limits)
        before, after = self.text_ids(question, system) if isinstance(question, str) else question
        groups = height * width // group**2
        kept = groups if events is None else budget(groups, 1 - sparsity)  # at least: ties or patches may keep more
        self._check_room(kept, groups, len(before) + len(after), answer=1)
        keep_patches, source, S = torch.ones(height // patch, width // patch, dtype=torch.bool), "no events", None
        if events is not None:
            E_v, source = event_map(read_events(events, order, time_unit), sensor, image.size, window, polarity)
            S = motion(resize(E_v, height, width), group if cell == "group" else patch)  # Eq. 5, (cells_h, cells_w)
            M = torch.from_numpy(RULES[ties](S, tau=1 - sparsity))  # Eq. 6, likewise
            keep_patches = M.repeat_interleave(merge, 0).repeat_interleave(merge, 1) if cell == "group" else M
        keep = keep_patches.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).any(dim=3).any(dim=1)  # groups_h, _w
        input_ids = torch.tensor(before + [self.special["image_pad"]] * int(keep.sum()) + after)
        positions = mrope_positions(len(before), keep, len(after))
        patches = packed_patches(image, keep_patches, config, self.image_config)  # Eq. 7
        return Prompt(input_ids, positions, patches, keep, keep_patches, len(before), source, S)

    def with_question(self, prompt: Prompt, question: str) -> Prompt:
        """The same image with another question."""
        _, after = self.text_ids(question)
        input_ids = torch.cat((prompt.input_ids[: prompt.image_end], torch.tensor(after)))
        positions = mrope_positions(prompt.image_start, prompt.keep, len(after))
        return replace(prompt, input_ids=input_ids, position_ids=positions)

    def _check_room(self, kept: int, groups: int, text: int, answer: int) -> None:
        """Raises ValueError, with what brings it under, if `kept` of an image's `groups` and the tokens of the text and
        of the answer exceed the model's context or the free memory."""
        limit, free = self.llm.config.max_position_embeddings, weights.free_memory(self._weight.device)

        def exceeded(kept: int, groups: int, answer: int) -> list[str]:
            tokens, memory = kept + text + answer, self._memory(kept, groups, text, answer)
            over = {f"the model's {limit}": tokens > limit, f"{free / 2**30:.3g} GiB of free memory": memory > free}
            return [name for name in over if over[name]]

        if not (within := exceeded(kept, groups, answer)):
            return
        needs = f"{kept + text + answer} tokens ({kept} of the image, {text} of text, {answer} of the answer)"
        remedy = "shorten the question" if text > answer else "lower --max-new-tokens"
        if text + answer <= kept:
            usual = max(128, answer)
            smaller = bisect.bisect(range(1, groups), False, key=lambda n: bool(exceeded(n, n, usual)))
            remedy = f"give --max-pixels {max(1, smaller) * self.vit.config.group_size**2} or less"
            higher = (n for n in range(100) if not exceeded(budget(groups, 1 - n / 100), groups, usual))
            if hundredths := next(higher, 0):  # to drop
                remedy += f", or with events, 28-pixel cells and exact ties --sparsity 0.{hundredths:02} or more"
        raise ValueError(f"{needs} exceed {' and '.join(within)}; {remedy}")

    def _memory(self, kept: int, groups: int, text: int, answer: int) -> int:
        """Bytes, estimated from below, that a prompt and its answer take beside the weights."""
        vision, config, size = self.vit.config, self.llm.config, self._weight.element_size()
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # numbers held of a token,
        layer = 4 * config.hidden_size + 3 * config.intermediate_size  # and while a layer reads it
        patch = 4 * self._weight[0].numel() + size * 12 * vision.embed_dim
        tokens = size * (kv * (kept + text + answer) + layer * (kept + text))
        return tokens + kept * vision.spatial_merge_size**2 * patch + DENSE_BYTES * vision.group_size**2 * groups

    def text_ids(self, question: str, system: str | None = None) -> tuple[list[int], list[int]]:
        """Token ids before and after the image. Special tokens are put in by id; a question that spells one is text.
        system: the system turn, None for that of the published models, "" for none."""

        def ids(text: str) -> list[int]:
            self.tokenizer.encode_special_tokens = True  # a state that a copied tokenizer loses, so set at each use
            return self.tokenizer.encode(text, add_special_tokens=False).ids

        for name, text in (("question", question), ("system", system or "")):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{name} {text[:40]!a}: holds bytes that are no text; give it in UTF-8") from None
        start, end = self.special["im_start"], self.special["im_end"]
        system = weights.USUAL if system is None else system
        turn = [start, *ids(f"system\n{system}"), end, *ids("\n")] if system else []
        before = [*turn, start, *ids("user\n"), self.special["vision_start"]]
        return before, [self.special["vision_end"], *ids(question), end, *ids("\n"), start, *ids("assistant\n")]

    def _embed(self, prompt: Prompt) -> Tensor:
        """concat(H_v, H_q) of Eq. 4, H_v standing where the image does: (1, L, hidden_size)."""
        H_v = self.vit(prompt.patches.to(self._weight)[None], prompt.keep_patches)  # Eq. 8, 9, 10
        H_q = self.llm.embed(prompt.input_ids.to(self._weight.device)[None])
        return torch.cat((H_q[:, : prompt.image_start], H_v, H_q[:, prompt.image_end :]), dim=1)  # Eq. 4

    def flops(self, prompt: Prompt) -> tuple[int, int]:
        """FLOPs up to the answer's first token, attention included: of this prompt, and with nothing dropped."""
        text = len(prompt.input_ids) - prompt.tokens
        sizes = (len(prompt.patches), prompt.tokens), (prompt.keep_patches.numel(), prompt.keep.numel())
        return tuple(sum(self.vit.flops(*size) + self.llm.flops(text + size[1])) for size in sizes)

    @torch.inference_mode()
    def logits(self, prompt: Prompt) -> Tensor:
        """Scores of the token after each of the prompt's, (L, vocab_size) float32."""
        return self.llm.logits(self.llm(self._embed(prompt), prompt.position_ids))[0]

    @torch.inference_mode()
    def see(self, prompt: Prompt) -> KVCache:
        """Keys and values of all that stands before the question: of any question, as `tokens` takes them."""
        cache = KVCache(self.llm.config, prompt.image_end, like=self._weight)
        hidden, positions = self._embed(prompt)[:, : prompt.image_end], prompt.position_ids[:, : prompt.image_end]
        self.llm(hidden, positions, cache, wanted=1)
        return cache

    def tokens(
        self, prompt: Prompt, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
        seen: KVCache | None = None, repetition_penalty: float | None = None,
    ) -> Iterator[int]:  # fmt: skip
        """The answer's token ids as they are decided, the end token included. Greedy at temperature 0. seen: what `see`
        made of a prompt with the same image; that it is the same is not checked beyond its length. repetition_penalty:
        the checkpoint's unless given, 1 for none. Raises ValueError,
        before any work, for settings out of range and for what exceeds the model's context."""
        if max_new_tokens < 1:
            raise ValueError(f"max-new-tokens {max_new_tokens}: give 1 or more")
        if seen and seen.filled != prompt.image_end:
            raise ValueError("what was seen is another prompt's; give what `see` made of this image")
        self._check_room(prompt.tokens, prompt.keep.numel(), len(prompt.input_ids) - prompt.tokens, max_new_tokens)
        penalty = self.repetition_penalty if repetition_penalty is None else repetition_penalty
        return self._decode(prompt, max_new_tokens, sampler(temperature, top_p, seed, penalty, prompt.input_ids), seen)

    @torch.inference_mode()
    def _decode(self, prompt: Prompt, limit: int, choose, seen: KVCache | None) -> Iterator[int]:
        start = seen.filled if seen else 0
        hidden = self.llm.embed(prompt.input_ids[start:].to(self._weight.device)[None]) if seen else self._embed(prompt)
        yield from generate(self.llm, hidden, prompt.position_ids[:, start:], limit, self.stop, choose, seen)

    def stream(self, prompt: Prompt, max_new_tokens: int = 128, **sampling) -> Iterator[str]:
        """The same as text, in pieces that are whole UTF-8; joined they are the answer."""
        return self.pieces(self.tokens(prompt, max_new_tokens, **sampling))

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Token ids as text, in pieces that are whole UTF-8. Of special tokens those of grounding are shown."""
        held: list[int] = []
        for token in tokens:
            held += [] if token in self.silent else [token]
            text = self.tokenizer.decode(held, skip_special_tokens=False)
            if text and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is split between tokens
                yield text
                held = []
        if rest := self.tokenizer.decode(held, skip_special_tokens=False):
            yield rest

    def picture(self, prompt: Prompt, image, events, sensor=None, window=None, **reading) -> Image.Image:
        """The paper's Fig. 1 of one's own input: the image as the model gets it; the events over it, on in red and off
        in blue; the image with what is dropped darkened. Below, the counts. image, events, sensor, window, and `order`
        and `time_unit` in `reading`, are those that `prompt` was given."""
        image, (height, width) = read_image(image), (self.vit.config.patch_size * n for n in prompt.keep_patches.shape)
        size, image = image.size, image.resize((width, height), Image.Resampling.BICUBIC)
        shown, legend = image.convert("L").convert("RGB"), ""
        if events is not None:
            with warnings.catch_warnings(action="ignore"):  # `prompt` has told them
                events, legend = read_events(events, **reading), ", red on, blue off"
                maps = (event_map(events, sensor, size, window, polarity)[0] for polarity in ("count", "signed"))
                count, signed = (resize(E_v, height, width) for E_v in maps)
            count = np.abs(count)
            strength = count / (np.quantile(count[count > 0], 0.9) if count.any() else 1)
            on = _grey((count + signed) / np.where(count > 0, 2 * count, 1))  # the share of on
            colours = Image.composite(*(Image.new("RGB", image.size, colour) for colour in (ON, OFF)), on)
            shown.paste(colours, mask=_grey((count > 0) * (0.3 + 0.7 * strength.clip(0, 1))))
        dark = Image.blend(image, Image.new("RGB", image.size, DROPPED), 0.75)
        kept = Image.composite(image, dark, _grey(prompt.keep_patches.numpy()).resize(image.size, 0))
        gap, font = max(8, width // 32), ImageFont.load_default(max(14, width // 20))
        told = f"{prompt}\nleft: the image; middle: events{legend}; right: dropped patches darkened"
        *_, across, down = (math.ceil(end) for end in ImageDraw.Draw(image).multiline_textbbox((0, 0), told, font))
        whole = Image.new("RGB", (max(3 * width + 4 * gap, across + 2 * gap), height + down + 3 * gap), "white")
        for n, panel in enumerate((image, shown, kept)):
            whole.paste(panel, (gap + n * (width + gap), gap))
        ImageDraw.Draw(whole).multiline_text((gap, height + 2 * gap), told, "black", font)
        return whole

    def answer(
        self, image, events, question: str, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0,
        seed: int = 0, repetition_penalty: float | None = None, **options,
    ) -> str:  # fmt: skip
        """X_a of Eq. 4 as text. `options` are those of `prompt`."""
        prompt = self.prompt(image, events, question, **options)
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed, "repetition_penalty": repetition_penalty}
        return "".join(self.stream(prompt, max_new_tokens, **sampling))


def _grey(values: np.ndarray) -> Image.Image:
    """0 to 1 as 8-bit grey."""
    return Image.fromarray(np.rint(255 * values).astype(np.uint8))


def build(folder: Path) -> tuple[VisionTransformer, Decoder]:
    """The model that a folder's config.json describes, on the meta device, without weights. Raises ValueError."""
    path, (vision, text) = folder / "config.json", weights.read_config(folder)
    vision, text = weights.fill(VisionConfig, vision, path), weights.fill(DecoderConfig, text, path)
    if vision.hidden_size != text.hidden_size:
        raise ValueError(f"{path}: vision hidden_size {vision.hidden_size} is not the decoder's {text.hidden_size}")
    with torch.device("meta"):
        return VisionTransformer(vision), Decoder(text)


def published(vit: VisionTransformer, llm: Decoder) -> dict[str, Tensor]:
    """Every tensor of the model by its published name."""
    return {f"visual.{name}": tensor for name, tensor in vit.state_dict().items()} | llm.state_dict()


def check_choices(sparsity: float, **chosen: str) -> None:
    """Raises ValueError unless sparsity is in [0, 1) and each choice is one of CHOICES."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1); it is the fraction dropped, 0 keeps everything")
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} {value!r}: give {' or '.join(CHOICES[name])}")


def _sensor(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 240x180")
    return int(match[1]), int(match[2])


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of whatever asks a model about images with events."""
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="checkpoint folder or hub id (default: %(default)s)")
    add("--revision", help="branch, tag or commit of the hub id")
    for name, what in (("cell", "mask cells: 28 or 14 pixels"), ("ties", "exact budget, or Eq. 6 as printed"),
                       ("polarity", "count events, or add them by sign")):  # fmt: skip
        add(f"--{name}", choices=CHOICES[name], default=CHOICES[name][0], help=f"{what} (default: %(default)s)")
    add("--sensor", type=_sensor, metavar="WxH", help="event camera's size in pixels (default: the image's)")
    add("--window", type=float, nargs=2, metavar=("START", "END"), help="microseconds, both included (default: all)")
    add("--time-unit", choices=tuple(MICROSECONDS), help="unit of the file's times (default: us)")
    add("--order", help="columns of a bare N x 4 array, such as txyp (default: found)")
    add("--min-pixels", type=_count, help="smallest model input, pixels (default: the checkpoint's)")
    add("--max-pixels", type=_count, help="largest model input, pixels (default: the checkpoint's)")
    add("--system", metavar="TEXT", help="system turn, empty for none (default: the published models')")
    add("--repetition-penalty", type=float, help="of tokens seen before, 1 for none (default: the checkpoint's)")
    add("--max-new-tokens", type=_count, default=128, help="longest answer, tokens (default: %(default)s)")
    add("--device", help="such as cpu or cuda (default: cuda if there is one)")
    add("--dtype", choices=weights.DTYPES, help="default: the checkpoint's own")


def run(args: argparse.Namespace) -> None:
    """The command line's work. The small inputs are read first: a mistake there should not wait for a download."""
    options = {name: getattr(args, name) for name in PROMPT_OPTIONS}
    names = ("max_new_tokens", "temperature", "top_p", "seed", "repetition_penalty")
    sampling, penalty = {name: getattr(args, name) for name in names}, args.repetition_penalty
    with warnings.catch_warnings(record=True) as caught:  # told with the answer: where an error follows, it alone is
        warnings.simplefilter("always", UserWarning)
        check_choices(args.sparsity)
        sampler(args.temperature, args.top_p, penalty=1.0 if penalty is None else penalty)
        if args.picture:
            check_output(args.picture, ".png", (args.image, args.events))
        missing = "is no question" if args.question is None else "are no events" if args.events == "none" else ""
        if args.compare and missing:
            raise ValueError(f"--compare: there {missing}; give both")
        image = read_image(args.image)
        events = None if args.events == "none" else read_events(args.events, args.order, args.time_unit)
        if args.question is None and not (sys.stdin and (sys.stdin.isatty() or sys.stdin.buffer.peek())):
            raise ValueError(NO_QUESTION)
        model = EPVLM.from_pretrained(args.model, args.revision, args.device, args.dtype)
        text = model.text_ids(args.question or "", args.system)
        if args.compare:  # a first pass, for both to find weights and libraries in memory
            list(model.tokens(model.prompt(image.resize((28, 28)), np.ones((28, 28)), text, min_pixels=1), 1))
        prompts = [prepare(model, sampling, image, events, text, args.sparsity, **options)]
        if args.compare:
            try:
                prompts.insert(0, prepare(model, sampling, image, None, text, **options))
            except ValueError as error:  # of the dense image, which no sparsity makes smaller
                raise ValueError(f"{str(error).partition(', or with')[0]}, or leave --compare out") from None
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"epvlm: warning: {message}", file=sys.stderr)
    if args.picture:
        drawn = model.picture(prompts[-1][0], image, events, args.sensor, args.window)
        write_whole(args.picture, lambda file: drawn.save(file, "PNG"))
    if args.question is None:
        return converse(model, *prompts[0], sampling)
    costs = [say(model, *prompt, sampling) for prompt in prompts]
    if args.compare:
        print(comparison(*costs), file=sys.stderr)


def prepare(model: EPVLM, sampling: dict, *inputs, **options) -> tuple[Prompt, float]:
    """A prompt, and the seconds it took. Raises ValueError also where its answer would find no room."""
    start = time.perf_counter()
    prompt = model.prompt(*inputs, **options)
    spent = time.perf_counter() - start
    model.tokens(prompt, **sampling)
    return prompt, spent


def say(model: EPVLM, prompt: Prompt, spent: float, sampling: dict) -> tuple[int, int, int, float, float]:
    """Answers on stdout. Lines on stderr say, before the model runs, what was kept and what it will cost, and then when
    the first token came. spent: seconds that the prompt took. Returns patches, tokens, FLOPs, and seconds to the first
    token and to the last."""
    start, tokens = time.perf_counter() - spent, model.tokens(prompt, **sampling)
    tell(model, prompt)
    first = next(tokens)
    waited = time.perf_counter() - start
    print(f"first token after {waited:.2f} s", file=sys.stderr, flush=True)
    show(model, chain([first], tokens), sampling["max_new_tokens"])
    return len(prompt.patches), prompt.tokens, model.flops(prompt)[0], waited, time.perf_counter() - start


def tell(model: EPVLM, prompt: Prompt) -> None:
    """Says on stderr what was kept and what it will cost, and on a terminal shows the progress from here on."""
    packed, dense = model.flops(prompt)
    size, unit = scale(dense)
    print(f"{prompt}, {packed / size:.2f} of {dense / size:.2f} {unit}FLOPs", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        show_progress(model)


def show(model: EPVLM, tokens: Iterator[int], limit: int) -> None:
    """Prints an answer as it comes; a line on stderr says where it was cut."""
    told = []
    try:
        for piece in model.pieces(told.append(token) or token for token in tokens):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    if len(told) == limit and told[-1] not in model.stop:
        print(f"stopped after {limit} token{'s' * (limit > 1)}", file=sys.stderr, flush=True)


def scale(flops: int) -> tuple[float, str]:
    """How many make a unit, and its prefix."""
    return next((size, unit) for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if flops >= size or unit == "M")


def comparison(dense: tuple, packed: tuple) -> str:
    """What `say` returned of both, and the ratios, as a table."""
    size, unit = scale(dense[2])
    lines = [f"{'':6}  patches   tokens  {unit}FLOPs  first token, s  answer, s"]
    for name, (patches, tokens, flops, first, whole) in (("dense", dense), ("packed", packed)):
        lines.append(f"{name:6}{patches:9}{tokens:9}{flops / size:8.2f}{first:16.3f}{whole:11.3f}")
    ratios = (p / d for p, d in zip(packed, dense, strict=True))
    return "\n".join([*lines, "{:6}{:9.2f}{:9.2f}{:8.2f}{:16.2f}{:11.2f}".format("ratio", *ratios)])


def questions() -> Iterator[str]:
    """The lines of standard input that are not empty, asked for on a terminal. Raises ValueError for an endless one."""
    while True:
        if sys.stdin.isatty():
            print("question: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline(2**20)
        if not line:
            return print(file=sys.stderr) if sys.stdin.isatty() else None
        if len(line) == 2**20:
            raise ValueError("a line of over 1 MiB on standard input; give one question a line")
        if question := line.decode(errors="surrogateescape").strip():
            yield question


def converse(model: EPVLM, prompt: Prompt, spent: float, sampling: dict) -> None:
    """Answers questions about one image, each for itself; what stands before them is computed once. One that cannot be
    answered is told, and the next is read. Raises ValueError at the end of a pipe that had one, or none at all."""
    start, asked, failed = time.perf_counter() - spent, 0, 0
    tell(model, prompt)
    seen = model.see(prompt)
    print(f"read in {time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)
    for asked, question in enumerate(questions(), 1):
        try:
            tokens = model.tokens(model.with_question(prompt, question), **sampling, seen=seen)
            show(model, tokens, sampling["max_new_tokens"])
        except ValueError as error:
            failed += 1
            print(f"epvlm: question {asked}: {error}", file=sys.stderr)
    if not sys.stdin.isatty() and (failed or not asked):
        raise ValueError(f"{failed} of {asked} questions could not be answered; correct them" if asked else NO_QUESTION)


def show_progress(model: EPVLM) -> None:
    """Counts on stderr the layers that have read the prompt; after the last the line is cleared."""
    layers = [*model.vit.blocks, *model.llm.model["layers"]]

    def show(number: int) -> None:
        print(f"\rlayer {number} of {len(layers)}", end="", file=sys.stderr, flush=True)
        if number == len(layers):
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            for hook in hooks:
                hook.remove()

    hooks = [layer.register_forward_hook(lambda *_, n=n: show(n)) for n, layer in enumerate(layers, 1)]


def main(argv: list[str] | None = None) -> int:
    """Answers questions about an image; returns the exit status."""
    parser = Parser("epvlm", description="Answers questions about an image from what moves.", allow_abbrev=False)
    add = parser.add_argument
    add("image", help="image file")
    add("events", help="recording or event map, .npy or .npz; the word none for the dense image")
    add("question", nargs="?", help="what to ask; left out, questions are read one a line from standard input")
    add("--sparsity", type=float, default=0.5, help="fraction of cells dropped, in [0, 1) (default: %(default)s)")
    add_options(parser)
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="probability to draw from (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the drawing (default: %(default)s)")
    add("--compare", action="store_true", help="answer from the dense image first, and tell what dropping saves")
    add("--picture", type=Path, metavar="OUT.png", help="draw the image, its events, and what is kept")
    return exit_status("epvlm", lambda: run(parser.parse_intermixed_args(argv)))  # the question may follow options


if __name__ == "__main__":
    sys.exit(main())
