"""Which folder a picture in an archive belongs to.

Publishers pack the same pictures under many names: ``train2017/1.jpg``,
``ChartQA Dataset/train/png/1.png``, ``data/wikiart/images/1.jpg``, ``sa_1.jpg``. What they share is
the end of the published folder's name, so that is what is looked for.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath

from mmlm.errors import DataError
from mmlm.preparation.sources import LLAVA_PRETRAIN_FOLDER

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")


def is_picture(member: PurePosixPath) -> bool:
    """Return whether a name is a picture's; what macOS adds to archives is not."""
    hidden = member.name.startswith(".") or "__MACOSX" in member.parts
    return member.suffix.lower() in IMAGE_SUFFIXES and not hidden


def picture_destination(member: PurePosixPath, folders: Sequence[str]) -> PurePosixPath | None:
    """Return where a member of an archive belongs, below ``data/``.

    The folder whose last parts appear in the member's path wins: the longest such run, of equal
    ones the first. Without any, and with one folder to choose from, the file goes right into it
    (LLaVA-Pretrain keeps one level of numbered folders).

    Args:
        member: path in the archive, without ``..``.
        folders: below ``data/``; the archive's pictures belong to these.

    Returns:
        The path below ``data/``, or None for what is no picture or belongs nowhere.

    Raises:
        DataError: several folders would do.
    """
    if not is_picture(member):
        return None
    found = [
        (-length, start, folder)
        for folder in folders
        for start, length in _runs(member.parts[:-1], PurePosixPath(folder).parts)
    ]
    if found:
        length, start, folder = min(found)
        rivals = {other for *where, other in found if where == [length, start]}
        if len(rivals) > 1:
            raise DataError(
                f"'{member}' could belong to {', '.join(sorted(rivals))}; unpack this archive by "
                "hand, or name it after one of them (coco.zip, vg.zip, ...)"
            )
        return PurePosixPath(folder, *member.parts[start - length :])
    if len(folders) == 1:
        levels = 2 if folders[0] == LLAVA_PRETRAIN_FOLDER else 1
        return PurePosixPath(folders[0], *member.parts[-levels:])
    return None


def _runs(parts: tuple[str, ...], folder: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where the last parts of ``folder`` stand in ``parts``: (start, length) of each run."""
    runs = []
    for end in range(1, len(parts) + 1):
        length = 0
        while length < min(end, len(folder)) and parts[end - 1 - length] == folder[-1 - length]:
            length += 1
        if length:
            runs.append((end - length, length))
    return runs
