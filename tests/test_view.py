"""The rows as a view of more LoRAs than there are rows: nothing that was written is lost out of sight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from loraclr.webui.view import FIELDS, MOST, View, columns, in_rows, page_of

NAMES = [f"lora {number}" for number in range(2 * MOST + 3)]
LINES = {name: (f"word {name}", 1.0, "", "Subject", "", "") for name in NAMES}


def fields_of(view: View) -> list[Any]:
    """What the page's fields hold: all of the first field, and so on."""
    return [value for column in in_rows([view.lines[name] for name in view.shown]).values() for value in column]


def rewritten(fields: Sequence[Any], row: int, trigger: str) -> list[Any]:
    """The fields after the user has written other trigger words into a row."""
    return [*fields[:row], trigger, *fields[row + 1 :]]


@pytest.mark.parametrize(
    ("count", "place", "first", "shown"),
    [
        (0, 0, 0, 0), (1, 0, 0, 1), (MOST, MOST, 0, MOST), (MOST + 1, MOST, MOST, 1), (MOST + 1, MOST - 1, 0, MOST),
        (len(NAMES), 99 * MOST, 2 * MOST, 3), (len(NAMES), -MOST, 0, MOST),
    ],
)  # fmt: skip
def test_pages(count: int, place: int, first: int, shown: int) -> None:
    """Each begins at a multiple of the rows; beyond the ends it is the nearest one."""
    view = page_of(NAMES[:count], LINES, place)
    assert (view.first, len(view.shown)) == (first, shown)
    assert list(view.shown) == NAMES[first : first + shown]


def test_what_is_written_comes_along() -> None:
    """Through all pages and back, with a word written on each; rows that are empty change nothing."""
    view = page_of(NAMES, LINES)
    for first in (0, MOST, 2 * MOST, MOST, 0):
        view = page_of(NAMES, view.lines, first)
        told = view.written(rewritten(fields_of(view), 2, f"mine {first}"))
        view = page_of(NAMES, told, first)
    wanted = dict(LINES)
    for first in (0, MOST, 2 * MOST):
        wanted[NAMES[first + 2]] = (f"mine {first}", *LINES[NAMES[first + 2]][1:])
    assert {name: tuple(line) for name, line in view.lines.items()} == wanted


def test_rows_and_columns() -> None:
    """One is the reverse of the other; a row without a LoRA has each field's usual value."""
    some = [LINES[name] for name in NAMES[:3]]
    by_field = in_rows(some)
    flat = [value for column in by_field.values() for value in column]
    lines = list(zip(*columns(flat), strict=True))
    assert lines[:3] == some
    assert len(lines) == MOST
    assert set(lines[3:]) == {tuple(FIELDS.values())}
