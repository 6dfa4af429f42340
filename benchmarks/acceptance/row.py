"""One row of the acceptance table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A promise, judged.

    Attributes:
        number: in the table.
        what: was run.
        measured: the figures.
        target: what they must be.
        passed: None when it could not be run here; `measured` says why.
    """

    number: int
    what: str
    measured: str
    target: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        """pass, FAIL or skipped."""
        return "skipped" if self.passed is None else "pass" if self.passed else "FAIL"
