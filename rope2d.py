"""Where a patch stands: Pack, which drops patches without moving the others, and the 2D rotary embedding.

Equations: Pack of 7 and 8; 2, as the paper prints it and as the weights were trained.

Glossary
    T                moments of the input, 1 for a still image; each shows two frames (a still image shows one twice)
    grid_h, grid_w   patches of a moment, down and across; both even
    N, N'            patches of the dense input, T * grid_h * grid_w, and patches kept
    i, j             row and column of a patch in that grid
    d                head_dim, values of one attention head (80 in the published models)
    angles           (N, d/2) float32, the paper's P^2D and R^2D: one angle for each rotated pair of dimensions
    keep             (T, grid_h, grid_w) bool, the paper's M_v^E by patch: True keeps, False drops

What differs from plain Qwen2-VL: only `pack`. The paper's Eq. 2 pairs neighbouring dimensions (interleaved) and counts
frequencies from m = 1; the weights pair dimension k with k + d/2 (half-split) and count from 0. The program runs the
second. `rotation_matrix` is the first; the tests show that both are one rotation, up to `pairing` and the frequencies.
"""

import torch
from torch import Tensor


def pack(rows: Tensor, flat: Tensor) -> Tensor:
    """Pack(rows, M) of Eq. 7 and 8: the rows whose mask is True, in order. rows (N, ...) of any dtype; flat (N,) bool,
    `keep` in `group_order`. Returns (N', ...), a copy. Example: pack([a, b, c, d], [1, 0, 0, 1]) = [a, d]."""
    if flat.dtype != torch.bool or flat.shape != rows.shape[:1]:  # whole numbers would pick rows by index
        raise ValueError(f"the mask is {flat.dtype} {tuple(flat.shape)}; {len(rows)} rows need as many bools")
    return rows[flat]


def group_order(grid: Tensor, merge: int = 2) -> Tensor:
    """Lays a grid out in the order the checkpoint expects patches: group after group, merge x merge patches in each.
    grid (T, grid_h, grid_w, ...), sides divisible by `merge`. Returns (T * grid_h * grid_w, ...).
    Example, merge 2: [[[a, b, c, d], [e, f, g, h]]] becomes [a, b, e, f, c, d, g, h]."""
    groups = grid.unflatten(2, (-1, merge)).unflatten(1, (-1, merge))  # (T, groups_h, merge, groups_w, merge, ...)
    return groups.transpose(2, 3).flatten(0, 4)


def rope_2d(shape: tuple[int, int, int], head_dim: int, theta: float = 10000.0, merge: int = 2) -> Tensor:
    """The angles of Eq. 2 for every patch of the dense grid, as the weights need them (half-split pairing).
    shape: (T, grid_h, grid_w). Returns (N, d/2) float32 in group order: first d/4 angles i * theta^(-4n/d), n from 0,
    then as many j * theta^(-4n/d). Source: Qwen2VLVisionRotaryEmbedding in transformers' modeling_qwen2_vl.py."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2))  # (d/4,)
    _, i, j = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    positions = group_order(torch.stack((i, j), dim=-1), merge)  # (N, 2)
    return (positions[:, :, None] * frequencies).flatten(1)  # (N, d/2)


def cos_sin(angles: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of angles (..., N, d/2), computed in float32, as (..., N, 1, d/2): one pair for all heads."""
    return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys as Eq. 2 does, with half-split pairing: dimension k turns together with k + d/2.
    x (..., N, heads, d); cos, sin (..., N, 1, d/2). The product is taken in the wider of the two dtypes (float32 in the
    vision transformer, the model's own in the decoder, as in Qwen2-VL) and returned in x's."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).split(half, dim=-1)
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out


# The rest is Eq. 2 as printed. Nothing above calls it; the tests hold the two against each other.


def rotation_matrix(i: int, j: int, head_dim: int, frequencies: Tensor | None = None) -> Tensor:
    """R^2D_(i,j) of Eq. 2 (interleaved pairing): d/4 blocks of 4 x 4, two dimensions turned by i, the next two by j.
    frequencies (d/4,), the paper's theta_m = 10000^(-2m/d), m = 1 ... d/4, unless given. Returns (d, d) float64."""
    if frequencies is None:
        frequencies = 10000.0 ** (-2 * torch.arange(1, head_dim // 4 + 1, dtype=torch.float64) / head_dim)
    angles = torch.outer(frequencies.double(), torch.tensor([i, j], dtype=torch.float64)).flatten()  # i, j, i, j, ...
    cos, sin = angles.cos(), angles.sin()
    return torch.block_diag(*torch.stack((cos, -sin, sin, cos), dim=1).view(-1, 2, 2))  # Eq. 2


def pairing(head_dim: int) -> Tensor:
    """The permutation between the pairings: x[pairing(d)] has the dimensions of a half-split x in Eq. 2's order.
    Example, d = 8: [0, 4, 2, 6, 1, 5, 3, 7]; block 0 holds pair (0, 4), turned by i, and pair (2, 6), turned by j."""
    m = torch.arange(head_dim // 4)
    return torch.stack((m, m + head_dim // 2, m + head_dim // 4, m + 3 * head_dim // 4), dim=1).flatten()
