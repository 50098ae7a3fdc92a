"""The tiny model of examples/: that it is a Qwen2-VL and answers, and how it was trained."""

import json
import math
import re
import shlex
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

import scenes
import train_tiny
from common import ROOT, TINY
from epvlm import EPVLM, Options, Sampling
from evidence import ClipSample, Sample, answers, four_moments, samples
from llm import prompt_ids
from oracles import assert_close
from scenes import questions, record, render, scene
from train_tiny import CLIP_QUESTIONS, CLIPS, LEARNED, QUESTIONS, STILLS, Training, begin, score, tokenizer
from weights import build


@pytest.fixture(scope="module")
def model() -> EPVLM:
    return EPVLM.from_pretrained(TINY, device="cpu")


def held_out(count: int) -> list[Sample]:
    return list(islice(samples(10**6), count))


def held_out_clips(count: int) -> list[ClipSample]:
    return list(islice(samples(10**6, four_moments), count))


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
        view = model.look(made.image)
        ids = model.prompt(view, question.text)[0][None]
        inputs = {"input_ids": ids, "pixel_values": view.patches, "image_grid_thw": torch.tensor([view.keep.shape])}
        kinds = (ids == model.image_pad).int()
        scores = theirs.eval()(**inputs, mm_token_type_ids=kinds).logits[0]
        assert_close(model.logits(view, question.text), scores)


def test_dense_it_answers_nearly_every_held_out_question(model):
    right = [ok for made in samples(400) for ok in answers(model, model.look(made.image), made.questions)]
    assert len(right) >= 400 and np.mean(right) >= 0.95


def test_dense_it_answers_questions_about_clips():
    """Of 4 to 8 frames; the evidence takes 7 and 8."""
    model, right = EPVLM.from_pretrained(TINY, device="cpu"), {}
    for seed in range(60):
        made = scenes.clip(seed)
        asked = scenes.choose(questions(made), 8, seed, scenes.CLIP_KINDS)
        for question, ok in zip(asked, answers(model, model.look(scenes.shown(made)), asked), strict=True):
            right.setdefault(question.kind, []).append(ok)
    assert set(right) == set(scenes.CLIP_KINDS) and np.mean([ok for known in right.values() for ok in known]) >= 0.9
    assert all(np.mean(known) >= 0.75 for known in right.values())


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
        before, after = prompt_ids(model.tokenizer, text)
        assert text in model.tokenizer.decode(after) and max(before + after) < model.llm.config.vocab_size


def test_each_word_of_the_questions_is_one_token():
    made = tokenizer()
    for tokens, shown in ((made, scene(3)), (tokenizer(clips=True), scene(3)), (tokenizer(clips=True), scenes.clip(3))):
        for question in questions(shown):
            words = question.text.replace("?", " ?").split()
            assert len(tokens.encode(question.text).ids) == len(words)
    assert made.to_str() == tokenizer().to_str()


# How it was trained


def test_an_answer_scored_right_is_the_answer_given(model):
    for made in held_out(4):
        for sparsity in (0, 0.5, 0.9):
            view = model.look(made.image, made.events, Options(sparsity))
            with torch.inference_mode():
                H_v = model.vit(view.patches[None], view.keep)
                _, right = score(model, H_v, view.groups, made.questions)
            for question, ok in zip(made.questions, right.tolist(), strict=True):
                assert ok == ("".join(model.stream(view, question.text, Sampling(8))) == question.answer)


def test_an_answer_about_a_clip_scored_right_is_the_answer_given(model):
    for made in held_out_clips(3):
        view = model.look(made.image, made.events, Options(0.5))
        for question, ok in zip(made.questions, answers(model, view, made.questions), strict=True):
            assert ok == ("".join(model.stream(view, question.text, Sampling(8))) == question.answer)


def test_questions_of_one_image_do_not_see_each_other(model):
    (made,) = held_out(1)
    view = model.look(made.image)
    with torch.inference_mode():
        H_v = model.vit(view.patches[None], view.keep)
        together, _ = score(model, H_v, view.groups, made.questions)
        alone = [score(model, H_v, view.groups, [question])[0] for question in made.questions]
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("start", [None, TINY])
def test_a_run_that_is_interrupted_goes_on_as_if_it_were_not(tmp_path, start):
    whole, first = (Training(tmp_path / name, 4, 1e-3, start) for name in ("whole", "broken"))
    losses = [whole.advance() for _ in range(4)]
    told = [first.advance() for _ in range(2)]
    first.save()
    again = Training(tmp_path / "broken", 4, 1e-3, start)
    assert (again.step, again.stage, again.recent) == (first.step, first.stage, first.recent)
    told += [again.advance() for _ in range(2)]
    assert told == losses
    assert all(torch.equal(weight, whole.weights[name]) for name, weight in again.weights.items())
    again.save()
    loaded = EPVLM.from_pretrained(tmp_path / "broken" / "model")
    assert torch.equal(loaded.llm.model["norm"].weight, whole.weights["model.norm.weight"])
    assert json.loads((TINY / "config.json").read_text()) == train_tiny.settings(tokenizer(clips=True))
    if start:
        assert [tuple(p.shape) for part in build(TINY) for p in part.parameters()] == [
            tuple(p.shape) for p in whole.parameters
        ]


