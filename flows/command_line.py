"""The options that commands share, and what cyclopts does not do: config fields as options, results written whole."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from cdpo_core.errors import InputError
from cdpo_core.plain_text import escaped_json

# What stands for a limit in commands that test none, or are given theirs: nothing reads it.
ANY_LIMIT = 0.0

EXAMPLES = """\
Examples:
  cdpo run testbed              from nothing to a certified policy in minutes
  cdpo run testbed --limit -1   another limit; what is unchanged is kept
  cdpo run my.yaml --data.source pairs.jsonl --dpo.beta 0.1 --json result.json
  cdpo sweep testbed --limits -0.9,-0.7,-0.5,-0.3
  cdpo check-data pairs.jsonl   what a data set holds
  cdpo up                       Prefect and MLflow in the browser

CONFIG is a YAML file or the name of a shipped preset.
Any of its fields can be set: --dpo.beta 0.25, --constraints.0.limit -1.
--debug adds the traceback to an error.
After Ctrl-C or a crash the same command continues; nothing finished is lost.
Exit codes: 0 done, 1 failure, 2 bad input, 3 no certified policy."""

FIELDS = """\
Any field of the config can be set, for example:
  --dpo.beta 0.25 --constraints.0.limit -1 --data.source pairs.jsonl
--debug adds the traceback to an error."""

Config = Annotated[str, Parameter(help="YAML file, or the name of a shipped preset (testbed, tiny, …).")]
Json = Annotated[Path | None, Parameter(name="--json", help="Write the result to this file.", metavar="FILE")]
Limit = Annotated[
    str | None,
    Parameter(help="Largest allowed mean cost, of the first constraint.", allow_leading_hyphen=True, metavar="COST"),
]
Seed = Annotated[str | None, Parameter(help="Seed of every random stream.", metavar="N")]
StoreUri = Annotated[str | None, Parameter(help="Artifact store: a folder, or s3://bucket/prefix.", metavar="URI")]
Name = Annotated[str | None, Parameter(help="Name shown in the UIs.", metavar="TEXT")]
AT_ONCE = "Run N at once on the workers of `cdpo up` (0: all they take); else one by one, here."
AtOnce = Annotated[int | None, Parameter(help=AT_ONCE, metavar="N", validator=validators.Number(gte=0))]
Overrides = Annotated[dict[str, str] | None, Parameter(parse=False)]


def split_tokens(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--section.field value` and `--debug` out of the arguments.

    Args:
        arguments: the words after `cdpo`.

    Returns:
        The other words, and the values by dotted path.

    Raises:
        InputError: a field without a value, or given twice.
    """
    words = list(arguments)
    rest: list[str] = []
    overrides: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if word == "--":
            return [*rest, word, *words], overrides
        name, equals, value = word.partition("=")
        if word == "--debug":
            continue
        if name.startswith("--") and "." in name:
            path = name[2:].replace("-", "_")
            if not equals and not words:
                raise InputError("this field was given no value", where=f"command line: {name}", fix=f"{name} VALUE")
            if path in overrides:
                raise InputError("this field is given twice", where=f"command line: {name}", fix="give it once")
            overrides[path] = value if equals else words.pop(0)
        else:
            rest.append(word)
    return rest, overrides


def check_writable(path: Path, option: str) -> None:
    """Check that a file can be made or replaced there, before the work whose result it will hold.

    Raises:
        InputError: the path is a folder, or its folder is missing or cannot be written.
    """
    what = "this is a folder" if path.is_dir() else ""
    if not what:
        try:
            with tempfile.TemporaryFile(dir=path.absolute().parent):
                return
        except OSError as error:
            what = f"the result cannot be written there: {error.strerror}"
    raise InputError(what, where=f"{option} {path}", fix="name a file in a folder that exists and can be written")


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all; a number that is not finite becomes null.

    Raises:
        InputError: the file cannot be written.
    """
    path = path.resolve()
    try:
        if path.exists() and not path.is_file():
            # A pipe or a device is written to, never replaced.
            path.write_text(_json(record) + "\n")
            return
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as stream:
            stream.write(_json(record, indent=2) + "\n")
        # A temporary file is its owner's alone; the result is as readable as any file made here.
        mask = os.umask(0)
        os.umask(mask)
        Path(stream.name).chmod(0o666 & ~mask)
        Path(stream.name).replace(path)
    except OSError as error:
        raise InputError(
            f"the result cannot be written: {error.strerror}", where=str(path), fix="name another file"
        ) from error


def default_to_nothing() -> int:
    """The reader of our output went away (`cdpo … | head`): say nothing more; returns the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON that is safe to show: somebody will look at the file in a terminal."""
    return escaped_json(json.dumps(_finite(record), indent=indent, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
