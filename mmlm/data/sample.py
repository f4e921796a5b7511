"""From an annotation record to token ids, labels and pixels of one conversation.

Letters: n tokens, k images, S pixels along a side.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mmlm.data.annotation import AnnotationSet, IntArray, Record
from mmlm.data.conversation import IMG_END, SYSTEM_MESSAGE, render, repair
from mmlm.data.image import ByteArray, FloatArray, augment, load_image, normalise, squash
from mmlm.data.rejection import Reason, Rejection, Remark
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import DataError

IGNORE = -100
"""Label of a token that is not supervised; never leaves this room."""

MAX_IMAGES_PER_SAMPLE = 64
"""Global image ids are ``sample_id * 64 + slot``."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What decides the length and the content of every sample."""

    seq_length: int
    """Tokens at which a sample is cut on the right."""
    image_size: int
    """S, pixels."""
    embeddings_per_image: int
    """``<IMG_CONTEXT>`` tokens of a picture."""
    system_message: str = SYSTEM_MESSAGE
    """Text of the system turn."""
    special_literals: Literal["exclude", "tokens"] = "exclude"
    """What becomes of a text that spells a special token such as ``<img>`` or ``<|im_start|>``: its
    sample is left out, or it is that token, as published. ``<box>``, ``<ref>`` and ``<quad>`` are
    always tokens; ``<|im_end|>`` and ``<IMG_CONTEXT>`` never pass."""


@dataclass(frozen=True, kw_only=True)
class TokenizedSample:
    """A conversation without its pixels."""

    input_ids: IntArray
    """int64 [n]."""
    labels: IntArray
    """int64 [n], shifted: ``labels[i]`` is token i + 1 or -100; the last is -100."""
    image_positions: IntArray
    """int64 [k * embeddings_per_image]: where ``<IMG_CONTEXT>`` stands."""
    num_images: int
    """k: pictures left after the cut."""
    num_tokens_uncut: int
    """Length before the cut."""
    remarks: tuple[Remark, ...]
    """What was changed on the way."""

    @property
    def num_supervised_tokens(self) -> int:
        """Labels that are trained on."""
        return int(np.count_nonzero(self.labels != IGNORE))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation, unpacked."""

    sample_id: int
    """Index in the concatenated sets."""
    input_ids: IntArray
    """int64 [n]."""
    labels: IntArray
    """int64 [n], shifted: ``labels[i]`` is token i + 1 or -100; the last is -100."""
    image_positions: IntArray
    """int64 [k * embeddings_per_image]: where ``<IMG_CONTEXT>`` stands."""
    image_ids: IntArray
    """int64 [k]: ``sample_id * 64 + slot``."""
    pixel_values: FloatArray | None
    """float32 [k, 3, S, S]; None where pixels are not wanted."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What the step plan needs to know of a sample."""

    num_tokens: int
    """Length after the cut."""
    num_tokens_uncut: int
    """Length before the cut."""
    num_images: int
    """Pictures left after the cut."""
    num_supervised_tokens: int
    """Labels that are trained on."""
    rejection: Rejection | None = None
    """Why it cannot be used; the numbers are then 0."""
    remarks: tuple[Remark, ...] = ()
    """What was changed so that it can be used."""

    @classmethod
    def rejected(cls, reason: Reason, detail: str) -> "Measure":
        """The measure of a record that cannot be used."""
        rejection = Rejection(reason=reason, detail=detail)
        return cls(
            num_tokens=0,
            num_tokens_uncut=0,
            num_images=0,
            num_supervised_tokens=0,
            rejection=rejection,
        )


