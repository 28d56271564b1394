"""The project's own files agree with each other."""

import re
import tomllib

import bitsmith
from tests.architecture.package import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of_requirement(requirement: str) -> str:
    return re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-")


def test_every_dependency_has_a_tested_version() -> None:
    pinned = {
        name_of_requirement(line)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    extras = PROJECT["optional-dependencies"].values()
    wanted = {name_of_requirement(one) for group in (PROJECT["dependencies"], *extras) for one in group}
    assert len(wanted) > 10
    assert wanted - pinned == {"bitsmith"}


def test_the_version_is_said_once_more_and_alike() -> None:
    assert bitsmith.__version__ == PROJECT["version"]


def test_the_extra_all_holds_what_a_user_can_install() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    separate = {"all", "dev", "lm-eval"}  # the harness brings some forty packages
    assert set(re.findall(r"\[(.*)\]", everything)[0].split(",")) == set(extras) - separate


def test_continuous_integration_does_what_anybody_can() -> None:
    commands = [
        line
        for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    assert commands[-1] == "exec make test"
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"help", "setup", "demo", "test", "lint", "docs", "bench"} <= set(targets)
