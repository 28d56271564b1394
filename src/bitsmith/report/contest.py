"""Who was delivered after a search, its plan or the uniform plan that competed with it, and by how much.

From `Run` to plain words; everything is empty for a run whose widths were asked for. The validation split
decided, so its figures come first; where the test split disagrees, that is said as plainly.
"""

from __future__ import annotations

import re
from typing import Any

from bitsmith.report import uniform as uniform_plan
from bitsmith.report import words
from bitsmith.report.certificate import is_number
from bitsmith.report.metrics import Run


def winner(run: Run) -> str:
    """ "searched", "uniform", or "" where there was no search."""
    return str(run.metrics.get("winner") or "searched") if run.metrics.get("searched") else ""


def result(run: Run) -> tuple[str, str] | None:
    """Verdict and figures: ("The searched plan won", "97.8 % against 96.9 % for the uniform …")."""
    if not winner(run):
        return None
    searched, uniform = run.metrics["searched"], run.metrics.get("uniform")
    decides = f"validation_{words.measure(run).key}"
    places = {decides: "on validation, which decided", words.measure(run).key: "on test"}
    if not uniform:
        figures = words.listing(
            f"{_shown(searched[key], run)} {where.removesuffix(', which decided')}"
            for key, where in places.items()
            if is_number(searched.get(key))
        )
        reason = "no uniform plan fits the budget" if run.budgets else "there was no uniform plan"
        return "The searched plan was delivered unopposed", f"{reason}. {figures}. {_used(run)}".strip()
    first, second = (searched, uniform) if winner(run) == "searched" else (uniform, searched)
    name = uniform_name(run)
    other = f"the {name} of the same budget" if first is searched else "the searched plan"
    figures = "; ".join(
        _against(first, second, key, places[key], run, other if index == 0 else "")
        for index, key in enumerate(key for key in places if _both(first, second, key))
    )
    drew = all(first.get(key) == second.get(key) for key in (decides, LOSS))
    if first is uniform:
        note = "All figures below are the uniform plan's."
        how = "drew, costs no more and was delivered" if drew else "won and was delivered"
        return f"The {name} {how}", f"{figures}. {_used(run)} {note}".replace("  ", " ")
    if uniform_plan.is_delivered(run):
        figures += ". Both plans have the same widths, so the difference is one of training"
    return ("The searched plan drew and was kept" if drew else "The searched plan won"), (
        f"{figures}. {_used(run)}".strip()
    )


def uniform_name(run: Run) -> str:
    """ "uniform 3 × 3-bit plan"."""
    bits = str((run.metrics.get("uniform") or {}).get("bits") or "")
    shown = bits.replace(" x ", f"{words.SPACE}{words.TIMES}{words.SPACE}")
    if re.fullmatch(r"\d+ x \d+", bits):
        return f"uniform {shown}-bit plan"
    if bits == "float x float":
        return "uniform plan in float"
    return f"uniform plan ({shown} bits)" if bits else "uniform plan"


LOSS = "validation_loss"


def _both(first: dict[str, Any], second: dict[str, Any], key: str) -> bool:
    return is_number(first.get(key)) and is_number(second.get(key))


def _shown(value: float, run: Run) -> str:
    return words.measure(run).show(value, words.decimals(run))


def _against(
    first: dict[str, Any], second: dict[str, Any], key: str, place: str, run: Run, other: str
) -> str:
    """ "97.8 % against 96.9 % for the uniform plan on validation, which decided (0.9 points ahead)"."""
    by, digits = words.measure(run), words.decimals(run)
    difference = first[key] - second[key]
    ours, theirs = _shown(first[key], run), _shown(second[key], run)
    named = f" for {other}" if other else ""
    if difference == 0:
        text = f"{ours} against as much{named} {place}"
        losses = _both(first, second, LOSS) and first[LOSS] != second[LOSS]
        if key.startswith("validation_") and losses and not by.lower_is_better:
            text = text.replace(
                ", which decided", f" (loss {first[LOSS]:.3g} against {second[LOSS]:.3g}, which decided)"
            )
        return text
    number = by.gap(difference, digits).strip("+" + words.MINUS)
    least = 0.001 if by is words.LOSS else 10**-digits
    lead = f"{number} {by.unit}s" if float(number) else f"less than {least:g} {by.unit}s"
    side = "ahead" if (difference > 0) != by.lower_is_better else "behind"
    return f"{ours} against {theirs}{named} {place} ({lead} {side})"


def _used(run: Run) -> str:
    """ "99.6 % of the budget used, by the uniform plan 88.9 %."."""
    shares = []
    for budget in run.budgets:
        if budget.get("used") is None or not budget["limit"]:
            continue
        kind = str(budget.get("kind", "cost"))
        what = "the budget" if len(run.budgets) == 1 else f"the budget of {kind_name(kind)}"
        text = f"{words.percent(budget['used'] / budget['limit'])} of {what}"
        loser = ((run.metrics.get("uniform") or {}).get("cost") or {}).get(kind)
        if winner(run) == "searched" and is_number(loser):
            text += f" (the uniform plan {words.percent(loser / budget['limit'])})"
        shares.append(text)
    return f"It uses {words.listing(shares)}." if shares else ""


def kind_name(kind: str) -> str:
    """A kind of budget in words: "bops" -> "bit operations", "table:energy" -> "table energy"."""
    if kind.startswith("table:"):
        return f"table {kind.removeprefix('table:')}"
    return {"bops": "bit operations"}.get(kind, kind.replace("_", " "))
