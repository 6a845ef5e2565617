"""What the rows show of the chosen LoRAs, of which there may be many more than rows, and what is written of all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST = 16  # rows of the form: gradio 3 cannot add components to a page, and each makes it slower
KINDS = ("Subject", "Style")
#: What a row asks for, and its value where there is no LoRA.
FIELDS = {"trigger": "", "weight": 1.0, "text_weight": "", "kind": KINDS[0], "blocks": "", "prompts": ""}
#: Those in which numbers are written as words, which may make no sense.
CHECKED = ("text_weight", "blocks")


@dataclass(frozen=True)
class View:
    """A page of the chosen LoRAs.

    Attributes:
        names: all that are chosen, in order.
        lines: what is written of each, in the order of `FIELDS`; of those in sight, as it was when the page was shown.
        first: the place of the one in the first row.
    """

    names: Sequence[str] = ()
    lines: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    first: int = 0

    @property
    def shown(self) -> Sequence[str]:
        """Those that have a row now."""
        return self.names[self.first : self.first + MOST]

    def written(self, fields: Sequence[Any]) -> dict[str, Sequence[Any]]:
        """What is written of each LoRA, with what stands in the rows now: all of the first field, and so on."""
        return {**self.lines, **dict(zip(self.shown, zip(*columns(fields), strict=True), strict=False))}


def page_of(names: Sequence[str], lines: Mapping[str, Sequence[Any]], first: int = 0) -> View:
    """The page that begins at or before this place, or the last one, of LoRAs of which all lines are known."""
    return View(names, {name: lines[name] for name in names}, _page(first, len(names)))


def columns(values: Sequence[Any], fields: Collection[str] = tuple(FIELDS)) -> list[Sequence[Any]]:
    """The values of each field for all rows."""
    return [values[MOST * place : MOST * (place + 1)] for place in range(len(fields))]


def in_rows(lines: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """The reverse: for each field its values for all rows, of which the last ones are empty."""
    every = [*lines, *[tuple(FIELDS.values())] * (MOST - len(lines))]
    return {name: [line[place] for line in every] for place, name in enumerate(FIELDS)}


def _page(place: int, count: int) -> int:
    """Where the page begins on which this place is, the nearest one if there is none."""
    return max(0, min(place, count - 1)) // MOST * MOST
