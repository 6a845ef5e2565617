"""Earlier merges side by side: LoRAs with words, weights and figures; method and settings. What differs is marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from loraclr.webui import library, titles
from loraclr.webui.language import say, shown

#: A line of the table: what it tells, and the values of all merges.
Line = tuple[str, Sequence[str]]


def table(*names: str | None) -> str:
    """One merged LoRA, or several side by side, as HTML; "" for none."""
    told = {name: library.recipe(name) for name in names if name}
    told = {name: recipe for name, recipe in told.items() if recipe}
    if not told:
        return ""
    recipes = list(told.values())
    head = "".join(f"<th>{escape(name)}</th>" for name in told)
    body = "".join(_row(*line) for line in [*_concepts(recipes), *_settings(recipes)])
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _row(title: str, values: Sequence[str]) -> str:
    look = ' class="loraclr-differs"' if len(set(values)) > 1 else ""
    return f"<tr{look}><th>{escape(title)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"


def _concepts(recipes: Sequence[Mapping[str, Any]]) -> list[Line]:
    """For every LoRA in any of the merges its file, and what each merge says of it."""
    files = dict.fromkeys(str(concept.get("file", "")) for recipe in recipes for concept in recipe["concepts"])
    lines: list[Line] = []
    for file in files:
        found = [
            (next((concept for concept in recipe["concepts"] if concept.get("file") == file), None), recipe)
            for recipe in recipes
        ]
        lines.append((file, [say("Part of it") if concept else "–" for concept, _ in found]))
        columns = [_facts(concept, recipe) if concept else {} for concept, recipe in found]
        for title in dict.fromkeys(title for column in columns for title in column):
            lines.append((f"\u2003{title}", [column.get(title, "–") for column in columns]))
    return lines


def _facts(concept: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe says of one LoRA."""
    name = str(concept.get("file", "")).rpartition(".")[0]
    weights = {block: weight for block, weight in (concept.get("blocks") or {}).items() if weight != 1}
    facts = {
        say("Trigger words"): concept.get("trigger"),
        say("Weight"): concept.get("weight"),
        say("Weight of the text encoder"): concept.get("text_weight"),
        say("Kind"): say("Style") if concept.get("kind") == "style" else say("Subject"),
        say("Block weights"): " ".join(f"{block}={weight:g}" for block, weight in weights.items()),
        say("Prompts to look at"): " | ".join(concept.get("prompts") or ()),
    }
    missed, bled = (recipe.get("missed") or {}).get(name), (recipe.get("bled") or {}).get(name)
    if missed:
        facts[say("Effect kept")] = f"{max(0.0, 1 - missed[-1]):.0%}"
    if bled:
        facts[say("Bled in")] = f"{max(map(abs, bled.values())):.0%}"
    return {title: shown(value) for title, value in facts.items() if value not in (None, "")}


def _settings(recipes: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Method and settings; of two merges those settings only that differ."""
    columns = [recipe.get("settings") or {} for recipe in recipes]
    lines: list[Line] = [(say("Method of merging"), [str(recipe.get("method", "–")) for recipe in recipes])]
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [shown(column.get(name)) for column in columns]
        if len(values) == 1 or len(set(values)) > 1:
            lines.append((titles.title(name), values))
    return lines
