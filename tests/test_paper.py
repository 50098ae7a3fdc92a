"""The whole: plain Qwen2-VL against transformers, packing against masking, FLOPs, and what the README says."""

import doctest
import importlib
import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tiny
import vit
from epvlm import EPVLM, Options, Sampling, View, main
from events import read_events
from llm import Decoder, DecoderConfig, KVCache
from oracles import assert_close, masked_decoder, masked_vision
from strategies import SPARSITIES, TEXTS, group_masks, patch_masks
from vit import Clip, VisionConfig, VisionTransformer, packed_patches

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is moving?"
SIZES = {
    "square": (112, 112),
    "tall": (57, 301),
    "wide": (333, 61),
    "odd": (101, 87),
    "tiny": (9, 5),
    "large": (1500, 900),
}


def noise(width, height, mode="RGB", seed=0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode="L" if channels == 1 else None).convert(mode)


# Plain Qwen2-VL: the dense model against transformers, float32


def reference(folder: Path, image: Image.Image, question: str) -> dict:
    """The same inputs for transformers, by its own image processor and with the whole prompt as one string."""
    out, tokens = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=[image]), tiny.tokenizer()
    out = {key: torch.as_tensor(np.asarray(value)) for key, value in out.items()}
    count = int(out["image_grid_thw"].prod()) // 4
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    text = before + "<|image_pad|>" * count + f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([tokens.encode(text).ids])
    types = (ids == tokens.token_to_id("<|image_pad|>")).int()
    return {"input_ids": ids, "mm_token_type_ids": types, **out}


