"""Layers and settings that the parity of whole models leaves open: rounding in half precision, eps, theta, limits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

import llm
import rope2d
import vit
from epvlm import EPVLM
from events import read_image
from vit import VisionConfig, VisionTransformer, smart_resize


def test_angles_are_rounded_only_after_the_cosine():
    angles = torch.rand(50, 4) * 500
    cos, sin = rope2d.cos_sin(angles, torch.bfloat16)
    assert torch.equal(cos.squeeze(-2), angles.cos().bfloat16()) and torch.equal(
        sin.squeeze(-2), angles.sin().bfloat16()
    )


def test_theta_is_used():
    torch.testing.assert_close(rope2d.rope_2d(4, 4, 8, theta=100.0)[:, 1], rope2d.rope_2d(4, 4, 8)[:, 0] / 10)
    sizes = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 8}
    one, other = (VisionTransformer(VisionConfig(**sizes, rope_theta=theta)) for theta in (10000.0, 10.0))
    other.load_state_dict(one.state_dict())
    patches, keep = torch.randn(1, 16, 1176), torch.ones(4, 4, dtype=torch.bool)
    assert not torch.equal(one(patches, keep), other(patches, keep))


def test_vision_rotates_in_float32_and_the_decoder_in_its_own_dtype(checkpoint, monkeypatch):
    model, seen = EPVLM.from_pretrained(checkpoint[0], device="cpu", dtype="bfloat16"), set()
    for module in (vit, llm):
        monkeypatch.setattr(
            module,
            "rotate",
            lambda x, cos, sin, module=module: (seen.add((module.__name__, cos.dtype)), rope2d.rotate(x, cos, sin))[1],
        )
    model.logits(model.prompt(Image.new("RGB", (56, 56)), None, ""))
    assert seen == {("vit", torch.float32), ("llm", torch.bfloat16)}


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_qwens(eps, dtype):
    ours, theirs = llm.RMSNorm(64, eps).to(dtype), Qwen2VLRMSNorm(64, eps).to(dtype)
    ours.weight.data = theirs.weight.data = torch.rand(64).to(dtype) + 0.5
    x = (torch.randn(99, 64) * 0.1).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), atol=0, rtol=1e-6 if dtype == torch.float32 else 0)


def test_layer_norms_add_1e_6(checkpoint):
    assert {m.eps for m in checkpoint[2].vit.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


class Largest(TorchDispatchMode):
    """Remembers the most values that any operation returned."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else [found]:
            if isinstance(part, torch.Tensor) and part.untyped_storage().nbytes():
                self.values = max(self.values, part.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_of_all_pairs_is_ever_held(dtype):
    """Of 6400 patches, 41 million pairs, on the CPU with any number of threads up to 8."""
    model = VisionTransformer(VisionConfig(depth=1, embed_dim=32, num_heads=2, hidden_size=8)).to(dtype)
    keep = torch.ones(80, 80, dtype=torch.bool)
    with torch.inference_mode(), Largest() as largest:
        model(torch.zeros(1, 6400, 1176, dtype=dtype), keep)
    assert 6400 * 1000 < largest.values <= 6400 * 1176 + 8 * vit.SCORES
    assert largest.values < 6400**2 / 2


def test_one_decoder_call_a_token(checkpoint):
    model, calls = checkpoint[2], []
    hook = model.llm.register_forward_hook(lambda *_: calls.append(1))
    count = len(list(model.tokens(model.prompt(Image.new("RGB", (56, 56)), None, ""), 3)))
    hook.remove()
    assert len(calls) == count


def decoder_config(hidden_size=64, mrope_section=(2, 3, 3)):
    return llm.DecoderConfig(
        hidden_size=hidden_size, num_attention_heads=4, num_key_value_heads=2, mrope_section=mrope_section
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VisionConfig(embed_dim=72, num_heads=4), "no multiple"),
        (lambda: decoder_config(hidden_size=66), "do not divide"),
        (lambda: decoder_config(mrope_section=(4, 4)), "three numbers"),
        (lambda: decoder_config(mrope_section=(2, 3, 4)), "three numbers"),
        (lambda: smart_resize(28, 5614, 28, 3136, 12845056), "over 200"),
        (lambda: smart_resize(0, 0, 28, 3136, 12845056), "over 200"),
        (lambda: smart_resize(56, 56, 28, 0, 9999), "must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("size, limit", [((30, 6000), 78400), ((882, 1106), 1003520)])
def test_sizes_at_the_upper_limit(size, limit):
    assert smart_resize(*size, 28, 3136, limit) == theirs_resize(*size, 28, 3136, limit)


def test_a_decompression_bomb_is_a_value_error(files, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image\.png: not an image"):
        read_image("image.png")


def test_a_png_with_a_broken_chunk(files):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)).save("big.png")
    data = Path("big.png").read_bytes()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    Path("big.png").write_bytes(data[:second] + b"\x00\x01\x02\x03" + data[second + 4 :])
    with pytest.raises(ValueError, match=r"big\.png: not an image"):
        read_image("big.png")


def test_big_endian_16_bit_grey(files):
    grey = np.arange(56 * 56, dtype=">u2").reshape(56, 56) * 20
    image = Image.frombytes("I;16B", (56, 56), grey.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(read_image(image))[..., 0], grey // 257)


def test_top_p_that_is_met_exactly_stops_there():
    choose = llm.sampler(1.0, 0.5, 0)
    assert len({choose(torch.zeros(2)) for _ in range(50)}) == 1


def test_seeds_differ_and_may_be_any_whole_number():
    draws = {
        tuple(choose(torch.zeros(1000)) for _ in range(3))
        for choose in (llm.sampler(1.0, 1.0, s) for s in (0, 1, 2, -1, 2**70 + 5))
    }
    assert len(draws) == 5


def test_low_temperatures_still_draw():
    choose = llm.sampler(0.5, 1.0, 0)
    assert len({choose(torch.zeros(9)) for _ in range(50)}) > 1
