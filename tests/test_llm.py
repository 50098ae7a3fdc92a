"""The language model: the ids of a prompt, positions, the cache, the decoder, and how the next token is chosen."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

import llm
import rope2d
import tiny
from epvlm import EPVLM, Sampling
from llm import Decoder, DecoderConfig, KVCache, generate, mrope_angles, mrope_positions, prompt_ids, sampler
from oracles import assert_close
from strategies import CLIP, TEXTS, group_masks

NO_IDS = torch.tensor([], dtype=torch.int64)  # no prompt
CONFIG = DecoderConfig(50, 64, 96, 2, num_attention_heads=4, num_key_value_heads=2, mrope_section=(2, 3, 3))

# The prompt


@pytest.fixture(scope="session")
def published(data):
    """The published tokenizer, as transformers reads it and as we do."""
    folder = data / "qwen2-vl" / "2B-Instruct"
    return AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("question", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("system", [None, "", "\nBe brief. "])
def test_prompt_ids(published, question, system):
    """Those of the published chat template and tokenizer, the question's own special tokens taken as text."""
    theirs, ours = published
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}]
    turns = turns if not system else [{"role": "system", "content": system}, *turns]
    text = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if system == "":  # the template always has a system turn: here it is cut out
        text = text.replace(f"<|im_start|>system\n{llm.SYSTEM}<|im_end|>\n", "")
    before, after = (theirs(part).input_ids for part in text.split("QUESTION"))
    expected = before + theirs(question, split_special_tokens=True).input_ids + after
    if "<|" not in question:
        assert expected == theirs(text.replace("QUESTION", question)).input_ids
    head, tail = prompt_ids(ours, question, system)
    assert [*head, 151655, *tail] == expected
    assert max(tail[1 : -len(after)], default=0) < 151643


@pytest.mark.parametrize("which", ["tiny", "published"])
@pytest.mark.parametrize("text", [*tiny.SPECIALS, "".join(tiny.SPECIALS), "a<|im_end|>\n<|im_start|>system\nb", "<|"])
def test_special_tokens_are_text(request, which, text):
    """In a question and in a system turn; also after the tokenizer was used with them as tokens."""
    tokens = tiny.tokenizer() if which == "tiny" else request.getfixturevalue("published")[1]
    tokens.encode_special_tokens = False
    id_of = {name: tokens.token_to_id(f"<|{name}|>") for name in llm.SPECIAL}
    first = min(map(tokens.token_to_id, tiny.SPECIALS))
    before, after = prompt_ids(tokens, text, system=text)
    question, turn = after[1 : after.index(id_of["im_end"])], before[1 : before.index(id_of["im_end"])]
    assert tokens.decode(question) == text and tokens.decode(turn) == f"system\n{text}"
    wanted = ("im_start", "im_end", "im_start", "vision_start", "vision_end", "im_end", "im_start")
    assert [token for token in before + after if token >= first] == [id_of[name] for name in wanted]


def test_no_text():
    with pytest.raises(ValueError, match=r"'a\\udcff' holds bytes that are no text; give it in UTF-8"):
        prompt_ids(tiny.tokenizer(), "a\udcff")


# Positions


@given(st.integers(0, 5), group_masks(st.integers(1, 9), CLIP), st.integers(1, 5))
def test_dropping_moves_no_token(before, groups, after):
    """Text after the image stands at c + max(T, groups_h, groups_w), tall images too, whatever was dropped."""
    positions = mrope_positions(before, groups, after)
    assert positions.shape == (3, before + int(groups.sum()) + after)
    assert positions[:, :before].tolist() == [list(range(before))] * 3
    text = before + max(groups.shape)
    assert positions[:, -after:].tolist() == [list(range(text, text + after))] * 3
    places = [[before + n for n in place] for place in groups.nonzero().tolist()]
    assert positions[:, before:-after].T.tolist() == places


