"""Fixtures and hypothesis strategies shared by the tests."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

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
