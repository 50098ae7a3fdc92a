"""Position-preserving packing: the packed model is the dense model with what was dropped masked out of attention."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llm import KVCache, mrope_positions
from oracles import assert_close, masked_decoder, masked_vision
from strategies import group_masks, patch_masks
from vit import packed_patches

QUESTION = "What is moving?"


def image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def event_map_of(keep: torch.Tensor, cell: int) -> np.ndarray:
    """A map at the input's size with motion where `keep` is True, and none elsewhere."""
    return keep.repeat_interleave(cell, 0).repeat_interleave(cell, 1).numpy().astype(np.int64)


def prompt_for(ours, picture, keep: torch.Tensor, cell="group"):
    """A prompt that keeps just `keep`, by way of the public pipeline: an event map and the budget that fits it."""
    dropped = keep.numel() - int(keep.sum())
    side = 28 if cell == "group" else 14
    if not dropped:
        return dense_prompt(ours, picture)
    sparsity = (dropped - 0.5) / (keep.numel() - 1)
    prompt = ours.prompt(picture, event_map_of(keep, side), QUESTION, sparsity=sparsity, cell=cell, min_pixels=784)
    assert torch.equal(prompt.keep if cell == "group" else prompt.keep_patches, keep)
    return prompt


def dense_prompt(ours, picture):
    return ours.prompt(picture, None, QUESTION, min_pixels=784)  # one group is allowed


