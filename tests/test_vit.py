"""From an image to visual tokens: settings, sizes, files, patches, and the layers of the vision transformer."""

import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward

import rope2d
import tiny
import vit
from vit import ImageConfig, Merger, VisionConfig, VisionTransformer, patchify, read_image, smart_resize

SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 8}
WIDE_GREY = ["I;16", "I;16B", "I"]  # Pillow's modes of it

# Sizes


@pytest.mark.parametrize("size", [(28, 5614), (5614, 28), (0, 0), (0, 28)])
def test_sizes_of_no_image(size):
    with pytest.raises(ValueError, match=rf"{size[1]} x {size[0]} pixels has sides over 200"):
        smart_resize(*size, 28, ImageConfig())


def test_limits_that_cross():
    with pytest.raises(ValueError, match=r"min_pixels 9000 .*max_pixels,? 8000"):
        smart_resize(28, 28, 28, ImageConfig(min_pixels=9000, max_pixels=8000))
    assert smart_resize(28, 28, 28, ImageConfig(min_pixels=7056, max_pixels=7056)) == (84, 84)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((42, 70), (56, 56)),
        ((14, 300), (28, 280)),
        ((112, 112), (112, 112)),
        ((5, 9), (56, 84)),
        ((28, 5600), (28, 5600)),
    ],
)
def test_sizes_round_to_even(size, expected):
    assert smart_resize(*size, 28, ImageConfig(max_pixels=12845056)) == expected


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_sizes(height, width):
    """Those of transformers, whole groups."""
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="over 200"):
            smart_resize(height, width, 28, ImageConfig())
        return
    h, w = smart_resize(height, width, 28, ImageConfig())
    assert (h, w) == theirs_resize(height, width, 28, 3136, 1003520)
    assert h % 28 == w % 28 == 0


@pytest.mark.parametrize("size, limit", [((30, 6000), 78400), ((882, 1106), 1003520)])
def test_sizes_at_the_limit(size, limit):
    assert smart_resize(*size, 28, ImageConfig(max_pixels=limit)) == theirs_resize(*size, 28, 3136, limit)


# Reading an image


def pixels(image) -> np.ndarray:
    shown = read_image(image)
    assert shown.mode == "RGB"
    return np.asarray(shown)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("mode", WIDE_GREY)
def test_wide_grey(bits, mode):
    """Scientific cameras: scaled by the bits in use, with one warning."""
    grey = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    if mode == "I":
        image = Image.fromarray(grey.astype(np.int32))
    else:
        image = Image.frombytes(mode, (64, 64), grey.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    assert image.mode == mode
    with pytest.warns(UserWarning, match=f"the image: grey values up to {2**bits - 1}, read as {bits} bits") as warned:
        shown = pixels(image)
    assert len(warned) == 1 and shown.min() == 0 and shown.max() == 255
    assert np.array_equal(shown[..., 0], [[int(v) * 255 // (2**bits - 1) for v in row] for row in grey])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_wide_grey_at_the_limit(bits):
    """The largest value of so many bits is white; one more takes the next number of bits."""
    for largest, white in ((2**bits - 1, True), (2**bits, False)):
        if largest > 65535:
            continue
        with pytest.warns(UserWarning, match=f"up to {largest}, read as {bits if white else bits + 2} bits"):
            assert (pixels(Image.fromarray(np.full((28, 28), largest, np.uint16))).max() == 255) == white


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_wide_grey_of_a_file(tmp_path, suffix):
    """A PGM opens as 32-bit integers, which Pillow's own conversion clips to white."""
    grey, path = np.arange(56 * 56, dtype=np.uint16).reshape(56, 56) * 20, tmp_path / f"grey.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 56 56 65535\n" + grey.astype(">u2").tobytes())
    else:
        Image.fromarray(grey).save(path)
    with pytest.warns(UserWarning, match=rf"grey\.{suffix}: .* read as 16 bits"):
        assert np.array_equal(pixels(path)[..., 0], grey // 257)


@pytest.mark.parametrize("value", [70000, 65536, -1, 0.5])
def test_grey_of_unknown_range(value):
    grey = np.full((56, 56), value, dtype=np.float32 if value == 0.5 else np.int32)
    with pytest.raises(ValueError, match=r"unknown range.*8-bit PNG"):
        read_image(Image.fromarray(grey))


def test_transparency_is_white(tmp_path):
    clear = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    clear.putpixel((1, 0), (10, 20, 30, 255))
    assert pixels(clear).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    palette = Image.new("P", (2, 1), 7)
    palette.putpalette([*range(21), 10, 20, 30])
    palette.putpixel((1, 0), 0)
    palette.save(tmp_path / "palette.png", transparency=7)
    assert pixels(tmp_path / "palette.png").tolist() == [[[255, 255, 255], [0, 1, 2]]]


def test_upright(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (120, 60, 3), dtype=np.uint8)
    upright, exif = Image.fromarray(values), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to view
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "side.png"), values)


@pytest.fixture
def big(tmp_path):
    tiny.noise(300, 300).save(tmp_path / "big.png")
    return tmp_path / "big.png"


def test_bomb(big, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"big\.png: cannot be read as an image"):
        read_image(big)


def test_broken_chunk(big):
    data = big.read_bytes()
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    big.write_bytes(data[:second] + b"\x00\x01\x02\x03" + data[second + 4 :])
    with pytest.raises(ValueError, match=r"big\.png: cannot be read as an image"):
        read_image(big)


@pytest.mark.parametrize(
    "name, message",
    [("absent.png", "no such file"), ("", "no such file"), ("events.npy", "cannot be read as an image")],
)
def test_no_image(tmp_path, name, message):
    np.save(tmp_path / "events.npy", np.zeros(3))
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))}: .*{message}.*; give "):
        read_image(tmp_path / name)


