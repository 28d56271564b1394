"""Figures and sentences: how the report writes an accuracy, a size, a factor, and its headline.

Pure functions from numbers to strings, without markup. A narrow no-break space stands between a number and
its unit, and the minus is a minus, so that figures keep together and line up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bitsmith.report.certificate import runtime_title
from bitsmith.report.metrics import FLOAT_BITS, Layer, Run

SPACE = "\u202f"  # narrow no-break space
MINUS = "\u2212"
TIMES = "\u00d7"
DASH = "\u2013"
SIZES = ("B", "kB", "MB", "GB", "TB")
COUNTS = ("", "k", "M", "G", "T", "P")


def percent(fraction: float | None, decimals: int = 1) -> str:
    """0.9775 -> "97.8 %"."""
    return DASH if fraction is None else f"{100 * fraction:.{decimals}f}{SPACE}%"


def small_percent(fraction: float | None) -> str:
    """A share with two or three significant digits: 0.0312 -> "3.1 %", 0.00042 -> "0.042 %"."""
    if fraction is None:
        return DASH
    value = 100 * fraction
    if value == 0 or value >= 99.95:
        return f"{value:.0f}{SPACE}%"
    return f"{value:.1f}{SPACE}%" if value >= 1 else f"{value:.2g}{SPACE}%"


def points(difference: float | None, decimals: int = 1) -> str:
    """A signed difference of accuracies in percentage points, without the unit: -0.0031 -> "−0.3"."""
    if difference is None:
        return DASH
    text = f"{abs(100 * difference):.{decimals}f}"
    if float(text) == 0:
        return text
    return ("+" if difference > 0 else MINUS) + text


def size(count: float | None) -> str:
    """Bytes in decimal units, as file managers and data sheets count: 4123 -> "4.12 kB"."""
    return DASH if count is None else _scaled(count, SIZES)


def count(value: float | None) -> str:
    """A large count: 12345678 -> "12.3 M"."""
    return DASH if value is None else _scaled(value, COUNTS)


def tick(amount: str) -> str:
    """An amount as a tick of an axis has it, without useless zeros: "2.00 M" -> "2 M"."""
    return re.sub(rf"\.0+(?={SPACE}|$)", "", amount)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three digits, so that a limit and what is used of it can be told apart, on every part of the page."""
    index = 0
    while value >= 999.5 and index < len(units) - 1:
        value /= 1000
        index += 1
    return f"{_three_digits(value) if index else f'{value:.0f}'}{SPACE}{units[index]}".rstrip(SPACE)


def factor(larger: float | None, smaller: float | None) -> str:
    """How many times less: 31.2 -> "31×", 7.31 -> "7.3×"."""
    if not larger or not smaller:
        return DASH
    ratio = larger / smaller
    return f"{ratio:.0f}{TIMES}" if ratio >= 9.95 else f"{ratio:.1f}{TIMES}"


def bits(value: float | None) -> str:
    """Bits of an operand: "4", "2.5", "float", or a dash where it has none."""
    if value is None:
        return DASH
    return "float" if value >= FLOAT_BITS else f"{value:.2f}".rstrip("0").rstrip(".")


def widths(value: Any) -> str:
    """A bit-width as plans write it: "4", or of a list with one for each channel "2-8, 3.4 on average"."""
    if not isinstance(value, list | tuple):
        return bits(value)
    mean = sum(value) / len(value)
    return f"{bits(min(value))}-{bits(max(value))}, {bits(round(mean, 1))} on average"


def seconds(value: float | None) -> str:
    """A duration: 0.41 -> "410 ms", 29.4 -> "29.4 s", 754 -> "12 min 34 s"."""
    if value is None:
        return DASH
    if value < 1:
        return f"{1000 * value:.0f}{SPACE}ms"
    if value < 99.95:
        return f"{value:.1f}{SPACE}s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60}{SPACE}min"


def decimals(run: Run) -> int:
    """Digits after the point that the test set can carry: one image of 2,000 is 0.05 points."""
    return 2 if (run.test_images or 0) >= 2000 else 1