@torch.no_grad()
def assert_parity(folder, theirs, ours: EPVLM, image, question=QUESTION):
    """Ids, pixels and positions equal; visual tokens and logits to 1e-4 of the largest; the same greedy answer."""
    view = ours.look(image)
    ids, positions = ours.prompt(view, question)
    given = reference(folder, image, question)
    assert torch.equal(ids, given["input_ids"][0])
    assert torch.equal(view.patches, given["pixel_values"])  # not one pixel differs
    features = theirs.model.visual(given["pixel_values"], given["image_grid_thw"]).pooler_output
    assert_close(ours.vit(view.patches[None], view.keep)[0], features)
    expected, _ = theirs.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"]
    )
    assert torch.equal(positions, expected[:, 0])
    assert_close(ours.logits(view, question), theirs(**given).logits[0])
    generated = theirs.generate(**given, max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert list(ours.tokens(view, question, Sampling(8))) == generated.tolist()


@pytest.mark.parametrize("layout", ["flat", "both", "nested"])
@pytest.mark.parametrize("shard", ["1GB", "250KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_layouts(tmp_path, tied, shard, layout):
    theirs = tiny.write(tmp_path, tied=tied, shard=shard, layout=layout, seed=len(layout))
    assert (len(list(tmp_path.glob("*.safetensors"))) >= 2) == (shard == "250KB")
    assert_parity(tmp_path, theirs, EPVLM.from_pretrained(tmp_path, device="cpu"), noise(90, 120))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_image_sizes(checkpoint, size):
    """Eq. 1 and 4."""
    assert_parity(*checkpoint, noise(*size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype(checkpoint, monkeypatch, dtype):
    """Eq. 3. From the same input, bit for bit: what is taken in float32 (rotation of the vision transformer, norms),
    and what in the model's own dtype (rotation of the decoder). Patch embedding is one product here, a convolution
    there, and attention in bfloat16 is not torch's fused kernel (test_vit.py::test_attend)."""
    monkeypatch.setattr(vit, "attend", F.scaled_dot_product_attention)
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint.folder, dtype=dtype).eval().model
    ours = EPVLM.from_pretrained(checkpoint.folder, device="cpu", dtype=dtype)
    view = ours.look(noise(90, 120))
    ids, positions = ours.prompt(view, QUESTION)
    with torch.inference_mode():
        z = ours.vit.patch_embed(view.patches.to(dtype))
        theirs.visual.patch_embed = torch.nn.Identity()
        features = theirs.visual(z, torch.tensor([view.keep.shape])).pooler_output
        ours.vit.patch_embed = torch.nn.Identity()
        assert torch.equal(ours.vit(z[None], view.keep)[0], features)
        H_q = ours.llm.embed(ids[None])
        hidden = theirs.language_model(inputs_embeds=H_q, position_ids=positions[:, None]).last_hidden_state
        assert torch.equal(ours.llm(H_q, positions), hidden)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr"])
def test_image_modes(checkpoint, mode):
    assert_parity(*checkpoint, noise(70, 60, mode))


def test_transparent_palette(checkpoint, tmp_path):
    noise(70, 60, "P").save(tmp_path / "palette.png", transparency=7)
    assert_parity(*checkpoint, Image.open(tmp_path / "palette.png"))


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "specials"])
def test_scripts(checkpoint, name):
    assert_parity(*checkpoint, noise(56, 84), TEXTS[name])


# Packing: the packed model is the dense model with what was dropped masked out of attention


def dense(model: EPVLM, image: Image.Image) -> View:
    return model.look(image, None, Options(min_pixels=784))  # one group is allowed


def view_of(model: EPVLM, image: Image.Image, mask: Tensor, cell="group") -> View:
    """The view whose mask by cell is `mask`, by the public way: an event map, and the budget that fits it."""
    side, cells, kept = 28 if cell == "group" else 14, mask.numel(), int(mask.sum())
    if kept == cells:
        return dense(model, image)
    E_v = mask[0].repeat_interleave(side, 0).repeat_interleave(side, 1).numpy().astype(np.int64)
    options = Options((cells - kept - 0.5) / (cells - 1), cell, min_pixels=784)
    view = model.look(image, E_v, options)
    assert torch.equal(view.groups if cell == "group" else view.keep, mask)
    return view


def picture(mask: Tensor, side: int, seed=0) -> Image.Image:
    return noise(side * mask.shape[2], side * mask.shape[1], seed=seed)


def kept_of(model: EPVLM, ids: Tensor, groups: Tensor) -> Tensor:
    """Which of the dense prompt's tokens (L,) remain."""
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[ids == model.image_pad] = groups.flatten()
    return kept


@given(patch_masks(), st.integers(0, 99))
def test_packed_patches(checkpoint, keep, seed):
    """Eq. 7: those whose mask is True, group after group."""
    model, image, wanted = checkpoint.model, picture(keep, 14, seed), []
    for n in range(keep.numel()):
        group, within = divmod(n, 4)
        i, j = 2 * (group // (keep.shape[2] // 2)) + within // 2, 2 * (group % (keep.shape[2] // 2)) + within % 2
        wanted += [n] if keep[0, i, j] else []
    packed = packed_patches(Clip([image]), keep, model.vit.config, model.image_config)
    assert torch.equal(packed, dense(model, image).patches[wanted])


@given(group_masks(st.integers(2, 6)), st.integers(0, 99))
def test_packed_vit(checkpoint, groups, seed):
    """Eq. 8 and 9: the visual tokens are those of the dense transformer in which dropped patches are no keys."""
    _, theirs, model = checkpoint
    image = picture(groups, 28, seed)
    view = view_of(model, image, groups)
    assert len(view.patches) == 4 * groups.sum()
    with torch.inference_mode():
        expected = masked_vision(theirs, dense(model, image).patches, view.keep)
        assert_close(model.vit(view.patches[None], view.keep)[0], expected)


@given(patch_masks(), st.integers(0, 99))
def test_broken_group(checkpoint, keep, seed):
    """Eq. 10 with the paper's 14-pixel cells: a group survives if any of its patches does, and what it lacks enters the
    merger as zeros in its own slot."""
    _, theirs, model = checkpoint
    image = picture(keep, 14, seed)
    patches = packed_patches(Clip([image]), keep, model.vit.config, model.image_config)
    with torch.inference_mode():
        expected = masked_vision(theirs, dense(model, image).patches, keep)
        assert_close(model.vit(patches[None], keep)[0], expected)


@given(patch_masks().filter(lambda keep: keep.numel() > 4))
def test_patch_cells(checkpoint, keep):
    """There is a token for each group of which a patch is kept."""
    model = checkpoint.model
    view = view_of(model, picture(keep, 14), keep, cell="patch")
    for _, u, v in np.ndindex(*view.groups.shape):
        assert view.groups[0, u, v] == keep[0, 2 * u : 2 * u + 2, 2 * v : 2 * v + 2].any()
    assert len(view.patches) == keep.sum()
    ids, _ = model.prompt(view, QUESTION)
    assert (ids == model.image_pad).sum() == view.groups.sum()
    assert torch.isfinite(model.logits(view, QUESTION)).all()


@given(group_masks(st.integers(2, 5)), st.integers(0, 99))
@settings(max_examples=25)
def test_packed_decoder(checkpoint, groups, seed):
    """Positions are the dense ones, packed; the logits are those of the dense decoder without the dropped keys."""
    _, theirs, model = checkpoint
    image = picture(groups, 28, seed)
    view = view_of(model, image, groups)
    (ids, positions), (dense_ids, dense_positions) = (
        model.prompt(each, QUESTION) for each in (view, dense(model, image))
    )
    kept = kept_of(model, dense_ids, groups)
    assert torch.equal(positions, dense_positions[:, kept]) and torch.equal(ids, dense_ids[kept])  # as Eq. 8
    with torch.inference_mode():
        embeddings = model.llm.embed(dense_ids)
        embeddings[kept] = model.embed(view, ids)[0]
    expected = masked_decoder(theirs, embeddings.clone(), dense_positions, kept)
    assert_close(model.logits(view, QUESTION), expected)


@given(group_masks(st.integers(2, 4)))
@settings(max_examples=15)
def test_dense_length(checkpoint, groups):
    """Answer tokens stand after the DENSE image: so they do in transformers with dropped keys masked."""
    _, theirs, model = checkpoint
    model = EPVLM(model.checkpoint)
    model.ends = set()  # so that four tokens come
    image = picture(groups, 28)
    view = view_of(model, image, groups)
    (ids, _), (dense_ids, dense_positions) = (model.prompt(each, QUESTION) for each in (view, dense(model, image)))
    tokens = torch.tensor(list(model.tokens(view, QUESTION, Sampling(4))))
    whole = torch.cat((dense_ids, tokens[:3]))
    kept = kept_of(model, whole, groups)
    delta = int(dense_positions.max()) + 1 - len(dense_ids)  # transformers' rope_delta of the DENSE prompt
    after = (torch.arange(3) + len(dense_ids) + delta).expand(3, -1)
    with torch.inference_mode():
        embeddings = model.llm.embed(whole)
        embeddings[kept] = torch.cat((model.embed(view, ids)[0], model.llm.embed(tokens[:3])))
    positions = torch.cat((dense_positions, after), dim=1)
    logits = masked_decoder(theirs, embeddings.clone(), positions, kept)
    assert torch.equal(logits[len(ids) - 1 :].argmax(-1), tokens)


@pytest.mark.parametrize("cell", ["group", "patch"])
@pytest.mark.parametrize("rule", ["exact", "literal"])
def test_sparsity_zero(checkpoint, cell, rule):
    """Plain Qwen2-VL, bit for bit."""
    model, events = checkpoint.model, np.random.default_rng(0).integers(0, 9, (120, 90))
    plain, masked = model.look(noise(90, 120)), model.look(noise(90, 120), events, Options(0, cell, rule))
    assert masked.keep.all() and masked.groups.all() and masked.S is not None
    assert torch.equal(model.logits(masked, QUESTION), model.logits(plain, QUESTION))
    some = Sampling(6)
    assert list(model.tokens(masked, QUESTION, some)) == list(model.tokens(plain, QUESTION, some))


def test_dropped_are_never_computed(checkpoint):
    """What enters the first and the last module is the kept patches and tokens, no more."""
    model, mask, seen = checkpoint.model, torch.zeros(1, 5, 4, dtype=torch.bool), {}
    mask[0, 1, 2] = mask[0, 4, 0] = True
    view = view_of(model, picture(mask, 28), mask)
    modules = {"embed": model.vit.patch_embed, "block": model.vit.blocks[-1], "merger": model.vit.merger.mlp,
               "layer": model.llm.model["layers"][-1]}  # fmt: skip
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].shape[1]}))
        for name, module in modules.items()
    ]
    L = len(model.logits(view, QUESTION))
    for hook in hooks:
        hook.remove()
    assert seen == {"embed": 8, "block": 8, "merger": 2, "layer": L}
    assert L == len(model.prompt(dense(model, picture(mask, 28)), QUESTION)[0]) - 18


