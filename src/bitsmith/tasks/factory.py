"""A user's own ``package.module:factory``, and calls whose arguments come from a recipe.

Importing runs code: only a name that the user typed (a recipe, a flag) may come here, never one that was read
from a run or model directory. What the factory itself raises is passed on unchanged: its traceback is the
user's.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from bitsmith.errors import BitsmithError, nearest

FACTORY_PATTERN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_factory(spec: str, what: str, error: type[BitsmithError]) -> Callable[..., Any]:
    """The callable that ``package.module:factory`` names; the working directory is searched first.

    Raises ``error`` where the form is wrong, or the module or the name in it does not exist.
    """
    if not FACTORY_PATTERN.fullmatch(spec):
        raise error(f"not a {what} factory", where=what, got=repr(spec), expected="package.module:factory")
    module_name, _, name = spec.partition(":")
    module = _import(module_name, spec, what, error)
    if not hasattr(module, name):
        raise error(
            f"module {module_name} has no {name!r}",
            where=f"{what} {spec}",
            remedy=suggestion(name, [n for n in vars(module) if not n.startswith("_")]),
        )
    factory = getattr(module, name)
    if not callable(factory):
        raise error(
            "the factory cannot be called",
            where=f"{what} {spec}",
            got=f"a {type(factory).__name__}",
            expected="a function or class",
        )
    return factory


def _import(module_name: str, spec: str, what: str, error: type[BitsmithError]) -> Any:
    # A console script starts with its own folder on sys.path, not with the one the user stands in.
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ImportError as problem:
        raise error(
            f"module {module_name} cannot be imported ({problem})",
            where=f"{what} {spec}",
            remedy=f"Run from the folder that holds it ({here} was searched), or install it",
        ) from problem
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def call(
    function: Callable[..., Any], arguments: Mapping[str, Any], where: str, error: type[BitsmithError]
) -> Any:
    """``function(**arguments)``; unknown and missing arguments are ``error`` with the nearest names."""
    parameters, open_ended = _parameters(function)
    known = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in arguments:
        if name not in known and not open_ended:
            raise error(f"unknown argument {name!r}", where=where, remedy=suggestion(name, known))
    required = [n for n in known if parameters[n].default is inspect.Parameter.empty]
    missing = [n for n in required if n not in arguments]
    if missing:
        raise error(f"argument {missing[0]!r} is missing", where=where, remedy=f"Give {', '.join(missing)}")
    return function(**arguments)


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` takes a keyword argument of this name."""
    parameters, open_ended = _parameters(function)
    return name in parameters or open_ended


def _parameters(function: Callable[..., Any]) -> tuple[Mapping[str, inspect.Parameter], bool]:
    """(parameters by name, whether it takes any other keyword)."""
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a type written in C says nothing about its arguments
        return {}, True
    return parameters, any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def suggestion(name: str, choices: list[str]) -> str:
    """``"Did you mean 'a' or 'b'?"``, or the whole list where nothing looks alike."""
    close = nearest(name, choices)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Choose one of {', '.join(choices)}" if choices else ""
