"""The whole: plain Qwen2-VL against transformers, packing against masking, FLOPs, and what the README says."""

import doctest
import importlib
import inspect
import math
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs_resize

import tiny
import vit
from epvlm import EPVLM, Options, Sampling, View, main
from events import Events, read_events
from llm import Decoder, DecoderConfig, KVCache
from oracles import assert_close, clip_rows, masked_decoder, masked_vision
from strategies import CLIP, SPARSITIES, TEXTS, XYTP, group_masks, patch_masks
from vit import Clip, ImageConfig, VisionConfig, VisionTransformer, packed_patches

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is moving?"
SIZES = {
    "square": (112, 112),
    "tall": (57, 301),
    "wide": (333, 61),
    "odd": (101, 87),
    "tiny": (9, 5),
    "large": (1500, 900),
}


def noise(width, height, mode="RGB", seed=0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode="L" if channels == 1 else None).convert(mode)


def film(count: int, width: int, height: int, mode="RGB", seed=0) -> Clip:
    """So many frames, 40 ms apart."""
    return Clip([noise(width, height, mode, seed + n) for n in range(count)], np.arange(count) * 40_000)


# Plain Qwen2-VL: the dense model against transformers, float32


def rows_and_grid(folder: Path, seen: Image.Image | Clip, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """By transformers' image processor; of a clip, whose limits those are, as its video processor makes them."""
    if isinstance(seen, Image.Image):
        out = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[seen])
        return torch.as_tensor(np.asarray(out["pixel_values"])), torch.as_tensor(np.asarray(out["image_grid_thw"]))
    width, height = seen.frames[0].size
    height, width = theirs_resize(height, width, 28, *limits)
    rows = clip_rows([frame.convert("RGB") for frame in seen.frames], height, width, ImageConfig())
    return rows, torch.tensor([[math.ceil(len(seen.frames) / 2), height // 14, width // 14]])


def reference(folder: Path, seen: Image.Image | Clip, question: str, limits=(100352, 602112)) -> dict:
    """The same inputs for transformers, with the whole prompt as one string."""
    (rows, grid), tokens = rows_and_grid(folder, seen, limits), tiny.tokenizer()
    kind, pixels, code = "video", "pixel_values_videos", 2
    if isinstance(seen, Image.Image):
        kind, pixels, code = "image", "pixel_values", 1
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    pads = f"<|{kind}_pad|>" * (int(grid.prod()) // 4)
    text = f"{before}{pads}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokens.encode(text).ids])
    types = code * (ids == tokens.token_to_id(f"<|{kind}_pad|>")).int()
    return {"input_ids": ids, "mm_token_type_ids": types, pixels: rows, f"{kind}_grid_thw": grid}


@torch.no_grad()
def assert_parity(folder, theirs, ours: EPVLM, seen: Image.Image | Clip, question=QUESTION):
    """Ids, pixels and positions equal; visual tokens and logits to 1e-4 of the largest; the same greedy answer."""
    view = ours.look(seen)
    ids, positions = ours.prompt(view, question)
    given = reference(folder, seen, question)
    texts, types, rows, grid = given.values()
    assert torch.equal(ids, texts[0]) and view.keep.shape == (*grid[0],)
    assert torch.equal(view.patches, rows)  # not one pixel differs
    assert_close(ours.vit(view.patches[None], view.keep)[0], theirs.model.visual(rows, grid).pooler_output)
    grids = {key: value for key, value in given.items() if key.endswith("grid_thw")}
    expected, _ = theirs.model.get_rope_index(texts, types, **grids)
    assert torch.equal(positions, expected[:, 0])
    assert_close(ours.logits(view, question), theirs(**given).logits[0])
    generated = theirs.generate(**given, max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert list(ours.tokens(view, question, Sampling(8))) == generated.tolist()


@pytest.mark.parametrize("layout", ["flat", "both", "nested"])
@pytest.mark.parametrize("shard", ["1GB", "250KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_layouts(tmp_path, tied, shard, layout):
    theirs = tiny.write(tmp_path, tied=tied, shard=shard, layout=layout, seed=len(layout))
    assert (len(list(tmp_path.glob("*.safetensors"))) >= 2) == (shard == "250KB")
    assert_parity(tmp_path, theirs, EPVLM.from_pretrained(tmp_path, device="cpu"), noise(90, 120))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_image_sizes(checkpoint, size):
    """Eq. 1 and 4."""
    assert_parity(*checkpoint, noise(*size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype(checkpoint, monkeypatch, dtype):
    """Eq. 3. From the same input, bit for bit: what is taken in float32 (rotation of the vision transformer, norms),
    and what in the model's own dtype (rotation of the decoder). Patch embedding is one product here, a convolution
    there, and attention in bfloat16 is not torch's fused kernel (test_vit.py::test_attend)."""
    monkeypatch.setattr(vit, "attend", F.scaled_dot_product_attention)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=dtype).eval().model
    ours = EPVLM.from_pretrained(checkpoint.folder, device="cpu", dtype=dtype)
    view = ours.look(noise(90, 120))
    ids, positions = ours.prompt(view, QUESTION)
    with torch.inference_mode():
        z = ours.vit.patch_embed(view.patches.to(dtype))
        theirs.visual.patch_embed = torch.nn.Identity()
        features = theirs.visual(z, torch.tensor([view.keep.shape])).pooler_output
        ours.vit.patch_embed = torch.nn.Identity()
        assert torch.equal(ours.vit(z[None], view.keep)[0], features)
        H_q = ours.llm.embed(ids[None])
        hidden = theirs.language_model(inputs_embeds=H_q, position_ids=positions[:, None]).last_hidden_state
        assert torch.equal(ours.llm(H_q, positions), hidden)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr"])
def test_image_modes(checkpoint, mode):
    assert_parity(*checkpoint, noise(70, 60, mode))


def test_transparent_palette(checkpoint, tmp_path):
    noise(70, 60, "P").save(tmp_path / "palette.png", transparency=7)
    assert_parity(*checkpoint, Image.open(tmp_path / "palette.png"))


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "specials"])
def test_scripts(checkpoint, name):
    assert_parity(*checkpoint, noise(56, 84), TEXTS[name])


CLIPS = {  # how many frames, and their size
    "one": (1, 240, 180),
    "two": (2, 101, 87),
    "three": (3, 392, 280),  # not resized
    "five": (5, 57, 301),
    "sixteen": (16, 240, 180),
    "large": (2, 1500, 900),
    "grey": (4, 60, 70, "L"),
}


@pytest.mark.parametrize("frames", CLIPS.values(), ids=CLIPS)
def test_clips(checkpoint, frames):
    """Frames get one size within limits of their own, by torch's filter; the last of an odd clip is shown twice."""
    assert_parity(*checkpoint, film(*frames))


def test_sizes_of_clips(checkpoint):
    """Those of Qwen2VLVideoProcessor, as it was seen to make them (DAVIS and 1080p); a clip of one frame is a clip."""
    sizes = {(240, 180): (280, 392), (1920, 1080): (560, 1008)}
    for size, expected in sizes.items():
        assert checkpoint.model.input_size(film(1, *size), Options()) == expected


@torch.no_grad()
def test_a_clip_longer_than_its_grid(checkpoint):
    """Four moments of 1 x 2 groups: transformers 5.3 to 5.24 put the text before the last moments, up to 5.2, and vLLM,
    after them, and so do we (`test_llm.py::test_positions_of_a_clip`). At our positions theirs gives our scores and
    greedy tokens."""
    folder, theirs, model = checkpoint
    clip, limits = film(8, 60, 31), (784, 2000)
    view = model.look(clip, None, Options(min_pixels=limits[0], max_pixels=limits[1]))
    ids, positions = model.prompt(view, QUESTION)
    given = reference(folder, clip, QUESTION, limits)
    texts, types, rows, _ = given.values()
    assert view.groups.shape == (4, 1, 2) and torch.equal(ids, texts[0]) and torch.equal(view.patches, rows)
    expected, _ = theirs.model.get_rope_index(texts, types, video_grid_thw=given["video_grid_thw"])
    text = view.start + view.tokens
    assert torch.equal(positions[:, :text], expected[:, 0, :text])
    assert (positions[:, text:] == expected[:, 0, text:] + 2).all()  # max(T, 1, 2) - max(1, 2)
    assert_close(model.logits(view, QUESTION), theirs(**given, position_ids=positions[:, None]).logits[0])
    model = EPVLM(model.checkpoint)
    model.ends = set()  # so that four tokens come
    tokens = torch.tensor(list(model.tokens(view, QUESTION, Sampling(4))))
    positions = torch.cat((positions, positions[:, -1:] + torch.arange(1, 4)), dim=1)
    given["input_ids"], given["mm_token_type_ids"] = torch.cat((texts, tokens[None, :3]), 1), F.pad(types, (0, 3))
    logits = theirs(**given, position_ids=positions[:, None]).logits[0]
    assert torch.equal(logits[len(ids) - 1 :].argmax(-1), tokens)


# Packing: the packed model is the dense model with what was dropped masked out of attention


EMPTIED = {  # masks by group of several moments, of which some keep nothing
    "first": torch.tensor([[[0, 0]], [[1, 0]], [[1, 1]]]).bool(),
    "middle": torch.tensor([[[1, 0]], [[0, 0]], [[0, 1]]]).bool(),
    "last": torch.tensor([[[1, 1], [0, 1]], [[0, 0], [0, 0]]]).bool(),
    "all but one group": torch.tensor([[[0, 0, 0]], [[0, 0, 1]], [[0, 0, 0]], [[0, 0, 0]]]).bool(),
}


def emptied(test):
    """Tries those besides what is drawn, of an even and of an odd clip."""
    for groups in EMPTIED.values():
        test = example(groups=groups, seed=0)(example(groups=groups, seed=1)(test))
    return test


def shown(mask: Tensor, side: int, seed=0) -> Clip:
    """Noise of the mask's size; with an odd seed the last frame is missing, and a single moment is a still image."""
    size, count = (side * mask.shape[2], side * mask.shape[1]), 2 * len(mask) - seed % 2
    return Clip([noise(*size, seed=seed)]) if count == 1 else film(count, *size, seed=seed)


def dense(model: EPVLM, clip: Clip) -> View:
    return model.look(clip, None, Options(min_pixels=784))  # one group is allowed


def view_of(model: EPVLM, clip: Clip, mask: Tensor, cell="group") -> View:
    """The view whose mask by cell is `mask`, by the public way: an event in each cell kept (of a still image, an event
    map), and the budget that fits them."""
    side, cells, kept = 28 if cell == "group" else 14, mask.numel(), int(mask.sum())
    if kept == cells:
        return dense(model, clip)
    t, row, column = mask.nonzero().T.numpy()
    if clip.times is None:
        events = mask[0].repeat_interleave(side, 0).repeat_interleave(side, 1).numpy()
    else:
        events = np.zeros(kept, XYTP)
        events["t"], events["x"], events["y"] = (clip.edges[t] + clip.edges[t + 1]) / 2, side * column, side * row
    options = Options((cells - kept - 0.5) / (cells - 1), cell, sensor=clip.size, min_pixels=784)
    view = model.look(clip, events, options)
    assert torch.equal(view.groups if cell == "group" else view.keep, mask)
    return view


def kept_of(view: View, ids: Tensor, groups: Tensor) -> Tensor:
    """Which of the dense prompt's tokens (L,) remain."""
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[ids == view.pad] = groups.flatten()
    return kept


@given(patch_masks(CLIP), st.integers(0, 99))
def test_packed_patches(checkpoint, keep, seed):
    """Eq. 7: those whose mask is True, moment after moment and group after group."""
    model, clip, wanted = checkpoint.model, shown(keep, 14, seed), []
    for n in range(keep.numel()):
        moment, place = divmod(n, keep[0].numel())
        group, within = divmod(place, 4)
        i, j = 2 * (group // (keep.shape[2] // 2)) + within // 2, 2 * (group % (keep.shape[2] // 2)) + within % 2
        wanted += [n] if keep[moment, i, j] else []
    packed = packed_patches(clip, keep, model.vit.config, model.image_config)
    assert torch.equal(packed, dense(model, clip).patches[wanted])


@emptied
@given(group_masks(st.integers(2, 6), CLIP), st.integers(0, 99))
def test_packed_vit(checkpoint, groups, seed):
    """Eq. 8 and 9: the visual tokens are those of the dense transformer, which attends within a moment, in which
    dropped patches are no keys."""
    _, theirs, model = checkpoint
    clip = shown(groups, 28, seed)
    view = view_of(model, clip, groups)
    assert len(view.patches) == 4 * groups.sum()
    with torch.inference_mode():
        expected = masked_vision(theirs, dense(model, clip).patches, view.keep)
        assert_close(model.vit(view.patches[None], view.keep)[0], expected)


@given(patch_masks(CLIP), st.integers(0, 99))
def test_broken_group(checkpoint, keep, seed):
    """Eq. 10 with the paper's 14-pixel cells: a group survives if any of its patches does, and what it lacks enters the
    merger as zeros in its own slot."""
    _, theirs, model = checkpoint
    clip = shown(keep, 14, seed)
    patches = packed_patches(clip, keep, model.vit.config, model.image_config)
    with torch.inference_mode():
        expected = masked_vision(theirs, dense(model, clip).patches, keep)
        assert_close(model.vit(patches[None], keep)[0], expected)


@given(patch_masks(CLIP).filter(lambda keep: keep.numel() > 4), st.integers(0, 1))
def test_patch_cells(checkpoint, keep, seed):
    """There is a token for each group of which a patch is kept."""
    model = checkpoint.model
    view = view_of(model, shown(keep, 14, seed), keep, cell="patch")
    for t, u, v in np.ndindex(*view.groups.shape):
        assert view.groups[t, u, v] == keep[t, 2 * u : 2 * u + 2, 2 * v : 2 * v + 2].any()
    assert len(view.patches) == keep.sum()
    ids, _ = model.prompt(view, QUESTION)
    assert (ids == view.pad).sum() == view.groups.sum()
    assert torch.isfinite(model.logits(view, QUESTION)).all()


@emptied
@given(group_masks(st.integers(2, 5), CLIP), st.integers(0, 99))
@settings(max_examples=25)
def test_packed_decoder(checkpoint, groups, seed):
    """Positions are the dense ones, packed; the logits are those of the dense decoder without the dropped keys."""
    _, theirs, model = checkpoint
    clip = shown(groups, 28, seed)
    view = view_of(model, clip, groups)
    (ids, positions), (dense_ids, dense_positions) = (
        model.prompt(each, QUESTION) for each in (view, dense(model, clip))
    )
    kept = kept_of(view, dense_ids, groups)
    assert torch.equal(positions, dense_positions[:, kept]) and torch.equal(ids, dense_ids[kept])  # as Eq. 8
    with torch.inference_mode():
        embeddings = model.llm.embed(dense_ids)
        embeddings[kept] = model.embed(view, ids)[0]
    expected = masked_decoder(theirs, embeddings.clone(), dense_positions, kept)
    assert_close(model.logits(view, QUESTION), expected)


@emptied
@given(group_masks(st.integers(2, 4), CLIP), st.integers(0, 1))
@settings(max_examples=15)
def test_dense_length(checkpoint, groups, seed):
    """Answer tokens stand after the DENSE image: so they do in transformers with dropped keys masked. The same of a
    view that was read."""
    _, theirs, model = checkpoint
    model = EPVLM(model.checkpoint)
    model.ends = set()  # so that four tokens come
    clip = shown(groups, 28, seed)
    view = view_of(model, clip, groups)
    (ids, _), (dense_ids, dense_positions) = (model.prompt(each, QUESTION) for each in (view, dense(model, clip)))
    tokens = torch.tensor(list(model.tokens(view, QUESTION, Sampling(4))))
    whole = torch.cat((dense_ids, tokens[:3]))
    kept = kept_of(view, whole, groups)
    delta = int(dense_positions.max()) + 1 - len(dense_ids)  # transformers' rope_delta of the DENSE prompt
    after = (torch.arange(3) + len(dense_ids) + delta).expand(3, -1)
    with torch.inference_mode():
        embeddings = model.llm.embed(whole)
        embeddings[kept] = torch.cat((model.embed(view, ids)[0], model.llm.embed(tokens[:3])))
    positions = torch.cat((dense_positions, after), dim=1)
    expected = masked_decoder(theirs, embeddings.clone(), positions, kept)[len(ids) - 1 :]
    for each in (view, model.read(view)):
        scores, same = scores_and_tokens(model, each, QUESTION)
        assert same == tokens.tolist() == expected.argmax(-1).tolist()
        assert_close(scores, expected)


def scene(frames: int, width: int, height: int) -> tuple[Image.Image | Clip, np.ndarray]:
    """An image and its event map; or, of several frames, a clip and a recording, in which most moments are still."""
    rng = np.random.default_rng(0)
    if frames == 1:
        return noise(width, height), rng.integers(0, 3, (height, width))
    events = np.zeros(500, XYTP)
    events["t"] = np.sort(rng.integers(0, 50_000, 500))
    events["x"], events["y"] = rng.integers(0, width, 500), rng.integers(0, height, 500)
    return film(frames, width, height), events


@pytest.mark.parametrize("cell", ["group", "patch"])
@pytest.mark.parametrize("rule", ["exact", "literal"])
@pytest.mark.parametrize("frames", [1, 5])
def test_sparsity_zero(checkpoint, cell, rule, frames):
    """Plain Qwen2-VL, bit for bit."""
    model, (seen, events) = checkpoint.model, scene(frames, 90, 120)
    plain, masked = model.look(seen), model.look(seen, events, Options(0, cell, rule))
    assert masked.keep.all() and masked.groups.all() and masked.S is not None
    assert torch.equal(model.logits(masked, QUESTION), model.logits(plain, QUESTION))
    some = Sampling(6)
    assert list(model.tokens(masked, QUESTION, some)) == list(model.tokens(plain, QUESTION, some))


@pytest.mark.parametrize("moments", [1, 3])
def test_dropped_are_never_computed(checkpoint, moments):
    """What enters the first and the last module is the kept patches and tokens, no more."""
    model, mask, seen = checkpoint.model, torch.zeros(moments, 5, 4, dtype=torch.bool), {}
    mask[0, 1, 2] = mask[-1, 4, 0] = True
    view = view_of(model, shown(mask, 28), mask)
    modules = {"embed": model.vit.patch_embed, "block": model.vit.blocks[-1], "merger": model.vit.merger.mlp,
               "layer": model.llm.model["layers"][-1]}  # fmt: skip
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].shape[1]}))
        for name, module in modules.items()
    ]
    L = len(model.logits(view, QUESTION))
    for hook in hooks:
        hook.remove()
    assert seen == {"embed": 8, "block": 8, "merger": 2, "layer": L}
    assert L == len(model.prompt(dense(model, shown(mask, 28)), QUESTION)[0]) - mask.numel() + 2


# Questions about a view that was read


def scores_and_tokens(model: EPVLM, view: View, question: str) -> tuple[Tensor, list[int]]:
    """Of the first four tokens of an answer."""
    scores = []
    hook = model.llm.register_forward_hook(lambda _, given, hidden: scores.append(model.llm.logits(hidden[0, -1])))
    tokens = list(model.tokens(view, question, Sampling(4)))
    hook.remove()
    return torch.stack(scores), tokens


@given(
    st.sampled_from([1, 4, 5]),
    SPARSITIES,
    st.sampled_from([None, "", "Be brief."]),
    st.lists(st.sampled_from(["", "Hi", QUESTION, "x" * 90]), min_size=1, max_size=3),
)
def test_read(checkpoint, frames, sparsity, system, questions):
    """Each question gets the scores and the tokens of a run of its own, and none writes to what was read."""
    model, (seen, events) = checkpoint.model, scene(frames, 112, 84)
    view = model.look(seen, events, Options(sparsity, system=system, min_pixels=3136))
    read = model.read(view)
    held, end = read.cache.held.clone(), int((model.prompt(view, "")[0] == view.pad).nonzero().max()) + 1
    for question in questions:
        (alone, tokens), (after, same) = (scores_and_tokens(model, each, question) for each in (view, read))
        assert_close(after, alone)
        assert same == tokens
    assert torch.equal(read.cache.held, held) and read.cache.filled == end and view.cache is None


def test_read_once(checkpoint):
    """The image is read once; then the text after it alone is."""
    model, calls, read = checkpoint.model, [], []
    hooks = [
        model.vit.register_forward_hook(lambda *_: calls.append(1)),
        model.llm.model["layers"][0].register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1])),
    ]
    view = model.read(model.look(noise(112, 84)))
    for question in (QUESTION, "The red circle moves.", "left of the small square?"):
        next(model.tokens(view, question, Sampling(1)))
        assert read[-1] == len(model.prompt(view, question)[0]) - view.cache.filled
    for hook in hooks:
        hook.remove()
    assert len(calls) == 1 and len(read) == 4


