"""Segmentation on the page: figures by stage, IoU of every class, pictures of what the models answer.

From `Run` and masks.npz to markup; empty for other tasks. A class has one colour in all pictures, grey for
the first one, which in most data is the background.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitsmith.report import contest, page, png, svg, words
from bitsmith.report.masks import FILE, UNLABELLED, Masks, read_masks
from bitsmith.report.metrics import Run
from bitsmith.report.outcome import STAGES

COLUMNS = ("Mean IoU", "Against float, points", "Pixels right", "Loss, nats per pixel")
ANSWERS = {"float": "Float", "quantized": "Quantized"}
BARS = {"float": ("float", "float"), "quantized": ("quantized", "quant")}  # model -> (label, colour)
MOST_BARS = 24  # classes; of more those that lost most
COLOURS = (
    "#6b7280", "#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c",
    "#fabebe", "#008080", "#9a6324", "#fffac8", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075",
)  # fmt: skip
WITHOUT = "#ffffff"
STYLE = """
.masks { display:grid; grid-template-columns:repeat(2,minmax(0,1fr)); gap:10px 40px }
.masks div { display:grid; grid-template-columns:repeat(4,minmax(0,1fr)); gap:10px }
.masks span { font-size:13.5px; color:var(--soft) }
.masks img { width:100%; image-rendering:pixelated; display:block; border-radius:4px;
  border:1px solid var(--line) }
@media (max-width:720px){ .masks { grid-template-columns:minmax(0,1fr) } .masks .second { display:none } }
"""


def style(run: Run) -> str:
    """What the page needs beside the common style."""
    return STYLE if words.measure(run) is words.MEAN_IOU else ""


def cards(run: Run) -> tuple[tuple[str, ...], ...]:
    """The rows of the page: figures, pictures, classes."""
    if words.measure(run) is not words.MEAN_IOU:
        return ()
    found = read_masks(run.directory / FILE)
    return (figures(run),), (pictures(found),), (classes(found),)


def figures(run: Run) -> str:
    """Mean IoU, share of the pixels that are right, and loss of every stage."""
    rows = [
        [page.text(name), *_cells(run, stage)]
        for stage, (name, _) in STAGES.items()
        if run.figure(stage, "mean_iou") is not None and stage != contest.winner(run)
    ]
    if not rows:
        return ""
    table = page.table(["Stage", *COLUMNS], rows, "Figures of segmentation", numbers=range(1, 5))
    tested = run.metrics.get("test_images")
    remark = "IoU of a class: of the pixels that are answered or truly it, those that are both. "
    remark += "The mean is over classes, so that a small one counts as much as the background."
    if isinstance(tested, int):
        remark += f" Test: {tested:,} images."
    return page.card("Segmentation", table, remark=remark, wide=True)


def _cells(run: Run, stage: str) -> list[str]:
    loss = run.figure(stage, "loss")
    cells = [
        words.result(run, stage),
        "" if stage == "float" else words.change(run, stage),
        words.percent(run.figure(stage, "accuracy")),
        words.DASH if loss is None else f"{loss:.3f}",
    ]
    return [f"<b>{cell}</b>" for cell in cells] if stage == "quantized" else cells


def pictures(found: Masks | None) -> str:
    """Test images beside their masks and the models' answers, with a key to the colours."""
    if found is None or not len(found.images):
        return ""
    palette = colours(len(found.classes))
    rows = {"Image": [png.data_uri(image) for image in found.images]}
    rows["Truth"] = [png.data_uri(painted(mask, palette)) for mask in found.truth]
    for name, title in ANSWERS.items():
        if name in found.answers:
            rows[title] = [png.data_uri(painted(mask, palette)) for mask in found.answers[name]]
    head = "".join(f"<span>{page.text(title)}</span>" for title in rows)
    parts = [f"<div>{head}</div>", f'<div class="second">{head}</div>']
    for n in range(len(found.images)):
        one = "".join(_picture(sources[n], title, n) for title, sources in rows.items())
        parts.append(f"<div>{one}</div>")
    grid = f'<div class="masks">{"".join(parts)}</div>'
    remark = f"The first {len(found.images)} test images, and the class of every pixel."
    return page.card("Predictions", _key(found, palette) + grid, remark=remark, wide=True)


def _picture(source: str, title: str, row: int) -> str:
    return f'<img src="{source}" alt="{page.text(f"test image {row}: {title.lower()}")}">'


def _key(found: Masks, palette: NDArray[np.float64]) -> str:
    """The colours of the classes that are in the pictures."""
    seen = {int(c) for part in (found.truth, *found.answers.values()) for c in np.unique(part)}
    entries = [(name, palette[index]) for index, name in enumerate(found.classes) if index in seen]
    if UNLABELLED in {int(c) for c in np.unique(found.truth)}:
        entries.append(("without a label", _rgb(WITHOUT)))
    items = "".join(
        f'<li><i style="background:rgb({",".join(str(round(255 * part)) for part in colour)})"></i>'
        f"{page.text(name)}</li>"
        for name, colour in entries
    )
    return f'<ul class="legend swatches">{items}</ul>'


def classes(found: Masks | None) -> str:
    """IoU of every class as bars, float against quantized."""
    if found is None or not found.iou:
        return ""
    known = [
        index
        for index in range(len(found.classes))
        if any(math.isfinite(values[index]) for values in found.iou.values())
    ]
    shown = known
    if len(known) > MOST_BARS:
        shown = sorted(sorted(known, key=lambda index: _gained(found.iou, index))[:MOST_BARS])
    groups = [
        (
            found.classes[index],
            [
                svg.Mark(label, float(values[index]), kind, words.percent(float(values[index])))
                for name, (label, kind) in BARS.items()
                if (values := found.iou.get(name)) is not None and math.isfinite(values[index])
            ],
        )
        for index in shown
    ]
    label = "IoU of every class: " + "; ".join(
        f"{name} {', '.join(f'{mark.label} {mark.text}' for mark in marks)}" for name, marks in groups
    )
    notes = []
    if len(shown) < len(known):
        notes.append(f"The {MOST_BARS} of {len(known)} classes that quantization cost most.")
    if len(known) < len(found.classes):
        absent = words.listing(name for index, name in enumerate(found.classes) if index not in known)
        notes.append(f"In no test image and no answer, and so without an IoU: {absent}.")
    keys = page.legend([("b-float", "Float"), ("b-quant", "Quantized")])
    plot = svg.bars(groups, 1.0, label)
    return page.card("IoU of every class", keys + plot, remark=" ".join(notes), wide=True)


def _gained(iou: Mapping[str, NDArray[np.float64]], index: int) -> float:
    change = [float(iou[name][index]) if name in iou else math.nan for name in ANSWERS]
    return change[1] - change[0] if all(map(math.isfinite, change)) else math.inf


def colours(count: int) -> NDArray[np.float64]:
    """A colour (count, 3) in 0..1 for every class: COLOURS, then hues a golden angle apart."""
    rest = range(len(COLOURS), count)
    found = [_rgb(colour) for colour in COLOURS[:count]]
    return np.array(found + [colorsys.hsv_to_rgb(0.618034 * n % 1, 0.55 + 0.1 * (n % 4), 0.9) for n in rest])


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def painted(mask: NDArray[np.int64], palette: NDArray[np.float64]) -> NDArray[np.float64]:
    """A mask (H, W) as a picture (3, H, W)."""
    every = np.concatenate([palette, [_rgb(WITHOUT)]])
    return every[np.where(mask == UNLABELLED, len(palette), mask)].transpose(2, 0, 1)
