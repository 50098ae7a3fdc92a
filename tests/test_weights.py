"""Checkpoints: every layout of the settings, one file or shards, and an error that names what does not fit."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
import weights
from epvlm import EPVLM, build, published
from llm import DecoderConfig
from vit import ImageConfig, VisionConfig
from weights import SETTINGS, fetch, fill, read_config, read_image_config, read_json, read_tensors

PARAMETERS = {"2B": 2_208_985_600, "7B": 8_291_375_616, "72B": 73_405_560_320}


def logits(folder, **options):
    model = EPVLM.from_pretrained(folder, device="cpu", **options)
    return model.logits(model.prompt(Image.new("RGB", (84, 56), "red"), None, "What is moving?"))


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A checkpoint of one file that a test may spoil."""
    return shutil.copytree(checkpoint[0], tmp_path / "copy")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Settings


@pytest.mark.parametrize("layout", ["flat", "nested5"])
@pytest.mark.parametrize("size", PARAMETERS)
def test_published_settings_give_the_published_parameters(data, tmp_path, size, layout):
    shutil.copy(data / "qwen2-vl" / "layouts" / f"{layout}_{size}.json", tmp_path / "config.json")
    assert sum(tensor.numel() for tensor in published(*build(tmp_path)).values()) == PARAMETERS[size]


def test_names_are_those_of_the_published_index(data):
    folder = data / "qwen2-vl" / "2B-Instruct"
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(published(*build(folder))) == set(names) and len(names) == 729


