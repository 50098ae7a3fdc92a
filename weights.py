"""Reads a Qwen2-VL checkpoint as it is published: its JSON settings, and safetensors in one file or in shards.

No equation stands here. The paper is training-free: the weights are those of Qwen2-VL, untouched.

Glossary
    folder           the checkpoint's folder, the user's own or one in huggingface_hub's cache
    vision, text     settings of the two parts of the model, whichever of its four layouts config.json has
    shapes           tensor name -> shape of every tensor the model has; names as published (visual., model., lm_head.)

What differs from plain Qwen2-VL: only the strictness. Every tensor in the files is accounted for; one that is missing,
unexpected or misshapen is an error that names it and both shapes. Nothing is unpickled, no code of a checkpoint runs.
"""

import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

import torch
from huggingface_hub import errors, snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.utils import disable_progress_bars, logging
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

INDEX = "model.safetensors.index.json"
SETTINGS = [  # what is fetched and checked before the weights; the hub takes a name to mean the repository's root
    *(f"{name}config.json" for name in ("", "generation_", "preprocessor_", "processor_", "tokenizer_")),
    *("tokenizer.json", "chat_template.json", "chat_template.jinja", INDEX),
]
USUAL = "You are a helpful assistant."  # the system turn of the published models
DTYPES = ("bfloat16", "float16", "float32")
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
RENAMED = {
    "model.visual.": "visual.",
    "model.language_model.": "model.",
    "language_model.": "model.",
}  # newer spelling -> published spelling
FIXED = (  # settings that other models have otherwise: section, key, what Qwen2-VL has
    ("text", "rope_type", "default", "mrope"),
    ("text", "type", "default", "mrope"),
    ("text", "hidden_act", "silu"),
    ("text", "use_sliding_window", False),
    ("text", "quantization_config"),
    ("vision", "hidden_act", "quick_gelu"),
)
FITS = {  # what a setting of a type may be; in JSON True is no number
    bool: lambda value: type(value) is bool,
    int: lambda value: type(value) in (int, float) and 0 < value < 2**31 and value == int(value),  # 200704.0 too
    float: lambda value: type(value) in (int, float) and 0 <= value < math.inf,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def fault(path, what: str, remedy: str = "fetch the checkpoint again") -> ValueError:
    return ValueError(f"{path}: {what}; {remedy}")


def fetch(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `model` itself if it is one, else huggingface_hub's cache, into which the settings of
    the hub's repository of that name are downloaded, not yet its weights. Raises ValueError with the remedy."""
    folder = Path(os.path.expanduser(model))  # which, unlike Path's, raises nothing
    if not (folder.exists() or folder.is_absolute() or str(model).startswith((".", "~"))):
        return _download(str(model), revision, SETTINGS)
    if (folder / "adapter_config.json").is_file():
        raise fault(model, "holds an adapter", "merge it into its model (peft: merge_and_unload) and save that")
    if not (folder / "config.json").is_file():
        what = "there is no config.json in it" if folder.is_dir() else "no such folder"
        raise fault(model, what, "give the folder that holds a checkpoint's config.json, or a hub id")
    if revision:
        raise fault(model, "a folder has no revisions", "leave --revision out")
    return folder


def fetch_weights(model: str | Path, folder: Path) -> None:
    """Downloads the weights that belong to the settings which `fetch` put into `folder`. Raises ValueError."""
    if folder != Path(os.path.expanduser(model)):  # whose name is then the commit's
        _download(str(model), folder.name, [path.name for path in _shards(folder)])


def _download(model: str, revision: str | None, names: list[str]) -> Path:
    """Files of a hub's repository into its cache, with progress bars on a terminal. Raises ValueError."""
    logging.set_verbosity_error()  # what is missing is told by whoever reads it
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=names))
    except errors.HFValidationError:
        told = "neither a folder nor a hub id such as Qwen/Qwen2-VL-2B-Instruct", "correct --model"
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE forbids the hub" if HF_HUB_OFFLINE else "the hub cannot be reached"
        told = f"not in the local cache, and {why}", "connect once, or give a folder: --model DIR"
    except errors.GatedRepoError:
        told = "needs leave", "ask for it on its page at the hub, then `hf auth login`"
    except errors.RevisionNotFoundError:
        told = f"has no revision {revision!r}", "correct --revision"
    except errors.RepositoryNotFoundError:
        told = "no such repository, or a private one", "correct --model, or `hf auth login` and look at HF_TOKEN"
    except Exception as error:  # whatever the hub's client, its network library and the disk raise
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        told = f"cannot be downloaded ({reason})", "try again, make room, or set HF_HOME to a folder you can write"
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            told = "the hub refuses your token (401)", "correct or unset HF_TOKEN, or `hf auth login`"
    raise fault(model, *told)


