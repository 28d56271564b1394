"""What came out: tiles, accuracy by stage, cost against float, bits of every layer. From `Run` to markup.

What a part says is decided here and in behaviour.py and record.py; how figures are written in words.py, how
it is drawn in svg.py, how it is boxed in page.py. Where its data is missing a part is empty. Colours mean the
same everywhere: grey is float, amber post-training, blue quantized (and weights), violet exported, teal
activations, red wrong.
"""

from __future__ import annotations

import math

from bitsmith.report import contest, page, svg, words
from bitsmith.report.metrics import FLOAT_BITS, Run

STAGES = {  # stage -> (name, colour)
    "float": ("Float", "float"),
    "post_training": ("Post-training", "post"),
    "searched": ("Searched plan", "uniform"),  # of a search and its competitor the one that lost
    "uniform": ("Uniform plan", "uniform"),
    "quantized": ("Quantized", "quant"),
    "exported": ("Exported", "export"),
}


def tiles(run: Run) -> str:
    """The key figures."""
    by = words.measure(run)
    more = f"float {words.result(run, 'float')}, {words.change(run, 'quantized')} {by.unit}s"
    parts = [page.tile(by.title, words.result(run, "quantized"), more)]
    for key, what, show, less in (
        ("weight_bytes", "Weights", words.size, "smaller than float"),
        ("bops", "Bit operations", words.count, "fewer than float"),
    ):
        used, full = run.cost(key), run.cost(f"{key}_float")
        if used is not None:
            more = f"{words.factor(full, used)} {less}, {show(full)}" if full else ""
            parts.append(page.tile(what, show(used), more))
    weights, activations = run.cost("average_weight_bits"), run.cost("average_activation_bits")
    if len(parts) < 3 and weights is not None:
        parts.append(page.tile("Average bits", words.bits(weights), f"activations {words.bits(activations)}"))
    failed = words.listing(entry.runtime for entry in run.certified if entry.passed is False)
    value, more, state = {
        True: ("Verified", f"in {words.listing(words.runtimes(run, version=True))}", "good"),
        False: ("Failed", f"in {failed}", "bad"),
        None: ("Not verified", "no export was checked", ""),
    }[run.verified]
    parts.append(page.tile("Exported file", value, more, state))
    return f'<div class="tiles">{"".join(parts)}</div>'


def alert(run: Run) -> str:
    """What went wrong, before anything else."""
    failures = [
        f"<b>{page.text(entry.runtime_name)} does not compute what was trained.</b> "
        + page.text(
            entry.failure
            or "; ".join(f"{what} {figures}".strip() for what, held, figures in entry.checks if held is False)
        )
        for entry in run.certified
        if entry.passed is False
    ]
    return "".join(f'<div class="alert" role="alert">{failure}</div>' for failure in failures)


def accuracy(run: Run) -> str:
    """Float, post-training, quantized, exported on one axis."""
    digits, images, by = words.decimals(run), run.test_images, words.measure(run)
    marks = []
    for stage, (label, kind) in STAGES.items():
        value = run.figure(stage, by.key)
        delivered = stage == contest.winner(run)  # "quantized" says it
        if value is not None and not delivered:
            spread = None
            if images:
                error = math.sqrt(value * (1 - value) / images)
                spread = (max(value - error, 0.0), min(value + error, 1.0))
            marks.append(svg.Mark(label, value, kind, by.show(value, digits), spread))
    label = f"{by.title}: " + ", ".join(f"{mark.label} {mark.text}" for mark in marks)
    show = svg.show_number if by is words.LOSS else svg.show_percent
    plot = svg.dots(marks, label, reference=run.figure("float", by.key), show=show)
    note = f"Lines: one standard error of {images:,} test {words.unit(run)}." if images else ""
    return page.card(by.title, plot + page.note(note), remark=_gain(run))


def _gain(run: Run) -> str:
    gap, by = words.change(run, "quantized", "post_training"), words.measure(run)
    if gap == words.DASH:
        return ""
    number = gap.strip("+" + words.MINUS)
    if contest.winner(run):
        side = "above" if gap.startswith("+") else "below" if gap.startswith(words.MINUS) else "from"
        return (
            f"What is delivered is {number} {by.unit}s {side} post-training, which is the "
            "float model rounded to the plan that the search started from."
        )
    if float(number) == 0:
        good = "accurate" if by is words.ACCURACY else "good"
        return f"Rounding the float model to these bits is as {good} as training at them."
    if gap.startswith("+") != by.lower_is_better:
        return f"Training at these bits gained {number} {by.unit}s over rounding the float model to them."
    return f"Training at these bits lost {number} {by.unit}s against rounding the float model to them."


