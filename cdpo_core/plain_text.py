"""Text of users, data and models where it is shown: what it says, without what would act on the place that shows it.

Terminals obey control characters (an escape sequence rewrites lines, sets the window's title, in some reads the
clipboard), and bidirectional overrides make text read as what it is not. They are shown as escapes instead: `\\x1b`.
"""

from __future__ import annotations

import re

# C0 but for tab and newline, DEL, C1, line and paragraph separators, bidirectional controls, and halves of characters,
# which no stream can encode.
_ACTING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_SHOWN = re.compile(f"[{_ACTING}]")
_SHOWN_IN_A_LINE = re.compile(f"[\n\t{_ACTING}]")
_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_IN_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$#&!@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;", "@": "&#64;", "`": "&#96;", "$": "&#36;"}


def visible(text: str) -> str:
    """The text with its control characters shown as escapes; newlines and tabs stay."""
    return _SHOWN.sub(_escape, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """The text as one line: newlines and tabs are shown as escapes too."""
    return _SHOWN_IN_A_LINE.sub(_escape, text)


def indented(text: str, by: str = "    ") -> str:
    """The text with every line but the first indented, so that none can pass for another's first."""
    return visible(text).replace("\n", f"\n{by}")


def markdown_text(text: str) -> str:
    """The text as Markdown that shows it: one line, in which nothing is a link, a picture, HTML, emphasis or a cell."""
    escaped = _IN_MARKDOWN.sub(lambda match: _ENTITIES.get(match[0]) or f"\\{match[0]}", one_line(text))
    # Addresses are made links without any mark around them.
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")


def escaped_json(text: str) -> str:
    """JSON with the control characters that its strings may hold written as `\\u009b`; it reads back the same."""
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return {10: "\\n", 9: "\\t", 13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
