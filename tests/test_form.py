"""The form that Prefect's pages make of a flow's parameters: what every field must have, and a snapshot of all of them.

After a change that is meant: RENEW=1 python -m pytest tests/test_form.py
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from cdpo_core.config import ExperimentConfig
from cdpo_core.config_form import range_in_words, title_of
from flows.compare import compare
from flows.experiment import experiment
from flows.sections import WORDS
from flows.sweep import sweep

SNAPSHOT = Path(__file__).parent / "form.json"
FLOWS = {"experiment": experiment, "sweep": sweep, "compare": compare}
RANGE = ("exclusiveMinimum", "minimum", "exclusiveMaximum", "maximum")
# What a number counts or is measured in; a share or a rate has no unit and says what it is.
UNITS = re.compile(
    r"units?\b|characters|tokens|prompts?\b|responses|pairs|demonstrations|steps|rounds|layers|heads|threads|sequences"
    r"|rows|passes|rank|costs|nat\b|probability|share|decay|rate|weight|seed|temperature",
    re.IGNORECASE,
)


def schema(flow: Any) -> dict[str, Any]:
    return parameter_schema(flow).model_dump_for_openapi()


def fields(form: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of the form by its path, in the order shown; a list's entries are at `path.0`."""
    yield from _walk(form["properties"], form["definitions"], "")


def _walk(properties: dict[str, Any], definitions: dict[str, Any], at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in sorted(properties.items(), key=lambda item: item[1]["position"]):
        yield f"{at}{name}", field
        for below, reference in ((f"{at}{name}.", field), (f"{at}{name}.0.", field.get("items", {}))):
            if "$ref" in reference:
                section = definitions[reference["$ref"].rpartition("/")[2]]
                yield from _walk(section["properties"], definitions, below)


@pytest.mark.parametrize("name", FLOWS)
def test_every_field_says_what_it_is(name: str) -> None:
    form = schema(FLOWS[name])
    for path, field in fields(form):
        assert field["title"], path
        assert field["description"].strip().endswith((".", ")")), f"{path}: {field['description']}"
        if field.get("type") in ("integer", "number") and "." in path:
            assert UNITS.search(field["description"]), f"{path} has no unit: {field['description']}"
            assert field["description"].endswith(range_in_words(field)), path
            assert any(rule in field for rule in RANGE) or field["description"].endswith("Any number."), path
        if field.get("type") in ("integer", "number") and "." not in path:
            assert any(rule in field for rule in RANGE), path
    for title, section in form["definitions"].items():
        positions = [field["position"] for field in section["properties"].values()]
        assert sorted(positions) == list(range(len(positions))), title
        assert section["description"], title
        assert section["additionalProperties"] is False, title


@pytest.mark.parametrize("name", FLOWS)
def test_the_form_holds_nothing_that_prefects_pages_cannot_show(name: str) -> None:
    text = json.dumps(schema(FLOWS[name]))
    for word in ("anyOf", "oneOf", "allOf", '"null"', "patternProperties"):
        assert word not in text, word
    for path, field in fields(schema(FLOWS[name])):
        assert "$ref" in field or field["type"] in ("string", "integer", "number", "boolean", "array"), path


def test_what_is_set_first_comes_first() -> None:
    paths = [path for path, _ in fields(schema(experiment)) if "." not in path]
    assert paths[:4] == ["name", "constraints", "data", "policy"]
    assert set(paths) == set(WORDS) == set(ExperimentConfig.model_fields)
    assert next(path for path, _ in fields(schema(sweep))) == "limits"
    limit = [path for path, _ in fields(schema(experiment)) if path.startswith("constraints.0.")]
    assert limit[:2] == ["constraints.0.name", "constraints.0.limit"]


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("empty", [{}, {"limit": None}, {"limit": ""}])
def test_the_server_refuses_a_run_without_a_limit(name: str, empty: dict[str, Any]) -> None:
    own = {"sweep": {"limits": [0.0]}, "compare": {"limits": ["0"], "seeds": [0], "methods": []}}.get(name, {})

    def ask(given: dict[str, Any]) -> None:
        # As the server checks what either version of the form sends for an emptied field, before a run is made.
        validate(given, schema(FLOWS[name]), raise_on_error=True, allow_none_with_default=True)

    ask({**own, "constraints": [{"name": "harm", "limit": 0.0}]})
    for constraints in ([{"name": "harm", **empty}], [{"limit": -1.0}, {"name": "second", **empty}]):
        with pytest.raises(ValidationError, match=r"limit|number"):
            ask({**own, "constraints": constraints})
    with pytest.raises(ValidationError, match="constraints"):
        ask(own)


def test_the_form_is_the_one_reviewed() -> None:
    found = {name: dict(fields(schema(flow))) for name, flow in FLOWS.items()}
    # The sections are the same in all three: shown once.
    shared = set.intersection(*(set(form) for form in found.values()))
    found = {
        "sections": {path: found["experiment"][path] for path in found["experiment"] if path in shared},
        **{name: {path: field for path, field in form.items() if path not in shared} for name, form in found.items()},
    }
    parts = []
    for name, form in found.items():
        lines = [f"  {json.dumps(path)}: {json.dumps(field, sort_keys=True)}" for path, field in form.items()]
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    if os.environ.get("RENEW"):
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert json.loads(SNAPSHOT.read_text(encoding="utf-8")) == json.loads(text), "RENEW=1 pytest tests/test_form.py"


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"type": "integer", "minimum": 1}, "At least 1."),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "Above 0, below 0.5."),
        ({"type": "number", "minimum": 0, "maximum": 1}, "At least 0, at most 1."),
        ({"type": "number"}, "Any number."),
    ],
)
def test_a_range_in_words(field: dict[str, Any], words: str) -> None:
    assert range_in_words(field) == words


def test_a_name_as_a_title() -> None:
    assert title_of("max_prompt_tokens") == "Max prompt tokens"
    assert title_of("lora_rank") == "LoRA rank"
    assert title_of("uri") == "URI"
