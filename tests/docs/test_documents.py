"""The documents are true: their Python runs, their links lead somewhere, generated pages are fresh.

The blocks of one page run in order in one namespace, in an empty folder, as a reader would type them.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.architecture.package import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "a_page"}
    for block in BLOCK.finditer(text):
        # Empty lines in front, so that a traceback names the page's own line.
        code = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(code, str(page), "exec"), namespace)


def test_the_pages_that_must_hold_python_do() -> None:
    for page in ("README.md", "docs/tutorial.md", "docs/add-a-method.md"):
        assert BLOCK.search((ROOT / page).read_text(encoding="utf-8")), f"{page} has no Python block"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path, anchor in LINK.findall(text):
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{path} is not there"
        if anchor and goal.suffix == ".md":
            assert anchor[1:] in anchors(goal), f"{path}{anchor} is no heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_tells_to_type_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"(?:^    |`)(?:\S+=\S+ )?make ([a-z]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"
    for file in re.findall(r"\b(?:recipes|tests|src)/[a-z0-9_/]+\.(?:yaml|py)\b", text):
        assert (ROOT / file).exists(), file


def test_every_paper_is_found_by_its_name() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for paper in ("CO-QAT", "FraQAT", "ZeroQAT", "LoaQ", "FQAT"):
        assert paper in index


def test_generated_pages_are_fresh() -> None:
    path = ROOT / "docs/generate.py"
    generator = {"__name__": "generate", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), generator)
    pages = SimpleNamespace(**generator).pages()
    assert pages.keys() >= {"recipe.md", "targets.md"}
    for page, text in pages.items():
        assert (ROOT / "docs" / page).read_text(encoding="utf-8") == text, f"docs/{page} is stale: make docs"