# Questions about a view that was read


def scores_and_tokens(model: EPVLM, view: View, question: str) -> tuple[Tensor, list[int]]:
    """Of the first four tokens of an answer."""
    scores = []
    hook = model.llm.register_forward_hook(lambda _, given, hidden: scores.append(model.llm.logits(hidden[0, -1])))
    tokens = list(model.tokens(view, question, Sampling(4)))
    hook.remove()
    return torch.stack(scores), tokens


@given(
    SPARSITIES,
    st.sampled_from([None, "", "Be brief."]),
    st.lists(st.sampled_from(["", "Hi", QUESTION, "x" * 90]), min_size=1, max_size=3),
)
def test_read(checkpoint, sparsity, system, questions):
    """Each question gets the scores and the tokens of a run of its own, and none writes to what was read."""
    model, E_v = checkpoint.model, np.random.default_rng(0).integers(0, 3, (84, 112))
    view = model.look(noise(112, 84), E_v, Options(sparsity, system=system))
    read = model.read(view)
    held, end = read.cache.held.clone(), int((model.prompt(view, "")[0] == model.image_pad).nonzero().max()) + 1
    for question in questions:
        (alone, tokens), (after, same) = (scores_and_tokens(model, each, question) for each in (view, read))
        assert_close(after, alone)
        assert same == tokens
    assert torch.equal(read.cache.held, held) and read.cache.filled == end and view.cache is None


