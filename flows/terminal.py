"""What `cdpo` shows: its console, progress, errors, and where the libraries' own logs go instead.

All that commands print goes through `PlainConsole`, on which text of users, data and models is text.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from cdpo_core.errors import CdpoError, InputError
from cdpo_core.plain_text import indented, one_line, visible
from tasks.environment import cdpo_home

if TYPE_CHECKING:
    from rich.progress import TaskID

PLAIN_SECONDS = 10.0
# Drawing shares the cores with the training: at rich's ten times a second it takes 5 % of the demo.
DRAWN_PER_SECOND = 4.0
MOST_ERROR_LINES = 12
MOST_LINE_CHARACTERS = 300
# What sqlite and libraries in Rust say of a full disk.
DISK_FULL_SIGNS = ("No space left on device", "disk is full", "os error 28", "StorageFull")


class PlainConsole(Console):
    """A console that shows control characters as escapes and takes no text for markup, an emoji or a thing to colour.

    Styles are given as arguments or by `Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """All that is printed, drawn or exported passes here, with the console's own controls apart from text."""
        return super()._render_buffer(
            segment if segment.control else Segment(visible(segment.text), segment.style) for segment in buffer
        )


class Display(Protocol):
    """How one stage's progress is drawn."""

    def start(self, what: str) -> None:
        """A stage began to compute."""

    def update(self, what: str, done: int, total: int, seconds: float) -> None:
        """It did `done` of `total` steps in `seconds`."""

    def end(self, what: str, seconds: float | None) -> None:
        """It is ready, after `seconds` of work; None if it reported none."""

    def close(self) -> None:
        """Nothing more will be drawn."""


class StageProgress:
    """A `Progress`: turns (what, done, total) reports into the start, course and end of one stage after the other.

    A report (what, 1, 1) ends the stage; one that is there already reports nothing else.
    """

    def __init__(self, display: Display) -> None:
        self._display = display
        self._what = ""
        self._started = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of the stage `what` are done."""
        now = time.monotonic()
        if what != self._what:
            self._end(now)
            if done >= total <= 1:
                self._display.end(what, None)
                return
            self._what, self._started = what, now
            self._display.start(what)
        if done >= total <= 1:
            self._end(now)
        elif done:
            self._display.update(what, done, total, now - self._started)

    def _end(self, now: float) -> None:
        if self._what:
            self._display.end(self._what, now - self._started)
        self._what = ""


class PlainLines:
    """Lines for logs and pipes: a stage's start and end, and at most one line every ten seconds between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0

    def start(self, what: str) -> None:
        self._last = time.monotonic()
        self._print(f"{what} …")

    def update(self, what: str, done: int, total: int, seconds: float) -> None:
        now = time.monotonic()
        if now - self._last >= PLAIN_SECONDS:
            self._last = now
            self._print(f"{what}: {done} of {total} ({done / total:.0%}) after {seconds:.0f} s")

    def end(self, what: str, seconds: float | None) -> None:
        self._print(f"{what}: ready" if seconds is None else f"{what}: done in {seconds:.1f} s")

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


class Bars:
    """A live bar for the stage at work, and one line above it for each that is done."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=DRAWN_PER_SECOND,
        )
        self._bars.start()
        self._bar: TaskID | None = None

    def start(self, what: str) -> None:
        self._bar = self._bars.add_task(what, total=None)

    def update(self, what: str, done: int, total: int, seconds: float) -> None:
        if self._bar is not None:
            self._bars.update(self._bar, completed=done, total=total)

    def end(self, what: str, seconds: float | None) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        time_taken = ("ready", "dim") if seconds is None else f"{seconds:.1f} s"
        self._bars.console.print(Text.assemble(("✓", "green"), f" {what}  ", time_taken))

    def close(self) -> None:
        self._bars.stop()


@contextlib.contextmanager
def showing_progress() -> Iterator[StageProgress]:
    """Bars in a terminal, plain lines elsewhere; on stderr, so that stdout holds the result alone."""
    console = PlainConsole(stderr=True)
    display: Display = Bars(console) if console.is_terminal else PlainLines(console)
    try:
        yield StageProgress(display)
    finally:
        display.close()


def print_error(error: BaseException, *, debug: bool) -> int:
    """Print an error in at most twelve lines (and its traceback with `debug`); returns the exit code."""
    if debug:
        PlainConsole(stderr=True, soft_wrap=True).print("".join(traceback.format_exception(error)), end="")
    full = _disk_full(error)
    if full is not None:
        error = full
    if isinstance(error, CdpoError):
        lines = _error_lines(error)
        code = error.exit_code
    else:
        log_file = _open_log()
        if log_file:
            logging.getLogger("cdpo").error("the run failed", exc_info=error)
        where = f"the traceback is in {log_file}" if log_file else "--debug shows the traceback"
        lines = [
            f"unexpected {type(error).__name__}: {error}".splitlines()[0],
            f"  where: {where}",
            "  fix:   what is finished is kept, the same command continues; if it comes again, please report it",
        ]
        code = 1
    if len(lines) > MOST_ERROR_LINES:
        lines = [*lines[: MOST_ERROR_LINES - 3], "  …", *lines[-2:]]
    console = PlainConsole(stderr=True, soft_wrap=True)
    console.print("error: ", style="bold red", end="")
    for line in lines:
        console.print(one_line(line)[:MOST_LINE_CHARACTERS])
    return code


def _error_lines(error: CdpoError) -> list[str]:
    """What, where and fix; what a user's text adds to them is indented, so that it cannot pass for one."""
    what, *more = error.what.splitlines() or [""]
    named = [f"  {name} {text}" for name, text in (("where:", error.where), ("fix:  ", error.fix)) if text]
    return [what, *(f"    {line}" for line in more), *named]


def log_to_file(folder: Path, command: str) -> Path:
    """Send what Prefect, MLflow and other libraries log to a new file; our own warnings also to the terminal.

    Args:
        folder: made if missing.
        command: the file's name begins with it.

    Raises:
        InputError: the folder cannot be written.
    """
    make_log_folder(folder)
    path = folder / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    to_file = LogFile(path, encoding="utf-8")
    # Prefect configures logging when it is imported, so what it set up can be taken away only afterwards.
    import prefect  # noqa: F401

    to_file.setFormatter(LogLines("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    for name in ["", *logging.root.manager.loggerDict]:
        logger = logging.getLogger(name)
        on_terminal = [handler for handler in logger.handlers if _writes_to_terminal(handler)]
        for handler in on_terminal:
            logger.removeHandler(handler)
        if not name or (on_terminal and not logger.propagate):
            logger.addHandler(to_file)
    logging.captureWarnings(True)
    for name in ("cdpo_core", "tasks", "flows"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(_WarningLines())
    return path


def make_log_folder(folder: Path) -> None:
    """Make the folder of the logs, the first thing that is written under CDPO_HOME.

    Raises:
        InputError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"the state folder cannot be written: {error.strerror}",
            where=str(folder),
            fix="give another folder in CDPO_HOME, or correct its rights",
        ) from error


def _disk_full(error: BaseException) -> CdpoError | None:
    """What a library says of a full disk in its own way, in the user's words; None for anything else."""
    if isinstance(error, CdpoError):
        return None
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            where = str(link.filename or cdpo_home())
        elif any(sign in str(link) for sign in DISK_FULL_SIGNS):
            where = str(cdpo_home())
        else:
            link = link.__cause__ or link.__context__
            continue
        fix = "free some space and run the same command again: finished stages are kept"
        return CdpoError("there is no space left on the disk", where=where, fix=fix)
    return None


class LogLines(logging.Formatter):
    """Records of which only the first line begins at the margin, so that no message can write another's."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines."""
        return indented(super().format(record))


class LogFile(logging.FileHandler):
    """A log file; that its disk is full is said once by the error that ends the run, not with every line.

    Prefect leaves the root logger to handlers of the user's, which it takes to be those named without an underscore.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A record that a full disk does not take is lost; whatever else goes wrong is said."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _open_log() -> str:
    files = [handler.baseFilename for handler in logging.root.handlers if isinstance(handler, logging.FileHandler)]
    return files[-1] if files else ""


def _writes_to_terminal(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and (
        getattr(handler, "stream", None) in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
        or type(handler).__module__.startswith("prefect.")
    )


class _WarningLines(logging.Handler):
    """Shows our own warnings on stderr, one line each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        PlainConsole(stderr=True, soft_wrap=True).print(f"{record.levelname.lower()}: {indented(record.getMessage())}")
