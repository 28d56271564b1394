"""Shifts, drawn: what the test rows look like under each, and the metric of both models against severity.

Reads shift.json and shift_pictures.npz of a run for its report, or takes what `bitsmith evaluate --shift` has
just measured for a page of its own. Empty where a run has none. All panels of a page share one axis, so that
curves compare across shifts; severity 0 is the test split as it is.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitsmith.errors import FormatError
from bitsmith.files import read_json, write_atomic
from bitsmith.report import page, png, svg, words
from bitsmith.report.certificate import is_number
from bitsmith.report.metrics import VERSION

FILE, PICTURES = "shift.json", "shift_pictures.npz"
MODELS = {"float": ("Float", "float"), "quantized": ("Quantized", "quant")}
SUITES = {
    "corruptions": "Corruptions",
    "adversarial": "Adversarial images",
    "domains": "Another domain",
    "text": "Text",
    "covariate": "Covariate shift",
}
INITIALS = ("fgsm", "pgd", "jpeg")
STYLE = """
.panels { display:grid; grid-template-columns:repeat(auto-fill,minmax(290px,1fr)); gap:26px 34px }
.panel { min-width:0 }
.panel h3 { margin:0 }
.panel .note { margin:0 0 8px; font-variant-numeric:tabular-nums }
.strip { display:grid; grid-template-columns:repeat(6,minmax(0,1fr)); gap:6px; margin:0 0 6px; padding:0;
  list-style:none }
.strip img { width:100%; display:block; border-radius:4px; border:1px solid var(--line);
  image-rendering:pixelated }
