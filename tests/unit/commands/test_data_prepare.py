"""``mmlm data prepare`` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmlm import cli
from mmlm.commands import data_prepare
from mmlm.commands.data_prepare import STAGES
from mmlm.data.annotation import read_meta
from mmlm.preparation import sources
from mmlm.preparation.layout import Playground
from mmlm.preparation.sources import PublishedSet
from tests.preparation_helpers import (
    files_below,
    picture,
    record,
    write_annotation,
    write_parquet,
    write_tar,
    write_zip,
)

MIXED = "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k"


@pytest.fixture
def playground(tmp_path: Path) -> Playground:
    """An empty one."""
    return Playground(root=tmp_path / "playground")


def prepare(*arguments: str) -> int:
    return cli.main(["data", "prepare", *arguments])


@pytest.fixture
def two_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the nine sets, as small as the stand-in is."""
    sets = (
        PublishedSet(name=MIXED, root="", num_samples=3),
        PublishedSet(name="synthdog_en", root="synthdog-en/", num_samples=2),
    )
    monkeypatch.setattr(sources, "PUBLISHED_SETS", sets)


@pytest.fixture
def downloaded(playground: Playground) -> Playground:
    """What the individual sources leave in ``downloads/``."""
    mixed = [
        record(0, "coco/train2017/1.jpg", "Where?", "[0.1, 0.2, 0.3, 0.4]"),
        record(1, "sam/images/sa_7.jpg"),
        record(2, "ocr_vqa/images/0123.jpg"),
    ]
    synthdog = [record(number, f"images/{number:08d}.jpg") for number in range(2)]
    folder = playground.downloads
    annotations = {f"{MIXED}.jsonl": mixed, "synthdog_en.jsonl": synthdog}
    write_zip(
        folder / "annotations/playground.zip",
        {f"playground/{name}": "\n".join(lines).encode() for name, lines in annotations.items()},
    )
    write_zip(folder / "coco/train2017.zip", {"train2017/1.jpg": picture()})
    write_tar(folder / "sam/sa_000000.tar", {"./sa_7.jpg": picture(), "./sa_8.jpg": picture()})
    write_parquet(folder / "synthdog-en/data/train-00000.parquet", [picture(), picture("PNG")])
    (folder / "ocr_vqa/images").mkdir(parents=True)
    (folder / "ocr_vqa/images/0123.gif").write_bytes(picture("GIF"))
    return playground


def test_from_downloads_to_a_complete_playground(
    downloaded: Playground, two_sets: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(downloaded.root)]
    assert prepare("status", *root) == 1
    assert "no annotations" in capsys.readouterr().out
    for stage in ("unpack", "sam", "synthdog", "ocr-vqa"):
        assert prepare(stage, *root) == 0
    assert prepare("meta", "--boxes", "plus", *root) == 0
    assert prepare("meta", *root) == 0
    capsys.readouterr()
    assert prepare("status", *root) == 0
    assert "complete: every line and every picture is there" in capsys.readouterr().out
    assert files_below(downloaded.data) == [
        "coco/train2017/1.jpg",
        "ocr_vqa/images/0123.jpg",
        "sam/images/sa_7.jpg",
        "synthdog-en/images/00000000.jpg",
        "synthdog-en/images/00000001.jpg",
    ]
    published = read_meta(downloaded.root / "internvl_1_2_finetune.json")
    plus = read_meta(downloaded.root / "internvl_1_2_plus_finetune.json")
    assert [one.length for one in published] == [one.length for one in plus] == [3, 2]
    assert "[0.1, 0.2, 0.3, 0.4]" in published[0].annotation.read_text()
    assert "<box>[[100, 200, 300, 400]]</box>" in plus[0].annotation.read_text()
    assert plus[1].annotation == published[1].annotation


def test_all_stages_of_the_repository(
    playground: Playground, two_sets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tmp_path / "remote"
    origin = Playground(root=remote)
    write_annotation(origin, MIXED, [record(k, "coco/train2017/1.jpg") for k in range(3)])
    write_annotation(origin, "synthdog_en", [record(k, f"images/{k}.jpg") for k in range(2)])
    write_zip(origin.data / "coco.zip", {"coco/train2017/1.jpg": picture()})
    write_zip(origin.data / "synthdog-en.zip", {f"images/{k}.jpg": picture() for k in range(2)})
    script = f"""#!{sys.executable}
import shutil, sys
shutil.copytree({str(remote)!r}, sys.argv[sys.argv.index("--local-dir") + 1], dirs_exist_ok=True)
"""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/hf").write_text(script)
    (tmp_path / "bin/hf").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    root = ["--root", str(playground.root)]
    assert prepare("all", "--workers", "1", "--remove-archives", *root) == 0
    assert files_below(playground.data) == [
        "coco/train2017/1.jpg",
        "synthdog-en/images/0.jpg",
        "synthdog-en/images/1.jpg",
    ]
    meta = json.loads((playground.root / "internvl_1_2_finetune.json").read_text())
    assert [entry["length"] for entry in meta.values()] == [3, 2]
    assert prepare("all", "--workers", "1", *root) == 0


def test_printed_commands_are_a_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = str(tmp_path / "play ground")
    assert prepare("all", "--source", "individual", "--print-commands", "--root", root) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert f"\nmmlm data prepare status --root '{root}'\n" in script
    assert "http://images.cocodataset.org/zips/train2017.zip" in script
    assert not Path(root).exists()


def test_printed_commands_of_some_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("download", "--only", "coco", "--print-commands") == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[1]
        .endswith(
            "hf download OpenGVLab/InternVL-Chat-V1-2-SFT-Data --repo-type dataset --local-dir "
            "playground --include 'data/coco*'"
        )
    )


def test_own_data_alone(tmp_path: Path) -> None:
    (tmp_path / "charts.jsonl").write_text(record(0, "7.png") + "\n" + record(1, "8.png") + "\n")
    own = ["--own", "charts", str(tmp_path / "charts.jsonl"), "my_data/"]
    output = tmp_path / "new" / "meta.json"
    root = ["--root", str(tmp_path / "none")]
    assert prepare("meta", "--only-own", *own, "--output", str(output), *root) == 0
    assert json.loads(output.read_text())["charts"] == {
        "root": "my_data/",
        "annotation": str(tmp_path / "charts.jsonl"),
        "data_augment": False,
        "repeat_time": 1,
        "length": 2,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--only", "x"], "--only x: no such set; known are ai2d_train_12k"),
        (["download", "--only", "x"], "--only x: unknown with --source repository"),
        (["sam", "--input", "nowhere"], "--input nowhere: is not a folder"),
        (["synthdog", "--workers", "0"], "--workers 0: must be at least 1"),
        (["meta", "--only-own"], "there is no set to write"),
        (["meta"], "fetch the annotations (stages download and unpack), or name the sets"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(*arguments, "--root", str(tmp_path / "playground")) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_help_explains_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        prepare("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, explanation in STAGES.items():
        assert name in text
        assert explanation in text
    assert "docs/data.md" in text
    for name in STAGES:
        with pytest.raises(SystemExit, match="0"):
            prepare(name, "--help")
        assert "--root" in capsys.readouterr().out


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys, mmlm.commands.data_prepare; "
        "print({'PIL', 'numpy', 'pyarrow', 'tqdm'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
    assert data_prepare.STAGES
