"""What the program works on, for hypothesis: grids of groups, masks, event streams, maps of motion."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

XYTP = [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "<i2")]  # a structured event
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9]), st.floats(0, 0.999))


@st.composite
def group_masks(draw, side) -> torch.Tensor:
    """A mask by group, (groups_h, groups_w) bool, at least one kept."""
    shape = draw(side), draw(side)
    mask = draw(hnp.arrays(bool, shape))
    mask.flat[draw(st.integers(0, mask.size - 1))] = True
    return torch.from_numpy(mask)


@st.composite
def patch_masks(draw) -> torch.Tensor:
    """A mask by patch, (grid_h, grid_w) bool, both even, at least one kept; groups may be broken."""
    shape = 2 * draw(st.integers(1, 4)), 2 * draw(st.integers(1, 4))
    mask = draw(hnp.arrays(bool, shape))
    mask.flat[draw(st.integers(0, mask.size - 1))] = True
    return torch.from_numpy(mask)


@st.composite
def recordings(draw, min_size=0, max_size=60) -> tuple[np.ndarray, tuple[int, int]]:
    """A structured array of events in time order, and the (width, height) of the sensor it comes from."""
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 30))
    event = st.tuples(
        st.integers(0, width - 1), st.integers(0, height - 1), st.integers(0, 10**6), st.sampled_from([0, 1])
    )
    rows = draw(st.lists(event, min_size=min_size, max_size=max_size))
    rows.sort(key=lambda row: row[2])
    return np.array(rows, dtype=XYTP), (width, height)


def motions() -> st.SearchStrategy[np.ndarray]:
    """S of Eq. 5, (cells_h, cells_w) whole numbers, with many zeros and ties."""
    elements = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 10**6))
    return hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=elements)


@st.composite
def untied_motions(draw) -> np.ndarray:
    """S in which no two cells have the same motion."""
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    size = shape[0] * shape[1]
    values = draw(st.lists(st.integers(0, 10**6), min_size=size, max_size=size, unique=True))
    return np.array(values, dtype=np.float64).reshape(shape)