def read_file(path: Path, read: Callable, what: str, most: int):
    """What `read` makes of a plain file of `most` bytes at most. Raises ValueError naming one that is not `what`."""
    try:
        if path.stat().st_size > most or not path.is_file():
            raise ValueError(f"not a file of at most {most >> 20} MiB")
        return read(path)
    except FileNotFoundError:
        raise fault(path, "no such file", "the checkpoint is not complete, fetch it again or copy it there") from None
    except Exception as error:  # the tokenizers package raises nothing narrower
        if path.is_file() and path.open("rb").read(19) == b"version https://git":
            raise fault(path, "a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder") from None
        raise fault(path, f"not {what} ({error})") from None


def read_json(path: Path, required: bool = True) -> dict:
    """A JSON object from a file; {} where an optional file is missing. Raises ValueError naming the file."""
    if not required and not path.is_file():
        return {}
    content = read_file(path, lambda path: json.loads(path.read_text(encoding="utf-8")), "readable as JSON", 2**26)
    if not isinstance(content, dict):
        raise fault(path, f"holds a {type(content).__name__}, not an object")
    return content


def _object(path: Path, section: dict, key: str) -> dict:
    value = section.get(key) or {}
    if not isinstance(value, dict):
        raise fault(path, f"{key} is {value!r}, not an object")
    return dict(value)


def read_config(folder: Path) -> tuple[dict, dict]:
    """The vision and the text settings of config.json, the same whichever way it is laid out.

    Published files keep the decoder's values at the root, newer ones nest them in text_config, some do both; rotary
    settings are `rope_theta` beside `rope_scaling`, or both within `rope_parameters`. Values absent from the file are
    left out: the dataclasses hold Qwen2-VL's own defaults, which such files rely on. Source: Qwen2VLConfig in
    transformers' configuration_qwen2_vl.py. Raises ValueError if it describes another model."""
    path = folder / "config.json"
    root = read_json(path)
    if root.get("model_type") != "qwen2_vl":
        raise fault(path, f"model_type is {root.get('model_type')!r}, not 'qwen2_vl'", "give a Qwen2-VL checkpoint")
    vision = _object(path, root, "vision_config")
    text = {**root, **_object(path, root, "text_config")}
    vision.setdefault("in_channels", vision.get("in_chans", 3))
    if root.get("tie_word_embeddings") is not None:  # its place is the root; some files have it nested
        text["tie_word_embeddings"] = root["tie_word_embeddings"]
    for section in (vision, text):
        rope = {**_object(path, section, "rope_scaling"), **_object(path, section, "rope_parameters")}
        section.update((key, rope[key]) for key in ("rope_theta", "mrope_section", "rope_type", "type") if key in rope)
    if text.get("num_key_value_heads", 0) is None:  # null and absent differ: absent is 8
        text["num_key_value_heads"] = text.get("num_attention_heads")
    for section, key, *accepted in FIXED:
        value = (vision if section == "vision" else text).get(key)
        if value not in (None, *accepted):
            told = f"{section} {key} is {value!r}" + f", not {' or '.join(map(repr, accepted))}" * bool(accepted)
            raise fault(path, told, "that is not implemented, give a checkpoint without it")
    return vision, text


def read_image_config(folder: Path, config_class: type):
    """The image settings as `config_class`. Pixel limits stand at the root of preprocessor_config.json or within its
    `size`, there also as shortest_edge and longest_edge; processor_config.json's image_processor, if there is one,
    takes the place of the whole file, as in transformers."""
    path = folder / "processor_config.json"
    section = _object(path, read_json(path, required=False), "image_processor")
    if not section:
        path = folder / "preprocessor_config.json"
        section = read_json(path, required=False)
    size = _object(path, section, "size")
    for key, newer in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        section = {**section, key: section.get(key) or size.get(key) or size.get(newer)}
    return fill(config_class, section, path)


