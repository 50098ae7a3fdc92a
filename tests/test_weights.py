"""Checkpoints: every layout of the settings, the published tokenizer, the tensors, the hub, and what is refused."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import hub
import tiny
import weights
from epvlm import EPVLM, Options, Sampling
from llm import SYSTEM, DecoderConfig
from tiny import edit
from vit import VisionConfig
from weights import build, fill, find, free_memory, load, published, read_config, read_image_config, read_tensors

PARAMETERS = {"2B": 2_208_985_600, "7B": 8_291_375_616, "72B": 73_405_560_320}
SHIPPED = Path(__file__).resolve().parent.parent / "examples" / "tiny"
CONFIG, PRE, PRO, GENERATION = (f"{name}config.json" for name in ("", "preprocessor_", "processor_", "generation_"))
TOKENS, TOKENIZER, TEMPLATE = "tokenizer_config.json", "tokenizer.json", "chat_template.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, K_PROJ = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"
PATCHES, EMBEDDING = "visual.patch_embed.proj.weight", "model.embed_tokens.weight"


def edit_tensors(folder: Path, change) -> None:
    """change: name, tensor -> what is stored in their place, {name: tensor}."""
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        tensors |= change(name, tensor)
    save_file(tensors, folder / WEIGHTS)


def logits(folder: Path, sparsity: float = 0.0, **given):
    model = EPVLM.from_pretrained(folder, device="cpu", **given)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (84, 112, 3), dtype=np.uint8))
    return model.logits(model.look(image, rng.random((84, 112)), Options(sparsity)), "What is moving?")


# config.json


@pytest.mark.parametrize("layout", ["flat", "nested5"])
@pytest.mark.parametrize("size", PARAMETERS)
def test_published_settings_give_the_published_parameters(data, tmp_path, size, layout):
    shutil.copy(data / "qwen2-vl" / "layouts" / f"{layout}_{size}.json", tmp_path / CONFIG)
    assert sum(tensor.numel() for tensor in published(*build(tmp_path)).values()) == PARAMETERS[size]


def test_names_are_those_of_the_published_index(data):
    folder = data / "qwen2-vl" / "2B-Instruct"
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    assert set(published(*build(folder))) == set(names) and len(names) == 729


def test_a_flat_file_may_rely_on_defaults(tmp_path):
    """vision_config with three keys and rope_scaling with rope_type, as some releases of transformers wrote 7B."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
            "num_hidden_layers": 28, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}  # fmt: skip
    scaling = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    vision = {"model_type": "qwen2_vl", "in_chans": 3, "spatial_patch_size": 14}
    edit(tmp_path / CONFIG, model_type="qwen2_vl", **text, rope_scaling=scaling, vision_config=vision)
    assert sum(tensor.numel() for tensor in published(*build(tmp_path)).values()) == PARAMETERS["7B"]


def configs(folder: Path) -> tuple[VisionConfig, DecoderConfig]:
    vision, text = read_config(folder)
    return fill(VisionConfig, vision, folder), fill(DecoderConfig, text, folder)


def test_all_layouts_read_the_same(checkpoint, tmp_path):
    nested, read = json.loads((checkpoint.folder / CONFIG).read_text()), []
    for layout in ("flat", "both", "nested"):
        (tmp_path / CONFIG).write_text(json.dumps(tiny.in_layout(nested, layout)))
        read.append(configs(tmp_path))
    assert read[0] == read[1] == read[2]
    assert read[0][1].mrope_section == tuple(tiny.MROPE) and read[0][1].tie_word_embeddings


def test_nested_settings_win_and_the_root_ties(tmp_path):
    """Of a file that has a setting twice."""
    text = {"hidden_size": 16, "tie_word_embeddings": True, "rope_theta": 7}
    vision = {"in_chans": 4, "rope_parameters": {"rope_theta": 5.0}}
    edit(tmp_path / CONFIG, model_type="qwen2_vl", hidden_size=8, vision_config=vision, text_config=text)
    vision, text = read_config(tmp_path)
    assert (vision["in_channels"], vision["rope_theta"]) == (4, 5.0)
    assert (text["hidden_size"], text["tie_word_embeddings"], text["rope_theta"]) == (16, True, 7)
    edit(tmp_path / CONFIG, tie_word_embeddings=False)
    assert read_config(tmp_path)[1]["tie_word_embeddings"] is False
    theta = fill(VisionConfig, {"rope_theta": 7}, tmp_path).rope_theta
    assert (theta, type(theta)) == (7.0, float)


