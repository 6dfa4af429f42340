"""What holds for the project as a whole: layers, sizes, docstrings, no pickle, no personal paths, pins."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cdpo_core.config_loading import preset_names

ROOT = Path(__file__).parent.parent
PACKAGES = ("cdpo_core", "tasks", "flows", "deployments")
BELOW = {
    "cdpo_core": set(),
    "tasks": {"cdpo_core"},
    "flows": {"cdpo_core", "tasks"},
    "deployments": {"cdpo_core", "tasks", "flows"},
}
CORE_MAY_IMPORT = {
    "torch", "transformers", "tokenizers", "safetensors", "pydantic", "pydantic_core", "numpy", "scipy", "pandas",
    "pyarrow", "yaml",
}  # fmt: skip
# Slow to import, or needed by few: inside the function that uses them. The hub's client comes with transformers.
CORE_MAY_IMPORT_WHERE_USED = {"accelerate", "peft", "datasets", "datasketch", "matplotlib", "huggingface_hub"}
ORCHESTRATION = ("prefect", "mlflow", "boto3", "botocore", "tasks", "flows", "deployments")
MOST_FILE_LINES, MOST_FUNCTION_LINES = 400, 60
PICKLE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}
PICKLING_NAMES = {
    "torch.load", "torch.save", "weights_only", "allow_pickle", "to_pickle", "read_pickle", "save_state", "load_state",
}  # fmt: skip
PERSONAL_PATH = re.compile(r"(?<![\w.])(/home/|/Users/|/root\b|/work\b|/tmp/|/mnt/|/media/|[A-Z]:\\)")
MARKDOWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/method.md", "docs/LOG.md")


def sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def short(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(node: ast.AST, package: str, *, late: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported when first used and not with its module) of every import that runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield resolve_name("." * child.level + (child.module or ""), package) if child.level else child.module, late
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from imports(other, package, late=late)
        else:
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(child, package, late=inside)


def imported(file: Path) -> list[tuple[str, bool]]:
    package = ".".join(file.relative_to(ROOT).parent.parts)
    return [(name.split(".")[0], late) for name, late in imports(tree(file), package)]


def test_arrows_point_downward_only() -> None:
    upward = [
        f"{short(file)} imports {name}"
        for file in sources(*PACKAGES)
        for name in sorted({name for name, _ in imported(file)} & {*PACKAGES, "benchmarks", "tests"})
        if name not in BELOW[file.relative_to(ROOT).parts[0]] | {file.relative_to(ROOT).parts[0]}
    ]
    assert not upward


def test_the_core_imports_only_what_the_method_needs() -> None:
    allowed = CORE_MAY_IMPORT | CORE_MAY_IMPORT_WHERE_USED | set(sys.stdlib_module_names) | {"cdpo_core"}
    found = [(short(file), name, late) for file in sources("cdpo_core") for name, late in imported(file)]
    assert not [f"{file} imports {name}" for file, name, _ in found if name not in allowed]
    early = [f"{file}: {name}" for file, name, late in found if name in CORE_MAY_IMPORT_WHERE_USED and not late]
    assert not early, "import these inside the function that uses them"


ALONE = """
import importlib, pkgutil, sys
for name in sys.argv[2:]:
    sys.modules[name] = None  # importing it now fails
import cdpo_core
for module in pkgutil.walk_packages(cdpo_core.__path__, "cdpo_core."):
    importlib.import_module(module.name)
from pathlib import Path
from cdpo_core import pipeline
from cdpo_core.config_loading import load_config
from cdpo_core.local_store import LocalStore
from cdpo_core.stages import Runtime, compute_stage, pick, resolve
folder = Path(sys.argv[1])
store = LocalStore(folder / "store")
slice_ = pick(load_config("tiny"), pipeline.TESTBED_DATA.fields)
done = compute_stage(pipeline.TESTBED_DATA, slice_, {}, store, Runtime(threads=1), folder / "scratch")
print(sorted(path.name for path in resolve(done.ref, store).iterdir()))
"""


def test_the_core_runs_alone(tmp_path: Path) -> None:
    """Every module imports, and a stage runs, where Prefect, MLflow, S3 and our own upper layers are missing."""
    command = [sys.executable, "-c", ALONE, str(tmp_path), *ORCHESTRATION]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "preferences.parquet" in done.stdout


def test_files_and_functions_stay_small() -> None:
    large = []
    for file in sources(*PACKAGES, "tests", "benchmarks"):
        lines = len(file.read_text(encoding="utf-8").splitlines())
        large += [f"{short(file)}: {lines} lines"] if lines > MOST_FILE_LINES else []
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                large += [f"{short(file)}: {node.name}, {lines} lines"] if lines > MOST_FUNCTION_LINES else []
    assert not large


def test_what_is_public_is_described() -> None:
    silent = []
    for file in sources(*PACKAGES):
        module = tree(file)
        if module.body and not ast.get_docstring(module):
            silent.append(short(file))
        public = list(_public(module.body))
        described = {name for name, node in public if ast.get_docstring(node)}
        # A method may leave it to the class it stands in for, in the same file.
        methods = {name.rpartition(".")[2] for name in described if "." in name}
        left = [name for name, _ in public if name not in described and name.rpartition(".")[2] not in methods]
        silent += [f"{short(file)}: {name}" for name in left]
    assert not silent, "these have no docstring"


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


def test_nothing_is_pickled() -> None:
    """Reading a pickle runs whatever it says: tensors are safetensors, tables parquet, records JSON."""
    found = []
    for file in sources(*PACKAGES, "benchmarks"):
        found += [f"{short(file)}: {name}" for name, _ in imported(file) if name in PICKLE]
        for node in ast.walk(tree(file)):
            names = {node.attr, ast.unparse(node)} if isinstance(node, ast.Attribute) else set()
            names |= {node.arg} if isinstance(node, ast.keyword) else set()
            found += [f"{short(file)}, line {node.lineno}: {name}" for name in names & PICKLING_NAMES]
    assert not found


@pytest.mark.parametrize(
    "file",
    [
        "prefect.yaml", "pyproject.toml", "constraints.txt", "Makefile", ".pre-commit-config.yaml", ".ci/run",
        *(f"configs/{name}.yaml" for name in preset_names()), *MARKDOWN,
    ],
)  # fmt: skip
def test_no_path_of_anyone_s_machine_is_shipped(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not PERSONAL_PATH.findall(text)


def test_every_direct_requirement_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {}
    for pin in (Requirement(line) for line in lines if line):
        (exact,) = pin.specifier
        assert exact.operator == "==", f"{pin} is no exact pin"
        assert exact.version.count("*") == 0
        pins[canonicalize_name(pin.name)] = exact.version
    wrong = []
    for requirement in (Requirement(line) for group in groups for line in group):
        version = pins.get(canonicalize_name(requirement.name))
        if not version or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement}: pinned {version or 'nowhere'}")
    assert not wrong


def test_deployments_in_the_file_have_no_code_to_pull() -> None:
    """Prefect bakes the deployer's own folder in unless `pull` is given; workers have the project installed."""
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    assert written["pull"] == []
    for deployment in written["deployments"]:
        assert "pull" not in deployment
        assert re.fullmatch(r"flows\.\w+\.\w+", deployment["entrypoint"])
