"""int8 weights: the quantised numbers, the products, the whole model, and what loading holds in memory."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import int8
import tiny
from check_int8 import right
from common import ROOT, TINY
from epvlm import EPVLM, Sampling
from evidence import four_moments, samples
from int8 import Linear8, load, quantised
from weights import build, published

RUN = [sys.executable, "examples/int8.py", "examples/scene.png", "examples/events.npy"]


@st.composite
def matrices(draw) -> torch.Tensor:
    """Up to 6 x 40 numbers in bfloat16, each row of its own size, some of zeros."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 0.02, 1.0, 300.0]), min_size=rows, max_size=rows))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=(rows, columns))
    return torch.from_numpy(numbers * np.array(sizes)[:, None]).bfloat16()


# The numbers


@given(matrices(), st.sampled_from([1, 7, 64, 2**20]))
def test_each_weight_is_the_nearest_multiple_of_its_rows_scale(W, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "CHUNK", chunk)
        q, s = quantised(W)
    assert q.dtype == torch.int8 and s.dtype == W.dtype and q.shape == W.shape and s.shape == W.shape[:1]
    for row in range(len(W)):
        largest, scale = max(abs(float(w)) for w in W[row]), float(s[row])
        assert scale > 0 and (largest == 0 or scale == float(torch.tensor(largest).bfloat16() / 127))
        for w, n in zip(W[row].tolist(), q[row].tolist(), strict=True):
            assert abs(n) <= 127 and abs(w / scale - n) <= 0.5 + 1e-6


def test_a_row_of_no_finite_scale_is_seen_in_the_scores():
    W = torch.ones(3, 4).bfloat16()
    W[0, 0], W[1, 0] = torch.nan, torch.inf
    y = Linear8(*quantised(W))(torch.ones(1, 4).bfloat16())
    assert y.isfinite().tolist() == [[False, False, True]]


# The products


@given(matrices(), st.sampled_from([(), (1,), (1, 1), (2,), (1, 3), (2, 1), (2, 3)]), st.booleans(), st.integers(1, 6))
def test_a_product_is_that_of_the_rounded_weights(W, batch, biased, rows):
    q, s = quantised(W)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(*batch, W.shape[1], generator=rng).bfloat16()
    bias = torch.randn(len(W), generator=rng).bfloat16() if biased else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "HELD", torch.empty(rows * W.shape[1], dtype=torch.bfloat16))  # so many rows at a time
        y = Linear8(q, s, bias)(x)
    expected = F.linear(x.double(), q.double() * s.double()[:, None])
    tolerance = 2**-7 * F.linear(x.double().abs(), q.double().abs() * s.double()[:, None]) + 1e-40
    if biased:
        expected, tolerance = expected + bias.double(), tolerance + 2**-7 * bias.double().abs()
    assert y.dtype == x.dtype and y.shape == (*batch, len(W)) and ((y.double() - expected).abs() <= tolerance).all()


# The model