def tokenize(
    record: Record, tokenizer: Tokenizer, settings: SampleSettings
) -> TokenizedSample | Rejection:
    """Write a record in the template, encode it and cut it.

    Args:
        record: one line of a set.
        tokenizer: of the language model.
        settings: lengths and sizes.

    Returns:
        The tokens, or the rule that the record breaks.
    """
    if len(record.images) > MAX_IMAGES_PER_SAMPLE:
        return Rejection(
            reason=Reason.TOO_MANY_IMAGES,
            detail=f"{len(record.images)} images; at most {MAX_IMAGES_PER_SAMPLE} a sample",
        )
    pieces = render(
        record.turns,
        num_images=len(record.images),
        embeddings_per_image=settings.embeddings_per_image,
        system_message=settings.system_message,
        reserved=_reserved(record, tokenizer, settings),
    )
    if isinstance(pieces, Rejection):
        return pieces
    ids: list[int] = []
    supervised: list[bool] = []
    header_lengths = {header: len(tokenizer.encode(header)) for header, _ in set(pieces[1::3])}
    for (before, _), (header, _), (answer, _) in zip(
        pieces[::3], pieces[1::3], pieces[2::3], strict=True
    ):
        # The header's text and the answer lie between the same two special tokens, so they are
        # encoded together; as published, as many tokens as the header alone has are masked.
        prompt_ids = tokenizer.encode(before)
        answer_ids = tokenizer.encode(header + answer)
        num_masked = min(header_lengths[header], len(answer_ids))
        ids += prompt_ids + answer_ids
        supervised += [False] * (len(prompt_ids) + num_masked)
        supervised += [True] * (len(answer_ids) - num_masked)
    return _cut(
        np.array(ids, dtype=np.int64),
        np.array(supervised, dtype=np.bool_),
        tokenizer.img_context_id,
        settings,
        repair(record.turns, len(record.images))[1],
    )


def _reserved(record: Record, tokenizer: Tokenizer, settings: SampleSettings) -> tuple[str, ...]:
    """Texts that no turn may contain, beside those that every template forbids."""
    if settings.special_literals == "exclude":
        return tokenizer.special_literals
    # With these the published code's own counts fail: of tokens that are not padding, of images.
    return ((tokenizer.pad_token,) if tokenizer.pad_token else ()) + (
        (IMG_END,) if record.images else ()
    )


def _cut(
    ids: IntArray,
    supervised: np.ndarray,
    img_context_id: int,
    settings: SampleSettings,
    remarks: tuple[Remark, ...],
) -> TokenizedSample | Rejection:
    positions = np.flatnonzero(ids == img_context_id)
    blocks = positions.reshape(-1, settings.embeddings_per_image)
    # A block starts at its <img> and ends after its </img>.
    starts, ends = blocks[:, 0] - 1, blocks[:, -1] + 2
    length = settings.seq_length
    if np.any((starts < length) & (length < ends)):
        return Rejection(
            reason=Reason.CUT_INSIDE_IMAGE,
            detail=f"{len(ids)} tokens; the cut at seq_length {length} falls inside an image, "
            "shorten the text before it or raise data.seq_length",
        )
    num_images = int(np.count_nonzero(ends <= length))
    targets = np.where(supervised, ids, IGNORE)[:length]
    labels = np.append(targets[1:], IGNORE)
    if not np.any(labels != IGNORE):
        return Rejection(
            reason=Reason.NO_SUPERVISED_TOKEN,
            detail=f"{len(ids)} tokens; no answer is left after the cut at seq_length {length}, "
            "shorten the question or raise data.seq_length",
        )
    if len(ids) > length:
        detail = (
            f"{len(ids)} tokens, cut at seq_length {length}; the cut takes "
            f"{np.count_nonzero(supervised[length:])} of {np.count_nonzero(supervised)} supervised "
            f"tokens and {len(blocks) - num_images} of {len(blocks)} images"
        )
        remarks = (*remarks, Remark(reason=Reason.LONGER_THAN_SEQ_LENGTH, detail=detail))
    return TokenizedSample(
        input_ids=ids[:length],
        labels=labels,
        image_positions=blocks[:num_images].reshape(-1),
        num_images=num_images,
        num_tokens_uncut=len(ids),
        remarks=remarks,
    )


