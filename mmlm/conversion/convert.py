"""HuggingFace weights into a checkpoint of mmlm and back, tensor by tensor.

The checkpoint holds ``model.<global name>`` in true shapes: 25 heads are 25 heads and the
vocabulary has its real size, so that any layout reads it (see `name_map`).
"""

import shutil
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from mmlm.checkpoint.manifest import (
    ASSETS_DIR,
    Manifest,
    iteration_name,
    iterations,
    publish,
    resolve,
    temporary_dir,
)
from mmlm.checkpoint.storage import process_group_of_one, save_sharded
from mmlm.conversion.assets import write_assets
from mmlm.conversion.dtypes import DTYPES, DtypeName
from mmlm.conversion.export import Export
from mmlm.conversion.hf_source import PROJECTOR_FILE, HFSource, open_combined, open_parts
from mmlm.conversion.hf_weights import VOCABULARY_SEED, prepare_weights
from mmlm.conversion.hf_writer import (
    MAX_SHARD_BYTES,
    atomic_folder,
    check_free_space,
    refuse_existing,
)
from mmlm.errors import CheckpointError
from mmlm.log import get_logger

_log = get_logger("mmlm.conversion")


def hf_to_megatron(
    *,
    output: Path,
    vision: Path | None = None,
    llm: Path | None = None,
    projector: Path | None = None,
    combined: Path | None = None,
    dtype: DtypeName | None = None,
    ps_version: Literal["v1", "v2"] = "v1",
    seed: int = VOCABULARY_SEED,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Convert the three published parts, or a combined folder, into a checkpoint.

    Args:
        output: ROOT; gets ``iter_0000000`` and ``latest``.
        vision: folder of the ViT.
        llm: folder of the LLM with its tokenizer.
        projector: the projector's ``.pth``; default: the published place inside `vision`.
        combined: a combined InternVL-Chat folder, instead of the three.
        dtype: of all tensors; None keeps each as it is.
        ps_version: pixel shuffle variant of three parts; a combined folder says its own.
        seed: of new embedding rows, when the vocabulary has to grow.
        overwrite: replace an ``iter_0000000`` that is there.
        progress: show a bar.

    Returns:
        The iteration's directory.

    Raises:
        ConfigError: for a ``config.json`` that is missing or unsupported.
        CheckpointError: for weights that are missing, damaged, or do not fit the config; nothing
            is left under the final name.
    """
    refuse_existing(output / iteration_name(0), overwrite)
    later = [each.name for each in iterations(output) if each.name != iteration_name(0)]
    if later:
        raise CheckpointError(
            f"{output}: holds {later[-1]} of a training; give another folder for converted weights"
        )
    source = _open(vision, llm, projector, combined, ps_version)
    weights = prepare_weights(source, DTYPES[dtype] if dtype else None, seed)
    reader = weights.reader
    check_free_space(output, reader.num_bytes)
    directory = temporary_dir(output, 0)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        with (
            process_group_of_one(),
            _bar("hf -> megatron", reader.num_bytes, progress) as bar,
        ):
            save_sharded(reader.announced(), directory, reader.counted(bar.update))
        Manifest(
            iteration=0,
            consumed_samples=0,
            dtype=weights.dtype,
            model=weights.model,
            run_config=None,
            has_optimizer=False,
        ).write(directory)
        write_assets(directory / ASSETS_DIR, source, weights.vocabulary)
        return publish(directory, output, 0)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def megatron_to_hf(
    *,
    load: Path,
    output: Path,
    dtype: DtypeName | None = None,
    combined: bool = True,
    parts: bool = False,
    max_shard_size_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Convert a checkpoint of any layout into HuggingFace folders; optimizer state is ignored.

    Args:
        load: ROOT (its ``latest``) or an iteration's directory.
        output: gets the combined InternVL-Chat folder.
        dtype: of all tensors; None keeps each as it is.
        combined: write the combined folder.
        parts: write the three parts as well: ``output/vision``, ``output/llm`` and the projector
            at its published place inside ``vision``.
        max_shard_size_bytes: largest safetensors file, unless one tensor is larger.
        overwrite: replace the folder if it is there.
        progress: show a bar.

    Returns:
        `output`.

    Raises:
        CheckpointError: for a checkpoint that is missing, incomplete or does not fit its manifest.
    """
    if not (combined or parts):
        raise CheckpointError("nothing to write: neither the combined folder nor the parts")
    directory = resolve(load)
    export = Export(directory, DTYPES[dtype] if dtype else None, max_shard_size_bytes)
    total_bytes = (combined + parts) * export.num_bytes
    refuse_existing(output, overwrite)
    check_free_space(output, total_bytes)
    with (
        atomic_folder(output, overwrite) as folder,
        _bar("megatron -> hf", total_bytes, progress) as bar,
    ):
        if combined:
            export.write_combined(folder, bar.update)
        if parts:
            export.write_parts(folder, bar.update)
    return output


def _open(
    vision: Path | None,
    llm: Path | None,
    projector: Path | None,
    combined: Path | None,
    ps_version: Literal["v1", "v2"],
) -> HFSource:
    if combined is not None:
        if vision or llm or projector:
            raise CheckpointError("give either the three parts or a combined folder, not both")
        return open_combined(combined)
    if vision is None or llm is None:
        raise CheckpointError("give the ViT's and the LLM's folder, or a combined folder")
    return open_parts(vision, llm, projector or vision / PROJECTOR_FILE, ps_version)


def _bar(title: str, num_bytes: int, shown: bool) -> "tqdm[None]":
    return tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, disable=not shown)
