"""Reads a Qwen2-VL checkpoint as it is published: its JSON settings, its tokenizer, and safetensors.

No equation stands here. The paper is training-free: the weights are those of Qwen2-VL, untouched.

Glossary
    folder           the checkpoint's folder, the user's own or one in huggingface_hub's cache
    vision, text     settings of the two parts of the model, however config.json lays them out
    shapes           tensor name -> shape of every tensor the model has; names as published (visual., model., lm_head.)

What differs from plain Qwen2-VL: only the strictness. Every tensor in the files is accounted for; one that is missing,
unexpected or misshapen is an error that names it and both shapes. Nothing is unpickled, no code of a checkpoint runs.
"""

import json
import math
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils import disable_progress_bars, logging
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from llm import SPECIAL, SYSTEM, Decoder, DecoderConfig
from vit import ImageConfig, VisionConfig, VisionTransformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_ERRORS = {  # what huggingface_hub raises, narrow kinds first, and what it means
    errors.HFValidationError: "is neither a folder nor a hub id such as Qwen/Qwen2-VL-2B-Instruct; correct it",
    errors.LocalEntryNotFoundError: "is not in the cache, and the hub out of reach or HF_HUB_OFFLINE set; connect",
    errors.GatedRepoError: "needs access; ask for it on its page at the hub, then `hf auth login`",
    errors.RevisionNotFoundError: "has no such revision; correct it",
    errors.RepositoryNotFoundError: "is unknown to the hub, or private; correct it, or `hf auth login`",
    Exception: "cannot be downloaded; try again, make room, or set HF_HOME to a folder you can write",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RENAMED = {"model.visual.": "visual.", "model.language_model.": "model.", "language_model.": "model."}  # -> published
ROPE = ("default", "mrope")
FIXED = {  # settings in which other models differ, and what Qwen2-VL has
    "text": {"rope_type": ROPE, "type": ROPE, "hidden_act": ("silu",), "use_sliding_window": (False,)},
    "vision": {"hidden_act": ("quick_gelu",)},
}
FITS = {  # what a setting of a type may be; in JSON True is no number, and 200704.0 is whole
    bool: lambda value: type(value) is bool,
    int: lambda value: type(value) in (int, float) and 0 < value < 2**31 and value == int(value),
    float: lambda value: type(value) in (int, float) and 0 <= value < math.inf,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Checkpoint:
    """The model, and what else its files say."""

    vit: VisionTransformer
    llm: Decoder
    tokenizer: Tokenizer
    image_config: ImageConfig
    ends: frozenset[int] = frozenset()  # ids of tokens that end an answer, besides <|im_end|>
    repetition_penalty: float = 1.0
    usual_system: bool = True  # the chat template, if there is one, has SYSTEM as its system turn


def load(model: str | Path, revision: str | None = None, device=None, dtype=None, change=None) -> Checkpoint:
    """A checkpoint from a folder, or from the hub's repository of that name, whose weights are fetched only when its
    settings are found to fit. change: see `read_tensors`; the others: see `EPVLM.from_pretrained`. Raises ValueError
    that names the fault."""
    kind = str(dtype).removeprefix("torch.")
    need(kind in ("None", *DTYPES), f"dtype {kind!r}", "not one to compute in", f"give one of {', '.join(DTYPES)}")
    try:
        device = torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
        need(device.type in ("cpu", "cuda", "mps"), device, "not a device that computes", "give cpu")
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used ({reason:.80}); try cpu") from None
    folder = find(model, revision)
    vit, llm = build(folder)
    tokenizer, image_config = read_tokenizer(folder, llm.config.vocab_size), read_image_config(folder)
    ends, penalty = read_generation(folder)
    jinja, names = folder / "chat_template.jinja", ("chat_template.json", "tokenizer_config.json")
    templates = [read_json(folder / name).get("chat_template") for name in names]
    if jinja.is_file():
        templates = [read_file(jinja, lambda path: path.read_text("utf-8"), "a chat template", 2**26)]
    usual_system = SYSTEM in str(next(filter(None, templates), SYSTEM))
    if folder != Path(os.path.expanduser(model)):  # the hub's: its folder is named by the commit
        download(str(model), folder.name, [path.name for path in shards(folder)])
    shapes = {name: tuple(tensor.shape) for name, tensor in published(vit, llm).items()}
    tensors = read_tensors(folder, shapes, DTYPES.get(kind), device, change)
    for module, prefix in ((vit, "visual."), (llm, "")):
        module.requires_grad_(False).eval()  # first, since int8 weights have no gradients
        module.load_state_dict({name: tensors[prefix + name] for name in module.state_dict()}, assign=True)
    return Checkpoint(vit, llm, tokenizer, image_config, ends, penalty, usual_system)


def need(fine, path, what: str, remedy: str = "fetch the checkpoint again") -> None:
    if not fine:
        raise ValueError(f"{path}: {what}; {remedy}")


def find(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `model` itself if it is one, else huggingface_hub's cache, into which the settings of
    the hub's repository of that name are downloaded. Raises ValueError with the remedy."""
    folder = Path(os.path.expanduser(model))  # which, unlike Path's, raises nothing
    if not (folder.exists() or folder.is_absolute() or str(model).startswith((".", "~"))):
        names = ["config.json", "generation_config.json", "p*processor_config.json", "tokenizer*.json", INDEX]
        return download(str(model), revision, [*names, "chat_template.*"])  # the weights come later
    need(not revision, model, "is a folder, which has no revisions", "leave revision out")
    need(not (folder / "adapter_config.json").is_file(), model, "holds an adapter", "merge it (peft: merge_and_unload)")
    return folder


def download(model: str, revision: str | None, names: list[str]) -> Path:
    """Files from the root of a hub's repository into the cache. Progress bars show on a terminal. Raises ValueError."""
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=names, ignore_patterns="*/*"))
    except Exception as error:  # the hub's client, its network library and the disk raise errors of many kinds
        meaning = next(text for kind, text in HUB_ERRORS.items() if isinstance(error, kind))
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            meaning = "is unknown to the hub, private, or the hub refuses HF_TOKEN (401); correct it"
        raise ValueError(f"{model}: {meaning} ({type(error).__name__}: {' '.join(str(error).split())[:80]})") from None


def read_file(path: Path, read, what: str, most: int):
    """What `read` makes of a plain file of `most` bytes at most. Raises ValueError naming one that is not `what`."""
    try:
        need(path.stat().st_size <= most and path.is_file(), path.name, f"not a file of at most {most >> 20} MiB")
        return read(path)
    except FileNotFoundError:
        whole = "give a whole checkpoint, with weights in safetensors (save_pretrained makes them of .bin), or a hub id"
        raise ValueError(f"{path}: no such file; {whole}") from None
    except Exception as error:  # the tokenizers package raises nothing narrower
        pointer = path.is_file() and path.open("rb").read(19) == b"version https://git"
        need(not pointer, path, "a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder")
        raise ValueError(f"{path}: not {what} ({error}); fetch the checkpoint again") from None


def read_json(path: Path, *keys: str, required: bool = False) -> dict:
    """The object in a JSON file, or the one at `keys` in it; {} where there is none. Raises ValueError."""
    if not required and not path.is_file():
        return {}
    content = read_file(path, lambda path: json.loads(path.read_text(encoding="utf-8")), "readable as JSON", 2**26)
    need(isinstance(content, dict), path, f"the file is {content!r:.60}, not an object")
    return section(path, content, *keys)


def section(path: Path, content: dict, *keys: str) -> dict:
    """A copy of the object at `keys` in another; {} where there is none. Raises ValueError for anything else."""
    for key in keys:
        content = content.get(key) or {}
        need(isinstance(content, dict), path, f"{key} is {content!r:.60}, not an object")
    return dict(content)


def read_config(folder: Path) -> tuple[dict, dict]:
    """The vision and the text settings of config.json, the same whichever way it is laid out: published files keep the
    decoder's values at the root, newer ones nest them in text_config, some do both; rotary settings are `rope_theta`
    beside `rope_scaling`, or both within `rope_parameters`. Source: Qwen2VLConfig in transformers'
    configuration_qwen2_vl.py. Raises ValueError if it describes another model."""
    path = folder / "config.json"
    root = read_json(path, required=True)
    kind = root.get("model_type")
    need(kind == "qwen2_vl", path, f"model_type is {kind!r:.60}, not 'qwen2_vl'", "give a Qwen2-VL checkpoint")
    vision, text = {}, {}
    for settings, *keys in ((text,), (text, "text_config"), (vision, "vision_config")):
        for inner in ((), ("rope_scaling",), ("rope_parameters",)):
            settings |= section(path, root, *keys, *inner)
    vision.setdefault("in_channels", vision.get("in_chans", 3))
    if root.get("tie_word_embeddings") is not None:  # its place is the root; some files have it nested
        text["tie_word_embeddings"] = root["tie_word_embeddings"]
    if text.get("num_key_value_heads", 0) is None:  # null differs from absent, which is 8
        text["num_key_value_heads"] = text.get("num_attention_heads")
    for name, settings in (("text", text), ("vision", vision)):
        for key, accepted in FIXED[name].items():
            told = f"{name} {key} is {settings.get(key)!r:.60}, not {' or '.join(map(repr, accepted))}"
            need(settings.get(key) in (None, *accepted), path, told, "give a checkpoint that fits")
    quantised = text.get("quantization_config")
    need(not quantised, path, f"quantization_config is {quantised!r:.60}, not absent", "give one not quantised")
    return vision, text


def read_image_config(folder: Path) -> ImageConfig:
    """The image settings. Pixel limits stand at the root of preprocessor_config.json or in its `size`, there also as
    shortest_edge and longest_edge. An image_processor in processor_config.json replaces them, as in transformers."""
    path = folder / "processor_config.json"
    if not (content := read_json(path, "image_processor")):
        path = folder / "preprocessor_config.json"
        content = read_json(path)
    size = section(path, content, "size")
    for key, newer in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        content[key] = content.get(key) or size.get(key) or size.get(newer)
    images = fill(ImageConfig, content, path)
    limits = f"min_pixels {images.min_pixels} is above max_pixels {images.max_pixels}"
    need(images.min_pixels <= images.max_pixels, path, limits, "correct one")
    fits = len(images.image_mean) == len(images.image_std) == 3 and min(images.image_std) > 0
    need(fits, path, "image_mean and image_std need three values, image_std above 0")
    return images


def fill(config_class: type, content: dict, path: Path):
    """A frozen config dataclass from a section of a JSON file: unknown keys are left, absent ones take the default.
    Raises ValueError, naming file and key, for a value that does not pass FITS."""
    values = {}
    for field in fields(config_class):
        if (value := content.get(field.name)) is not None:
            several = isinstance(field.default, tuple)
            kind = type(field.default[0] if several else field.default)
            fits = isinstance(value, list) == several and all(map(FITS[kind], value if several else [value]))
            wanted = "a bool" if kind is bool else f"{'a list of ' * several or 'a '}positive {kind.__name__}"
            need(fits, path, f"{field.name} is {value!r:.60}, not {wanted}")
            values[field.name] = tuple(map(kind, value)) if several else kind(value)
    return config_class(**values)


def read_generation(folder: Path) -> tuple[frozenset[int], float]:
    """The ids that end an answer (generation_config.json's, else config.json's), and the repetition penalty, or 1."""
    path = folder / "generation_config.json"
    settings = read_json(path)
    penalty, ends = settings.get("repetition_penalty") or 1, settings.get("eos_token_id")
    need(FITS[float](penalty) and penalty > 0, path, f"repetition_penalty is {penalty!r}, not a positive float")
    if ends is None:
        path, ends = folder / "config.json", read_config(folder)[1].get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    need(all(type(end) is int for end in ends), path, f"eos_token_id is {ends!r}, not token ids")
    return frozenset(ends), float(penalty)


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """tokenizer.json, without the truncation and padding some files ask for, and what tokenizer_config.json adds.
    Raises ValueError if it is broken, lacks one of the SPECIAL tokens, or has more tokens than the model."""
    path = folder / "tokenizer.json"
    tokenizer = read_file(path, lambda path: Tokenizer.from_file(str(path)), "a tokenizer", 2**28)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    add_tokens(tokenizer, folder / "tokenizer_config.json")
    for text in (f"<|{name}|>" for name in SPECIAL):
        need(tokenizer.token_to_id(text) is not None, path, f"it has no {text}", "put the checkpoint's own there")
    sizes = f"it has {tokenizer.get_vocab_size()} tokens, the model {vocab_size}"
    need(tokenizer.get_vocab_size() <= vocab_size, path, sizes, "put the checkpoint's own there")
    return tokenizer


def add_tokens(tokenizer: Tokenizer, path: Path) -> None:
    """Adds, in order of id, the tokens of added_tokens_decoder that tokenizer.json lacks: in the published files 11 of
    14, the image's among them. Raises ValueError where a token then has another id."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    listed = read_json(path, "added_tokens_decoder")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        listed = {int(n): AddedToken(t["content"], **{f: t[f] for f in flags if f in t}) for n, t in listed.items()}
    except (KeyError, TypeError, ValueError) as error:
        told = f"{path}: added_tokens_decoder does not list tokens by their ids ({error!r})"
        raise ValueError(f"{told}; fetch the checkpoint again") from None
    for number, token in sorted(listed.items()):
        if token.content not in known:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        told = f"{token.content} has id {number} there and {tokenizer.token_to_id(token.content)} in tokenizer.json"
        need(tokenizer.token_to_id(token.content) == number, path, told, "both files must be of one checkpoint")


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; infinite where that is not known."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
        return torch.cuda.mem_get_info(device)[0] + held
    meminfo = Path("/proc/meminfo").read_text() if os.path.exists("/proc/meminfo") else ""
    return 1024 * int(found[1]) if (found := re.search(r"MemAvailable: *(\d+)", meminfo)) else math.inf


def build(folder: Path) -> tuple[VisionTransformer, Decoder]:
    """The model that a folder's config.json describes, on the meta device, without weights. Raises ValueError."""
    path, (vision, text) = folder / "config.json", read_config(folder)
    vision, text = fill(VisionConfig, vision, path), fill(DecoderConfig, text, path)
    sizes = f"hidden_size {vision.hidden_size} (vision), {text.hidden_size} (text), mrope_section {text.mrope_section}"
    fits = vision.hidden_size == text.hidden_size and 2 * sum(text.mrope_section) == text.head_dim
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    fits &= len(text.mrope_section) == 3 and text.hidden_size % heads == heads % kv_heads == 0
    fits &= vision.embed_dim % (4 * vision.num_heads) == 0
    need(fits, path, f"{sizes}, {vision.num_heads} vision heads, {heads} and {kv_heads} heads do not fit each other")
    need(max(vision.depth, text.num_hidden_layers) < 1000, path, "has more than 999 layers")
    with torch.device("meta"):
        return VisionTransformer(vision), Decoder(text)


def published(vit: VisionTransformer, llm: Decoder) -> dict[str, Tensor]:
    """Every tensor of the model by its published name."""
    return {f"visual.{name}": tensor for name, tensor in vit.state_dict().items()} | llm.state_dict()


def shards(folder: Path) -> list[Path]:
    """The files of the weights: model.safetensors, or what the index names. Raises ValueError for other names."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() or not index.is_file():
        return [single]
    names = sorted(set(map(str, read_json(index, "weight_map").values())))
    beside = all(re.fullmatch(r"[^/\\\0]+\.safetensors", name) for name in names)
    need(names and beside, index, f"weight_map names {names!r:.60}, not shards beside it")
    return [folder / name for name in names]


def read_tensors(folder: Path, shapes: dict[str, tuple], dtype=None, device="cpu", change=None) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its published name, all checked against `shapes` before one is converted. They
    are memory-mapped and used as they lie: nothing is copied where the file has the dtype asked for (None: that of its
    embedding) and the device is the CPU. Else they are converted one by one. With `change`, a function of name and
    tensor, all are, and what it returns is held (examples/int8.py). Raises ValueError that names a misfit."""
    stored, spelt = {}, {}  # by published name: the tensor, and its file and name there
    for path in shards(folder):
        for name, tensor in read_file(path, load_file, "a safetensors file", 2**40).items():
            newer = next(filter(name.startswith, RENAMED), "")
            key = RENAMED.get(newer, "") + name.removeprefix(newer)
            need(key not in stored, path, f"{name} is stored already, as {spelt.get(key)}", "remove one")
            stored[key], spelt[key] = tensor, (path, name)
    twice = HEAD in stored and HEAD not in shapes  # a tied head need not be stored
    check(folder, stored, shapes | {HEAD: shapes[EMBEDDING]} if twice else shapes, spelt)

    def read_again(name: str) -> Tensor:  # by a mapping of its own, given back at once: two copies are never held
        path, name_there = spelt[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(name_there)

    same = not twice or torch.equal(read_again(HEAD), read_again(EMBEDDING))
    remedy = 'set "tie_word_embeddings": false in config.json, or remove the tensor'
    need(same, folder, f"{HEAD} differs from {EMBEDDING}, although config.json ties them", remedy)
    dtype, tensors = dtype or stored[EMBEDDING].dtype, {}
    for name in shapes:
        tensors[name] = stored.pop(name)
        if change or tensors[name].dtype != dtype or torch.device(device).type != "cpu":
            tensor = read_again(name).to(device, dtype)
            tensors[name] = change(name, tensor) if change else tensor
    return tensors


def check(folder: Path, stored: dict[str, Tensor], shapes: dict[str, tuple], spelt: dict[str, tuple]) -> None:
    """Raises ValueError at the first tensor that is missing, unexpected or misshapen, and says how many are."""
    unexpected = [spelt[name][1] for name in stored if name not in shapes]
    prefix = os.path.commonprefix(unexpected).rpartition(".")[0]  # noqa: RUF071 (of characters, cut at a dot)
    many = len(unexpected) > 1 and prefix
    faults = [f"{len(unexpected)} tensors whose names begin with {prefix}. are unexpected"] if many else []
    faults += [f"{name} {shape} is missing" for name, shape in shapes.items() if name not in stored]
    for name, tensor in stored.items():
        (path, spelling), shape, expected = spelt[name], tuple(tensor.shape), shapes.get(name)
        if expected is None:
            faults += [] if many else [f"{path.name}: {spelling} {shape} is unexpected"]
        elif shape != expected:
            faults.append(f"{path.name}: {spelling} has shape {shape}, config.json makes it {expected}")
        elif tensor.dtype not in DTYPES.values():
            faults.append(f"{path.name}: {spelling} is of type {tensor.dtype}, not one of {', '.join(DTYPES)}")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    need(not faults, folder, "".join(faults[:1]) + more, "config.json and the weights must be of one model")
