"""Preprocessing against torch's arithmetic, augmentation, and pictures that are broken."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmlm.data.image import augment, load_image, preprocess, verify_image
from mmlm.errors import DataError


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    generator = np.random.default_rng(0)
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8), mode=None)


def test_pixels_equal_the_published_transform_bit_for_bit() -> None:
    image = noise(30, 47)
    squashed = image.resize((56, 56), Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.array(squashed)).permute(2, 0, 1).to(torch.float32).div(255)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = preprocess(image, 56)
    assert pixels.dtype == np.float32 and pixels.shape == (3, 56, 56)
    assert pixels.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(pixels, tensor.sub(mean).div(std).numpy())


def test_alpha_is_dropped_and_the_first_frame_taken(tmp_path: Path) -> None:
    picture = noise(8, 8, "RGBA")
    picture.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(np.array(loaded), np.array(picture)[..., :3])
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "b.gif").getpixel((0, 0)) == (255, 0, 0)


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    noise(12, 5).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (12, 5)


def test_augmentation_depends_on_its_key_alone() -> None:
    image = noise(40, 40)

    def pixels(**key: int) -> bytes:
        return augment(image, **{"seed": 1, "sample_id": 2, "slot": 0, "epoch": 0, **key}).tobytes()

    assert pixels() == pixels()
    assert len({pixels(epoch=epoch) for epoch in range(8)}) > 3
    assert len({pixels(sample_id=sample_id) for sample_id in range(8)}) > 3


def spy_on_qualities(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that fills with the quality of every JPEG that is written."""
    qualities: list[object] = []
    save = Image.Image.save

    def spy(self: Image.Image, *args: object, **options: object) -> None:
        qualities.append(options["quality"])
        save(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "save", spy)
    return qualities


def test_augmentation_quality_is_within_75_and_100(monkeypatch: pytest.MonkeyPatch) -> None:
    qualities = spy_on_qualities(monkeypatch)
    for sample_id in range(300):
        augment(Image.new("RGB", (8, 8)), seed=0, sample_id=sample_id, slot=0, epoch=0)
    assert set(qualities) == set(range(75, 101))


@pytest.mark.parametrize("check", [load_image, verify_image])
@pytest.mark.parametrize("kind", ["jpeg", "png", "text", "empty", "missing", "bomb"])
def test_a_broken_picture_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: object, kind: str
) -> None:
    path = tmp_path / "a.img"
    message = "the image does not decode .*; replace or remove it"
    if kind in ("jpeg", "png"):
        buffer = io.BytesIO()
        noise(64, 64).save(buffer, format=kind)
        path.write_bytes(buffer.getvalue()[:2000])
    elif kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        noise(64, 64).save(path, format="png")
        message = "the image is too large, a decompression bomb .*4096 pixels"
    elif kind == "missing":
        message = "the image does not exist; check the set's root"
    else:
        path.write_bytes(b"hello" if kind == "text" else b"")
    with pytest.raises(DataError, match=rf"a\.img: {message}"):
        check(path)  # type: ignore[operator]


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (200, 100)])
@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "bmp"])
def test_sound_pictures_of_any_size_pass(
    tmp_path: Path, size: tuple[int, int], extension: str
) -> None:
    path = tmp_path / f"a.{extension}"
    noise(*size).save(path)
    verify_image(path)
    assert preprocess(load_image(path), 28).shape == (3, 28, 28)


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real one: 400 million pixels in 50 KB."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(path)
    assert path.stat().st_size < 100_000
    return path


@pytest.mark.parametrize("check", [load_image, verify_image])
@pytest.mark.parametrize("pillow_refuses", [True, False])
def test_a_decompression_bomb_is_refused_whatever_pillow_says(
    bomb: Path, monkeypatch: pytest.MonkeyPatch, check: object, pillow_refuses: bool
) -> None:
    if not pillow_refuses:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    message = (
        r"bomb\.png: the image is too large, .*400,?000,?000 pixels.*at most 178,956,970 pixels"
    )
    with pytest.raises(DataError, match=message):
        check(bomb)  # type: ignore[operator]


def test_a_picture_too_long_for_a_jpeg_cannot_be_augmented() -> None:
    message = "data_augment cannot make a JPEG of 1 x 70000 pixels; .*turn data_augment off"
    with pytest.raises(DataError, match=message):
        augment(Image.new("RGB", (1, 70_000)), seed=0, sample_id=0, slot=0, epoch=0)


@pytest.mark.parametrize("side", [65_500, 65_501])
def test_the_check_knows_what_augmentation_will_refuse(tmp_path: Path, side: int) -> None:
    image = Image.new("RGB", (side, 1))
    image.save(tmp_path / "a.png")
    verify_image(tmp_path / "a.png")
    if side == 65_500:
        verify_image(tmp_path / "a.png", augmented=True)
        assert augment(image, seed=0, sample_id=0, slot=0, epoch=0).size == (side, 1)
        return
    message = r"data_augment cannot make a JPEG of 65501 x 1 pixels; shrink .* at most 65500"
    with pytest.raises(DataError, match=rf"a\.png: {message}"):
        verify_image(tmp_path / "a.png", augmented=True)
    with pytest.raises(DataError, match=message):
        augment(image, seed=0, sample_id=0, slot=0, epoch=0)


def test_augmentation_is_the_same_in_every_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qualities of the first samples, so that an old run can be repeated."""
    qualities = spy_on_qualities(monkeypatch)
    for sample_id in range(6):
        augment(Image.new("RGB", (1, 1)), seed=42, sample_id=sample_id, slot=0, epoch=0)
    assert qualities == [75, 93, 93, 86, 76, 90]
