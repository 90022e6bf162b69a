"""Habits of the tests themselves: nothing private is replaced, so that code may change inside."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
OURS = ("sinkexport", "sinkrt", "plugins")
REPLACING = ("setattr", "delattr", "patch", "object", "multiple", "dict")
"""Last names of functions that replace an attribute: monkeypatch's and those of unittest.mock."""
EXEMPT = {("support.py", "read_operators_once")}
"""Functions that may: this one has its reason in its docstring."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.expr, modules: dict[str, str]) -> list[str]:
    """`a.b.c` as ["a", "b", "c"], with the first name as it was imported; [] for what is no chain of names."""
    if isinstance(node, ast.Name):
        return modules.get(node.id, node.id).split(".")
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, modules)
        return [*before, node.attr] if before else [node.attr]
    return []


def imports(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> full name, wherever it is imported."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def is_module(name: list[str]) -> bool:
    try:
        return name[0] in OURS and importlib.util.find_spec(".".join(name)) is not None
    except ModuleNotFoundError:  # a class has no submodules
        return False


def replaced(node: ast.AST, modules: dict[str, str]) -> Iterator[tuple[list[str], str]]:
    """What a statement or a call replaces: the owner's full name and the attribute. A call's unknown owner is []."""
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in (part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])):
            if isinstance(target, ast.Attribute):
                yield dotted(target.value, modules) or ["?"], target.attr
    elif isinstance(node, ast.Call) and node.args:
        *owner, function = dotted(node.func, modules) or [""]
        if function not in REPLACING or not {"monkeypatch", "mock", "patch", "unittest"} & set(owner):
            return
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            *where, name = first.value.split(".")
            yield where, name
        else:
            second = node.args[1] if len(node.args) > 1 else None
            yield dotted(first, modules), str(second.value) if isinstance(second, ast.Constant) else ""


def problems(source: str) -> list[tuple[str, str]]:
    """Places that replace a private name, an attribute of a module of ours, or what cannot be seen: function, name."""
    tree = ast.parse(source)
    modules = imports(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = []
    for node in ast.walk(tree):
        for owner, name in replaced(node, modules):
            is_own = owner[:1] in (["self"], ["cls"])
            if not owner or is_module(owner) or (not is_own and any(map(is_private, [*owner, name]))):
                inside = [f.name for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                found.append((inside[0] if inside else "", ".".join([*owner, name])))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_private_is_replaced(path: Path) -> None:
    found = problems(path.read_text(encoding="utf-8"))
    assert not [place for place in found if (path.name, place[0]) not in EXEMPT]


@pytest.mark.parametrize(
    ("line", "is_problem"),
    [
        ("monkeypatch.setattr(Session, 'step', f)", False),
        ("monkeypatch.setattr(sys, 'argv', [])", False),
        ("monkeypatch.setattr(served.session, 'step', f)", False),
        ("mock.patch.multiple(sys, argv=[])", False),
        ("self._x = 1", False),
        ("a.b = 1", False),
        ("monkeypatch.setattr(Session, '_step', f)", True),
        ("monkeypatch.setattr(served.server._scheduler, 'step', f)", True),
        ("monkeypatch.setattr(run, 'ReadProbe', f)", True),
        ("monkeypatch.setattr('sinkexport.bench.run.ReadProbe', f)", True),
        ("monkeypatch.setattr(f'sinkexport.bench.run.{name}', f)", True),
        ("mock.patch('sinkexport.bench.run.ReadProbe')", True),
        ("session._backend = 1", True),
        ("a, b._c = 1, 2", True),
        ("run.TURN = 1", True),
    ],
)
def test_what_is_found(line: str, is_problem: bool) -> None:
    imported = "import sys\nfrom sinkexport.bench import run\nfrom sinkrt import Session\n"
    assert bool(problems(f"{imported}def test() -> None:\n    {line}\n")) == is_problem