# FLOPs against a count of what the modules do, on the meta device


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


@given(visions(), patch_masks(CLIP))
def test_flops_of_vit(config, keep):
    """For whole and for broken groups; attention within each moment."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    patches, groups = int(keep.sum()), int(keep.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).any(4).any(2).sum())
    n_t = keep.sum(dim=(1, 2)).tolist()
    assert counted(lambda: model(torch.empty(1, patches, 1176), keep)) == sum(model.flops(n_t, groups))


@given(decoders(), st.integers(1, 40), st.data())
def test_flops_of_llm(config, tokens, data):
    scored = data.draw(st.integers(1, tokens))
    with torch.device("meta"):
        decoder = Decoder(config)

    def work():
        hidden = torch.empty(1, tokens, config.hidden_size)
        cache = data.draw(st.sampled_from([None, KVCache(config, tokens + 1, like=hidden)]))
        decoder.logits(decoder(hidden, torch.arange(tokens).expand(3, -1), cache, scored))

    assert counted(work) == sum(decoder.flops(tokens, scored))


@pytest.mark.parametrize("frames", [1, 5])
def test_flops(checkpoint, frames):
    """With half of 12 groups kept of each moment, or more of one than of another, and dense; only the last position is
    scored."""
    model, (seen, events) = checkpoint.model, scene(frames, 84, 112)
    half, whole = (model.look(seen, events, Options(sparsity, min_pixels=3136)) for sparsity in (0.5, 0.0))
    assert half.tokens == half.groups.numel() / 2 and (frames == 1 or half.groups.sum(dim=(1, 2)).unique().numel() > 1)
    assert model.flops(half, "What?")[1] == model.flops(whole, "What?")[0] == model.flops(whole, "What?")[1]
    for view in (half, whole):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            next(model.tokens(view, "What?", Sampling(1)))
        assert model.flops(view, "What?")[0] == counter.get_total_flops()


# The README


README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = [ROOT / folder / "README.md" for folder in (".", "examples", "tests")]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The cells of the table whose first column has that heading, row by row."""
    rows = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    return [row.strip("| ").split(" | ") for row in rows.splitlines()]


