"""Earlier merges: the LoRAs that hold a recipe of ours, and their settings back in the form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from loraclr.webui import library, rows, settings
from loraclr.webui.components import FormRow
from loraclr.webui.surroundings import here

_RECIPE = "loraclr.recipe"


class History:
    """The components; `Load settings` fills the rows and the form."""

    def __init__(self, chosen: rows.Rows, form: settings.Form) -> None:
        with gr.Accordion("Earlier merges", open=False, elem_id="loraclr_history"):
            with FormRow():
                self.merged = gr.Dropdown(names(), label="Merged LoRAs", elem_id="loraclr_merged")
                self.load = gr.Button("Load settings", elem_id="loraclr_load", scale=0)
            self.about = gr.HTML(elem_id="loraclr_merged_about")
        self.merged.do_not_save_to_config = True
        self.merged.change(described, [self.merged], [self.about], show_progress=False)
        self.load.click(
            loaded, [self.merged], [chosen.chosen, *chosen.arranged, *form.fields],
            show_progress=False,
        )  # fmt: skip
        chosen.look.click(lambda: gr.update(choices=names()), [], [self.merged], show_progress=False)


def names() -> list[str]:
    """The LoRAs that were merged here, latest first."""
    found = [entry for entry in here().listed() if recipe(entry.name)]
    return [entry.name for entry in sorted(found, key=lambda entry: -_time(entry.path))]


def recipe(name: str | None) -> dict[str, Any]:
    """How a LoRA was merged, {} for any other one."""
    entry = here().found(name) if name else None
    told = {} if entry is None else entry.metadata.get(_RECIPE, {})
    if isinstance(told, str):  # the webui has decoded what looks like JSON, but not in every version
        try:
            told = json.loads(told)
        except ValueError:
            return {}
    return told if isinstance(told, dict) and isinstance(told.get("concepts"), list) else {}


def described(name: str | None) -> str:
    """What went into a merged LoRA."""
    told = recipe(name)
    if not told:
        return ""
    lines = (
        f"<tr><td>{escape(str(concept.get('file', '')))}</td><td><code>{escape(str(concept.get('trigger', '')))}</code>"
        f"</td><td>{escape(str(concept.get('weight', '')))}</td></tr>"
        for concept in told["concepts"]
    )
    head = "<tr><th>LoRA</th><th>Trigger words</th><th>Weight</th></tr>"
    return f"<p>{escape(str(told.get('method', '')))}</p><table>{head}{''.join(lines)}</table>"


def loaded(name: str | None) -> list[Any]:
    """The rows and the form as they were for a merged LoRA; LoRAs that are gone are left out and named."""
    told = recipe(name)
    if not told:
        gr.Warning("Choose one of the merged LoRAs first.")
        return [gr.update()] * (1 + len(rows.arranged([], {})) + len(settings.FIELDS))
    there = set(library.names())
    lines, gone = {}, []
    for concept in told["concepts"]:
        file = Path(str(concept.get("file", "")))
        source = next((source for source in (file.stem, file.name) if source in there), None)
        if source is None:
            gone.append(file.name)
        else:
            lines[source] = _line(concept)
    if gone:
        gr.Warning(f"No longer in the LoRA folder: {', '.join(gone)}.")
    values = settings.written(str(told.get("method", "loraclr")), told.get("settings") or {})
    return [list(lines), *rows.arranged(list(lines), lines), *values]


def _line(concept: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row's fields from a recipe's concept."""
    text_weight, weights = concept.get("text_weight"), concept.get("blocks") or {}
    return (
        concept.get("trigger", ""),
        concept.get("weight", 1.0),
        "" if text_weight is None else f"{text_weight:g}",
        rows.KINDS[concept.get("kind") == "style"],
        " ".join(f"{block}={weight:g}" for block, weight in weights.items() if weight != 1),
        "\n".join(concept.get("prompts") or ()),
    )


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
