"""Config loading: presets, overrides, and every kind of bad config as one readable error."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_kit import experiment_config
from pydantic import ValidationError

from cdpo_core.config import ConstraintConfig, ExperimentConfig
from cdpo_core.config_loading import dump_config, load_config, parse_yaml, preset_names
from cdpo_core.errors import InputError

ROOT = Path(__file__).parent.parent
# Presets that are refused until the user names a path.
NEEDED = {"xstest": {"data.source": "pairs.jsonl"}}


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_valid_and_says_its_command(preset: str) -> None:
    config = load_config(preset, NEEDED.get(preset))
    assert config.name == preset
    assert f"cdpo run {preset}" in (ROOT / "configs" / f"{preset}.yaml").read_text()


@pytest.mark.parametrize("preset", ["testbed", "tiny"])
def test_testbed_presets_say_only_what_differs_from_the_defaults(preset: str) -> None:
    given = yaml.safe_load((ROOT / "configs" / f"{preset}.yaml").read_text())
    default = experiment_config().model_dump()
    for section, value in given.items():
        fields = value if isinstance(value, dict) else {}
        assert [name for name in fields if fields[name] == default[section][name]] == []


def test_the_shipped_limit_is_the_one_the_world_is_calibrated_for() -> None:
    config = load_config("testbed")
    assert [item.limit for item in config.constraints] == [config.testbed.calibrated_limit]


def test_dumped_config_loads_to_an_equal_one(tmp_path: Path) -> None:
    config = load_config("tiny", {"dpo.beta": "0.3", "policy.template": "{prompt}: "})
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("dpo.beta", "0.25", 0.25),
        ("dpo.beta", "5e-3", 0.005),
        ("seed", "3", 3),
        ("name", "2024", "2024"),
        ("tracking.enabled", "false", False),
        ("constraints.0.limit", "-1", -1.0),
        ("data.splits.test", "0.1", 0.1),
        ("policy.template", "{prompt}", "{prompt}"),
        ("policy.template", "[INST] {prompt} [/INST]", "[INST] {prompt} [/INST]"),
    ],
)
def test_an_override_is_read_as_its_field_type(path: str, text: str, value: object) -> None:
    found: object = load_config("testbed", {path: text})
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_change_nothing_else() -> None:
    config = load_config("tiny", {"dpo.beta": "0.3"})
    plain = load_config("tiny")
    assert config == plain.model_copy(update={"dpo": plain.dpo.model_copy(update={"beta": 0.3})})


def test_constraints_can_be_added() -> None:
    config = load_config("", {"constraints.0.limit": "-2", "constraints.1": "{name: privacy, limit: 1}"})
    assert [(item.name, item.limit) for item in config.constraints] == [("harm", -2.0), ("privacy", 1.0)]


NO_LIMIT = ["name: x", "constraints:\n- name: harm", "constraints:\n- limit:", 'constraints:\n- limit: ""']


@pytest.mark.parametrize("text", NO_LIMIT)
def test_a_limit_is_required(tmp_path: Path, text: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    _refused(str(path), {}, ["constraints.0.limit: a limit is required", "--limit -0.5", "my.yaml"])
    assert load_config(str(path), {"constraints.0.limit": "-1"}).constraints[0].limit == -1


def test_no_limit_is_made_up() -> None:
    with pytest.raises(ValidationError, match="constraints"):
        ExperimentConfig()
    with pytest.raises(ValidationError, match="limit"):
        ConstraintConfig(name="harm")
    _refused("testbed", {"constraints.0.limit": ""}, ["constraints.0.limit: a limit is required"])
    _refused("", {"constraints.0.limit": "-1", "constraints.1.name": "b"}, ["constraints.1.limit: a limit is required"])


def test_what_needs_no_limit_of_the_config_may_leave_it_out(tmp_path: Path) -> None:
    assert load_config("", limit=0.5).constraints[0].limit == 0.5
    assert load_config("testbed", limit=0.5).constraints == load_config("testbed").constraints
    path = tmp_path / "my.yaml"
    path.write_text("constraints:\n- name: b\n")
    assert [(item.name, item.limit) for item in load_config(str(path), limit=0.5).constraints] == [("b", 0.5)]


def test_a_section_can_be_given_whole() -> None:
    config = load_config("", {"constraints": "[{name: a, limit: 0}, {name: b, limit: 1}]", "dual": "{rounds: 2}"})
    assert [item.name for item in config.constraints] == ["a", "b"]
    assert config.dual.rounds == 2


BAD_FILES = {
    "empty": ("", ["empty"]),
    "a list": ("- a\n- b\n", ["mapping", "list"]),
    "broken": ("dpo: [1\nx: 3\n", ["not valid YAML", "line 2"]),
    "a tab": ("dpo:\n\tbeta: 1\n", ["not valid YAML", "line 2"]),
    "an object": ("name: !!python/object:os.x {}\n", ["not valid YAML", "line 1"]),
    "duplicate key": ("seed: 1\ndpo:\n  beta: 1\n  beta: 2\n", ["dpo.beta is given twice", "lines 3 and 4"]),
    "NaN": ("dpo:\n  beta: .nan\n", ["dpo.beta must be a finite number", "line 2"]),
    "infinite limit": ("constraints:\n- limit: .inf\n", ["constraints.0.limit", "finite", "line 2"]),
    "negative beta": ("name: x\ndpo:\n  beta: -1\n", ["dpo.beta must be greater than 0", "-1", "line 3"]),
    "unknown field": ("dpo:\n  bta: 1\n", ["no field dpo.bta", "did you mean dpo.beta?", "line 2", "labels"]),
    "unknown section": ("dop:\n  beta: 1\n", ["no field dop", "did you mean dpo?", "line 1"]),
    "empty section": ("dpo:\n", ["dpo must be a section", "line 1"]),
    "a value for a section": ("dpo: 3\n", ["dpo must be a section"]),
    "wrong word": ("dpo:\n  labels: softy\n", ["soft, sampled or hard", "softy"]),
    "not a number": ("dpo:\n  beta: high\n", ["dpo.beta must be a number", "high"]),
    "not whole": ("seed: 1.5\n", ["seed must be a whole number"]),
    "not text": ("name: 3\n", ["name must be text"]),
    "no constraint": ("constraints: []\n", ["constraints needs at least one entry"]),
    "same name": ("constraints:\n- {name: a, limit: 0}\n- {name: a, limit: 0}\n", ["share a name"]),
    "bad template": ("policy:\n  template: hello\n", ["policy.template", "{prompt}", "line 2"]),
    "shares": ("data:\n  splits:\n    test: 0.5\n", ["data.splits", "not 1", "line 2"]),
    "several": ("seed: -1\ndpo:\n  beta: -1\n  x: 1\n", ["3 things", "seed", "dpo.beta", "dpo.x"]),
    "very many": ("\n".join(f"field{i}: 1" for i in range(40)), ["40 things", "and 34 more"]),
    "itself": ("dpo: &a\n  beta: *a\n", ["itself"]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file(tmp_path: Path, kind: str) -> None:
    text, said = BAD_FILES[kind]
    path = tmp_path / "my.yaml"
    path.write_text(text)
    _refused(str(path), {}, [*said, "my.yaml"], limit=0.0)


def _bomb(opened: str, closed: str) -> str:
    """Nine levels of nine aliases each: half a billion values in some hundred characters."""
    levels = [f"a0: &a0 {opened}x{closed}"]
    levels += [f"a{n}: &a{n} {opened}{', '.join([f'*a{n - 1}'] * 9)}{closed}" for n in range(1, 10)]
    return "\n".join(levels)


BOMBS = {
    "aliases in lists": _bomb("[", "]"),
    "aliases in mappings": "\n".join(
        ["a0: &a0 {x: 1}"]
        + [f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}" for n in range(1, 10)]
    ),
    "merged keys": "\n".join(
        ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)]
    ),
    "deep lists": "dpo: " + "[" * 10_000,
    "deep mappings": "dpo: " + "{a: " * 10_000,
    "deep blocks": "dpo: " + "- " * 10_000,
    "a long number": f"seed: {'9' * 30_000}",
    "a long number in minutes": f"seed: 1{':59' * 10_000}",
    "a long fraction": f"dpo: {{beta: 0.{'9' * 30_000}}}",
    "a 13th month": "name: 2026-13-01",
    "a long file": "# " + "x" * 1_000_000,
    "many values": "data: [" + "1," * 20_000 + "]",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_file_that_would_take_the_machine_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml.constructor.SafeConstructor, "construct_object", _counted(10_000))
    path = tmp_path / "my.yaml"
    path.write_text(BOMBS[kind])
    _refused(str(path), {}, ["not valid YAML", "my.yaml"])
    if len(BOMBS[kind]) < 1000:
        _refused("tiny", {"data": BOMBS[kind]}, ["not valid YAML", "--data"])


def _counted(most: int) -> Any:
    """Constructing a value, which fails a test that would construct without end."""
    construct, seen = yaml.constructor.SafeConstructor.construct_object, []

    def counted(self: Any, node: Any, deep: bool = False) -> Any:
        seen.append(None)
        assert len(seen) < most
        return construct(self, node, deep)

    return counted


def test_an_alias_or_two_are_fine() -> None:
    config, _ = parse_yaml("dpo: &a {beta: 0.5}\ndual: *a\nsft: {<<: *a, x: 1}", "text")
    assert config == {"dpo": {"beta": 0.5}, "dual": {"beta": 0.5}, "sft": {"beta": 0.5, "x": 1}}


def test_no_yaml_is_read_but_with_the_bounded_reader() -> None:
    for folder in ("cdpo_core", "tasks", "flows", "deployments"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "plain_yaml.py":
                assert not re.search(r"yaml\.\w*(load|compose|parse|scan)", path.read_text()), path


BAD_OVERRIDES = {
    "unknown field": ({"dpo.bta": "1"}, ["did you mean dpo.beta?", "--dpo.bta"]),
    "unknown section": ({"dop.beta": "1"}, ["did you mean dpo?", "--dop.beta"]),
    "NaN": ({"constraints.0.limit": "nan"}, ["finite", "--constraints.0.limit"]),
    "negative beta": ({"dpo.beta": "-1"}, ["greater than 0", "--dpo.beta"]),
    "no such position": ({"constraints.5.limit": "1"}, ["list of 1", "'5'"]),
    "no position": ({"constraints.first.limit": "1"}, ["list of 1", "'first'"]),
    "below a value": ({"name.x": "1"}, ["name is one value"]),
    "broken structure": ({"data.splits": "{test"}, ["not valid YAML", "--data.splits"]),
    "cross-field rule": ({"policy.hidden_size": "33"}, ["multiple of twice policy.heads", "--policy.hidden_size"]),
    "empty text": ({"policy.base": ""}, ["must not be empty"]),
}


@pytest.mark.parametrize("kind", BAD_OVERRIDES)
def test_bad_override(kind: str) -> None:
    overrides, said = BAD_OVERRIDES[kind]
    _refused("testbed", overrides, said)


def test_config_that_cannot_be_found_or_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    for source, said in [
        ("tsetbed", ["no preset 'tsetbed'", "did you mean 'testbed'?", *preset_names()]),
        ("zzz", ["no preset 'zzz'", *preset_names()]),
        ("missing.yaml", ["no such config file", "missing.yaml", *preset_names()]),
        ("elsewhere/testbed.yaml", ["no such config file", "shipped preset of that name"]),
        (str(tmp_path), ["this is a folder"]),
        (str(binary), ["not a text file"]),
    ]:
        _refused(source, {}, said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_config_without_read_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("name: x\n")
    path.chmod(0)
    _refused(str(path), {}, ["cannot be read"])


def _refused(source: str, overrides: dict[str, str], said: list[str], limit: float | None = None) -> None:
    """One InputError of at most twelve lines that says all of `said` and where it is and what to do."""
    with pytest.raises(InputError) as caught:
        load_config(source, overrides, limit=limit)
    text = str(caught.value)
    assert len(text.splitlines()) <= 12
    assert caught.value.where
    assert caught.value.fix
    for words in said:
        assert words in text, text
