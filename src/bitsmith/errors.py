"""Every error that Bitsmith raises on purpose.

    BitsmithError
      RecipeError         a recipe or command-line value
      SchemeError         a quantization scheme: bits, grid, granularity, group size
      SiteError           a site: a glob that matches nothing, a quantizer that is never called
      TargetError         a runtime cannot hold what was asked for
      BudgetError         a budget that no plan satisfies
      DataError           arrays, labels, folders of images
      FormatError         a file: missing, truncated, corrupted, foreign, of another version
      MissingExtra        an optional dependency is not installed
      RunError            a run directory is in use, or its disk is full
      Interrupted         a signal ended the work; it was saved
      TrainingDiverged    a loss or an output is not finite
      ExportMismatch      an exported file does not compute what was trained

A message is one line in a fixed order (where, what, got, expected, do this); the five parts are attributes,
so that a program need not parse the text. `exit_code` is 2 where the user's input is wrong and 1 where the
work failed.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any


class BitsmithError(Exception):
    """Base of all our errors: ``"{where}: {what}; got {got}, expected {expected}. {remedy}"``."""

    exit_code = 2

    def __init__(
        self, what: str, *, where: str = "", got: Any = None, expected: Any = None, remedy: str = ""
    ) -> None:
        self.where, self.what, self.got, self.expected, self.remedy = where, what, got, expected, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        facts = []
        if self.got is not None:
            facts.append(f"got {self.got if isinstance(self.got, str) else repr(self.got)}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if facts:
            text += "; " + ", ".join(facts)
        if self.remedy:
            text += f". {self.remedy}"
        return " ".join((text if text.endswith((".", "?")) else text + ".").split())

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments: the default pickling of exceptions would lose them.
        return _rebuild, (type(self), self.what, self.where, self.got, self.expected, self.remedy)


def _rebuild(kind: type[BitsmithError], what: str, where: str, got: Any, expected: Any, remedy: str) -> Any:
    return kind(what, where=where, got=got, expected=expected, remedy=remedy)


class RecipeError(BitsmithError):
    """A recipe or a command-line value is wrong."""


class SchemeError(BitsmithError):
    """A quantization scheme is impossible, or does not fit the tensor."""


class SiteError(BitsmithError):
    """A site does not exist, or its quantizer is never called."""


class TargetError(BitsmithError):
    """The target runtime cannot hold what was asked for."""


class BudgetError(BitsmithError):
    """No plan satisfies the budget."""


class DataError(BitsmithError):
    """The data cannot be used."""


class FormatError(BitsmithError):
    """A file is missing, truncated, corrupted, foreign, or of another version."""


class MissingExtra(BitsmithError):
    """An optional dependency is not installed."""

    def __init__(self, extra: str, package: str, purpose: str = "") -> None:
        self.extra, self.package, self.purpose = extra, package, purpose
        super().__init__(
            f"{purpose or 'this'} needs the package {package}, which is not installed",
            where=f"extra {extra}",
            remedy=f"Run: pip install 'bitsmith[{extra}]'",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.extra, self.package, self.purpose)


class RunError(BitsmithError):
    """The run directory cannot be used, or the machine gave out (disk full)."""

    exit_code = 1


class Interrupted(BitsmithError):
    """A signal ended the work after everything was saved."""

    exit_code = 130


class TrainingDiverged(BitsmithError):
    """A loss or an output is not finite."""

    exit_code = 1


class ExportMismatch(BitsmithError):
    """An exported file does not compute what was trained."""

    exit_code = 1


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The up to ``count`` choices that look most like ``name``, for messages."""
    return difflib.get_close_matches(name, list(choices), n=count, cutoff=0.3)


def listing(choices: Iterable[str]) -> str:
    """``"a, b or c"``."""
    items = [str(c) for c in choices]
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" or {items[-1]}"


def check_choice(where: str, value: Any, choices: Sequence[str]) -> None:
    """Raise SchemeError with the nearest name unless ``value`` is one of ``choices``."""
    if value not in choices:
        near = nearest(str(value), choices, 1)
        raise SchemeError(
            f"no such {where.rpartition('.')[2]}",
            where=where,
            got=value,
            expected=listing(choices),
            remedy=f"Did you mean {near[0]}?" if near else "",
        )


def check_value(where: str, value: Any, holds: bool, expected: str) -> None:
    """Raise SchemeError unless ``holds``; ``expected`` says of what kind a good value is."""
    if not holds:
        raise SchemeError("this value is out of range", where=where, got=value, expected=expected)


def matching(where: str, patterns: Sequence[str], names: Iterable[str], what: str) -> list[str]:
    """The names that match one of the globs, in their order; SiteError for a glob that matches none.

    ``what`` is a name in words: "site", "Linear layer".
    """
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            close = nearest(pattern, names) or names[:3]
            raise SiteError(
                f"this pattern matches no {what}",
                where=f"{where}: {pattern}",
                remedy=f"The nearest are {', '.join(close)}",
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