def test_null_equals_absent(checkpoint, tmp_path):
    nested = json.loads((checkpoint.folder / CONFIG).read_text())
    nulls = {"max_position_embeddings": None, "rope_scaling": None, "use_sliding_window": None}
    edit(tmp_path / CONFIG, **{**nested, "text_config": {**nested["text_config"], **nulls}})
    assert configs(tmp_path)[1].max_position_embeddings == 32768


@pytest.mark.parametrize("heads, expected", [({"num_key_value_heads": None}, 16), ({}, 8)])
def test_null_key_heads_are_as_many_as_heads(tmp_path, heads, expected):
    """Unlike absent ones."""
    edit(tmp_path / CONFIG, model_type="qwen2_vl", num_attention_heads=16, hidden_size=1024,
         rope_scaling={"mrope_section": [8, 12, 12]}, **heads)  # fmt: skip
    assert configs(tmp_path)[1].num_key_value_heads == expected


# The image, the answer's end, the chat template


def limits(least, most) -> dict:
    return {"min_pixels": least, "max_pixels": most}


@pytest.mark.parametrize(
    "pre, pro, expected",
    [
        (None, None, (3136, 1003520)),
        ({}, None, (3136, 1003520)),
        (limits(784, 9999), None, (784, 9999)),
        (limits(784.0, 200704.0), None, (784, 200704)),
        ({"size": {"shortest_edge": 784, "longest_edge": 9999}}, None, (784, 9999)),
        (None, {"image_processor": limits(784, 9999)}, (784, 9999)),
        (limits(1, 2), {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 9999}}}, (784, 9999)),
        ({"max_pixels": 9408}, {"image_processor": {"a": 1}}, (3136, 1003520)),
        ({"max_pixels": 9408}, {"a": 1}, (3136, 9408)),
    ],
)
def test_pixel_limits_are_those_of_transformers(tmp_path, pre, pro, expected):
    for name, content in ((PRE, pre), (PRO, pro)):
        if content is not None:
            edit(tmp_path / name, **content)
    config = read_image_config(tmp_path)
    assert (config.min_pixels, config.max_pixels) == expected
    assert type(config.min_pixels) is type(config.max_pixels) is int
    if pre or pro:
        theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
        assert (theirs["shortest_edge"], theirs["longest_edge"]) == expected


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"size": limits(784, 9999)}, (784, 9999)),
        ({**limits(784, None), "size": {"min_pixels": 5, "shortest_edge": 6}}, (784, 1003520)),
    ],
)
@pytest.mark.parametrize("name", [PRE, PRO])
def test_older_pixel_limits(tmp_path, name, settings, expected):
    """Which transformers no longer reads."""
    edit(tmp_path / name, **(settings if name == PRE else {"image_processor": settings}))
    config = read_image_config(tmp_path)
    assert (config.min_pixels, config.max_pixels) == expected


@pytest.mark.parametrize("mean", [(0.1, 0.2, 0.3), (0.0, 0.0, 0.0), (0, 0, 0)])
def test_image_statistics_are_the_checkpoints(folder, mean):
    edit(folder / PRE, image_mean=mean)
    assert EPVLM.from_pretrained(folder).image_config.image_mean == mean


@pytest.mark.parametrize(
    "generation, config, ends",
    [
        ({"eos_token_id": [5, 6]}, 7, {5, 6}),
        ({"eos_token_id": 5}, 7, {5}),
        ({"eos_token_id": None}, 7, {7}),
        ({}, [7, 8], {7, 8}),
        (None, 0, {0}),
        (None, None, set()),
    ],
)
def test_what_ends_an_answer(folder, generation, config, ends):
    (folder / GENERATION).unlink()
    if generation is not None:
        edit(folder / GENERATION, **generation)
    edit(folder / CONFIG, eos_token_id=config)
    model = EPVLM.from_pretrained(folder)
    assert model.ends == ends | {model.tokenizer.token_to_id("<|im_end|>")}