def test_read_once(checkpoint):
    """The image is read once; then the text after it alone is."""
    model, calls, read = checkpoint.model, [], []
    hooks = [
        model.vit.register_forward_hook(lambda *_: calls.append(1)),
        model.llm.model["layers"][0].register_forward_pre_hook(lambda _, given: read.append(given[0].shape[1])),
    ]
    view = model.read(model.look(noise(112, 84)))
    for question in (QUESTION, "The red circle moves.", "left of the small square?"):
        next(model.tokens(view, question, Sampling(1)))
        assert read[-1] == len(model.prompt(view, question)[0]) - view.cache.filled
    for hook in hooks:
        hook.remove()
    assert len(calls) == 1 and len(read) == 4


# FLOPs against a count of what the modules do, on the meta device


def counted(work) -> int:
    """FLOPs of the products in `work`, attention as plain products: the counter sees nothing of fused kernels."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@st.composite
def visions(draw) -> VisionConfig:
    heads, depth, ratio, hidden = (draw(st.integers(1, high)) for high in (3, 3, 4, 70))
    return VisionConfig(depth, 4 * heads * draw(st.integers(1, 5)), heads, ratio, hidden)


@st.composite
def decoders(draw) -> DecoderConfig:
    section = tuple(draw(st.integers(1, 3)) for _ in range(3))
    shared, kv_heads, layers = (draw(st.integers(1, 3)) for _ in range(3))
    heads, wide, vocabulary = shared * kv_heads, draw(st.integers(1, 90)), draw(st.integers(1, 300))
    return DecoderConfig(vocabulary, 2 * sum(section) * heads, wide, layers, heads, kv_heads, mrope_section=section,
                         tie_word_embeddings=draw(st.booleans()))  # fmt: skip


@given(visions(), patch_masks())
def test_flops_of_vit(config, keep):
    """For whole and for broken groups."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    patches, groups = int(keep.sum()), int(keep.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).any(4).any(2).sum())
    assert counted(lambda: model(torch.empty(1, patches, 1176), keep)) == sum(model.flops([patches], groups))


