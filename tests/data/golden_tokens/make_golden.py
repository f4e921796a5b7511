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

HERE = Path(__file__).parent
SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
NINE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]
NINE += ["<ref>", "</ref>", "<box>", "</box>"]
IMAGE = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
END = "<|im_end|>"
HEADER = "<|im_start|>assistant\n"

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

CONVERSATIONS: list[tuple[int, list[tuple[str, str]]]] = [
    (0, [("What is this?", "A dog.")]),
    (0, [("Is <image> a word?", "<image> is\u2581not.")]),
    (1, [("<image>\nWhat is shown in this picture?", "The picture shows a red bus.")]),
    (1, [("图中有什么？", "图中有一只猫和两只狗。"), ("左边的人？", "红色的衣服 🙂")]),
    (2, [("First <image> second <image>.", " leading and trailing "), (" ", "\nnew\n\nline\n")]),
    (
        1,
        [
            (
                "Where is the <ref>dog</ref> in <image>?",
                "<ref>a dog</ref><box>[[1, 2, 3, 4]]</box>",
            ),
            ("And <image>?", "<box>[[5, 6, 7, 8]]</box> <image>"),
            ("<|im_start|>", "  "),
        ],
    ),
]
"""Number of pictures, and pairs of question and answer as the data has them."""


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


def with_images(num_images: int, turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first placeholders become image blocks; a first question without one gets one."""
    if num_images and "<image>" not in turns[0][0]:
        turns = [("<image>\n" + turns[0][0], turns[0][1]), *turns[1:]]
    joined = "\0".join(text for pair in turns for text in pair)
    texts = iter(joined.replace("<image>", IMAGE, num_images).split("\0"))
    return list(zip(texts, texts, strict=True))


def prompt_of(turns: list[tuple[str, str]]) -> str:
    """A conversation as the template has it."""
    text = f"<|im_start|>system\n{SYSTEM}{END}"
    for question, answer in turns:
        text += f"<|im_start|>user\n{question}{END}{HEADER}{answer}{END}"
    return text


def supervised(slow: LlamaTokenizer, turns: list[tuple[str, str]]) -> list[int]:
    """The published mask: each pair is counted on its own, up to its header and up to its end."""
    mask: list[int] = []
    before = f"<|im_start|>system\n{SYSTEM}{END}"
    for question, answer in turns:
        instruction = f"{before}<|im_start|>user\n{question}{END}{HEADER}"
        num_masked = len(slow(instruction)["input_ids"])
        num_tokens = len(slow(instruction + answer)["input_ids"]) + 1  # and its mark of the end
        mask += [0] * num_masked + [1] * (num_tokens - num_masked)
        before = ""
    return mask


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
    for num_images, raw in CONVERSATIONS:
        turns = with_images(num_images, raw)
        prompt = prompt_of(turns)
        ids, mask = slow(prompt)["input_ids"], supervised(slow, turns)
        assert len(mask) == len(ids), prompt
        conversations.append(
            {
                "num_images": num_images,
                "turns": raw,
                "prompt": prompt,
                "ids": ids,
                "supervised": mask,
                "ids_if_not_legacy": other(prompt)["input_ids"],
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
