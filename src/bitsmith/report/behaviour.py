"""How the model came about and how it behaves: training traces, confusion, misread images, shifts.

From `Run` to markup; see outcome.py for what lives where. Confusion and the misread images are of the
quantized model and the test set; long traces are thinned by means of neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from bitsmith.report import contest, page, png, svg, words
from bitsmith.report.metrics import Predictions, Run
from bitsmith.report.shifts import name_of

PHASES = {
    "float": ("Float", "float"),
    "qat": ("Quantization-aware", "quant"),
    "search": ("Search", "acts"),
    "uniform": ("Uniform plan", "uniform"),  # trains beside a search
}
ANSWERS = ("float", "quantized")


def traces(run: Run) -> str:
    """Loss and validation figure of every phase of training."""
    loss = _curves(run, "loss")
    by = words.measure(run)
    valid = _curves(run, f"validation_{by.key}")
    halves = []
    if loss:
        values = [y for one in loss for _, y in one.points]
        wide = min(values) > 0 and max(values) / min(values) > 8
        name = "Training loss" + (", logarithmic" if wide else "")
        plot = svg.lines(loss, lambda y: f"{y:.3g}", _x_label(run), _describe(name, loss, "{:.3g}"), wide)
        halves.append(f'<div class="half"><h3>{name}</h3>{plot}</div>')
    if valid:
        name = f"Validation {by.word}"
        show, form = (svg.show_number, "{:.3g}") if by is words.LOSS else (svg.show_percent, "{:.1%}")
        plot = svg.lines(valid, show, _x_label(run), _describe(name, valid, form))
        halves.append(f'<div class="half"><h3>{name}</h3>{plot}</div>')
    if not halves:
        return ""
    shown = {one.kind: one.label for one in [*loss, *valid]}
    keys = page.legend([(f"b-{kind}", label) for kind, label in shown.items()])
    body = f'<div class="halves">{"".join(halves)}</div>' if len(halves) > 1 else halves[0]
    return page.card("Training", keys + body, wide=True)


def _x_key(run: Run) -> str:
    """Epochs where each entry is one epoch, else optimizer steps."""
    for entries in run.history.values():
        epochs = [entry.get("epoch") for entry in entries]
        if None in epochs or len(set(epochs)) < len(epochs):
            return "step"
    return "epoch"


def _x_label(run: Run) -> str:
    return "epoch" if _x_key(run) == "epoch" else "optimizer steps"


def _curves(run: Run, key: str) -> list[svg.Series]:
    curves = []
    for phase, entries in run.history.items():
        label, kind = PHASES.get(phase, (phase.replace("_", " "), "export"))
        if phase == "qat" and contest.winner(run):
            label = "Search, then its plan"
        x_key = _x_key(run)
        points = [
            (float(entry.get(x_key, index)), float(entry[key]))
            for index, entry in enumerate(entries)
            if isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key])
        ]
        if points:
            curves.append(svg.Series(label, kind, _thin(sorted(points))))
    return curves


def _thin(points: list[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """Means of runs of neighbours, so that a long trace stays readable and the page small."""
    if len(points) <= most:
        return points
    parts = np.array_split(np.asarray(points), most)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _describe(name: str, curves: Iterable[svg.Series], form: str) -> str:
    ends = (
        f"{one.label} from {form.format(one.points[0][1])} to {form.format(one.points[-1][1])}"
        for one in curves
    )
    return f"{name}: " + ", ".join(ends)


def confusion(run: Run) -> str:
    """Which class is taken for which, by the quantized model."""
    found = run.predictions
    if found is None or "quantized" not in found.answers:
        return ""
    size = len(found.classes)
    counts = np.zeros((size, size), dtype=np.int64)
    np.add.at(counts, (found.labels, found.answers["quantized"]), 1)
    wrong = int(counts.sum() - np.trace(counts))
    label = f"Confusion matrix of the quantized model: {wrong} of {len(found.labels)} wrong"
    off = counts - np.diag(np.diag(counts))
    worst = np.unravel_index(int(off.argmax()), off.shape)
    most = (
        f" Most often {found.classes[worst[0]]} is read as {found.classes[worst[1]]} ({off[worst]})."
        if off.max() > 1
        else ""
    )
    return page.card(
        "Confusion",
        svg.heat(counts.tolist(), found.classes, label),
        remark=f"The quantized model misreads {wrong} of {len(found.labels):,} test {words.unit(run)}. "
        f"Rows: the truth; columns: its answer.{most}",
    )


def misread(run: Run) -> str:
    """Misread images as pictures: the truth, float's answer, the quantized model's answer."""
    found = run.predictions
    if found is None or not len(found.images):
        return ""
    items = []
    for position in sorted(range(len(found.images)), key=lambda index: _interest(found, index)):
        image, row = found.images[position], found.image_rows[position]
        truth = int(found.labels[row])
        lines = [f'<span class="true">{page.text(found.classes[truth])}</span>']
        for name in ANSWERS:
            if name in found.answers:
                answer = int(found.answers[name][row])
                state = "right" if answer == truth else "wrong"
                lines.append(f'<span class="{state}">{name} {page.text(found.classes[answer])}</span>')
        alt = f"test image {row}, a {found.classes[truth]}"
        items.append(f'<li><img src="{png.data_uri(image)}" alt="{page.text(alt)}">{"".join(lines)}</li>')
    return page.card(
        "Misread images",
        f'<ul class="gallery">{"".join(items)}</ul>',
        remark=_misread_note(run),
    )


def _interest(found: Predictions, position: int) -> tuple[bool, bool]:
    """Sorts what quantization lost to the front, then what both misread, then what it won."""
    row = found.image_rows[position]
    before, after = (
        name in found.answers and found.answers[name][row] == found.labels[row] for name in ANSWERS
    )
    return not before, after


def _misread_note(run: Run) -> str:
    found = run.predictions
    assert found is not None
    if not {"float", "quantized"} <= found.answers.keys():
        return "Bold: the truth."
    right = {name: found.answers[name] == found.labels for name in ("float", "quantized")}
    lost = int((right["float"] & ~right["quantized"]).sum())
    won = int((~right["float"] & right["quantized"]).sum())
    both = int((~right["float"] & ~right["quantized"]).sum())
    return f"Bold: the truth. Both models misread {both}; quantization lost {lost} and won {won}."


def shift_name(shift: str) -> str:
    """A shift as an axis has room for it: "Shot noise", "PGD transferred", "Art painting"."""
    name = name_of(shift).removeprefix("domain ").replace("_", " ")
    return name[:1].upper() + name[1:]


def shifts(run: Run) -> str:
    """Accuracy or mean IoU on disturbed test images, float against quantized."""
    if words.measure(run) is words.LOSS:  # the shift file has the losses
        return ""
    table: Mapping[str, Mapping[str, float]] = run.metrics.get("shift") or {}
    before, after = table.get("float") or {}, table.get("quantized") or {}
    names = [name for name in (before or after) if name != "mean"]
    if not names:
        return ""
    groups = []
    for name in [*names, *(["mean"] if "mean" in (before or after) and len(names) > 1 else [])]:
        marks = [
            svg.Mark(stage, values[name], kind, words.percent(values[name]))
            for stage, kind, values in (("float", "float", before), ("quantized", "quant", after))
            if name in values
        ]
        groups.append((shift_name(name), marks))
    title = f"{words.measure(run).title} under shift"
    label = f"{title}: " + "; ".join(
        f"{name} {', '.join(f'{mark.label} {mark.text}' for mark in marks)}" for name, marks in groups
    )
    means = [
        float(np.mean([values[name] for name in names])) if all(name in values for name in names) else None
        for values in (before, after)
    ]
    note = f"Test {words.unit(run)} as training did not see them."
    if means[0] is not None and means[1] is not None:
        gap = words.points(means[1] - means[0])
        word = "above" if gap.startswith("+") else "below"
        number = gap.strip("+" + words.MINUS)
        note += (
            f" On average quantized is as {'accurate' if title.startswith('Acc') else 'good'} as float."
            if float(number) == 0
            else f" On average quantized is {number} points {word} float."
        )
    keys = page.legend([("b-float", "Float"), ("b-quant", "Quantized")])
    return page.card(title, keys + svg.bars(groups, 1.0, label), remark=note)
