"""The command line within the test's own process: its exit code and what it said."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from flows.cli import main


class Said(NamedTuple):
    """A command's exit code, what it printed and its errors."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The error alone, without the progress before it."""
        return self.err[self.err.index("error: ") :]


def command_line(arguments: Sequence[str], home: Path) -> Said:
    """Run `cdpo` with these arguments under a state folder; no other variable of the environment is touched."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, {"CDPO_HOME": str(home)}), logging_put_back():
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    return Said(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def logging_put_back() -> Iterator[None]:
    """The command line sends logs to files; the next test wants them where they were."""
    before = {name: list(logging.getLogger(name).handlers) for name in ["", *logging.root.manager.loggerDict]}
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name in ["", *logging.root.manager.loggerDict]:
            logger = logging.getLogger(name)
            for handler in set(logger.handlers).difference(before.get(name, [])):
                handler.close()
            logger.handlers[:] = before.get(name, [])
