"""The shell of a page: cards, tables, tiles, and the document around them.

One file that needs nothing else: no script, no font, no image by address. Light and dark follow the reader's
system; below 720 px everything stands in one column and wide tables scroll inside their own box. Strings that
come from a run go through `text`; the other arguments named `body` or `cells` are markup already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

MARK = (  # four cells of falling height: fewer and fewer bits
    '<svg width="22" height="18" viewBox="0 0 22 18" aria-hidden="true">'
    '<rect x="0" y="0" width="4" height="18" rx="1" class="f-float"/>'
    '<rect x="6" y="5" width="4" height="13" rx="1" class="f-quant"/>'
    '<rect x="12" y="9" width="4" height="9" rx="1" class="f-quant"/>'
    '<rect x="18" y="13" width="4" height="5" rx="1" class="f-quant"/></svg>'
)


def text(value: Any) -> str:
    """A string of the user's or the run's, escaped."""
    return escape(str(value))


def name(value: Any) -> str:
    """A dotted name that may break after its dots."""
    return text(value).replace(".", ".<wbr>")


def note(remark: str) -> str:
    """A remark in small soft type; empty where there is none."""
    return f'<p class="note">{text(remark)}</p>' if remark else ""


def card(title: str, body: str, *, remark: str = "", wide: bool = False) -> str:
    """A titled box; empty where there is no body, so that missing parts vanish."""
    if not body:
        return ""
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{text(title)}</h2>{note(remark)}{body}</section>'


def grid(cards: Iterable[str]) -> str:
    """Cards two in a row; a single one takes the whole row."""
    shown = [one for one in cards if one]
    if len(shown) == 1:
        return f'<div class="grid single">{shown[0]}</div>'
    return f'<div class="grid">{"".join(shown)}</div>' if shown else ""


def stack(cards: Iterable[str]) -> str:
    """Cards below each other, as one cell of a grid."""
    body = "".join(cards)
    return f'<div class="stack">{body}</div>' if body else ""


def tile(what: str, value: str, more: str, state: str = "") -> str:
    """A key figure; `state` is "good", "bad" or neither."""
    return (
        f'<div class="tile {state}"><div class="what">{text(what)}</div>'
        f'<div class="value">{text(value)}</div><div class="more">{text(more)}</div></div>'
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Colour keys: (class, label)."""
    items = (f'<li><i class="{kind}"></i>{text(label)}</li>' for kind, label in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], label: str, numbers: Sequence[int] = ()
) -> str:
    """Rows of cells (markup); the first is the row's header; `numbers` are right-aligned columns."""

    def cells(row: Sequence[str], tag: str = "td") -> str:
        parts = []
        for index, cell in enumerate(row):
            kind = ' class="number"' if index in numbers else ""
            here = "th" if index == 0 else tag
            scope = ' scope="row"' if index == 0 and tag == "td" else ' scope="col"' if tag == "th" else ""
            parts.append(f"<{here}{kind}{scope}>{cell}</{here}>")
        return f"<tr>{''.join(parts)}</tr>"

    head = cells([text(column) for column in columns], "th")
    body = "".join(cells(row) for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">'
        f"<table><thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def facts(entries: Iterable[tuple[str, str]]) -> str:
    """Keys and values below each other."""
    items = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in entries)
    return f"<dl>{items}</dl>" if items else ""


def folded(summary: str, body: str, opened: bool = False) -> str:
    """A part that opens and closes by its summary; empty where there is no body."""
    return (
        f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{body}</details>"
        if body
        else ""
    )


def document(title: str, header: str, body: str, footer: str, style: str = "") -> str:
    """The whole page, ``style`` after the common one. The policy forbids every load from outside, whatever a
    run's strings hold."""
    style = files("bitsmith.report").joinpath("style.css").read_text(encoding="utf-8") + style
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{text(title)}</title><style>{style}</style></head>\n"
        f"<body><header>{header}</header>\n<main>{body}</main>\n<footer>{footer}</footer></body></html>\n"
    )
