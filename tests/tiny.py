"""Small random checkpoints, written by transformers, and a small tokenizer with Qwen2-VL's special tokens."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from train_tiny import NAMES, byte_level

SPECIALS = [f"<|{name}|>" for name in NAMES]
CORPUS = ["You are a helpful assistant. What is moving? The red circle moves left of the small square.", "system user"]
VISION = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MROPE = [2, 3, 3]


def tokenizer() -> Tokenizer:
    """Trained on two sentences: 300 tokens and 14 special ones."""
    return byte_level(CORPUS, 300)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of random pixels, the same at every call."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(folder: Path, tied=True, shard="1GB", layout="nested", seed=0) -> Qwen2VLForConditionalGeneration:
    """Writes a random float32 checkpoint through transformers' save_pretrained, and returns the model it holds.

    shard: most bytes of a file of weights; layout: see `in_layout`."""
    tokens = tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": MROPE}
    config = Qwen2VLConfig(
        text_config={**TEXT, "vocab_size": tokens.get_vocab_size() + 6, "rms_norm_eps": 1e-6, "rope_parameters": rope,
                     "bos_token_id": None, "eos_token_id": tokens.token_to_id("<|im_end|>")},
        vision_config={**VISION, "hidden_size": TEXT["hidden_size"]},
        tie_word_embeddings=tied,
        image_token_id=tokens.token_to_id("<|image_pad|>"),
        video_token_id=tokens.token_to_id("<|video_pad|>"),
        vision_start_token_id=tokens.token_to_id("<|vision_start|>"),
        vision_end_token_id=tokens.token_to_id("<|vision_end|>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).float().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name or "ln_q.weight" in name else 0.0, std=0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    tokens.save(str(folder / "tokenizer.json"))
    limits = {"min_pixels": 3136, "max_pixels": 1003520}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    path = folder / "config.json"
    path.write_text(json.dumps(in_layout(json.loads(path.read_text()), layout)))
    return model


def edit(path: Path, **change) -> None:
    """Sets keys of a JSON file, which may be missing."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **change}))


def published_tokenizer(folder: Path) -> None:
    """Rewrites tokenizer.json as it is published: with three of the added tokens; tokenizer_config.json lists all."""
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    added = settings["added_tokens"]
    listed = {str(token.pop("id")): token for token in json.loads(path.read_text())["added_tokens"]}
    path.write_text(json.dumps({**settings, "added_tokens": added[:3]}))
    tokens = {"added_tokens_decoder": listed, "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


def in_layout(nested: dict, layout: str) -> dict:
    """The settings of a nested config.json in one of the layouts: flat (as published), both, or nested."""
    if layout == "nested":
        return nested
    root, text, vision = dict(nested), dict(nested["text_config"]), dict(nested["vision_config"])
    del root["text_config"], vision["rope_parameters"], vision["in_channels"]
    rope = text.pop("rope_parameters")
    text["rope_theta"], mrope = rope["rope_theta"], {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text["rope_scaling"], vision["in_chans"] = mrope, 3
    return {**text, **root, "vision_config": vision, **({"text_config": text} if layout == "both" else {})}
