"""Makes pictures of every kind and ``golden.npz``: what Pillow 10.2 turns them into.

The published run used a Pillow of that time; another version may convert modes or resize
differently, so this runs in an environment of its own, from the repository's root:

    python3.11 -m venv golden_venv
    golden_venv/bin/pip install pillow==10.2.0 "numpy<2"
    golden_venv/bin/python tests/data/golden_pictures/make_golden.py

``golden.npz`` has for each picture the bytes after ``convert("RGB")`` and the bicubic squash to
28 x 28, uint8 [28, 28, 3]; for the JPEGs also after a re-encoding with quality 75 before the squash
(``<name>/75``). The pictures are kept too: another version may write other bytes.
"""

import io
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

HERE = Path(__file__).parent
WIDTH, HEIGHT, SIZE = 31, 22, 28


def rgb() -> Image.Image:
    """Gradients and noise in three channels."""
    generator = np.random.default_rng(7)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    smooth = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y) * 4 % 256], axis=-1)
    noise = generator.integers(-30, 31, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def with_alpha() -> Image.Image:
    """The same with an alpha channel from 0 to 255."""
    image = rgb()
    alpha = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    image.putalpha(Image.fromarray(alpha))
    return image


def write_pictures() -> None:
    """Write each picture that is missing."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees
    deep = (np.array(rgb().convert("L")).astype(np.uint16) * 3) + 5  # from 5 to 770
    frames = [rgb().convert("P"), Image.new("P", (WIDTH, HEIGHT), 3)]
    pictures = {
        "rgb.png": (rgb(), {}),
        "rgba.png": (with_alpha(), {}),
        "palette.png": (rgb().quantize(16), {}),
        "palette_transparent.png": (rgb().quantize(16), {"transparency": 3}),
        "grey.png": (rgb().convert("L"), {}),
        "grey_alpha.png": (with_alpha().convert("LA"), {}),
        "grey16.png": (Image.fromarray(deep), {}),
        "grey16.tif": (Image.fromarray(deep), {}),
        "one_bit.png": (rgb().convert("1"), {}),
        "rgb.jpg": (rgb(), {"quality": 90}),
        "grey.jpg": (rgb().convert("L"), {"quality": 90}),
        "cmyk.jpg": (rgb().convert("CMYK"), {"quality": 90}),
        "exif_turned.jpg": (rgb(), {"quality": 90, "exif": turned}),
        "two_frames.gif": (frames[0], {"save_all": True, "append_images": frames[1:]}),
        "rgb.bmp": (rgb(), {}),
        "rgba.webp": (with_alpha(), {"lossless": True}),
    }
    for name, (image, options) in pictures.items():
        if not (HERE / name).is_file():
            image.save(HERE / name, **options)


def squash(image: Image.Image) -> np.ndarray:
    """The published resize."""
    return np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def main() -> None:
    """Write the pictures and ``golden.npz``."""
    assert PIL.__version__ == "10.2.0", PIL.__version__
    write_pictures()
    golden = {}
    for path in sorted(HERE.iterdir()):
        if path.suffix in (".py", ".npz"):
            continue
        image = Image.open(path).convert("RGB")
        golden[path.name] = squash(image)
        if path.suffix == ".jpg":
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=75)
            golden[f"{path.name}/75"] = squash(Image.open(buffer))
    np.savez_compressed(HERE / "golden.npz", **golden)


if __name__ == "__main__":
    main()
