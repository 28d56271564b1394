"""Shifts in a run: what is measured of the float and the quantized model, and the two files that hold it.

`shift.json` has every metric at every severity, `shift_pictures.npz` what an image looks like there. Which
shifts there are, and how they are measured, is in tasks/suites.py; how they are drawn in report/shifts.py.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bitsmith.files import write_atomic, write_json
from bitsmith.report.shifts import FILE, PICTURES
from bitsmith.tasks import Examples
from bitsmith.tasks.suites import chosen, figures, measure_shifts, pictures, snippets


def measure(
    models: Mapping[str, nn.Module],
    trained: Mapping[str, nn.Module],
    data: Examples,
    suite: str,
    severities: Sequence[int],
    *,
    over: Sequence[int] = (),
    plain: Mapping[str, Mapping[str, float]] | None = None,
    where: str = "shift.suite",
) -> dict[str, Any]:
    """The contents of shift.json; see docs/file-formats.md.

    ``trained``: whose gradients attacks follow, see `measure_shifts`. ``over``: the severities that figures
    are the mean of, all where none is given. ``plain``: the models' metrics on the test split, where they are
    known. Raises DataError for a suite that these data do not have.
    """
    shifts = chosen(data, suite, where)
    found = measure_shifts(models, data, shifts, severities=severities, trained=trained)
    metric = data.figures[0]
    return {
        "version": 1,
        "suite": suite,
        "data": data.name,
        "unit": data.unit,
        "metric": metric,
        "severities": sorted(set(over or severities)),
        "plain": plain or {name: data.evaluate(m, data.test_x, data.test_y) for name, m in models.items()},
        "figures": {name: figures(found, name, metric, over) for name in models},
        "shifts": found,
        "texts": snippets(data, list(found)),
    }


def accuracies(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What metrics.json says: {model: {shift: its accuracy or mean IoU, ..., "mean": ...}}; {} where nothing
    was measured."""
    if not found["shifts"]:
        return {}
    metric = "mean_iou" if found["metric"] == "mean_iou" else "accuracy"
    return {name: figures(found["shifts"], name, metric, found["severities"]) for name in found["figures"]}


def write(found: Mapping[str, Any], attacked: Mapping[str, nn.Module], data: Examples, out: Path) -> None:
    """Both files into the run directory ``out``; none where nothing was measured."""
    if not found["shifts"]:
        return
    write_json(out / FILE, found)
    arrays = drawn(found, attacked, data)
    if arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(out / PICTURES, buffer.getvalue())


def drawn(
    found: Mapping[str, Any], attacked: Mapping[str, nn.Module], data: Examples
) -> dict[str, np.ndarray]:
    """{shift: images (n, C, H, W) uint8} of what was measured, "plain" among them; {} for other data."""
    images = pictures(data, list(found["shifts"]), attacked)
    return {name or "plain": image.numpy() for name, image in images.items()}
