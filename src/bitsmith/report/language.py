"""Language modelling on the page: its figures by stage, and text of the models. From `Run` to markup.

Both are empty for other tasks. What models write is text of the run: it goes through `page.text`.
"""

from __future__ import annotations

from bitsmith.report import contest, page, words
from bitsmith.report.metrics import Run
from bitsmith.report.outcome import STAGES
from bitsmith.report.samples import Sample

COLUMNS = ("Loss, nats per token", "Perplexity", "Bits per byte", "Next token right")
ANSWERS = "Answers right"


def figures(run: Run) -> str:
    """Loss, perplexity, bits per byte and next-token accuracy of every stage, and what the text was."""
    rows = [
        [page.text(name), *(f"<b>{cell}</b>" if stage == "quantized" else cell for cell in cells)]
        for stage, name, cells in table(run)
    ]
    if not rows:
        return ""
    names = ["Stage", *columns(run)]
    shown = page.table(names, rows, "Figures of language modelling", numbers=range(1, len(names)))
    return page.card("Language modelling", shown, remark=about(run), wide=True)


def columns(run: Run) -> tuple[str, ...]:
    """COLUMNS, and for data of problems the share that a model answers right."""
    return COLUMNS if run.figure("float", "exact_match") is None else (*COLUMNS, ANSWERS)


def table(run: Run) -> list[tuple[str, str, list[str]]]:
    """(stage, its name, its cells under `columns`); nothing for other tasks."""
    if words.measure(run) is not words.LOSS:
        return []
    return [
        (stage, name, _cells(run, stage))
        for stage, (name, _) in STAGES.items()
        if run.figure(stage, "loss") is not None and stage != contest.winner(run)
    ]


def _cells(run: Run, stage: str) -> list[str]:
    loss, bits = run.figure(stage, "loss"), run.figure(stage, "bits_per_byte")
    cells = [
        words.DASH if loss is None else f"{loss:.3f}",
        words.perplexity(run.figure(stage, "perplexity")),
        words.DASH if bits is None else f"{bits:.3f}",
        words.percent(run.figure(stage, "accuracy")),
    ]
    return cells + [words.percent(run.figure(stage, "exact_match"))] * (ANSWERS in columns(run))


def about(run: Run) -> str:
    """What the text is, and how much of it was tested; it says the Python version where that decides."""
    tokens = run.metrics.get("tokens")
    count = tokens.get("test") if isinstance(tokens, dict) else None
    text = str(run.metrics.get("text") or "")
    tested = f"Test: {count:,} tokens." if isinstance(count, int) else ""
    return " ".join(part for part in (f"{text}." if text else "", tested) if part)


def samples(run: Run) -> str:
    """What float and quantized model write after the same prompts with the same draws, side by side."""
    if not run.samples:
        return ""
    names = {"float": "Float", "quantized": "Quantized"}
    body = "".join(
        '<div class="halves">'
        + "".join(
            f'<div class="half"><h3>{label}</h3><pre tabindex="0">{_written(sample, name)}</pre></div>'
            for name, label in names.items()
            if name in sample.texts
        )
        + "</div>"
        for sample in run.samples
    )
    remark = "Bold: the prompt, out of the test text. Both models draw with the same random numbers."
    return page.card("Sampled text", body, remark=remark, wide=True)


def _written(sample: Sample, name: str) -> str:
    text = sample.texts[name]
    if text.startswith(sample.prompt):
        return f"<b>{page.text(sample.prompt)}</b>{page.text(text[len(sample.prompt) :])}"
    return page.text(text)
