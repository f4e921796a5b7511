"""What a checkpoint of one part is: a ViT, a projection or a decoder on its own.

Its tensors have the names that they have in a checkpoint of the whole model, so any program that
builds that part of mmlm's layers reads it. Training and evaluation want a whole model and refuse
it (`Manifest.read`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from mmlm.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    read_manifest_json,
    write_manifest_json,
)
from mmlm.config.load import from_json
from mmlm.config.model import PartsConfig
from mmlm.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class PartManifest:
    """Everything about a checkpoint of one part that is not a tensor."""

    part: str
    """vision_model, vision_projection or language_model."""
    dtype: str
    """Of its tensors: bf16, fp16, fp32, or mixed."""
    model: PartsConfig
    """Its sizes."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""

    def write(self, directory: Path) -> None:
        """Write the manifest of an iteration's directory."""
        write_manifest_json(directory, asdict(self))


def read_any_manifest(directory: Path) -> Manifest | PartManifest:
    """Read the manifest of a checkpoint of the whole model or of one part.

    Raises:
        CheckpointError: when it is missing, damaged, or of a newer format.
    """
    content = read_manifest_json(directory)
    if "part" not in content:
        return Manifest.read(directory)
    try:
        return PartManifest(**{**content, "model": from_json(PartsConfig, content["model"])})
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{directory / MANIFEST_FILE}: damaged: {error}") from error
