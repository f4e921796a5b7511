"""The tables agree with each other and with the recipe's meta json."""

import json
from pathlib import Path

import pytest

from mmlm.preparation.sources import (
    COLLECTIONS,
    IMAGE_FOLDERS,
    PUBLISHED_SETS,
    SETS_WITH_BOXES,
    SOURCES,
    Tool,
    image_folders,
)

RECIPE_META = Path(__file__).parents[3] / "examples/internvl_v1_2/data/internvl_1_2_finetune.json"


def test_sets_are_those_of_the_recipe() -> None:
    meta = json.loads(RECIPE_META.read_text())
    assert [one.name for one in PUBLISHED_SETS] == list(meta)
    for one in PUBLISHED_SETS:
        assert meta[one.name]["root"] == f"playground/data/{one.root}"
        assert meta[one.name]["annotation"] == f"playground/opensource/{one.name}.jsonl"
        assert meta[one.name]["length"] == one.num_samples
    assert sum(one.num_samples for one in PUBLISHED_SETS) == 1_267_819


def test_every_folder_has_a_source() -> None:
    brought = {folder for source in SOURCES for folder in source.folders}
    assert brought == set(IMAGE_FOLDERS)
    assert {source.name for source in SOURCES if not source.folders} == {"annotations"}


def test_names_are_unique_and_replacements_exist() -> None:
    names = [source.name for source in SOURCES]
    assert len(set(names)) == len(names)
    assert {source.instead_of for source in SOURCES if source.instead_of} <= set(names)
    assert set(SETS_WITH_BOXES) <= {one.name for one in PUBLISHED_SETS}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_addresses_fit_their_tools(source: object) -> None:
    from mmlm.preparation.sources import Source

    assert isinstance(source, Source)
    if source.tool in (Tool.URL, Tool.DRIVE_FOLDER):
        assert source.address.startswith(("https://", "http://images.cocodataset.org/"))
        assert "?" not in source.address
    elif source.tool == Tool.DRIVE:
        assert len(source.address) == 33
    else:
        assert source.address.count("/") == 1
    assert bool(source.file) != (source.tool == Tool.DRIVE_FOLDER)


def test_collections_are_first_parts() -> None:
    assert len(COLLECTIONS) == 17
    assert image_folders("vg") == ("vg/VG_100K", "vg/VG_100K_2")
    assert image_folders("unknown") == ()
