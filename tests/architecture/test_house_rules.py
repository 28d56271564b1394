"""House rules a reader relies on: numerics holds no state, the public is explained, a file is a room.

The rules are read off the syntax trees, so they hold for code that no test runs.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.package import PACKAGE, ROOT, name_of, sources, tree

LONGEST_FILE = 400
TABLES = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
MUTATORS = {"add", "append", "clear", "discard", "extend", "insert", "pop", "remove", "setdefault", "update"}


def test_the_rules_see_the_package() -> None:
    assert {name_of(path) for path in sources("numerics")} >= {"numerics/affine.py", "numerics/grid.py"}


@pytest.mark.parametrize("path", sources("numerics"), ids=name_of)
def test_numerics_holds_no_state(path: Path) -> None:
    assert list(states(tree(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "cache = {}",
        "def f():\n    global seen",
        "TABLE = {}\ndef f(x):\n    TABLE[x] = 1",
        "TABLE = {}\ndef f(x):\n    TABLE.update(x)",
        "import functools\n@functools.cache\ndef f(x): ...",
        "class Grid(nn.Module): ...",
        "generator = torch.Generator()",
    ],
)
def test_the_state_rule_sees_state(code: str) -> None:
    assert list(states(ast.parse(code)))


def states(module: ast.Module) -> Iterator[str]:
    """Whatever could carry a value from one call to the next."""
    tables = set()
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            constant = all(name[:1].isupper() or name == "__all__" for name in names)
            if isinstance(node.value, TABLES):
                tables.update(names)
            if isinstance(node.value, (*TABLES, ast.Call)) and not constant:
                yield f"line {node.lineno}: {names} is made at import, and is not a constant"
    for node in ast.walk(module):
        match node:
            case ast.Global():
                yield f"line {node.lineno}: global"
            case ast.ClassDef():
                bases = [ast.unparse(base) for base in node.bases]
                if any(base.endswith(("Module", "Parameter", "Optimizer")) for base in bases):
                    yield f"line {node.lineno}: class {node.name}({', '.join(bases)}) has state"
            case ast.FunctionDef():
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                yield from (
                    f"line {node.lineno}: @{name} remembers" for name in decorators if "cache" in name
                )
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()) if name in tables:
                yield f"line {node.lineno}: writes to {name}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)):
                if name in tables and attr in MUTATORS:
                    yield f"line {node.lineno}: {name}.{attr}"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_a_file_begins_by_saying_what_lives_in_it(path: Path) -> None:
    module = tree(path)
    if module.body:
        assert ast.get_docstring(module) or path.read_text(encoding="utf-8").lstrip().startswith("#")


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_everything_public_has_a_docstring(path: Path) -> None:
    silent = [
        f"line {node.lineno}: {node.name}"
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize(
    "path", [*sources(), *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: path.name
)
def test_a_file_fits_a_reader(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{path.name} has {lines} lines: one room, one purpose"


def test_nobody_prints_below_the_command_line() -> None:
    printing = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources()
        if not path.is_relative_to(PACKAGE / "cli")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []
