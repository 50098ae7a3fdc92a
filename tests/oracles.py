"""Slow and obvious: the rows of a clip, one by one; the DENSE model of transformers in which dropped tokens are masked
out of attention as keys; and, by loops, what `events.py` does beyond the paper."""

import itertools
import math
import statistics

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from events import spread_order
from vit import ImageConfig


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """To 1e-4 of the largest magnitude."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def clip_rows(frames: list[Image.Image], height: int, width: int, config: ImageConfig) -> Tensor:
    """The rows of RGB frames, (N, 1176), as Qwen2VLVideoProcessor makes them of (height, width) pixels: two frames a
    moment, the last of an odd clip twice; colour before frame. (That itself needs torchvision.)"""
    frames = [*frames, frames[-1]] if len(frames) % 2 else frames
    levels = torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in frames])  # (F, 3, H, W)
    levels = F.interpolate(levels, (height, width), mode="bicubic", antialias=True).float()
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
    levels, rows = (levels - mean) / std, []
    for moment, top, left, i, j in np.ndindex(len(frames) // 2, height // 28, width // 28, 2, 2):
        y, x = 28 * top + 14 * i, 28 * left + 14 * j
        first, second = levels[2 * moment : 2 * moment + 2, :, y : y + 14, x : x + 14]
        rows.append(torch.stack([part[colour] for colour in range(3) for part in (first, second)]).flatten())
    return torch.stack(rows)


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
    """Visual tokens of the surviving groups. patches (N, 1176) dense; keep (T, grid_h, grid_w) bool."""
    visual, rows = theirs.model.visual, group_rows(keep)
    moment = group_rows(torch.arange(len(keep))[:, None, None].expand(keep.shape))
    seen = (moment[:, None] == moment[None, :]) & rows[None, :]  # dropped patches are no keys, nor other moments
    seen |= torch.eye(len(rows), dtype=torch.bool)  # a dropped query sees itself: softmax of nothing is 0 / 0
    z = visual.patch_embed(patches)
    cos, sin = visual.rotary_pos_emb(z, coordinates(*keep.shape))
    for block in visual.blocks:
        q, k, v = block.attn.qkv(block.norm1(z)).view(len(z), 3, block.attn.num_heads, -1).unbind(1)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
        scores[:, ~seen] = -math.inf
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
    allowed |= torch.eye(length, dtype=torch.bool)  # as above
    mask = torch.zeros(1, 1, length, length).masked_fill(~allowed, -math.inf)
    hidden = theirs.model.language_model(
        inputs_embeds=embeddings[None], position_ids=positions[:, None], attention_mask=mask, use_cache=False
    ).last_hidden_state
    return theirs.lm_head(hidden)[0, keep]


def cover(w: np.ndarray, keep: int) -> np.ndarray:
    """The mask of the rule that covers, by every pair of cells. w (T, cells_h, cells_w); returns bool, `keep` True."""
    cells, rank, kept = list(np.ndindex(w.shape)), spread_order(*w.shape), []
    u = {cell: float(w[cell]) for cell in cells}
    k = {(a, b): math.exp(-(math.dist(a, b) ** 2) / 2) if b[0] >= a[0] else 0 for a in cells for b in cells}

    def explains(a) -> float:
        """What is unexplained around a; the last term decides between equals."""
        return sum(u[b] * k[a, b] for b in cells) - 1e-9 * (w.max() or 1) * rank[a] / w.size

    for _ in range(keep):
        kept.append(max((cell for cell in cells if cell not in kept), key=explains))
        u = {cell: u[cell] * (1 - k[kept[-1], cell]) for cell in cells}
    mask = np.zeros(w.shape, dtype=bool)
    for cell in kept:
        mask[cell] = True
    return mask


def novelty(X_v: np.ndarray, side: int) -> np.ndarray:
    """G, cell by cell: the smallest of its differences from the cells to the left, above, and in the moment before. X_v
    (T, H, W, 3), a frame of each moment."""
    X_v, grey = X_v.astype(int), np.full((side, side, 3), 128)
    G = np.zeros((len(X_v), X_v.shape[1] // side, X_v.shape[2] // side), dtype=int)

    def cell(t, row, column):
        inside = row >= 0 and column >= 0
        return X_v[t, row * side : (row + 1) * side, column * side : (column + 1) * side] if inside else grey

    for t, row, column in np.ndindex(G.shape):
        others = [cell(t, row, column - 1), cell(t, row - 1, column), *([cell(t - 1, row, column)] if t else [])]
        G[t, row, column] = min(abs(cell(t, row, column) - other).sum() for other in others)
    return G


def mend(E_v: np.ndarray) -> list[list[float]]:
    """E_v, pixel by pixel: what is over 10 times the median of the active ones has at most its largest neighbour's
    count, and its own sign."""
    rows = E_v.tolist()
    active = [abs(value) for row in rows for value in row if value]

    def neighbours(y, x):
        places = itertools.product(range(max(y - 1, 0), y + 2), range(max(x - 1, 0), x + 2))
        inside = [(v, u) for v, u in places if (v, u) != (y, x) and v < len(rows) and u < len(rows[0])]
        return [abs(rows[v][u]) for v, u in inside] or [0]

    def mended(y, x):
        value = rows[y][x]
        if not value or abs(value) <= 10 * statistics.median(active):
            return value
        return math.copysign(min(abs(value), max(neighbours(y, x))), value)

    return [[mended(y, x) for x in range(len(rows[0]))] for y in range(len(rows))]
