"""Reads one data file (JSON lines, JSON, CSV or parquet, plain or gzip) into a raw table.

Everything that keeps a file from being read is one InputError that names the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from cdpo_core.data.schema import RawTable, cell_value, place
from cdpo_core.errors import InputError

READABLE: Final = (".jsonl", ".json", ".parquet", ".csv")
GZIP: Final = ".gz"
LONGEST_CSV_FIELD: Final = 1 << 30
NOT_TEXT_FIX: Final = "give a UTF-8 text file, or name the file by what it is (.parquet, .gz)"


def file_type(path: Path) -> str:
    """The suffix that says how a file is read, without .gz; "" if it is none of READABLE."""
    name = path.name.lower().removesuffix(GZIP)
    return next((suffix for suffix in READABLE if name.endswith(suffix)), "")


def read_file(path: Path, wanted: Collection[str], text: Collection[str], role: str = "") -> RawTable:
    """All rows of one file, with the wanted columns only.

    Args:
        path: a file whose type is one of READABLE, also with .gz behind.
        wanted: the columns to keep; others are named in `RawTable.names` and not held.
        text: the wanted columns that are text; a CSV file's other cells are read as JSON values.
        role: kept in the table, see RawTable.

    Raises:
        InputError: the file cannot be opened, is broken, or holds no rows.
    """
    readers = {".jsonl": _read_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    kind = file_type(path)
    if not kind:
        raise InputError(
            f"files of type {path.suffix or '(none)'} are not read",
            where=str(path),
            fix=f"give one of {', '.join(READABLE)}, also with {GZIP} behind",
        )
    with _told_plainly(path), _opened(path) as stream:
        table = readers[kind](stream, str(path), wanted, text)
    if not table.numbers:
        raise InputError("the file holds no rows", where=str(path), fix="give a file with one response pair a row")
    return replace(table, role=role)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path.name.lower().endswith(GZIP):
        with gzip.open(path, "rb") as unzipped:
            yield io.BufferedReader(unzipped)
    else:
        with path.open("rb") as stream:
            yield stream


@contextmanager
def _told_plainly(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on an unreadable or broken file into an InputError."""
    import pyarrow

    fetch = "copy or download the file again"
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"the gzip file is broken or cut short ({error})", where=str(path), fix=fetch) from error
    except pyarrow.ArrowException as error:
        raise InputError(
            f"the parquet file is broken or cut short ({str(error).splitlines()[0][:120]})", where=str(path), fix=fetch
        ) from error
    except OSError as error:
        why = (error.strerror or str(error)).splitlines()[0][:120]
        fix = "check the file and its permissions"
        raise InputError(f"the file cannot be read: {why}", where=str(path), fix=fix) from error


def _not_text(shown: str, number: int, unit: str, error: UnicodeDecodeError) -> NoReturn:
    byte = error.object[error.start]
    raise InputError(
        f"not text: byte 0x{byte:02x} is not UTF-8", where=place(shown, number, unit), fix=NOT_TEXT_FIX
    ) from error


def _read_lines(stream: Iterable[bytes], shown: str, wanted: Collection[str], text: Collection[str]) -> RawTable:
    rows: list[tuple[int, Any]] = []
    broken: list[tuple[int, str]] = []
    for number, line in enumerate(stream, 1):
        try:
            decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            _not_text(shown, number, "line", error)
        if not decoded.strip():
            continue
        try:
            rows.append((number, json.loads(decoded)))
        except (ValueError, RecursionError) as error:
            broken.append((number, str(error)))
    if broken:
        number, why = broken[0]
        more = f" ({len(broken) - 1:,} more lines are not either)" if len(broken) > 1 else ""
        raise InputError(
            f"line {number} is not JSON: {why[:120]}{more}",
            where=place(shown, number, "line"),
            fix="give one JSON object a line",
        )
    return _from_objects(rows, shown, "line", wanted)


def _read_json(stream: BinaryIO, shown: str, wanted: Collection[str], text: Collection[str]) -> RawTable:
    """A list of objects, or JSON lines under the name .json."""
    content = stream.read()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _read_lines(io.BytesIO(content), shown, wanted, text)
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        _not_text(shown, content.count(b"\n", 0, error.start) + 1, "line", error)
    except (ValueError, RecursionError) as error:
        number = getattr(error, "lineno", 1)
        raise InputError(
            f"not JSON: {error}", where=place(shown, number, "line"), fix="give a list of objects, or one object a line"
        ) from error
    return _from_objects(list(enumerate(rows, 1)), shown, "row", wanted)


def _from_objects(rows: list[tuple[int, Any]], shown: str, unit: str, wanted: Collection[str]) -> RawTable:
    names: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise InputError(
                f"the row is not a JSON object with named fields ({str(row)[:40]!r})",
                where=place(shown, number, unit),
                fix='give rows like {"prompt": ..., "response_0": ..., ...}',
            )
        names.update(dict.fromkeys(row))
    columns = {name: [row.get(name) for _, row in rows] for name in names if name in wanted}
    return RawTable(shown, unit, tuple(names), columns, [number for number, _ in rows])


def _read_csv(stream: BinaryIO, shown: str, wanted: Collection[str], text: Collection[str]) -> RawTable:
    csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    rows: list[list[str]] = []
    try:
        names = next(reader, [])
        for row in reader:
            if not row:
                continue
            rows.append(row)
            if len(row) != len(names):
                raise InputError(
                    f"the row has {len(row)} fields, the header has {len(names)}",
                    where=f"{shown}, row {len(rows)} (ends at line {reader.line_num})",
                    fix="quote fields that hold commas, quotes or line breaks",
                )
    except UnicodeDecodeError as error:
        _not_text(shown, len(rows) + 1, "row", error)
    except csv.Error as error:
        raise InputError(
            f"not CSV: {error}",
            where=f"{shown}, row {len(rows) + 1} (line {reader.line_num})",
            fix="quote fields that hold commas, quotes or line breaks",
        ) from error
    columns = {
        name: [row[at] if name in text else cell_value(row[at]) for row in rows]
        for at, name in enumerate(names)
        if name in wanted
    }
    return RawTable(shown, "row", tuple(names), columns, list(range(1, len(rows) + 1)))


def _read_parquet(stream: BinaryIO, shown: str, wanted: Collection[str], text: Collection[str]) -> RawTable:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()))
    names = tuple(file.schema_arrow.names)
    columns = {name: file.read(columns=[name]).column(name).to_pylist() for name in names if name in wanted}
    return RawTable(shown, "row", names, columns, list(range(1, file.metadata.num_rows + 1)))
