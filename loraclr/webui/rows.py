"""The chosen LoRAs, and a row for each that is in sight: what it is, and what the user says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

import gradio as gr

from loraclr import prompts
from loraclr.webui import facts, job, labels, library
from loraclr.webui.components import AGAIN, FormRow, ToolButton, script, script_on
from loraclr.webui.language import say
from loraclr.webui.settings import lines_of
from loraclr.webui.surroundings import here
from loraclr.webui.view import CHECKED, FIELDS, KINDS, MOST, View, columns, in_rows, page_of

HEADING = (
    '<div class="loraclr-columns"><span>LoRA</span><span>Trigger words</span><span>Weight</span>'
    '<span title="Weight for the text encoder; empty: the same">Text enc.</span><span>Kind</span></div>'
)
EMPTY = "<p>Choose two or more LoRAs. Each keeps its own trigger words, and all of them share one file.</p>"
NOTHING = "<p>There is no LoRA yet. Put some into this folder, then press the refresh button:</p><code>{folder}</code>"
NONE = (
    "<p>There is no checkpoint yet. "
    "Put one into this folder, then press the refresh button at the top of the page and choose it:</p>"
    "<code>{folder}</code>"
)
OTHER = (
    "<p>The loaded checkpoint is none of SD 1.x, SD 2.x and SDXL; choose one of these at the top of the page first.</p>"
)


class Rows:
    """The components of the choice."""

    def __init__(self) -> None:
        with FormRow(elem_id="loraclr_choice"):
            self.chosen = gr.Dropdown(
                library.listed(library.loaded_family(), hidden=False),
                value=[],
                multiselect=True,
                label="LoRAs to merge",
                info="Type to search by name, folder or trigger words.",
                elem_id="loraclr_loras",
            )
            self.refresh = ToolButton("\U0001f504", elem_id="loraclr_refresh")
        with gr.Row(elem_id="loraclr_choosing"):
            self.taken = gr.Button(
                "Take the LoRAs of my txt2img prompt", size="sm", elem_id="loraclr_take", visible=here().txt2img
            )
            self.every = gr.Checkbox(
                False, label="LoRAs for other model families too", elem_id="loraclr_every", container=False
            )
            self.hidden = gr.Checkbox(
                False, label="LoRAs in hidden folders too", elem_id="loraclr_hidden", container=False
            )
            self.more = gr.Checkbox(
                False, label="Show block weights and prompts", elem_id="loraclr_more", container=False
            )
        for component in (self.chosen, self.more):
            component.do_not_save_to_config = True
        # Pressed by the page's script when the tab is opened: another checkpoint may be loaded by now.
        self.look = gr.Button("…", elem_id="loraclr_look", elem_classes=["loraclr-unseen"])
        self.elsewhere = gr.Textbox(visible=False, elem_id="loraclr_elsewhere")  # the script puts the prompt there
        self.elsewhere.do_not_save_to_config = True
        self.view = gr.State(View())
        self.heading = gr.HTML(_invitation(), elem_id="loraclr_heading")
        with gr.Row(visible=False, elem_id="loraclr_pages") as self.pages:
            self.back = ToolButton("◀", elem_id="loraclr_back")
            self.place = gr.HTML(elem_id="loraclr_place")
            self.on = ToolButton("▶", elem_id="loraclr_on")
        self.rows: list[Any] = []
        self.names: list[Any] = []
        self.facts: list[Any] = []
        self.columns: dict[str, list[Any]] = {field: [] for field in FIELDS}
        for place in range(MOST):
            self._add_row(place)
        self._wire()

    @property
    def fields(self) -> list[Any]:
        """What the user fills in: all trigger words, then all weights, and so on."""
        return [component for column in self.columns.values() for component in column]

    @property
    def written(self) -> list[Any]:
        """What `read` and the like take: what is in sight, what is written there, and what of the other LoRAs."""
        return [self.view, *self.fields]

    @property
    def checked(self) -> list[Any]:
        """The fields in which a row can be wrong, as `seen` takes their values."""
        return [component for field in CHECKED for component in self.columns[field]]

    @property
    def seeing(self) -> dict[str, Any]:
        """What an event needs that calls `seen`."""
        return {
            "inputs": [self.chosen, self.every, self.hidden, self.view, *self.checked],
            "outputs": [self.chosen, self.heading, *self.facts],
            "show_progress": False,
            **AGAIN,
        }

    @property
    def arranged(self) -> list[Any]:
        """What `arranged` fills."""
        pages = [self.pages, self.back, self.place, self.on]
        return [self.view, self.heading, *pages, *self.rows, *self.names, *self.facts, *self.fields]

    def _wire(self) -> None:
        self.chosen.change(fn=arrange, inputs=[self.chosen, *self.written], outputs=self.arranged, show_progress=False)
        for button, step in ((self.back, -1), (self.on, 1)):
            button.click(partial(turned, step), self.written, self.arranged, show_progress=False)
        for happens in (self.every.change, self.hidden.change, self.look.click):
            happens(seen, **self.seeing)
        self.refresh.click(refreshed, **self.seeing)
        for place, said in enumerate(self.facts):
            written = [self.columns[field][place] for field in CHECKED]
            for component in written:
                component.input(
                    partial(checked, place), [self.view, *written], [said], show_progress=False, queue=False
                )
        asked = [self.elsewhere, self.chosen, *self.written]
        self.taken.click(
            fn=take,
            **script_on("loraclrTake", asked),
            inputs=asked,
            outputs=[self.chosen, *self.arranged],
            show_progress=False,
        )
        self.more.change(fn=None, inputs=[self.more], outputs=[], **script("loraclrMore"))

    def _add_row(self, place: int) -> None:
        number = place + 1
        with gr.Row(visible=False, elem_id=f"loraclr_concept_{number}", elem_classes=["loraclr-concept"]) as row:
            self.names.append(gr.HTML(elem_id=f"loraclr_concept_name_{number}", elem_classes=["loraclr-name"]))
            made = {
                "trigger": _text(
                    f"Trigger words of LoRA {number}", f"loraclr_trigger_{number}",
                    "none is noted in the file: write the words that call it", "loraclr-trigger",
                ),
                "weight": gr.Number(
                    1.0, step=0.05, label=f"Weight of LoRA {number}", elem_id=f"loraclr_weight_{number}",
                    show_label=False, container=False, min_width=40,
                ),
                "text_weight": _text(f"Text encoder weight of LoRA {number}", f"loraclr_text_weight_{number}", "same"),
                "kind": gr.Radio(
                    KINDS, value=KINDS[0], label=f"Kind of LoRA {number}", elem_id=f"loraclr_kind_{number}",
                    show_label=False, container=False, min_width=60, elem_classes=["loraclr-kind"],
                ),
            }  # fmt: skip
            with gr.Row(elem_classes=["loraclr-moves"]):
                for sign, what, move in (("↑", "up", "loraclrUp"), ("✕", "remove", "loraclrRemove")):
                    button = ToolButton(sign, elem_id=f"loraclr_{what}_{number}")
                    button.click(
                        fn=None, inputs=[self.chosen], outputs=[self.chosen],
                        **script(f"(chosen) => {move}(chosen, {number})"),
                    )  # fmt: skip
            self.facts.append(gr.HTML(elem_id=f"loraclr_facts_{number}", elem_classes=["loraclr-facts"]))
            made["blocks"] = _text(
                f"Block weights of LoRA {number}", f"loraclr_blocks_{number}",
                "block weights: 17 numbers, or OUT03-OUT05=0.5", "loraclr-extra",
            )  # fmt: skip
            made["prompts"] = _text(
                f"Prompts to look at of LoRA {number}", f"loraclr_prompts_{number}",
                "prompts to look at, one a line, {} stands for the trigger; empty: the usual ones", "loraclr-extra", 2,
            )  # fmt: skip
            made["kind"].input(
                facts.retold, [made["kind"], made["prompts"]], [made["prompts"]], show_progress=False, queue=False
            )
        self.rows.append(row)
        for field, component in made.items():
            component.do_not_save_to_config = True
            self.columns[field].append(component)


def _text(label: str, elem_id: str, placeholder: str, look: str = "", lines: int = 1) -> Any:
    return gr.Textbox(
        label=label, elem_id=elem_id, placeholder=placeholder, elem_classes=[look] if look else None, lines=lines,
        show_label=False, container=False, max_lines=4 * lines - 3, min_width=40,
    )  # fmt: skip


def seen(chosen: list[str], every: bool, hidden: bool, view: View, *written: str) -> list[Any]:
    """What there is to choose from, and what is chosen, as files and checkpoint are now."""
    choices = library.listed(None if every else library.loaded_family(), hidden)
    labelled = library.labelled(chosen or [])
    # A value is sent only if notes have changed: it would make the page ask for all rows again.
    update = gr.update(choices=choices) if labelled == chosen else gr.update(choices=choices, value=labelled)
    return [update, HEADING if chosen else _invitation(), *_about(view.shown, columns(written, CHECKED))]


def refreshed(*asked: Any) -> list[Any]:
    """The same, after another look into the folder."""
    library.refresh()
    return seen(*asked)


def checked(place: int, view: View, *written: str) -> str:
    """What a row says of its LoRA while something is being written into it."""
    return facts.about(view.shown[place], library.loaded_family(), *written)


def arrange(chosen: list[str], view: View, *fields: Any) -> list[Any]:
    """Rows for what is chosen now; a LoRA that was there before keeps what the user wrote.

    The page stays, but for one that has just been chosen it is that one's.
    """
    names, known = _names(chosen), view.written(fields)
    added = [place for place, name in enumerate(names) if name not in known]
    return arranged(names, known, max(added, default=view.first))


def turned(step: int, view: View, *fields: Any) -> list[Any]:
    """Rows for the LoRAs some pages on."""
    return arranged(view.names, view.written(fields), view.first + step * MOST)


def take(prompt: str, chosen: list[str], view: View, *fields: Any) -> list[Any]:
    """Rows for the LoRAs that the prompt names, at its weights; trigger words that stand there already are kept."""
    known = view.written(fields)
    there = set(library.names())
    named = {name: weights for name, weights in library.named_in(prompt or "").items() if name in there}
    if not named:
        gr.Warning(say("The txt2img prompt names no LoRA that is here; its tags look like <lora:name:1>."))
        return [chosen, *arranged(_names(chosen), known)]
    lines = {}
    for name, (weight, text_weight) in named.items():
        trigger, _, _, *rest = known.get(name) or facts.guess(name)
        lines[name] = (trigger, weight, "" if text_weight is None else f"{text_weight:g}", *rest)
    return filled(lines)


def filled(lines: dict[str, Sequence[Any]]) -> list[Any]:
    """The choice of these LoRAs, by name, and rows with these fields."""
    return [library.labelled(list(lines)), *arranged(list(lines), lines)]


def arranged(names: Sequence[str], known: Mapping[str, Sequence[Any]], first: int = 0) -> list[Any]:
    """The rows of these LoRAs from a place on: their own fields where they are known, else what the files tell."""
    view = page_of(names, {name: known.get(name) or facts.guess(name) for name in names}, first)
    shown = view.shown
    fields = in_rows([view.lines[name] for name in shown])
    return [
        view,
        HEADING if names else _invitation(),
        *_pages(view),
        *(gr.update(visible=place < len(shown)) for place in range(MOST)),
        *(facts.title(name) for name in shown),
        *[""] * (MOST - len(shown)),
        *_about(shown, [fields[field] for field in CHECKED]),
        *(value for column in fields.values() for value in column),
    ]


def read(chosen: Sequence[str], view: View, *fields: Any) -> list[job.Row]:
    """What is asked for, in sight or not. Raises ValueError, one sentence that names the LoRA."""
    known, asked = view.written(fields), []
    for name in _names(chosen):
        row = dict(zip(FIELDS, known.get(name) or facts.guess(name), strict=True))
        try:
            text_weight = facts.number(row["text_weight"])
        except ValueError as error:
            raise ValueError(
                say(
                    '{name} has text encoder weight "{weight}": give it a number.',
                    name=name, weight=row["text_weight"],
                )
            ) from error  # fmt: skip
        looked, kind, weights = lines_of(row["prompts"]), row["kind"].lower(), row["blocks"] or ""
        looked = () if looked == prompts.usual(kind) else looked  # slower merges look at more than these
        asked.append(job.Row(name, row["trigger"], row["weight"], text_weight, kind, weights, looked))
    return asked


def _names(chosen: Sequence[str] | None) -> list[str]:
    """The chosen LoRAs by name."""
    return [labels.name_of(label) for label in chosen or []]


def _pages(view: View) -> list[Any]:
    """Which of how many are in sight, and the ways to the others, where there are any."""
    count, last = len(view.names), view.first + len(view.shown)
    told = say("LoRAs {first}–{last} of {count}", first=view.first + 1, last=last, count=count)
    return [
        gr.update(visible=count > MOST),
        gr.update(interactive=view.first > 0),
        f"<p>{escape(told)}</p>",
        gr.update(interactive=last < count),
    ]


def _about(names: Sequence[str], written: Sequence[Sequence[str]]) -> list[str]:
    """For every row what its LoRA is, and what is wrong with it."""
    loaded = library.loaded_family()
    lines = [facts.about(name, loaded, *line) for name, *line in zip(names, *written, strict=False)]
    return lines + [""] * (MOST - len(lines))


def _invitation() -> str:
    """What to do first, where nothing is chosen."""
    if missing := library.missing_checkpoint():
        return NONE.format(folder=escape(missing))
    if library.loaded_name() and library.loaded_family() is None:
        return OTHER
    return EMPTY if library.names() else NOTHING.format(folder=escape(str(library.folder())))
