"""A sample and a packed row as text, as the model sees them: for people who want to look."""

import unicodedata
from collections.abc import Iterator, Sequence

from PIL import Image

from mmlm.data.annotation import IntArray
from mmlm.data.lookup import Look
from mmlm.data.rejection import Rejection
from mmlm.data.sample import IGNORE, SampleSettings, TokenizedSample, image_paths
from mmlm.data.strip import Segment
from mmlm.data.tokenizer import Tokenizer

LEGEND = "trained on: lines with +; not trained on: the others"

_GREEN, _CYAN, _RED, _PLAIN = "\x1b[32m", "\x1b[36m", "\x1b[31m", "\x1b[0m"


def format_sample(
    look: Look,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    *,
    num_samples: int,
    color: bool = False,
    list_tokens: bool = False,
) -> str:
    """Return everything about one sample.

    Args:
        look: the sample.
        tokenizer: that made it.
        settings: that it was made with.
        num_samples: of all sets together.
        color: mark supervised text with ANSI colours, too.
        list_tokens: one token a line instead of running text.
    """
    place, record, tokens = look.place, look.record, look.tokens
    entry = place.annotation_set
    identity = f", id '{escape(record.identity)}'" if record and record.identity else ""
    lines = [
        f"sample {place.sample_id} of {num_samples}: set '{entry.name}'{identity}",
        f"  line      {place}",
    ]
    if record is not None:
        lines += _pictures(look, settings)
    if look.rejection is not None:
        lines.append(_paint(f"  left out  {_rejected(look.rejection)}", _RED, color))
    if tokens is not None:
        lines += _lengths(tokens, settings)
        lines += [
            f"  remark    {remark.reason.value}: {remark.detail}" for remark in tokens.remarks
        ]
        lines.append("")
        if list_tokens:
            lines += _token_lines(tokens, tokenizer, color)
        else:
            lines += [f"  {LEGEND}", ""]
            lines += _text_lines(tokens, tokenizer, settings.embeddings_per_image, color)
    elif record is not None:
        lines += ["", "  as it stands in the file:"]
        for turn in record.turns:
            lines.append(f"    {escape(turn.role)}: {escape(turn.text)}")
    return "\n".join(lines)


def format_row(title: str, segments: Sequence[Segment], seq_length: int) -> str:
    """Return the segments of a packed row as a table.

    Args:
        title: the first line.
        segments: in their order.
        seq_length: tokens that the row can hold.
    """
    lines = [
        title,
        f"  {'from':>6}{'to':>7}{'sample':>10}{'tokens':>8}{'trained':>9}{'images':>8}"
        f"  {'weight of a token':>18}",
    ]
    start = 0
    for segment in segments:
        tokens = segment.tokens
        end = start + len(tokens.input_ids)
        lines.append(
            f"  {start:>6}{end - 1:>7}{segment.sample_id:>10}{len(tokens.input_ids):>8}"
            f"{tokens.num_supervised_tokens:>9}{tokens.num_images:>8}  {segment.weight:>18.9g}"
        )
        start = end
    lines.append(f"  {start} of {seq_length} tokens, {start / seq_length:.1%}")
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return the text with control characters spelled out, so that data cannot steer a terminal."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character)[0] != "C"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def _rejected(rejection: Rejection) -> str:
    return escape(str(rejection))


def _pictures(look: Look, settings: SampleSettings) -> Iterator[str]:
    assert look.record is not None
    size, tokens = settings.image_size, look.tokens
    for slot, path in enumerate(image_paths(look.record, look.place.annotation_set.root)):
        where = ""
        if tokens is not None:
            block = _block(tokens, slot, settings.embeddings_per_image)
            where = f"; tokens {block[0]} to {block[1] - 1}" if block else "; behind the cut"
        try:
            with Image.open(path) as image:
                found = f"{image.width} x {image.height} {image.format} {image.mode}"
            found += f" -> {size} x {size}"
            found += ", JPEG of quality 75 to 100 before" * look.place.annotation_set.data_augment
        except Exception as error:  # Pillow's plugins raise a dozen types on broken bytes
            found = f"cannot be opened ({escape(str(error))})"
        yield f"  image {slot}   {escape(str(path))}"
        yield f"            {found}{where}"


def _block(tokens: TokenizedSample, slot: int, embeddings: int) -> tuple[int, int] | None:
    if slot >= tokens.num_images:
        return None
    first = int(tokens.image_positions[slot * embeddings])
    return first, first + embeddings


def _lengths(tokens: TokenizedSample, settings: SampleSettings) -> list[str]:
    length, uncut = len(tokens.input_ids), tokens.num_tokens_uncut
    cut = f", cut from {uncut}" if uncut > length else ""
    images = len(tokens.image_positions)
    return [
        f"  tokens    {length}{cut} (at most {settings.seq_length}): {images} of images, "
        f"{length - images} of text; {tokens.num_supervised_tokens} are trained on"
    ]


def _text_lines(
    tokens: TokenizedSample, tokenizer: Tokenizer, embeddings: int, color: bool
) -> Iterator[str]:
    ids, wanted = tokens.input_ids, _wanted(tokens)
    context = ids == tokenizer.img_context_id
    slot, start = 0, 0
    for end in range(1, len(ids) + 1):
        same = end < len(ids) and wanted[end] == wanted[start] and context[end] == context[start]
        if same and (not context[start] or end - start < embeddings):
            continue
        if context[start]:
            text = f"[image {slot}: {end - start} x <IMG_CONTEXT>]"
            yield "      " + _paint(text, _CYAN, color)
            slot += 1
        else:
            margin = "    + " if wanted[start] else "      "
            for line in escape(tokenizer.decode(ids[start:end])).split("\n"):
                yield margin + _paint(line, _GREEN if wanted[start] else "", color)
        start = end


def _token_lines(tokens: TokenizedSample, tokenizer: Tokenizer, color: bool) -> Iterator[str]:
    wanted = _wanted(tokens)
    yield f"  {'place':>6}{'id':>8}   {'token':<24}{'label':>8}"
    for place, number in enumerate(tokens.input_ids.tolist()):
        label = int(tokens.labels[place])
        piece = escape(tokenizer.piece(number)).replace("\n", "\\n")
        mark, paint = ("+", _GREEN) if wanted[place] else (" ", "")
        if number == tokenizer.img_context_id:
            paint = _CYAN
        text = f"  {place:>6}{number:>8} {mark} {piece:<24}{label if label != IGNORE else '-':>8}"
        yield _paint(text, paint, color)


def _wanted(tokens: TokenizedSample) -> IntArray:
    """Whether each token is one that the model is trained to say, bool [n]."""
    wanted: IntArray = (tokens.labels != IGNORE).copy()
    wanted[1:], wanted[0] = wanted[:-1].copy(), False
    return wanted


def _paint(text: str, code: str, color: bool) -> str:
    return f"{code}{text}{_PLAIN}" if color and code and text else text
