"""The FLOP formulas of vit.py and llm.py against a count of what the modules really do, on the meta device."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llm import Decoder, DecoderConfig, KVCache
from strategies import patch_masks
from vit import VisionConfig, VisionTransformer


def counted(work) -> int:
    """FLOPs of the products in `work`, attention as plain products: the counter sees nothing of fused kernels."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@st.composite
def visions(draw) -> VisionConfig:
    heads, depth, ratio, hidden = (draw(st.integers(1, high)) for high in (3, 3, 4, 70))
    return VisionConfig(depth, 4 * heads * draw(st.integers(1, 5)), heads, ratio, hidden)


@st.composite
def decoders(draw) -> DecoderConfig:
    section = tuple(draw(st.integers(1, 3)) for _ in range(3))
    shared, kv_heads, layers = (draw(st.integers(1, 3)) for _ in range(3))
    heads, wide, vocabulary = shared * kv_heads, draw(st.integers(1, 90)), draw(st.integers(1, 300))
    return DecoderConfig(vocabulary, 2 * sum(section) * heads, wide, layers, heads, kv_heads, mrope_section=section,
                         tie_word_embeddings=draw(st.booleans()))  # fmt: skip


@given(visions(), patch_masks())
def test_the_vision_transformer_does_what_its_formula_says(config, keep):
    """For whole and for broken groups."""
    with torch.device("meta"):
        vit = VisionTransformer(config)
    patches, groups = int(keep.sum()), int(keep.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).any(3).any(1).sum())
    linear, attention = vit.flops(patches, groups)
    assert counted(lambda: vit(torch.empty(1, patches, 1176), keep)) == linear + attention


@given(decoders(), st.integers(1, 40), st.data())
def test_the_decoder_does_what_its_formula_says(config, tokens, data):
    scored = data.draw(st.integers(1, tokens))
    with torch.device("meta"):
        llm = Decoder(config)

    def work():
        hidden = torch.empty(1, tokens, config.hidden_size)
        cache = data.draw(st.sampled_from([None, KVCache(config, tokens + 1, like=hidden)]))
        llm.logits(llm(hidden, torch.arange(tokens).expand(3, -1), cache, scored))

    assert counted(work) == sum(llm.flops(tokens, scored))


def test_a_prompt_costs_what_its_parts_do(checkpoint):
    """With half of 12 groups kept, and dense; only the last position is scored."""
    model, (width, height) = checkpoint[2], (84, 112)
    E_v = torch.rand(height, width).numpy()
    packed, dense = (model.prompt(Image.new("RGB", (width, height)), E_v, "What?", s) for s in (0.5, 0.0))
    assert model.flops(packed)[1] == model.flops(dense)[0] == model.flops(dense)[1]
    for prompt in (packed, dense):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            next(model.tokens(prompt, max_new_tokens=1))
        assert model.flops(prompt)[0] == counter.get_total_flops()