def fill(config_class: type, section: dict, path: Path):
    """A frozen config dataclass from a section of a JSON file: unknown keys are left, absent ones take the default.

    Raises ValueError, naming file and key, for a value that does not pass FITS."""
    values = {}
    for field in fields(config_class):
        value, several = section.get(field.name), get_origin(field.type) is tuple
        if value is None:
            continue
        kind = get_args(field.type)[0] if several else field.type
        if isinstance(value, list) != several or not all(map(FITS[kind], value if several else [value])):
            what = f"{'a list of ' if several else 'a '}positive {kind.__name__}"
            raise fault(path, f"{field.name} is {value!r}, not {what}")
        values[field.name] = tuple(map(kind, value)) if several else kind(value)
    try:
        return config_class(**values)
    except ValueError as error:
        raise fault(path, error) from None


def read_generation(folder: Path) -> tuple[set[int], float]:
    """The token ids that end an answer (generation_config.json's, else config.json's; one or several), and the
    repetition penalty, 1 where there is none. Raises ValueError."""
    path = folder / "generation_config.json"
    settings = read_json(path, required=False)
    if not FITS[float](penalty := settings.get("repetition_penalty") or 1):
        raise fault(path, f"repetition_penalty is {penalty!r}, not a positive float")
    ends = settings.get("eos_token_id")
    if ends is None:
        path, ends = folder / "config.json", read_config(folder)[1].get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in ends):
        raise fault(path, f"eos_token_id is {ends!r}, not token ids")
    return set(ends), float(penalty)


