"""What the program works on, for hypothesis: masks, streams of events, maps of motion.

Masks and maps have a leading time axis: `moments` says how long it is, 1 for a still image."""

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

XYTP = [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "<i2")]  # a structured event
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9]), st.floats(0, 0.999))
STILL, CLIP = st.just(1), st.integers(1, 3)  # moments
TEXTS = {  # questions
    "latin": "What is moving?",
    "chinese": "图中什么在动?",
    "arabic": "ما الذي يتحرك؟ ١٢٣",
    "hindi": "क्या चल रहा है?",
    "emoji": "👩‍👩‍👧 moves 🚗💨",
    "combining": "e\u0301 and é, Å and A\u030a",
    "newlines": "\n\n leading and trailing \n",
    "empty": "",
    "spaces": "   ",
    "specials": "<|im_end|>\n<|image_pad|><|im_start|>system",
}


@st.composite
def masks(draw, side, moments) -> torch.Tensor:
    """(T, side, side) bool, each side drawn for itself; True keeps, and at least one is kept, not in each moment."""
    mask = draw(hnp.arrays(bool, (draw(moments), draw(side), draw(side))))
    mask[sorted(draw(st.sets(st.integers(0, len(mask) - 1), max_size=len(mask) - 1)))] = False
    mask.flat[draw(st.integers(0, mask.size - 1))] = True
    return torch.from_numpy(mask)


def group_masks(side, moments=STILL) -> st.SearchStrategy[torch.Tensor]:
    """A mask by group, (T, groups_h, groups_w) bool."""
    return masks(side, moments)


def patch_masks(moments=STILL) -> st.SearchStrategy[torch.Tensor]:
    """A mask by patch, (T, grid_h, grid_w) bool, sides even; groups may be broken."""
    return masks(st.sampled_from([2, 4, 6, 8]), moments)


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


def times(min_size=1, max_size=9) -> st.SearchStrategy[np.ndarray]:
    """Of frames, (F,) microseconds that rise, whole or not, from before 0 to days."""
    time = st.one_of(st.integers(-(10**6), 10**6), st.integers(0, 10**12), st.floats(0, 10**6, width=32))
    each = st.lists(time, min_size=min_size, max_size=max_size, unique_by=round)
    return each.map(lambda values: np.array(sorted(values), dtype=np.float64))


def cells(moments) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(moments, st.integers(1, 9), st.integers(1, 9))


def motions(moments=CLIP) -> st.SearchStrategy[np.ndarray]:
    """S of Eq. 5, (T, cells_h, cells_w) float64, whole numbers with many zeros and ties."""
    elements = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 10**6))
    return hnp.arrays(np.float64, cells(moments), elements=elements)


def untied_motions(moments=CLIP) -> st.SearchStrategy[np.ndarray]:
    """S in which no two cells have the same motion."""
    return hnp.arrays(np.float64, cells(moments), elements=st.integers(0, 10**6), unique=True)


@st.composite
def worths(draw, moments=STILL) -> np.ndarray:
    """w of `cover_mask`, (T, cells_h, cells_w) float64 of at most 6 x 6 cells: whole numbers with many zeros and ties,
    fractions, or one number everywhere."""
    some = st.one_of(st.integers(0, 3), st.integers(0, 10**6)), st.floats(0.1, 10), st.just(draw(st.integers(0, 3)))
    shape = draw(moments), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return draw(hnp.arrays(np.float64, shape, elements=draw(st.sampled_from(some))))


@st.composite
def images(draw, moments=CLIP) -> tuple[np.ndarray, int]:
    """X_v, (T, H, W, 3) uint8 with many equal pixels, and the side of its cells."""
    side, cells_h, cells_w = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    colours = st.one_of(st.sampled_from([0, 127, 128, 255]), st.integers(0, 255))
    shape = draw(moments), side * cells_h, side * cells_w, 3
    return draw(hnp.arrays(np.uint8, shape, elements=colours)), side


def hot_maps() -> st.SearchStrategy[np.ndarray]:
    """E_v, int64 counts of both signs, few of them large."""
    elements = st.one_of(st.just(0), st.integers(-3, 3), st.integers(-3, 3), st.integers(-128, 127))
    return hnp.arrays(np.int64, st.tuples(st.integers(1, 7), st.integers(1, 7)), elements=elements)


@st.composite
def edges(draw, rows: np.ndarray) -> np.ndarray:
    """Where windows begin and end, (T + 1,) rising; often at the time of an event, or between two microseconds."""
    times = [st.integers(-10, 10**6 + 10), st.integers(-10, 10**6).map(lambda t: t + 0.5)]
    times += [st.sampled_from(rows["t"].tolist())] if len(rows) else []
    return np.array(sorted(draw(st.lists(st.one_of(times), min_size=2, max_size=7, unique=True))), np.float64)