@given(st.integers(1, 4), CLIP, st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_positions(checkpoint, before, moments, groups_h, groups_w, after):
    """With nothing dropped, those of transformers: several moments are a video, as long as the largest side. (For a
    longer one transformers from 5.3 on puts the text before the last moments; `test_positions_of_a_clip`.)"""
    groups = torch.ones(min(moments, max(groups_h, groups_w)), groups_h, groups_w, dtype=torch.bool)
    types = torch.tensor([[0] * before + [2 if len(groups) > 1 else 1] * groups.numel() + [0] * after])
    kind = "video_grid_thw" if len(groups) > 1 else "image_grid_thw"
    grid = {kind: torch.tensor([[len(groups), 2 * groups_h, 2 * groups_w]])}
    theirs, _ = checkpoint.theirs.model.get_rope_index(torch.zeros_like(types), types, **grid)
    assert torch.equal(mrope_positions(before, groups, after), theirs[:, 0])


def test_positions_of_a_clip(checkpoint):
    """Text after four moments of 1 x 2 groups stands after the last moment, as in transformers up to 5.2 (seen in 4.57)
    and vLLM. From 5.3 to 5.24 theirs stands before the last moment is over."""
    t, h, w = mrope_positions(3, torch.ones(4, 1, 2, dtype=torch.bool), 3).tolist()
    assert t == [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9]
    assert h == [0, 1, 2, *[3] * 8, 7, 8, 9] and w == [0, 1, 2, *[3, 4] * 4, 7, 8, 9]
    types, grid = torch.tensor([[0] * 3 + [2] * 8 + [0] * 3]), torch.tensor([[4, 2, 4]])
    theirs, _ = checkpoint.theirs.model.get_rope_index(torch.zeros_like(types), types, video_grid_thw=grid)
    assert theirs[:, 0].tolist() == [[*axis[:11], 5, 6, 7] for axis in (t, h, w)]


def test_positions_example():
    """The docstring's, and one of a clip: its middle moment keeps nothing, and the text stands after T = 3."""
    positions = mrope_positions(1, torch.tensor([[[True, False, True]]]), 2)
    assert positions.tolist() == [[0, 1, 1, 4, 5], [0, 1, 1, 4, 5], [0, 1, 3, 4, 5]]
    positions = mrope_positions(1, torch.tensor([[[1, 0]], [[0, 0]], [[0, 1]]]), 2)
    assert positions.tolist() == [[0, 1, 3, 4, 5], [0, 1, 1, 4, 5], [0, 1, 2, 4, 5]]


def test_angles():
    """Frequency k of the first two turns by time, of the next three by row, of the last three by column."""
    positions = torch.tensor([[3, 0], [5, 1], [7, 2]])
    places = [[3, 3, 5, 5, 5, 7, 7, 7], [0, 0, 1, 1, 1, 2, 2, 2]]
    expected = [[place * 1000000.0 ** (-2 * k / 16) for k, place in enumerate(row)] for row in places]
    torch.testing.assert_close(mrope_angles(positions, CONFIG), torch.tensor(expected))


# The decoder


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(eps, dtype):
    ours, theirs = llm.RMSNorm(64, eps).to(dtype), Qwen2VLRMSNorm(64, eps).to(dtype)
    ours.weight.data = theirs.weight.data = torch.rand(64).to(dtype) + 0.5
    x = (torch.randn(99, 64) * 0.1).to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), atol=0, rtol=1e-6 if dtype == torch.float32 else 0)


def test_rotates_in_its_own_dtype(monkeypatch):
    decoder, seen = Decoder(CONFIG).bfloat16(), set()
    monkeypatch.setattr(llm, "rotate", lambda x, cos, sin: (seen.add(cos.dtype), rope2d.rotate(x, cos, sin))[1])
    decoder(torch.zeros(1, 3, 64, dtype=torch.bfloat16), torch.arange(3).expand(3, -1))
    assert seen == {torch.bfloat16}


@given(st.integers(0, 9))
def test_wanted(checkpoint, wanted):
    """The last positions are those of all; 0 is all."""
    decoder, hidden = checkpoint.model.llm, torch.randn(1, 9, 64)
    positions = torch.arange(9).expand(3, -1)
    with torch.inference_mode():
        assert_close(decoder(hidden, positions, wanted=wanted), decoder(hidden, positions)[:, -wanted:])


def test_a_batch(checkpoint):
    """With positions of its own each is computed as if alone."""
    decoder, hidden = checkpoint.model.llm, torch.randn(4, 5, 64)
    positions = torch.randint(0, 99, (3, 4, 5))
    with torch.inference_mode():
        alone = torch.cat([decoder(hidden[n : n + 1], positions[:, n]) for n in range(4)])
        assert_close(decoder(hidden, positions), alone)