def listing(items: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    known = list(items)
    return ", ".join(known[:-1]) + " and " + known[-1] if len(known) > 1 else "".join(known)


@dataclass(frozen=True)
class Measure:
    """The metric that a run is judged by, and how it is written. show, gap: (value, decimals) -> text."""

    key: str
    title: str
    plural: str
    unit: str  # of a difference
    lower_is_better: bool
    show: Callable[[float | None, int], str]
    gap: Callable[[float | None, int], str]

    @property
    def word(self) -> str:
        """The title inside a sentence: "accuracy", "mean IoU"."""
        return self.title[0].lower() + self.title[1:]


def nats(loss: float | None, decimals: int = 3) -> str:
    """A loss per token: "1.284 nats"."""
    return DASH if loss is None else f"{loss:.3f}{SPACE}nats"


def signed(difference: float | None, decimals: int = 3) -> str:
    """A signed difference of losses, without the unit: -0.0031 -> "−0.003"."""
    return points(None if difference is None else difference / 100, 3)


ACCURACY = Measure("accuracy", "Accuracy", "Accuracies", "point", False, percent, points)
LOSS = Measure("loss", "Loss", "Losses", "nat", True, nats, signed)
MEAN_IOU = Measure("mean_iou", "Mean IoU", "Mean IoUs", "point", False, percent, points)
BY_TASK = {"language": LOSS, "segmentation": MEAN_IOU}


def measure(run: Run) -> Measure:
    """Accuracy of images, mean IoU of masks, loss of text."""
    return BY_TASK.get(str(run.metrics.get("task")), ACCURACY)


def share(found: Mapping[str, Any]) -> Measure:
    """The measure of a sweep or of sensitivities that is a share of 1: mean IoU of masks, else accuracy."""
    return MEAN_IOU if found.get("task") == "segmentation" else ACCURACY


def common_share(runs: Iterable[Run]) -> Measure:
    """The same of several runs: what all of them have."""
    return MEAN_IOU if all(measure(run) is MEAN_IOU for run in runs) else ACCURACY


def unit(run: Run) -> str:
    """What the data are rows of, in the plural."""
    return {"language": "sequences", "tabular": "rows"}.get(str(run.metrics.get("task")), "images")


def result(run: Run, stage: str) -> str:
    """What a stage came to, in the run's own measure: "97.8 %", "1.284 nats"."""
    by = measure(run)
    return by.show(run.figure(stage, by.key), decimals(run))


def change(run: Run, stage: str, since: str = "float") -> str:
    """The signed difference of two stages in the run's own measure, without the unit."""
    by = measure(run)
    now, before = run.figure(stage, by.key), run.figure(since, by.key)
    return by.gap(None if now is None or before is None else now - before, decimals(run))


def perplexity(value: float | None) -> str:
    """At least three digits: 3.60, 27.4, 12345, 1.2e+05."""
    if value is None:
        return DASH
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"


def headline(run: Run) -> tuple[str, str]:
    """What came out, as a short title and one sentence: ("97.8 % in 4.12 kB", "7.3× smaller, …")."""
    title = result(run, "quantized")
    if measure(run) is MEAN_IOU:
        title = f"Mean IoU {title}"
    if measure(run) is LOSS:
        title = f"Perplexity {perplexity(run.figure('quantized', 'perplexity'))}"
    if run.cost("weight_bytes") is not None:
        title += f" in {size(run.cost('weight_bytes'))}"
    parts = []
    if run.cost("weight_bytes") and run.cost("weight_bytes_float"):
        parts.append(f"{factor(run.cost('weight_bytes_float'), run.cost('weight_bytes'))} smaller")
    if run.cost("bops") and run.cost("bops_float"):
        parts.append(f"{factor(run.cost('bops_float'), run.cost('bops'))} fewer bit operations")
    sentence = ", ".join(parts) + " than float; " if parts else ""
    sentence += f"{against_float(run)}; {verdict(run)}."
    return title, sentence[0].upper() + sentence[1:]


def against_float(run: Run) -> str:
    """ "0.3 points below float", "as accurate as float"; of losses "0.012 nats above float"."""
    by, text = measure(run), change(run, "quantized")
    number = text.strip("+" + MINUS)
    if text == DASH or float(number) == 0:
        return "as accurate as float" if by is ACCURACY else "as good as float"
    unit = by.unit if float(number) == 1 else f"{by.unit}s"
    return f"{number} {unit} {'below' if text.startswith(MINUS) else 'above'} float"


def verdict(run: Run) -> str:
    """ "verified in ONNX Runtime"; our own reader is named only where no other runtime was asked."""
    passed = runtimes(run)
    failed = [entry.runtime_name for entry in run.certified if entry.passed is False]
    if failed:
        return f"verification failed in {listing(failed)}"
    return f"verified in {listing(passed)}" if passed else "not verified"


def runtimes(run: Run, version: bool = False) -> list[str]:
    """Where the exported files were verified, other people's runtimes before our own."""
    names = {
        entry.runtime_name: entry.runtime if version else entry.runtime_name
        for entry in run.certified
        if entry.passed
    }
    foreign = [shown for name, shown in names.items() if name != "Bitsmith"]
    return foreign or list(names.values())


def asked(run: Run) -> str:
    """What was asked, in words: model, data, widths, budget, target, as far as the run directory knows."""
    parts = []
    model, data = run.metrics.get("model"), run.metrics.get("data")
    if model:
        parts.append(f"{model} on {data}" if data else str(model))
    weights, activations = (usual_bits(run.layers, operand) for operand in ("weight_bits", "activation_bits"))
    if weights or activations:
        parts.append(", ".join(text for text in (weights, activations) if text))
    if run.budgets:
        parts.append(f"budget {listing(budget_limit(budget) for budget in run.budgets)}")
    if run.plan.get("target"):
        target = run.plan["target"]
        name = str(target.get("name", "a custom target") if isinstance(target, dict) else target)
        parts.append(f"for {runtime_title(name)}" if name != "native" else "for Bitsmith's own format")
    return " · ".join(parts)


def usual_bits(layers: tuple[Layer, ...], operand: str) -> str:
    """ "2-bit weights (2 layers at 8)", from the widths of all layers."""
    known = [
        value
        for layer in layers
        if not (operand == "weight_bits" and layer.is_product)
        and (value := getattr(layer, operand)) is not None
    ]
    if not known:
        return ""
    name = "weights" if operand == "weight_bits" else "activations"
    ranked = Counter(known).most_common()
    usual, often = ranked[0]
    if usual >= FLOAT_BITS:
        return f"float {name}" if often == len(known) else f"mostly float {name}"
    if len(ranked) > 2:
        widest = "-bit to float" if max(known) >= FLOAT_BITS else f"- to {bits(max(known))}-bit"
        return f"{bits(min(known))}{widest} {name}"
    rest = len(known) - often
    at = "in float" if rest and ranked[1][0] >= FLOAT_BITS else f"at {bits(ranked[-1][0])}"
    others = f" ({rest} layer{'s' * (rest > 1)} {at})" if rest else ""
    return f"{bits(usual)}-bit {name}{others}"


BUDGETED = {  # kind of budget -> what its figures count
    "bops": "bit operations",
    "weight_bytes": "of weights",
    "activation_bytes": "of activations at a time",
    "average_weight_bits": "bits per weight on average",
    "average_activation_bits": "bits per activation on average",
}
LADDERS = (("fJ", "pJ", "nJ", "µJ", "mJ", "J"), ("ps", "ns", "µs", "ms", "s"))  # steps of 1,000


def budget_text(budget: Mapping[str, Any]) -> str:
    """ "2.10 M of 2.13 M bit operations, 98.7 % of the budget"; in older files limits are shares of float."""
    limit, used = budget.get("limit"), budget.get("used")
    if used is None or not limit:
        return budget_limit(budget)
    if _is_share(budget):
        return f"{budget_limit(budget)} ({small_percent(used)} used)"
    return f"{_amount(budget, used)} of {budget_limit(budget)}, {percent(used / limit)} of the budget"


def budget_limit(budget: Mapping[str, Any]) -> str:
    """ "2.13 M bit operations"."""
    kind, limit = str(budget.get("kind", "cost")), float(budget.get("limit") or 0.0)
    if _is_share(budget):
        title = {"bops": "bit operations", "weight_bytes": "weight bytes"}.get(kind, kind.replace("_", " "))
        return f"{small_percent(limit)} of float {title}"
    if kind.startswith("table:"):
        unit = _scale(budget)[0]
        return (
            f"{_amount(budget, limit)}{SPACE * bool(unit)}{unit} by the table {kind.removeprefix('table:')}"
        )
    return f"{_amount(budget, limit)} {BUDGETED.get(kind, kind.replace('_', ' '))}"


def _is_share(budget: Mapping[str, Any]) -> bool:
    kind, limit = str(budget.get("kind", "cost")), budget.get("limit")
    absolute = "average" in kind or kind.startswith("table:")
    return not absolute and isinstance(limit, (int, float)) and limit <= 1


def _amount(budget: Mapping[str, Any], value: float) -> str:
    """A cost, without its unit where that is bits or a table's."""
    kind = str(budget.get("kind", "cost"))
    if "average" in kind:
        return f"{value:.2f}"
    if kind.startswith("table:"):
        value /= _scale(budget)[1]
        return f"{value:,.0f}" if value >= 999.5 else _three_digits(value)
    return _scaled(value, SIZES if "bytes" in kind else COUNTS)


def _scale(budget: Mapping[str, Any]) -> tuple[str, float]:
    """The unit in which a table's limit has one to three digits before the point, and its size."""
    unit, size, limit = str(budget.get("unit") or ""), 1.0, float(budget.get("limit") or 0.0)
    unit = {"us": "µs", "uJ": "µJ"}.get(unit, unit)
    ladder = next((one for one in LADDERS if unit in one), (unit,))
    for larger in ladder[ladder.index(unit) + 1 :]:
        if limit / size < 999.5:
            break
        unit, size = larger, 1000 * size
    return unit, size


def _three_digits(value: float) -> str:
    """2.1 -> "2.10", 21 -> "21.0", 210 -> "210"."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
