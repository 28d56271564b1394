"""report.html of one run: the order of its parts, and nothing else.

First screen: what was asked, what came out, whether it was verified. Then why to believe it.
"""

from __future__ import annotations

from pathlib import Path

from bitsmith.files import write_atomic
from bitsmith.report import (
    behaviour,
    contest,
    flatness,
    fractional,
    hardware,
    language,
    outcome,
    page,
    record,
    rounding,
    search,
    segmentation,
    shifts,
    training,
    words,
)
from bitsmith.report.metrics import Run, read_run

FEW = 10  # misread images that leave room beside a confusion matrix


def write_report(run_directory: str | Path) -> Path:
    """Write ``report.html`` into a run directory, from the files that it holds. Raises FormatError.

    Where the layers' costs are known, ``hardware_profile.csv`` is written beside it.
    """
    run = read_run(run_directory)
    path = run.directory / "report.html"
    table = hardware.to_csv(hardware.profile(run))
    if table:
        write_atomic(run.directory / hardware.FILE, table.encode())
    write_atomic(path, render(run).encode())
    return path


def render(run: Run) -> str:
    """The page as a string."""
    title, sentence = words.headline(run)
    result = contest.result(run)
    won = f'<p class="contest"><b>{page.text(result[0])}</b>: {page.text(result[1])}</p>' if result else ""
    header = (
        f'<div class="brand">{page.MARK}<b>Bitsmith</b><span class="run">{page.text(run.name)}</span></div>'
        f'<h1>{page.text(title)}</h1><p class="lead">{page.text(sentence)}</p>{won}'
        f'<p class="asked">{page.text(words.asked(run))}</p>'
    )
    if trained := training.sentence(run):
        header += f'<p class="asked">{page.text(trained)}.</p>'
    body = outcome.alert(run) + outcome.tiles(run)
    body += "".join(
        page.grid(row)
        for row in (
            (outcome.accuracy(run), outcome.cost(run)),
            (language.figures(run),),
            (language.samples(run),),
            *segmentation.cards(run),
            (outcome.layers(run),),
            (rounding.card(rounding.read_rounding(run.directory / rounding.FILE)),),
            (search.savings(run),),
            (search.traces(run),),
            (fractional.card(run),),
            (fractional.channels(run),),
            (fractional.curriculum(run),),
            (hardware.card(run),),
            (behaviour.traces(run),),
            (shifts.card(shifts.read_shifts(run.directory)),),
            (flatness.card(flatness.read_flatness(run.directory)),),
            *_proofs(run),
        )
    )
    what = words.measure(run).plural
    footer = (
        "Made by Bitsmith from the files in this run directory; works offline. "
        f"Bytes are decimal (1 kB = 1,000 B). {what} are of the test set unless they say validation."
    )
    style = fractional.style(run) + segmentation.style(run) + shifts.STYLE + flatness.STYLE
    return page.document(f"{title} · {run.name}", header, body, footer, style)


def _proofs(run: Run) -> tuple[tuple[str, ...], ...]:
    """How the model behaves and what was checked, in rows whose two cards are about as tall."""
    confusion, misread, shifts = behaviour.confusion(run), behaviour.misread(run), behaviour.shifts(run)
    certificate, coverage, recipe = record.certificate(run), record.coverage(run), record.recipe(run)
    time, machine = record.timings(run), record.environment(run)
    if run.predictions is not None and len(run.predictions.images) <= FEW:
        beside, below = page.stack((misread, time)), page.stack((shifts, machine))
        return (confusion, beside), (below, certificate), (coverage,), (recipe,)
    return (confusion, misread), (page.stack((shifts, time)), certificate), (coverage,), (machine, recipe)
