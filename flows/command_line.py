"""What cyclopts does not do for `cdpo`: config fields as options, and results written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo_core.errors import InputError


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
            path.write_text(json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
            return
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as stream:
            json.dump(_finite(record), stream, indent=2, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
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


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