.strip li { text-align:center; font-size:12px; line-height:1.6; color:var(--soft) }
.panel .room-axes { padding-left:48px }
.texts { font-size:12.5px; margin:0 0 10px; padding:0; list-style:none }
.texts li { overflow-wrap:anywhere; padding:2px 0; border-bottom:1px solid var(--line) }
.texts b { color:var(--soft); font-weight:500; margin-right:8px }
.suite+.suite { margin-top:26px }
.suite>h3 { font-size:15px; margin:0 0 12px }
"""

Pictures = Mapping[str, NDArray[np.uint8]]


def read_shifts(directory: Path) -> tuple[Mapping[str, Any], Pictures] | None:
    """The measurements of a run and its pictures; None where it has none. Raises FormatError."""
    path = directory / FILE
    if not path.exists():
        return None
    found = read_json(path, "shift file")
    if found.get("version") != VERSION:
        raise FormatError(
            "this shift file is of another version",
            where=str(path),
            got=found.get("version"),
            expected=VERSION,
            remedy="Read it with the Bitsmith that wrote it, or run again",
        )
    if not _is_whole(found):
        raise FormatError(
            "this shift file has no figures of its shifts",
            where=str(path),
            remedy="Delete the file (the report leaves out what it held), or run again",
        )
    return found, _read_pictures(directory / PICTURES)


def _is_whole(found: Mapping[str, Any]) -> bool:
    shifts, figures, plain, metric = (found.get(key) for key in ("shifts", "figures", "plain", "metric"))
    if not (isinstance(shifts, dict) and isinstance(figures, dict) and isinstance(plain, dict)):
        return False
    if not all(isinstance(plain.get(name), dict) and is_number(plain[name].get(metric)) for name in figures):
        return False
    return all(
        isinstance(entry, dict)
        and isinstance(severities := entry.get("severities"), list)
        and all(is_number(severity) for severity in severities)
        and all(
            isinstance(each := entry.get(name), list)
            and len(each) == max(1, len(severities))
            and all(isinstance(one, dict) and is_number(one.get(metric)) for one in each)
            and isinstance(figures[name], dict)
            and is_number(figures[name].get(shift))
            for name in figures
        )
        for shift, entry in shifts.items()
    )


def _read_pictures(path: Path) -> Pictures:
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(
            f"these pictures are corrupted, truncated or not an .npz file ({error})",
            where=str(path),
            remedy="Delete the file (the report leaves out what it held), or run again",
        ) from None
    return {name: array for name, array in arrays.items() if array.ndim == 4 and array.dtype == np.uint8}


def card(read: tuple[Mapping[str, Any], Pictures] | None) -> str:
    """Every shift in a panel of its own, and the figures as a table; empty where nothing can be pictured or
    drawn, which is then said by the bars of `behaviour.shifts`."""
    if read is None or not read[0]["shifts"]:
        return ""
    found, pictures = read
    panels = _panels(found, pictures)
    if not panels:
        return ""
    figures = page.folded("Figures by severity", table(found))
    return page.card("Shift by shift", panels + figures, remark=_remark(found), wide=True)


def write_shift_page(found: Mapping[str, Any], pictures: Pictures, path: Path, run: str) -> None:
    """What `bitsmith evaluate --shift` measured, as a page: the table, then the panels."""
    measure = _measure(found)
    title = f"{measure.show(found['figures']['quantized'].get('mean'), 1)} under shift"
    before = found["plain"]["quantized"][found["metric"]]
    lead = f"{measure.show(before, 1)} on the test {found['unit']} as they are."
    if "float" in found["figures"]:
        lead += f" Float: {measure.show(found['figures']['float'].get('mean'), 1)} under shift."
    header = (
        f'<div class="brand">{page.MARK}<b>Bitsmith</b><span class="run">{page.text(run)}</span></div>'
        f'<h1>{page.text(title)}</h1><p class="lead">{page.text(lead)}</p>'
        f'<p class="asked">Suite {page.text(found["suite"])} on {page.text(found["data"])}</p>'
    )
    remark = f"Means of {severities(found)}; further to the right the quantized model at each severity."
    cards = [
        page.card("Under shift", table(found), remark=remark if _is_graded(found) else "", wide=True),
        page.card("Shift by shift", _panels(found, pictures), remark=_remark(found), wide=True),
    ]
    body = "".join(page.grid([one]) for one in cards)
    footer = "Made by Bitsmith; works offline. Figures under these shifts compare models, not papers."
    write_atomic(path, page.document(f"{title} · {run}", header, body, footer, STYLE).encode())


def _is_graded(found: Mapping[str, Any]) -> bool:
    return any(entry["severities"] for entry in found["shifts"].values())


def severities(found: Mapping[str, Any]) -> str:
    """Over which severities a figure is a mean: "severities 1, 3 and 5"."""
    known = [str(severity) for severity in found["severities"]]
    return f"severit{'ies' if len(known) > 1 else 'y'} {words.listing(known)}"


def name_of(shift: str) -> str:
    """A shift as it is written: "shot noise", "PGD transferred"."""
    return " ".join(part.upper() if part in INITIALS else part for part in shift.split("_"))


def rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the table: every model's figure, their difference, the quantized one by severity."""
    measure, names = _measure(found), _models(found)
    levels = sorted({level for entry in found["shifts"].values() for level in entry["severities"]})
    both = len(names) == 2
    columns = ["", *names, *([f"{measure.unit}s"] if both else []), *map(str, levels)]
    plain = {name: found["plain"][name][found["metric"]] for name in names}
    result = [_row("as it is", plain, measure) + [""] * len(levels)]
    for shift, entry in found["shifts"].items():
        at = {
            level: one[found["metric"]]
            for level, one in zip(entry["severities"], entry["quantized"], strict=False)
        }
        cells = [_short(measure, at[level]) if level in at else "" for level in levels]
        figures = {name: found["figures"][name][shift] for name in names}
        result.append(_row(name_of(shift), figures, measure) + cells)
    if len(found["shifts"]) > 1:
        means = {name: found["figures"][name]["mean"] for name in names}
        result.append(_row("mean", means, measure) + [""] * len(levels))
    return columns, result


def _row(name: str, values: Mapping[str, float], measure: words.Measure) -> list[str]:
    cells = [name, *(measure.show(value, 1) for value in values.values())]
    if len(values) == 2:
        cells.append(measure.gap(values["quantized"] - values["float"], 1))
    return cells


def _short(measure: words.Measure, value: float) -> str:
    """A figure without its unit, which the columns beside it have."""
    return measure.show(value, 1).split(words.SPACE)[0]


def table(found: Mapping[str, Any]) -> str:
    """`rows` as markup."""
    columns, cells = rows(found)
    return page.table(
        [_title(column) for column in columns],
        [[page.text(_title(row[0])), *map(page.text, row[1:])] for row in cells],
        "Figures under shift",
        numbers=range(1, len(columns)),
    )


