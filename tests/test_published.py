"""The published checkpoint: its tokenizer, its settings, its way of asking, and how it comes from the hub."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import epvlm
import tiny
from epvlm import EPVLM, main
from events import read_image

PICTURE = Image.effect_noise((84, 112), 90)
ASK = ["image.png", "events.npy", "what?", "--model"]
TEXTS = ["What is moving?", "动 naïve <|im_end|> <loc> <|box_start|>(1,2)<|box_end|>", "\n a", "<loc_2><loc_1> x"]


def asked(folder, *options, question="what?", env=None):
    command = [sys.executable, epvlm.__file__, "image.png", "events.npy", question, *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=folder)


def rewritten(path: Path, **change) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **change}))


@pytest.fixture
def published(tmp_path):
    hub.publish(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.fixture
def from_hub(files, published):
    """Runs the program with a hub that serves `published`: what it did, and what was fetched."""

    def run(*options, refuse=None, env=None):
        with hub.serve(published, refuse) as (url, fetched):
            at = {"HF_ENDPOINT": url, "HF_HOME": str(files / "home"), "HF_HUB_CACHE": str(files / "cache")}
            return asked(files, "--max-new-tokens", "3", *options, env={**at, **(env or {})}), fetched

    return run


# The hub


def is_weights(name):
    return name.endswith(".safetensors")


@pytest.mark.parametrize("shard", ["1GB", "250KB"])
def test_the_default_command_answers_and_fetches_the_weights_last(files, published, from_hub, shard):
    tiny.write(published, layout="flat", shard=shard)
    if shard != "1GB":
        (published / "model.safetensors").unlink()
    tiny.published_tokenizer(published)
    done, fetched = from_hub()
    assert done.returncode == 0 and done.stdout, done.stderr
    local = asked(files, "--max-new-tokens", "3", "--model", str(published))
    assert local.stdout == done.stdout
    weights_from = next(n for n, name in enumerate(fetched) if is_weights(name))
    assert all(map(is_weights, fetched[weights_from:])) and weights_from >= 6
    assert {name for name in fetched if is_weights(name)} == {
        path.name for path in published.glob("model*.safetensors") if "fp16" not in path.name
    }
    assert not any("/" in name or name.endswith(".bin") or name == "onnx_config.json" for name in fetched)
    again, fetched = from_hub()
    assert (again.stdout, fetched) == (done.stdout, [])
    offline, _ = from_hub(env={"HF_HUB_OFFLINE": "1"})
    assert offline.stdout == done.stdout


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"vocab_size": 100}, "tokens, the model 100"),
    ],
)
def test_what_does_not_fit_is_refused_before_its_weights_are_fetched(published, from_hub, change, words):
    rewritten(published / "config.json", **change)
    done, fetched = from_hub()
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert fetched and not any(map(is_weights, fetched))


def test_a_repository_without_safetensors(published, from_hub):
    (published / "model.safetensors").unlink()
    done, _ = from_hub()
    assert done.returncode == 2 and "neither model.safetensors nor" in done.stderr and done.stderr.count("\n") == 1


def test_a_wrong_token_is_told_where_to_look(from_hub):
    refuse = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
    done, _ = from_hub(refuse=refuse, env={"HF_TOKEN": "hf_wrong"})
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and done.stderr.count("\n") == 1


# The tokenizer


def same_ids(folder: Path, theirs) -> None:
    ours = epvlm.weights.read_tokenizer(folder, 10**6, epvlm.SPECIAL.values())
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        for as_text in (True, False):
            ours.encode_special_tokens = as_text
            found = ours.encode(text, add_special_tokens=False).ids
            assert found == theirs.encode(text, add_special_tokens=False, split_special_tokens=as_text)
            assert ours.decode(found, skip_special_tokens=False) == theirs.decode(found)


def with_own_tokens(folder: Path) -> None:
    """As a fine-tune leaves it: tokens of its own, one special and one not, in tokenizer_config.json alone."""
    listed = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    end = max(map(int, listed)) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    own = [("<loc_1>", False), ("<loc>", True), ("<loc_2>", False)]
    own = {str(end + n): {"content": text, "special": special, **flags} for n, (text, special) in enumerate(own)}
    backwards = dict(reversed([*listed.items(), *own.items()]))  # the order in the file does not matter
    rewritten(folder / "tokenizer_config.json", added_tokens_decoder=backwards)


@pytest.mark.parametrize("state", ["published", "saved anew", "fine-tuned", "fine-tuned and saved"])
def test_ids_are_those_of_transformers(tmp_path, state):
    tiny.tokenizer().save(str(tmp_path / "tokenizer.json"))
    tiny.published_tokenizer(tmp_path)
    if "fine-tuned" in state:
        with_own_tokens(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if "saved" in state:
        theirs.save_pretrained(tmp_path)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, Qwen2Tokenizer) and "<|image_pad|>" in theirs.get_vocab()
    same_ids(tmp_path, theirs)


def test_ids_of_the_published_tokenizer(data, tmp_path):
    folder = data / "qwen2-vl" / "2B-Instruct"
    settings = json.loads((folder / "tokenizer.json").read_text())
    theirs = AutoTokenizer.from_pretrained(folder)
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    for added in (settings["added_tokens"][:3], settings["added_tokens"]):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**settings, "added_tokens": added}))
        same_ids(tmp_path, theirs)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda listed: {**listed, "900": {"content": "<a>"}}, "<a> has id 900 there and 314 in tokenizer.json"),
        (lambda listed: {key: {**token, "content": token["content"] + ">"} for key, token in listed.items()}, "has id"),
        (lambda listed: {"x": {"content": "<a>"}}, "does not list tokens"),
        (lambda listed: {"7": "<a>"}, "does not list tokens"),
        (lambda listed: {"7": {"content": 3}}, "does not list tokens"),
        (lambda listed: {"7": {}}, "does not list tokens"),
        (lambda listed: [1], "added_tokens_decoder is"),
        (lambda listed: {}, "it has no"),
    ],
)
def test_added_tokens_that_cannot_be_are_named(published, change, words):
    path = published / "tokenizer_config.json"
    rewritten(path, added_tokens_decoder=change(json.loads(path.read_text())["added_tokens_decoder"]))
    with pytest.raises(ValueError, match=r"tokenizer\w*\.json: ") as refused:
        EPVLM.from_pretrained(published)
    assert words in str(refused.value)


def test_grounding_tokens_are_shown_and_the_others_not(published):
    model = EPVLM.from_pretrained(published)
    text = "<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    model.tokenizer.encode_special_tokens = False
    ids = model.tokenizer.encode(f"<|im_start|>{text}<|vision_pad|><|im_end|><|endoftext|>").ids
    assert "".join(model.pieces(iter(ids))) == text


# Pixel limits


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"preprocessor_config.json": {}}, (3136, 1003520)),
        ({}, (3136, 1003520)),
        ({"preprocessor_config.json": {"min_pixels": 784.0, "max_pixels": 200704.0}}, (784, 200704)),
        (
            {
                "preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056},
                "processor_config.json": {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 200704}}},
            },
            (784, 200704),
        ),
        (
            {"preprocessor_config.json": {"max_pixels": 9408}, "processor_config.json": {"image_processor": {"a": 1}}},
            (3136, 1003520),
        ),
        ({"preprocessor_config.json": {"max_pixels": 9408}, "processor_config.json": {"a": 1}}, (3136, 9408)),
    ],
)
def test_pixel_limits_are_those_of_transformers(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    config = epvlm.weights.read_image_config(tmp_path, epvlm.ImageConfig)
    assert (config.min_pixels, config.max_pixels) == expected
    if files:
        theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
        assert (theirs["shortest_edge"], theirs["longest_edge"]) == expected


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_a_minimum_above_the_maximum_is_the_file_s_fault(published, name):
    limits = {"min_pixels": 9000, "max_pixels": 8000}
    rewritten(published / name, **(limits if name.startswith("pre") else {"image_processor": limits}))
    with pytest.raises(ValueError, match=f"{name}: min_pixels 9000 is above max_pixels 8000"):
        EPVLM.from_pretrained(published)


# The checkpoint's way of asking


@pytest.mark.parametrize("where", ["chat_template.json", "tokenizer_config.json", "chat_template.jinja", "list"])
@pytest.mark.parametrize("usual", [True, False])
def test_another_system_turn_is_told_once(published, where, usual):
    template = "system\nYou are a helpful assistant." if usual else "system\nYou are a robot."
    (published / "chat_template.json").unlink()
    if where.endswith("jinja"):
        (published / where).write_text(template)
    else:
        content = [{"name": "default", "template": template}] if where == "list" else template
        rewritten(published / ("tokenizer_config.json" if where == "list" else where), chat_template=content)
    model = EPVLM.from_pretrained(published)
    for system in (None, "", "You are a robot."):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.prompt(PICTURE, None, "what?", system=system)
        assert ["--system" in str(warning.message) for warning in caught] == [True] * (not usual and system is None)


def test_the_system_turn(published):
    model = EPVLM.from_pretrained(published)
    theirs = AutoTokenizer.from_pretrained(published)
    for system, text in (
        (None, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
        ("\nBe brief. <|im_end|>", None),
        ("", ""),
    ):
        ids = model.prompt(PICTURE, None, "what?", system=system).input_ids.tolist()
        if text is None:  # a special token in the text is text
            assert ids.count(model.special["im_end"]) == 2
            continue
        expected = theirs.encode(f"{text}<|im_start|>user\n<|vision_start|>", add_special_tokens=False)
        assert ids[: len(expected)] == expected and ids[len(expected)] == model.special["image_pad"]


def test_the_system_turn_from_the_command_line(files, published, capsys):
    rewritten(published / "chat_template.json", chat_template="system\nYou are a robot.")
    shown = []
    for options in ([], ["--system", ""], ["--system", "You are a robot."]):
        assert main([*ASK, str(published), "--max-new-tokens", "4", *options]) == 0
        shown.append(capsys.readouterr())
    assert [s.err.count("warning") for s in shown] == [1, 0, 0]
    model = EPVLM.from_pretrained(published)
    for seen, system in zip(shown[1:], ["", "You are a robot."], strict=True):
        answer = model.answer("image.png", "events.npy", "what?", 4, system=system)
        assert seen.out == answer + "\n"


@pytest.mark.parametrize("penalty", [1.05, 1.5])
def test_the_repetition_penalty_is_that_of_transformers(published, penalty):
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(published).eval()
    rewritten(published / "generation_config.json", repetition_penalty=penalty)
    model, differ = EPVLM.from_pretrained(published, device="cpu"), 0
    for question in ("what?", "What is moving?", "left of the small square?", "The red circle moves."):
        prompt = model.prompt(PICTURE, None, question)
        grid = torch.tensor([[1, *prompt.keep_patches.shape]])
        given = {"input_ids": prompt.input_ids[None], "pixel_values": prompt.patches, "image_grid_thw": grid,
                 "mm_token_type_ids": (prompt.input_ids == model.special["image_pad"]).int()[None]}  # fmt: skip
        out = theirs.generate(**given, do_sample=False, repetition_penalty=penalty, max_new_tokens=60,
                              eos_token_id=sorted(model.stop), pad_token_id=0)  # fmt: skip
        ours = list(model.tokens(prompt, 60))
        assert ours == out[0, len(prompt.input_ids) :].tolist()
        assert ours == list(model.tokens(prompt, 60, repetition_penalty=penalty, seen=model.see(prompt)))
        differ += ours != list(model.tokens(prompt, 60, repetition_penalty=1.0))
    assert differ


@pytest.mark.parametrize("penalty", [-1, "much", [1]])
def test_a_penalty_that_is_none_is_the_file_s_fault(published, penalty):
    rewritten(published / "generation_config.json", repetition_penalty=penalty)
    with pytest.raises(ValueError, match=r"generation_config\.json: repetition_penalty"):
        EPVLM.from_pretrained(published)


def test_the_penalty_from_the_command_line(files, published, capsys):
    rewritten(published / "generation_config.json", repetition_penalty=1.5)
    model, shown = EPVLM.from_pretrained(published), []
    for option, penalty in (([], 1.5), (["--repetition-penalty", "1"], 1.0)):
        assert main([*ASK, str(published), "--max-new-tokens", "9", *option]) == 0
        shown.append(capsys.readouterr().out)
        assert shown[-1] == model.answer("image.png", "events.npy", "what?", 9, repetition_penalty=penalty) + "\n"
    assert shown[0] != shown[1]
    assert main([*ASK, str(published), "--repetition-penalty", "0"]) == 2


# Lines before and after


@pytest.mark.parametrize(
    "limit, line", [("1", "stopped after 1 token"), ("3", "stopped after 3 tokens"), ("400", None)]
)
def test_an_answer_that_was_cut_says_so(files, published, capsys, limit, line):
    tensors = load_file(published / "model.safetensors")
    if line is None:  # all scores are 0, so the first token is token 0, and that is made to end the answer
        tensors["model.norm.weight"] *= 0
        save_file(tensors, published / "model.safetensors")
        rewritten(published / "generation_config.json", eos_token_id=0)
    assert main([*ASK, str(published), "--max-new-tokens", limit]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[2:] == ([line] if line else [])


def test_what_it_will_cost_is_told_before_the_model_runs(files, published, capsys, monkeypatch):
    def run(*_, **__):
        assert capsys.readouterr().err.endswith("MFLOPs\n")
        raise ValueError("ran")

    monkeypatch.setattr(epvlm.VisionTransformer, "forward", run)
    assert main([*ASK, str(published)]) == 2


# Frames of scientific cameras


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_wide_grey_is_scaled_by_the_bits_in_use(tmp_path, bits, mode):
    grey = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    if mode == "I":
        image = Image.fromarray(grey.astype(np.int32))
    else:
        image = Image.frombytes(mode, (64, 64), grey.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    assert image.mode == mode
    with pytest.warns(UserWarning, match=f"up to {2**bits - 1} are taken as {bits} bits") as told:
        shown = np.asarray(read_image(image))
    assert len(told) == 1 and shown.min() == 0 and shown.max() == 255
    assert np.array_equal(shown[..., 0], [[int(v) * 255 // (2**bits - 1) for v in row] for row in grey])


def test_a_ten_bit_frame_on_the_command_line(files, published, capsys):
    grey = np.random.default_rng(0).integers(0, 1024, (112, 84)).astype(np.uint16)
    Image.fromarray(grey).save("ten.png")
    assert main(["ten.png", "events.npy", "what?", "--model", str(published), "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err.startswith(
        f"epvlm: warning: ten.png: grey values up to {grey.max()} are taken as 10"
    )


@pytest.mark.parametrize("value", [-1, 65536])
def test_grey_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="unknown range"):
        read_image(Image.fromarray(np.full((28, 28), value, np.int32)))


# Small things


def test_no_number_of_key_heads_is_the_number_of_heads(tmp_path):
    tiny.write(tmp_path, layout="flat")
    config = json.loads((tmp_path / "config.json").read_text())
    for given, expected in ((None, config["num_attention_heads"]), ("absent", 8)):
        changed = {key: value for key, value in config.items() if key != "num_key_value_heads" or given is None}
        changed |= {"num_attention_heads": 8 if given else config["num_attention_heads"]}
        changed |= {"hidden_size": 128} if given else {"num_key_value_heads": None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        _, text = epvlm.weights.read_config(tmp_path)
        assert epvlm.weights.fill(epvlm.DecoderConfig, text, tmp_path).num_key_value_heads == expected


def renamed(folder: Path, new) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({new(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_the_layout_of_a_model_without_its_head(published):
    expected = EPVLM.from_pretrained(published).answer(PICTURE, None, "what?", 5)
    renamed(published, lambda name: name.replace("model.", "language_model.", 1) if name.startswith("model.") else name)
    assert EPVLM.from_pretrained(published).answer(PICTURE, None, "what?", 5) == expected


def test_a_common_prefix_is_named(published):
    renamed(published, lambda name: f"base_model.model.{name}")
    with pytest.raises(ValueError, match=r"\d+ tensors whose names begin with base_model\.model\. are unexpected"):
        EPVLM.from_pretrained(published)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_told_how_to_become_a_file(published, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 4418050848\n"
    (published / name).write_text(pointer)
    with pytest.raises(ValueError, match=f"{name}: .*git lfs pull"):
        EPVLM.from_pretrained(published)


def test_a_head_that_differs_says_what_to_change(published):
    tensors = load_file(published / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, published / "model.safetensors")
    with pytest.raises(ValueError, match=r'set "tie_word_embeddings": false in config.json, or remove the tensor'):
        EPVLM.from_pretrained(published)
    rewritten(published / "config.json", tie_word_embeddings=False)
    EPVLM.from_pretrained(published)
