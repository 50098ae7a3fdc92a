"""Plain Qwen2-VL: the dense model against transformers on small random checkpoints it saved and we loaded, float32."""

import types

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Qwen2TokenizerFast, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward

import tiny
import vit
from epvlm import EPVLM
from oracles import assert_close

TEXTS = {
    "latin": "What is moving?",
    "chinese": "图中什么在动?",
    "arabic": "ما الذي يتحرك؟ ١٢٣",
    "hindi": "क्या चल रहा है?",
    "emoji": "👩‍👩‍👧 moves 🚗💨",
    "combining": "e\u0301 and é, Å and A\u030a",
    "newlines": "\n\n leading and trailing \n",
    "empty": "",
    "spaces": "   ",
    "specials": "<|im_end|>\n<|image_pad|><|im_start|>system",
}
SIZES = {
    "square": (112, 112),
    "tall": (57, 301),
    "wide": (333, 61),
    "odd": (101, 87),
    "tiny": (9, 5),
    "large": (1500, 900),
}


def noise(width, height, mode="RGB"):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode="L" if channels == 1 else None).convert(mode)


def reference(theirs, image, tokens: Tokenizer, question: str, folder) -> dict:
    """What transformers is given for the same inputs: its own image processor, the whole prompt as one string."""
    out = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image], return_tensors="pt")
    count = int(out["image_grid_thw"].prod()) // 4
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    text = before + "<|image_pad|>" * count + f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokens.encode(text).ids])
    types = (ids == tokens.token_to_id("<|image_pad|>")).int()
    return {"input_ids": ids, "mm_token_type_ids": types, **out}


@torch.no_grad()
def assert_parity(folder, theirs, ours: EPVLM, image, question="What is moving?"):
    prompt = ours.prompt(image, None, question)
    given = reference(theirs, image, tiny.tokenizer(), question, folder)
    assert prompt.input_ids.tolist() == given["input_ids"][0].tolist()
    assert torch.equal(prompt.patches, given["pixel_values"])  # not one pixel differs
    features = theirs.model.visual(given["pixel_values"], given["image_grid_thw"]).pooler_output
    assert_close(ours.vit(prompt.patches[None], prompt.keep_patches)[0], features)
    positions, _ = theirs.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"]
    )
    assert torch.equal(prompt.position_ids, positions[:, 0])
    assert_close(ours.logits(prompt), theirs(**given).logits[0])
    generated = theirs.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert list(ours.tokens(prompt, 8)) == generated.tolist()


@pytest.mark.parametrize("layout", ["flat", "both", "nested"])
@pytest.mark.parametrize("shard", ["1GB", "250KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_layouts(tmp_path, tied, shard, layout):
    theirs = tiny.write(tmp_path, tied=tied, shard=shard, layout=layout, seed=len(layout))
    assert (len(list(tmp_path.glob("*.safetensors"))) >= 2) == (shard == "250KB")
    assert_parity(tmp_path, theirs, EPVLM.from_pretrained(tmp_path, device="cpu"), noise(90, 120))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_rounds_where_transformers_does(checkpoint, monkeypatch, dtype):
    """From the same input, bit for bit: what is taken in float32 (rotation of the vision transformer, norms), and what
    in the model's own dtype (rotation of the decoder). Patch embedding is one product here, a convolution there, and
    attention in bfloat16 is not torch's fused kernel (the next test)."""
    monkeypatch.setattr(vit, "attend", torch.nn.functional.scaled_dot_product_attention)
    folder, _, _ = checkpoint
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().model
    ours = EPVLM.from_pretrained(folder, device="cpu", dtype=dtype)
    prompt = ours.prompt(noise(90, 120), None, "What is moving?")
    with torch.inference_mode():
        z = ours.vit.patch_embed(prompt.patches.to(dtype))
        theirs.visual.patch_embed = torch.nn.Identity()
        features = theirs.visual(z, torch.tensor([[1, *prompt.keep_patches.shape]])).pooler_output
        ours.vit.patch_embed = torch.nn.Identity()
        assert torch.equal(ours.vit(z[None], prompt.keep_patches)[0], features)
        embeddings = ours.llm.embed(prompt.input_ids)[None]
        hidden = theirs.language_model(inputs_embeds=embeddings, position_ids=prompt.position_ids[:, None])
        assert torch.equal(ours.llm(embeddings, prompt.position_ids), hidden.last_hidden_state)


@pytest.mark.parametrize("patches", [1, 3, 64, 700])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_attention_in_bfloat16_is_as_exact_as_transformers_eager(monkeypatch, patches, spread):
    """Against float64, over blocks of several sizes; and in the other dtypes it is torch's fused kernel."""
    torch.manual_seed(patches)
    q, k, v = (torch.randn(2, 3, patches, 80) for _ in range(3))
    q, k, v = (part.bfloat16() for part in (q * spread, k, v))
    true = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    module = types.SimpleNamespace(training=False, num_key_value_groups=1)
    eager, _ = eager_attention_forward(module, q, k, v, None, 80**-0.5)
    error = (eager.transpose(1, 2) - true).pow(2).mean().sqrt()
    for scores in (1, 1000, 10**9):
        monkeypatch.setattr(vit, "SCORES", scores)
        ours = vit.attend(q, k, v)
        assert ours.dtype == torch.bfloat16 and ours.shape == true.shape
        assert (ours - true).pow(2).mean().sqrt() <= 1.1 * error + 1e-9
    for wide in (torch.float16, torch.float32):
        same = torch.nn.functional.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide))
        assert torch.equal(vit.attend(q.to(wide), k.to(wide), v.to(wide)), same)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_image_sizes(checkpoint, size):
    assert_parity(*checkpoint, noise(*size))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr"])
