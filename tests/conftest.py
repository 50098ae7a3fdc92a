"""Fixtures shared by the tests, and the settings of hypothesis and torch."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

import hub
import tiny
from epvlm import EPVLM

settings.register_profile(
    "epvlm",
    deadline=None,
    print_blob=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("epvlm")
torch.set_num_threads(2)


class Tiny(NamedTuple):
    """One small random checkpoint: where it lies, as transformers reads it, and as we do."""

    folder: Path
    theirs: Qwen2VLForConditionalGeneration
    model: EPVLM


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Tiny:
    """For the tests where any checkpoint will do; float32, on the CPU. `tiny.write` says what it holds."""
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = tiny.write(folder)
    return Tiny(folder, theirs, EPVLM.from_pretrained(folder, device="cpu"))


@pytest.fixture(scope="session")
def repository(tmp_path_factory) -> Path:
    """What the mock hub serves: see `hub.publish`."""
    folder = tmp_path_factory.mktemp("repository")
    hub.publish(folder)
    return folder


@pytest.fixture
def folder(repository, tmp_path) -> Path:
    """A copy of the same, a checkpoint that a test may change."""
    return shutil.copytree(repository, tmp_path / "folder")


@pytest.fixture(scope="session")
def data():
    """The folder of real files that EPVLM_TEST_DATA names; without it the test is skipped."""
    folder = os.environ.get("EPVLM_TEST_DATA")
    if not folder:
        pytest.skip("EPVLM_TEST_DATA is not set: this test needs the published tokenizer, configs or a real recording")
    assert (Path(folder) / "qwen2-vl").is_dir(), f"EPVLM_TEST_DATA={folder} holds no qwen2-vl folder"
    return Path(folder)


@pytest.fixture
def files(checkpoint, tmp_path, monkeypatch):
    """The current folder, with image.png (84 x 112), events.npy (100 events in 100 us, upper half) and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint.folder, "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (112, 84, 3), dtype=np.uint8)).save("image.png")
    events = np.zeros(100, dtype=[("t", "i8"), ("x", "u2"), ("y", "u2"), ("p", "?")])
    events["t"], events["x"], events["y"] = np.r_[1000:1099, 1100], rng.integers(0, 84, 100), rng.integers(0, 56, 100)
    np.save("events.npy", events)
    return tmp_path
