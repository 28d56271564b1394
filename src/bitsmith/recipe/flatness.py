"""Flatness in a run: what is measured of the float and the trained quantized model, before codes are packed.

`flatness.json` has the figures and the pictures' losses. The measures are in tasks/flatness.py; how they are
drawn is in report/flatness.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from bitsmith.recipe.schema import Flatness
from bitsmith.report.flatness import FIGURES
from bitsmith.tasks import Examples
from bitsmith.tasks.flatness import SPAN, loss_surface, measure_flatness


def measure(
    models: Mapping[str, nn.Module], data: Examples, spec: Flatness, seed: int, *, surfaces: bool = True
) -> dict[str, Any]:
    """The contents of flatness.json, see docs/file-formats.md: of "float", "quantized" (as it was trained)
    and perhaps "uniform", on training rows drawn by ``seed``: the same ones, and the same directions.

    ``surfaces``: with the losses of the pictures, which are points * points passes through the rows.
    Raises DataError where a model has no weight that could move.
    """
    batches = data.drawn(spec.rows, seed)
    found: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        figures = measure_flatness(model, batches, radius=spec.radius)
        found[name] = {key: _known(value) for key, value in figures.items()}
        if surfaces:
            losses = loss_surface(model, batches, span=SPAN, points=spec.points, seed=seed)
            found[name]["surface"] = [[_known(loss) for loss in row] for row in losses.tolist()]
    return {
        "version": 1,
        "data": data.name,
        "unit": data.unit,
        "rows": sum(len(x) for x, _ in batches),
        "seed": seed,
        "radius": spec.radius,
        "span": SPAN,
        "models": found,
    }


def figures(found: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """What metrics.json says: {model: {"loss", "sharpness", "top_eigenvalue"}}."""
    return {name: {key: each[key] for key in FIGURES} for name, each in found["models"].items()}


def _known(value: float) -> float | None:
    """None in place of a figure that is not finite, which JSON cannot say."""
    return value if math.isfinite(value) else None
