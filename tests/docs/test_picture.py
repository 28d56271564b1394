"""The script that draws the README's picture: it finds a browser or says so, and asks for the right part."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.architecture.package import ROOT


@pytest.fixture
def picture() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "picture.py")))


def test_a_page_is_drawn_by_the_browser_that_is_named(
    picture: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = tmp_path / "browser"
    browser.write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in --screenshot=*) echo "$@" > "${a#*=}";; esac; done\n'
    )
    browser.chmod(0o755)
    monkeypatch.setenv("CHROMIUM", str(browser))
    picture.draw(picture.find_browser(), tmp_path / "report.html", tmp_path / "report.png")
    asked = (tmp_path / "report.png").read_text()
    assert "--window-size=1280,1162" in asked
    assert asked.strip().endswith((tmp_path / "report.html").as_uri())


def test_without_a_browser_it_says_what_to_do(
    picture: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    with pytest.raises(SystemExit, match=r"looked for no-such-browser\. Set CHROMIUM=PATH"):
        picture.find_browser()