@given(decoders(), st.integers(1, 40), st.data())
def test_flops_of_llm(config, tokens, data):
    scored = data.draw(st.integers(1, tokens))
    with torch.device("meta"):
        decoder = Decoder(config)

    def work():
        hidden = torch.empty(1, tokens, config.hidden_size)
        cache = data.draw(st.sampled_from([None, KVCache(config, tokens + 1, like=hidden)]))
        decoder.logits(decoder(hidden, torch.arange(tokens).expand(3, -1), cache, scored))

    assert counted(work) == sum(decoder.flops(tokens, scored))


def test_flops(checkpoint):
    """With half of 12 groups kept, and dense; only the last position is scored."""
    model, E_v = checkpoint.model, np.random.default_rng(0).random((112, 84))
    half, whole = (model.look(noise(84, 112), E_v, Options(sparsity)) for sparsity in (0.5, 0.0))
    assert model.flops(half, "What?")[1] == model.flops(whole, "What?")[0] == model.flops(whole, "What?")[1]
    for view in (half, whole):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            next(model.tokens(view, "What?", Sampling(1)))
        assert model.flops(view, "What?")[0] == counter.get_total_flops()


# The README


README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = [ROOT / folder / "README.md" for folder in (".", "examples", "tests")]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The cells of the table whose first column has that heading, row by row."""
    rows = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)[1]
    return [row.strip("| ").split(" | ") for row in rows.splitlines()]


EQUATIONS = table("Eq.")


def cited(source: str) -> set[int]:
    """The equations a text cites: "Eq. 3", "Eq. 7 and 8", "Eq. 8, 9, 10", "Eq. 5 to 7"."""
    numbers = set()
    for listed in re.findall(r"Eq\. (\d+(?:(?:, | and | to )\d+)*)", source):
        numbers |= set(map(int, re.findall(r"\d+", listed)))
        for first, last in re.findall(r"(\d+) to (\d+)", listed):
            numbers |= set(range(int(first), int(last)))
    return numbers


def assert_test(file: str, name: str) -> None:
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file} has no {name}"


def test_equations():
    assert [row[0] for row in EQUATIONS] == [str(number) for number in range(1, 11)]


@pytest.mark.parametrize("row", EQUATIONS, ids=[f"eq{row[0]}" for row in EQUATIONS])
def test_equation(row):
    """The functions named for an equation exist and cite it, and so do the tests."""
    *_, places, tests = row
    assert re.fullmatch(r"(`\w+\.py`: `[\w.]+`(, `[\w.]+`)*(; |$))+", places), places
    for place in places.split("; "):
        file, *functions = re.findall(r"`([\w.]+)`", place)
        assert (ROOT / file).is_file()
        for function in functions:
            found = importlib.import_module(file.removesuffix(".py"))
            for part in function.split("."):
                found = getattr(found, part)
            assert int(row[0]) in cited(inspect.getsource(found)), f"{function} does not cite Eq. {row[0]}"
    for test in tests.split(", "):
        assert_test(*re.fullmatch(r"`(?:tests/)?(test_\w+\.py)::(test_\w+)`", test).groups())


@pytest.mark.parametrize("readme", READMES, ids=["root", "examples", "tests"])
def test_names(readme):
    """Tests, scripts and links that a README names exist."""
    text = readme.read_text(encoding="utf-8")
    for file, name in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", text):
        assert_test(file, name)
    for script in re.findall(r"python ((?:\w+/)*\w+\.py)", text):
        assert (ROOT / script).is_file(), script
    for link, anchor in re.findall(r"\]\((?!\w+:)([^)#]*)#?([^)]*)\)", text):
        target = readme.parent / link if link else readme
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{link}#{anchor}"


def test_worked_example():
    """The lines after >>> give what stands below them."""
    (block,) = (block for block in BLOCKS if ">>> " in block)
    example = doctest.DocTestParser().get_doctest(block, {}, "README", "README.md", 0)
    assert {5, 6, 7, 8} <= cited(block) and len(example.examples) > 10
    printed = []
    failed, tried = doctest.DocTestRunner().run(example, out=printed.append)
    assert (failed, tried) == (0, len(example.examples)), "".join(printed)


def test_python(tmp_path, monkeypatch, capsys):
    """The other lines of Python run, and print what stands beside them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names, promised = {}, []
    for block in BLOCKS:
        if ">>> " not in block:
            exec(block, names)
            promised += re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)
    out = capsys.readouterr().out.splitlines()
    assert promised and set(promised) <= set(out)
    assert "red" in out and "yellow" in out


