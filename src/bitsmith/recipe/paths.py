"""Where the files lie that a recipe names: data, weights, target, plan and cost tables.

A relative path in a recipe's file is meant from that file's folder, so that a recipe and its files move
together; one that `--set` gives is meant from the current directory, as everything typed there. A saved
recipe holds whole paths, as its folder is another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DATA = ("npz:", "folder:", "domains:", "masks:", "text:")
HUB = "hf:"  # a folder where there is one of that name; else a name on a hub
KEYS = ("pretrained", "plan")  # always a path; a target or a table is one where it ends in .json


def located(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``document``, its shorthands written out, with relative paths taken from ``folder``."""
    return _with_paths(document, lambda path: str(folder / path))


def whole(document: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with whole paths, the same from wherever they are read."""
    return _with_paths(document, _whole)


def _whole(path: str) -> str:
    # A file keeps its own name, also where it is a link: data are called after it.
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def _with_paths(document: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """``document`` with its paths changed. Values that are not what they should be are left to the checks."""

    def path(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    def file(value: Any) -> Any:
        return path(value) if isinstance(value, str) and value.endswith(".json") else value

    def table(entry: Any) -> Any:
        return {**entry, "table": file(entry["table"])} if _has(entry, "table") else entry

    def options(given: Any) -> Any:
        if not _has(given, "budget") or not _has(given["budget"], "tables"):
            return given
        tables = given["budget"]["tables"]
        if not isinstance(tables, list | tuple):
            return given
        return {**given, "budget": {**given["budget"], "tables": [table(entry) for entry in tables]}}

    def hub(value: Any) -> Any:
        if not (isinstance(value, str) and value.startswith(HUB)):
            return value
        place = change(value.removeprefix(HUB))
        return f"{HUB}{place}" if os.path.isdir(place) else value

    def named(section: Mapping[str, Any]) -> dict[str, Any]:
        given = section.get("arguments")
        if isinstance(given, Mapping) and "tokenizer" in given:
            section = {**section, "arguments": {**given, "tokenizer": hub(given["tokenizer"])}}
        return {**section, "name": hub(section["name"])}

    found = dict(document)
    for key in KEYS:
        if key in found:
            found[key] = path(found[key])
    if "target" in found:
        found["target"] = file(found["target"])
    if _has(found.get("data"), "name") and str(found["data"]["name"]).startswith(DATA):
        loader, _, where = found["data"]["name"].partition(":")
        found["data"] = {**found["data"], "name": f"{loader}:{path(where)}"}
    found |= {key: named(found[key]) for key in ("model", "data") if _has(found.get(key), "name")}
    if isinstance(found.get("methods"), list):
        found["methods"] = [
            {name: options(given) for name, given in entry.items()} if isinstance(entry, Mapping) else entry
            for entry in found["methods"]
        ]
    return found


def _has(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and key in value
