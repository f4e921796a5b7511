"""Any format to JPEG, as the training would see the picture."""

import io

import numpy as np
import pytest
from PIL import Image

from mmlm.errors import DataError
from mmlm.preparation.jpeg import encode_jpeg
from tests.preparation_helpers import picture


@pytest.mark.parametrize("format_name", ["GIF", "PNG", "BMP", "WEBP", "TIFF", "JPEG"])
def test_formats(format_name: str) -> None:
    data = encode_jpeg(picture(format_name), name="x", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (12, 10))
        assert np.abs(np.asarray(image, dtype=int) - (200, 30, 40)).max() <= 4


def test_alpha_is_dropped_and_the_first_frame_taken() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (10, 200, 30, 0)).save(buffer, format="PNG")
    with Image.open(io.BytesIO(encode_jpeg(buffer.getvalue(), name="x", quality=95))) as image:
        assert np.abs(np.asarray(image, dtype=int) - (10, 200, 30)).max() <= 4
    frames = [Image.new("P", (8, 8), 0), Image.new("P", (8, 8), 1)]
    for frame in frames:
        frame.putpalette([250, 0, 0, 0, 0, 250])
    buffer = io.BytesIO()
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(encode_jpeg(buffer.getvalue(), name="x", quality=95))) as image:
        assert np.abs(np.asarray(image, dtype=int) - (250, 0, 0)).max() <= 4


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", picture("PNG")[:45]])
def test_what_does_not_decode_is_named(data: bytes) -> None:
    with pytest.raises(DataError, match=r"covers/7.gif: the picture does not decode"):
        encode_jpeg(data, name="covers/7.gif", quality=95)