def lossless(folder: Path) -> None:
    """Rewrites a checkpoint: a row of weights becomes whole numbers up to 127, one of them 127, times a power of 2."""
    tensors = load_file(folder / "model.safetensors")
    for W in tensors.values():
        if W.ndim == 2:
            q, s = quantised(W.bfloat16())
            q[:, 0] = 127
            W.copy_(q * 2 ** s.float().log2().round().unsqueeze(1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
def test_where_nothing_is_lost_it_answers_as_in_bfloat16(tmp_path, tied):
    """Only sums are rounded elsewhere: before the bias is added, and in another order where a row is alone."""
    tiny.write(tmp_path, tied=tied)
    lossless(tmp_path)
    ours, plain = load(tmp_path), EPVLM.from_pretrained(tmp_path, device="cpu", dtype="bfloat16")
    image, E_v = tiny.noise(140, 112), np.arange(140 * 112).reshape(112, 140)
    view, question = plain.look(image, E_v), "What is moving?"
    scores, expected = ours.logits(view, question), plain.logits(view, question)
    assert (scores - expected).abs().max() <= 0.03 * expected.abs().max()
    later = list(zip(*(m.tokens(m.read(view), question, Sampling(8)) for m in (ours, plain)), strict=True))
    assert all(a == b for a, b in later) and ours.flops(view, question) == plain.flops(view, question)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_every_weight_of_a_product_is_int8_and_nothing_else(tmp_path, shard):
    tiny.write(tmp_path, shard=shard)
    model = load(tmp_path)
    assert not any(isinstance(module, nn.Linear) for part in (model.vit, model.llm) for module in part.modules())
    for name, tensor in published(model.vit, model.llm).items():
        product = tensor.ndim == 2
        assert tensor.dtype == (torch.int8 if product else torch.bfloat16), name
        assert not tensor.requires_grad
    assert sum(isinstance(module, Linear8) for module in model.vit.modules()) == 2 * 4 + 2


@pytest.mark.filterwarnings("ignore:the event camera")
def test_the_tiny_model_answers_as_well():
    made = [*samples(60), *samples(60, four_moments)]
    for sparsity in (0, 0.5):
        known = [right(make(TINY), made, sparsity) for make in (load, EPVLM.from_pretrained)]
        assert len(known[0]) >= 120 and sum(known[0]) >= sum(known[1]) - 1


def test_threads_do_not_disturb_each_other():
    model = load(TINY)
    images = [Image.open(ROOT / "examples" / "scene.png"), tiny.noise(224, 168), tiny.noise(112, 196)]
    views = [model.look(image) for image in images] * 4
    alone = [model.logits(view, "what colour is the circle?") for view in views]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda view: model.logits(view, "what colour is the circle?"), views))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_loading_does_not_disturb_answers():
    model, question = load(TINY), "what colour is the circle?"
    view = model.look(tiny.noise(224, 168))
    alone = model.logits(view, question)
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, TINY) for _ in range(8)]
        while not all(each.done() for each in loads):
            assert torch.equal(model.logits(view, question), alone)
    assert all(torch.equal(each.result().logits(view, question), alone) for each in loads)


def test_no_weight_is_converted_for_a_token_after_the_first():
    model = load(TINY)
    tokens = model.tokens(model.look(tiny.noise(224, 168)), "what colour is the circle?", Sampling(max_new_tokens=8))
    next(tokens)
    int8.HELD.fill_(torch.nan)
    assert list(tokens) and int8.HELD.isnan().all()


MEMORY = """
import sys; sys.path[:0] = ["examples", "tests"]
import torch, int8, tiny
def peak():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
int8.HELD.zero_()
before = peak()
model = int8.load(sys.argv[1])
print(peak() - before, "model.safetensors" in open("/proc/self/maps").read())
model.answer(tiny.noise(112, 112), None, "What is moving?")
print(peak() - before)
"""


def test_the_weights_are_never_held_in_both_forms(tmp_path):
    """160 MB in one file: neither while loading nor after an answer, and nothing of the file stays."""
    tiny.write(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"] |= {"num_hidden_layers": 40, "intermediate_size": 10240}
    (tmp_path / "config.json").write_text(json.dumps(content))
    shapes = {name: tensor.shape for name, tensor in published(*build(tmp_path)).items()}
    rng = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    size = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEMORY, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, mapped, answered = done.stdout.split()
    assert size > 150e6 and mapped == "False"
    assert int(loaded) <= size / 2 + 40e6 and int(answered) <= size / 2 + 50e6


# The command line


def test_it_is_the_program_with_its_options():
    done = subprocess.run(
        [*RUN, "--model", "examples/tiny", "--sparsity", "0.6"],
        cwd=ROOT, input="what colour is the circle?\nwhat colour is the square?\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "red\nyellow\n" and "kept 104 of 256 patches" in done.stderr and done.returncode == 0


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--device", "cuda"], "device cuda: int8 runs only with cpu; leave it out"),
        (["--dtype", "float32"], "dtype float32: int8 runs only with bfloat16; leave it out"),
        (["--model", "examples/tiny", "--revision", "v1"], "examples/tiny: is a folder, which has no revisions"),
        (["--model", "nowhere/at/all"], "nowhere/at/all: is neither a folder nor a hub id"),
    ],
)
def test_what_it_refuses_takes_a_line(flags, told):
    done = subprocess.run([*RUN, "what?", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"epvlm: error: {told}") and done.stderr.count("\n") == 1


def test_the_cpu_and_bfloat16_may_be_named():
    assert load(TINY, None, torch.device("cpu"), torch.bfloat16).weight.dtype == load(TINY, device="cpu:0").weight.dtype