def cost(run: Run) -> str:
    """Size and bit operations as lengths against float, exported files, averages."""
    groups = []
    for key, name, show in (("weight_bytes", "Weights", words.size), ("bops", "Bit operations", words.count)):
        used, full = run.cost(key), run.cost(f"{key}_float")
        if used is not None and full:
            groups.append(
                (
                    name,
                    [
                        svg.Mark("float", 1.0, "float", show(full)),
                        svg.Mark("quantized", used / full, "quant", show(used)),
                    ],
                )
            )
    label = "; ".join(
        f"{name}: {' against '.join(f'{m.label} {m.text}' for m in marks)}" for name, marks in groups
    )
    plot = svg.bars(groups, 1.0, label) if groups else ""
    keys = page.legend([("b-float", "Float"), ("b-quant", "Quantized")]) if groups else ""
    entries = []
    weights, activations = run.cost("average_weight_bits"), run.cost("average_activation_bits")
    if weights is not None:
        text = f"{words.bits(weights)} for weights"
        entries.append(
            ("Average bits", text + (f", {words.bits(activations)} for activations" if activations else ""))
        )
    entries += [("Budget", words.budget_text(budget)) for budget in run.budgets]
    sources = []
    for key, name, unit in (("latency_us", "Latency", "µs"), ("energy_uj", "Energy", "µJ")):
        value = run.cost(key)
        if value is not None:
            entries.append((name, f"{value:.4g}{words.SPACE}{unit} per inference, estimated"))
            source = run.metrics["cost"].get(f"{name.lower()}_source")
            sources.append(f"{name} is estimated from a table{f': {source}' if source else ''}.")
    entries += [(path, f"{words.size(bytes_)} on disk") for path, bytes_ in run.files.items()]
    return page.card(
        "Size and bit operations",
        keys + plot + page.facts(entries) + page.note(" ".join(sources)),
        remark="Sizes count codes, scales, biases and what stayed in float. "
        "A bit operation is one multiplication times the bits of both operands.",
    )


def layers(run: Run) -> str:
    """Bits of every layer as bars, with what the layer costs."""
    if not run.layers:
        return ""
    total = sum(layer.bops or 0 for layer in run.layers)
    stored = sum(layer.weight_bytes or 0 for layer in run.layers)
    costly = any(layer.bops is not None or layer.weight_bytes is not None for layer in run.layers)
    rows = []
    for layer in run.layers:
        matmul = layer.is_product
        names = ("left operand", "right operand") if matmul else ("weights", "activations")
        first = _width(
            layer.weight_bits, "acts" if matmul else "quant", layer.name, names[0], layer.channel_bits
        )
        second = _width(layer.activation_bits, "acts", layer.name, names[1])
        kind = f" <small>{page.text(_kind(layer.kind))}</small>" if layer.kind else ""
        row = f'<th scope="row">{page.name(layer.name)}{kind}</th><td>{first}</td><td>{second}</td>'
        if costly:
            size = words.size(layer.weight_bytes) if layer.weight_bytes else words.DASH
            if contest.winner(run) and layer.weight_bytes:  # what the bits were traded for
                part = layer.weight_bytes / stored
                size += f" <small>{words.small_percent(part)}</small>{svg.share_bar(part, 'quant')}"
            share = (layer.bops or 0) / total if total else 0.0
            row += (
                f'<td class="number" data-what="bytes">{size}</td>'
                f'<td class="number" data-what="operations">{words.count(layer.bops)} '
                f"<small>{words.small_percent(share)}</small>{svg.share_bar(share, 'quant')}</td>"
            )
        rows.append(f"<tr>{row}</tr>")
    columns = "".join(f'<th scope="col">{head}</th>' for head in ("Layer", "Weights", "Activations"))
    if costly:
        heads = ("Weight bytes", "Bit operations")
        columns += "".join(f'<th scope="col" class="number">{head}</th>' for head in heads)
    keys = page.legend([("b-quant", "Weights"), ("b-acts", "Activations")])
    keys = keys.replace("legend", "legend narrow", 1)  # on a phone the table has no head
    body = f'<table class="layers"><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return page.card("Bits per layer", keys + body, wide=True)


def _kind(kind: str) -> str:
    return kind.removeprefix("Quant").lower()


def _width(bits: float | None, kind: str, layer: str, operand: str, each: tuple[float, ...] = ()) -> str:
    if bits is None:
        return f"<small>{words.DASH}</small>"
    shown = words.widths(each) if each else words.bits(bits)
    label = f"{layer}, {operand}: {shown}" + ("" if bits >= FLOAT_BITS else " bits")
    return f'<div class="widths"><b>{shown}</b>{svg.width_bar(bits, kind, label)}</div>'
