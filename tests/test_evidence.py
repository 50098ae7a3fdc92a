"""What the evidence says of each way to choose the groups, and how it is counted."""

import math
import re
import subprocess
import sys
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import evidence
import scenes
from common import TINY
from epvlm import EPVLM
from events import budget, budget_mask, event_maps, motion
from evidence import (
    CLIP_COLUMNS,
    CLIP_SELECTORS,
    CLIP_SPARSITIES,
    COMPARED,
    FAULTS,
    FAULTY,
    HOT,
    SELECTORS,
    SPARSITIES,
    TIMES,
    WHOLE,
    WITH_EVENTS,
    ClipSample,
    Sample,
    change,
    dense,
    four_moments,
    from_frame_to_frame,
    guesses,
    hot,
    rates,
    received,
    runs,
    samples,
    shrunk,
)
from rope2d import cos_sin, rotate


@pytest.fixture(scope="module")
def model() -> EPVLM:
    return EPVLM.from_pretrained(TINY, device="cpu")


def held_out(count: int) -> list[Sample]:
    return list(islice(samples(10**6), count))


def held_out_clips(count: int) -> list[ClipSample]:
    return list(islice(samples(10**6, four_moments), count))


@pytest.mark.filterwarnings("ignore:.*20 pixels hold")
@pytest.mark.parametrize("name", [*SELECTORS, *FAULTY])
def test_selectors_keep_the_budget_they_say(model, name):
    for made in held_out(6):
        groups = made.image.height * made.image.width // 784
        kept = []
        for sparsity in SPARSITIES:
            view = (SELECTORS | FAULTY)[name](model, made, sparsity)
            most = groups - math.ceil(round(sparsity * (groups - 1), 9))
            kept.append(int(view.groups.sum()))
            assert made.budget(sparsity) == most
            if name in ("Eq. 6, as printed", "Eq. 6, 14 px cells"):
                assert kept[-1] >= most
            elif name == "smaller image, dense":
                assert most - 3 <= kept[-1] <= most and view.groups.all()
            else:
                assert kept[-1] == most
                assert view.groups.shape == (1, made.image.height // 28, made.image.width // 28)
            assert len(view.patches) == view.keep.sum()
            assert len(view.patches) == 4 * groups if str(name).startswith("attention") else True
        assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("name", CLIP_SELECTORS)
def test_selectors_of_clips_keep_the_budget_they_say(model, name):
    for made in held_out_clips(2):
        T, rows, columns = made.cells
        assert T == 4
        for sparsity in CLIP_SPARSITIES:
            if sparsity > 0.75 and name in WHOLE:
                continue  # a moment holds more
            view, most = CLIP_SELECTORS[name](model, made, sparsity), budget(T * rows * columns, 1 - sparsity)
            if name == "smaller frames, dense":
                assert most - 4 * T <= view.tokens <= most and view.groups.all() and len(view.groups) == T
            elif name == "Eq. 6 for each moment":
                assert set(view.groups.sum(dim=(1, 2)).tolist()) == {budget(rows * columns, 1 - sparsity)}
            elif name == "fewer frames, dense":
                assert view.groups.all() and view.groups.shape == (4 * (1 - sparsity), rows, columns)
            else:
                assert view.tokens == most and view.groups.shape == made.cells
            if name in WHOLE:
                assert view.groups[0].all()
            assert len(view.patches) == view.keep.sum() == 4 * view.tokens and view.pad == model.video_pad


def test_what_clips_are_chosen_by(model):
    """By hand: pixels of frames, events of windows."""
    for made in held_out_clips(2):
        T, rows, _ = made.cells
        frames = [np.asarray(made.image.frame(n)).astype(float) for n in range(len(made.image.frames))]
        frames += frames[-1:] * (2 * T - len(frames))
        t, row, column = 2, rows - 2, 1
        cell = np.s_[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        now, before = ([frame[cell] for frame in frames[2 * k : 2 * k + 2]] for k in (t, t - 1))
        differ = sum(np.abs(a - b).sum() for a, b in zip(now, before, strict=True))
        assert change(made, 0.5)[t, row, column] == pytest.approx(differ)
        assert runs(made, 0.5)[t, row, column] == pytest.approx(np.abs(now[1] - before[0]).mean())
        for values in (change(made, 0.5), runs(made, 0.5)):
            assert values[0].min() > values[1:].max()
        steps = [abs(a[cell] - b[cell]).sum() for a, b in pairwise(frames[2 * t - 1 : 2 * t + 2])]
        assert from_frame_to_frame(made, 0.5)[t, row, column] == pytest.approx(max(steps))
        assert from_frame_to_frame(made, 0.5)[0, row, column] == abs(frames[0][cell] - frames[1][cell]).sum()
        S = model.look(made.image, made.events).S
        assert np.allclose(rates(made) * made.image.size[0] * made.image.size[1], S)
        assert np.allclose(motion(rates(made), 1), rates(made))


def test_recomputed_positions_are_the_same_patches_elsewhere(model):
    (made,) = held_out(1)
    names = ("Eq. 6, ties broken", "Eq. 6, positions recomputed", "Eq. 6, without Eq. 8")
    ours, moved, without = (SELECTORS[name](model, made, 0.5) for name in names)
    (ids, here), (_, elsewhere), (_, same) = (model.prompt(view, "") for view in (ours, moved, without))
    count, image = int(ours.groups.sum()), ids == model.image_pad
    assert moved.groups.flatten()[:count].all() and not moved.groups.flatten()[count:].any()
    assert torch.equal(moved.keep, moved.groups.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert torch.equal(ours.patches, moved.patches) and torch.equal(ours.patches, without.patches)
    assert not torch.equal(here[:, image], elsewhere[:, image])
    assert torch.equal(here[:, ~image], elsewhere[:, ~image])
    assert torch.equal(without.keep, moved.keep) and not torch.equal(without.keep, ours.keep)
    assert torch.equal(without.groups, ours.groups) and torch.equal(same, here)


@pytest.mark.parametrize(
    "height, width, groups, expected",
    [
        (6, 6, 18, (4, 4)),
        (8, 8, 32, (5, 6)),
        (4, 8, 16, (3, 5)),
        (4, 8, 2, (1, 2)),
        (4, 4, 2, (1, 2)),
        (5, 5, 1, (1, 1)),
    ],
)
def test_smaller_images_use_the_budget_without_distortion(height, width, groups, expected):
    h, w = (side // 28 for side in shrunk(28 * height, 28 * width, groups))
    assert h * w == math.prod(expected) and h * w <= groups
    assert max(h * width / (w * height), w * height / (h * width)) <= 2


def test_guessing_is_by_the_form_of_the_question():
    def asked(text, answer, kind="place", moving=True):
        return scenes.Question(text, answer, kind, moving)

    told = [
        asked("is the red thing left or right?", "left"),
        asked("is the blue thing left or right?", "left"),
        asked("is the green thing left or right?", "right"),
        asked("is the red thing high or low?", "low"),
        asked("how many things are red?", "1", "count", None),
        asked("how many things are blue?", "0", "count"),
    ]
    assert guesses(told, told) == ["75.0", "none asked", "50.0", "66.7"]
    assert guesses(told[2:3], told) == ["0.0", "none asked", "none asked", "0.0"]  # what was seen most often is wrong


def test_the_evidence_is_whole_tables(tmp_path):
    command = [sys.executable, evidence.__file__, "--questions", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == ""
    *right, ahead, moving, everything, costs = re.findall(
        r"\n\n([^|\n]*):\n\n(\|.*?)(?=\n\n|$)", done.stdout, re.DOTALL
    )
    assert len(right) == len(SPARSITIES) + 1
    sizes = [len(SELECTORS)] * len(SPARSITIES) + [2, len(SPARSITIES) * len(COMPARED), 3 + len(FAULTY), 3 + len(FAULTY)]
    for (_, table), size in zip((*right, ahead, moving, everything, costs), [*sizes, len(SELECTORS)], strict=True):
        head, _, *rows = table.splitlines()
        assert len(rows) == size and {row.count("|") for row in rows} == {head.count("|")}
    dense = [float(word) for word in costs[0].split("dense ")[1].split(" / ")]
    cells = {row.split(" | ")[0][2:]: row.split(" | ")[2].split(" / ") for row in costs[1].splitlines()[2:]}
    half, late = ([float(word) for word in cells[name]] for name in ("cover", "attention received"))  # at 0.5
    assert half[0] < 0.6 * dense[0] and half[1] < dense[1] * half[0] / dense[0] * 1.1
    assert late[0] == half[0] and late[1] > 0.8 * dense[1]  # its cost is the whole transformer's


def test_the_evidence_of_clips_is_whole_tables(tmp_path):
    command = [sys.executable, evidence.__file__, "clips", "--questions", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == "" and "held-out clips" in done.stdout
    found = re.findall(r"\n\n([^|\n]*):\n\n(\|.*?)(?=\n\n|$)", done.stdout, re.DOTALL)
    fewer, late = len(CLIP_SELECTORS) - len(WHOLE), len(set(WITH_EVENTS) - set(WHOLE))
    for (_, table), size in zip(
        found, [2, *[len(CLIP_SELECTORS)] * 2, fewer, 2 * len(WITH_EVENTS) + late], strict=True
    ):
        head, _, *rows = table.splitlines()
        assert len(rows) == size and {row.count("|") for row in rows} == {head.count("|")}
        assert all(column in head for column in CLIP_COLUMNS)


def test_attention_received(model):
    """By torch's own attention, with the identity for values: its output is then the attention itself."""
    (made,) = held_out(1)
    layer = model.vit.blocks[-1].attn
    z, angles = (
        torch.randn(1, 20, layer.proj.in_features),
        torch.rand(20, layer.proj.in_features // layer.num_heads // 2),
    )
    rope = cos_sin(angles)
    with torch.inference_mode():
        q, k, _ = layer.qkv(z).unflatten(-1, (3, layer.num_heads, -1)).unbind(-3)
        q, k = (rotate(x, *rope).transpose(1, 2) for x in (q, k))
        expected = scaled_dot_product_attention(q, k, torch.eye(20).expand(1, layer.num_heads, 20, 20)).sum((0, 1, 2))
        torch.testing.assert_close(received(layer, z, *rope), expected)
        view, whole = SELECTORS["attention received"](model, made, 0.7), dense(model, made, 0)
        tokens = model.vit(whole.patches[None], whole.keep)[:, view.groups.flatten()]
        assert torch.equal(view.H_v, tokens)


def test_faults_of_a_recording():
    for made in held_out(3):
        (height, width), seen = made.shape, made.events
        E_v = seen.align((width, height)).accumulate()
        wrong = {name: given["fault"](made).align((width, height)) for name, given in FAULTS.items()}
        with pytest.warns(UserWarning, match="20 pixels hold"):
            fired = next(event_maps([wrong["20 hot pixels"]], "count", "keep")[0]) - E_v
        assert sorted(fired[fired > 0].tolist()) == [TIMES] * HOT
        assert np.array_equal(wrong["mirrored"].accumulate(), E_v[:, ::-1])
        down, right = round(0.05 * height), round(0.05 * width)
        assert np.array_equal(wrong["shifted by 5%"].accumulate()[down:, right:], E_v[:-down, :-right])
        assert len(wrong["noisy camera"]) > len(seen)


def test_mending_finds_hot_pixels_and_leaves_others():
    """What the option is for: nearly the mask without them, and the same where there are none."""
    overlap = []
    for made in held_out(20):
        (height, width), bad = made.shape, hot(made)
        E_v, mended = (next(event_maps([x.align((width, height))], "count", "mend")[0]) for x in (made.events, bad))
        assert np.array_equal(E_v, made.events.align((width, height)).accumulate())
        for sparsity in (0.5, 0.7, 0.9):
            right, ours = (budget_mask(motion(each[None], 28), 1 - sparsity) for each in (E_v, mended))
            overlap.append((right & ours).sum() / (right | ours).sum())
    assert np.mean(overlap) > 0.97
