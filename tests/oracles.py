"""Slow and obvious: the DENSE model of transformers in which dropped tokens are masked out of attention as keys."""

import math

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-4 of the largest magnitude."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def group_rows(grid: Tensor) -> Tensor:
    """(T, grid_h, grid_w) to the order of the patches, (T, grid_h/2, grid_w/2, 2, 2), by loops: (N,)."""
    rows = []
    for moment in grid:
        for gi in range(0, grid.shape[1], 2):
            for gj in range(0, grid.shape[2], 2):
                rows += [moment[gi + i, gj + j] for i in range(2) for j in range(2)]
    return torch.stack(rows)


def coordinates(T: int, grid_h: int, grid_w: int) -> Tensor:
    """Row and column of every patch, in the order of the patches: (N, 2)."""
    i = torch.arange(grid_h)[:, None].expand(T, grid_h, grid_w)
    j = torch.arange(grid_w)[None, :].expand(T, grid_h, grid_w)
    return torch.stack((group_rows(i), group_rows(j)), dim=1)


@torch.no_grad()
def masked_vision(theirs, patches: Tensor, keep: Tensor) -> Tensor:
    """Visual tokens of the surviving groups. patches (N, 1176) dense; keep (1, grid_h, grid_w) bool."""
    visual, rows = theirs.model.visual, group_rows(keep)
    z = visual.patch_embed(patches)
    cos, sin = visual.rotary_pos_emb(z, coordinates(*keep.shape))
    for block in visual.blocks:
        q, k, v = block.attn.qkv(block.norm1(z)).view(len(z), 3, block.attn.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
        scores[:, :, ~rows] = -math.inf  # dropped patches are no keys
        out = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)
        z = z + block.attn.proj(out.flatten(1))
        z = z + block.mlp(block.norm2(z))
    tokens = visual.merger(z * rows[:, None])  # what a broken group lacks is zero
    return tokens[rows.view(-1, 4).any(1)]


@torch.no_grad()
def masked_decoder(theirs, embeddings: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
    """Logits (L kept, vocab) of the dense sequence. embeddings (L, hidden), positions (3, L), keep (L,) bool."""
    length = len(embeddings)
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & keep[None, :]
    allowed |= torch.eye(length, dtype=torch.bool)  # a dropped query sees itself: softmax of nothing is 0 / 0
    mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, -math.inf)
    hidden = theirs.model.language_model(
        inputs_embeds=embeddings[None], position_ids=positions[:, None], attention_mask=mask, use_cache=False
    ).last_hidden_state
    return theirs.lm_head(hidden)[0, keep]