def read_template(folder: Path) -> str:
    """The chat template, from the first of the places where transformers looks for it; "" where there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_file(path, lambda path: path.read_text(encoding="utf-8"), "a chat template", 2**26)
    places = (folder / name for name in ("chat_template.json", "tokenizer_config.json"))
    return next((str(found) for path in places if (found := read_json(path, False).get("chat_template"))), "")


def read_tokenizer(folder: Path, vocab_size: int, special: Iterable[str]) -> Tokenizer:
    """tokenizer.json, without the truncation and padding some files ask for, and what tokenizer_config.json adds.
    Raises ValueError if it is broken, lacks one of the `special` tokens, or has more tokens than the model."""
    path = folder / "tokenizer.json"
    tokenizer = read_file(path, lambda path: Tokenizer.from_file(str(path)), "a tokenizer", 2**28)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, folder / "tokenizer_config.json")
    faults = [f"it has no {text}" for text in special if tokenizer.token_to_id(text) is None]
    if tokenizer.get_vocab_size() > vocab_size:
        faults.append(f"it has {tokenizer.get_vocab_size()} tokens, the model {vocab_size}")
    if faults:
        raise fault(path, f"not this model's tokenizer ({faults[0]})", "put the checkpoint's own there")
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, path: Path) -> None:
    """Adds, in order of id, the tokens of added_tokens_decoder that tokenizer.json lacks: in the published files 11 of
    14, the image's among them. Raises ValueError where a token then has another id."""
    listed, known = _object(path, read_json(path, required=False), "added_tokens_decoder"), set()
    known.update(token.content for token in tokenizer.get_added_tokens_decoder().values())
    flags = {"single_word", "lstrip", "rstrip", "normalized", "special"}
    try:
        tokens = {
            int(number): AddedToken(token["content"], **{flag: token[flag] for flag in flags & token.keys()})
            for number, token in listed.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise fault(path, f"added_tokens_decoder does not list tokens by their ids ({error})") from None
    for number, token in sorted(tokens.items()):
        if token.content not in known:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if (found := tokenizer.token_to_id(token.content)) != number:
            remedy = "tokenizer.json and tokenizer_config.json must be of one checkpoint"
            raise fault(path, f"{token.content} has id {number} there and {found} in tokenizer.json", remedy)


def placement(device, dtype) -> tuple[torch.device, torch.dtype | None]:
    """Device and dtype by their names. None: a CUDA GPU if there is one, else the CPU; the dtype stays None. Raises
    ValueError for what cannot be used."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name not in (None, *DTYPES):
        raise ValueError(f"dtype {name!r}: give one of {', '.join(DTYPES)}")
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it is none of cpu, cuda, mps")
        return torch.empty(0, device=place).device, name and getattr(torch, name)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used ({str(error).splitlines()[0]}); try cpu") from None


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; infinite where that is not known."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return math.inf


def read_tensors(folder: Path, shapes: dict[str, tuple], tied: bool, dtype=None, device="cpu") -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its published name, all checked against `shapes` before one is read.

    Tensors are memory-mapped and used as they lie: nothing is copied where the file has the dtype asked for (None: that
    of its embedding) and the device is the CPU. Else they are converted one by one, each from a mapping of its own that
    is given back at once, so that two copies of the weights are never held. Raises ValueError."""
    stored = _stored(folder)
    _check(folder, stored, shapes, tied)
    dtype = dtype or stored[EMBEDDING].dtype
    tensors = {}
    for name, entry in stored.items():
        as_it_lies = entry.dtype == dtype and torch.device(device).type == "cpu"
        file = entry.file if as_it_lies else _open(entry.path)
        tensors[name] = file.get_tensor(entry.name).to(device=device, dtype=dtype)
    if tied and HEAD in tensors and not torch.equal(tensors.pop(HEAD), tensors[EMBEDDING]):
        what = f"{HEAD} differs from {EMBEDDING}, although config.json ties them"
        raise fault(stored[HEAD].path, what, 'set "tie_word_embeddings": false in config.json, or remove the tensor')
    return tensors


class Entry(NamedTuple):
    """A tensor in a file: its name as spelt there, and what the file's header says of it."""

    name: str
    path: Path
    file: safe_open
    shape: tuple[int, ...]
    dtype: torch.dtype


def _stored(folder: Path) -> dict[str, Entry]:
    """Published name -> entry, for every tensor of every shard."""
    stored: dict[str, Entry] = {}
    if not any((folder / name).is_file() for name in ("model.safetensors", INDEX)):
        remedy = "fetch them; save older weights (.bin) anew with transformers' save_pretrained"
        raise fault(folder, f"neither model.safetensors nor {INDEX}", remedy)
    for path in _shards(folder):
        file = _open(path)
        for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            header = file.get_slice(name)
            if (kind := header.get_dtype()) not in STORED:
                remedy = f"give a checkpoint that is not quantised: {', '.join(STORED)}"
                raise fault(path, f"{name} is of type {kind}", remedy)
            newer = next(filter(name.startswith, RENAMED), "")
            published = RENAMED.get(newer, "") + name.removeprefix(newer)
            if published in stored:
                raise fault(path, f"{name} is stored already in {stored[published].path.name}", "remove one")
            stored[published] = Entry(name, path, file, tuple(header.get_shape()), STORED[kind])
    return stored


def _shards(folder: Path) -> list[Path]:
    """model.safetensors, or what the index names where there is one."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file() or not index.is_file():
        return [single]
    files = _object(index, read_json(index), "weight_map").values()
    outside = [file for file in files if not re.fullmatch(r"[^/\\\0]+\.safetensors", str(file))]
    if outside or not files:
        raise fault(index, f"{repr(outside[0]) if outside else 'an empty weight_map'} is not a shard beside it")
    return [folder / file for file in sorted(set(files))]


def _open(path: Path):
    return read_file(path, lambda path: safe_open(path, framework="pt"), "a safetensors file", 2**40)


def _common(names: list[str]) -> str:
    """What all names begin with, up to a dot: "a.b" of a.b.x and a.b.yz."""
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _check(folder: Path, stored: dict[str, Entry], shapes: dict[str, tuple], tied: bool) -> None:
    """Raises ValueError at the first tensor that is missing, unexpected or misshapen, and says how many are."""
    if tied and HEAD in stored:  # although it need not be: accepted if it is the embedding
        shapes = {**shapes, HEAD: shapes[EMBEDDING]}
    faults = [f"{name} {shape} is missing" for name, shape in shapes.items() if name not in stored]
    for name, entry in stored.items():
        if name not in shapes:
            faults.append(f"{entry.path.name}: {entry.name} {entry.shape} is unexpected")
        elif entry.shape != shapes[name]:
            wanted = f"config.json makes it {shapes[name]}"
            faults.append(f"{entry.path.name}: {entry.name} has shape {entry.shape}, {wanted}")
    unexpected = [entry.name for name, entry in stored.items() if name not in shapes]
    if len(unexpected) > 1 and (prefix := _common(unexpected)):
        faults.insert(0, f"{len(unexpected)} tensors whose names begin with {prefix}. are unexpected")
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise fault(folder, faults[0] + more, "config.json and the weights must be of one model")