def _panels(found: Mapping[str, Any], pictures: Pictures) -> str:
    """A panel for each shift, group by group; empty where there is nothing to look at."""
    if not (_is_graded(found) or pictures or found.get("texts")):
        return ""
    groups: dict[str, list[str]] = {}
    for shift, entry in found["shifts"].items():
        groups.setdefault(str(entry.get("suite", "")), []).append(_panel(shift, found, pictures))
    parts = []
    for suite, panels in groups.items():
        head = f"<h3>{page.text(SUITES.get(suite, suite))}</h3>" if len(groups) > 1 else ""
        parts.append(f'<div class="suite">{head}<div class="panels">{"".join(panels)}</div></div>')
    return page.legend([(f"b-{MODELS[name][1]}", MODELS[name][0]) for name in _models(found)]) + "".join(
        parts
    )


def _panel(shift: str, found: Mapping[str, Any], pictures: Pictures) -> str:
    measure, names, entry = _measure(found), _models(found), found["shifts"][shift]
    title = page.text(_title(name_of(shift)))
    said = ", ".join(f"{name} {measure.show(found['figures'][name][shift], 1)}" for name in names)
    parts = [f'<div class="panel"><h3>{title}</h3>{page.note(said)}', _strip(shift, entry, pictures)]
    texts = (found.get("texts") or {}).get(shift) or []
    levels = range(1, len(texts) + 1) if entry["severities"] else [""]
    lines = (
        f"<li>{f'<b>{level}</b>' if level else ''}{page.text(text)}</li>"
        for level, text in zip(levels, texts, strict=False)
    )
    parts.append(f'<ul class="texts">{"".join(lines)}</ul>' if texts else "")
    if entry["severities"]:
        curves = [
            svg.Series(
                MODELS[name][0],
                MODELS[name][1],
                [
                    (0.0, found["plain"][name][found["metric"]]),
                    *(
                        (float(level), one[found["metric"]])
                        for level, one in zip(entry["severities"], entry[name], strict=True)
                    ),
                ],
            )
            for name in names
        ]
        show = svg.show_number if measure is words.LOSS else svg.show_percent
        label = f"{title}: {measure.title.lower()} against severity; mean {said}"
        parts.append(svg.lines(curves, show, "severity", label, height=120, span=_span(found)))
    return "".join(parts) + "</div>"


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def _strip(shift: str, entry: Mapping[str, Any], pictures: Pictures) -> str:
    """The image as it is and at each severity; or images of the other domain."""
    if shift not in pictures:
        return ""
    images = [(str(level), image) for level, image in enumerate(pictures[shift], start=1)]
    if not entry["severities"]:
        images = [("", image) for _, image in images]
    elif "plain" in pictures:
        images = [("0", pictures["plain"][0]), *images]
    items = (
        f'<li><img src="{png.data_uri(image / 255)}" alt="{page.text(shift)} {level}">{level}</li>'
        for level, image in images
    )
    return f'<ul class="strip">{"".join(items)}</ul>'


def _span(found: Mapping[str, Any]) -> tuple[float, float]:
    """The least and the greatest value that any panel shows."""
    metric = found["metric"]
    values = [found["plain"][name][metric] for name in _models(found)]
    for entry in found["shifts"].values():
        if entry["severities"]:
            values += [one[metric] for name in _models(found) for one in entry[name]]
    return min(values), max(values)


def _remark(found: Mapping[str, Any]) -> str:
    if not _is_graded(found):
        return ""
    shown = {
        "images": "Pictures: a test image as it is (0) and at severities 1 to 5.",
        "sequences": "Text: the beginning of the test text at severities 1 to 5.",
    }
    parts = [
        shown.get(str(found["unit"]), ""),
        f"Curves: {_measure(found).title.lower()} of all test {found['unit']}; 0 is as they are.",
        f"Figures: means of {severities(found)}.",
    ]
    if any(entry.get("suite") == "adversarial" for entry in found["shifts"].values()):
        parts.append("Attacks move every pixel by at most 1, 2, 4, 8 and 16 of 255.")
    return " ".join(parts).strip()


def _models(found: Mapping[str, Any]) -> list[str]:
    return [name for name in MODELS if name in found["figures"]]


def measured(found: Mapping[str, Any]) -> str:
    """What is measured, inside a sentence: "accuracy", "mean IoU"."""
    return _measure(found).word


def _measure(found: Mapping[str, Any]) -> words.Measure:
    known = {measure.key: measure for measure in (words.LOSS, words.MEAN_IOU)}
    return known.get(found["metric"], words.ACCURACY)
