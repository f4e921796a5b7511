"""Pictures: open, squash to a square, normalise.

``Image.open(path).convert("RGB")`` (alpha dropped, first frame, EXIF orientation ignored, 16-bit
grey clipped at 255), resize to S x S with PIL's bicubic filter, / 255, ImageNet mean and standard
deviation, float32. Unlike the published loader, this one refuses truncated files and decompression
bombs; docs/data_format.md has a table of every kind of file.
"""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmlm.errors import DataError

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

# Mean and deviation that InternViT was trained with (ImageNet), one a channel.
IMAGE_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)

# [3, 256]: what a byte of each channel becomes.
_NORMALISED = (
    (np.arange(256, dtype=np.float32)[:, None] / np.float32(255) - IMAGE_MEAN) / IMAGE_STD
).T.copy()

MAX_IMAGE_PIXELS = 178_956_970
"""Width times height that is accepted: where Pillow refuses, unless somebody told it not to.
Decoded, a picture of that size takes half a gigabyte."""

_JPEG_QUALITIES = range(75, 101)
_MAX_JPEG_SIDE = 65_500  # libjpeg's


def load_image(path: Path) -> Image.Image:
    """Decode a picture as RGB.

    Raises:
        DataError: missing, not a picture, truncated, or of more than `MAX_IMAGE_PIXELS`.
    """
    try:
        with Image.open(path) as image:
            _refuse_bomb(image)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise a dozen types on broken bytes
        raise DataError(_message(path, error)) from error


def verify_image(path: Path, *, augmented: bool = False) -> None:
    """Decode a picture completely and forget it.

    Args:
        path: the picture.
        augmented: whether `augment` will be asked for it.

    Raises:
        DataError: as `load_image`, and as `augment` where it is augmented.
    """
    try:
        with Image.open(path) as image:
            _refuse_bomb(image)
            if augmented:
                _refuse_long_side(image)
            # JPEG only: reads every byte, but skips most of the arithmetic.
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except Exception as error:  # as above
        raise DataError(_message(path, error)) from error


def squash(image: Image.Image, image_size: int) -> ByteArray:
    """Resize an RGB picture of any size to a square.

    Returns:
        uint8 [S, S, 3].
    """
    squashed = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = np.frombuffer(squashed.tobytes(), dtype=np.uint8)  # copied once, by Pillow
    return pixels.reshape(image_size, image_size, 3)


def normalise(image: ByteArray, out: FloatArray | None = None) -> FloatArray:
    """Scale the bytes of a squashed picture as the vision tower expects them.

    Args:
        image: uint8 [S, S, 3].
        out: float32 [3, S, S] to write into; memory that is new costs twice as much again.

    Returns:
        float32 [3, S, S].
    """
    pixels = np.empty((3, *image.shape[:2]), dtype=np.float32) if out is None else out
    for channel, values in enumerate(_NORMALISED):
        # looked up: 256 divisions instead of one a pixel, and the same bits
        np.take(values, image[:, :, channel], out=pixels[channel], mode="clip")
    return pixels


def preprocess(image: Image.Image, image_size: int) -> FloatArray:
    """Turn an RGB picture into the vision tower's input.

    Args:
        image: mode RGB, any size.
        image_size: S, pixels.

    Returns:
        float32 [3, S, S].
    """
    return normalise(squash(image, image_size))


def augment(image: Image.Image, *, seed: int, sample_id: int, slot: int, epoch: int) -> Image.Image:
    """Re-encode as JPEG with a quality that is uniform in 75 to 100.

    The quality is a pure function of the arguments, so it survives resuming and other layouts.

    Args:
        image: mode RGB.
        seed: seed of the run.
        sample_id: global index of the sample.
        slot: which of the sample's pictures.
        epoch: from 0.

    Raises:
        DataError: a side is longer than a JPEG can have.
    """
    # Raw words: numpy promises those, and not its distributions, to stay from version to version.
    word = np.random.PCG64(np.random.SeedSequence((seed, epoch, sample_id, slot))).random_raw()
    _refuse_long_side(image)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITIES[word % len(_JPEG_QUALITIES)])
    return Image.open(buffer).convert("RGB")


def _refuse_bomb(image: Image.Image) -> None:
    pixels = image.width * image.height
    if pixels > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width} x {image.height}, {pixels:,} pixels")


def _refuse_long_side(image: Image.Image) -> None:
    if max(image.size) > _MAX_JPEG_SIDE:
        raise DataError(
            f"data_augment cannot make a JPEG of {image.width} x {image.height} pixels; shrink the "
            f"picture to sides of at most {_MAX_JPEG_SIDE}, or turn data_augment off for the set"
        )


def _message(path: Path, error: Exception) -> str:
    if isinstance(error, DataError):
        return f"{path}: {error}"
    if isinstance(error, FileNotFoundError):
        return f"{path}: the image does not exist; check the set's root and the record's 'image'"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"{path}: the image is too large, a decompression bomb or a scan that must be shrunk "
            f"({error}; at most {MAX_IMAGE_PIXELS:,} pixels)"
        )
    return f"{path}: the image does not decode ({error}); replace or remove it"
