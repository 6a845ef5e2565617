"""The chosen LoRAs, and a row for each: what it is, what is wrong with it, and what the user says about it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from loraclr import blocks, prompts
from loraclr.keys import Family
from loraclr.webui import card, job, labels, library
from loraclr.webui.card import Card
from loraclr.webui.components import FormRow, ToolButton, script
from loraclr.webui.language import retell, say
from loraclr.webui.settings import lines_of
from loraclr.webui.surroundings import here

MOST = 32  # rows of the form: gradio 3 cannot add components to a page
KINDS = ("Subject", "Style")
#: What a row asks for, and its value where there is no LoRA.
FIELDS = {"trigger": "", "weight": 1.0, "text_weight": "", "kind": KINDS[0], "blocks": "", "prompts": ""}
#: Those in which numbers are written as words, which may make no sense.
CHECKED = ("text_weight", "blocks")

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
        self.shown = gr.State([])
        self.heading = gr.HTML(_invitation(), elem_id="loraclr_heading")
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
    def checked(self) -> list[Any]:
        """The fields in which a row can be wrong, as `_facts` takes their values."""
        return [component for field in CHECKED for component in self.columns[field]]

    @property
    def seeing(self) -> dict[str, Any]:
        """What an event needs that calls `seen`."""
        return {
            "inputs": [self.chosen, self.every, self.hidden, *self.checked],
            "outputs": [self.chosen, self.heading, *self.facts],
            "show_progress": False,
        }

    @property
    def arranged(self) -> list[Any]:
        """What `arranged` fills."""
        return [self.shown, self.heading, *self.rows, *self.names, *self.facts, *self.fields]

    def _wire(self) -> None:
        self.chosen.change(
            fn=arrange, inputs=[self.chosen, self.shown, *self.fields], outputs=self.arranged, show_progress=False
        )
        for happens in (self.every.change, self.hidden.change, self.look.click):
            happens(seen, **self.seeing)
        self.refresh.click(refreshed, **self.seeing)
        for place, facts in enumerate(self.facts):
            written = [self.columns[field][place] for field in CHECKED]
            for component in written:
                component.input(
                    partial(checked, place), [self.chosen, *written], [facts], show_progress=False, queue=False
                )
        self.taken.click(
            fn=take,
            **script("loraclrTake"),
            inputs=[self.elsewhere, self.chosen, self.shown, *self.fields],
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
                        **script(f"(chosen) => {move}(chosen, {place})"),
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
                retold, [made["kind"], made["prompts"]], [made["prompts"]], show_progress=False, queue=False
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


def seen(chosen: list[str], every: bool, hidden: bool, *written: str) -> list[Any]:
    """What there is to choose from, and what is chosen, as files and checkpoint are now."""
    choices = library.listed(None if every else library.loaded_family(), hidden)
    labelled = library.labelled(chosen or [])
    # A value is sent only if notes have changed: it would make the page ask for all rows again.
    update = gr.update(choices=choices) if labelled == chosen else gr.update(choices=choices, value=labelled)
    names = _names(chosen)
    return [update, HEADING if chosen else _invitation(), *_facts(names, _columns(written, CHECKED))]


def refreshed(*asked: Any) -> list[Any]:
    """The same, after another look into the folder."""
    library.refresh()
    return seen(*asked)


def checked(place: int, chosen: list[str], *written: str) -> str:
    """What a row says of its LoRA while something is being written into it."""
    return _fact(_names(chosen)[place], library.loaded_family(), *written)


def templates(kind: str, looked: str = "") -> str:
    """The prompts to look at as a row has them: what was written, else the usual ones of this kind."""
    return looked if looked.strip() else "\n".join(prompts.usual(kind.lower()))


def retold(kind: str, looked: str) -> str:
    """The prompts after a choice of kind: the usual ones follow it, others stay."""
    return templates(kind, "" if any(lines_of(looked) == prompts.usual(k.lower()) for k in KINDS) else looked)


def arrange(chosen: list[str], shown: list[str], *fields: Any) -> list[Any]:
    """Rows for what is chosen now; a LoRA that was there before keeps what the user wrote."""
    return arranged(_names(chosen), dict(zip(shown, zip(*_columns(fields), strict=True), strict=False)))


def take(prompt: str, chosen: list[str], shown: list[str], *fields: Any) -> list[Any]:
    """Rows for the LoRAs that the prompt names, at its weights; trigger words that stand there already are kept."""
    known = dict(zip(shown, zip(*_columns(fields), strict=True), strict=False))
    there = set(library.names())
    named = {name: weights for name, weights in library.named_in(prompt or "").items() if name in there}
    if not named:
        gr.Warning(say("The txt2img prompt names no LoRA that is here; its tags look like <lora:name:1>."))
        return [chosen, *arranged(_names(chosen), known)]
    lines = {}
    for name, (weight, text_weight) in named.items():
        trigger, _, _, *rest = known.get(name) or _guess(name)
        lines[name] = (trigger, weight, "" if text_weight is None else f"{text_weight:g}", *rest)
    return filled(lines)


def filled(lines: dict[str, Sequence[Any]]) -> list[Any]:
    """The choice of these LoRAs, by name, and rows with these fields."""
    return [library.labelled(list(lines)), *arranged(list(lines), lines)]


def arranged(chosen: list[str], known: dict[str, Sequence[Any]]) -> list[Any]:
    """The rows of what is chosen, by name: its own fields where they are known, else what the files tell."""
    chosen = chosen[:MOST]
    lines = [known.get(name) or _guess(name) for name in chosen]
    lines += [tuple(FIELDS.values())] * (MOST - len(chosen))
    columns = dict(zip(FIELDS, zip(*lines, strict=True), strict=True))
    return [
        chosen,
        HEADING if chosen else _invitation(),
        *(gr.update(visible=place < len(chosen)) for place in range(MOST)),
        *(_title(name) for name in chosen),
        *[""] * (MOST - len(chosen)),
        *_facts(chosen, [columns[field] for field in CHECKED]),
        *(value for column in columns.values() for value in column),
    ]


def read(chosen: Sequence[str], *fields: Any) -> list[job.Row]:
    """What the rows ask for. Raises ValueError, one sentence that names the LoRA."""
    chosen = [labels.name_of(label) for label in chosen]
    if len(chosen) > MOST:
        raise ValueError(
            say(
                "{count} LoRAs are chosen; the tab merges up to {most} at a time, the API any number.",
                count=len(chosen),
                most=MOST,
            )
        )
    rows = []
    for name, *values in zip(chosen, *_columns(fields), strict=False):
        row = dict(zip(FIELDS, values, strict=True))
        try:
            text_weight = _number(row["text_weight"])
        except ValueError as error:
            raise ValueError(
                say(
                    '{name} has text encoder weight "{weight}": give it a number.',
                    name=name, weight=row["text_weight"],
                )
            ) from error  # fmt: skip
        looked, kind, weights = lines_of(row["prompts"]), row["kind"].lower(), row["blocks"] or ""
        looked = () if looked == prompts.usual(kind) else looked  # slower merges look at more than these
        rows.append(job.Row(name, row["trigger"], row["weight"], text_weight, kind, weights, looked))
    return rows


def card_of(name: str) -> Card:
    """What the file of a LoRA is."""
    try:
        return card.of(library.path_of(name))
    except ValueError as error:
        return Card(None, str(error), "", 0.0, None)


def _names(chosen: list[str] | None) -> list[str]:
    """The LoRAs that have a row, by name."""
    return [labels.name_of(label) for label in chosen or []][:MOST]


def _columns(values: Sequence[Any], fields: Collection[str] = FIELDS) -> list[Sequence[Any]]:
    """The values of each field for all rows."""
    return [values[MOST * place : MOST * (place + 1)] for place in range(len(fields))]


def _guess(name: str) -> tuple[Any, ...]:
    """What a LoRA that was just chosen is filled in with."""
    trigger = card_of(name).trigger
    kind = KINDS["style" in f"{name} {trigger}".casefold()]
    return tuple((FIELDS | {"trigger": trigger, "kind": kind, "prompts": templates(kind)}).values())


def _invitation() -> str:
    """What to do first, where nothing is chosen."""
    if missing := library.missing_checkpoint():
        return NONE.format(folder=escape(missing))
    if library.loaded_name() and library.loaded_family() is None:
        return OTHER
    return EMPTY if library.names() else NOTHING.format(folder=escape(str(library.folder())))


def _title(name: str) -> str:
    thumbnail = card_of(name).thumbnail
    return f'{_picture(thumbnail)}<span title="{escape(name)}">{escape(name)}</span>'


def _picture(file: Path | None) -> str:
    if file is None:
        return ""
    address = f"./sd_extra_networks/thumb?filename={quote(file.as_posix())}&mtime={file.stat().st_mtime}"
    return f'<img src="{escape(address)}" alt="">'


def _facts(chosen: Sequence[str], written: Sequence[Sequence[str]]) -> list[str]:
    """For every row what the LoRA is, and what is wrong with it."""
    loaded = library.loaded_family()
    lines = [_fact(name, loaded, *line) for name, *line in zip(chosen, *written, strict=False)]
    return lines + [""] * (MOST - len(lines))


def _fact(name: str, loaded: Family | None, text_weight: str, weights: str) -> str:
    found = card_of(name)
    told = [("", " · ".join(filter(None, (library.folder_of(name), found.facts))))]
    for wrong in (found.wrong(loaded), _not_a_number(text_weight), _no_block_weights(weights, found)):
        told.append(("loraclr-wrong", wrong))
    told.append(("loraclr-noted", found.noted))
    return "".join(f'<small class="{look}">{escape(sentence)}</small>' for look, sentence in told if sentence)


def _not_a_number(text_weight: str) -> str:
    try:
        _number(text_weight)
    except ValueError:
        return say('The text encoder weight "{weight}" is no number.', weight=text_weight)
    return ""


def _number(text_weight: Any) -> float | None:
    """A text encoder's weight as it is written; None for an empty field. Raises ValueError."""
    number = float(text_weight) if str(text_weight or "").strip() else None
    if number is not None and not math.isfinite(number):
        raise ValueError
    return number


def _no_block_weights(weights: str, found: Card) -> str:
    """Why the block weights make no sense for a LoRA, "" if they do."""
    if found.lora is not None and (weights or "").strip():
        try:
            blocks.block_weights(weights, found.lora.family)
        except ValueError as error:
            return retell(str(error))
    return ""
