"""Of test_published.py, for test_vit.py: grey of more than 8 bits."""

import numpy as np
import pytest
from PIL import Image

from vit import read_image


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_wide_grey_is_scaled_by_the_bits_in_use(bits, mode):
    grey = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    if mode == "I":
        image = Image.fromarray(grey.astype(np.int32))
    else:
        image = Image.frombytes(mode, (64, 64), grey.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
    assert image.mode == mode
    with pytest.warns(UserWarning, match=f"up to {2**bits - 1}, read as {bits} bits") as warned:
        shown = np.asarray(read_image(image))
    assert len(warned) == 1 and shown.min() == 0 and shown.max() == 255
    assert np.array_equal(shown[..., 0], [[int(v) * 255 // (2**bits - 1) for v in row] for row in grey])


@pytest.mark.parametrize("value", [-1, 65536])
def test_grey_out_of_range_is_an_error(value):
    with pytest.raises(ValueError, match="unknown range"):
        read_image(Image.fromarray(np.full((28, 28), value, np.int32)))
