"""From a YAML file and `--set` arguments to a checked recipe.

Here live the YAML dialect (numbers like 1e-3 are numbers, a key given twice is an error), the overrides, and
the translation of every finding of pydantic into one line of ours. The fields themselves and their ranges
are declared in `schema`, and there mostly by the dataclasses that use them. Unlike Hydra or OmegaConf there
is no interpolation, no search path and no composition: the file a person reads is the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from bitsmith.errors import BitsmithError, RecipeError, listing, nearest
from bitsmith.recipe.composition import deciders
from bitsmith.recipe.methods import check_methods
from bitsmith.recipe.paths import located
from bitsmith.recipe.schema import Recipe, known_keys, normalise, relocated, resolve

DEFAULT = Path(__file__).with_name("default.yaml")


def load_recipe(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe at ``path`` (None: the embedded default) and apply ``"a.b=value"`` overrides.

    Relative paths are meant from the recipe's folder, those of overrides from the current one.
    """
    source = str(path) if path is not None else "the default recipe"
    file = Path(path) if path is not None else DEFAULT
    recipe = located(normalise(read_yaml(file)), file.parent)
    for override in overrides:
        recipe = normalise(apply_override(recipe, override))
    return parse_recipe(recipe, source)


def parse_recipe(document: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Check a recipe given as plain data; ``source`` names it in messages. Raises BitsmithError."""
    try:
        recipe = Recipe.model_validate(resolve(normalise(document)))
    except ValidationError as error:
        raise _translate(error, source) from None
    except BitsmithError as error:
        raise relocated(error, f"{source}, {error.where}") from None
    check_methods(recipe.methods, source)
    searching = deciders({name: options for entry in recipe.methods for name, options in entry.items()})
    if recipe.plan is not None and searching:
        raise RecipeError(
            f"a plan fixes every width, so that {searching[0]} has none left",
            where=f"{source}, plan",
            got=recipe.plan,
            remedy="To train this plan, add --set methods=[]; to have widths decided, leave the plan out",
        )
    if recipe.post_training is not None and searching:
        raise RecipeError(
            f"weights cannot be rounded while {searching[0]} has not decided their widths",
            where=f"{source}, post_training",
            remedy="Leave post_training out; or round what was found: plan: its plan.json, methods: []",
        )
    return recipe


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping. Raises RecipeError with line and column."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = (
            nearest(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else []
        )
        raise RecipeError(
            "there is no such recipe file",
            where=str(path),
            remedy=f"Did you mean {path.parent / beside[0]}?" if beside else "Check the path",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(
            f"this recipe cannot be read ({reason})", where=str(path), remedy="Name a YAML file"
        ) from None
    document = _parse(text, str(path))
    if not isinstance(document, dict):
        raise RecipeError(
            "this recipe is not a mapping",
            where=str(path),
            got="an empty file" if document is None else f"a {type(document).__name__}",
            expected="keys such as model:, data:, quantize:",
            remedy="Start from recipes/digits.yaml",
        )
    return document


def apply_override(document: Mapping[str, Any], override: str) -> dict[str, Any]:
    """``document`` with ``"a.b.0.c=value"`` applied; the value is YAML, numbers index lists.

    A part with dots is quoted, ``quantize.overrides."fc.weight".bits=8``; under ``overrides`` the quotes may
    be left out, because there everything up to the last dot is the glob.
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise RecipeError(
            "this override has no value", where="--set", got=override, remedy="Write --set train.epochs=5"
        )
    parts = [part.strip('"') for part in re.findall(r'"[^"]*"|[^.]+', path.strip())]
    if parts[:2] == ["quantize", "overrides"] and '"' not in path and len(parts) > 4:
        parts = [*parts[:2], ".".join(parts[2:-1]), parts[-1]]
    changed = _copy(document)
    node: Any = changed
    for depth, part in enumerate(parts[:-1]):
        node = _step(node, part, ".".join(parts[: depth + 1]), override)
    if isinstance(node, list):
        node[_index(node, parts[-1], ".".join(parts), override)] = _parse(text, f"--set {path}")
    else:
        node[parts[-1]] = _parse(text, f"--set {path}")
    return changed


def _step(node: Any, part: str, path: str, override: str) -> Any:
    """The container at ``part`` of ``node``; an absent or empty one becomes a mapping."""
    if isinstance(node, list):
        child = node[_index(node, part, path, override)]
    else:
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
    if not isinstance(child, dict | list):
        raise RecipeError(
            f"{path} is a single value and has no parts",
            where=f"--set {override}",
            got=child,
            remedy=f"Set it as a whole: --set {path}=...",
        )
    return child


def _index(node: list[Any], part: str, path: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(
            f"{path} does not exist",
            where=f"--set {override}",
            got=part,
            expected=f"an index 0..{len(node) - 1}" if node else "nothing: the list is empty",
            remedy="Count list entries from 0, or set the whole list",
        )
    return int(part)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its two traps: 1e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", key_node.start_mark
                )
            if isinstance(key, str | int | float):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark is not None else where
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            f"this is not valid YAML ({problem})",
            where=place,
            got=_line(text, mark.line) if mark is not None else None,
            remedy="Mend that line: key: value, indented by spaces",
        ) from None


def _line(text: str, number: int) -> str:
    lines = text.splitlines()
    return _short(lines[number].strip()) if number < len(lines) else "the end of the file"


def _translate(error: ValidationError, source: str) -> RecipeError:
    """The first finding of pydantic as one line of ours; unknown keys go first, as they explain others."""
    findings = sorted(error.errors(), key=lambda finding: finding["type"] not in _UNKNOWN)
    finding = findings[0]
    location = [str(part) for part in finding["loc"]]
    where = f"{source}, {'.'.join(location)}" if location else source
    if finding["type"] in _UNKNOWN:
        unknown_key(location[-1], known_keys(location[:-1]), where)
    near = nearest(
        str(finding["input"]), re.findall(r"'([^']+)'", str(finding.get("ctx", {}).get("expected", ""))), 1
    )
    return RecipeError(
        "this value does not fit" if finding["type"] != "missing" else "this key is missing",
        where=where,
        got=None if finding["type"] == "missing" else _short(finding["input"]),
        expected=_METHOD if location[:1] == ["methods"] else _expected(finding["msg"]),
        remedy=f"Did you mean {near[0]}?" if near else "Correct it in the recipe or by --set",
    )


def _expected(message: str) -> str:
    """pydantic's "Input should be a valid integer, unable to parse ..." as "a valid integer"."""
    if message == "Field required":
        return "a value"
    if "dictionary" in message:
        return "a mapping (key: value)"
    return message.removeprefix("Input should be ").removeprefix("Value error, ").split(", unable")[0]


_METHOD = "a list of methods, each the name of one or {NAME: {OPTION: VALUE}}"
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def unknown_key(key: str, known: Iterable[str], where: str) -> NoReturn:
    """Refuse ``key`` with the nearest known names. Raises RecipeError."""
    known = list(known)
    near = nearest(key, known, 1)
    raise RecipeError(
        "there is no such key",
        where=where,
        got=key,
        expected=f"one of {listing(known)}" if known else "no key here",
        remedy=f"Did you mean {near[0]}?" if near else "Remove it",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
