"""Writes the demo's data laid out as the published ``playground/``: pictures, jsonl, meta json.

```text
FOLDER/playground/data/...                        pictures, in the published folders
FOLDER/playground/opensource/SET.jsonl            training annotations of the nine sets
FOLDER/playground/opensource/held_out/SET.jsonl   held-out annotations
FOLDER/internvl_1_2_finetune.json                 meta json of the training samples
FOLDER/held_out.json                              meta json of the held-out samples
```
No held-out picture is also a training picture. The same settings give the same bytes.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.internvl_v1_2.demo.tasks import SETS, Example, SetSpec

TRAINING_META = "internvl_1_2_finetune.json"
HELD_OUT_META = "held_out.json"


@dataclass(frozen=True, kw_only=True)
class PlaygroundSettings:
    """How much is drawn."""

    training_samples: int = 6000
    """Training conversations, all sets together."""
    held_out_samples: int = 270
    """Held-out questions, the same number for every set."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        if self.training_samples < 100 or self.held_out_samples < len(SETS):
            raise ValueError(
                f"playground: training_samples {self.training_samples} must be at least 100 and "
                f"held_out_samples {self.held_out_samples} at least {len(SETS)}"
            )


def _counts(settings: PlaygroundSettings) -> list[tuple[SetSpec, bool, int]]:
    """Return (set, held out?, samples) in the order of drawing: all training samples first."""
    training = [(spec, False, round(settings.training_samples * spec.share)) for spec in SETS]
    held_out = [(spec, True, settings.held_out_samples // len(SETS)) for spec in SETS]
    return training + held_out


def _record(spec: SetSpec, example: Example, name: str) -> dict[str, Any]:
    conversations = []
    for number, (question, answer) in enumerate(example.turns):
        mark = "<image>\n" if example.picture is not None and number == 0 else ""
        conversations.append({"from": "human", "value": mark + question})
        conversations.append({"from": "gpt", "value": answer})
    record: dict[str, Any] = {"id": name}
    if example.picture is not None:
        width, height = example.picture.size
        record["image"] = f"{spec.folder}/{name}.{spec.extension}"
        record |= {"width": width, "height": height}
    return record | {"conversations": conversations}


def _examples(
    spec: SetSpec, held_out: bool, count: int, seed: int, seen: set[bytes]
) -> Iterator[Example]:
    """Yield ``count`` examples; held-out pictures are redrawn until they are not in ``seen``."""
    rng = random.Random(f"{seed}/{spec.name}/{'held out' if held_out else 'training'}")
    for _ in range(count):
        example = spec.task(rng, held_out)
        while example.picture is not None:
            digest = hashlib.sha256(example.picture.tobytes()).digest()
            if not held_out:
                seen.add(digest)
            elif digest in seen:
                example = spec.task(rng, held_out)
                continue
            break
        yield example


def _write_set(
    folder: Path, spec: SetSpec, held_out: bool, examples: Iterator[Example], bar: "tqdm[Any]"
) -> int:
    pictures = folder / "playground/data" / spec.root
    (pictures / spec.folder).mkdir(parents=True, exist_ok=True)
    lines = []
    for number, example in enumerate(examples):
        name = f"{'held_out_' if held_out else ''}{number:06d}"
        record = _record(spec, example, name)
        if example.picture is not None:
            file = pictures / record["image"]
            # Quality for JPEG; Pillow ignores it for PNG, whose fastest level is enough here.
            example.picture.save(file, quality=92, compress_level=1)
        lines.append(json.dumps(record, ensure_ascii=False))
        bar.update()
    annotation = folder / _annotation(spec, held_out)
    annotation.parent.mkdir(parents=True, exist_ok=True)
    annotation.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _annotation(spec: SetSpec, held_out: bool) -> str:
    return f"playground/opensource/{'held_out/' if held_out else ''}{spec.name}.jsonl"


def write(folder: Path, settings: PlaygroundSettings, final: Path) -> None:
    """Draw everything below ``folder``.

    Args:
        folder: an empty folder.
        settings: how much.
        final: where the folder will stand in the end; the meta files name absolute paths there.
    """
    seen: set[bytes] = set()
    metas: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    plan = _counts(settings)
    total = sum(count for _, _, count in plan)
    with tqdm(total=total, desc="drawing the playground", unit="sample", mininterval=0.5) as bar:
        for spec, held_out, count in plan:
            examples = _examples(spec, held_out, count, settings.seed, seen)
            length = _write_set(folder, spec, held_out, examples, bar)
            metas[held_out][spec.name] = {
                "root": str(final / "playground/data" / spec.root),
                "annotation": str(final / _annotation(spec, held_out)),
                "data_augment": False,
                "repeat_time": 1,
                "length": length,
            }
    for name, held_out in ((TRAINING_META, False), (HELD_OUT_META, True)):
        text = json.dumps(metas[held_out], indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def read_texts(folder: Path) -> list[str]:
    """Return every question and answer of the training samples, in order, for the tokenizer."""
    return [
        turn["value"].removeprefix("<image>\n")
        for spec in SETS
        for line in (folder / _annotation(spec, False)).read_text("utf-8").splitlines()
        for turn in json.loads(line)["conversations"]
    ]