EQUATIONS = table("Eq.")


def cited(source: str) -> set[int]:
    """The equations a text cites: "Eq. 3", "Eq. 7 and 8", "Eq. 8, 9, 10", "Eq. 5 to 7"."""
    numbers = set()
    for listed in re.findall(r"Eq\. (\d+(?:(?:, | and | to )\d+)*)", source):
        numbers |= set(map(int, re.findall(r"\d+", listed)))
        for first, last in re.findall(r"(\d+) to (\d+)", listed):
            numbers |= set(range(int(first), int(last)))
    return numbers


def assert_test(file: str, name: str) -> None:
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file} has no {name}"


def test_equations():
    assert [row[0] for row in EQUATIONS] == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("row", EQUATIONS, ids=[f"eq{row[0]}" for row in EQUATIONS])
def test_equation(row):
    """The functions named for an equation exist and cite it, and so do the tests."""
    *_, places, tests = row
    assert re.fullmatch(r"(`\w+\.py`: `[\w.]+`(, `[\w.]+`)*(; |$))+", places), places
    for place in places.split("; "):
        file, *functions = re.findall(r"`([\w.]+)`", place)
        assert (ROOT / file).is_file()
        for function in functions:
            found = importlib.import_module(file.removesuffix(".py"))
            for part in function.split("."):
                found = getattr(found, part)
            assert int(row[0]) in cited(inspect.getsource(found)), f"{function} does not cite Eq. {row[0]}"
    for test in tests.split(", "):
        assert_test(*re.fullmatch(r"`(?:tests/)?(test_\w+\.py)::(test_\w+)`", test).groups())


