"""What counts as another version of a stage's code: what may change its meaning, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import cdpo_core
from cdpo_core.code_version import source_version

LAB = {
    "__init__": "",
    "config": "LIMIT = 1\n",
    "losses": 'def loss(x):\n    """Of x."""\n    # as in the paper\n    return x * 2\n',
    "loop": "from lab.losses import loss\n\n\ndef fit(x):\n    return loss(x)\n",
    "other": "VALUE = 1\n",
    "models/__init__": "",
    "models/tiny": "from ..losses import loss\n",
    "stage": (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from lab.config import LIMIT\n\n\n"
        "def compute():\n    from lab.loop import fit\n\n    return fit(1)\n"
    ),
    "relative": "import lab.models.tiny\n",
}


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    for name, source in LAB.items():
        path = tmp_path / "lab" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "lab"


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("losses.py", "x * 2", "x * 3", True),  # through two imports, one of them inside a function
        ("losses.py", "as in the paper", "as elsewhere", False),
        ("losses.py", '"""Of x."""', '"""Of anything."""', False),
        ("losses.py", '"""Of x."""\n', "\n\n", False),
        ("losses.py", "return x * 2", "return (x  *  2)", False),
        ("loop.py", "loss(x)", "-loss(x)", True),
        ("stage.py", "fit(1)", "fit(2)", True),
        ("config.py", "1", "2", False),  # imported for the type checker only
        ("other.py", "1", "2", False),
        ("__init__.py", "", "X = 1\n", True),  # runs whenever a module of the package is imported
    ],
)
def test_the_code_version_changes_with_the_meaning_only(
    lab: Path, file: str, old: str, new: str, changes: bool
) -> None:
    before = source_version("lab.stage", {"lab": lab})
    text = (lab / file).read_text()
    assert old in text
    (lab / file).write_text(text.replace(old, new, 1) if old else new)
    assert (source_version("lab.stage", {"lab": lab}) != before) is changes


def test_relative_imports_count(lab: Path) -> None:
    before = source_version("lab.relative", {"lab": lab})
    (lab / "losses.py").write_text("def loss(x):\n    return x\n")
    assert source_version("lab.relative", {"lab": lab}) != before


def test_a_module_without_source_has_no_version(lab: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        source_version("lab.absent", {"lab": lab})


def test_an_edited_loss_changes_the_training_stages_and_no_others(tmp_path: Path) -> None:
    copy = shutil.copytree(Path(cdpo_core.__file__).parent, tmp_path / "cdpo_core")
    modules = {
        "cdpo_core.learning.dpo": True,
        "cdpo_core.learning.sft": True,
        "cdpo_core.data.prepare": False,
        "cdpo_core.evaluation.sampling": False,
    }

    def versions() -> dict[str, str]:
        return {module: source_version(module, {"cdpo_core": copy}) for module in modules}

    losses = copy / "learning" / "losses.py"
    source = losses.read_text()
    before = versions()
    losses.write_text(f"# a comment\n{source}")
    assert versions() == before
    assert "delta = beta * (" in source
    losses.write_text(source.replace("delta = beta * (", "delta = 2 * beta * ("))
    after = versions()
    assert {module: after[module] != before[module] for module in modules} == modules
