"""Where the flat list of layers is cut: a pure function of sizes and a layout string.

The model is one list: ``v`` a vision layer (the first one brings the patch embedding with it),
``p`` pixel shuffle and projection, ``E`` text embedding and merge, ``t`` a decoder layer, ``L``
final norm, head and loss. ``|`` cuts it into pipeline stages: ``vv|vpEt|ttL``. ``x*n`` repeats a
letter and ``(..)*n`` a group, as in megatron-core's ``pipeline_model_parallel_layout``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from mmlm.config.costs import forward_costs
from mmlm.config.model import ModelConfig
from mmlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StageChunk:
    """The contiguous piece of the layer list that one pipeline stage holds."""

    vision_layers: range
    """Global indices (from 0) of the vision layers."""
    has_projection: bool
    has_embedding: bool
    decoder_layers: range
    """Global indices (from 0) of the decoder layers."""
    has_output: bool
    """Final norm, head and loss."""

    @property
    def has_vision_embedding(self) -> bool:
        """Whether images enter here."""
        return 0 in self.vision_layers

    def __str__(self) -> str:
        parts = []
        if self.vision_layers:
            parts.append(f"vision {self.vision_layers[0]}-{self.vision_layers[-1]}")
        if self.has_projection:
            parts.append("projection")
        if self.has_embedding:
            parts.append("embedding")
        if self.decoder_layers:
            parts.append(f"decoder {self.decoder_layers[0]}-{self.decoder_layers[-1]}")
        if self.has_output:
            parts.append("head")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The cut: one chunk a row, and the same cut in megatron-core's notation.

    With virtual pipeline stages row k is chunk ``k // PP`` of pipeline rank ``k % PP``.
    """

    layout: str
    """The expanded layout string."""
    chunks: tuple[StageChunk, ...]

    @property
    def vision_layout(self) -> str:
        """Layout of the tower alone for megatron-core: rows without vision layers are blank."""
        return self._part_layout("v")

    @property
    def language_layout(self) -> str:
        """Layout of the decoder alone for megatron-core, on the same rows."""
        return "|".join(re.sub("[vp]", "", row) for row in self.layout.split("|"))

    def _part_layout(self, letter: str) -> str:
        rows = ["t" * row.count(letter) for row in self.layout.split("|")]
        used = [index for index, row in enumerate(rows) if row]
        rows[used[0]] = "E" + rows[used[0]]
        rows[used[-1]] += "L"
        return "|".join(rows)


def make_stage_plan(
    model: ModelConfig,
    num_stages: int,
    layout: str = "auto",
    images_per_token: float | None = None,
) -> StagePlan:
    """Cut the layer list of ``model`` into ``num_stages`` chunks.

    Args:
        model: sizes.
        num_stages: pipeline stages.
        layout: a layout string, or ``auto`` for the cut that balances the estimated work.
        images_per_token: images over tokens of the data, used by ``auto``; see `layer_costs`.

    Returns:
        The plan; its chunks are in pipeline order and none is empty.

    Raises:
        ConfigError: if the layout does not hold the model's layers in order, in ``num_stages``
            non-empty rows, or if there are fewer layers than stages.
    """
    letters = flat_letters(model)
    if layout == "auto":
        if num_stages > len(letters):
            raise ConfigError(
                f"parallel: pipeline_model_parallel_size {num_stages} is more than the "
                f"{len(letters)} pieces of the model ({letters}); use fewer stages"
            )
        rows = _balanced_rows(letters, layer_costs(model, images_per_token), num_stages)
    else:
        rows = _expand(layout).split("|")
        _check_rows(layout, rows, letters, num_stages)
    return StagePlan(layout="|".join(rows), chunks=tuple(_chunks(rows)))


def flat_letters(model: ModelConfig) -> str:
    """The whole layer list of ``model`` as letters, uncut."""
    return "v" * model.vision.num_layers + "pE" + "t" * model.language.num_layers + "L"


def layer_costs(model: ModelConfig, images_per_token: float | None = None) -> list[float]:
    """Estimated multiply-adds of each letter of `flat_letters` for one token of the text stream.

    Attention inside the decoder is left out: in packs of short samples it is below one percent.

    Args:
        model: sizes.
        images_per_token: images over tokens of the data; by default half of the tokens are images',
            the mean of the published data.

    Returns:
        One cost a letter.
    """
    costs = forward_costs(model)
    if images_per_token is None:
        images_per_token = 0.5 / model.vision.embeddings_per_image
    return (
        [images_per_token * costs.vision_layer_per_image] * model.vision.num_layers
        + [images_per_token * costs.projection_per_image, 0.0]
        + [costs.decoder_layer_per_token] * model.language.num_layers
        + [costs.head_per_token]
    )


def _expand(layout: str) -> str:
    layout = layout.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        layout = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), layout)
    return layout


def _check_rows(layout: str, rows: Sequence[str], letters: str, num_stages: int) -> None:
    problems = []
    if len(rows) != num_stages:
        problems.append(
            f"it has {len(rows)} rows for {num_stages} stages (pipeline ranks times chunks of "
            "each); there must be one row a stage"
        )
    if any(not row for row in rows):
        problems.append("every stage must hold at least one layer")
    if "".join(rows) != letters:
        problems.append(
            f"without the cuts it must read {letters} "
            f"({letters.count('v')} v, p, E, {letters.count('t')} t, L)"
        )
    if problems:
        raise ConfigError(f"parallel.pipeline_layout '{layout}': " + "; ".join(problems))


def _balanced_rows(letters: str, costs: Sequence[float], num_stages: int) -> list[str]:
    """Contiguous rows whose largest total cost is as small as possible (dynamic programming)."""
    prefix = [0.0, *accumulate(costs)]
    count = len(letters)
    # best[k][n]: smallest possible largest row when the first n letters fill k rows
    best = [[float("inf")] * (count + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (count + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for k in range(1, num_stages + 1):
        for n in range(k, count + 1):
            for start in range(k - 1, n):
                value = max(best[k - 1][start], prefix[n] - prefix[start])
                if value < best[k][n]:
                    best[k][n], cut[k][n] = value, start
    rows: list[str] = []
    end = count
    for k in range(num_stages, 0, -1):
        start = cut[k][end]
        rows.insert(0, letters[start:end])
        end = start
    return rows


def _chunks(rows: Sequence[str]) -> list[StageChunk]:
    chunks = []
    vision = decoder = 0
    for row in rows:
        num_vision, num_decoder = row.count("v"), row.count("t")
        chunks.append(
            StageChunk(
                vision_layers=range(vision, vision + num_vision),
                has_projection="p" in row,
                has_embedding="E" in row,
                decoder_layers=range(decoder, decoder + num_decoder),
                has_output="L" in row,
            )
        )
        vision += num_vision
        decoder += num_decoder
    return chunks
