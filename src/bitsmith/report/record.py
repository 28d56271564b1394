"""The small print: certificate, coverage, timings, environment, recipe. From `Run` to markup.

See outcome.py for what lives where. Long tables are folded away, but nothing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitsmith.report import page, svg, words
from bitsmith.report.metrics import FLOAT_BITS, Run, mean_bits

SITE_COLUMNS = ("kind", "bits", "grid", "granularity", "group_size", "range", "elements")


def certificate(run: Run) -> str:
    """What was checked in which runtime, and what was not."""
    parts = []
    for entry in run.certified:
        state, word = {True: ("good", "passed"), False: ("bad", "failed"), None: ("", "not checked")}[
            entry.passed
        ]
        parts.append(f'<h3>{page.text(entry.runtime)}<span class="badge {state}">{word}</span></h3>')
        items = []
        for what, held, figures in entry.checks:
            kind = {True: "yes", False: "no", None: "unknown"}[held]
            detail = f"<small>{page.text(figures)}</small>" if figures else ""
            items.append(f'<li class="{kind}">{page.text(what)}{detail}</li>')
        parts.append(f'<ul class="checks">{"".join(items)}</ul>{page.note(" ".join(entry.remarks))}')
        if entry.layers:
            rows = [[page.text(layer), f"{error:.2g}"] for layer, error in entry.layers]
            largest = f"{entry.layers[0][1]:.2g} of its standard deviation"
            label = f"Output error of {len(rows)} layers: at most {largest}"
            parts.append(page.folded(label, page.table(["Layer", "Output error"], rows, label, numbers=(1,))))
    if run.not_checked:
        items = [f'<li class="unknown">{page.text(what)}</li>' for what in run.not_checked]
        parts.append(f'<h3>Not checked</h3><ul class="checks">{"".join(items)}</ul>')
    return page.card(
        "Certificate", "".join(parts), remark="The exported file, run in its own runtime and compared."
    )


def coverage(run: Run) -> str:
    """Every site, and everything that stays in float with the reason."""
    sites = _site_rows(run)
    columns = ["site", *(key for key in SITE_COLUMNS if any(site.get(key) is not None for site in sites))]
    rows = [
        [page.text(site.get("name", "?")), *(_cell(site.get(key)) for key in columns[1:])]
        for site in sites
        if site.get("bits") != FLOAT_BITS
    ]
    numbers = [index for index, key in enumerate(columns) if key in ("bits", "group_size", "elements")]
    heads = [key.replace("_", " ").capitalize() for key in columns]
    parts = []
    if rows:
        inner = page.table(heads, rows, "Quantized sites", numbers)
        parts.append(page.folded(f"{len(rows)} quantized sites", inner, opened=len(rows) <= 16))
    leftovers = run.coverage.get("leftovers") or []
    if leftovers:
        groups = "".join(
            f"<li>{page.text(reason)}<small>{_sum(entries)} elements</small>"
            f"{page.note(', '.join(str(entry.get('name', '?')) for entry in entries))}</li>"
            for reason, entries in by_reason(leftovers).items()
        )
        inner = f'<ul class="checks leftovers">{groups}</ul>'
        parts.append(page.folded(f"{len(leftovers)} tensors stay in float", inner, opened=True))
    return page.card(
        "Coverage",
        "".join(parts),
        remark="Nothing is skipped in silence: a tensor is quantized or listed.",
        wide=True,
    )


def by_reason(leftovers: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Leftovers of a coverage by the reason that they share: a network has many BatchNorms."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in leftovers:
        groups.setdefault(str(entry.get("reason", "")), []).append(entry)
    return groups


def _sum(entries: Sequence[Mapping[str, Any]]) -> str:
    return _cell(sum(entry["elements"] for entry in entries if isinstance(entry.get("elements"), int)))


def _site_rows(run: Run) -> list[dict[str, Any]]:
    """Sites of the coverage report, completed from the plan (which knows the final bits)."""
    planned: Mapping[str, Mapping[str, Any]] = run.plan.get("sites") or {}
    listed = run.coverage.get("sites") or []
    if isinstance(listed, dict):
        listed = [{"name": name, **entry} for name, entry in listed.items()]
    if not listed:
        listed = [{"name": name} for name in planned]
    return [{**site, **planned.get(str(site.get("name")), {})} for site in listed]


def _cell(value: Any) -> str:
    if value is None or value == 0:
        return words.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and mean_bits(value) is not None:
        return page.text(words.widths(value))
    return f"{value:,}" if isinstance(value, int) else page.text(value)


def timings(run: Run) -> str:
    """Seconds per stage, the longest bar the longest stage."""
    spent = {
        key: float(value)
        for key, value in (run.metrics.get("time") or {}).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    total = next((spent.pop(key) for key in ("total", "total_seconds", "seconds") if key in spent), None)
    if not spent and total is None:
        return ""
    groups = [
        (_stage(key), [svg.Mark("seconds", value, "quant", words.seconds(value))])
        for key, value in spent.items()
    ]
    label = "Time: " + ", ".join(f"{name} {marks[0].text}" for name, marks in groups)
    plot = svg.bars(groups, max(spent.values()) or 1.0, label) if groups else ""
    whole = words.seconds(total if total is not None else sum(spent.values()))
    return (
        page.card("Time", plot, remark=f"{whole} in all.")
        if plot
        else page.card("Time", page.note(f"{whole} in all."))
    )


def _stage(key: str) -> str:
    known = {"qat": "Quantized", "post_training": "Post-training", "onnx": "ONNX"}
    name = key.removesuffix("_seconds").removesuffix("_s")
    return known.get(name, name.replace("_", " ").capitalize())


def environment(run: Run) -> str:
    """Versions and machine."""
    entries = []
    if run.metrics.get("seed") is not None:
        entries.append(("seed", str(run.metrics["seed"])))
    for key, value in (run.metrics.get("environment") or {}).items():
        if isinstance(value, dict):
            value = ", ".join(f"{inner} {shown}" for inner, shown in value.items())
        entries.append((str(key).replace("_", " "), str(value)))
    return page.card("Environment", page.facts(entries))


def recipe(run: Run) -> str:
    """The resolved recipe, verbatim."""
    if not run.recipe:
        return ""
    return page.card(
        "Recipe", f'<pre tabindex="0">{page.text(run.recipe)}</pre>', remark="As resolved: recipe.yaml."
    )
