"""The config as a form: what a page that is made from its JSON schema shows beside each field.

Prefect's pages show a field's title and description and none of its rules, so the range is said in the description too.
"""

from __future__ import annotations

from typing import Any

# Words that are not written small within a title.
WRITTEN = {"lora": "LoRA", "uri": "URI", "adam": "Adam"}


def describe_fields(properties: dict[str, dict[str, Any]]) -> None:
    """Give every field of a section's JSON schema a readable title, and every number its range in words.

    Args:
        properties: by field name; changed in place.
    """
    for name, field in properties.items():
        field["title"] = title_of(name)
        if field.get("type") in ("integer", "number"):
            field["description"] = f"{field['description']} {range_in_words(field)}"


def title_of(name: str) -> str:
    """A field's name as a title: `max_prompt_tokens` is `Max prompt tokens`."""
    words = [WRITTEN.get(word, word) for word in name.split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def range_in_words(field: dict[str, Any]) -> str:
    """A number's range, as in `Above 0, at most 1.`"""
    parts = [
        f"{words} {field[rule]:g}"
        for rule, words in (
            ("exclusiveMinimum", "above"),
            ("minimum", "at least"),
            ("exclusiveMaximum", "below"),
            ("maximum", "at most"),
        )
        if rule in field
    ]
    text = ", ".join(parts) or "any number"
    return f"{text[0].upper()}{text[1:]}."
