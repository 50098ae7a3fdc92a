"""Fixtures and hypothesis strategies shared by the tests."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(folder, transformers model, ours) of one small random checkpoint, for the tests where any will do."""
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = tiny.write(folder)
    return folder, theirs, EPVLM.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="session")
def data():
    """The folder of real files named by EPVLM_TEST_DATA; the test is skipped without it."""
    folder = os.environ.get("EPVLM_TEST_DATA")
    if not folder:
        pytest.skip("EPVLM_TEST_DATA is not set: this test needs the published tokenizer, configs or a real recording")
    assert (Path(folder) / "qwen2-vl").is_dir(), f"EPVLM_TEST_DATA={folder} holds no qwen2-vl folder"
    return Path(folder)


@pytest.fixture
def files(checkpoint, tmp_path, monkeypatch):
    """The current folder, with image.png (84 x 112), events.npy (100 events in 99 us, upper half) and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint[0], "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (112, 84, 3), dtype=np.uint8)).save("image.png")
    events = np.zeros(100, dtype=[("t", "i8"), ("x", "u2"), ("y", "u2"), ("p", "?")])
    events["t"], events["x"], events["y"] = np.arange(100) + 1000, rng.integers(0, 84, 100), rng.integers(0, 56, 100)
    np.save("events.npy", events)
    return tmp_path