@pytest.mark.parametrize("readme", READMES, ids=["root", "examples", "tests"])
def test_names(readme):
    """Tests, scripts and links that a README names exist."""
    text = readme.read_text(encoding="utf-8")
    for file, name in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", text):
        assert_test(file, name)
    for script in re.findall(r"python ((?:\w+/)*\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    for link, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", text):
        target = readme.parent / link if link else readme
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{link}#{anchor}"


def test_worked_example():
    """The lines after >>> give what stands below them."""
    (block,) = (block for block in BLOCKS if ">>> " in block)
    example = doctest.DocTestParser().get_doctest(block, {}, "README", "README.md", 0)
    assert {5, 6, 7, 8} <= cited(block) and len(example.examples) > 10
    printed = []
    failed, tried = doctest.DocTestRunner().run(example, out=printed.append)
    assert (failed, tried) == (0, len(example.examples)), "".join(printed)


def test_python(tmp_path, monkeypatch, capsys):
    """The other lines of Python run, and print what stands beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names, promised = {}, []
    for block in BLOCKS:
        if ">>> " not in block:
            exec(block, names)
            promised += re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    out = capsys.readouterr().out.splitlines()
    assert promised and set(promised) <= set(out)
    assert "red" in out and "yellow" in out


def test_pickles(tmp_path, monkeypatch):
    """The line that converts a pickled dict keeps the events."""
    monkeypatch.chdir(tmp_path)
    t, x, y, p = rows = np.array([[1000, 2000, 4000], [5, 3, 300], [7, 8, 9], [1, 0, 1]])
    np.save("pickled.npy", {"x": x, "y": y, "t": t, "p": p}, allow_pickle=True)
    (command,) = re.findall(r'python -c "(.*)"', README)
    exec(command, {})
    events = read_events("events.npz")
    assert np.array_equal(np.stack((events.t, events.x, events.y, events.p)), rows)


def lens(x, y):
    """Where a lens that bends puts a point of the straightened picture, in pixels of a camera of 160 x 120."""
    u, v = (x - 80) / 100, (y - 60) / 100
    bent = 1 - 0.1 * (u * u + v * v)
    return 80 + 100 * u * bent + 1.5, 60 + 100 * v * bent - 1


def dsec(folder: Path) -> np.ndarray:
    """A small sequence as DSEC lays it out, of something that moves in four places between frames 16 and 17, and
    elsewhere before and after. Returns the events of that time where they belong in the image: (n, 2) pixels."""
    import h5py
    import yaml

    rng = np.random.default_rng(17)
    turn = np.linalg.qr(np.array([[1, -0.02, 0.08], [0.02, 1, 0.05], [-0.08, -0.05, 1]]))[0]
    turn *= np.sign(np.diag(turn))
    cameras = {"camRect0": (100, 160, 120, 80, 60), "camRect1": (300, 360, 270, 182, 133)}
    K_event, K = (np.array([[f, 0, x], [0, f, y], [0, 0, 1]]) for f, _, _, x, y in cameras.values())
    intrinsics = {
        name: {"camera_matrix": [f, f, x, y], "resolution": [w, h]} for name, (f, w, h, x, y) in cameras.items()
    }
    extrinsics = {"T_10": np.pad(turn, (0, 1)).tolist(), **{f"R_rect{n}": np.eye(3).tolist() for n in range(2)}}
    (folder / "cam_to_cam.yaml").write_text(yaml.safe_dump({"intrinsics": intrinsics, "extrinsics": extrinsics}))
    centres = np.array([(100, 80), (250, 60), (150, 200), (280, 210)])
    true = (centres[rng.integers(0, 4, 40_000)] + rng.normal(0, 14, (40_000, 2))).clip(0, (359, 269))
    x, y, w = np.linalg.inv(K @ turn @ np.linalg.inv(K_event)) @ np.vstack([true.T, np.ones(len(true))])
    seen = np.rint(lens(x / w, y / w)).T
    inside = ((seen >= 0) & (seen <= (159, 119))).all(axis=1)
    true, seen = true[inside], seen[inside]
    straight = raw = np.stack(np.meshgrid(np.arange(160.0), np.arange(120.0)), axis=-1)
    for _ in range(50):  # the map undoes the lens
        straight = straight + raw - np.stack(lens(*np.moveaxis(straight, -1, 0)), axis=-1)
    with h5py.File(folder / "rectify_map.h5", "w") as file:
        file["rectify_map"] = straight.astype("f4")
    clock, elsewhere = 49_599_300_523, rng.integers((70, 0), (90, 120), (90_000, 2))  # microseconds, of frame 0
    when = ((0, 16 * 50_000, 45_000), (17 * 50_000 + 1, 10**6, 45_000), (16 * 50_000, 17 * 50_000, len(seen)))
    t = clock + np.concatenate([rng.integers(*each) for each in when])
    order, places = np.argsort(t, kind="stable"), np.concatenate([elsewhere, seen])
    with h5py.File(folder / "events.h5", "w") as file:
        file["t_offset"] = np.int64(clock - 12)
        columns = zip("xytp", (*places.T.astype("u2"), (t - clock + 12).astype("u4"), t % 2), strict=True)
        for name, column in columns:
            file[f"events/{name}"] = column[order]
    (folder / "timestamps.txt").write_text("".join(f"{clock + 50_000 * n}\n" for n in range(20)))
    Image.fromarray(rng.integers(0, 256, (270, 360, 3), dtype=np.uint8)).save(folder / "000017.png")
    return true


def test_dsec(tmp_path, monkeypatch, capsys):
    """From a folder as DSEC has it, by the README's two commands: nearly all cells kept are those that events which
    were aligned from the start keep."""
    convert = pytest.importorskip("convert")
    for package in ("h5py", "hdf5plugin", "yaml"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    true, views, look = dsec(tmp_path), [], EPVLM.look
    converting, asking = re.search(
        r"python examples/convert\.py (.*rectify.*)\n    python epvlm\.py (.*)", README
    ).groups()
    assert convert.main(shlex.split(converting)) == 0
    monkeypatch.setattr(EPVLM, "look", lambda *given: views.append(look(*given)) or views[-1])
    tiny = ["--model", str(ROOT / "examples" / "tiny"), "--device", "cpu"]
    assert main([*shlex.split(asking), "--sparsity", "0.7", *tiny]) == 0, capsys.readouterr().err
    x, y = np.rint(true).astype(int).T
    aligned = Events(x, y, np.zeros(len(x)), np.ones(len(x), int))
    model = EPVLM.from_pretrained(ROOT / "examples" / "tiny", device="cpu")
    expected = model.look("000017.png", aligned, Options(sparsity=0.7, time_unit="us"))
    both = (views[0].groups & expected.groups).sum() / expected.tokens
    assert views[0].tokens == expected.tokens and both >= 0.95
    whole, _, frame = converting.partition(" --frame ")  # all times, or a sensor of another size: much is wrong
    assert convert.main([*shlex.split(whole), "-o", "whole.npy"]) == 0
    assert convert.main(["events.h5", "-o", "raw.npy", "--frame", frame.split()[0]]) == 0
    for events, options in (("raw.npy", Options(0.7, sensor=(160, 120))), ("whole.npy", Options(0.7))):
        wrong = model.look("000017.png", events, options)
        assert (wrong.groups & expected.groups).sum() / expected.tokens < 0.8


@pytest.mark.parametrize("number, kept", [(0, "2110 events in 38.7 ms, "), (1, "4 frames at their own times, ")])
def test_commands(monkeypatch, capsys, number, kept):
    """The commands about the scene and the clip answer as the README says, the first for as many FLOPs."""
    monkeypatch.chdir(ROOT)
    command = re.findall(r"python epvlm\.py (.*--model examples/tiny.*)", README)[number]
    assert main([*shlex.split(command), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert f"This prints `{out.strip()}`" in README and kept in err
    assert number or f"    {err.splitlines()[0]}\n" in README


def test_picture():
    """What is said of it."""
    model = EPVLM.from_pretrained(ROOT / "examples" / "tiny", device="cpu")
    view = model.look(ROOT / "examples" / "scene.png", ROOT / "examples" / "events.npy")
    moving, kept = view.S > 0, view.groups.numpy()
    assert (moving.sum(), kept.sum(), moving.size) == (13, 32, 64) and kept[moving].all()
    assert re.search(r"Of\s+the\s+image's\s+64\s+cells,\s+thirteen\s+have\s+events;\s+the\s+other\s+19\b", README)


def test_options(capsys):
    """The table has each flag once, and the fields of Options and Sampling with their defaults and choices."""
    rows = {re.fullmatch(r"`--([a-z-]+)`", flag)[1].replace("-", "_"): (*cells,) for flag, *cells in table("option")}
    assert len(rows) == len(table("option"))
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(rows) == {flag.replace("-", "_") for flag in flags}
    for field in (*fields(Options), *fields(Sampling)):
        meaning, default = rows[field.name]
        assert default if field.default is None else default.strip("`") == str(field.default), field.name
        choices = () if "metavar" in field.metadata else field.metadata.get("choices", ())  # 24 orders would be many
        assert all(f"`{choice}`" in meaning for choice in choices), field.name
