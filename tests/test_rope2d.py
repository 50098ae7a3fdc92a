"""Eq. 2 and Pack: rotations, positions, and the order of the patches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import coordinates, group_rows
from rope2d import cos_sin, group_order, pack, pairing, rope_2d, rotate, rotation_matrix
from strategies import CLIP, patch_masks

HEAD_DIMS = st.sampled_from([4, 8, 16, 80])
PLACES = st.integers(-60, 60)


# Eq. 2 as printed


@given(PLACES, PLACES, HEAD_DIMS)
def test_eq2(i, j, d):
    """d/4 blocks of 4 x 4, m = 1 ... d/4, each a rotation by i theta_m and one by j theta_m."""
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
def test_eq2_is_relative(i, j, k, m, di, dj, d):
    """q at (i, j) and k at (k, m) score the same after both move by (di, dj)."""
    here = rotation_matrix(i, j, d).T @ rotation_matrix(k, m, d)
    there = rotation_matrix(i + di, j + dj, d).T @ rotation_matrix(k + di, m + dj, d)
    torch.testing.assert_close(here, there)
    torch.testing.assert_close(here, rotation_matrix(k - i, m - j, d))


@given(st.tuples(CLIP, st.integers(1, 12), st.integers(1, 12)), HEAD_DIMS, st.integers(0, 2**31))
def test_eq2_half_split(groups, d, seed):
    """The rotation of the program equals Eq. 2 up to `pairing` and the frequencies of the weights."""
    shape = groups[0], 2 * groups[1], 2 * groups[2]
    N = shape[0] * shape[1] * shape[2]
    x = torch.randn(N, 1, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = rotate(x, *cos_sin(rope_2d(shape, d), torch.float64))
    frequencies = 10000.0 ** (-4 * torch.arange(d // 4, dtype=torch.float64) / d)
    for n in {0, N - 1, seed % N}:
        i, j = coordinates(*shape)[n].tolist()
        expected = rotation_matrix(i, j, d, frequencies) @ x[n, 0, pairing(d)]
        torch.testing.assert_close(turned[n, 0, pairing(d)], expected, atol=1e-5, rtol=0)


@given(HEAD_DIMS)
def test_eq2_frequencies(d):
    printed = 10000.0 ** (-2 * torch.arange(1, d // 4 + 1, dtype=torch.float64) / d)
    torch.testing.assert_close(rotation_matrix(3, 5, d), rotation_matrix(3, 5, d, printed))


@given(HEAD_DIMS)
def test_pairing(d):
    assert sorted(pairing(d).tolist()) == list(range(d))
    assert pairing(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


# Pack, and positions


@given(st.lists(st.booleans(), max_size=20))
def test_pack(keep):
    """Selects rows in order."""
    rows = torch.arange(3 * len(keep)).view(-1, 3)
    kept = [row.tolist() for row, kept in zip(rows, keep, strict=True) if kept]
    assert pack(rows, torch.tensor(keep, dtype=torch.bool)).tolist() == kept


def test_pack_copies():
    rows = torch.zeros(3, 2)
    pack(rows, torch.ones(3, dtype=torch.bool)).add_(1)
    assert not rows.any()


@pytest.mark.parametrize("keep", [torch.ones(3, dtype=torch.bool), torch.ones(4), torch.ones(2, 2, dtype=torch.bool)])
def test_pack_refuses(keep):
    """A mask of another shape or type."""
    with pytest.raises(ValueError, match="4 rows need as many bools"):
        pack(torch.zeros(4, 2), keep)


@given(patch_masks(CLIP))
def test_group_order(keep):
    values = torch.arange(2 * keep.numel()).view(*keep.shape, 2)
    assert torch.equal(group_order(values), group_rows(values))
    assert torch.equal(group_order(keep), group_rows(keep))


def test_group_order_example():
    """The docstring's, and the same in a second moment."""
    moment = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    expected = [0, 1, 4, 5, 2, 3, 6, 7]
    assert group_order(moment[None]).tolist() == expected
    assert group_order(torch.stack((moment, moment + 8))).tolist() == [*expected, *(n + 8 for n in expected)]


@given(patch_masks(CLIP), HEAD_DIMS)
def test_dense_positions(keep, d):
    """Eq. 8: row n of Pack(R) is R at the place of the n-th kept patch, not at n."""
    rows = group_rows(keep)
    packed, places = pack(rope_2d(keep.shape, d), rows), coordinates(*keep.shape)[rows]
    assert len(packed) == keep.sum()
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, d // 2, 2).float() / (d // 2))
    for angles, (i, j) in zip(packed, places.tolist(), strict=True):
        assert torch.equal(angles, torch.cat((i * frequencies, j * frequencies)))


def test_theta():
    torch.testing.assert_close(rope_2d((1, 4, 4), 8, theta=100.0)[:, 1], rope_2d((1, 4, 4), 8)[:, 0] / 10)


# Rounding


def test_cos_sin_rounds_last():
    """Angles are rounded only after the cosine."""
    angles = torch.rand(50, 4) * 500
    cos, sin = cos_sin(angles, torch.bfloat16)
    assert torch.equal(cos, angles.cos().bfloat16()[:, None]) and torch.equal(sin, angles.sin().bfloat16()[:, None])


def test_rotate_dtype():
    """The wider of the two dtypes: in bfloat16 the vision transformer still rotates in float32, as Qwen2-VL does."""
    x, angles = torch.randn(6, 2, 8), torch.rand(6, 4) * 50
    half = rotate(x.bfloat16(), *cos_sin(angles))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotate(x.bfloat16().float(), *cos_sin(angles)).bfloat16())
