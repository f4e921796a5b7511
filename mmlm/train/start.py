"""Where a run begins: its own checkpoint, a named one, HuggingFace weights, or fresh weights."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mmlm.checkpoint.assets import read_assets
from mmlm.checkpoint.manifest import ASSETS_DIR, LATEST_FILE, Manifest, iterations, resolve
from mmlm.config.load import to_json
from mmlm.config.model import ModelConfig
from mmlm.config.schema import RunConfig
from mmlm.conversion.assets import write_assets
from mmlm.conversion.hf_weights import HFWeights, open_weights
from mmlm.data.tokenizer import Tokenizer
from mmlm.errors import CheckpointError, ConfigError
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


def find_start(config: RunConfig) -> Start:
    """Decide where the run begins: its own newest checkpoint, else what is named, else fresh.

    Named are ``checkpoint.load`` or ``checkpoint.load_hf``; a run that resumes ignores both.

    Raises:
        CheckpointError: if a named checkpoint cannot be used.
        ConfigError: if the sizes are given and differ from the checkpoint's, or are not given.
    """
    root = checkpoint_root(config)
    # a kill while an iteration is replaced can leave `latest` and the set-aside checkpoint alone
    resumes = bool(iterations(root)) or (root / LATEST_FILE).is_file()
    if not resumes and not (config.checkpoint.load or config.checkpoint.load_hf):
        if config.model is None:
            raise ConfigError("model is not given and there is no checkpoint to read it from")
        return Start(checkpoint=None, manifest=None, resumes=False, model=config.model)
    start = _start_from_checkpoint(root, resumes=True) if resumes else named_start(config)
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


_FIXED_SETTINGS = (
    "train.global_batch_size",
    "train.seed",
    "train.loss_weight",
    "train.loss_group_size",
    "train.dtype",
    "data.seq_length",
    "data.packing",
)
"""What decides the order of the data and the arithmetic, and so cannot change within a run."""


def _refuse_changes(config: RunConfig, manifest: Manifest, checkpoint: Path) -> None:
    """Refuse to resume with settings that would repeat or skip samples or change the loss."""
    before, now = manifest.run_config or {}, to_json(config)
    changes = []
    for key in _FIXED_SETTINGS:
        section, field = key.split(".")
        old = before.get(section, {}).get(field)
        if old != now[section][field]:
            changes.append(f"{key} was {old} and is {now[section][field]}")
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
