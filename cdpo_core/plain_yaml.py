"""YAML as configs are written: plain values of bounded size, so that no file of a few lines takes the machine.

Ten aliases of ten aliases, nine deep, are a billion values: everything is counted as if it were written out. What is
too large, too deep, refers to itself or is no plain value is a `yaml.YAMLError` with its line, after some milliseconds.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import Node

MOST_VALUES, MOST_DEEP, MOST_DIGITS = 5_000, 20, 100
MOST_CHARACTERS = 64 * 1024


class PlainLoader(yaml.SafeLoader):
    """A safe loader that counts what it composes, aliases written out."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open: list[int] = []
        self._sizes: dict[int, int] = {}
        self._total = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """One node with what is in it.

        Raises:
            YAMLError: there is too much of it, or it is inside itself.
        """
        event = self.peek_event()
        if len(self._open) >= MOST_DEEP:
            raise _too_much(f"more than {MOST_DEEP} levels are nested", event)
        is_alias = self.check_event(yaml.AliasEvent)
        self._open.append(0)
        node = super().compose_node(parent, index)
        inner = self._open.pop()
        if is_alias:
            size = self._sizes.get(id(node), 0)
            if not size:
                raise _too_much("it refers to itself", event)
            self._total += size
        else:
            size = self._sizes[id(node)] = 1 + inner
            self._total += 1
        if self._open:
            self._open[-1] += size
        if self._total > MOST_VALUES:
            raise _too_much(f"it holds more than {MOST_VALUES} values with its aliases written out", event)
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """A value; one that has its kind's form and is none of it (a 13th month) is an error with its line.

        Raises:
            YAMLError: it is none, or a number of very many digits.
        """
        is_number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if is_number and len(node.value) > MOST_DIGITS:
            raise _too_much(f"a number of more than {MOST_DIGITS} digits", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            raise _too_much(str(error).splitlines()[0], node) from error


def read_yaml(text: str) -> Any:
    """The values of a document.

    Raises:
        YAMLError: it is broken, too large or too deep.
    """
    _check_length(text)
    return yaml.load(text, Loader=PlainLoader)


def compose_yaml(text: str) -> Node | None:
    """The nodes of a document, which know their lines; None of an empty one.

    Raises:
        YAMLError: as `read_yaml`.
    """
    _check_length(text)
    return yaml.compose(text, Loader=PlainLoader)


def _check_length(text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text)} characters, and more than {MOST_CHARACTERS} are not read")


def _too_much(what: str, place: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=place.start_mark)
