"""Where a run begins: its own checkpoint, a named one, HuggingFace weights, or fresh weights."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from mmlm.checkpoint.assets import read_assets
from mmlm.checkpoint.fallback import find_intact, set_damaged_aside
from mmlm.checkpoint.manifest import ASSETS_DIR, LATEST_FILE, Manifest, iterations, resolve
from mmlm.config.model import ModelConfig
from mmlm.config.resume import changed_settings
from mmlm.config.schema import RunConfig
from mmlm.conversion.assets import write_assets
from mmlm.conversion.hf_weights import HFWeights, open_weights
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import CheckpointError, ConfigError
from mmlm.parallel.agreement import on_rank_zero
from mmlm.train.nonfinite_count import NonfiniteCount


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None
    """One iteration's directory; None for fresh weights."""
    manifest: Manifest | None
    """What it says."""
    resumes: bool
    """True: continue that run, optimizer and data order included. False: take the weights."""
    model: ModelConfig
    """Sizes."""
    hf_dir: Path | None = None
    """HuggingFace folder that weights are read from directly, instead of a checkpoint."""
    hf_tokenizer_dir: Path | None = None
    """Where that folder keeps its tokenizer."""

    def open_hf(self) -> HFWeights:
        """The weights of `hf_dir`, for this model."""
        assert self.hf_dir is not None, "asked for only where weights are read directly"
        return _open_hf(self.hf_dir, self.model)

    @property
    def iteration(self) -> int:
        """Iterations already done."""
        return self.manifest.iteration if self.resumes and self.manifest is not None else 0

    @property
    def nonfinite(self) -> NonfiniteCount:
        """Iterations done that changed nothing."""
        if not self.resumes or self.manifest is None:
            return NonfiniteCount()
        return NonfiniteCount(
            total=self.manifest.nonfinite_iterations, in_a_row=self.manifest.nonfinite_in_a_row
        )

    @property
    def num_updates(self) -> int:
        """Steps of the optimizer and of the schedule already done."""
        return self.iteration - self.nonfinite.total

    @property
    def assets_dir(self) -> Path | None:
        """Folder of HuggingFace configs and tokenizer files, if the checkpoint has one."""
        folder = None if self.checkpoint is None else self.checkpoint / ASSETS_DIR
        return folder if folder is not None and folder.is_dir() else None


def checkpoint_root(config: RunConfig) -> Path:
    """Folder of a run's own checkpoints."""
    return Path(config.output_dir) / "checkpoints"


def agree_on_start(config: RunConfig, group: dist.ProcessGroup) -> Start:
    """Decide where the run begins, going back where its newest checkpoint is damaged; collective.

    Args:
        config: of the run, which nobody else is running.
        group: all ranks over gloo.

    Raises:
        MmlmError: on all ranks, as `find_start`, or when no checkpoint of the run is intact.
    """
    found = find_intact(checkpoint_root(config), checksums=config.checkpoint.verify, group=group)

    def decide() -> Start:
        start = find_start(config, None if found is None else found.path)
        if found is not None:
            set_damaged_aside(found)
        return start

    return on_rank_zero(decide, group)


def find_start(config: RunConfig, own: Path | None = None) -> Start:
    """Decide where the run begins: its own newest checkpoint, else what is named, else fresh.

    Named are ``checkpoint.load`` or ``checkpoint.load_hf``; a run that resumes ignores both.

    Args:
        config: of the run.
        own: which of its own checkpoints; by default the one that ``latest`` names.

    Raises:
        CheckpointError: if a named checkpoint cannot be used.
        ConfigError: if the sizes are given and differ from the checkpoint's, or are not given.
    """
    root = checkpoint_root(config)
    # a kill while an iteration is replaced can leave `latest` and the set-aside checkpoint alone
    resumes = own is not None or bool(iterations(root)) or (root / LATEST_FILE).is_file()
    if resumes and not config.checkpoint.resume:
        raise ConfigError(
            f"{root} has checkpoints, and checkpoint.resume is false (--no-resume): use another "
            "output_dir, move or delete that folder, or leave --no-resume out to continue the run"
        )
    if not resumes and not (config.checkpoint.load or config.checkpoint.load_hf):
        if config.model is None:
            raise ConfigError("model is not given and there is no checkpoint to read it from")
        return Start(checkpoint=None, manifest=None, resumes=False, model=config.model)
    start = _start_from_checkpoint(own or root, resumes=True) if resumes else named_start(config)
    if config.model is not None and config.model != start.model:
        raise ConfigError(
            f"model in the recipe differs from the model in {start.checkpoint or start.hf_dir}: "
            f"{config.model} against {start.model}; leave model out of the recipe"
        )
    if start.resumes and start.checkpoint is not None and start.manifest is not None:
        if not start.manifest.has_optimizer:
            raise CheckpointError(
                f"{start.checkpoint} has no optimizer state, so it cannot be resumed; use another "
                "output_dir and give it as checkpoint.load"
            )
        _refuse_changes(config, start.manifest, start.checkpoint)
    return start