@pytest.mark.parametrize("penalty", [1.05, 1.5])
def test_the_repetition_penalty_is_that_of_transformers(folder, penalty):
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    edit(folder / GENERATION, repetition_penalty=penalty)
    model, differ = EPVLM.from_pretrained(folder, device="cpu"), 0
    view = model.look(tiny.noise(84, 112))
    grid = torch.tensor([view.keep.shape])
    for question in ("what?", "left of the small square?"):
        ids, _ = model.prompt(view, question)
        given = {"input_ids": ids[None], "pixel_values": view.patches, "image_grid_thw": grid,
                 "mm_token_type_ids": (ids == model.image_pad).int()[None]}  # fmt: skip
        out = theirs.generate(**given, do_sample=False, repetition_penalty=penalty, max_new_tokens=30,
                              eos_token_id=sorted(model.ends), pad_token_id=0)  # fmt: skip
        ours = list(model.tokens(view, question, Sampling(30)))
        assert ours == out[0, len(ids) :].tolist()
        assert ours == list(model.tokens(model.read(view), question, Sampling(30, repetition_penalty=penalty)))
        differ += ours != list(model.tokens(view, question, Sampling(30, repetition_penalty=1.0)))
    assert differ


def test_which_chat_template_is_read(folder):
    """The first of these, as in transformers; it may be a list. One without the usual system turn is noted."""
    usual, other = f"system\n{SYSTEM}", "system\nYou are a robot."
    places = ["chat_template.jinja", TEMPLATE, TOKENS]
    (folder / TEMPLATE).unlink()
    edit(folder / TOKENS, chat_template=[{"name": "default", "template": other}])
    for number, found in ((2, False), (1, True), (0, False)):
        if number < 2:
            text = usual if found else other
            (folder / places[number]).write_text(text if number == 0 else json.dumps({"chat_template": text}))
        assert load(folder).usual_system == found
    edit(folder / TOKENS, chat_template=None)
    (folder / places[0]).unlink()
    (folder / places[1]).unlink()
    assert load(folder).usual_system


# The tokenizer


TEXTS = ["What is moving?", "动 naïve <|im_end|> <loc> <|box_start|>(1,2)<|box_end|>", "\n a", "<loc_2><loc_1> x"]


def same_ids(folder: Path, theirs) -> None:
    ours = load(folder).tokenizer
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        for as_text in (True, False):
            ours.encode_special_tokens = as_text
            found = ours.encode(text, add_special_tokens=False).ids
            assert found == theirs.encode(text, add_special_tokens=False, split_special_tokens=as_text)
            assert ours.decode(found, skip_special_tokens=False) == theirs.decode(found)


def listed(folder: Path) -> dict:
    return json.loads((folder / TOKENS).read_text())["added_tokens_decoder"]


def add_own_tokens(folder: Path) -> None:
    """As a fine-tune leaves it: tokens of its own, one special and two not, in tokenizer_config.json alone."""
    known = listed(folder)
    end = max(map(int, known)) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    own = [("<loc_1>", False), ("<loc>", True), ("<loc_2>", False)]
    own = {str(end + n): {"content": text, "special": special, **flags} for n, (text, special) in enumerate(own)}
    backwards = dict(reversed([*known.items(), *own.items()]))  # the order in the file does not matter
    edit(folder / TOKENS, added_tokens_decoder=backwards)


