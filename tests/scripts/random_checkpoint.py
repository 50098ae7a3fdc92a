"""Writes a checkpoint of random weights at a published model's shapes, names and layout, to try the program at size.

    python tests/scripts/random_checkpoint.py 2B /tmp/random-2B --tokenizer path/to/tokenizer.json

2B takes 4.4 GB of disk, 7B 16.6 GB. One shard at a time is held in memory (at most 1 GiB, or one tensor).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from weights import build, published

SIZES = {
    "2B": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
           "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
           "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
SHARD_BYTES = 2**30


def config(size: str) -> dict:
    """config.json in the published, flat layout."""
    return {
        "model_type": "qwen2_vl", **SIZES[size], "num_hidden_layers": 28, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                          "hidden_size": SIZES[size]["hidden_size"], "patch_size": 14, "spatial_merge_size": 2,
                          "temporal_patch_size": 2},
    }  # fmt: skip


def partition(shapes: dict[str, tuple]) -> list[list[str]]:
    """The names, shard by shard, each at most SHARD_BYTES of bfloat16 (or one tensor)."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def random_tensor(name: str, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    """Norms start at one, everything else is drawn with the spread Qwen2-VL was initialised with."""
    tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    return 1 + tensor if ("norm" in name and name.endswith("weight")) or name.endswith("ln_q.weight") else tensor


def write(size: str, folder: Path, tokenizer: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(size), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    limits = {"min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    shutil.copy(tokenizer, folder / "tokenizer.json")
    shapes = {name: tuple(tensor.shape) for name, tensor in published(*build(folder)).items()}
    generator, weight_map = torch.Generator().manual_seed(0), {}
    shards = partition(shapes)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {len(names)} tensors", file=sys.stderr)
        del tensors
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Qwen2-VL's tokenizer.json")
    args = parser.parse_args()
    write(args.size, args.folder, args.tokenizer)
