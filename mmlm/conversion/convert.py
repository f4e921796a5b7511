"""HuggingFace weights into a checkpoint of mmlm and back, some rows of a tensor at a time.

The checkpoint holds ``model.<global name>`` in true shapes: 25 heads are 25 heads and the
vocabulary has its real size, so that any layout reads it (see `name_map`). A conversion that was
killed goes on where it was when the same command is given again.
"""

from pathlib import Path
from typing import Literal

from tqdm import tqdm

from mmlm.checkpoint.integrity import write_integrity
from mmlm.checkpoint.manifest import (
    ASSETS_DIR,
    Manifest,
    iteration_name,
    iterations,
    publish,
    resolve,
    temporary_dir,
)
from mmlm.checkpoint.streamed import TENSOR_FILE, write_streamed
from mmlm.conversion.assets import write_assets
from mmlm.conversion.dtypes import DTYPES, DtypeName
from mmlm.conversion.export import PART_FOLDERS, Export
from mmlm.conversion.hf_source import PROJECTOR_FILE, HFSource, open_combined, open_parts
from mmlm.conversion.hf_weights import VOCABULARY_SEED, HFWeights, prepare_weights
from mmlm.conversion.hf_writer import (
    MAX_SHARD_BYTES,
    check_free_space,
    put_in_place,
    refuse_existing,
    temporary_folder,
)
from mmlm.conversion.name_map import Part
from mmlm.conversion.one_part import OnePart, open_one_part
from mmlm.conversion.unfinished import bytes_on_disk, unfinished_folder
from mmlm.errors import CheckpointError, ConfigError
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
    image_size: int | None = None,
    vision_num_layers: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Convert the three published parts, a combined folder, or one part, into a checkpoint.

    Given `vision`, `llm` or `projector` alone, the checkpoint holds that part alone.

    Args:
        output: ROOT; gets ``iter_0000000`` and ``latest``.
        vision: folder of the ViT.
        llm: folder of the LLM with its tokenizer.
        projector: the projector's ``.pth``; default: the published place inside `vision`.
        combined: a combined InternVL-Chat folder, instead of the three.
        dtype: of all tensors; None keeps each as it is.
        ps_version: pixel shuffle variant of three parts; a combined folder says its own.
        seed: of new embedding rows, when the vocabulary has to grow.
        image_size: of the pictures, pixels; positions are resized where they are of another grid.
            None: as the config says.
        vision_num_layers: layers of the ViT that are kept, from the first; None keeps all.
            InternViT-6B-448px-V1-2 has the first 45 of the 48 layers of V1-0.
        strict: refuse weights that are NaN or infinite, instead of a warning.
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
    changes = {"image_size": image_size, "vision_num_layers": vision_num_layers}
    target = DTYPES[dtype] if dtype else None
    weights: HFWeights | OnePart
    given = _given(vision, llm, projector, combined)
    if len(given) == 1:
        ((part, path),) = given.items()
        _refuse_vision_changes(part, changes)
        weights = open_one_part(part, path, target, strict=strict, **changes)
        _log.info("%s alone: the checkpoint will hold no other part", part)
    else:
        source = _open(vision, llm, projector, combined, ps_version)
        weights = prepare_weights(source, target, seed, strict=strict, **changes)
    reader = weights.reader
    temporary = temporary_dir(output, 0)
    check_free_space(output, reader.num_bytes, bytes_on_disk(temporary))
    with unfinished_folder(temporary, [TENSOR_FILE]) as directory:
        with _bar("hf -> megatron", reader.num_bytes, progress) as bar:
            write_streamed(directory, reader.infos, reader.counted(bar.update))
        _write_small_files(weights, directory)
        # sizes alone of the tensors: they are not written in order, and reading them again costs
        write_integrity(directory, {})
        final = publish(directory, output, 0)
    reader.check.warn()
    return final


def _write_small_files(weights: HFWeights | OnePart, directory: Path) -> None:
    """Everything of a checkpoint but its tensors."""
    if isinstance(weights, OnePart):
        weights.write_small_files(directory, directory / ASSETS_DIR)
        return
    Manifest(
        iteration=0,
        consumed_samples=0,
        dtype=weights.dtype,
        model=weights.model,
        run_config=None,
        has_optimizer=False,
    ).write(directory)
    write_assets(directory / ASSETS_DIR, weights.source, weights.vocabulary)


def megatron_to_hf(
    *,
    load: Path,
    output: Path,
    dtype: DtypeName | None = None,
    combined: bool = True,
    parts: bool = False,
    only: Part | None = None,
    max_shard_size_bytes: int = MAX_SHARD_BYTES,
    strict: bool = False,
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
        only: write this part, and nothing else, straight into `output`.
        max_shard_size_bytes: largest safetensors file, unless one tensor is larger.
        strict: refuse weights that are NaN or infinite, instead of a warning.
        overwrite: replace the folder if it is there.
        progress: show a bar.

    Returns:
        `output`.

    Raises:
        CheckpointError: for a checkpoint that is missing, incomplete or does not fit its manifest.
    """
    if not (combined or parts or only):
        raise CheckpointError("nothing to write: neither the combined folder nor the parts")
    directory = resolve(load)
    dtype_wanted = DTYPES[dtype] if dtype else None
    export = Export(directory, dtype_wanted, max_shard_size_bytes, strict=strict)
    if only is None and len(export.parts) == 1:
        (only,) = export.parts  # there is nothing else to write
    combined, wanted = combined and not only, (only,) if only else export.parts
    places = {part: "" if only else PART_FOLDERS[part] for part in wanted if parts or only}
    files = export.combined_files() if combined else []
    for part, place in places.items():
        files += [(Path(place) / name).as_posix() for name in export.part_files(part)]
    total_bytes = combined * export.num_bytes(export.parts) + export.num_bytes(list(places))
    refuse_existing(output, overwrite)
    temporary = temporary_folder(output)
    check_free_space(output, total_bytes, bytes_on_disk(temporary))
    with (
        unfinished_folder(temporary, files) as folder,
        _bar("megatron -> hf", total_bytes, progress) as bar,
    ):
        if combined:
            export.write_combined(folder, bar.update)
        for part, place in places.items():
            (folder / place).mkdir(exist_ok=True)
            export.write_part(part, folder / place, bar.update)
        put_in_place(folder, output)
    export.check.warn()
    return output


def _given(
    vision: Path | None, llm: Path | None, projector: Path | None, combined: Path | None
) -> dict[Part, Path]:
    """The parts that are given on their own; none for a combined folder."""
    paths: dict[Part, Path | None] = {
        "vision_model": vision,
        "language_model": llm,
        "vision_projection": projector,
    }
    if combined is not None:
        return {}
    return {part: path for part, path in paths.items() if path is not None}


def _refuse_vision_changes(part: Part, changes: dict[str, int | None]) -> None:
    given = [name for name, value in changes.items() if value is not None]
    if part != "vision_model" and given:
        raise ConfigError(f"--{given[0].replace('_', '-')} is about the ViT, which is not given")


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
        return open_combined(combined, once=True)
    if vision is None or llm is None:
        raise CheckpointError(
            "give the ViT's and the LLM's folder, one part alone, or a combined folder"
        )
    return open_parts(vision, llm, projector or vision / PROJECTOR_FILE, ps_version, once=True)


def _bar(title: str, num_bytes: int, shown: bool) -> "tqdm[None]":
    return tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, disable=not shown)
