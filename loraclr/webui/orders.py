"""An order as JSON: what the API takes, and what a merged file's recipe holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from loraclr.plan import POLISH_STEPS, Settings
from loraclr.webui import card, library
from loraclr.webui.job import Order, Row
from loraclr.webui.settings import LIMITS, rank_of, side_of

KINDS = ("subject", "style")


def parse(body: Any) -> Order:
    """The order that a JSON object asks for. Raises ValueError, one sentence that names what is wrong."""
    values = _checked(Order, body, "the order", {"rows": "loras"})
    loras = values.pop("rows", None)
    if not isinstance(loras, list):
        raise ValueError('The order has no list of "loras".')
    rows = [_row(entry, number) for number, entry in enumerate(loras, 1)]
    settings = _settings(values.pop("settings", {}))
    return Order(rows, settings=settings, **values)


def schema() -> dict[str, Any]:
    """What `parse` takes, with the defaults."""
    order = {field.name: field.default for field in fields(Order) if field.name not in ("rows", "settings")}
    row = {field.name: field.default for field in fields(Row) if field.name != "name"}
    settings = {field.name: getattr(Settings(), field.name) for field in fields(Settings)}
    return {
        "loras": [{"name": "as the webui lists it", **row}],
        **order,
        "settings": settings,
        "limits": {**LIMITS, "speed": list(POLISH_STEPS), "kind": list(KINDS), "rank": [None, "auto", "1 or more"]},
    }


def _row(entry: Any, number: int) -> Row:
    values = _checked(Row, entry, f"LoRA {number}")
    if not isinstance(values.get("name"), str):
        raise ValueError(f'LoRA {number} has no "name".')
    if values.get("kind", KINDS[0]) not in KINDS:
        raise ValueError(f'{values["name"]} is of kind "{values["kind"]}": choose subject or style.')
    if not values.get("trigger", "").strip():
        values["trigger"] = card.of(library.path_of(values["name"])).trigger
    return Row(**values)


def _settings(body: Any) -> Settings:
    rank = {"rank": rank_of(body["rank"])} if isinstance(body, dict) and "rank" in body else {}
    rest = {name: value for name, value in body.items() if name != "rank"} if rank else body
    values = _checked(Settings, rest, "the settings") | rank
    if values.get("speed", "fast") not in POLISH_STEPS:
        raise ValueError(f'The speed is "{values["speed"]}": choose one of {", ".join(POLISH_STEPS)}.')
    for name, (least, most) in LIMITS.items():
        value = values.get(name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"The setting {name} is {value}: choose {least} to {most}.")
    values["size"] = side_of(values.get("size"))
    if values.get("ridge", 1) <= 0:
        raise ValueError("The ridge λ must be a number above 0, 0.001 for example.")
    return Settings(**values)


def _checked(kind: type, body: Any, what: str, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The entries of a JSON object by a dataclass's fields, each of the type of the field's default."""
    if not isinstance(body, dict):
        raise ValueError(f"{what[0].upper()}{what[1:]} must be a JSON object.")
    known = {(names or {}).get(field.name, field.name): field for field in fields(kind)}
    unknown = sorted(set(body) - set(known))
    if unknown:
        raise ValueError(f'In {what} there is "{unknown[0]}", which is none of {", ".join(known)}.')
    values = {}
    for name, value in body.items():
        if not _fits(value, known[name].default):
            raise ValueError(f'In {what}, "{name}" cannot be {value!r}.')
        values[known[name].name] = tuple(value) if isinstance(known[name].default, tuple) else value
    return values


def _fits(value: Any, default: Any) -> bool:
    """Whether a JSON value is of a default's type; a field without a default, or None as one, is checked later."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(default, tuple):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if default is None:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    return True
