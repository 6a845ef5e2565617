"""Earlier merges: the LoRAs that hold a recipe of ours, and their settings back in the form."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from loraclr.webui import comparison, facts, library, rows, settings
from loraclr.webui.components import AGAIN, FormRow
from loraclr.webui.language import say
from loraclr.webui.surroundings import here
from loraclr.webui.view import KINDS


class History:
    """The components; `Load settings` fills the rows and the form."""

    def __init__(self, chosen: rows.Rows, form: settings.Form) -> None:
        with gr.Accordion("Earlier merges", open=False, elem_id="loraclr_history"):
            with FormRow(elem_id="loraclr_earlier"):
                self.merged = gr.Dropdown(names(), label="Merged LoRAs", elem_id="loraclr_merged")
                self.other = gr.Dropdown(names(), label="Compare with", elem_id="loraclr_other")
                self.load = gr.Button("Load settings", elem_id="loraclr_load", scale=0)
            self.about = gr.HTML(elem_id="loraclr_merged_about")
        both = [self.merged, self.other]
        for component in both:
            component.do_not_save_to_config = True
            component.change(comparison.table, both, [self.about], show_progress=False)
        self.load.click(
            loaded, both, [self.about, chosen.chosen, *chosen.arranged, *form.fields],
            show_progress=False,
        )  # fmt: skip
        chosen.look.click(lambda: [gr.update(choices=names())] * 2, [], both, show_progress=False, **AGAIN)


def names() -> list[str]:
    """The LoRAs that were merged here, latest first."""
    found = [entry for entry in here().listed() if library.recipe(entry.name)]
    return [entry.name for entry in sorted(found, key=lambda entry: -_time(entry.path))]


def loaded(name: str | None, other: str | None) -> list[Any]:
    """The rows and the form as they were for a merged LoRA; LoRAs that are gone are left out and named."""
    told, about = library.recipe(name), comparison.table(name, other)
    if not told:
        as_it_was = [gr.update()] * (1 + len(rows.arranged([], {})) + len(settings.FIELDS))
        return [_wrong(say("Choose one of the merged LoRAs first.")) + about, *as_it_was]
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
        about = _wrong(say("No longer in the LoRA folder: {names}.", names=", ".join(gone))) + about
    values = settings.written(str(told.get("method", "loraclr")), told.get("settings") or {})
    return [about, *rows.filled(lines), *values]


def _wrong(sentence: str) -> str:
    return f'<small class="loraclr-wrong">{escape(sentence)}</small>'


def _line(concept: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row's fields from a recipe's concept."""
    text_weight, weights = concept.get("text_weight"), concept.get("blocks") or {}
    kind = KINDS[concept.get("kind") == "style"]
    return (
        concept.get("trigger", ""),
        concept.get("weight", 1.0),
        "" if text_weight is None else f"{text_weight:g}",
        kind,
        " ".join(f"{block}={weight:g}" for block, weight in weights.items() if weight != 1),
        facts.templates(kind, "\n".join(concept.get("prompts") or ())),
    )


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
