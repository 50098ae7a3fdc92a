"""From an image to visual tokens: settings, sizes, files, patches, and the layers of the vision transformer."""

import re
import types
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import eager_attention_forward

import rope2d
import tiny
import vit
from oracles import assert_close, clip_rows
from strategies import patch_masks, times
from vit import (
    Clip,
    ImageConfig,
    Merger,
    VisionConfig,
    VisionTransformer,
    packed_patches,
    patchify,
    read_image,
    smart_resize,
)

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


# Clips

FRAMES = [tiny.noise(56, 28, seed) for seed in range(9)]


def test_edges_example():
    """The docstring's: windows of two frames, two frames and one."""
    clip = Clip(FRAMES[:5], [0, 40, 80, 120, 160])
    assert clip.moments == 3 and clip.edges.tolist() == [-20, 60, 140, 180]
    assert clip.seconds.tolist() == [[[80e-6]], [[80e-6]], [[40e-6]]]


@given(times(min_size=2))
def test_edges(times):
    """Windows touch halfway between two moments, hold their own frames alone, and go on for half a frame's time."""
    clip = Clip(FRAMES[: len(times)], times)
    edges, F = clip.edges, len(times)
    assert edges.shape == (clip.moments + 1,) and clip.moments == (F + 1) // 2
    for moment in range(clip.moments):
        inside = (edges[moment] <= times) & (times <= edges[moment + 1])
        assert inside.nonzero()[0].tolist() == [n for n in (2 * moment, 2 * moment + 1) if n < F]
    assert edges[1:-1].tolist() == [(a + b) / 2 for a, b in zip(times[1:-1:2], times[2::2], strict=True)]
    ends = times[0] - (times[1] - times[0]) / 2, times[-1] + (times[-1] - times[-2]) / 2
    np.testing.assert_allclose(edges[[0, -1]], ends, rtol=1e-12)
    assert (clip.seconds > 0).all() and clip.seconds.shape == (clip.moments, 1, 1)
    np.testing.assert_allclose(clip.seconds.ravel(), np.diff(edges) / 1e6, rtol=5e-3)  # three digits


@pytest.mark.parametrize("fps", [24, 25, 30000 / 1001, 30, 60])
def test_windows_of_one_length_are_equal(fps):
    """Also from a list of times that were rounded: equal counts in them tie."""
    clip = Clip.at_rate(FRAMES[:8], fps)
    rounded = Clip(FRAMES[:8], clip.times.round())
    assert len({*clip.seconds.ravel().tolist(), *rounded.seconds.ravel().tolist()}) == 1


def test_grey_frames_are_scaled_alike():
    """One of 12 bits among frames of 10 would be four times as dark."""
    frames = [
        Image.fromarray(np.linspace(0, most, 28 * 56).astype(np.uint16).reshape(28, 56)) for most in (1000, 900, 1100)
    ]
    with pytest.warns(UserWarning, match="grey values up to 1000, read as 10 bits") as caught:
        Clip(frames[:2], [0, 1]).pixels(0, 28, 56)
    assert len({str(warning.message) for warning in caught}) == 1
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"frame 3: .* of 12 bits, the first .* of 10 bits"):
        Clip(frames, [0, 1, 2]).pixels(1, 28, 56)


@given(times(), st.data())
def test_within(times, data):
    """The frames of a window, both ends included; the windows of their moments stay inside it."""
    start, end = sorted(data.draw(st.tuples(*[st.sampled_from([*times, 0.5, times[0] - 1, times[-1] + 1])] * 2)))
    inside = [n for n, time in enumerate(times) if start <= time <= end]
    clip = Clip(FRAMES[: len(times)], times)
    if not inside:
        with pytest.raises(ValueError, match=r"no frame from .* they go from .*; change window"):
            clip.within((start, end))
        return
    part = clip.within((start, end))
    assert part.times.tolist() == times[inside].tolist() and part.window == (start, end)
    assert part.frames == [FRAMES[n] for n in inside]
    if len(inside) < 2:
        assert part.edges.tolist() == [start, end] and part.seconds == 1
        return
    whole = Clip(part.frames, part.times).edges
    assert part.edges.tolist() == [min(max(edge, start), end) for edge in whole] and (part.seconds > 0).all()
    assert clip.within(None).edges.tolist() == clip.edges.tolist()


def test_without_times_of_their_own():
    """A still image, and a clip of one frame, see all events, or those of the window; frames at a rate begin at 0."""
    for clip in (Clip(FRAMES[:1]), Clip(FRAMES[:1], [7.0])):
        assert clip.moments == 1 and clip.edges is None and clip.seconds == 1
        assert clip.within((0, 50)).edges.tolist() == [0, 50] and clip.within((0, 50)).seconds == 1
    assert Clip.at_rate(FRAMES[:3], 25).times.tolist() == [0, 40_000, 80_000]
    for fps in (0, -1, float("nan"), float("inf"), 1e-9):
        with pytest.raises(ValueError, match=r"fps .*: give 0.001 to 1000000"):
            Clip.at_rate(FRAMES, fps)