def measure(record: Record, tokenizer: Tokenizer, settings: SampleSettings) -> Measure:
    """Return the lengths of a record, or why it cannot be used; opens no picture."""
    tokens = tokenize(record, tokenizer, settings)
    if isinstance(tokens, Rejection):
        return Measure.rejected(tokens.reason, tokens.detail)
    return Measure(
        num_tokens=len(tokens.input_ids),
        num_tokens_uncut=tokens.num_tokens_uncut,
        num_images=tokens.num_images,
        num_supervised_tokens=tokens.num_supervised_tokens,
        remarks=tokens.remarks,
    )


def image_paths(record: Record, root: Path) -> tuple[Path, ...]:
    """Return where the pictures of ``record`` are."""
    return tuple(root / name for name in record.images)


def load_images(
    record: Record,
    annotation_set: AnnotationSet,
    num_images: int,
    image_size: int,
    *,
    sample_id: int,
    seed: int,
    epoch: int,
) -> tuple[ByteArray, ...]:
    """Decode, augment and squash the first pictures of a record; normalising is left to others.

    Args:
        record: its line.
        annotation_set: the set it belongs to (root of its pictures, augmentation).
        num_images: k, how many are left after the cut.
        image_size: S, pixels.
        sample_id: index in the concatenated sets.
        seed: seed of the run, for augmentation.
        epoch: from 0, for augmentation.

    Returns:
        uint8 [S, S, 3] each.

    Raises:
        DataError: a picture does not decode; names set, file and line.
    """
    images = []
    for slot, path in enumerate(image_paths(record, annotation_set.root)[:num_images]):
        try:
            image = load_image(path)
            if annotation_set.data_augment:
                image = augment(image, seed=seed, sample_id=sample_id, slot=slot, epoch=epoch)
        except DataError as error:
            raise DataError(f"{place_of(record, annotation_set)}: {error}") from error
        images.append(squash(image, image_size))
    return tuple(images)


def place_of(record: Record, annotation_set: AnnotationSet) -> str:
    """Return file, line, set and id of a record, as messages name it."""
    return f"{record.place} (set '{annotation_set.name}', id '{record.identity}')"


def build_sample(
    record: Record,
    annotation_set: AnnotationSet,
    tokenizer: Tokenizer,
    settings: SampleSettings,
    *,
    sample_id: int,
    seed: int,
    epoch: int,
    with_pixels: bool,
) -> Sample:
    """Build one training sample.

    Args:
        record: its line.
        annotation_set: the set it belongs to (root of its pictures, augmentation).
        tokenizer: of the language model.
        settings: lengths and sizes.
        sample_id: index in the concatenated sets.
        seed: seed of the run, for augmentation.
        epoch: from 0, for augmentation.
        with_pixels: decode the pictures; otherwise ``pixel_values`` is None.

    Raises:
        DataError: the record breaks a rule or a picture does not decode; names set, file and line.
    """
    tokens = tokenize(record, tokenizer, settings)
    if isinstance(tokens, Rejection):
        raise DataError(f"{place_of(record, annotation_set)}: {tokens}")
    num_images = tokens.num_images
    pixel_values = None
    if with_pixels:
        size = settings.image_size
        pixel_values = np.empty((num_images, 3, size, size), dtype=np.float32)
        images = load_images(
            record, annotation_set, num_images, size, sample_id=sample_id, seed=seed, epoch=epoch
        )
        for slot, image in enumerate(images):
            normalise(image, out=pixel_values[slot])
    return Sample(
        sample_id=sample_id,
        input_ids=tokens.input_ids,
        labels=tokens.labels,
        image_positions=tokens.image_positions,
        image_ids=sample_id * MAX_IMAGES_PER_SAMPLE + np.arange(num_images, dtype=np.int64),
        pixel_values=pixel_values,
    )