@pytest.mark.parametrize("kind", ["csv", "h5", "pickled"])
def test_conversions(tmp_path, monkeypatch, kind):
    """The lines that convert files keep the events."""
    monkeypatch.chdir(tmp_path)
    t, x, y, p = rows = np.array([[1000, 2000, 4000], [5, 3, 300], [7, 8, 9], [1, 0, 1]])
    if kind == "csv":
        np.savetxt("events.csv", rows.T, delimiter=",", header="t,x,y,p", fmt="%d")
    elif kind == "pickled":
        np.save("pickled.npy", {"x": x, "y": y, "t": t, "p": p}, allow_pickle=True)
    else:
        pytest.importorskip("hdf5plugin")
        with pytest.importorskip("h5py").File("events.h5", "w") as file:
            for name, column in zip("txyp", rows, strict=True):
                file[f"events/{name}"] = column
    (command,) = (line for line in re.findall(r'python -c "(.*)"', README) if kind in line)
    exec(command, {})
    (converted,) = (file for file in ("events.npy", "events.npz") if Path(file).is_file())
    events = read_events(converted)
    assert np.array_equal(np.stack((events.t, events.x, events.y, events.p)), rows)


def test_first_command(monkeypatch, capsys):
    """The first command answers as the README says, for as many FLOPs."""
    monkeypatch.chdir(ROOT)
    command = re.search(r"python epvlm\.py (.*--model examples/tiny.*)", README)[1]
    assert main([*shlex.split(command), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert f"`{out.strip()}`" in README and f"    {err.splitlines()[0]}\n" in README


def test_picture():
    """What is said of it."""
    model = EPVLM.from_pretrained(ROOT / "examples" / "tiny", device="cpu")
    view = model.look(ROOT / "examples" / "scene.png", ROOT / "examples" / "events.npy")
    moving, kept = view.S > 0, view.groups.numpy()
    assert (moving.sum(), kept.sum(), moving.size) == (13, 32, 64) and kept[moving].all()
    assert re.search(r"Of\s+the\s+image's\s+64\s+cells,\s+thirteen\s+have\s+events;\s+the\s+other\s+19\b", README)


def test_options(capsys):
    """The table has each flag once, and the fields of Options and Sampling with their defaults and choices."""
    rows = {re.fullmatch(r"`--([a-z-]+)`", flag)[1].replace("-", "_"): (*cells,) for flag, *cells in table("option")}
    assert len(rows) == len(table("option"))
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert set(rows) == {flag.replace("-", "_") for flag in flags}
    for field in (*fields(Options), *fields(Sampling)):
        meaning, default = rows[field.name]
        assert default if field.default is None else default.strip("`") == str(field.default), field.name
        choices = () if "metavar" in field.metadata else field.metadata.get("choices", ())  # 24 orders would be many
        assert all(f"`{choice}`" in meaning for choice in choices), field.name
