"""Rules between sections of a RunConfig, all failures reported at once."""

from pathlib import Path

from mmlm.config.model import ModelConfig
from mmlm.config.schema import RunConfig
from mmlm.errors import ConfigError


def check_run(config: RunConfig) -> None:
    """Check what can be known before anything is loaded.

    Raises:
        ConfigError: with every broken rule.
    """
    problems = []
    own = Path(config.output_dir) / "checkpoints"
    named = bool(config.checkpoint.load or config.checkpoint.load_hf)
    has_source = named or (own.is_dir() and any(own.glob("iter_*")))
    if not config.data.meta:
        problems.append("data.meta is empty: give the meta json of the sets to train on")
    for name, file in (("data.meta", config.data.meta), ("eval_meta", config.eval_meta)):
        if file and not Path(file).is_file():
            problems.append(f"{name}: the file '{file}' does not exist")
    if config.model is None and not has_source:
        problems.append(
            "model is not given and checkpoint.load and load_hf are empty: sizes come from one of "
            "them; name weights (--load-hf takes them as published) or use a preset"
        )
    if not has_source and not config.data.tokenizer:
        problems.append(
            "data.tokenizer is empty and no checkpoint.load or load_hf is given to take one from: "
            "name the folder that holds tokenizer.model"
        )
    if config.train.eval_interval and not config.eval_meta:
        problems.append("train.eval_interval is set but eval_meta is empty")
    if problems:
        raise ConfigError("; ".join(problems))


def check_model(config: RunConfig, model: ModelConfig, vocab_size: int) -> None:
    """Check the sizes of the model against data and tokenizer.

    Args:
        config: of the run.
        model: sizes.
        vocab_size: true size of the tokenizer, added tokens included.

    Raises:
        ConfigError: with every broken rule.
    """
    problems = []
    longest = model.language.max_position_embeddings
    if config.data.seq_length > longest:
        problems.append(
            f"data.seq_length {config.data.seq_length} is more than max_position_embeddings "
            f"{longest} of the decoder"
        )
    if config.data.seq_length <= model.vision.embeddings_per_image + 2:
        problems.append(
            f"data.seq_length {config.data.seq_length} has no room for one image of "
            f"{model.vision.embeddings_per_image} tokens and its text"
        )
    if vocab_size > model.language.vocab_size:
        problems.append(
            f"the tokenizer has {vocab_size} tokens, the model {model.language.vocab_size} rows: "
            "convert the weights again so that the added tokens get rows"
        )
    if problems:
        raise ConfigError("; ".join(problems))
