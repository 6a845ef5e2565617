"""Results: finished pieces in a file that a stopped run goes on from, and the rows and the table made of them."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loraclr.report import Mean, Share, Table

#: Figure → heading. Shares are counted, the others averaged.
FIGURES = {
    "identity": "identity", "top1": "top-1", "text": "text", "image": "image", "pixel": "pixel",
    "crosstalk": "cross-talk", "two_concept": "two", "two_new": "two, new", "beside": "beside base",
    "beside_new": "beside, new", "base_top1": "base top-1", "base_drift": "base drift", "picture": "picture",
}  # fmt: skip
SHARES = {"top1", "crosstalk", "two_concept", "two_new", "beside", "beside_new", "base_top1"}
DELTAS = ("identity", "text", "picture")  # also as the mean difference to the single LoRAs, picture by picture
#: What stands below the table: always, and for each column that is shown.
NOTE = "± is one standard error over pictures."
NOTES = {
    "delta": "Δ: merged − single, same prompt and noise.",
    "identity": "identity: the judge's cosine.",
    "text": "text: background and base-class words obeyed.",
    "image": "image: cosine of the judge's features to the single LoRA's picture.",
    "pixel": "pixel: RMS difference to the single LoRA's picture.",
    "crosstalk": "cross-talk: another merged concept found.",
    "two_concept": "two: two concepts, each in its half (single: the LoRAs of both, stacked in the prompt).",
    "two_new": "two, new: of pairs that the merge has not looked at together.",
    "beside": "beside: concept and base object.",
    "beside_new": "beside, new: with a base object of which merges look at no picture.",
    "base_top1": "base: no trigger.",
    "base_drift": "base drift: RMS difference to the base model, no trigger.",
    "picture": "picture: cleanness, without the judge (benchmarks/metrics.py).",
}


@dataclass(frozen=True)
class Piece:
    """One method on one set of concepts with one seed: every picture's figures, in the order of its prompts.

    Attributes:
        plan: how much was drawn; pieces of different plans are not mixed.
        settings: what was chosen on the tuning prompts.
        refused: why the method cannot merge these LoRAs, "" if it can.
        date: when it was measured, as 2026-11-29.
    """

    concepts: int
    method: str
    seed: int
    plan: Mapping
    values: Mapping[str, list[float]] = field(default_factory=dict)
    capture_s: float = 0.0
    merge_s: float = 0.0
    settings: Mapping = field(default_factory=dict)
    names: Sequence[str] = ()
    refused: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[int, str, int]:
        return self.concepts, self.method, self.seed


class Pieces:
    """The finished pieces of one plan, and the JSON-lines file that holds them."""

    def __init__(self, path: Path, plan: Mapping) -> None:
        self.path, self.plan = path, json.loads(json.dumps(plan))
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.done: dict[tuple[int, str, int], Piece] = {}
        for line in lines:
            try:
                piece = Piece(**json.loads(line))
            except (json.JSONDecodeError, TypeError):  # the line that was being written when a run was stopped
                continue
            if piece.plan == self.plan:
                self.done[piece.key] = piece

    def add(self, piece: Piece) -> None:
        """Keep a piece, on disk at once; with as many places as a table shows, since such files are kept in git."""
        values = {figure: [round(value, 5) for value in every] for figure, every in piece.values.items()}
        piece = replace(piece, values=values, capture_s=round(piece.capture_s, 2), merge_s=round(piece.merge_s, 2))
        self.done[piece.key] = piece
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps(vars(piece)) + "\n")

    def settings_of(self, count: int, method: str) -> Mapping | None:
        """What was chosen for a method at a number of concepts, by whichever seed came first."""
        found = (p for p in self.done.values() if (p.concepts, p.method) == (count, method) and not p.refused)
        return next((piece.settings for piece in found), None)


def rows(pieces: Sequence[Piece]) -> list[dict]:
    """One row for each number of concepts and method, over all seeds; `<figure>_se` is the standard error.

    A figure that a method does not have is None; `date` is that of the oldest piece.
    """
    by_key = {piece.key: piece for piece in pieces}
    result = []
    for count, method in dict.fromkeys((piece.concepts, piece.method) for piece in pieces):
        mine = [piece for piece in pieces if (piece.concepts, piece.method) == (count, method)]
        drawn = [piece for piece in mine if not piece.refused]
        row: dict = {"concepts": count, "method": method, "seeds": len(drawn)}
        for figure in FIGURES:
            values = [value for piece in drawn for value in piece.values.get(figure, ())]
            row |= _with_error(
                figure, Share(round(sum(values)), len(values)) if figure in SHARES else Mean(tuple(values))
            )
        for figure in DELTAS:
            row |= _with_error(f"{figure}_delta", Mean(tuple(_differences(drawn, by_key, figure))))
        for name in ("capture_s", "merge_s"):
            row[name] = sum(getattr(piece, name) for piece in drawn) / len(drawn) if drawn else None
        row["settings"] = drawn[0].settings if drawn else {}
        row["date"] = min(piece.date for piece in mine)
        row["refused"] = next((piece.refused for piece in mine if piece.refused), "")
        result.append(row)
    return result


def _differences(pieces: Sequence[Piece], by_key: Mapping, figure: str) -> list[float]:
    result = []
    for piece in pieces:
        single = by_key.get((piece.concepts, "single", piece.seed))
        if single is not None:
            result += [a - b for a, b in zip(piece.values[figure], single.values[figure], strict=True)]
    return result


def _with_error(name: str, found: Share | Mean) -> dict:
    value, error = (None if math.isnan(number) else round(number, 5) for number in (found.value, found.error))
    return {name: value, f"{name}_se": error if value is not None else None}


#: All columns: a figure, or the difference of one to the single LoRAs.
COLUMNS = (
    "identity", "identity_delta", *list(FIGURES)[1:], "text_delta", "picture_delta", "capture_s", "merge_s",
)  # fmt: skip


def table(found: Sequence[Mapping], columns: Sequence[str] = COLUMNS) -> Table:
    """All rows, for a terminal."""
    lines = [[f"{row['concepts']} {row['method']}", *(_cell(row, key) for key in columns)] for row in found]
    refused = [f"{row['concepts']} {row['method']}: {row['refused']}" for row in found if row["refused"]]
    heads = ["", *map(_heading, columns)]
    return Table("Quality on the miniature", heads, lines, "\n".join([_note(columns), *refused]))


def _note(columns: Sequence[str]) -> str:
    """What the columns mean, those that are shown."""
    shown = {column.removesuffix("_delta") for column in columns}
    if any(column.endswith("_delta") for column in columns):
        shown.add("delta")
    return textwrap.fill(" ".join([NOTE, *(text for name, text in NOTES.items() if name in shown)]), 118)


def _heading(key: str) -> str:
    if key.endswith("_s"):
        return f"{key[:-2]} s"
    return f"Δ {FIGURES[key[:-6]]}" if key.endswith("_delta") else FIGURES[key]


def _cell(row: Mapping, key: str) -> str:
    if row[key] is None:
        return "–"
    if key.endswith("_s"):
        return f"{row[key]:.1f}"
    sign = "+" if key.endswith("_delta") else ""
    return f"{row[key]:{sign}.3f}" + ("" if row[f"{key}_se"] is None else f"±{row[f'{key}_se']:.3f}")
