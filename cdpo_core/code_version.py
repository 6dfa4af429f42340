"""Which code computes a stage: a hash that changes when its meaning may have changed.

It covers the syntax trees of the stage's module and of every module of the same package, or of
cdpo_core, that it imports, transitively: an edited loss computes everything behind it again, an
edited comment or docstring does not, nor one of the modules that only word errors (MESSAGES).
Modules are found as files and parsed, never imported, so that a key can be had without loading torch.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path

MESSAGES = frozenset({"cdpo_core.errors"})
"""Modules that hold exceptions and their wording, and nothing that a stage's artifact could hold."""


@cache
def code_version(module: str) -> str:
    """Hash of the syntax trees of a module and of every cdpo_core module it imports, transitively.

    Comments and docstrings do not count; imports under TYPE_CHECKING do not count.
    """
    packages = {module.split(".")[0], "cdpo_core"}
    return source_version(module, {name: _location(name) for name in packages})


def source_version(module: str, packages: dict[str, Path]) -> str:
    """Hash of the syntax trees reachable from a module within the given packages.

    Args:
        module: dotted name of the stage's module.
        packages: top-level name -> its folder, or its file for a single module.

    Raises:
        ModuleNotFoundError: the module is in none of the packages.
    """
    if _source_file(module, packages) is None:
        raise ModuleNotFoundError(f"the source of {module} is not at hand, so its code has no version")
    trees: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        file = _source_file(name, packages)
        if name in trees or file is None or name in MESSAGES:
            continue
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        trees[name], imports = _parsed(file.read_text(encoding="utf-8"), package)
        pending.extend(imports)
        # Importing a module runs its parents' __init__ too.
        pending.append(name.rpartition(".")[0])
    return hashlib.sha256(json.dumps(sorted(trees.items())).encode()).hexdigest()


@cache
def _parsed(source: str, package: str) -> tuple[str, tuple[str, ...]]:
    tree = _Bare().visit(ast.parse(source))
    return ast.dump(tree), tuple(_imports(tree, package))


class _Bare(ast.NodeTransformer):
    """Drops what has no effect at run time: docstrings and what only the type checker reads."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        name = getattr(node.test, "id", getattr(node.test, "attr", ""))
        self.generic_visit(node)
        return node.orelse if name == "TYPE_CHECKING" else node


def _imports(tree: ast.AST, package: str) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _source_file(name: str, packages: dict[str, Path]) -> Path | None:
    top, *rest = name.split(".")
    root = packages.get(top)
    if root is None:
        return None
    if root.suffix == ".py":
        return None if rest else root
    base = root.joinpath(*rest)
    return next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)


def _location(package: str) -> Path:
    loaded = sys.modules.get(package)
    file = getattr(loaded, "__file__", None)
    if file is None:
        spec = find_spec(package)
        file = spec.origin if spec else None
    if file is None:
        raise ModuleNotFoundError(f"the source of {package} is not at hand, so its code has no version")
    path = Path(file)
    return path.parent if path.name == "__init__.py" else path
