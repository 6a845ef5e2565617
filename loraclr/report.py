"""Reports: figures and pictures as one HTML file that needs nothing else, and the same tables as text."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image


@dataclass(frozen=True)
class Share:
    """`right` out of `of`, with its standard error.

    The error counts one success and one failure more than there were, so that 16 out of 16 is not called certain.
    """

    right: int
    of: int

    @property
    def value(self) -> float:
        return self.right / self.of if self.of else float("nan")

    @property
    def error(self) -> float:
        guess = (self.right + 1) / (self.of + 2)
        return math.sqrt(guess * (1 - guess) / (self.of + 2))

    def __add__(self, other: Share) -> Share:
        return Share(self.right + other.right, self.of + other.of)

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % ± {100 * self.error:.0f} ({self.right}/{self.of})" if self.of else "–"


@dataclass(frozen=True)
class Mean:
    """The mean of some values, with its standard error."""

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        return sum(self.values) / len(self.values) if self.values else float("nan")

    @property
    def error(self) -> float:
        count = len(self.values)
        if count < 2:
            return float("nan")
        return math.sqrt(sum((value - self.value) ** 2 for value in self.values) / (count - 1) / count)

    def __str__(self) -> str:
        if not self.values:
            return "–"
        return f"{self.value:.3f}" + (f" ± {self.error:.3f}" if len(self.values) > 1 else "")


@dataclass(frozen=True)
class Table:
    """Figures; the first column names the row. A row whose place is in `strong` is set in bold."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    strong: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Shot:
    """A picture and what was found in it; `right` None: nobody judged."""

    picture: Image.Image
    found: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Gallery:
    """Pictures to compare: `rows` are (label, text below it, one shot for each column)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Shot]]]
    note: str = ""


def text(table: Table) -> str:
    """A table for a terminal, columns aligned."""
    lines = [list(map(str, row)) for row in (table.columns, *table.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "-" * max(map(len, drawn))
    return "\n".join([table.title, "", drawn[0], rule, *drawn[1:], *([rule, table.note] if table.note else [])])


def page(title: str, lead: str, parts: Sequence[Table | Gallery]) -> str:
    """One HTML document: pictures inline as PNG, light or dark as the reader's system asks."""
    body = "\n".join(_table(part) if isinstance(part, Table) else _gallery(part) for part in parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )


def inline(picture: Image.Image, quality: int | None = None) -> str:
    """A picture as a data: address: PNG, or with a quality (1 to 95) JPEG."""
    stream = io.BytesIO()
    if quality is None:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.convert("RGB").save(stream, "JPEG", quality=quality)
    return f"data:image/{'png' if quality is None else 'jpeg'};base64," + base64.b64encode(stream.getvalue()).decode()


def _heading(title: str, note: str) -> str:
    return f"<h2>{escape(title)}</h2>\n" + (f'<p class="note">{escape(note)}</p>\n' if note else "")


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = []
    for place, (name, *cells) in enumerate(table.rows):
        mark = ' class="strong"' if place in table.strong else ""
        rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{rest}</tr>')
    return (
        f"<section>\n{_heading(table.title, table.note)}"
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n' + "\n".join(rows) + "\n</tbody>\n"
        "</table></div>\n</section>"
    )


def _gallery(gallery: Gallery) -> str:
    head = "".join(f'<div class="column">{escape(column)}</div>' for column in ("", *gallery.columns))
    rows = []
    for label, below, shots in gallery.rows:
        small = f"<small>{escape(below)}</small>" if below else ""
        cells = "".join(_shot(shot, f"{label}, {column}") for shot, column in zip(shots, gallery.columns, strict=True))
        rows.append(f'<div class="label"><strong>{escape(label)}</strong>{small}</div>{cells}')
    return (
        f"<section>\n{_heading(gallery.title, gallery.note)}"
        f'<div class="gallery" style="--columns:{len(gallery.columns)}">\n{head}\n'
        + "\n".join(rows)
        + "\n</div>\n</section>"
    )


def _shot(shot: Shot, alt: str) -> str:
    mark, state = {True: ("✓ ", "right"), False: ("✗ ", "wrong"), None: ("", "")}[shot.right]
    caption = f'<figcaption class="{state}">{mark}{escape(shot.found)}</figcaption>' if shot.found else ""
    width, height = shot.picture.size
    image = f'<img src="{inline(shot.picture)}" width="{width}" height="{height}" alt="{escape(alt)}">'
    return f"<figure>{image}{caption}</figure>"


STYLE = """
:root{color-scheme:light dark;--ground:#fbfbfd;--card:#fff;--ink:#1d1d24;--soft:#6b6b78;--line:#e4e4ec;--right:#177245;
--wrong:#b3343a;--tint:#f0f1fa}
@media (prefers-color-scheme:dark){:root{--ground:#131318;--card:#1c1c23;--ink:#ececf2;--soft:#9c9cab;--line:#2e2e39;
--right:#5cc48d;--wrong:#ee8085;--tint:#25253a}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 20px 80px}
h1{font-size:2.1rem;line-height:1.15;letter-spacing:-.02em;margin:0 0 .4em}
h2{font-size:1.25rem;letter-spacing:-.01em;margin:0 0 .3em}
.lead{font-size:1.1rem;color:var(--soft);max-width:44em;margin:0 0 2em}
.note{color:var(--soft);margin:0 0 1.2em;max-width:52em}
section{background:var(--card);border:1px solid var(--line);border-radius:16px;padding:24px;margin:0 0 24px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:9px 14px 9px 0;border-bottom:1px solid var(--line);white-space:nowrap;font-weight:400}
thead th{color:var(--soft);font-size:.85rem}
tbody tr:last-child>*{border-bottom:0}
.strong>*{font-weight:650;background:var(--tint)}
.strong>:first-child,tbody th{padding-left:10px}
thead th:first-child{padding-left:10px}
.gallery{display:grid;gap:14px;align-items:start;
grid-template-columns:minmax(88px,150px) repeat(var(--columns),minmax(0,256px))}
.column{color:var(--soft);font-size:.85rem}
.label small{display:block;color:var(--soft);overflow-wrap:anywhere}
figure{margin:0}
img{display:block;width:100%;height:auto;image-rendering:pixelated;border-radius:10px}
figcaption{font-size:.85rem;color:var(--soft);padding-top:4px}
figcaption.right{color:var(--right)}
figcaption.wrong{color:var(--wrong)}
@media (max-width:640px){main{padding:28px 12px}section{padding:16px}
.gallery{grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:8px}
.label{grid-column:1/-1}.column:first-of-type{display:none}}
"""
