"""Every set asks what its name promises, and a held-out question needs its picture."""

import json
import random
from pathlib import Path

import pytest

from examples.internvl_v1_2.demo.tasks import SETS, SetSpec

PUBLISHED_META = (
    Path(__file__).resolve().parents[3] / "examples/internvl_v1_2/data/internvl_1_2_finetune.json"
)
each_set = pytest.mark.parametrize("spec", SETS, ids=lambda spec: spec.name)


def test_sets_are_the_published_nine() -> None:
    published = json.loads(PUBLISHED_META.read_text("utf-8"))
    assert [spec.name for spec in SETS] == list(published)
    for spec in SETS:
        root = f"playground/data/{spec.root}".rstrip("/")
        assert published[spec.name]["root"].rstrip("/") == root


def test_published_lengths() -> None:
    published = json.loads(PUBLISHED_META.read_text("utf-8"))
    assert sum(entry["length"] for entry in published.values()) == 1_267_819
    assert all(
        entry["annotation"] == f"playground/opensource/{name}.jsonl"
        and entry["repeat_time"] == 1
        and entry["data_augment"] is False
        for name, entry in published.items()
    )


def test_shares_make_a_whole() -> None:
    assert sum(spec.share for spec in SETS) == pytest.approx(1.0)


@each_set
def test_held_out_is_one_question_about_a_picture(spec: SetSpec) -> None:
    rng = random.Random(0)
    for _ in range(30):
        example = spec.task(rng, True)
        assert example.picture is not None
        assert len(example.turns) == 1


@each_set
def test_same_question_has_several_answers(spec: SetSpec) -> None:
    rng = random.Random(0)
    answers: dict[str, set[str]] = {}
    for _ in range(150):
        for question, answer in spec.task(rng, False).turns:
            assert question
            assert answer
            answers.setdefault(question, set()).add(answer)
    with_picture = {question for question in answers if "say" not in question}
    assert max(len(answers[question]) for question in with_picture) >= 2


@each_set
def test_seed_decides(spec: SetSpec) -> None:
    first, again = (spec.task(random.Random(7), False) for _ in range(2))
    assert first.turns == again.turns


def test_there_are_dialogues_text_alone_and_chinese() -> None:
    rng = random.Random(0)
    examples = [spec.task(rng, False) for _ in range(60) for spec in SETS]
    assert any(len(example.turns) > 1 for example in examples)
    assert any(example.picture is None for example in examples)
    assert any("图" in question for example in examples for question, _ in example.turns)
