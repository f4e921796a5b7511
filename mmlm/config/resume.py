"""What may change in the settings of a run when it resumes, and what may not.

Every field of the schema is in one of two tables, so that a new one cannot be forgotten.
"""

from collections.abc import Mapping
from typing import Any

from mmlm.config.load import to_json
from mmlm.config.schema import RunConfig

FIXED: dict[str, str] = {
    "train.global_batch_size": "which samples an iteration has",
    "train.train_iters": "the learning rate of every iteration to come",
    "train.epochs": "the learning rate of every iteration to come",
    "train.seed": "order of the data and drop path",
    "data.seed": "order of the data and augmentation",
    "train.drop_path_seed": "which branches are dropped",
    "train.dtype": "the arithmetic",
    "train.loss_weight": "the loss",
    "train.loss_group_size": "the loss and some orders of the data",
    "train.vision_drop_path_rate": "which branches are dropped",
    "train.freeze_vision_model": "what is trained",
    "train.freeze_vision_projection": "what is trained",
    "train.freeze_language_model": "what is trained",
    "data.seq_length": "where samples are cut",
    "data.packing": "order of the data",
    "data.special_literals": "tokens and labels",
    "optimizer.lr": "the update",
    "optimizer.min_lr": "the update",
    "optimizer.lr_warmup_fraction": "the update",
    "optimizer.weight_decay": "the update",
    "optimizer.decay": "the update",
    "optimizer.adam_beta1": "the update",
    "optimizer.adam_beta2": "the update",
    "optimizer.adam_eps": "the update",
    "optimizer.clip_grad": "the update",
}
"""Settings that cannot change within a run, and what they decide."""

_LAYOUT = "sums in another order: equal to rounding"
_SPEED = "when things are done, not what"

CHANGEABLE: dict[str, str] = {
    "output_dir": "where the run lies: it may have been moved",
    "model": "left out, or the sizes in the checkpoint: anything else is refused on its own",
    "eval_meta": "evaluation does not train",
    "parallel.tensor_model_parallel_size": _LAYOUT,
    "parallel.pipeline_model_parallel_size": _LAYOUT,
    "parallel.virtual_pipeline_model_parallel_size": _LAYOUT,
    "parallel.sequence_parallel": _LAYOUT,
    "parallel.pipeline_layout": _LAYOUT,
    "parallel.overlap_grad_reduce": _LAYOUT,
    "parallel.overlap_param_gather": _LAYOUT,
    "parallel.ddp_bucket_size": _LAYOUT,
    "parallel.timeout_minutes": "when the run gives up",
    "data.meta": "a path: the data behind it is compared, record by record",
    "data.tokenizer": "a path: the tokenizer behind it is compared with the checkpoint's",
    "data.cache_dir": "a path",
    "data.num_workers": _SPEED,
    "data.prefetch_iterations": _SPEED,
    "data.policy": "which records are used is compared",
    "train.micro_batch_size": _LAYOUT,
    "train.init_seed": "weights come from the checkpoint",
    "train.vision_drop_path_mode": "the same function: equal to rounding",
    "train.recompute_vision_model": "the same function",
    "train.recompute_language_model": "the same function",
    "train.deterministic": "the same function: equal to rounding",
    "train.eval_interval": "evaluation does not train",
    "train.exit_duration_minutes": _SPEED,
    "train.max_nonfinite_iterations": "when the run gives up",
    "train.loss_spike_factor": "what is logged",
    "train.loss_spike_window": "what is logged",
    "checkpoint.load": "a run that resumes ignores it",
    "checkpoint.load_hf": "a run that resumes ignores it",
    "checkpoint.resume": "whether a run resumes at all",
    "checkpoint.save_interval": _SPEED,
    "checkpoint.async_save": _SPEED,
    "checkpoint.save_total_limit": "what stays on disk",
    "checkpoint.verify": "what is checked",
    "checkpoint.export_hf_interval": _SPEED,
    "backend.device": "rounding",
    "backend.transformer_impl": "rounding",
    "backend.attention_backend": "rounding",
}
"""Settings that may change when a run resumes, and why that is right."""

_SEEDS = {"data.seed": "data_seed", "train.drop_path_seed": "drop_path_seed"}


def changed_settings(before: Mapping[str, Any], now: RunConfig) -> list[str]:
    """The `FIXED` settings that differ, each as "section.field was x and is y".

    Args:
        before: the settings that the run was saved with, as `to_json` gives them; a field that was
            not known then had its default.
        now: the settings of today.
    """
    old, new = _flat(before), _flat(to_json(now))
    default = _flat(to_json(RunConfig()))
    changes = [
        f"{key} was {old.get(key, default[key])} and is {new[key]}"
        for key in FIXED
        if key not in _SEEDS and key != "train.seed" and old.get(key, default[key]) != new[key]
    ]
    for key, name in _SEEDS.items():
        own, common = old.get(key), old.get("train.seed", default["train.seed"])
        was, seed = common if own is None else own, getattr(now, name)
        if was != seed:
            named = "train.seed" if own is None and new[key] is None else key
            changes.append(f"{named} was {was} and is {seed}")
    return list(dict.fromkeys(changes))


def setting_names() -> list[str]:
    """Every field of the schema as "field" or "section.field"; the model counts as one."""
    return list(_flat(to_json(RunConfig())))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key != "model" and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            flat[key] = value
    return flat