@given(patch_masks(), st.integers(0, 99))
def test_the_packed_patches_are_the_dense_ones(checkpoint, keep, seed):
    """Eq. 7: those whose mask is True, group after group."""
    ours, picture = checkpoint[2], image(14 * keep.shape[0], 14 * keep.shape[1], seed)
    dense, wanted = dense_prompt(ours, picture).patches, []
    for n in range(keep.numel()):
        group, within = divmod(n, 4)
        i, j = 2 * (group // (keep.shape[1] // 2)) + within // 2, 2 * (group % (keep.shape[1] // 2)) + within % 2
        wanted += [n] if keep[i, j] else []
    assert torch.equal(packed_patches(picture, keep, ours.vit.config, ours.image_config), dense[wanted])


@given(group_masks(st.integers(2, 6)), st.integers(0, 99))
def test_packed_vit_equals_dense_vit_with_dropped_keys_masked(checkpoint, keep, seed):
    _, theirs, ours = checkpoint
    picture = image(28 * keep.shape[0], 28 * keep.shape[1], seed)
    prompt, dense = prompt_for(ours, picture, keep), dense_prompt(ours, picture)
    assert len(prompt.patches) == 4 * keep.sum()
    with torch.inference_mode():
        assert_close(
            ours.vit(prompt.patches[None], prompt.keep_patches)[0],
            masked_vision(theirs, dense.patches, prompt.keep_patches),
        )


@given(patch_masks(), st.integers(0, 99))
def test_a_broken_group_enters_the_merger_with_zeros_in_the_missing_slots(checkpoint, keep, seed):
    """The paper's literal mask, 14 pixels a cell: a group survives if any of its patches does."""
    _, theirs, ours = checkpoint
    picture = image(14 * keep.shape[0], 14 * keep.shape[1], seed)
    dense = dense_prompt(ours, picture)
    patches = packed_patches(picture, keep, ours.vit.config, ours.image_config)
    with torch.inference_mode():
        assert_close(ours.vit(patches[None], keep)[0], masked_vision(theirs, dense.patches, keep))


@given(patch_masks().filter(lambda keep: keep.numel() > 4))
def test_patch_cells_keep_a_token_for_every_surviving_group(checkpoint, keep):
    _, _, ours = checkpoint
    prompt = prompt_for(ours, image(14 * keep.shape[0], 14 * keep.shape[1]), keep, cell="patch")
    for u, v in np.ndindex(*prompt.keep.shape):
        assert prompt.keep[u, v] == keep[2 * u : 2 * u + 2, 2 * v : 2 * v + 2].any()
    assert len(prompt.patches) == keep.sum()
    assert prompt.input_ids.eq(ours.special["image_pad"]).sum() == prompt.keep.sum()
    assert torch.isfinite(ours.logits(prompt)).all()


@given(group_masks(st.integers(2, 5)), st.integers(0, 99))
@settings(max_examples=25)
def test_packed_decoder_equals_dense_decoder_with_dropped_keys_masked(checkpoint, keep, seed):
    _, theirs, ours = checkpoint
    picture = image(28 * keep.shape[0], 28 * keep.shape[1], seed)
    prompt, dense = prompt_for(ours, picture, keep), dense_prompt(ours, picture)
    kept = torch.ones(len(dense.input_ids), dtype=torch.bool)
    kept[dense.image_start : dense.image_start + keep.numel()] = keep.flatten()
    assert torch.equal(prompt.position_ids, dense.position_ids[:, kept])  # as Eq. 8
    assert torch.equal(prompt.input_ids, dense.input_ids[kept])
    with torch.inference_mode():
        embeddings = ours.llm.embed(dense.input_ids)
        embeddings[kept] = ours._embed(prompt)[0]
    assert_close(ours.logits(prompt), masked_decoder(theirs, embeddings.clone(), dense.position_ids, kept))


@pytest.mark.parametrize("cell", ["group", "patch"])
@pytest.mark.parametrize("ties", ["exact", "literal"])
def test_sparsity_zero_is_plain_qwen2_vl_bit_for_bit(checkpoint, cell, ties):
    _, _, ours = checkpoint
    events = np.random.default_rng(0).integers(0, 9, (90, 120))
    plain = ours.prompt(image(90, 120), None, QUESTION)
    masked = ours.prompt(image(90, 120), events, QUESTION, sparsity=0, cell=cell, ties=ties)
    assert masked.keep.all()
    assert torch.equal(ours.logits(masked), ours.logits(plain))
    assert list(ours.tokens(masked, 6)) == list(ours.tokens(plain, 6))


@given(group_masks(st.integers(2, 4)), st.integers(1, 6), st.integers(1, 7))
@settings(max_examples=25)
def test_cached_decoding_equals_the_full_forward(checkpoint, keep, steps, split):
    """Step by step after packing; and with the prompt itself read in two parts."""
    _, _, ours = checkpoint
    prompt = prompt_for(ours, image(28 * keep.shape[0], 28 * keep.shape[1]), keep)
    tokens = list(ours.tokens(prompt, steps))
    with torch.inference_mode():
        start = ours._embed(prompt)
        whole = torch.cat((start, ours.llm.embed(torch.tensor([tokens]))), dim=1)
        after = prompt.position_ids[:, -1:] + 1 + torch.arange(len(tokens))
        positions = torch.cat((prompt.position_ids, after), dim=1)
        full = ours.llm.logits(ours.llm(whole, positions))[0]
        cache, parts = KVCache(ours.llm.config, whole.shape[1], like=whole), []
        for low, high in [
            (0, split),
            (split, start.shape[1]),
            *((n, n + 1) for n in range(start.shape[1], whole.shape[1])),
        ]:
            parts.append(ours.llm.logits(ours.llm(whole[:, low:high], positions[:, low:high], cache))[0])
    assert_close(torch.cat(parts), full)
    assert full[start.shape[1] - 1 : -1].argmax(-1).tolist() == tokens


@given(group_masks(st.integers(2, 4)))
@settings(max_examples=15)
def test_decoding_goes_on_from_the_dense_length(checkpoint, keep):
    """Answer tokens stand after the dense image: masking keys in transformers, at dense positions, gives them too."""
    _, theirs, ours = checkpoint
    picture = image(28 * keep.shape[0], 28 * keep.shape[1])
    prompt, dense = prompt_for(ours, picture, keep), dense_prompt(ours, picture)
    endless = copy.copy(ours)
    endless.stop = set()  # an end token is as good as any other here
    tokens = list(endless.tokens(prompt, 4))
    kept = torch.ones(len(dense.input_ids) + 3, dtype=torch.bool)
    kept[dense.image_start : dense.image_start + keep.numel()] = keep.flatten()
    delta = int(dense.position_ids.max()) + 1 - len(dense.input_ids)  # transformers' rope_delta of the DENSE prompt
    after = (torch.arange(3) + len(dense.input_ids) + delta).expand(3, -1)
    positions = torch.cat((dense.position_ids, after), dim=1)
    with torch.inference_mode():
        embeddings = ours.llm.embed(torch.cat((dense.input_ids, torch.tensor(tokens[:3]))))
        embeddings[kept] = torch.cat((ours._embed(prompt)[0], ours.llm.embed(torch.tensor(tokens[:3]))))
    logits = masked_decoder(theirs, embeddings.clone(), positions, kept)
    assert logits[len(prompt.input_ids) - 1 :].argmax(-1).tolist() == tokens


@given(st.integers(1, 5), group_masks(st.integers(1, 9)), st.integers(1, 5))
def test_dropping_moves_no_other_token(before, keep, after):
    """Text after the image stands at c + max(groups_h, groups_w), tall images too, whatever was dropped."""
    positions = mrope_positions(before, keep, after)
    assert positions.shape == (3, before + int(keep.sum()) + after)
    assert positions[:, :before].tolist() == [list(range(before))] * 3
    text = before + max(keep.shape)
    assert positions[:, -after:].tolist() == [list(range(text, text + after))] * 3
    places = [(before, before + row, before + column) for row, column in np.argwhere(keep.numpy())]
    assert [tuple(p) for p in positions[:, before:-after].T.tolist()] == places


def test_mrope_example():
    positions = mrope_positions(1, torch.tensor([[True, False, True]]), 2)
    assert positions.tolist() == [[0, 1, 1, 4, 5], [0, 1, 1, 4, 5], [0, 1, 3, 4, 5]]


def test_dropped_patches_are_never_computed(checkpoint):
    """What enters the first and the last module is the kept patches and tokens, no more."""
    _, _, ours = checkpoint
    keep = torch.zeros(5, 4, dtype=torch.bool)
    keep[1, 2] = keep[4, 0] = True
    prompt, seen = prompt_for(ours, image(140, 112), keep), {}
    modules = {"embed": ours.vit.patch_embed, "block": ours.vit.blocks[-1], "merger": ours.vit.merger.mlp,
               "layer": ours.llm.model["layers"][-1]}  # fmt: skip
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].shape[1]}))
        for name, module in modules.items()
    ]
    ours.logits(prompt)
    for hook in hooks:
        hook.remove()
    assert seen == {"embed": 8, "block": 8, "merger": 2, "layer": len(prompt.input_ids)}
    assert len(prompt.input_ids) == len(ours.prompt(image(140, 112), None, QUESTION).input_ids) - 18
