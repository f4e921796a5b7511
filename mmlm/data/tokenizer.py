"""SentencePiece with added tokens, as HuggingFace's slow Llama tokenizer does it.

The text is split at the added and special tokens (longest match first); each stretch between them
is encoded on its own by SentencePiece as the model file says; nothing is stripped. Recent fast
tokenizers differ; SentencePiece itself is exact. This is what ``legacy: true`` means, which is also
the default of transformers 4.37 that the published model was trained with; the key is not read.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from mmlm.data.conversation import IM_END, IM_START, IMG_CONTEXT, IMG_END, IMG_START
from mmlm.errors import DataError

NEW_TOKENS = (
    IMG_START,
    IMG_END,
    IMG_CONTEXT,
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
"""Added after the vocabulary in this order, unless the folder has them already."""

TEXT_TOKENS = frozenset(NEW_TOKENS[3:])
"""Of these, the ones that data may spell out: regions and their names."""

_SPECIAL_FIELDS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token")


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        folder: where it was read from.
        vocab_size: true number of ids, the nine added tokens included; never padded.
        added_tokens: text to id of every token that the text is split at.
        img_context_id: id that holds the place of one image embedding.
        im_start_id: id of ``<|im_start|>``.
        im_end_id: id of ``<|im_end|>``.
        pad_token: text of the pad token; empty where the folder names none.
        special_literals: texts of the special tokens that no data should spell out, sorted: all but
            `TEXT_TOKENS`.
        fingerprint: hex digest that changes whenever an encoding could.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read ``tokenizer.model`` and, where present, the json files beside it.

        Args:
            folder: a HuggingFace folder with ``tokenizer.model``.

        Raises:
            DataError: a file is missing or broken, or there are no ChatML tokens.
        """
        self.folder = Path(folder)
        model = self._read_model()
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError) as error:
            raise DataError(
                f"{self.folder / 'tokenizer.model'}: not a SentencePiece model ({error})"
            ) from error
        self.pad_token = ""
        self.added_tokens, special = self._read_added_tokens()
        self.vocab_size = max(self._pieces.get_piece_size(), 1 + max(self.added_tokens.values()))
        for token in NEW_TOKENS:
            if token not in self.added_tokens:
                known = self._piece_id(token)
                self.added_tokens[token] = self.vocab_size if known is None else known
                self.vocab_size += known is None
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        special = {*special, *NEW_TOKENS} - TEXT_TOKENS
        self.special_literals = tuple(sorted(special & self.added_tokens.keys()))
        patterns = {token: re.escape(token) for token in longest_first}
        # hundreds in a row are found as one; written so that all patterns begin alike, with "<"
        patterns[IMG_CONTEXT] += f"(?:{patterns[IMG_CONTEXT]})*"
        self._split = re.compile(f"({'|'.join(patterns.values())})")
        self._names = {number: token for token, number in self.added_tokens.items()}
        self.img_context_id = self.added_tokens[IMG_CONTEXT]
        self.im_start_id = self.added_tokens[IM_START]
        self.im_end_id = self.added_tokens[IM_END]
        digest = hashlib.sha256(model)
        digest.update(json.dumps(sorted(self.added_tokens.items())).encode())
        digest.update(json.dumps([self.special_literals, self.pad_token]).encode())
        self.fingerprint = digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``; no BOS and no end token are added."""
        ids: list[int] = []
        for number, part in enumerate(self._split.split(text)):
            if number % 2:  # re.split puts the separators at odd places
                token = IMG_CONTEXT if part.startswith(IMG_CONTEXT) else part
                ids += [self.added_tokens[token]] * (len(part) // len(token))
            elif part:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_added_tokens: bool = False) -> str:
        """Return the text of ``ids``.

        Args:
            ids: token ids below `vocab_size`.
            skip_added_tokens: leave added and special tokens out.

        Returns:
            The text; an added token appears as it is written.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        parts: list[str] = []
        run: list[int] = []
        for number in ids:
            if number not in self._names:
                if not 0 <= number < self._pieces.get_piece_size():
                    raise DataError(
                        f"token id {number} is outside the vocabulary of {self.folder} "
                        f"({self.vocab_size} ids)"
                    )
                run.append(int(number))
                continue
            if run:
                parts.append(self._pieces.decode(run))
                run = []
            if not skip_added_tokens:
                parts.append(self._names[number])
        if run:
            parts.append(self._pieces.decode(run))
        return "".join(parts)

    def piece(self, number: int) -> str:
        """Return one token as the vocabulary writes it, e.g. ``<0x0A>`` or ``<img>``."""
        return self._names.get(number) or str(self._pieces.id_to_piece(int(number)))

    def _read_model(self) -> bytes:
        if not self.folder.is_dir():
            raise DataError(
                f"{self.folder}: the tokenizer folder does not exist; set data.tokenizer to a "
                "folder with tokenizer.model"
            )
        path = self.folder / "tokenizer.model"
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot read the SentencePiece model ({error.strerror}); mmlm needs the "
                "original file, not only tokenizer.json"
            ) from error

    def _read_added_tokens(self) -> tuple[dict[str, int], set[str]]:
        """Ids of the tokens that text is split at, and which of them are marked as special."""
        config = self._read_json("tokenizer_config.json")
        tokens: dict[str, int] = {}
        special = set()
        for number, entry in config.get("added_tokens_decoder", {}).items():
            tokens[_token_text(entry)] = int(number)
            if isinstance(entry, dict) and entry.get("special"):
                special.add(_token_text(entry))
        for text, number in self._read_json("added_tokens.json").items():
            tokens[text] = int(number)
        named = [IM_START, IM_END]
        for source in (config, self._read_json("special_tokens_map.json")):
            self.pad_token = _token_text(source.get("pad_token") or self.pad_token)
            named += [_token_text(source[field]) for field in _SPECIAL_FIELDS if source.get(field)]
            named += [_token_text(item) for item in source.get("additional_special_tokens") or []]
        for text in named:
            known = self._piece_id(text)
            if text not in tokens and known is not None:
                tokens[text] = known
        for text in (IM_START, IM_END):
            if text not in tokens:
                raise DataError(
                    f"{self.folder}: the tokenizer has no {text}; the Hermes-2 template needs a "
                    "vocabulary with the ChatML tokens"
                )
        return tokens, special | set(named)

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON ({error}); mend the file") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}: must be a JSON object")
        return content

    def _piece_id(self, text: str) -> int | None:
        number = int(self._pieces.piece_to_id(text))
        return number if self._pieces.id_to_piece(number) == text else None


def _token_text(entry: Any) -> str:
    return str(entry["content"] if isinstance(entry, dict) else entry)
