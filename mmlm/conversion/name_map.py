"""The one table of tensor names: HuggingFace <-> Megatron.

A row names the tensors of a part and the rule between them; `{i}` is the layer, counted from 0
over the whole part. HuggingFace has two spellings of the same name: inside a part
(``model.norm.weight``) and in the combined InternVL-Chat folder, where the part's prefix comes
first (``language_model.model.norm.weight``). The table holds the former.

Shapes are words: v vision hidden size, n patches of an image, p patch size, vf vision MLP width,
w width after pixel shuffle (4v), t text hidden size, q width of all query heads, k width of all
key heads, f text MLP width, vocab rows of the vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mmlm.config.model import ModelConfig, PartsConfig
from mmlm.conversion.rules import Copy, GateUp, GroupedQkv, Rule, Shape, StackedQkv
from mmlm.errors import CheckpointError

Part = Literal["vision_model", "vision_projection", "language_model"]

HF_PREFIXES: dict[Part, str] = {
    "vision_model": "vision_model.",
    "vision_projection": "mlp1.",
    "language_model": "language_model.",
}
"""Part -> what the combined folder puts before a HuggingFace name of the part."""

MODEL_PREFIX = "model."
"""Before every global name in a checkpoint, where optimizer state lies beside it."""

DERIVED_HF_SUFFIXES = (".rotary_emb.inv_freq",)
"""HuggingFace buffers that old files hold and that follow from the config; not converted."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table, for one tensor or for one tensor of every layer."""

    part: Part
    """Which part the tensors belong to."""
    hf: tuple[tuple[str, str], ...]
    """HuggingFace names inside the part, each with its shape in words, in the rule's order."""
    megatron: str
    """Megatron's name inside the part."""
    rule: Callable[[PartsConfig], Rule]
    """Makes the rule for the sizes of a model."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row for one layer of one model: real names and shapes."""

    part: Part
    """Which part the tensors belong to."""
    hf_names: tuple[str, ...]
    """Names in the combined folder."""
    hf_shapes: tuple[Shape, ...]
    """Shape of each."""
    megatron_name: str
    """Global name."""
    megatron_shape: Shape
    """True shape, without padding of any kind."""
    rule: Rule
    """Both directions."""


def _copy(config: PartsConfig) -> Rule:
    return Copy()


def _stacked_qkv(config: PartsConfig) -> Rule:
    assert config.vision is not None
    return StackedQkv(num_attention_heads=config.vision.num_attention_heads)


def _grouped_qkv(config: PartsConfig) -> Rule:
    language = config.language
    assert language is not None
    return GroupedQkv(num_query_groups=language.num_query_groups, kv_channels=language.kv_channels)


def _gate_up(config: PartsConfig) -> Rule:
    return GateUp()


def _row(
    part: Part,
    hf: Mapping[str, str],
    megatron: str,
    rule: Callable[[PartsConfig], Rule] = _copy,
) -> Row:
    return Row(part=part, hf=tuple(hf.items()), megatron=megatron, rule=rule)


def _vision(hf: str, shape: str, megatron: str) -> Row:
    return _row("vision_model", {hf: shape}, megatron)


def _projection(hf: str, shape: str, megatron: str) -> Row:
    return _row("vision_projection", {hf: shape}, megatron)


def _text(hf: str, shape: str, megatron: str) -> Row:
    return _row("language_model", {hf: shape}, megatron)


_V = "encoder.layers.{i}."  # vision layer, HuggingFace
_T = "model.layers.{i}."  # text layer, HuggingFace
_M = "decoder.layers.{i}."  # layer of either, Megatron

TABLE: tuple[Row, ...] = (
    _vision("embeddings.class_embedding", "1 1 v", "class_embedding"),
    _vision("embeddings.position_embedding", "1 n+1 v", "position_embedding"),
    _vision("embeddings.patch_embedding.weight", "v 3 p p", "patch_embedding.weight"),
    _vision("embeddings.patch_embedding.bias", "v", "patch_embedding.bias"),
    _vision(_V + "norm1.weight", "v", _M + "input_layernorm.weight"),
    _row(
        "vision_model",
        {_V + "attn.qkv.weight": "3v v"},
        _M + "self_attention.linear_qkv.weight",
        _stacked_qkv,
    ),
    _vision(_V + "attn.q_norm.weight", "v", _M + "self_attention.qk_norm.q_weight"),
    _vision(_V + "attn.k_norm.weight", "v", _M + "self_attention.qk_norm.k_weight"),
    _vision(_V + "attn.proj.weight", "v v", _M + "self_attention.linear_proj.weight"),
    _vision(_V + "attn.proj.bias", "v", _M + "self_attention.linear_proj.bias"),
    _vision(_V + "ls1", "v", _M + "attention_scale"),
    _vision(_V + "norm2.weight", "v", _M + "pre_mlp_layernorm.weight"),
    _vision(_V + "mlp.fc1.weight", "vf v", _M + "mlp.linear_fc1.weight"),
    _vision(_V + "mlp.fc1.bias", "vf", _M + "mlp.linear_fc1.bias"),
    _vision(_V + "mlp.fc2.weight", "v vf", _M + "mlp.linear_fc2.weight"),
    _vision(_V + "mlp.fc2.bias", "v", _M + "mlp.linear_fc2.bias"),
    _vision(_V + "ls2", "v", _M + "mlp_scale"),
    _projection("0.weight", "w", "layernorm.weight"),
    _projection("0.bias", "w", "layernorm.bias"),
    _projection("1.weight", "t w", "linear_fc1.weight"),
    _projection("1.bias", "t", "linear_fc1.bias"),
    _projection("3.weight", "t t", "linear_fc2.weight"),
    _projection("3.bias", "t", "linear_fc2.bias"),
    _text("model.embed_tokens.weight", "vocab t", "embedding.word_embeddings.weight"),
    _text(_T + "input_layernorm.weight", "t", _M + "input_layernorm.weight"),
    _row(
        "language_model",
        {
            _T + "self_attn.q_proj.weight": "q t",
            _T + "self_attn.k_proj.weight": "k t",
            _T + "self_attn.v_proj.weight": "k t",
        },
        _M + "self_attention.linear_qkv.weight",
        _grouped_qkv,
    ),
    _text(_T + "self_attn.o_proj.weight", "t q", _M + "self_attention.linear_proj.weight"),
    _text(_T + "post_attention_layernorm.weight", "t", _M + "pre_mlp_layernorm.weight"),
    _row(
        "language_model",
        {_T + "mlp.gate_proj.weight": "f t", _T + "mlp.up_proj.weight": "f t"},
        _M + "mlp.linear_fc1.weight",
        _gate_up,
    ),
    _text(_T + "mlp.down_proj.weight", "t f", _M + "mlp.linear_fc2.weight"),
    _text("model.norm.weight", "t", "decoder.final_layernorm.weight"),
    _text("lm_head.weight", "vocab t", "output_layer.weight"),
)