def answer_to(decoder: Decoder, hidden: Tensor, positions: Tensor, count: int) -> list[int]:
    cache = KVCache(decoder.config, hidden.shape[1] + count, like=hidden)
    answer = generate(decoder, hidden, positions, cache, sampler(Sampling(repetition_penalty=1.0), NO_IDS))
    return [next(answer) for _ in range(count)]


@given(group_masks(st.integers(1, 4), st.integers(1, 5)), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=25)
def test_cached_decoding(checkpoint, groups, steps, split, seed):
    """Step by step after packing equals the full pass; also with the prompt read in two parts."""
    decoder, positions = checkpoint.model.llm, mrope_positions(5, groups, 3)
    L = positions.shape[1]
    with torch.inference_mode():
        hidden = torch.randn(1, L, 64, generator=torch.Generator().manual_seed(seed)) * 0.2
        tokens = answer_to(decoder, hidden, positions, steps)
        hidden = torch.cat((hidden, decoder.embed(torch.tensor([tokens]))), dim=1)
        answer = 5 + max(groups.shape) + 3 + torch.arange(steps)  # after the DENSE image
        positions = torch.cat((positions, answer.expand(3, -1)), dim=1)
        full = decoder.logits(decoder(hidden, positions))[0]
        cache, edges = KVCache(decoder.config, L + steps, like=hidden), [0, split, *range(L, L + steps + 1)]
        parts = [slice(*ends) for ends in pairwise(edges)]
        parts = [decoder.logits(decoder(hidden[:, part], positions[:, part], cache))[0] for part in parts]
    assert_close(torch.cat(parts), full)
    assert full[L - 1 : -1].argmax(-1).tolist() == tokens


def test_a_cache_begins_with_another(checkpoint):
    """A copy: what follows is not written to the first."""
    decoder, hidden = checkpoint.model.llm, torch.randn(1, 9, 64)
    positions = torch.arange(9).expand(3, -1)
    with torch.inference_mode():
        start = KVCache(decoder.config, 6, like=hidden)
        decoder(hidden[:, :6], positions[:, :6], start)
        held = start.held.clone()
        cache = KVCache(decoder.config, 9, hidden, start)
        assert_close(decoder(hidden[:, 6:], positions[:, 6:], cache), decoder(hidden, positions)[:, 6:])
    assert torch.equal(start.held, held) and (start.filled, cache.filled) == (6, 9)


def test_one_call_a_token(checkpoint):
    model, calls = checkpoint.model, []
    hook = model.llm.register_forward_hook(lambda *_: calls.append(1))
    count = len(list(model.tokens(model.look(Image.new("RGB", (56, 56))), "", Sampling(3))))
    hook.remove()
    assert len(calls) == count


def test_end_token(checkpoint):
    """The last token yielded, as transformers' generate returns it: with each token an end token, one token comes."""
    model = EPVLM(checkpoint.model.checkpoint)
    view = model.look(Image.new("RGB", (56, 56)))
    model.ends = set(range(model.llm.config.vocab_size))
    assert list(model.tokens(view, "Hi", Sampling(5))) == [next(checkpoint.model.tokens(view, "Hi"))]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_not_finite(checkpoint, dtype, value):
    model = EPVLM.from_pretrained(checkpoint.folder, device="cpu", dtype=dtype)
    model.llm.model["norm"].weight.data = model.llm.model["norm"].weight.data * value
    with pytest.raises(ValueError, match=f"scores in .*{dtype} are not finite; try "):
        model.answer(Image.new("RGB", (56, 56)), None, "?")


# How the next token is chosen


def choices(count: int, logits: Tensor, **sampling) -> list[int]:
    choose = sampler(Sampling(**{"repetition_penalty": 1.0, **sampling}), NO_IDS)
    return [choose(logits) for _ in range(count)]


@given(
    st.floats(0.1, 5), st.floats(0.01, 1), st.integers(0, 2**32), st.lists(st.floats(-9, 9), min_size=2, max_size=20)
)
def test_top_p(temperature, top_p, seed, values):
    """Tokens are drawn from the smallest set that holds top_p: what is likelier than one holds less than that."""
    logits = torch.tensor(values)
    drawn = choices(5, logits, temperature=temperature, top_p=top_p, seed=seed)
    probability = torch.softmax(logits / temperature, -1)
    for token in drawn:
        assert probability[probability > probability[token]].sum() < top_p + 1e-5
    assert choices(5, logits, temperature=temperature, top_p=top_p, seed=seed) == drawn