def test_a_model_that_learns_clips_begins_with_what_it_knows(tmp_path):
    """Asked in the words it knew, a model with more words gives the same scores; checked on one that knew stills."""
    begin(tmp_path / "old")
    Training(tmp_path / "run", 1, 1e-3).save()
    old, new = EPVLM.from_pretrained(tmp_path / "run" / "model"), begin(tmp_path / "new", tmp_path / "run" / "model")
    (made,) = held_out(1)
    ids = {token: row for token, row in old.tokenizer.get_vocab().items() if token in new.tokenizer.get_vocab()}
    assert len(ids) > 300 and new.llm.config.vocab_size > old.llm.config.vocab_size
    moved = [new.tokenizer.token_to_id(token) for token in ids]
    text = made.questions[0].text
    before, after = (each.logits(each.look(made.image), text) for each in (old, new))
    assert_close(after[:, moved], before[:, list(ids.values())])


def test_a_run_that_goes_on_without_its_start_is_refused_and_left_as_it_is(tmp_path, capsys):
    begin(tmp_path / "model", TINY)
    written = (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert train_tiny.main([str(tmp_path), "--steps", "1"]) == 2
    assert "give --start" in capsys.readouterr().err
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == written and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"no state", b"PK"])
def test_a_damaged_state_is_named(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt: not a state of this training .*; remove it"):
        Training(tmp_path, steps=1, rate=1e-3)


@pytest.mark.parametrize("steps, rate", [(0, 1e-3), (5, 0), (5, math.nan)])
def test_a_training_that_cannot_be_is_refused(tmp_path, capsys, steps, rate):
    assert train_tiny.main([str(tmp_path / "run"), "--steps", str(steps), "--rate", str(rate)]) == 2
    assert "give 1 or more" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_things_are_added_when_every_kind_is_learned(tmp_path):
    training = Training(tmp_path, steps=1, rate=1e-3)
    for number, stage in enumerate(STILLS):
        assert training.stage == number
        for kind in LEARNED:
            training.recent[kind].extend([True] * (stage.over if kind != "shape" else stage.over - 1))
        training.open_stage()
        assert training.stage == number  # shapes were not asked often enough
        training.recent["shape"] = [False] * stage.over
        training.open_stage()
        assert training.stage == number  # nor are they known
        training.recent["shape"] = [False] * 100 + [True] * (stage.over - 100)
        assert training.accuracy()["shape"] == 1 - 100 / stage.over
        training.open_stage()
    assert training.stage == len(STILLS) - 1


def test_training_and_held_out_scenes_have_other_seeds(model):
    for made in (samples(200), samples(200, four_moments)):
        seeds = [each.seed for each in made]
        assert len(set(seeds)) == len(seeds) and max(seeds) < scenes.TRAIN
    shown = train_tiny.stills(model, scenes.TRAIN, STILLS[-1])
    assert len(shown.patches) == STILLS[-1].stills and len(shown.questions) == STILLS[-1].stills * QUESTIONS
    first = scene(scenes.TRAIN, STILLS[-1].things, tuple(14 * side for side in shown.keep.shape[1:]))
    assert torch.equal(shown.patches[0], model.look(Image.fromarray(render(first))).patches) and shown.keep.all()


@pytest.mark.parametrize("stage", CLIPS)
def test_a_batch_of_clips_is_what_the_program_sees(model, stage):
    shown = train_tiny.clips(model, 2 * scenes.TRAIN, stage)
    T, size = len(shown.keep), tuple(14 * side for side in shown.keep.shape[1:])
    assert len(shown.patches) == stage.clips * T and len(shown.questions) == stage.clips * CLIP_QUESTIONS
    assert {question.kind for question in shown.questions} <= set(stage.kinds)
    frames = next(n for n in (2 * T - 1, 2 * T) for _ in [0] if matches(model, shown, stage, n, size))
    assert stage.frames[0] <= frames <= stage.frames[1]


def matches(model, shown, stage, frames: int, size) -> bool:
    """Whether the batch's first clip, with so many frames, is packed as `look` packs it."""
    first = scenes.clip(2 * scenes.TRAIN, stage.things, (frames, frames), stage.spells, size)
    return torch.equal(shown.patches[: len(shown.keep)].flatten(0, 1), model.look(scenes.shown(first)).patches)
