"""What a row says of its LoRA: its picture, what it is, what is wrong with it, and what is written there at first."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from loraclr import blocks, prompts
from loraclr.keys import Family
from loraclr.webui import card, library, thumbnails
from loraclr.webui.card import Card
from loraclr.webui.language import retell, say
from loraclr.webui.settings import lines_of
from loraclr.webui.view import FIELDS, KINDS


def card_of(name: str) -> Card:
    """What the file of a LoRA is."""
    try:
        return card.of(library.path_of(name))
    except ValueError as error:
        return Card(None, str(error), "", 0.0)


def guess(name: str) -> tuple[Any, ...]:
    """What a LoRA that was just chosen is filled in with."""
    trigger = card_of(name).trigger
    kind = KINDS["style" in f"{name} {trigger}".casefold()]
    return tuple((FIELDS | {"trigger": trigger, "kind": kind, "prompts": templates(kind)}).values())


def templates(kind: str, looked: str = "") -> str:
    """The prompts to look at as a row has them: what was written, else the usual ones of this kind."""
    return looked if looked.strip() else "\n".join(prompts.usual(kind.lower()))


def retold(kind: str, looked: str) -> str:
    """The prompts after a choice of kind: the usual ones follow it, others stay."""
    return templates(kind, "" if any(lines_of(looked) == prompts.usual(k.lower()) for k in KINDS) else looked)


def title(name: str) -> str:
    """Its name, with its picture if there is one; the page's script reads the name off it."""
    shown = escape(name)
    return f'{_picture(name)}<span title="{shown}" data-name="{shown}">{shown}</span>'


def _picture(name: str) -> str:
    try:
        picture = thumbnails.of(library.path_of(name))
    except ValueError:  # it is gone; what is wrong with it says so
        picture = None
    return "" if picture is None else f'<img src="{escape(thumbnails.address(name, picture))}" alt="">'


def about(name: str, loaded: Family | None, text_weight: str, weights: str) -> str:
    """What it is, and what is wrong with it for the loaded family, and with these weights."""
    found = card_of(name)
    told = [("", " · ".join(filter(None, (library.folder_of(name), found.facts))))]
    for wrong in (found.wrong(loaded), _not_a_number(text_weight), _no_block_weights(weights, found)):
        told.append(("loraclr-wrong", wrong))
    told.append(("loraclr-noted", found.noted))
    return "".join(f'<small class="{look}">{escape(sentence)}</small>' for look, sentence in told if sentence)


def _not_a_number(text_weight: str) -> str:
    try:
        number(text_weight)
    except ValueError:
        return say('The text encoder weight "{weight}" is no number.', weight=text_weight)
    return ""


def number(text_weight: Any) -> float | None:
    """A text encoder's weight as it is written; None for an empty field. Raises ValueError."""
    weight = float(text_weight) if str(text_weight or "").strip() else None
    if weight is not None and not math.isfinite(weight):
        raise ValueError
    return weight


def _no_block_weights(weights: str, found: Card) -> str:
    """Why the block weights make no sense for a LoRA, "" if they do."""
    if found.lora is not None and (weights or "").strip():
        try:
            blocks.block_weights(weights, found.lora.family)
        except ValueError as error:
            return retell(str(error))
    return ""
