"""Pictures of any format as JPEG files."""

import io
from pathlib import Path

from PIL import Image

from mmlm.errors import DataError
from mmlm.preparation.files import replacing

JPEG_MAGIC = b"\xff\xd8\xff"


def encode_jpeg(data: bytes, *, name: str, quality: int) -> bytes:
    """Decode a picture and encode it as JPEG.

    As the training reads pictures: first frame, alpha dropped, EXIF orientation ignored.

    Args:
        data: a file of any format that Pillow reads.
        name: of the picture, for messages.
        quality: of the JPEG, 1 to 95.

    Raises:
        DataError: the picture does not decode.
    """
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    except Exception as error:  # Pillow's plugins raise a dozen types on broken bytes
        raise DataError(f"{name}: the picture does not decode ({error})") from error
    return buffer.getvalue()


def write_image(path: Path, data: bytes) -> None:
    """Write a picture completely or not at all."""
    with replacing(path) as file:
        file.write(data)