@pytest.mark.parametrize(
    "count, times",
    [(2, [0]), (1, [0, 1]), (0, []), (2, [1, 1]), (3, [0, 2, 1]), (2, [0, np.nan]), (2, [0, np.inf]), (1, [np.nan]),
     (1, [[0]]), (2, [[0], [1]]), (2, 5), (2, None), (0, None)],
)  # fmt: skip
def test_times_that_do_not_fit(count, times):
    """As many as the frames, finite, rising; only a single frame may have none."""
    with pytest.raises(ValueError, match=rf"{count} frames, \d times; give as many, and rising times"):
        Clip(FRAMES[:count], times)


def test_frames_of_another_size():
    clip = Clip([*FRAMES[:3], tiny.noise(28, 56)], range(4))
    assert clip.pixels(0, 28, 56).shape == (2, 28, 56, 3)
    with pytest.raises(ValueError, match=r"frame 4: 28 x 56 pixels of 8 bits, the first has 56 x 28"):
        clip.pixels(1, 28, 56)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_resampling(count):
    """Pillow's filter for a still image, torch's for a clip, at most two levels apart. A still image and the last frame
    of an odd clip are shown twice."""
    clip = Clip(FRAMES[:count], range(count))
    for moment in range(clip.moments):
        shown, numbers = clip.pixels(moment, 84, 140), (2 * moment, min(2 * moment + 1, count - 1))
        for pixels, number in zip(shown, numbers, strict=True):
            still = Clip([FRAMES[number]]).pixels(0, 84, 140)
            pillow = np.array(FRAMES[number].resize((140, 84), Image.Resampling.BICUBIC))
            assert torch.equal(still, torch.from_numpy(pillow).expand(2, -1, -1, -1))
            levels = torch.from_numpy(np.array(FRAMES[number])).permute(2, 0, 1)[None]
            levels = F.interpolate(levels, (84, 140), mode="bicubic", antialias=True)
            assert torch.equal(pixels, levels[0].permute(1, 2, 0))
            assert 0 < (pixels.int() - still[0].int()).abs().max() <= 2


def test_a_clip_of_one_frame():
    """Without resizing it has the rows of a still image but for the last bit, which is as in transformers."""
    keep, config = torch.ones(1, 2, 4, dtype=torch.bool), (VisionConfig(), ImageConfig())
    clip, still = (packed_patches(each, keep, *config) for each in (Clip(FRAMES[:1], [0]), Clip(FRAMES[:1])))
    assert 0 < (clip - still).abs().max() < 1e-6
    assert torch.equal(clip, clip_rows(FRAMES[:1], 28, 56, ImageConfig()))


@given(patch_masks(st.integers(1, 4)), st.integers(0, 1), st.booleans())
def test_read_when_needed(keep, odd, resized):
    """A moment that keeps nothing is not read, and pixels are held a moment at a time."""
    count, (height, width) = 2 * len(keep) - odd, (14 * side for side in keep.shape[1:])
    read, held, pixels = set(), [], Clip.pixels

    def reading(n):
        read.add(n)
        return tiny.noise(width + resized, height, n)

    def holding(*given):
        assert all(storage.expired() for storage in held)
        X_t = pixels(*given)
        held.append(StorageWeakRef(X_t.untyped_storage()))
        return X_t

    clip = Clip([partial(reading, n) for n in range(count)], range(count))
    assert clip.size == (width + resized, height) and read == {0}  # the size of all is that of the first
    read.clear()
    with mock.patch.object(Clip, "pixels", holding):
        packed = packed_patches(clip, keep, VisionConfig(), ImageConfig())
    assert len(packed) == keep.sum() and all(storage.expired() for storage in held)
    assert read == {n for n in range(1, count) if keep[n // 2].any()}  # the first is not read a second time


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


def test_moments_of_a_clip():
    """Each is computed as if alone: attention stays within a moment."""
    model, keep = VisionTransformer(VisionConfig(**SMALL)), torch.rand(4, 4, 6) < 0.6
    keep[0, 0, 0], keep[1] = True, False
    n_t = keep.sum(dim=(1, 2)).tolist()
    patches = torch.randn(1, sum(n_t), 1176)
    with torch.inference_mode():
        alone = [model(part, keep[n : n + 1]) for n, part in enumerate(patches.split(n_t, dim=1)) if n_t[n]]
        assert_close(model(patches, keep), torch.cat(alone, dim=1))


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