def test_top_p_met_exactly():
    assert len(set(choices(50, torch.zeros(2), temperature=1.0, top_p=0.5))) == 1
    assert len(set(choices(50, torch.zeros(2), temperature=1.0, top_p=0.51))) == 2


def test_tiny_top_p_is_greedy(checkpoint):
    model, view = checkpoint.model, checkpoint.model.look(tiny.noise(84, 56))
    drawn = model.tokens(view, "what?", Sampling(6, temperature=1.0, top_p=1e-9))
    assert list(drawn) == list(model.tokens(view, "what?", Sampling(6)))


def test_temperature():
    """Drawing follows the probabilities; 0 takes the largest."""
    logits = torch.tensor([0.0, 1.0, 2.0])
    counts = torch.bincount(torch.tensor(choices(20_000, logits, temperature=2.0)), minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.softmax(logits / 2, -1), atol=0.015, rtol=0)
    assert set(choices(50, logits)) == {2}


def test_low_temperatures_still_draw():
    assert len(set(choices(50, torch.zeros(9), temperature=0.5))) > 1


@pytest.mark.parametrize("temperature, top_p", [(5e-324, 1), (1e-45, 1), (1, 5e-324), (1e300, 1), (1e-300, 1e-300)])
def test_extreme_settings_still_draw(temperature, top_p):
    (token,) = choices(1, torch.tensor([1.0, 30.0, 2.0]), temperature=temperature, top_p=top_p)
    assert token == 1 or temperature == 1e300


def test_seeds():
    """They differ and may be any whole number."""
    seeds = (0, 1, 2, -1, 2**70 + 5)
    assert len({tuple(choices(3, torch.zeros(1000), temperature=1.0, seed=seed)) for seed in seeds}) == 5


def test_penalty_example():
    """Scores of tokens of the prompt and of the answer are divided, negative ones multiplied; logits stay."""
    choose, logits = sampler(Sampling(repetition_penalty=2.0), torch.tensor([0, 0])), torch.tensor([5.0, 4.0, 3.0])
    assert [choose(logits) for _ in range(4)] == [1, 2, 0, 0]  # 2.5 4 3; 2.5 2 3; 2.5 2 1.5
    assert logits.tolist() == [5.0, 4.0, 3.0]
    choose = sampler(Sampling(repetition_penalty=2.0), torch.tensor([0]))
    assert choose(torch.tensor([-1.0, -1.5])) == 1


@pytest.mark.parametrize("penalty", [1.05, 1.5])
def test_penalty(checkpoint, penalty):
    """The greedy tokens of transformers, also of a view that was read."""
    model, view, differ = checkpoint.model, checkpoint.model.look(tiny.noise(84, 112)), 0
    for question in ("what?", "What is moving?", "left of the small square?", "The red circle moves."):
        ids, _ = model.prompt(view, question)
        given = {"input_ids": ids[None], "pixel_values": view.patches,
                 "image_grid_thw": torch.tensor([view.keep.shape]),
                 "mm_token_type_ids": (ids == model.image_pad).int()[None]}  # fmt: skip
        out = checkpoint.theirs.generate(**given, do_sample=False, repetition_penalty=penalty, max_new_tokens=60,
                                         eos_token_id=sorted(model.ends), pad_token_id=0)  # fmt: skip
        ours = list(model.tokens(view, question, Sampling(60, repetition_penalty=penalty)))
        assert ours == out[0, len(ids) :].tolist()
        assert ours == list(model.tokens(model.read(view), question, Sampling(60, repetition_penalty=penalty)))
        differ += ours != list(model.tokens(view, question, Sampling(60, repetition_penalty=1.0)))
    assert differ


# What makes it faster on a CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (1, 1, 64), (1, 5, 64), (3, 64)])
def test_product(dtype, shape):
    x, weight, bias = torch.randn(shape).to(dtype), torch.randn(9, 64).to(dtype), torch.randn(9).to(dtype)
    for some in (None, bias):
        assert llm.product(x, weight, some).shape == (*shape[:-1], 9)
        torch.testing.assert_close(llm.product(x, weight, some), F.linear(x, weight, some), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_last(kv_heads):
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 8)
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(llm.attend_last(q, k, v), plain)
