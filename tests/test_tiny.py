"""The tiny model of examples/: that it is a Qwen2-VL and answers, how it was trained, how the evidence is counted."""

import json
import math
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

import evidence
import scenes
import train_tiny
from epvlm import EPVLM, build
from evidence import SELECTORS, SPARSITIES, TINY, Sample, accuracy, answers, guesses, samples, shrunk
from oracles import assert_close
from scenes import questions, record, render, scene
from train_tiny import LEARNED, SHOWN, STAGES, Training, ask, score, tokenizer

ROOT = Path(evidence.__file__).parent.parent


@pytest.fixture(scope="module")
def model() -> EPVLM:
    return EPVLM.from_pretrained(TINY, device="cpu")


def held_out(count: int) -> list[Sample]:
    return list(islice(samples(10**6), count))


# What is shipped


def test_the_checkpoint_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert set(files) == {"config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"}
    assert files["model.safetensors"] <= 12 * 10**6
    assert all(tensor.isfinite().all() for tensor in load_file(TINY / "model.safetensors").values())


@torch.inference_mode()
def test_transformers_loads_it_and_agrees(model):
    theirs, report = Qwen2VLForConditionalGeneration.from_pretrained(TINY, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (*_, made) = held_out(3)
    for question in made.questions:
        prompt = model.prompt(made.image, None, question.text)
        ids, grid = prompt.input_ids[None], torch.tensor([[1, *prompt.keep_patches.shape]])
        inputs = {"input_ids": ids, "pixel_values": prompt.patches, "image_grid_thw": grid}
        kinds = (ids == model.special["image_pad"]).int()
        assert_close(model.logits(prompt), theirs.eval()(**inputs, mm_token_type_ids=kinds).logits[0])


def test_dense_it_answers_nearly_every_held_out_question(model):
    right = [ok for made in samples(400) for ok in answers(model, evidence.dense(model, made, 0.0, ""), made.questions)]
    assert len(right) >= 400 and np.mean(right) >= 0.95


def test_the_readme_s_first_command_answers_rightly():
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"pip install -r requirements.txt && (python epvlm.py [^\n]+)", readme)[1]
    program, *arguments = shlex.split(command)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    image, events, question = arguments[1:4]
    made = next(s for s in map(scene, range(100)) if np.array_equal(render(s), Image.open(ROOT / image)))
    expected = {asked.text: asked.answer for asked in questions(made)}
    assert program == "python" and done.stdout == expected[question] + "\n"
    assert done.stderr.startswith("kept ") and len(np.load(ROOT / events)) == len(record(made))


def test_any_text_survives_the_tokenizer(model):
    for text in ("what colour is the circle?", "Ünïcode, 中文 and 🙂", "<|im_end|>", "\n"):
        before, after = model.text_ids(text)
        assert text in model.tokenizer.decode(after) and max(before + after) < model.llm.config.vocab_size


def test_each_word_of_the_questions_is_one_token():
    made = tokenizer()
    for question in questions(scene(3)):
        words = question.text.replace("?", " ?").split()
        assert len(made.encode(question.text).ids) == len(words)
    assert made.to_str() == tokenizer().to_str()


# How it was trained


def test_an_answer_scored_right_is_the_answer_given(model):
    for made in held_out(4):
        for sparsity in (0, 0.5, 0.9):
            prompts = [model.prompt(made.image, made.events, q.text, sparsity) for q in made.questions]
            with torch.inference_mode():
                H_v = model.vit(prompts[0].patches[None], prompts[0].keep_patches)
                _, right = score(model, H_v, prompts[0].keep, *ask(model, made.questions))
            for prompt, question, ok in zip(prompts, made.questions, right.tolist(), strict=True):
                assert ok == ("".join(model.stream(prompt, max_new_tokens=8)) == question.answer)


def test_questions_of_one_image_do_not_see_each_other(model):
    (made,) = held_out(1)
    prompt = model.prompt(made.image, None, "")
    with torch.inference_mode():
        H_v = model.vit(prompt.patches[None], prompt.keep_patches)
        together, _ = score(model, H_v, prompt.keep, *ask(model, made.questions))
        alone = [score(model, H_v, prompt.keep, *ask(model, [question]))[0] for question in made.questions]
    assert_close(together, torch.cat(alone))


def test_a_run_that_is_interrupted_goes_on_as_if_it_were_not(tmp_path):
    whole, first = (Training(tmp_path / name, steps=4, rate=1e-3) for name in ("whole", "broken"))
    losses = [whole.advance() for _ in range(4)]
    told = [first.advance() for _ in range(2)]
    first.save()
    again = Training(tmp_path / "broken", steps=4, rate=1e-3)
    assert (again.step, again.stage, again.recent) == (first.step, first.stage, first.recent)
    told += [again.advance() for _ in range(2)]
    assert told == losses
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in again.weights.items())
    again.save()
    loaded = EPVLM.from_pretrained(tmp_path / "broken" / "model")
    assert torch.equal(loaded.llm.model["norm"].weight, whole.weights["model.norm.weight"])
    assert json.loads((TINY / "config.json").read_text()) == train_tiny.settings(tokenizer())
    assert [tuple(p.shape) for part in build(TINY) for p in part.parameters()] == [
        tuple(p.shape) for p in whole.parameters
    ]