@pytest.mark.parametrize("state", ["published", "saved", "fine-tuned", "fine-tuned and saved"])
def test_ids_are_those_of_transformers(folder, state):
    if "fine-tuned" in state:
        add_own_tokens(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    if "saved" in state:
        theirs.save_pretrained(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, Qwen2Tokenizer) and "<|image_pad|>" in theirs.get_vocab()
    same_ids(folder, theirs)


def test_ids_of_the_published_tokenizer(data, folder):
    real = data / "qwen2-vl" / "2B-Instruct"
    settings = json.loads((real / TOKENIZER).read_text())
    theirs = AutoTokenizer.from_pretrained(real)
    shutil.copy(real / TOKENS, folder)
    edit(folder / CONFIG, vocab_size=151936)
    edit_tensors(folder, lambda name, tensor: {name: torch.zeros(151936, 64) if name == EMBEDDING else tensor})
    for added in (settings["added_tokens"][:3], settings["added_tokens"]):
        edit(folder / TOKENIZER, **{**settings, "added_tokens": added})
        same_ids(folder, theirs)


def test_truncation_and_padding_are_ignored(folder):
    tokens, text = tiny.tokenizer(), "a longer question"
    expected = tokens.encode(text).ids
    tokens.enable_truncation(len(expected) - 1)
    tokens.save(str(folder / TOKENIZER))
    assert load(folder).tokenizer.encode(text).ids == expected
    tokens.no_truncation()
    tokens.enable_padding(length=len(expected) + 1)
    tokens.save(str(folder / TOKENIZER))
    assert load(folder).tokenizer.encode(text).ids == expected


# Tensors


RENAMED = {
    "newer": lambda name: "model." + name if name[0] == "v" else name.replace("model.", "model.language_model.", 1),
    "without the head": lambda name: name.replace("model.", "language_model.", 1) if name[0] == "m" else name,
}


@pytest.mark.parametrize("spelling", RENAMED)
def test_every_spelling_of_the_names_is_one_model(folder, spelling):
    expected = logits(folder)
    edit_tensors(folder, lambda name, tensor: {RENAMED[spelling](name): tensor})
    assert EMBEDDING not in load_file(folder / WEIGHTS)
    assert torch.equal(logits(folder), expected)


def with_head(added: float):
    """lm_head.weight stored besides, the embedding plus a number."""
    return lambda name, tensor: {name: tensor} | ({"lm_head.weight": tensor + added} if name == EMBEDDING else {})


def test_a_stored_head_may_repeat_the_embedding(folder):
    expected = logits(folder)
    edit_tensors(folder, with_head(0))
    assert torch.equal(logits(folder), expected)


def test_a_head_of_its_own(folder):
    edit_tensors(folder, with_head(1))
    edit(folder / CONFIG, tie_word_embeddings=False)
    model = EPVLM.from_pretrained(folder)
    assert torch.equal(model.llm.lm_head.weight, model.llm.model["embed_tokens"].weight + 1)


def mappings(path: Path) -> list[tuple[int, int]]:
    """Where the file is mapped in this process: first address, and the one past the last."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in maps if line.endswith(str(path))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_tensors_are_used_where_the_file_is_mapped(folder):
    shapes = {name: tuple(tensor.shape) for name, tensor in published(*build(folder)).items()}
    tensors = read_tensors(folder, shapes)
    ranges = mappings(folder / WEIGHTS)
    assert all(any(low <= tensor.data_ptr() < high for low, high in ranges) for tensor in tensors.values())
    assert set(tensors) == set(shapes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("tied", [True, False])
def test_of_converted_tensors_no_mapping_is_left(tmp_path, tied):
    """Shards, names as newer files spell them: each is mapped while it is converted, and no longer."""
    tiny.write(tmp_path, tied, shard="250KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    for file in files:
        tensors = {RENAMED["newer"](name) if tied else name: tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file)
        del tensors
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    edit(tmp_path / INDEX, weight_map={RENAMED["newer"](name) if tied else name: index[name] for name in index})
    shapes = {name: tuple(tensor.shape) for name, tensor in published(*build(tmp_path)).items()}
    converted = read_tensors(tmp_path, shapes, dtype=torch.bfloat16)
    assert len(files) > 1 and not any(map(mappings, files))
    expected = read_tensors(tmp_path, shapes)
    assert all(map(mappings, files))
    assert all(torch.equal(converted[name], expected[name].bfloat16()) for name in shapes)


# dtype, device, memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9])
def test_scores_of_every_dtype(folder, dtype, sparsity):
    for checkpoint in (folder, SHIPPED):
        scores, reference = logits(checkpoint, sparsity, dtype=dtype), logits(checkpoint, sparsity)
        assert scores.dtype == torch.float32 and scores.isfinite().all()
        assert (scores - reference).abs().max() <= (0 if dtype == "float32" else 0.1) * reference.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_keeps_its_dtype(folder, dtype):
    edit_tensors(folder, lambda name, tensor: {name: tensor.to(dtype)})
    model = EPVLM.from_pretrained(folder, device="cpu")
    assert {p.dtype for part in (model.vit, model.llm) for p in part.parameters()} == {dtype}


def test_free_memory_is_a_number_of_bytes(monkeypatch):
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
    for content, expected in (("MemFree: 9 kB\nMemAvailable:   3 kB\n", 3072), ("", float("inf"))):
        monkeypatch.setattr(Path, "read_text", lambda *_, content=content: content)
        assert free_memory(torch.device("cpu")) == expected


# The hub


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


@pytest.mark.parametrize("shard", ["1GB", "250KB"])
def test_the_hub_gives_the_weights_last(tmp_path, capsys, shard):
    """Of the settings' commit, though the branch moves on. The next time both come from the cache."""
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    hub.publish(folder, shard)
    (folder / "chat_template.jinja").write_text(SYSTEM)
    enable_progress_bars()
    capsys.readouterr()
    with hub.visit(folder, cache) as fetched:
        assert torch.equal(from_hub(), logits(folder))
    assert capsys.readouterr().err == ""  # no progress bars where stderr is no terminal
    settings = {path.name for path in folder.glob("*.j*")} - {"onnx_config.json"}
    shards = {path.name for path in folder.glob("model*.safetensors")} - {"model.fp16.safetensors"}
    first = min(map(fetched.index, shards))
    assert settings == set(fetched[:first]) and set(fetched[first:]) == shards and len(settings) >= 7
    assert (len(shards) > 1) == (shard != "1GB") and not {name for name in fetched if "/" in name or ".bin" in name}
    for offline in (False, True):
        with hub.visit(folder, cache, offline=offline) as fetched:
            assert torch.equal(from_hub(), logits(folder)) and not fetched


def from_hub():
    return logits("some/model", revision="v1")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_bars_need_a_terminal(folder, monkeypatch, terminal):
    enable_progress_bars()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with hub.visit(folder, folder.parent / "cache"):
        find("some/model")
    assert are_progress_bars_disabled() != terminal


@pytest.mark.parametrize(
    "name, change",
    [
        (CONFIG, {"model_type": "qwen2_5_vl"}),
        (CONFIG, {"quantization_config": {"quant_method": "awq"}}),
        (CONFIG, {"vocab_size": 100}),
        (CONFIG, {"hidden_size": 32}),
        (TOKENS, {"added_tokens_decoder": {}}),
        (GENERATION, {"eos_token_id": "</s>"}),
        (PRE, {"image_mean": 0.5}),
    ],
)
def test_settings_that_do_not_fit_spare_the_weights(folder, name, change):
    edit(folder / name, **change)
    with hub.visit(folder, folder.parent / "cache") as fetched, pytest.raises(ValueError):
        EPVLM.from_pretrained("some/model")
    assert name in fetched and not any(map(is_weights, fetched))


def test_a_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find("~/folder") == folder


# What is refused, and what the line says. Each case changes `folder` and returns what else `from_pretrained` is given;
# what it enters, a hub that refuses or a patch, ends with the case.


def keys(name, **change):
    return lambda folder, enter: edit(folder / name, **change)


def written(name, content, size=None):
    """content: bytes, or a function of the bytes that are there. size: of the file, past its content a hole."""

    def spoil(folder, enter):
        path = folder / name
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)
        if size:
            os.truncate(path, size)

    return spoil