def sizes(config: PartsConfig) -> dict[str, int]:
    """Word of a shape -> number, for the parts that are there."""
    vision, projection, language = config.vision, config.projection, config.language
    words = {"1": 1, "3": 3}
    if vision is not None:
        words |= {
            "v": vision.hidden_size,
            "3v": 3 * vision.hidden_size,
            "vf": vision.ffn_hidden_size,
            "n+1": vision.tokens_per_image,
            "p": vision.patch_size,
        }
    if projection is not None:
        words |= {"w": projection.input_size, "t": projection.hidden_size}
    if language is not None:
        words |= {
            "t": language.hidden_size,
            "q": language.num_attention_heads * language.kv_channels,
            "k": language.num_query_groups * language.kv_channels,
            "f": language.ffn_hidden_size,
            "vocab": language.vocab_size,
        }
    return words


def expand(config: ModelConfig | PartsConfig) -> tuple[Entry, ...]:
    """Every tensor of a model, in the order of its forward pass.

    Args:
        config: sizes; nothing else decides names and shapes. Of a part that is not there, there
            are no tensors.
    """
    parts = config.parts if isinstance(config, ModelConfig) else config
    words = sizes(parts)
    num_layers = {
        "vision_model": parts.vision.num_layers if parts.vision else 0,
        "language_model": parts.language.num_layers if parts.language else 0,
    }
    there = {
        "vision_model": parts.vision,
        "vision_projection": parts.projection,
        "language_model": parts.language,
    }
    entries: list[Entry] = []
    rows = [row for row in TABLE if there[row.part] is not None]
    while rows:
        part = rows[0].part
        is_layer = "{i}" in rows[0].megatron
        block = []
        while rows and rows[0].part == part and ("{i}" in rows[0].megatron) == is_layer:
            block.append(rows.pop(0))
        for layer in range(num_layers[part]) if is_layer else (0,):
            entries += [_entry(row, layer, parts, words) for row in block]
    return tuple(entries)


def _entry(row: Row, layer: int, config: PartsConfig, words: Mapping[str, int]) -> Entry:
    number = str(layer)
    shapes = tuple(tuple(words[word] for word in shape.split()) for _, shape in row.hf)
    rule = row.rule(config)
    return Entry(
        part=row.part,
        hf_names=tuple(HF_PREFIXES[row.part] + name.replace("{i}", number) for name, _ in row.hf),
        hf_shapes=shapes,
        megatron_name=f"{row.part}.{row.megatron.replace('{i}', number)}",
        megatron_shape=rule.megatron_shape(shapes),
        rule=rule,
    )


def part_name(combined_name: str) -> tuple[Part, str]:
    """Split a name of the combined folder into its part and the name inside the part."""
    for part, prefix in HF_PREFIXES.items():
        if combined_name.startswith(prefix):
            return part, combined_name.removeprefix(prefix)
    raise CheckpointError(
        f"tensor '{combined_name}' belongs to no part: names of a combined InternVL-Chat folder "
        f"start with one of {', '.join(HF_PREFIXES.values())}"
    )


def check_tensors(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    describe: Callable[[str], str],
    where: str,
) -> None:
    """Compare names and shapes; nothing may be missing, left over or of another shape.

    Args:
        found: name -> shape of what is there.
        expected: name -> shape of what the model has.
        describe: name found -> where it is, e.g. its file.
        where: what was read, for the first line of the message.

    Raises:
        CheckpointError: with every missing, stray and misshapen tensor.
    """
    lines = [f"missing: {name} {list(shape)}" for name, shape in _without(expected, found)]
    lines += [
        f"stray: {name} {list(shape)} in {describe(name)}"
        for name, shape in _without(found, expected)
    ]
    lines += [
        f"wrong shape: {name} is {list(found[name])}, the config says {list(shape)}, "
        f"in {describe(name)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if lines:
        raise CheckpointError(
            f"{where}: {len(lines)} of {len(expected)} tensors do not fit the model "
            "(are config.json and weights of the same model?):\n  " + "\n  ".join(lines)
        )


def _without(
    names: Mapping[str, Shape], others: Mapping[str, Shape]
) -> Iterable[tuple[str, Shape]]:
    return ((name, shape) for name, shape in names.items() if name not in others)