def test_a_flat_file_that_relies_on_defaults(tmp_path):
    """vision_config with three keys and rope_scaling with rope_type, as some releases of transformers wrote 7B."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
            "num_hidden_layers": 28, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}  # fmt: skip
    scaling = {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]}
    vision = {"model_type": "qwen2_vl", "in_chans": 3, "spatial_patch_size": 14}
    config = {"model_type": "qwen2_vl", **text, "rope_scaling": scaling, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sum(tensor.numel() for tensor in published(*build(tmp_path)).values()) == PARAMETERS["7B"]


def test_all_layouts_read_the_same(checkpoint, tmp_path):
    nested = json.loads((checkpoint[0] / "config.json").read_text())
    read = []
    for layout in ("flat", "both", "nested"):
        (tmp_path / "config.json").write_text(json.dumps(tiny.in_layout(nested, layout)))
        vision, text = read_config(tmp_path)
        read.append((fill(VisionConfig, vision, tmp_path), fill(DecoderConfig, text, tmp_path)))
    assert read[0] == read[1] == read[2]
    assert read[0][1].mrope_section == tuple(tiny.MROPE) and read[0][1].tie_word_embeddings


@pytest.mark.parametrize(
    "settings",
    [
        {"min_pixels": 784, "max_pixels": 9999},
        {"size": {"min_pixels": 784, "max_pixels": 9999}},
        {"size": {"shortest_edge": 784, "longest_edge": 9999}},
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_pixel_limits_in_every_spelling(tmp_path, settings, file):
    settings = settings if file.startswith("pre") else {"image_processor": settings}
    (tmp_path / file).write_text(json.dumps(settings))
    config = read_image_config(tmp_path, ImageConfig)
    assert (config.min_pixels, config.max_pixels) == (784, 9999)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'"),
        ({"text_config": 3}, "text_config is 3"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"hidden_act": "gelu"}, "text hidden_act is 'gelu'"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"hidden_size": "64"}, "hidden_size is '64', not a positive int"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rope_scaling": {"mrope_section": 16}}, "mrope_section is 16, not a list of positive int"),
        ({"rope_scaling": {"mrope_section": [2, 3]}}, r"mrope_section \(2, 3\)"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "type is 'yarn'"),
        ({"vision_config": {"embed_dim": 63}}, "vision embed_dim 63"),
        (
            {"vision_config": {"embed_dim": 64, "num_heads": 4, "hidden_size": 32}},
            "vision hidden_size 32 is not the decoder's 64",
        ),
    ],
)
def test_settings_that_are_wrong_are_named(copied, change, message):
    path = copied / "config.json"
    flat = tiny.in_layout(json.loads(path.read_text()), "flat")
    path.write_text(json.dumps({**flat, **change}))
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        EPVLM.from_pretrained(copied)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000])
def test_json_that_is_broken_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


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
def test_what_ends_an_answer(copied, generation, config, ends):
    (copied / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (copied / "generation_config.json").write_text(json.dumps(generation))
    settings = tiny.in_layout(json.loads((copied / "config.json").read_text()), "flat")
    (copied / "config.json").write_text(json.dumps({**settings, "eos_token_id": config}))
    model = EPVLM.from_pretrained(copied)
    assert model.stop == ends | {model.tokenizer.token_to_id("<|im_end|>")}


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("generation_config.json", {"eos_token_id": [[1]]}, "not token ids"),
        ("processor_config.json", {"image_processor": {"image_mean": [0.5]}}, "three values"),
        ("generation_config.json", {"eos_token_id": "<|im_end|>"}, "not token ids"),
        ("preprocessor_config.json", {"size": [1, 2]}, r"size is \[1, 2\]"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "three values"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "above 0"),
        ("preprocessor_config.json", {"max_pixels": "many"}, "max_pixels is 'many'"),
    ],
)
def test_other_settings_that_are_wrong_are_named(copied, file, content, message):
    if file.startswith("processor"):
        (copied / "preprocessor_config.json").unlink()
    (copied / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{re.escape(file)}.*{message}"):
        EPVLM.from_pretrained(copied)


def test_null_is_as_good_as_absent(copied):
    settings = json.loads((copied / "config.json").read_text())
    settings["text_config"] |= {"max_position_embeddings": None, "rope_scaling": None, "use_sliding_window": None}
    (copied / "config.json").write_text(json.dumps(settings))
    assert EPVLM.from_pretrained(copied).llm.config.max_position_embeddings == 32768


# Tensors


def test_both_spellings_of_the_names_give_the_same_model(copied):
    expected = logits(copied)

    def rename(tensors):
        for name in list(tensors):
            newer = (
                "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
            )
            tensors[newer] = tensors.pop(name)

    rewrite(copied, rename)
    assert torch.equal(logits(copied), expected)


@pytest.mark.parametrize("name", ["model.norm.weight", "visual.merger.mlp.0.bias", "visual.patch_embed.proj.weight"])
def test_a_missing_tensor_is_named_with_its_shape(copied, name):
    shape = tuple(load_file(copied / "model.safetensors")[name].shape)
    rewrite(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{re.escape(name)} {re.escape(str(shape))} is missing"):
        EPVLM.from_pretrained(copied)


def test_an_unexpected_tensor_is_named_with_its_shape(copied):
    rewrite(copied, lambda tensors: tensors.update({"model.layers.2.extra": torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match=r"model\.layers\.2\.extra \(3, 5\) is unexpected"):
        EPVLM.from_pretrained(copied)


def test_a_misshapen_tensor_is_named_with_both_shapes(copied):
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(copied, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} has shape \(31, 64\), config.json makes it \(32, 64\)"):
        EPVLM.from_pretrained(copied)


def test_a_tensor_of_another_type_is_named(copied):
    rewrite(copied, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is of type I8"):
        EPVLM.from_pretrained(copied)


def test_a_tensor_stored_twice_is_an_error(copied):
    rewrite(copied, lambda tensors: tensors.update({"model.language_model.norm.weight": torch.ones(64)}))
    with pytest.raises(ValueError, match="stored already"):
        EPVLM.from_pretrained(copied)


def test_a_stored_head_must_be_the_embedding_it_is_tied_to(copied):
    expected = logits(copied)
    rewrite(copied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(copied), expected)
    rewrite(copied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        EPVLM.from_pretrained(copied)


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b[:40], lambda b: b"", lambda b: b"\xff" * 8 + b[8:]])
def test_a_broken_file_is_named(copied, spoil):
    path = copied / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        EPVLM.from_pretrained(copied)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", 3, ""])
def test_an_index_names_only_files_beside_it(copied, file):
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(ValueError, match="is not a shard beside it"):
        EPVLM.from_pretrained(copied)


def test_a_missing_shard_is_named(tmp_path):
    tiny.write(tmp_path, shard="250KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{shard}: no such file")):
        EPVLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_named(copied, missing):
    (copied / missing).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(copied))}.*{re.escape(missing)}"):
        EPVLM.from_pretrained(copied)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 3}'])
def test_a_broken_tokenizer_is_named(copied, content):
    (copied / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        EPVLM.from_pretrained(copied)


def test_a_tokenizer_without_the_special_tokens_is_named(copied):
    settings = json.loads((copied / "tokenizer.json").read_text())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] != "<|image_pad|>"]
    (copied / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"it has no <\|image_pad\|>"):
        EPVLM.from_pretrained(copied)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_tensors_are_used_where_the_file_is_mapped(copied):
    shapes = {name: tuple(tensor.shape) for name, tensor in published(*build(copied)).items()}
    tensors = read_tensors(copied, shapes, tied=True)
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0] for line in maps if line.endswith("copy/model.safetensors")]
    ranges = [tuple(int(end, 16) for end in text.split("-")) for text in ranges]
    for name, tensor in tensors.items():
        assert any(low <= tensor.data_ptr() < high for low, high in ranges), name
    converted = read_tensors(copied, shapes, tied=True, dtype=torch.bfloat16)
    assert not any(low <= t.data_ptr() < high for t in converted.values() for low, high in ranges)
    assert all(torch.equal(converted[name], tensors[name].bfloat16()) for name in shapes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", torch.bfloat16])
def test_every_dtype_runs(copied, dtype):
    scores = logits(copied, dtype=dtype)
    assert scores.dtype == torch.float32 and torch.isfinite(scores).all()
    reference = logits(copied)
    assert (scores - reference).abs().max() <= (0 if dtype == "float32" else 0.1) * reference.abs().max()


def test_a_name_that_is_no_folder_and_no_hub_id(tmp_path):
    for name in ("./nowhere", str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(ValueError, match=re.escape(name)):
            fetch(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        fetch(tmp_path / "empty")


def test_an_adapter_beside_its_model_is_not_passed_over(copied):
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter; merge it"):
        fetch(copied)


def test_a_folder_of_pickled_weights_is_told_what_to_do(copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ValueError, match="save older weights"):
        EPVLM.from_pretrained(copied)


def test_a_folder_has_no_revisions(copied):
    with pytest.raises(ValueError, match="leave --revision out"):
        fetch(copied, "main")


# The hub, and corners of the readers


@pytest.fixture
def hub(monkeypatch):
    given = {}

    def download(name, **options):
        given.update(options, name=name)
        if "error" in given:
            raise given["error"]
        return "/somewhere"

    monkeypatch.setattr(weights, "snapshot_download", download)
    monkeypatch.setattr(weights, "disable_progress_bars", lambda: given.update(quiet=True))
    return given


def test_what_the_hub_is_asked_for(hub, files, monkeypatch):
    assert fetch("a/b", "v1") == Path("/somewhere")
    assert hub == {"name": "a/b", "revision": "v1", "allow_patterns": SETTINGS, "quiet": True}
    with pytest.raises(ValueError, match="/somewhere"):
        EPVLM.from_pretrained("c/d", "v2")
    assert (hub["name"], hub["revision"]) == ("c/d", "v2")
    hub.pop("quiet")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fetch("a/b")
    assert "quiet" not in hub


def test_whatever_the_hub_raises_is_a_value_error(hub):
    hub["error"] = RuntimeError("socket")
    with pytest.raises(ValueError, match=r"a/b: cannot be downloaded \(RuntimeError: socket\)"):
        fetch("a/b")
    hub["error"] = HFValidationError("name")
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        fetch("a/b/c")


def test_a_home_folder(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    assert fetch("~/model") == files / "model"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_scaling": {"rope_type": "yarn", "type": "mrope", "mrope_section": [2, 3, 3]}}, "rope_type is 'yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_other_models_are_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": {}, **change}))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_settings_that_differ_from_the_defaults_are_read(tmp_path):
    config = {
        "model_type": "qwen2_vl",
        "hidden_size": 8,
        "vision_config": {"in_chans": 4, "rope_parameters": {"rope_theta": 5.0}},
        "text_config": {"hidden_size": 16, "tie_word_embeddings": True, "rope_theta": 7},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    vision, text = read_config(tmp_path)
    assert vision["in_channels"] == 4 and vision["rope_theta"] == 5.0
    assert text["hidden_size"] == 16 and text["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert read_config(tmp_path)[1]["tie_word_embeddings"] is False  # the root has the last word
    assert fill(VisionConfig, {"rope_theta": 7}, tmp_path).rope_theta == 7.0


def test_pixel_limits_that_disagree_or_are_null(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"min_pixels": 784, "max_pixels": None, "size": {"min_pixels": 5, "shortest_edge": 6}}))
    config = read_image_config(tmp_path, ImageConfig)
    assert (config.min_pixels, config.max_pixels) == (784, ImageConfig.max_pixels)


def test_image_statistics_are_the_checkpoints(files):
    Path("model/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    assert EPVLM.from_pretrained("model").image_config.image_mean == (0.1, 0.2, 0.3)


def test_truncation_and_padding_in_a_tokenizer_file_are_ignored(files):
    expected = EPVLM.from_pretrained("model").text_ids("a longer question")
    tokens = tiny.tokenizer()
    tokens.enable_truncation(4)
    tokens.enable_padding(length=9)
    tokens.save("model/tokenizer.json")
    assert EPVLM.from_pretrained("model").text_ids("a longer question") == expected


def test_a_tokenizer_with_more_tokens_than_the_model(files):
    tokens = tiny.tokenizer()
    tokens.add_tokens([f"extra{n}" for n in range(99)])
    tokens.save("model/tokenizer.json")
    with pytest.raises(ValueError, match=r"it has \d+ tokens, the model"):
        EPVLM.from_pretrained("model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_keeps_its_dtype(files, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file("model/model.safetensors").items()}
    save_file(tensors, "model/model.safetensors")
    model = EPVLM.from_pretrained("model", device="cpu")
    assert {p.dtype for m in (model.vit, model.llm) for p in m.parameters()} == {dtype}


def test_no_weights_and_an_empty_index(files):
    Path("model/model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model"):
        EPVLM.from_pretrained("model")
    Path("model/model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="an empty weight_map"):
        EPVLM.from_pretrained("model")


def test_faults_are_counted(files):
    tensors = load_file("model/model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, "model/model.safetensors")
    with pytest.raises(ValueError, match=r"is missing \(and 1 more\)"):
        EPVLM.from_pretrained("model")


def test_a_folder_in_the_place_of_a_shard(files):
    Path("model/model.safetensors").unlink()
    Path("model/x.safetensors").mkdir()
    Path("model/model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "x.safetensors"}}')
    with pytest.raises(ValueError, match=r"x\.safetensors: not a safetensors file"):
        EPVLM.from_pretrained("model")


@pytest.mark.parametrize("device, dtype", [(3.5, None), ("meta", None), (None, torch.int8), (None, torch.float64)])
def test_places_that_cannot_be_used(copied, device, dtype):
    with pytest.raises(ValueError, match="give one of bfloat16" if dtype else "try cpu"):
        EPVLM.from_pretrained(copied, device=device, dtype=dtype)
