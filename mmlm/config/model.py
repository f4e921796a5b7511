"""Sizes of the model's three parts, under Megatron's names.

They are never typed by hand for published weights: `mmlm.conversion.hf_config` reads them from the
``config.json`` of the parts.
"""

from dataclasses import dataclass
from typing import Literal

from mmlm.errors import require


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of an InternViT tower."""

    hidden_size: int
    """Width of a token."""
    ffn_hidden_size: int
    """Width inside the MLP."""
    num_layers: int
    """Transformer layers (there is no final norm)."""
    num_attention_heads: int
    """True heads; padding to a multiple of TP happens in `mmlm.layers.head_partition`."""
    image_size: int
    """Height and width of the square input, pixels."""
    patch_size: int
    """Height and width of a patch, pixels."""
    layernorm_epsilon: float = 1e-6
    """Added to the mean square inside every RMSNorm of the tower."""

    def __post_init__(self) -> None:
        require(
            "vision",
            {
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}": self.hidden_size % self.num_attention_heads == 0,
                f"image_size // patch_size = {self.grid_size} must be even and positive, because "
                "pixel shuffle joins 2 x 2 patches": self.grid_size > 0 and self.grid_size % 2 == 0,
                f"num_layers {self.num_layers} must be at least 1": self.num_layers >= 1,
            },
        )

    @property
    def kv_channels(self) -> int:
        """Size of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Tokens inside the tower: one a patch and the class token."""
        return self.grid_size**2 + 1

    @property
    def embeddings_per_image(self) -> int:
        """Vectors given to the text for one image, after pixel shuffle."""
        return self.grid_size**2 // 4


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Sizes of a Llama-type decoder with untied embedding and head."""

    hidden_size: int
    """Width of a token."""
    ffn_hidden_size: int
    """Width inside the SwiGLU MLP."""
    num_layers: int
    """Decoder layers."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads (GQA)."""
    kv_channels: int
    """Size of one head."""
    vocab_size: int
    """True rows of the embedding and of the head; TP padding is never counted here."""
    layernorm_epsilon: float = 1e-5
    """Added to the mean square inside every RMSNorm of the decoder."""
    rotary_base: float = 5_000_000.0
    """RoPE theta."""
    max_position_embeddings: int = 4096
    """Longest sample that the weights were made for, tokens."""

    def __post_init__(self) -> None:
        require(
            "language",
            {
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_query_groups {self.num_query_groups}": self.num_attention_heads
                % self.num_query_groups
                == 0,
                f"num_layers {self.num_layers} must be at least 1": self.num_layers >= 1,
                f"kv_channels {self.kv_channels} must be even for RoPE": self.kv_channels % 2 == 0,
            },
        )


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Sizes of the projection, where there is neither tower nor decoder to tell them."""

    input_size: int
    """Width after pixel shuffle."""
    hidden_size: int
    """Width of the decoder's tokens."""


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """Sizes of some of the three parts; None for a part that is not there."""

    vision: VisionConfig | None = None
    projection: ProjectionConfig | None = None
    language: LanguageConfig | None = None


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The three parts: vision tower, projection (two linear layers), decoder."""

    vision: VisionConfig
    language: LanguageConfig
    ps_version: Literal["v1", "v2"] = "v1"
    """Pixel shuffle variant; V1-2 weights expect v1 (a transposed token grid)."""
    projection_layernorm_epsilon: float = 1e-5
    """Epsilon of the projection's LayerNorm."""

    def __post_init__(self) -> None:
        require(
            "model",
            {f"ps_version '{self.ps_version}' must be v1 or v2": self.ps_version in ("v1", "v2")},
        )

    @property
    def parts(self) -> PartsConfig:
        """The sizes part by part."""
        return PartsConfig(
            vision=self.vision,
            projection=ProjectionConfig(
                input_size=self.projection_input_size, hidden_size=self.language.hidden_size
            ),
            language=self.language,
        )

    @property
    def projection_input_size(self) -> int:
        """Width after pixel shuffle: 2 x 2 patches side by side."""
        return 4 * self.vision.hidden_size