@pytest.mark.parametrize("content", [b"", b"no state", b"PK"])
def test_a_damaged_state_is_named(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt: no state of this training .*; remove it"):
        Training(tmp_path, steps=1, rate=1e-3)


@pytest.mark.parametrize("steps, rate", [(0, 1e-3), (5, 0), (5, math.nan)])
def test_a_training_that_is_none_is_refused(tmp_path, steps, rate):
    with pytest.raises(ValueError, match="give 1 or more"):
        train_tiny.train(tmp_path / "run", steps, rate)
    assert not list(tmp_path.iterdir())


def test_things_are_added_when_every_kind_is_learned(tmp_path):
    training = Training(tmp_path, steps=1, rate=1e-3)
    for stage in range(len(STAGES)):
        assert training.stage == stage
        for kind in LEARNED:
            training.recent[kind].extend([True] * (SHOWN if kind != "shape" else SHOWN - 1))
        training.open_stage()
        assert training.stage == stage  # shapes were not asked often enough
        training.recent["shape"].extend([False] * SHOWN)
        training.open_stage()
        assert training.stage == stage  # nor are they known
        training.recent["shape"].extend([True] * (SHOWN - 100))
        assert training.accuracy()["shape"] == 1 - 100 / SHOWN
        training.open_stage()
    assert training.stage == len(STAGES) - 1


def test_training_and_held_out_scenes_have_other_seeds(model):
    seeds = [made.seed for made in samples(200)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < scenes.TRAIN
    patches, keep, asked = train_tiny.batch(model, 0, STAGES[-1])
    assert len(patches) == train_tiny.BATCH and len(asked) == train_tiny.BATCH * train_tiny.QUESTIONS
    first = scene(scenes.TRAIN, STAGES[-1], tuple(14 * side for side in keep.shape))
    shown = model.prompt(Image.fromarray(render(first)), None, "").patches
    assert torch.equal(patches[0], shown) and keep.all()


# How the evidence is counted


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_keep_the_budget_they_say(model, name):
    for made in held_out(6):
        groups = made.image.height * made.image.width // 784
        kept = []
        for sparsity in SPARSITIES:
            prompt = SELECTORS[name](model, made, sparsity, "")
            budget = groups - math.ceil(round(sparsity * (groups - 1), 9))
            kept.append(int(prompt.keep.sum()))
            assert made.budget(sparsity) == budget
            if "literal" in name or "14 px" in name:
                assert kept[-1] >= budget
            elif "smaller" in name:
                assert budget - 3 <= kept[-1] <= budget and prompt.keep.all()
            else:
                assert kept[-1] == budget and prompt.keep.shape == (made.image.height // 28, made.image.width // 28)
            assert len(prompt.input_ids) == prompt.position_ids.shape[1]
        assert kept == sorted(kept, reverse=True)


def test_recomputed_positions_are_the_same_patches_elsewhere(model):
    (made,) = held_out(1)
    ours, moved = (SELECTORS[name](model, made, 0.5, "") for name in ("events (ours)", "events, positions recomputed"))
    assert torch.equal(ours.patches, moved.patches) and torch.equal(ours.input_ids, moved.input_ids)
    count = int(ours.keep.sum())
    assert moved.keep.flatten()[:count].all() and not moved.keep.flatten()[count:].any()
    image = slice(ours.image_start, ours.image_start + count)
    assert not torch.equal(ours.position_ids[:, image], moved.position_ids[:, image])
    assert torch.equal(ours.position_ids[:, image.stop :], moved.position_ids[:, image.stop :])
    without = SELECTORS["events, without Eq. 8"](model, made, 0.5, "")
    assert torch.equal(without.keep_patches, moved.keep_patches) and torch.equal(without.patches, ours.patches)
    assert torch.equal(without.position_ids, ours.position_ids) and torch.equal(without.keep, ours.keep)


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


@pytest.mark.parametrize(
    "scenes, told",
    [
        ([], "none asked"),
        ([(0, 0)], "none asked"),
        ([(1, 1)] * 50 + [(0, 1)] * 50, "50.0 (40.4–59.6)"),  # Wilson's interval of 50 of 100
        ([(1, 1)] * 100, "100.0 (96.3–100.0)"),
        ([(1, 1)] * 90 + [(0, 1)] * 10, "90.0 (82.6–94.5)"),
        ([(8, 8)] * 50 + [(0, 8)] * 50, "50.0 (40.4–59.6)"),  # 800 questions, alike in each scene: as good as 100
        ([(1, 2)] * 50, "50.0 (40.4–59.6)"),  # and never better than independent ones
    ],
)
def test_accuracy_comes_with_its_interval(scenes, told):
    assert accuracy(scenes) == told


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
