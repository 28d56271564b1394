"""Where the package lies, and its files as syntax trees: shared by the architecture tests."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "bitsmith"


def sources(folder: str = "") -> list[Path]:
    """All Python files of the package, or of one folder in it."""
    return sorted((PACKAGE / folder).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    """`numerics/grid.py`, as the messages show it."""
    return path.relative_to(PACKAGE).as_posix()
