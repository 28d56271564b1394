"""Suites of shifts: which are measured, and how several models fare under them, side by side.

    figure of a shift = mean of its metric over the severities;  "mean" = mean of the shifts' figures

A suite is "default" (what these data's runs measure), "all" (whatever these data know), "none", the name of a
group ("corruptions", "adversarial", "domains", "text", "covariate"), or names of shifts, separated by commas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitsmith.errors import DataError, listing, nearest
from bitsmith.tasks.adversarial import ATTACKS
from bitsmith.tasks.examples import Examples
from bitsmith.tasks.shifts import CORRUPTIONS, MEASURED, SEVERITIES, Shift, check_severities
from bitsmith.tasks.text import TextData
from bitsmith.tasks.text_shifts import OTHER_PROSE, TEXT_SHIFTS

# group -> (its shifts, as far as they do not depend on the data; which data know them)
SUITES: dict[str, tuple[tuple[str, ...], str]] = {
    "corruptions": (tuple(CORRUPTIONS), "images"),
    "adversarial": (tuple(ATTACKS), "images"),
    "domains": ((), "images with a left-out domain (domains:PATH)"),
    "text": ((*TEXT_SHIFTS, OTHER_PROSE), "text"),
    "covariate": ((), "tables (breast_cancer)"),
}
WHOLE = ("default", "all", "none")


def chosen(data: Examples, suite: str, where: str = "shift") -> tuple[Shift, ...]:
    """The shifts of ``data`` that ``suite`` means, in the data's order. Raises DataError about ``where``."""
    known = data.shifts()
    wanted: set[str] = set()
    for part in (name.strip() for name in suite.split(",")):
        if part == "all":
            wanted |= {shift.name for shift in known}
        elif part == "default":
            wanted |= {s.name for s in known if {s.name, s.suite} & set(data.default_shifts)}
        elif part != "none":
            found = {shift.name for shift in known if part in (shift.name, shift.suite)}
            if not found:
                raise _unknown(part, data, known, where)
            wanted |= found
    return tuple(shift for shift in known if shift.name in wanted)


def _unknown(part: str, data: Examples, known: Sequence[Shift], where: str) -> DataError:
    groups = list(dict.fromkeys(shift.suite for shift in known))
    names = list(dict.fromkeys([*WHOLE, *groups, *(shift.name for shift in known)]))
    for group, (shifts, kind) in SUITES.items():
        if part == group or part in shifts:
            what = "shift" if part in shifts else "suite"
            return DataError(
                f"this {what} is not for these data"
                if kind == data.unit  # a rotation moves pixels away from their labels
                else f"this is a {what} of {kind}",
                where=where,
                got=f"{part} for data {data.name}, which are {data.unit}",
                expected=listing([*WHOLE, *groups]),
            )
    near = nearest(part, names, 1)
    return DataError(
        "there is no such shift",
        where=where,
        got=part,
        expected=listing(names),
        remedy=f"Did you mean {near[0]}?" if near else "",
    )


def measure_shifts(
    models: Mapping[str, nn.Module],
    data: Examples,
    shifts: Sequence[Shift],
    *,
    severities: Sequence[int] = MEASURED,
    seed: int = 0,
    trained: Mapping[str, nn.Module] | None = None,
) -> dict[str, dict[str, Any]]:
    """What each model comes to under each shift and severity: {shift: {"suite": ..., "severities": [1, 3, 5],
    model: [{metric: value} for each severity]}}; a shift that is not graded has severities [] and one entry.

    ``trained``: for a model of that name the one whose gradients attacks follow, where it has none itself; of
    "float" they are also followed by what is transferred, which is left out where there is no such model.
    """
    check_severities(severities, "severities")
    sources = {**models, **(trained or {})}
    result: dict[str, dict[str, Any]] = {}
    for shift in shifts:
        if shift.attacks == "float" and "float" not in sources:
            continue
        entry: dict[str, Any] = {"suite": shift.suite, "severities": list(severities) if shift.graded else []}
        entry |= {name: [] for name in models}
        for severity in severities if shift.graded else (SEVERITIES[0],):
            shared = None if shift.attacks == "own" else shift.rows(severity, seed, sources.get("float"))
            for name, model in models.items():
                rows = shared or shift.rows(severity, seed, sources[name])
                entry[name].append(data.evaluate(model, *rows))
        result[shift.name] = entry
    return result


def figures(
    found: Mapping[str, Mapping[str, Any]], model: str, metric: str = "accuracy", over: Sequence[int] = ()
) -> dict[str, float]:
    """{shift: its figure, ..., "mean": ...} of one model of `measure_shifts`; {} where nothing was measured.

    ``over``: the severities that are averaged, all that were measured where none is given.
    """
    result = {}
    for name, entry in found.items():
        severities = entry["severities"] or [None]
        kept = [
            one[metric]
            for severity, one in zip(severities, entry[model], strict=True)
            if severity is None or not over or severity in over
        ]
        result[name] = sum(kept) / len(kept)
    if result:
        result["mean"] = sum(result.values()) / len(result)
    return result


def pictures(
    data: Examples, names: Sequence[str], attacked: Mapping[str, nn.Module], seed: int = 0
) -> dict[str, Tensor]:
    """{shift: the first test image at each severity (5, C, H, W) uint8, or five images of another domain},
    and "" for the image as it is (1, C, H, W); {} where inputs are no images.

    ``attacked``: the models by the names that `measure_shifts` knows; attacks on "quantized" are shown.
    """
    one = data.limited(1)
    plain = one.inputs(one.test_x)
    if plain.ndim != 4:
        return {}
    found = {"": plain}
    for shift in one.shifts():
        if shift.name not in names:
            continue
        model = attacked.get("quantized" if shift.attacks == "own" else "float")
        if shift.graded:
            found[shift.name] = torch.cat([shift.rows(severity, seed, model)[0] for severity in SEVERITIES])
        else:
            images = shift.rows(SEVERITIES[0], seed, model)[0]
            found[shift.name] = one.inputs(
                images[:: max(1, len(images) // len(SEVERITIES))][: len(SEVERITIES)]
            )
    return {name: (255 * images.clamp(0, 1)).round().byte() for name, images in found.items()}


def snippets(data: Examples, names: Sequence[str], seed: int = 0, length: int = 90) -> dict[str, list[str]]:
    """{shift: the beginning of the test text at each severity, or of other prose (one)}, and "" for the text
    as it is; {} where inputs are no text."""
    if not isinstance(data, TextData):
        return {}
    few = data.limited(4)
    found = {"": [few.test_text()]}
    for shift in few.shifts():
        if shift.name in names:
            rows = (
                shift.rows(severity, seed, None)[0] for severity in SEVERITIES[: 5 if shift.graded else 1]
            )
            found[shift.name] = [few.tokenizer.decode(x.flatten().tolist()) for x in rows]
    return {name: [" ".join(text.split())[:length] for text in texts] for name, texts in found.items()}
