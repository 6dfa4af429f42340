"""What the documents show exists: commands, options, fields, files, functions, links, pictures."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from cdpo_core.config import ConstraintConfig, ExperimentConfig
from cdpo_core.config_loading import load_config, preset_names
from flows.cli import app
from flows.command_line import split_tokens

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/method.md", "docs/operations.md", "docs/LOG.md")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
ROOMS = {path.stem for path in (ROOT / "cdpo_core").iterdir() if not path.name.startswith("_")}
FILE_SUFFIXES = (
    ".py",
    ".yaml",
    ".md",
    ".json",
    ".parquet",
    ".txt",
    ".toml",
    ".db",
    ".jsonl",
    ".csv",
    ".gz",
    ".safetensors",
)


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return [body for _, found, body in FENCE.findall(text(document)) if found == language]


def spans(document: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text(document)))


def lines_of(document: str, command: str) -> Iterator[list[str]]:
    """The words of every use of a command, in shell blocks and in running text."""
    shown = [line for block in blocks(document, "sh") for line in block.splitlines()]
    for line in [*shown, *spans(document)]:
        words = shlex.split(line, comments=True)
        if words and words[0] == command:
            yield words[1:]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_shown_is_one_with_these_options_and_fields(document: str) -> None:
    for words in lines_of(document, "cdpo"):
        if len(words) < 2:
            assert not words or words[0] in list(app), f"cdpo {words[0]}"
            continue
        tokens, overrides = split_tokens(words)
        _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        source = tokens[1] if tokens[1] in preset_names() else ""
        limit = bound.arguments.get("limit")
        # A file of the reader's own states its limit.
        given = {**overrides, **({"constraints.0.limit": limit} if limit else {})}
        load_config(source, given, limit=None if source else 0.0)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_shown_is_in_the_menu(document: str) -> None:
    menu = set(re.findall(r"^([a-z-]+):.*##", text("Makefile"), re.MULTILINE))
    assert {words[0] for words in lines_of(document, "make") if words} <= menu


def test_the_readme_begins_with_the_two_commands() -> None:
    first, *_ = blocks("README.md", "sh")
    assert [line.split("  ")[0] for line in first.splitlines()] == ["make demo", "make test"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_config_shown_is_valid(document: str, tmp_path: Path) -> None:
    for index, block in enumerate(blocks(document, "yaml")):
        file = tmp_path / f"{index}.yaml"
        file.write_text(block)
        load_config(str(file))


def test_the_file_map_names_what_is_there() -> None:
    (block,) = [body for _, _, body in FENCE.findall(text("README.md")) if body.startswith("cdpo_core/")]
    folders = [ROOT]
    for line in block.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+) {2,}\S.*", line).groups()
        path = folders[len(indent) // 2] / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), f"there is no {path.relative_to(ROOT)}"
        folders[len(indent) // 2 + 1 :] = [path]
    rooms = {path.name for path in (ROOT / "cdpo_core").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(re.findall(r"^  (\w+)/", block, re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_picture_is_there(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(document)):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.is_file(), f"{document} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_field_function_and_file_named_exists(document: str) -> None:
    unknown = [name for name in spans(document) if not _known(name)]
    assert not unknown


def _known(name: str) -> bool:
    """Whether a name in the text is a file, a field or a function of ours, or none that this test could know."""
    if "/" in name and name.endswith(FILE_SUFFIXES) and not name.startswith((".cdpo/", ".venv/")):
        return any((root / name).is_file() for root in (ROOT, ROOT / "cdpo_core", ROOT / "docs"))
    if not re.fullmatch(r"\w+(\.\w+)+", name) or name.endswith(FILE_SUFFIXES):
        return True
    first, *_ = parts = name.split(".")
    if first not in ROOMS and first not in ExperimentConfig.model_fields:
        return True
    return _is_field(parts) or _is_function(parts)


def _is_field(parts: list[str]) -> bool:
    model: type[BaseModel] | None = ExperimentConfig
    for part in parts:
        if part.isdigit():
            continue
        if model is None or part not in model.model_fields:
            return False
        kind = model.model_fields[part].annotation
        model = ConstraintConfig if part == "constraints" else kind if _is_model(kind) else None
    return True


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_function(parts: list[str]) -> bool:
    """Whether `room.module.function` or `room.module.Class.method` is defined below cdpo_core."""
    for cut in range(1, len(parts)):
        file = (ROOT / "cdpo_core").joinpath(*parts[:cut]).with_suffix(".py")
        if file.is_file():
            return _defines(ast.parse(file.read_text(encoding="utf-8")), parts[cut:])
    return False


def _defines(node: ast.AST, names: list[str]) -> bool:
    for name in names:
        inside: Mapping[str, ast.AST] = {item.name: item for item in node.body if hasattr(item, "name")}
        if name not in inside:
            return False
        node = inside[name]
    return True


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_says_the_command_that_runs_it(preset: str) -> None:
    header = [line.lstrip("# ") for line in text(f"configs/{preset}.yaml").splitlines() if line.startswith("#")]
    (words,) = [shlex.split(line)[1:] for line in header if line.startswith("cdpo ")]
    tokens, overrides = split_tokens(words)
    assert tokens == ["run", preset]
    load_config(preset, overrides)


def test_the_first_deployment_named_in_the_readme_is_made() -> None:
    written = yaml.safe_load(text("prefect.yaml"))
    assert "experiment-testbed" in [deployment["name"] for deployment in written["deployments"]]
