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
    """What a statement or call replaces: the owner's full name and the attribute, "" where nobody can tell."""
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]:
            if isinstance(target, ast.Attribute):
                yield dotted(target.value, modules), target.attr
    elif isinstance(node, ast.Call) and node.args and dotted(node.func, modules)[-1:] != []:
        owner, function = dotted(node.func, modules)[:-1], dotted(node.func, modules)[-1]
        if function not in REPLACING or not {"monkeypatch", "mock", "patch", "unittest"} & set(owner):
            return
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value.split(".")[:-1], first.value.split(".")[-1]
        elif len(node.args) == 1:  # patch.multiple(owner, name=...)
            yield from ((dotted(first, modules), keyword.arg or "") for keyword in node.keywords)
        else:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            yield dotted(first, modules), str(name)


def problems(source: str) -> list[str]:
    """Lines that replace a private name, an attribute of a module of ours, or what cannot be told."""
    tree = ast.parse(source)
    modules, found = imports(tree), []
    for function in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
        for node in ast.walk(function):
            for owner, name in replaced(node, modules):
                own = owner[:1] in (["self"], ["cls"]) and len(owner) == 1
                if not own and (not name or any(map(is_private, [*owner, name])) or (owner and is_module(owner))):
                    label = getattr(function, "name", "")
                    found.append(f"{node.lineno}: {'.'.join([*owner, name])} in {label}")
        if function is tree:
            outside = found
    named = {line.split(":")[0]: line for line in found if not line.endswith(" in ")}
    return [named.get(line.split(":")[0], line) for line in dict.fromkeys(outside)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_nothing_private_is_replaced(path: Path) -> None:
    found = problems(path.read_text(encoding="utf-8"))
    assert not [line for line in found if (path.name, line.rpartition(" in ")[2]) not in EXEMPT]


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
    source = f"import sys\nfrom sinkexport.bench import run\nfrom sinkrt import Session\n\n\ndef test() -> None:\n    {line}\n"
    assert bool(problems(source)) == is_problem