def gone(name, instead=lambda path: None):
    return lambda folder, enter: (folder / name).unlink() or instead(folder / name)


def tensors(change):
    return lambda folder, enter: edit_tensors(folder, change)


def without(*names):
    return tensors(lambda name, tensor: {} if name in names else {name: tensor})


def changed(one, change):
    return tensors(lambda name, tensor: {name: change(tensor) if name == one else tensor})


def added(new, *shape):
    return tensors(lambda name, tensor: {name: tensor, new: torch.zeros(shape)})


def index(weight_map):
    return gone(WEIGHTS, lambda path: edit(path.parent / INDEX, weight_map=weight_map))


def folder_as_shard(folder, enter):
    (folder / "x.safetensors").mkdir()
    index({NORM: "x.safetensors"})(folder, enter)


def more_tokens(folder, enter):
    tokens = tiny.tokenizer()
    tokens.add_tokens([f"extra{n}" for n in range(99)])
    tokens.save(str(folder / TOKENIZER))


def tokens(more):
    return lambda folder, enter: edit(folder / TOKENS, added_tokens_decoder={**listed(folder), **more})


def given(**arguments):
    return lambda folder, enter: arguments


def refuses(status, code="", **how):
    def spoil(folder, enter):
        enter(hub.visit(folder, folder.parent / "cache", (status, {"X-Error-Code": code}), **how))
        return {"model": "some/model"}

    return spoil


