"""The errors a user meets, each with what was wrong, where, and what to do."""

from __future__ import annotations


class CdpoError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        what: what was wrong, one sentence.
        where: the file, row, field or address it was found in ("" when there is none).
        fix: what the user can do about it ("" when nothing is known).
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.fix))


def _rebuild(kind: type[CdpoError], what: str, where: str, fix: str) -> CdpoError:
    return kind(what, where=where, fix=fix)


class InputError(CdpoError):
    """The user's input (config, data, model folder, store address) cannot be used: exit 2."""

    exit_code = 2


class TrainingError(CdpoError):
    """A training stage cannot go on (a loss that is not finite): exit 1, finished stages kept."""


class CorruptArtifact(CdpoError):
    """A stored object's bytes are not those its manifest names."""


class StoreUnavailable(InputError):
    """The artifact store cannot be reached, read or written."""
