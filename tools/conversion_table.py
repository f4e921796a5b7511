"""The tables in docs/conversion.md: names and shapes on both sides, from the code that converts.

``python tools/conversion_table.py`` prints them; ``--write`` puts them between the markers.
"""

import argparse
import sys
from pathlib import Path

from mmlm.config.presets import internvl_chat_v1_2
from mmlm.conversion.name_map import HF_PREFIXES, TABLE, expand

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "conversion.md"
BEGIN = "<!-- names: python tools/conversion_table.py --write -->\n"
END = "<!-- end of names -->\n"

TITLES = {
    "vision_model": "ViT",
    "vision_projection": "Projector",
    "language_model": "LLM",
}


def make_tables() -> str:
    """One table a part: a line for a row of the code's own table."""
    entries = {entry.megatron_name: entry for entry in expand(internvl_chat_v1_2())}
    lines = []
    for part, prefix in HF_PREFIXES.items():
        lines += [
            f"### {TITLES[part]}",
            "",
            f"In the combined folder `{prefix}` comes before the HuggingFace name; in the "
            f"checkpoint `model.{part}.` before Megatron's.",
            "",
            "| HuggingFace | shape | Megatron | shape | rule |",
            "|---|---|---|---|---|",
        ]
        for row in TABLE:
            if row.part != part:
                continue
            entry = entries[f"{part}.{row.megatron.replace('{i}', '0')}"]
            names = "<br>".join(f"`{name}`" for name, _ in row.hf)
            shapes = "<br>".join(_shape(shape) for shape in entry.hf_shapes)
            lines.append(
                f"| {names} | {shapes} | `{row.megatron}` | {_shape(entry.megatron_shape)} | "
                f"{type(entry.rule).__name__} |"
            )
        lines.append("")
    rules = {type(entry.rule) for entry in entries.values()}
    for rule in sorted(rules, key=lambda each: each.__name__):
        text = (rule.__doc__ or "").splitlines()[0]
        lines.append(f"- **{rule.__name__}**: {text}")
    return "\n".join([*lines, ""])


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def with_tables(text: str, tables: str) -> str:
    """Return the document with the part between the markers replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/conversion.md must have the lines {BEGIN!r} and {END!r}")
    return before + BEGIN + "\n" + tables + "\n" + END + after


def main() -> None:
    """Print the tables, or write them into docs/conversion.md."""
    parser = argparse.ArgumentParser(description="Names and shapes of a conversion, both sides.")
    parser.add_argument("--write", action="store_true", help="replace them in docs/conversion.md")
    arguments = parser.parse_args()
    tables = make_tables()
    if not arguments.write:
        sys.stdout.write(tables)
        return
    text = with_tables(DOCUMENT.read_text(encoding="utf-8"), tables)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
