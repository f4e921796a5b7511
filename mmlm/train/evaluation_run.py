"""``mmlm evaluate``: weights on a split, without optimizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mmlm.checkpoint.manifest import Manifest, resolve
from mmlm.config.load import from_json
from mmlm.config.schema import ParallelConfig, RunConfig, TrainConfig
from mmlm.conversion.hf_weights import open_weights
from mmlm.errors import CheckpointError, ConfigError
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.topology import Topology
from mmlm.train.evaluate import evaluate
from mmlm.train.setup import build_chunks, check_data, open_data
from mmlm.train.start import load_tokenizer, named_start


def evaluate_checkpoint(
    config: RunConfig, meta: str, topology: Topology, backend: Backend
) -> dict[str, Any]:
    """Load the weights of ``checkpoint.load`` or ``load_hf`` and judge a split; collective.

    Args:
        config: layout, batch and lengths; of training only the precision matters.
        meta: meta json of the split.
        topology: this rank's place.
        backend: which implementations.

    Returns:
        As `mmlm.train.evaluate.evaluate`.

    Raises:
        MmlmError: for anything that the user can mend.
    """
    start = on_rank_zero(lambda: named_start(config), topology.control_group)
    tokenizer = on_rank_zero(lambda: load_tokenizer(config, start), topology.control_group)
    check_data(config, start, tokenizer)
    dataset = open_data(config, meta, start.model, tokenizer, topology)
    _, chunks = build_chunks(config, start, topology, backend, dataset)
    decodes = chunks[0].pre_process and topology.tp_rank == 0
    return evaluate(chunks, config, start.model, dataset, topology, with_pixels=decodes)


def settings_of(checkpoint: Path) -> RunConfig:
    """The settings that a checkpoint was trained with, in one process.

    For converted weights, which no run has made, the defaults in the precision of the weights.

    Raises:
        CheckpointError: if the checkpoint cannot be used.
    """
    checkpoint = resolve(checkpoint)
    manifest = Manifest.read(checkpoint)
    if manifest.run_config is None:
        return default_settings(manifest.dtype)
    try:
        config: RunConfig = from_json(RunConfig, manifest.run_config)
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint}: the settings of its run cannot be used: {error}; give --recipe"
        ) from error
    # the checkpoint's own tokenizer is read, wherever the run had it from
    return replace(config, parallel=ParallelConfig(), data=replace(config.data, tokenizer=""))


def default_settings(stored_dtype: str) -> RunConfig:
    """The defaults, in the precision of weights that no run has made (bf16, fp16, fp32, mixed)."""
    dtype: Literal["bf16", "fp32"] = "fp32" if stored_dtype == "fp32" else "bf16"
    return RunConfig(train=TrainConfig(dtype=dtype))


def hf_settings(folder: Path) -> RunConfig:
    """The same for a HuggingFace folder.

    Raises:
        MmlmError: as `open_weights`.
    """
    return default_settings(open_weights(folder).dtype)
