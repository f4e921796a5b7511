"""The errors that mmlm raises on purpose.

Every message says what was found, where (file, line, field or rank), what the rule is and what to
change. ``mmlm.cli`` prints an `MmlmError` as one line and exits with status 1; any other exception
is a bug of ours and keeps its traceback.
"""


class MmlmError(Exception):
    """Base of every error that a user can cause and mend."""

    on_every_rank = True
    """Whether all ranks raise it together, so that one of them printing it is enough."""


class ConfigError(MmlmError, ValueError):
    """A setting, a layout or a model size that breaks a rule."""


class CheckpointError(MmlmError):
    """A checkpoint or weight file that is missing, incomplete or of the wrong shape."""


class DataError(MmlmError):
    """A meta file, annotation line, image or tokenizer that cannot be used."""

    on_every_rank = False


def require(section: str, rules: dict[str, bool]) -> None:
    """Check the fields of a section of the settings.

    Args:
        section: its name.
        rules: what must hold, in words that name the field and the value found -> whether it does.

    Raises:
        ConfigError: naming every rule that is broken.
    """
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ConfigError(f"{section}: " + "; ".join(broken))
