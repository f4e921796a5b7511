"""A small stand-in for the published data: pictures, annotations, archives."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmlm.preparation.layout import Playground


def picture(format_name: str = "JPEG", colour: tuple[int, int, int] = (200, 30, 40)) -> bytes:
    """Return a small picture as a file's bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(buffer, format=format_name)
    return buffer.getvalue()


def record(identity: int, image: str | None, question: str = "What?", answer: str = "That.") -> str:
    """Return one json line."""
    entry: dict[str, Any] = {"id": identity}
    if image is not None:
        entry["image"] = image
        question = f"<image>\n{question}"
    entry["conversations"] = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer},
    ]
    return json.dumps(entry, ensure_ascii=False)


def write_annotation(playground: Playground, name: str, lines: list[str]) -> Path:
    """Write the annotation file of a set."""
    path = playground.annotation(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_zip(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a zip with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Mapping[str, bytes], *, mode: str = "w") -> Path:
    """Write a tar (``mode`` ``w``, ``w:gz``, ...) with these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, images: list[bytes], *, rows_per_group: int = 4) -> Path:
    """Write a parquet file as HuggingFace's datasets do: image is {bytes, path}."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(
        {
            "image": pyarrow.array(
                [{"bytes": data, "path": None} for data in images],
                type=pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
            ),
            "ground_truth": pyarrow.array(["{}"] * len(images)),
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


def files_below(folder: Path) -> list[str]:
    """Return the names of all files below a folder, sorted; links and leftovers too."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )
