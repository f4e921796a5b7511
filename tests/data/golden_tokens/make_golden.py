"""Makes ``golden.json``: what the slow LlamaTokenizer of transformers 4.37 does with some texts.

Later versions of transformers tokenize differently, so this runs in an environment of its own, from
the repository's root:

    python3.11 -m venv golden_venv
    golden_venv/bin/pip install transformers==4.37.2 sentencepiece==0.1.99 "protobuf<5" "numpy<2"
    PYTHONPATH=. golden_venv/bin/python tests/data/golden_tokens/make_golden.py

``tokenizer.model`` and the two json files beside it are kept too: they are made only where they are
missing, because another version of sentencepiece may train other bytes. The model is laid out as
Yi's: BPE, byte fallback, digits apart, identity normalisation, no dummy prefix, ChatML marks at 6
and 7. Only ``<|im_end|>`` of them is listed in ``tokenizer_config.json`` (as ``eos_token``), so the
slow tokenizer leaves ``<|im_start|>`` to SentencePiece.

``legacy`` is true, which is also what a configuration without the key means in 4.37. With false a
prompt would get one more piece in front, and the published mask could not be followed: it counts
each pair of turns on its own, and from the second pair on each would be counted a piece too long.

Conversations go through ``tests/parity/reference_preprocessing.py``, so their ids and masks are the
published ones in every respect that the reference has.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from transformers import LlamaTokenizer

from examples.internvl_v1_2.demo import tokenizer as demo
from tests.parity.reference_preprocessing import IGNORED, preprocess

HERE = Path(__file__).parent
NINE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]
NINE += ["<ref>", "</ref>", "<box>", "</box>"]
IMAGE = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"

CORPUS = [
    "What is shown in this picture? The picture shows a red bus beside a street.",
    "Describe the image in detail. There are two people and a dog on the grass.",
    "Where is the dog? The dog is at the left of the person in the blue shirt.",
    "Please answer with a single word. How many cars are there? There are three.",
    "Here is the text of the document: Total 1,234.50 due on 2024-01-31.",
    "图中有什么？图中有一只猫和两只狗。请详细描述这张图片。",
    "左边的人穿着什么颜色的衣服？左边的人穿着红色的衣服。",
    "请问这张图片的内容是什么？这是一张表格，第一行是标题。",
    "def main():    return [x for x in range(10) if x % 2 == 0]",
    "  two spaces,   three spaces,\tand a tab  ",
]

TEXTS = [
    # English, Chinese, both; digits, punctuation of both widths
    "What is shown in this picture?",
    "The dog",
    "dog",
    "图中有什么？",
    "图中的 dog 是什么颜色的? It is 红色 (red)。",
    "Total: 1,234.50 on 2024-01-31; ２０２４年，“全角”！",
    # spaces: leading, trailing, several, alone, tabs, newlines
    " leading",
    "trailing ",
    "  two  and   three   ",
    " ",
    "   ",
    "",
    "\t tab\t",
    "\n",
    "\n\n",
    "line\nline\r\nline\n",
    "    indented\n        more\n",
    "\u3000ideographic\u00a0no-break\u200bzero-width",
    # literal characters of SentencePiece's own
    "\u2581low line\u2581",
    "<0x0A> is not a byte here",
    "<unk>",
    "<s> and </s>",
    # byte fallback
    "emoji 🙂👩‍👩‍👧 and 𠮷 and ℵ",
    "Grüße, naïve café, ελληνικά, русский, العربية",
    "e\u0301 is not é, ﬁ is not fi, Ａ is not A",
    "\x00\x07\x7f",
    # special tokens, glued and with spaces around
    "<img>",
    "<img></img>",
    "a<box>b",
    "a <box> b",
    "  <box>  ",
    "<box>[[1, 2, 3, 4]]</box>",
    "the <ref>red bus</ref><box>[[10, 20, 300, 400]]</box>.",
    "<quad> </quad>",
    "<box><box></box></ref>",
    "\n<img>\n</img>\n",
    "狗<ref>狗</ref>狗",
    "<IMG_CONTEXT><IMG_CONTEXT> <IMG_CONTEXT>",
    "<box",
    "<BOX>",
    "< box >",
    "<img<img>>",
    "</box<box>>",
    # what only looks special
    "<image>",
    "<image>\nWhat is <image>?",
    "<img_context>",
    "<|im_start",
    "|im_end|>",
    # marks of the template and of the tokenizer
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|><|im_end|>",
    "<|im_end|><|im_start|>user\n",
    "a<|im_end|>b",
    "a <|im_end|> b",
    "a <|im_start|> b",
    "<|im_start|> assistant\n dog<|im_end|> ",
    "<|im_end|>\n<|im_start|>",
    "<|startoftext|>a<|endoftext|>",
    "<|Human|> a <|System|>",
    IMAGE,
    f"{IMAGE}\nDescribe the image.",
    f"a {IMAGE} b{IMAGE}",
]

CASES: dict[str, tuple[int, int, list[str]]] = {
    # name: pictures, max_length, texts; a text starts with its role where that is not its turn's
    "text": (0, 2048, ["What is this?", "A dog."]),
    "literal_placeholder_text_only": (0, 2048, ["Is <image> a word?", "<image> is\u2581not."]),
    "placeholder_front": (
        1,
        2048,
        ["<image>\nWhat is shown in this picture?", "The picture shows a red bus."],
    ),
    "chinese_two_rounds": (
        1,
        2048,
        ["图中有什么？", "图中有一只猫和两只狗。", "左边的人？", "红色的衣服 🙂"],
    ),
    "two_images": (
        2,
        2048,
        ["First <image> second <image>.", " leading and trailing ", " ", "\nnew\n\nline\n"],
    ),
    "boxes": (
        1,
        2048,
        [
            "Where is the <ref>dog</ref> in <image>?",
            "<ref>a dog</ref><box>[[1, 2, 3, 4]]</box>",
            "And <image>?",
            "<box>[[5, 6, 7, 8]]</box> <image> <quad></quad>",
        ],
    ),
    "placeholder_middle": (1, 2048, ["Describe <image> in detail.", "A red bus."]),
    "placeholder_end": (1, 2048, ["What is shown?\n<image>", "A red bus."]),
    "placeholder_missing": (1, 2048, ["What is shown?", "A red bus."]),
    "placeholder_in_second_round": (1, 2048, ["Hi", "Hello.", "<image> And?", "A dog."]),
    "second_image_in_second_round": (2, 2048, ["<image> a", "A dog.", "b <image>", "Two dogs."]),
    "too_few_placeholders": (3, 2048, ["<image> a <image>", "A dog."]),
    "newline_first": (0, 2048, ["What?", "\nA dog.\n"]),
    "spaces_only": (0, 2048, [" ", "  "]),
    # the assistant speaks first
    "greeting": (0, 2048, ["gpt:Hello.", "human:What is this?", "gpt:A dog."]),
    "greeting_image": (1, 2048, ["gpt:Hello.", "human:<image>\nWhat?", "gpt:A dog."]),
    "greeting_image_nowhere": (1, 2048, ["gpt:Hello.", "human:What?", "gpt:A dog."]),
    "greeting_has_image": (1, 2048, ["gpt:<image>", "human:What?", "gpt:A dog."]),
    "greeting_alone": (0, 2048, ["gpt:Hello."]),
    # the template cannot be followed
    "no_turn": (0, 2048, []),
    "odd": (0, 2048, ["What is this?", "A dog.", "And?"]),
    "odd_long": (0, 24, ["What is this?", "A dog and a red bus on the grass.", "And?"]),
    "role_twice": (0, 2048, ["human:a", "gpt:b", "gpt:c", "human:d"]),
    "role_unknown": (0, 2048, ["human:a", "gpt:b", "tool:c", "gpt:d"]),
    "empty_answer": (0, 2048, ["What is this?", ""]),
    "empty_answer_between": (0, 2048, ["What?", "", "And?", "A dog."]),
    "empty_question": (0, 2048, ["", "A dog."]),
    "empty_question_with_image": (1, 2048, ["", "A dog."]),
    "end_in_question": (0, 2048, ["a<|im_end|>b", "A dog."]),
    "end_in_answer": (0, 2048, ["What?", "A dog.<|im_end|>"]),
    "round_in_question": (
        0,
        2048,
        ["a<|im_end|><|im_start|>assistant\nb<|im_end|><|im_start|>user\nc", "A dog."],
    ),
    # special tokens written out
    "img_in_question": (0, 2048, ["What does <img> mean?", "A picture."]),
    "img_in_answer": (0, 2048, ["Which tag?", "It is <img>."]),
    "img_beside_image": (1, 2048, ["<image>\nWhat does <img> mean?", "A picture."]),
    "img_end_beside_image": (1, 2048, ["<image>\nWhat does </img> mean?", "A picture."]),
    "img_pair": (0, 2048, ["<img>dog.png</img> What?", "A dog."]),
    "img_context": (0, 2048, ["What is <IMG_CONTEXT>?", "A word."]),
    "start_in_question": (0, 2048, ["What is <|im_start|>?", "A mark."]),
    "bos_in_question": (0, 2048, ["What is <|startoftext|>?", "A mark."]),
    "end_of_text_in_answer": (0, 2048, ["Which?", "<|endoftext|>"]),
    "pad_in_question": (0, 2048, ["What is <unk>?", "A word."]),
    # cut on the right: 15 ids before an answer of 8; of two pictures, the second is ids 27 to 32
    "cut_nowhere": (0, 23, ["What?", "A dog and a red bus."]),
    "cut_end_mark": (0, 22, ["What?", "A dog and a red bus."]),
    "cut_in_answer": (0, 18, ["What?", "A dog and a red bus."]),
    "cut_before_answer": (0, 15, ["What?", "A dog and a red bus."]),
    "cut_leaves_one": (0, 16, ["What?", "A dog and a red bus."]),
    "cut_in_second_round": (0, 30, ["What?", "A dog and a red bus.", "And?", "A cat."]),
    "cut_in_image": (1, 12, ["<image>\nWhat?", "A dog."]),
    "cut_in_second_image": (2, 32, ["<image> a", "A dog.", "<image>", "Two dogs."]),
    "cut_after_second_image": (2, 33, ["<image> a", "A dog.", "<image>", "Two dogs."]),
    "cut_before_second_image": (2, 27, ["<image> a", "A dog.", "<image>", "Two dogs."]),
}


def write_tokenizer() -> None:
    """Train the model and write the three files, unless they are there."""
    if (HERE / "tokenizer.model").is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        demo.write(Path(folder), demo.train(CORPUS * 8, 640))
        shutil.copy(Path(folder) / "tokenizer.model", HERE)
        shutil.copy(Path(folder) / "special_tokens_map.json", HERE)
        config = json.loads((Path(folder) / "tokenizer_config.json").read_text("utf-8"))
    decoder = config["added_tokens_decoder"]
    del decoder["6"]
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    (HERE / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def entry_of(num_images: int, texts: list[str]) -> dict[str, Any]:
    """A case as a json line."""
    turns = []
    for number, text in enumerate(texts):
        role, colon, rest = text.partition(":")
        named = colon and role in ("human", "gpt", "tool")
        turns.append(
            {
                "from": role if named else ("human", "gpt")[number % 2],
                "value": rest if named else text,
            }
        )
    return {"image": [f"{number}.png" for number in range(num_images)], "conversations": turns}


def slow_tokenizer(legacy: bool | None) -> LlamaTokenizer:
    """The published tokenizer; ``None`` leaves ``legacy`` to the class."""
    slow = LlamaTokenizer.from_pretrained(str(HERE), legacy=legacy, use_fast=False)
    assert slow.add_tokens(NINE, special_tokens=True) == len(NINE)
    return slow


def encode_all() -> dict[str, Any]:
    """Ids of every text; ids and mask of every conversation."""
    slow, default, other = (slow_tokenizer(legacy) for legacy in (True, None, False))
    texts, conversations = [], []
    for text in TEXTS:
        ids = slow(text)["input_ids"]
        assert ids == default(text)["input_ids"]
        texts.append({"text": text, "ids": ids})
    for name, (num_images, max_length, case) in CASES.items():
        entry = entry_of(num_images, case)
        published = preprocess(
            entry,
            lambda text: list(slow(text)["input_ids"]),
            tokens_per_image=4,
            max_length=max_length,
            pad_id=slow.pad_token_id,
            image_end_id=slow.convert_tokens_to_ids("</img>"),
        )
        conversations.append(
            {
                "name": name,
                **entry,
                "max_length": max_length,
                "failure": published.failure,
                "trained": published.trained,
                "ids": published.ids,
                "supervised": [int(target != IGNORED) for target in published.targets],
                "ids_if_not_legacy": other(published.prompt)["input_ids"],
            }
        )
    return {"vocab_size": len(slow), "texts": texts, "conversations": conversations}


def main() -> None:
    """Write ``golden.json``."""
    assert transformers.__version__ == "4.37.2", transformers.__version__
    write_tokenizer()
    golden = {
        "made_by": "tests/data/golden_tokens/make_golden.py",
        "versions": {
            "transformers": transformers.__version__,
            "sentencepiece": sentencepiece.__version__,
        },
        **encode_all(),
    }
    text = json.dumps(golden, ensure_ascii=True, separators=(",", ":"))
    # one entry a line, so that a difference can be read
    text = text.replace('},{"', '},\n{"').replace(':[{"', ':[\n{"')
    (HERE / "golden.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