def named_start(config: RunConfig) -> Start:
    """Begin anew from the weights of ``checkpoint.load`` or ``checkpoint.load_hf``.

    Raises:
        MmlmError: if they cannot be used.
    """
    if not config.checkpoint.load_hf:
        return _start_from_checkpoint(Path(config.checkpoint.load), resumes=False)
    folder = Path(config.checkpoint.load_hf)
    weights = _open_hf(folder, config.model)
    return Start(
        checkpoint=None,
        manifest=None,
        resumes=False,
        model=weights.model,
        hf_dir=folder,
        hf_tokenizer_dir=weights.tokenizer_dir,
    )


def _start_from_checkpoint(path: Path, *, resumes: bool) -> Start:
    checkpoint = resolve(path)
    manifest = Manifest.read(checkpoint)
    return Start(checkpoint=checkpoint, manifest=manifest, resumes=resumes, model=manifest.model)


def _refuse_changes(config: RunConfig, manifest: Manifest, checkpoint: Path) -> None:
    """Refuse to resume with settings that change what is computed; see `mmlm.config.resume`."""
    changes = changed_settings(manifest.run_config or {}, config)
    kept = checkpoint / ASSETS_DIR
    if config.data.tokenizer and (kept / "tokenizer.model").is_file():
        given = Path(config.data.tokenizer)
        if Tokenizer(given).fingerprint != Tokenizer(kept).fingerprint:
            changes.append(f"data.tokenizer {given} encodes otherwise than {kept}")
    if changes:
        raise ConfigError(
            f"{checkpoint} cannot be resumed with other settings: {'; '.join(changes)}. Set them "
            "back, or start a new run in another output_dir with this one as checkpoint.load"
        )


def _open_hf(folder: Path, model: ModelConfig | None) -> HFWeights:
    """Open weights; where sizes are given, for their image size and that many layers of the ViT."""
    if model is None:
        return open_weights(folder)
    vision = model.vision
    return open_weights(folder, image_size=vision.image_size, vision_num_layers=vision.num_layers)


def load_tokenizer(config: RunConfig, start: Start) -> Tokenizer:
    """The tokenizer of ``data.tokenizer``, or the one that came with the weights.

    Raises:
        ConfigError: if there is neither.
    """
    folder = config.data.tokenizer or start.hf_tokenizer_dir or start.assets_dir
    if folder is None:
        raise ConfigError(
            "data.tokenizer is empty and the checkpoint keeps no tokenizer files: give the folder "
            "that holds tokenizer.model"
        )
    return Tokenizer(folder)


def load_assets(config: RunConfig, start: Start) -> dict[str, bytes]:
    """The small files that travel in the run's checkpoints: file name -> content.

    HuggingFace weights that are read directly give those that a conversion would have kept. A
    tokenizer of ``data.tokenizer`` takes the place of the one that came with the weights.
    """
    tokenizer = Path(config.data.tokenizer) if config.data.tokenizer else None
    if start.hf_dir is None:
        return read_assets(start.assets_dir, tokenizer)
    weights = start.open_hf()
    with TemporaryDirectory() as folder:
        assets = Path(folder) / ASSETS_DIR
        write_assets(assets, weights.source, weights.vocabulary)
        return read_assets(assets, tokenizer)
