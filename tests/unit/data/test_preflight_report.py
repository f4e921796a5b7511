"""The report as people and machines read it, and a folder that cannot be written."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmlm.data.annotation import AnnotationSet
from mmlm.data.preflight import CheckReport, check_data
from mmlm.data.preflight_report import format_report, to_json, verdict, write_report
from mmlm.data.sample import SampleSettings
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError
from tests.tiny_data import conversation, write_jsonl


@pytest.fixture
def report(
    tiny: AnnotationSet, tokenizer: Tokenizer, settings: SampleSettings, tmp_path: Path
) -> CheckReport:
    """Of a set with five faults and one of two sound records, the second too long."""
    entries: list[dict[str, Any]] = [
        {"id": 1, "conversations": conversation("q", "a")},
        {"id": 1, "conversations": conversation("q", "a b " * 300)},
    ]
    write_jsonl(tmp_path / "long.jsonl", entries)
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())
    meta["长 $x$"] = {
        "root": "",
        "annotation": str(tmp_path / "long.jsonl"),
        "repeat_time": 2,
        "length": 9,
    }
    path.write_text(json.dumps(meta))
    return check_data(path, tokenizer, settings, cache_dir=tmp_path / "cache")


def test_the_text_has_a_row_a_set_and_the_notes(report: CheckReport) -> None:
    text = format_report(report)
    rows = {
        line.split()[0]: line.split("|")[0].split() for line in text.splitlines() if "|" in line
    }
    #                 records times images text too-long repaired broken
    assert rows["tiny"][1:8] == ["8", "1", "3", "1", "0", "1", "5"]
    assert rows["长"][2:9] == ["2", "2", "0", "2", "1", "0", "0"]
    assert rows["total"][1:7] == ["10", "3", "3", "1", "1", "5"]
    lines = text.splitlines()
    bars = {
        line[:11].strip(): line[11:].strip() for line in lines if "█" in line and "|" not in line
    }
    assert len(bars) == 3 and bars["over 256"] == "1  " + "█" * 24
    assert bars["49 - 64"] == "2  " + "█" * 48
    assert (
        "ledger      5 excluded (image_unreadable 2, image_count 1, odd_turns 1, malformed_record "
        "1); 1 truncated (longer_than_seq_length 1); 1 repaired (placeholder_inserted 1)"
    ) in lines
    promise = "length      set '长 $x$' has 2 records, the meta json promises 9; is the download"
    assert f"{promise} complete?" in lines
    assert any("ids         set '长 $x$': 1 ids in 2 records, e.g. '1' at" in x for x in lines)
    assert any("ids         in more than one set: 1 ids in 2 records" in x for x in lines)
    assert all(len(line) < 200 for line in lines if "ids  " not in line)


def test_records_of_a_stopped_check_are_named_and_no_part_of_the_rate(report: CheckReport) -> None:
    assert "resumed" not in format_report(report)
    assert (report.num_resumed, report.stopped_at) == (0, None)
    noon = time.mktime((2024, 5, 6, 12, 0, 0, 0, 0, -1))
    found = replace(report, num_resumed=6, stopped_at=noon, seconds=2.0)
    text, content = format_report(found), to_json(found, "strict")
    assert "judged      10 records of 2 sets in 2.0 s, 2 a second" in text
    assert (
        "resumed     6 of them were judged by a check that was stopped at 2024-05-06 12:00:00; a "
        "picture that changed since is not seen"
    ) in text.splitlines()
    assert (content["num_resumed"], content["stopped_at"]) == (6, noon)


def test_the_verdict_depends_on_the_policy(report: CheckReport) -> None:
    strict, skip = verdict(report, "strict"), verdict(report, "skip")
    assert strict.startswith("result      5 of 10 records cannot be used: a training with data")
    assert "would not start" in strict and "leaves them out" in skip
    assert strict.count("tiny.jsonl:") == skip.count("tiny.jsonl:") >= 5


def test_the_files_are_there_and_say_the_same(report: CheckReport, tmp_path: Path) -> None:
    folder = tmp_path / "some" / "report"
    write_report(report, folder, "strict")
    names = ["data_ledger.jsonl", "lengths.png", "report.json", "report.txt"]
    assert sorted(file.name for file in folder.iterdir()) == names
    content = json.loads((folder / "report.json").read_text())
    assert content == json.loads(json.dumps(to_json(report, "strict")))
    assert content["version"] == 1 and content["passed"] is False and content["num_dropped"] == 5
    assert content["total"]["found"]["excluded"]["image_unreadable"] == 2
    assert [one["name"] for one in content["sets"]] == ["tiny", "长 $x$"]
    assert content["sets"][1]["doubles"]["examples"][0]["id"] == "1"
    assert len(content["length_edges"]) + 1 == len(content["total"]["lengths"])
    assert to_json(report, "skip")["passed"] is True
    ledger = [json.loads(line) for line in (folder / "data_ledger.jsonl").open()]
    assert len(ledger) == 7
    assert format_report(report) in (folder / "report.txt").read_text()
    with Image.open(folder / "lengths.png") as picture:
        assert picture.size == (1200, 480) and len(set(picture.convert("L").tobytes())) > 10


def test_a_folder_that_cannot_be_written_is_named(report: CheckReport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/report: cannot write the report \(Not a directory"):
        write_report(report, tmp_path / "file" / "report", "strict")
