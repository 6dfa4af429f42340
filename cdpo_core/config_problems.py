"""Pydantic's complaints about a config in the user's words: the field, its line, what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, get_args, get_origin

from pydantic import BaseModel

from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import InputError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

LineNumbers = dict[str, int]
Location = Sequence[int | str]

_LIMIT = re.compile(r"constraints\.\d+\.limit")
GIVE_LIMIT = (
    "say how much mean cost is allowed, in the cost model's units (0 is the border of safe): `limit: -0.5` in the "
    "constraint, or --limit -0.5"
)
MOST_SHOWN = 6
MUST = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a section: fields below it, `field: value`",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "list_type": "must be a list: one `- name: …` entry for each",
    "model_type": "must be a section: fields below it, `field: value`",
    "string_too_short": "must not be empty",
    "string_type": 'must be text (put it in "quotes")',
    "too_short": "needs at least one entry",
}


def describe_problems(error: ValidationError, where: str, lines: LineNumbers, overrides: Collection[str]) -> InputError:
    """One error for all that is wrong with a config.

    Args:
        error: pydantic's verdict.
        where: the file, as the user knows it.
        lines: the line of each dotted path in the file.
        overrides: dotted paths that came from the command line.
    """
    problems = [_describe(entry, where, lines, overrides) for entry in error.errors(include_url=False)]
    if len(problems) == 1:
        what, place, fix = problems[0]
        return InputError(what, where=place, fix=fix)
    shown = [f"  {place}: {what}" for what, place, _ in problems[:MOST_SHOWN]]
    if len(problems) > MOST_SHOWN:
        shown.append(f"  and {len(problems) - MOST_SHOWN} more")
    return InputError(
        "\n".join([f"{len(problems)} things in this config cannot be used:", *shown]), where=where, fix=problems[0][2]
    )


def field_at(location: Location) -> FieldInfo | None:
    """The config field at a location such as ("constraints", 0, "limit"), or None."""
    model: Any = ExperimentConfig
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, int) or part.isdigit():
            continue
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return None
        field = model.model_fields[part]
        model = field.annotation
        if get_origin(model) is list:
            model = get_args(model)[0]
    return field


def holds_fields(location: Location) -> bool:
    """Whether the config has a section or a list at this location, and not one value."""
    field = field_at(location)
    kind = field.annotation if field else None
    return get_origin(kind) is list or (isinstance(kind, type) and issubclass(kind, BaseModel))


def fields_of(location: Location) -> list[str]:
    """The names of the fields of the section at a location; the sections themselves at ()."""
    field = field_at(location)
    model: Any = field.annotation if field else ExperimentConfig
    if get_origin(model) is list:
        model = get_args(model)[0]
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _describe(entry: ErrorDetails, where: str, lines: LineNumbers, overrides: Collection[str]) -> tuple[str, str, str]:
    """What was wrong, where, and what to do, of one complaint."""
    location = entry["loc"]
    path = ".".join(map(str, location))
    if path == "constraints" and entry["type"] == "missing":
        path = "constraints.0.limit"
    if _LIMIT.fullmatch(path) and (entry["type"] == "missing" or entry["input"] in (None, "")):
        what, fix = f"{path}: a limit is required", GIVE_LIMIT
    elif entry["type"] == "extra_forbidden":
        what, fix = _unknown_field(location)
    elif entry["type"] == "value_error":
        message = str(entry["ctx"]["error"])
        named = re.match(r"([a-z_]+(?:\.[a-z0-9_]+)*):? ", message)
        inner = named.group(1) if named and field_at([*location, *named.group(1).split(".")]) else ""
        path = ".".join(filter(None, [path, inner]))
        what = message if not location else f"{'.'.join(map(str, location))}: {message}"
        fix = _meaning(path)
    else:
        what, fix = f"{path} {_rule(entry)}, not {_shown(entry['input'])}", _meaning(path)
    return what, _place(path, where, lines, overrides), fix


def _rule(entry: ErrorDetails) -> str:
    if entry["type"] in MUST:
        return MUST[entry["type"]]
    if entry["type"] == "literal_error":
        return "must be " + entry["ctx"]["expected"].replace("'", "")
    return entry["msg"].replace("Input should", "must").replace("String should", "must")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _unknown_field(location: Location) -> tuple[str, str]:
    section, name = location[:-1], str(location[-1])
    names = fields_of(section)
    path = ".".join(map(str, location))
    close = difflib.get_close_matches(name, names, n=1)
    what = f"there is no field {path}"
    if close:
        what += f"; did you mean {'.'.join([*map(str, section), close[0]])}?"
    of = ".".join(map(str, section)) if section else "a config"
    return what, f"the fields of {of} are {', '.join(names)}"


def _meaning(path: str) -> str:
    field = field_at(path.split(".")) if path else None
    if field is None or not field.description:
        return "correct the field"
    return f"{path}: {field.description}"


def _place(path: str, where: str, lines: LineNumbers, overrides: Collection[str]) -> str:
    """The override or the line of the file that a path's value comes from."""
    for given in overrides:
        if path == given or path.startswith(f"{given}.") or given.startswith(f"{path}."):
            return f"command line: --{given}"
    known = path
    while known and known not in lines:
        known = known.rpartition(".")[0]
    return f"{where}, line {lines[known]}" if known else where
