"""Lengths like those of the published sets, drawn from what is known about them.

The sets' sizes are the published ones and the mean over all samples is the known one: 274 tokens of
text and 256 for each picture. How those 274 spread over the sets, and within each, is not known;
the shapes here are plausible ones (log-normal, long answers in the two sets of instructions, a tail
of text-only dialogues that the cut at ``seq_length`` shortens), scaled until the mean is met.
"""

from dataclasses import dataclass

import numpy as np

from mmlm.data.step_plan import SampleTable

MEAN_TEXT_TOKENS = 274
"""Text tokens of a sample after the cut at 2048, mean over all sets."""

TOKENS_PER_IMAGE = 256


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """Shape of one set."""

    name: str
    num_samples: int
    """As published."""
    text_only: float = 0.0
    """Share of samples without a picture."""
    text_tokens: float
    """Mean text of a sample with a picture, before scaling."""
    spread: float
    """Standard deviation of the logarithm of the text's length."""


PUBLISHED_SETS = (
    PublishedSet(name="sharegpt4v_cap100k", num_samples=102_025, text_tokens=280, spread=0.25),
    PublishedSet(name="llava_150k_zh", num_samples=157_712, text_tokens=330, spread=0.5),
    PublishedSet(
        name="sharegpt4v_mix665k", num_samples=665_058, text_only=0.06, text_tokens=250, spread=0.7
    ),
    PublishedSet(name="dvqa", num_samples=200_000, text_tokens=260, spread=0.5),
    PublishedSet(name="chartqa", num_samples=18_317, text_tokens=100, spread=0.2),
    PublishedSet(name="ai2d", num_samples=12_413, text_tokens=130, spread=0.3),
    PublishedSet(name="docvqa", num_samples=10_211, text_tokens=160, spread=0.5),
    PublishedSet(name="geoqa+", num_samples=72_318, text_tokens=200, spread=0.4),
    PublishedSet(name="synthdog_en", num_samples=29_765, text_tokens=400, spread=0.5),
)

_TEXT_ONLY_TOKENS, _TEXT_ONLY_SPREAD = 900, 0.8
_TEMPLATE_TOKENS = 50
"""System message and roles: no sample is shorter."""


def published_table(num_samples: int = 200_000, *, seq_length: int = 2048) -> SampleTable:
    """Draw the sizes of ``num_samples`` samples of the nine sets, the same at every call.

    Args:
        num_samples: how many, in the sets' proportions.
        seq_length: where samples are cut.
    """
    generator = np.random.default_rng(274)
    total = sum(entry.num_samples for entry in PUBLISHED_SETS)
    texts, images = [], []
    for entry in PUBLISHED_SETS:
        count = round(num_samples * entry.num_samples / total)
        pictured = (generator.random(count) >= entry.text_only).astype(np.int64)
        mean = np.where(pictured, entry.text_tokens, _TEXT_ONLY_TOKENS)
        spread = np.where(pictured, entry.spread, _TEXT_ONLY_SPREAD)
        # the mean of a log-normal is exp(mu + sigma^2 / 2)
        texts.append(mean * np.exp(spread * generator.standard_normal(count) - spread**2 / 2))
        images.append(pictured)
    text, num_images = np.concatenate(texts), np.concatenate(images)
    room = seq_length - TOKENS_PER_IMAGE * num_images
    at_2048 = 2048 - TOKENS_PER_IMAGE * num_images
    scale = 1.0
    for _ in range(8):  # the cut takes from the mean what scaling adds: a few rounds meet
        scale *= MEAN_TEXT_TOKENS / _cut(text * scale, at_2048).mean()
    num_text = _cut(text * scale, room)
    return SampleTable(
        num_tokens=num_text + TOKENS_PER_IMAGE * num_images,
        num_images=num_images,
        num_supervised_tokens=np.maximum(1, (num_text - _TEMPLATE_TOKENS) * 2 // 3),
        usable=np.arange(len(num_text)),
    )


def _cut(text: np.ndarray, room: np.ndarray) -> np.ndarray:
    cut = np.minimum(np.rint(text), room)
    return np.maximum(cut, _TEMPLATE_TOKENS).astype(np.int64)
