"""Eq. 2 and Pack: rotations, positions, and the order patches come in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import coordinates, group_rows
from rope2d import cos_sin, group_order, pack, pairing, rope_2d, rotate, rotation_matrix
from strategies import patch_masks

HEAD_DIMS = st.sampled_from([4, 8, 16, 80])
PLACES = st.integers(-60, 60)


@given(PLACES, PLACES, HEAD_DIMS)
def test_eq2_is_an_orthogonal_block_diagonal_rotation(i, j, d):
    R = rotation_matrix(i, j, d)
    torch.testing.assert_close(R @ R.T, torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(torch.det(R), torch.tensor(1.0, dtype=torch.float64))
    blocks = torch.block_diag(*[torch.ones(2, 2)] * (d // 2)).bool()
    assert not R[~blocks].any()
    for m in range(1, d // 4 + 1):  # the paper's own indices
        theta = 10000 ** (-2 * m / d)
        for place, at in ((i, 4 * m - 4), (j, 4 * m - 2)):
            angle = torch.tensor(place * theta, dtype=torch.float64)
            expected = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(2, 2)
            torch.testing.assert_close(R[at : at + 2, at : at + 2], expected)


@given(PLACES, PLACES, PLACES, PLACES, PLACES, PLACES, HEAD_DIMS)
def test_eq2_depends_on_relative_positions_only(i, j, k, m, di, dj, d):
    """q at (i, j) and k at (k, m) score the same after both move by (di, dj)."""
    here = rotation_matrix(i, j, d).T @ rotation_matrix(k, m, d)
    there = rotation_matrix(i + di, j + dj, d).T @ rotation_matrix(k + di, m + dj, d)
    torch.testing.assert_close(here, there)
    torch.testing.assert_close(here, rotation_matrix(k - i, m - j, d))


@given(st.integers(1, 12), st.integers(1, 12), HEAD_DIMS, st.integers(0, 2**31))
def test_eq2_equals_the_half_split_form_up_to_permutation_and_frequencies(groups_h, groups_w, d, seed):
    grid_h, grid_w = 2 * groups_h, 2 * groups_w
    x = torch.randn(grid_h * grid_w, 1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = rotate(x, *cos_sin(rope_2d(grid_h, grid_w, d), torch.float64))
    frequencies = 10000.0 ** (-4 * torch.arange(d // 4, dtype=torch.float64) / d)  # the weights' schedule
    assert sorted(pairing(d).tolist()) == list(range(d))
    printed = 10000.0 ** (-2 * torch.arange(1, d // 4 + 1, dtype=torch.float64) / d)  # Eq. 2's own, m from 1
    torch.testing.assert_close(rotation_matrix(3, 5, d), rotation_matrix(3, 5, d, printed))
    for n in {0, grid_h * grid_w - 1, seed % (grid_h * grid_w)}:
        i, j = coordinates(grid_h, grid_w)[n].tolist()
        expected = rotation_matrix(i, j, d, frequencies) @ x[n, 0, pairing(d)]
        torch.testing.assert_close(turned[n, 0, pairing(d)], expected, atol=1e-5, rtol=0)


def test_pairing_example():
    assert pairing(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


@given(patch_masks(), HEAD_DIMS)
def test_packed_positions_are_the_dense_ones(keep, d):
    """Eq. 8: row n of Pack(R) is R at the place of the n-th kept patch, not at n."""
    angles, rows = rope_2d(*keep.shape, d), group_rows(keep)
    packed = pack(angles, rows)
    places = coordinates(*keep.shape)[rows]
    assert len(packed) == keep.sum()
    for angle, (i, j) in zip(packed, places.tolist(), strict=True):
        frequencies = 1.0 / 10000.0 ** (torch.arange(0, d // 2, 2).float() / (d // 2))
        assert torch.equal(angle, torch.cat((i * frequencies, j * frequencies)))


@given(patch_masks())
def test_group_order_is_the_order_of_loops(keep):
    values = torch.arange(keep.numel()).view(keep.shape)
    assert torch.equal(group_order(values), group_rows(values))


def test_group_order_example():
    assert group_order(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@given(st.lists(st.booleans(), max_size=20))
def test_pack_is_selection_in_order(keep):
    rows = torch.arange(3 * len(keep)).view(-1, 3)
    assert pack(rows, torch.tensor(keep, dtype=torch.bool)).tolist() == [
        r.tolist() for r, k in zip(rows, keep, strict=True) if k
    ]


@pytest.mark.parametrize("keep", [torch.ones(3, dtype=torch.bool), torch.ones(4), torch.ones(2, 2, dtype=torch.bool)])
def test_pack_refuses_a_mask_of_another_shape_or_type(keep):
    with pytest.raises(ValueError, match="4 rows need as many bools"):
        pack(torch.zeros(4, 2), keep)


def test_rotation_is_taken_in_the_wider_dtype():
    """In bfloat16 the vision transformer still rotates in float32, as Qwen2-VL does."""
    x, angles = torch.randn(6, 2, 8), torch.rand(6, 4) * 50
    half = rotate(x.bfloat16(), *cos_sin(angles))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotate(x.bfloat16().float(), *cos_sin(angles)).bfloat16())