def fails(error):
    def spoil(folder, enter):
        enter(mock.patch.object(weights, "snapshot_download", side_effect=error))
        return {"model": "some/model", "revision": "v1"}

    return spoil


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4418050848\n"
VISION = {"embed_dim": 64, "num_heads": 4, "hidden_size": 64}
PARTS = (CONFIG, TOKENIZER, WEIGHTS)
NEWER = "model.language_model.layers."
ERRORS = {  # case: what it changes, and words of the line
    **{
        f"{key} {value}": (keys(file, **{key: value}), f"{file}: ", f"{key} is {value!r}")
        for file, key, value in (
            *((CONFIG, "model_type", kind) for kind in ("llama", "qwen2_5_vl")),
            *((CONFIG, "quantization_config", {"quant_method": kind}) for kind in ("awq", "gptq", "fp8")),
            *((CONFIG, "hidden_size", size) for size in ("64", 0, 64.5, True)),
            (CONFIG, "text_config", 3),
            (CONFIG, "tie_word_embeddings", "false"),
            (CONFIG, "use_sliding_window", True),
            (CONFIG, "rms_norm_eps", "small"),
            (CONFIG, "hidden_act", "gelu"),
            (PRE, "size", [1, 2]),
            (PRE, "max_pixels", "many"),
            (TOKENS, "added_tokens_decoder", [1]),
            *((GENERATION, "repetition_penalty", penalty) for penalty in (-1, "much", [1])),
        )
    },
    # other settings
    "vision hidden_act": (keys(CONFIG, vision_config={"hidden_act": "gelu"}), CONFIG, "hidden_act is 'gelu'"),
    "rope type": (keys(CONFIG, rope_scaling={"type": "yarn"}), CONFIG, "type is 'yarn'"),
    "rope_type": (keys(CONFIG, rope_scaling={"rope_type": "yarn", "type": "mrope"}), CONFIG, "rope_type is 'yarn'"),
    "section 16": (keys(CONFIG, rope_scaling={"mrope_section": 16}), CONFIG, "mrope_section is 16, not a list of"),
    **{
        f"sections {values}": (keys(CONFIG, rope_scaling={"mrope_section": values}), CONFIG, f"mrope_section {values}")
        for values in ((2, 3, 4), (3, 5), (2, 2, 2, 2))  # one of another sum, and two that are not three
    },
    "key heads": (keys(CONFIG, num_key_value_heads=3), CONFIG, "4 and 3 heads"),
    "vision heads": (keys(CONFIG, vision_config={**VISION, "num_heads": 3}), CONFIG, "3 vision heads"),
    "narrow vision heads": (keys(CONFIG, vision_config={**VISION, "num_heads": 32}), CONFIG, "32 vision heads"),
    "embed_dim": (keys(CONFIG, vision_config={**VISION, "embed_dim": 63}), CONFIG, "4 vision heads"),
    "widths": (keys(CONFIG, vision_config={**VISION, "hidden_size": 32}), CONFIG, "hidden_size 32", "64"),
    "ends [[1]]": (keys(GENERATION, eos_token_id=[[1]]), GENERATION, "eos_token_id", "[[1]]"),
    "ends text": (keys(GENERATION, eos_token_id="<|im_end|>"), GENERATION, "eos_token_id", "<|im_end|>"),
    "mean": (keys(PRE, image_mean=[0.5]), f"{PRE}: image_mean"),
    "newer mean": (keys(PRO, image_processor={"image_mean": [0.5]}), f"{PRO}: image_mean"),
    "deviation": (keys(PRE, image_std=[0.5, 0, 0.5]), PRE, "image_std above 0"),
    "limits": (keys(PRE, **limits(9, 8)), f"{PRE}: min_pixels 9 ", "max_pixels", "8"),
    "newer limits": (keys(PRO, image_processor=limits(9, 8)), f"{PRO}: min_pixels 9 ", "max_pixels", "8"),
    # files
    **{f"json {text:.6}": (written(CONFIG, text.encode()), f"{CONFIG}: ") for text in ("", "{", "[1]", "null")},
    "json deep": (written(CONFIG, b"[" * 100_000), f"{CONFIG}: not readable as JSON"),
    "template": (written("chat_template.jinja", b"\xff"), "chat_template.jinja: "),
    **{f"pointer {name}": (written(name, POINTER), name, "Git LFS pointer", "git lfs pull") for name in PARTS},
    **{f"pipe {name}": (gone(name, os.mkfifo), name) for name in PARTS},
    **{f"huge {name}": (written(name, lambda file: file, 2**42), f"{name}: not ") for name in PARTS},
    **{f"no {name}": (gone(name), name) for name in PARTS},
    "pickled weights": (gone(WEIGHTS), WEIGHTS, ".bin", "save_pretrained"),
    "adapter": (written("adapter_config.json", b"{}"), "holds an adapter; merge it"),
    **{f"cut to {n}": (written(WEIGHTS, lambda file, n=n: file[:n]), f"{WEIGHTS}: not a safe") for n in (-100, 40, 0)},
    "header": (written(WEIGHTS, lambda file: b"\xff" * 8 + file[8:]), f"{WEIGHTS}: not a safetensors file"),
    "no shard": (index({NORM: "x.safetensors"}), "x.safetensors: no such file"),
    "folder as shard": (folder_as_shard, "x.safetensors: not a safetensors file"),
    "empty index": (index({}), f"{INDEX}: ", "weight_map"),
    **{
        f"shard {name!r}": (index({NORM: name}), f"{INDEX}: ", f"{str(name)!r}", "beside it")
        for name in ("../secret.safetensors", "/etc/passwd", "sub/x.safetensors", 3, "")
    },
    # the tokenizer
    **{f"tokenizer {t}": (written(TOKENIZER, t.encode()), f"{TOKENIZER}: not a tokenizer") for t in ("{", "{}", "[3]")},
    "no special tokens": (keys(TOKENS, added_tokens_decoder={}), f"{TOKENIZER}: ", "it has no <|vision_start|>"),
    "small vocabulary": (keys(CONFIG, vocab_size=100), f"{TOKENIZER}: ", "it has 314 tokens, the model 100"),
    "own tokens": (more_tokens, f"{TOKENIZER}: ", "it has 413 tokens, the model 320"),
    "id": (tokens({"900": {"content": "<a>"}}), f"{TOKENS}: <a> has id 900 there and 314 in {TOKENIZER}"),
    "first id": (tokens({"300": {"content": "<a>"}}), f"{TOKENS}: <a> has id 300 there and 303 in {TOKENIZER}"),
    **{
        f"listed {token}": (tokens(token), f"{TOKENS}: added_tokens_decoder ")
        for token in ({"x": {"content": "<a>"}}, {"7": "<a>"}, {"7": {"content": 3}}, {"7": {}})
    },
    # tensors
    "no norm": (without(NORM), f"{NORM} (64,) is missing; "),
    "no bias": (without("visual.merger.mlp.0.bias"), "visual.merger.mlp.0.bias (256,) is missing"),
    "no patches": (without(PATCHES), f"{PATCHES} (64, 3, 2, 14, 14) is missing"),
    "two missing": (without(NORM, K_PROJ), "is missing (and 1 more)"),
    "unexpected": (added("model.layers.2.x", 3, 5), f"{WEIGHTS}: model.layers.2.x (3, 5) is unexpected; "),
    "shape": (changed(K_PROJ, lambda k: k[:-1].clone()), f"{WEIGHTS}: {K_PROJ} ", "(31, 64)", "makes it (32, 64); "),
    "type": (
        changed(NORM, lambda norm: norm.to(torch.int8)),
        f"{WEIGHTS}: {NORM} is of type torch.int8, not one of bfloat16, float16, float32; ",
    ),
    "twice": (added("model.language_model.norm.weight", 64), NORM, "stored already", "model.language_model.norm"),
    "prefix cut at a dot": (
        tensors(lambda name, tensor: {name: tensor, **{f"{NEWER}{n}.x": torch.zeros(3) for n in (20, 21)}}),
        f"2 tensors whose names begin with {NEWER} are unexpected",
    ),
    "no prefix": (
        tensors(lambda name, tensor: {name: tensor, "score_a.x": torch.zeros(3), "score_b.x": torch.zeros(3)}),
        f"{WEIGHTS}: score_a.x (3,) is unexpected (and 1 more); ",
    ),
    "prefix": (tensors(lambda name, tensor: {f"base_model.{name}": tensor}), "names begin with base_model."),
    "head": (tensors(with_head(1)), f"lm_head.weight differs from {EMBEDDING}", 'set "tie_word_embeddings": false'),
    # arguments
    **{f"model {name}": (given(model=name), "no such") for name in ("./nowhere", "/no/where", "~nosuchuser/x")},
    "model a/b/c": (given(model="a/b/c"), "a/b/c: ", "neither a folder nor a hub id"),
    "revision": (given(revision="main"), "a folder", "no revisions", "leave revision out"),
    **{f"device {name}": (given(device=name), f"device '{name}' cannot be used", "cpu") for name in (3.5, "x", "meta")},
    **{f"dtype {name}": (given(dtype=name), f"dtype '{name}'", "bfloat16, float16, float32") for name in ("int8", "x")},
    "dtype torch": (given(dtype=torch.float64), "dtype 'float64'", "bfloat16, float16, float32"),
    # the hub
    "unknown": (refuses(404, "RepoNotFound"), "some/model: ", "private", "hf auth login"),
    "unknown revision": (refuses(404, "RevisionNotFound"), "no such revision"),
    "gated": (refuses(403, "GatedRepo"), "access", "ask for it on its page at the hub, then `hf auth login`"),
    "token": (refuses(401), "some/model: ", "the hub refuses", "HF_TOKEN", "401"),
    "down": (refuses(500), "not in the ", "cache", "the hub ", "HF_HUB_OFFLINE"),
    "offline": (refuses(500, offline=True), "not in the ", "cache", "the hub ", "HF_HUB_OFFLINE"),
    "cache": (fails(PermissionError(13, "Permission denied", "/cache")), "set HF_HOME to a folder you can write"),
    "disk": (fails(OSError(28, "No space left on device")), "cannot be downloaded", "make room", "No space left"),
    "network": (fails(ConnectionError("no route")), "cannot be downloaded", "try again", "ConnectionError: no route"),
    "lines": (fails(RuntimeError("anything\nin lines")), "cannot be downloaded", "RuntimeError: anything"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_says(folder, case):
    spoil, *words = ERRORS[case]
    with contextlib.ExitStack() as stack:
        arguments = {"model": folder} | (spoil(folder, stack.enter_context) or {})
        with pytest.raises(ValueError) as refused:
            EPVLM.from_pretrained(**arguments)
    line = str(refused.value)
    assert line.startswith((str(Path(arguments["model"])), "device ", "dtype ")) and "\n" not in line
    assert all(word in line for word in words), line


def test_a_repository_without_weights_is_named(folder):
    (folder / WEIGHTS).unlink()
    with hub.visit(folder, folder.parent / "cache"), pytest.raises(ValueError, match=WEIGHTS):
        EPVLM.from_pretrained("some/model")
