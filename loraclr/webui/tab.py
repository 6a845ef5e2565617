"""The tab: choose LoRAs, say which words call them, merge, and read off the prompt that uses the result."""

from __future__ import annotations

import time
from html import escape
from typing import Any

import gradio as gr
import torch

from loraclr.hosts import Cancelled
from loraclr.webui import card, facts, history, job, labels, results, rows, settings, target
from loraclr.webui.components import FormRow, script, script_on
from loraclr.webui.language import retell, say
from loraclr.webui.surroundings import here


def build() -> gr.Blocks:
    """The tab's contents."""
    with gr.Blocks(analytics_enabled=False) as tab:
        with gr.Row(equal_height=False):
            with gr.Column(variant="compact", scale=3, elem_id="loraclr_form"):
                chosen = rows.Rows()
                name, replace, note = _output()
                form = settings.Form()
                history.History(chosen, form)
            with gr.Column(variant="compact", scale=2, elem_id="loraclr_side"):
                with gr.Row(elem_id="loraclr_buttons"):
                    start = gr.Button("Merge", variant="primary", elem_id="loraclr_merge")
                    stop = gr.Button("Interrupt", elem_id="loraclr_interrupt")
                with gr.Column(elem_id="loraclr_results"):
                    panel = results.Panel()
        task = gr.Textbox(visible=False, elem_id="loraclr_task")
        task.do_not_save_to_config = True
        # Pressed by the page's script: fetches what a job has told a page that is gone.
        restore = gr.Button("…", elem_id="loraclr_restore", elem_classes=["loraclr-unseen"])

        asked = [task, name, replace, *form.fields, chosen.chosen, *chosen.written]
        start.click(
            fn=here().queued(_merge, results.unfilled()),
            **script_on("loraclrMerge", asked),
            inputs=asked,
            outputs=panel.outputs,
            show_progress=False,
        ).then(rows.seen, **chosen.seeing)
        stop.click(
            fn=job.interrupt,
            **script("loraclrInterrupt"),
            inputs=[task],
            outputs=[],
            show_progress=False,
            queue=False,
        )
        restore.click(
            fn=_restored,
            **script("loraclrRestore"),
            inputs=[task],
            outputs=panel.outputs,
            show_progress=False,
            queue=False,
        )
        noted = [name, replace, form.rank, chosen.chosen]
        for component in noted:
            component.change(fn=_note, inputs=noted, outputs=[note], show_progress=False)
    return tab


def _output() -> tuple[Any, Any, Any]:
    """What the result is called, and what is to be said about that."""
    with FormRow(elem_id="loraclr_output"):
        name = gr.Textbox(
            label="Name of the merged LoRA",
            placeholder="left empty: named after the LoRAs in it",
            elem_id="loraclr_name",
            max_lines=1,
            scale=4,
        )
        replace = gr.Checkbox(
            False, label="Replace an existing file", elem_id="loraclr_replace", scale=1, min_width=160
        )
    return name, replace, gr.HTML(elem_id="loraclr_note")


def _note(name: str, replace: bool, rank: Any, chosen: list[str]) -> str:
    """What will be written, or why it cannot be."""
    chosen = [labels.name_of(label) for label in chosen or []]
    try:
        path = target.path_for(name or "", chosen, replace)
        limit = settings.rank_of(rank)
    except ValueError as error:
        return f'<small class="loraclr-wrong">{escape(str(error))}</small>'
    if not chosen:
        return ""
    size = card.megabytes([facts.card_of(lora) for lora in chosen], limit if isinstance(limit, int) else None)
    about = {"file": path.name, "size": f"{size:.1f}"}
    told = say("{file}, at most {size} MB", **about) if limit == "auto" else say("{file}, about {size} MB", **about)
    return f"<small>{escape(told)}</small>"


def _merge(task: str, *asked: Any) -> list[Any]:
    """The Merge button; returns the result's panel, with a mark by which the page sees whose result it shows."""
    *rest, said = _merged(task, *asked)
    return [*rest, f'<i hidden data-task="{escape(task or "")}"></i>{said}']


def _merged(task: str, name: str, replace: bool, *rest: Any) -> list[Any]:
    count = len(settings.FIELDS)
    asked, chosen, written = rest[:count], rest[count] or [], rest[count + 1 :]
    try:
        order = job.Order(rows.read(chosen, *written), name, replace, **settings.read(*asked))
        done = job.run(task, order)
    except Cancelled:
        return _failed(say("The merge was interrupted; no file was written."), "loraclr-note")
    except torch.cuda.OutOfMemoryError:
        here().log("LoRACLR Merge ran out of memory")
        return _failed(say("The graphics card ran out of memory; choose a smaller picture size under Advanced."))
    except (ValueError, OSError) as error:
        return _failed(retell(str(error)))
    try:
        return results.filled(done)
    except Exception as error:  # noqa: BLE001 (whatever it is, the file is there)
        here().log("LoRACLR Merge could not show its result")
        why = job.reason(error)
        told = say("{file} is written, but its result cannot be shown: {reason}", file=done.path.name, reason=why)
        return _failed(told, "loraclr-note")


def _restored(task: str) -> list[Any]:
    """What a job has returned, once it has ended, for a page that the answer has not reached."""
    while here().runs(task) or here().waits(task):
        time.sleep(0.2)
    found = here().outcome(task)
    return [gr.update()] * (len(results.unfilled()) + 1) if found is None else list(found)


def _failed(sentence: str, look: str = "loraclr-error") -> list[Any]:
    """There is nothing to be shown: say why, and show no prompt of an earlier merge."""
    return [*results.unfilled(), f"<div class='{look}'>{escape(sentence)}</div>"]
