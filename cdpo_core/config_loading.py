"""From a YAML file or a preset's name, plus overrides, to one validated config or one readable error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cdpo_core.config import ExperimentConfig
from cdpo_core.config_problems import LineNumbers, describe_problems, holds_fields
from cdpo_core.errors import InputError
from cdpo_core.plain_yaml import MOST_CHARACTERS, compose_yaml, read_yaml

SUFFIXES = (".yaml", ".yml")


def preset_names() -> list[str]:
    """The names of the shipped presets, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files("configs").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(
    source: str, overrides: Mapping[str, Any] | None = None, *, limit: float | None = None
) -> ExperimentConfig:
    """Read a config, put the overrides over it and validate the whole once.

    Args:
        source: path of a YAML file, or the name of a shipped preset; "" starts from the defaults.
        overrides: values by dotted path (`dpo.beta`, `constraints.0.limit`); text is parsed as the field's type.
        limit: of the first constraint where none is said, for what has its limits from elsewhere or needs none.

    Raises:
        InputError: naming the file and field, what was wrong, and what is allowed.
    """
    text, where = _read(source) if source else ("{}", "the defaults")
    values, lines = parse_yaml(text, where)
    given = dict(overrides or {})
    for path, value in given.items():
        _put(values, path, value)
    if limit is not None:
        _say_limit(values, limit)
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as error:
        raise describe_problems(error, where, lines, given) from None


def overridden(config: ExperimentConfig, values: Mapping[str, Any], where: str) -> ExperimentConfig:
    """The config with values put over it by dotted path, validated anew.

    Args:
        config: stays as it is.
        values: by dotted path (`dpo.steps`).
        where: what errors call the source of the values.

    Raises:
        InputError: a field that does not exist, or a value that is not allowed.
    """
    whole = config.model_dump(mode="json")
    for path, value in values.items():
        _put(whole, path, value)
    try:
        return ExperimentConfig.model_validate(whole)
    except ValidationError as error:
        raise describe_problems(error, where, {}, dict(values)) from None


def dump_config(config: ExperimentConfig) -> str:
    """The whole config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def parse_yaml(text: str, where: str) -> tuple[dict[str, Any], LineNumbers]:
    """The YAML mapping and the line of each dotted path.

    Raises:
        InputError: broken YAML, a duplicate key, or a document that is not a mapping; with the line.
    """
    try:
        root = compose_yaml(text)
        lines: LineNumbers = {}
        if root is not None:
            _walk(root, "", lines, where)
        values = read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise InputError(f"this is not valid YAML: {problem}", where=place, fix="correct that line") from None
    if not isinstance(values, dict):
        found = "empty" if values is None else f"a {type(values).__name__}"
        raise InputError(
            f"a config is a mapping of sections, but this file is {found}",
            where=where,
            fix="write sections such as `dpo:` with fields below them; `cdpo run testbed` runs a shipped one",
        )
    return values, lines


def _read(source: str) -> tuple[str, str]:
    """The text of a config and how to call it in messages."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError("a config is a YAML file, but this is a folder", where=source, fix="name a file in it")
    if path.is_file():
        return _read_text(path), source
    if source.endswith(SUFFIXES) or "/" in source:
        raise _missing_file(source, path)
    if source not in preset_names():
        close = difflib.get_close_matches(source, preset_names(), n=1)
        raise InputError(
            f"there is no preset {source!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
            where="CONFIG",
            fix=f"give one of {', '.join(preset_names())}, or the path of a YAML file",
        )
    return resources.files("configs").joinpath(f"{source}.yaml").read_text(encoding="utf-8"), f"preset {source}"


def _read_text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as stream:
            # One character more is enough to be refused as too long.
            return stream.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError:
        raise InputError("this is not a text file", where=str(path), fix="give a YAML file (UTF-8)") from None
    except OSError as error:
        raise InputError(
            f"the config cannot be read: {error.strerror}", where=str(path), fix="check its rights"
        ) from None


def _missing_file(source: str, path: Path) -> InputError:
    fix = f"check the path, or name a shipped preset: {', '.join(preset_names())}"
    if path.stem in preset_names():
        fix = f"check the path, or take the shipped preset of that name: {path.stem}"
    return InputError("there is no such config file", where=source, fix=fix)


def _walk(node: yaml.Node, path: str, lines: LineNumbers, where: str) -> None:
    """Note every path's line; refuse a key that is given twice (YAML would silently keep the last)."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            line = key.start_mark.line + 1
            if inner in lines:
                raise InputError(
                    f"{inner} is given twice", where=f"{where}, lines {lines[inner]} and {line}", fix="keep one of them"
                )
            lines[inner] = line
            _walk(value, inner, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = f"{path}.{index}" if path else str(index)
            lines[inner] = value.start_mark.line + 1
            _walk(value, inner, lines, where)


def _put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set `values[a][b]...` for the dotted path a.b, making sections that are not there yet."""
    *parents, last = parts = path.split(".")
    if isinstance(value, str) and holds_fields(parts):
        value = _structure(path, value)
    target: Any = values
    for depth, part in enumerate(parents):
        target = _enter(target, part, ".".join(parents[:depth]), path)
    if isinstance(target, dict):
        target[last] = value
    elif isinstance(target, list):
        _enter(target, last, ".".join(parents), path)
        target[int(last)] = value
    else:
        raise _no_fields(".".join(parents), path)


def _say_limit(values: dict[str, Any], limit: float) -> None:
    """Give the first constraint a limit if the config states none."""
    constraints = values.setdefault("constraints", [{}])
    if isinstance(constraints, list) and constraints and isinstance(constraints[0], dict):
        constraints[0].setdefault("limit", limit)


def _structure(path: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        raise InputError(
            f"{path} is a section or a list, and its value is not valid YAML",
            where=f"command line: --{path}",
            fix=f"set one field at a time, --{path}.FIELD VALUE, or give '{{field: value}}' in quotes",
        ) from None


def _enter(target: Any, part: str, above: str, path: str) -> Any:
    """What is at `part` of a mapping or list; an empty mapping is put there if nothing is."""
    if isinstance(target, list):
        if not part.isdigit() or int(part) > len(target):
            raise InputError(
                f"{above} is a list of {len(target)}, and {part!r} is no position in it",
                where=f"command line: --{path}",
                fix=f"positions count from 0; {len(target)} adds one",
            )
        if int(part) == len(target):
            target.append({})
        return target[int(part)]
    if not isinstance(target, dict):
        raise _no_fields(above, path)
    if target.get(part) is None:
        # One constraint is the common case: `--constraints.0.limit` makes it.
        target[part] = [{}] if part == "constraints" and not above else {}
    return target[part]


def _no_fields(above: str, path: str) -> InputError:
    return InputError(
        f"{above} is one value and has no fields", where=f"command line: --{path}", fix=f"give --{above} VALUE"
    )
