"""Stage ``sam``: of SA-1B only the pictures that the annotations name.

Meta publishes SA-1B in tars of 11 thousand pictures; the recipe uses 9 thousand pictures of
``sa_000000.tar`` to ``sa_000050.tar``. The packed subset that ShareGPT4V offers works the same.
"""

from pathlib import Path, PurePosixPath

from mmlm.errors import DataError
from mmlm.log import get_logger
from mmlm.preparation.archive import Choice, unpack
from mmlm.preparation.files import make_folder
from mmlm.preparation.layout import Playground
from mmlm.preparation.references import missing_images, read_references
from mmlm.preparation.sources import PUBLISHED_SETS, SAM_FOLDER
from mmlm.preparation.unpack import archives_below


def unpack_sam(playground: Playground, source: Path) -> int:
    """Unpack the pictures that are named and not there, from as few archives as needed.

    Args:
        playground: the folders; the annotations must be there.
        source: folder of the archives.

    Returns:
        How many named pictures are still missing; 0 also where there is no archive.

    Raises:
        DataError: no annotations, or an archive cannot be used.
    """
    archives = list(archives_below(source))
    if not archives:
        get_logger(__name__).info("sam: no archive in %s, nothing to do", source)
        return 0
    sets = [one for one in PUBLISHED_SETS if not one.root]
    images = {
        image
        for references in read_references(playground, sets)
        for image in references.images
        if image.startswith(f"{SAM_FOLDER}/")
    }
    if not images:
        raise DataError(
            f"{playground.annotations}: no annotation names a picture in {SAM_FOLDER}/, so there "
            "is nothing to choose; get the annotations first (stages download and unpack)"
        )
    missing = missing_images(playground.data, images)
    make_folder(playground.data)
    for archive in archives:
        if not missing:
            break
        report = unpack(archive, playground.data, _chosen(missing))
        get_logger(__name__).info("%s: %d pictures", archive, report.num_written)
        missing = missing_images(playground.data, missing)
    get_logger(__name__).info(
        "%s: %d of %d named pictures are there", SAM_FOLDER, len(images) - len(missing), len(images)
    )
    return len(missing)


def _chosen(missing: tuple[str, ...]) -> Choice:
    places = {PurePosixPath(image).name: PurePosixPath(image) for image in missing}
    return lambda member: places.get(member.name)