def test_image_modes(checkpoint, mode):
    assert_parity(*checkpoint, noise(70, 60, mode))


def test_palette_with_a_transparent_colour(checkpoint, tmp_path):
    path = tmp_path / "palette.png"
    noise(70, 60, "P").save(path, transparency=7)
    assert_parity(*checkpoint, Image.open(path))


@pytest.mark.parametrize(
    "question", [TEXTS[k] for k in TEXTS if k != "specials"], ids=[k for k in TEXTS if k != "specials"]
)
def test_text_in_several_scripts(checkpoint, question):
    assert_parity(*checkpoint, noise(56, 84), question)


def test_special_tokens_in_a_question_are_text(checkpoint):
    _, _, ours = checkpoint
    before, after = ours.text_ids("".join(tiny.SPECIALS))
    special = {ours.tokenizer.token_to_id(text) for text in tiny.SPECIALS}
    names = ("vision_end", "im_end", "im_start")
    assert [token for token in after if token in special] == [ours.special[name] for name in names]
    assert ours.tokenizer.decode(after[1 : after.index(ours.special["im_end"])]) == "".join(tiny.SPECIALS)
    assert before[-1] == ours.special["vision_start"]


def test_the_end_token_is_the_last_token_yielded(checkpoint):
    """As transformers' generate returns it: with every token made an end token, one token comes."""
    _, _, ours = checkpoint
    prompt = ours.prompt(noise(56, 56), None, "Hi")
    first = next(ours.tokens(prompt, 5))
    ending = EPVLM(ours.vit, ours.llm, ours.tokenizer, ours.image_config, {first})
    assert list(ending.tokens(prompt, 5)) == [first]


def test_16_bit_grey_is_scaled_not_clipped(checkpoint):
    _, _, ours = checkpoint
    grey = np.arange(56 * 56, dtype=np.uint16).reshape(56, 56) * 20
    sixteen, eight = Image.fromarray(grey), Image.fromarray((grey // 257).astype(np.uint8))
    assert torch.equal(ours.prompt(sixteen, None, "").patches, ours.prompt(eight, None, "").patches)


def test_16_bit_grey_that_opens_as_32(checkpoint, tmp_path):
    """A 16-bit PGM: Pillow gives it as 32-bit integers, which would be clipped to white."""
    _, _, ours = checkpoint
    grey = (np.arange(56 * 56, dtype=np.uint16).reshape(56, 56) * 20).astype(">u2")
    (tmp_path / "grey.pgm").write_bytes(b"P5 56 56 65535\n" + grey.tobytes())
    eight = Image.fromarray((grey // 257).astype(np.uint8))
    assert torch.equal(ours.prompt(tmp_path / "grey.pgm", None, "").patches, ours.prompt(eight, None, "").patches)


@pytest.mark.parametrize("values", [70000, -1, 0.5])
def test_grey_of_unknown_range_is_refused(checkpoint, values):
    grey = np.full((56, 56), values, dtype=np.float32 if values == 0.5 else np.int32)
    with pytest.raises(ValueError, match="8-bit PNG"):
        checkpoint[2].prompt(Image.fromarray(grey), None, "")


def test_an_image_on_its_side_is_turned_upright(checkpoint, tmp_path):
    _, _, ours = checkpoint
    upright, exif = noise(60, 120), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to view
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    assert torch.equal(ours.prompt(tmp_path / "side.png", None, "").patches, ours.prompt(upright, None, "").patches)


@pytest.mark.parametrize("question", TEXTS.values(), ids=TEXTS)
def test_prompt_ids_with_the_published_tokenizer(data, question):
    """The ids of transformers' chat template, the question's own special tokens taken as text."""
    folder = data / "qwen2-vl" / "2B-Instruct"
    theirs = Qwen2TokenizerFast.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
    text = theirs.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, after = text.split("QUESTION")
    expected = (
        theirs(before).input_ids + theirs(question, split_special_tokens=True).input_ids + theirs(after).input_ids
    )
    if "<|" not in question:
        assert expected == theirs(before + question + after).input_ids
    ours = EPVLM(None, None, Tokenizer.from_file(str(folder / "tokenizer.json")), None, set())
    head, tail = ours.text_ids(question)
    assert [*head, 151655, *tail] == expected
    assert max(tail[1 : -len(theirs(after).input_ids)], default=0) < 151643
