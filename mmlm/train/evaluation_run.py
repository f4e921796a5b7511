"""``mmlm evaluate``: a checkpoint on a split, without optimizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmlm.checkpoint.manifest import Manifest, resolve
from mmlm.config.schema import RunConfig
from mmlm.parallel.agreement import on_rank_zero
from mmlm.parallel.backend import Backend
from mmlm.parallel.topology import Topology
from mmlm.train.evaluate import evaluate
from mmlm.train.setup import Start, build_chunk, check_data, load_tokenizer, open_data


def evaluate_checkpoint(
    config: RunConfig, meta: str, topology: Topology, backend: Backend
) -> dict[str, Any]:
    """Load the weights of ``checkpoint.load`` and judge a split; collective.

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
    start = on_rank_zero(lambda: _start(Path(config.checkpoint.load)))
    config = replace(config, data=replace(config.data, meta=meta))
    tokenizer = on_rank_zero(lambda: load_tokenizer(config, start))
    check_data(config, start, tokenizer)
    dataset = open_data(config, meta, start.model, tokenizer)
    _, chunk = build_chunk(config, start, topology, backend, dataset)
    return evaluate(chunk, config, start.model, dataset, topology, with_pixels=chunk.pre_process)


def _start(path: Path) -> Start:
    checkpoint = resolve(path)
    manifest = Manifest.read(checkpoint)
    return Start(checkpoint=checkpoint, manifest=manifest, resumes=False, model=manifest.model)