def test_an_array_is_not_printed():
    with pytest.raises(ValueError, match=r"^the image: .*ndarray.*; give an 8-bit PNG or JPEG$") as caught:
        read_image(np.full((99, 99, 3), 77, np.uint8))
    assert "77" not in str(caught.value) and "\n" not in str(caught.value)


# Patches


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_patchify(groups_h, groups_w, seed):
    """Group after group, 2 x 2 patches in each, 14 x 14 pixels of two frames in each, colour before frame."""
    shape = 2, 28 * groups_h, 28 * groups_w, 3
    X_t = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    patches, n = patchify(X_t), 0
    for top, left in np.ndindex(groups_h, groups_w):
        for i, j in np.ndindex(2, 2):
            y, x = 28 * top + 14 * i, 28 * left + 14 * j
            assert torch.equal(patches[n], X_t[:, y : y + 14, x : x + 14].permute(3, 0, 1, 2))
            n += 1
    assert patches.dtype == torch.uint8 and n == len(patches)


# The vision transformer


def test_norms():
    model = VisionTransformer(VisionConfig(**SMALL))
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}


def test_theta_of_the_model():
    one, other = (VisionTransformer(VisionConfig(**SMALL, rope_theta=theta)) for theta in (10000.0, 10.0))
    other.load_state_dict(one.state_dict())
    patches, keep = torch.randn(1, 16, 1176), torch.ones(1, 4, 4, dtype=torch.bool)
    assert not torch.equal(one(patches, keep), other(patches, keep))


def test_rotates_in_float32(monkeypatch):
    """Also where the weights are bfloat16."""
    model, seen = VisionTransformer(VisionConfig(**SMALL)).bfloat16(), set()
    monkeypatch.setattr(vit, "rotate", lambda x, cos, sin: (seen.add(cos.dtype), rope2d.rotate(x, cos, sin))[1])
    model(torch.randn(1, 4, 1176).bfloat16(), torch.ones(1, 2, 2, dtype=torch.bool))
    assert seen == {torch.float32}


def test_images_of_a_batch():
    """Each is computed as if alone."""
    model, keep = VisionTransformer(VisionConfig(**SMALL)), torch.tensor([[[1, 0, 1, 1], [0, 1, 1, 1]]]).bool()
    patches = torch.randn(3, 6, 1176)
    with torch.inference_mode():
        alone = torch.cat([model(part, keep) for part in patches.split(1)])
        torch.testing.assert_close(model(patches, keep), alone)


def test_merger_example():
    """The docstring's: with patches a and d of a group kept, its rows are a, 0, 0, d; a group without any is gone."""
    merger, (a, d) = Merger(VisionConfig(**SMALL)), torch.randn(2, 32)
    rows = torch.tensor([False] * 4 + [True, False, False, True])
    with torch.inference_mode():
        given = merger.ln_q(torch.stack((a, torch.zeros(32), torch.zeros(32), d)))
        expected = merger.mlp(given.flatten())
        torch.testing.assert_close(merger(torch.stack((a, d))[None], rows), expected[None, None])


class Largest(TorchDispatchMode):
    """Remembers the most values that any operation returned."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else [found]:
            if isinstance(part, torch.Tensor) and part.untyped_storage().nbytes():
                self.values = max(self.values, part.numel())
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_of_all_pairs(dtype):
    """Of 6400 patches, 41 million pairs, on the CPU with any number of threads up to 8."""
    model = VisionTransformer(VisionConfig(**SMALL)).to(dtype)
    keep = torch.ones(1, 80, 80, dtype=torch.bool)
    with torch.inference_mode(), Largest() as largest:
        model(torch.zeros(1, 6400, 1176, dtype=dtype), keep)
    assert 6400 * 1000 < largest.values <= 6400 * 1176 + 8 * vit.SCORES
    assert largest.values < 6400**2 / 2


# What makes it faster on a CPU


@pytest.mark.parametrize("patches", [1, 3, 64, 700])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_attend(monkeypatch, patches, spread):
    """In bfloat16, over blocks of several sizes: as close to float64 as transformers' eager attention."""
    torch.manual_seed(patches)
    q, k, v = (torch.randn(2, 3, patches, 80) for _ in range(3))
    q, k, v = (part.bfloat16() for part in (q * spread, k, v))
    true = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    module = types.SimpleNamespace(training=False, num_key_value_groups=1)
    eager, _ = eager_attention_forward(module, q, k, v, None, 80**-0.5)
    error = (eager.transpose(1, 2) - true).pow(2).mean().sqrt()
    for scores in (1, 1000, 10**9):
        monkeypatch.setattr(vit, "SCORES", scores)
        ours = vit.attend(q, k, v)
        assert ours.dtype == torch.bfloat16 and ours.shape == true.shape
        assert (ours - true).pow(2).mean().sqrt() <= 1.1 * error + 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attend_in_other_dtypes(dtype):
    """Torch's fused kernel."""
    q, k, v = torch.randn(3, 2, 3, 37, 8).to(dtype)
    assert torch.equal(vit.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("rows", [1, 5, 12, 99])
def test_by_rows(monkeypatch, rows):
    monkeypatch.setattr(vit, "ROWS", rows)
    mlp, z = vit.MLP(VisionConfig(**SMALL)), torch.randn(2, 12, 32)
    torch.testing.assert_close(vit.by_rows(mlp, z), mlp(z))
