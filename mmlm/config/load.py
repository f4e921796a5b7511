"""From a recipe and overrides to a RunConfig, and from a RunConfig to JSON and back."""

import dataclasses
import difflib
import importlib.util
import json
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlm.config.schema import RunConfig
from mmlm.errors import ConfigError


def load_recipe(spec: str) -> RunConfig:
    """Call the function of a recipe file.

    Args:
        spec: ``FILE:FUNCTION``, e.g. ``examples/internvl_v1_2/recipe.py:tiny``.

    Returns:
        What the function returns.

    Raises:
        ConfigError: if the file or the function is missing, or it does not return a RunConfig.
    """
    file, _, function = spec.rpartition(":")
    if not file or not function:
        raise ConfigError(f"--recipe '{spec}' must read FILE:FUNCTION, e.g. recipe.py:finetune")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"--recipe: the file '{file}' does not exist")
    module_spec = importlib.util.spec_from_file_location(f"mmlm_recipe_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look their module up
    module_spec.loader.exec_module(module)
    found = [
        name
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType) and not name.startswith("_")
    ]
    if function not in found:
        raise ConfigError(f"--recipe: {file} has no function '{function}'; it has {sorted(found)}")
    config = getattr(module, function)()
    if not isinstance(config, RunConfig):
        raise ConfigError(f"--recipe: {file}:{function} must return a mmlm RunConfig")
    return config


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Replace fields by ``a.b=c``.

    Args:
        config: start.
        overrides: each ``section.field=value``; the value is read as the field's type, ``none``
            where a field may be None.

    Returns:
        A new config; its sections are checked again.

    Raises:
        ConfigError: for an unknown field (with the nearest one) or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ConfigError(f"--set '{override}' must read section.field=value")
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"--set {key.strip()}: '{name}' was set as a whole before")
        if isinstance(branch.get(path[-1]), dict):
            raise ConfigError(f"--set {key.strip()}: fields inside '{path[-1]}' were set before")
        branch[path[-1]] = value.strip()
    replaced: RunConfig = _replaced(config, tree, "")
    return replaced


def _replaced(section: Any, changes: dict[str, Any], prefix: str) -> Any:
    """The section with all changes made at once, so that their order does not matter."""
    kinds = typing.get_type_hints(type(section))
    names = [field.name for field in dataclasses.fields(section)]
    values = {}
    for name, change in changes.items():
        key = f"{prefix}{name}"
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"--set {_whole(key, change)}: there is no field '{name}'; the nearest is "
                f"'{near[0]}' "
                f"(all: {', '.join(names)})"
            )
        if not isinstance(change, dict):
            values[name] = _parse(kinds[name], change, key)
            continue
        inner = getattr(section, name)
        if not dataclasses.is_dataclass(inner):
            raise ConfigError(
                f"--set {_whole(key, change)}: '{name}' has no fields of its own here"
            )
        values[name] = _replaced(inner, change, f"{key}.")
    return dataclasses.replace(section, **values)


def _whole(key: str, change: Any) -> str:
    """The key as it was written; of several inside one section the first."""
    while isinstance(change, dict):
        name, change = next(iter(change.items()))
        key = f"{key}.{name}"
    return key


def _parse(kind: Any, value: str, key: str) -> Any:
    if isinstance(kind, types.UnionType):
        if value.lower() == "none":
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(f"--set {key}={value}: choose one of {', '.join(choices)}")
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"--set {key}={value}: must be true or false")
        return value.lower() == "true"
    if dataclasses.is_dataclass(kind):
        raise ConfigError(f"--set {key}: name a field inside '{key}', not the whole section")
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"--set {key}={value}: must be of type {kind.__name__}") from None


def to_json(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain JSON values."""
    return dataclasses.asdict(config)


def write_resolved(config: RunConfig, path: Path) -> None:
    """Write the resolved config, so that a run can be read back from its folder."""
    path.write_text(json.dumps(to_json(config), indent=2, ensure_ascii=False) + "\n", "utf-8")


def from_json(kind: Any, content: Any) -> Any:
    """Rebuild a config dataclass (`RunConfig`, `ModelConfig`) from what ``asdict`` made of it.

    Raises:
        ConfigError: if the content is of something else, or breaks a rule.
    """
    if isinstance(kind, types.UnionType):
        if content is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not type(None))
    if not dataclasses.is_dataclass(kind):
        return content
    name_of_kind = getattr(kind, "__name__", "config")
    if not isinstance(content, dict):
        raise ConfigError(f"{name_of_kind} must be an object of its fields, found {content!r}")
    kinds = typing.get_type_hints(kind)
    unknown = sorted(content.keys() - kinds.keys())
    if unknown:
        raise ConfigError(f"{name_of_kind} has no field {', '.join(map(repr, unknown))}")
    values = {name: from_json(kinds[name], value) for name, value in content.items()}
    try:
        return kind(**values)  # type: ignore[operator]
    except TypeError as error:  # a required field is not there
        raise ConfigError(f"{name_of_kind}: {error}") from None
