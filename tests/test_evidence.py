"""What the evidence says of each way to choose the groups, and how it is counted."""

import math
import subprocess
import sys
from itertools import islice

import pytest
import torch

import evidence
import scenes
from common import TINY
from epvlm import EPVLM
from evidence import SELECTORS, SPARSITIES, Sample, guesses, samples, shrunk


@pytest.fixture(scope="module")
def model() -> EPVLM:
    return EPVLM.from_pretrained(TINY, device="cpu")


def held_out(count: int) -> list[Sample]:
    return list(islice(samples(10**6), count))


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_keep_the_budget_they_say(model, name):
    for made in held_out(6):
        groups = made.image.height * made.image.width // 784
        kept = []
        for sparsity in SPARSITIES:
            view = SELECTORS[name](model, made, sparsity)
            budget = groups - math.ceil(round(sparsity * (groups - 1), 9))
            kept.append(int(view.groups.sum()))
            assert made.budget(sparsity) == budget
            if "literal" in name or "14 px" in name:
                assert kept[-1] >= budget
            elif "smaller" in name:
                assert budget - 3 <= kept[-1] <= budget and view.groups.all()
            else:
                assert kept[-1] == budget
                assert view.groups.shape == (1, made.image.height // 28, made.image.width // 28)
            assert len(view.patches) == view.keep.sum()
        assert kept == sorted(kept, reverse=True)


def test_recomputed_positions_are_the_same_patches_elsewhere(model):
    (made,) = held_out(1)
    names = ("events (ours)", "events, positions recomputed", "events, without Eq. 8")
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


def test_the_evidence_is_a_whole_table(tmp_path):
    command = [sys.executable, evidence.__file__, "--questions", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr == ""
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + len(SPARSITIES) * len(SELECTORS) + 1
    assert len({row.count("|") for row in rows}) == 1
    dense, half = (
        next(row for row in rows if row.startswith(start)) for start in ("| 0 | all", "| 0.5 | events (ours)")
    )
    tokens, flops = zip(*(map(float, row.split("|")[7:9]) for row in (dense, half)), strict=True)
    assert tokens[1] < 0.6 * tokens[0] and flops[1] < flops[0] * tokens[1] / tokens[0] * 1.1
