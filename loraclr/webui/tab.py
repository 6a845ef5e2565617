"""The tab: choose LoRAs, say which words call them, merge, and read off the prompt that uses the result."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr
import torch
from modules import errors
from modules.call_queue import wrap_gradio_gpu_call
from modules.ui_common import create_refresh_button
from modules.ui_components import FormRow

from loraclr.merging import Cancelled, Settings
from loraclr.webui import job, library

MOST = 32  # rows of the form: gradio 3 cannot add components to a page
SPEEDS = ("Fast", "Balanced", "Best")
KINDS = ("Subject", "Style")
USUAL = Settings()

HEADING = """<div class="loraclr-columns">
<span>LoRA</span><span>Trigger words</span><span>Weight</span><span>Kind</span></div>"""
EMPTY = "<p>Choose two or more LoRAs. Each keeps its own trigger words, and all of them share one file.</p>"
WELCOME = """<div class="loraclr-note">
<p>The result appears here: a LoRA file in your LoRA folder, and the prompt that uses it.</p>
<p>Nothing is trained on pictures. The merge looks at what each LoRA does to the loaded checkpoint and finds the one
LoRA that does all of it, so load the checkpoint that you mean to use.</p></div>"""


def build() -> gr.Blocks:
    """The tab's contents."""
    with gr.Blocks(analytics_enabled=False) as tab:
        with gr.Row(equal_height=False):
            with gr.Column(variant="compact", scale=3, elem_id="loraclr_form"):
                concepts = _Concepts()
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
                speed = gr.Radio(
                    SPEEDS,
                    value="Fast",
                    label="Speed",
                    info="Fast suits most merges. "
                    "Balanced and Best come closer to each LoRA alone, in about 3 and 10 times the time.",
                    elem_id="loraclr_speed",
                )
                advanced = _advanced()
            with gr.Column(variant="compact", scale=2, elem_id="loraclr_side"):
                with gr.Row(elem_id="loraclr_buttons"):
                    start = gr.Button("Merge", variant="primary", elem_id="loraclr_merge")
                    stop = gr.Button("Interrupt", elem_id="loraclr_interrupt")
                with gr.Column(elem_id="loraclr_results"):
                    with gr.Group(elem_id="loraclr_result_panel"):
                        result = gr.HTML(WELCOME, elem_id="loraclr_result")
                    with gr.Column(visible=False, elem_id="loraclr_use") as use:
                        prompt = gr.Textbox(
                            label="Prompt that uses it",
                            lines=2,
                            show_copy_button=True,
                            interactive=True,
                            elem_id="loraclr_prompt",
                        )
                        prompt.do_not_save_to_config = True
                        send = gr.Button("Send to txt2img", elem_id="loraclr_send")
        task = gr.Textbox(visible=False, elem_id="loraclr_task")
        task.do_not_save_to_config = True

        start.click(
            fn=wrap_gradio_gpu_call(_merge, extra_outputs=[gr.update(), gr.update(visible=False), gr.update()]),
            _js="loraclrMerge",
            inputs=[task, name, replace, speed, *advanced, concepts.chosen, *concepts.fields],
            outputs=[concepts.chosen, use, prompt, result],
            show_progress=False,
        )
        stop.click(
            fn=job.interrupt, _js="loraclrInterrupt", inputs=[task], outputs=[], show_progress=False, queue=False
        )
        send.click(fn=None, _js="loraclrSend", inputs=[prompt], outputs=[])
    return tab


class _Concepts:
    """The chosen LoRAs, and a row for each: its name, trigger words, weight and kind."""

    def __init__(self) -> None:
        with FormRow(elem_id="loraclr_choice"):
            self.chosen = gr.Dropdown(
                library.names(),
                value=[],
                multiselect=True,
                label="LoRAs to merge",
                info="Type to search.",
                elem_id="loraclr_loras",
            )
            self.chosen.do_not_save_to_config = True
            create_refresh_button(self.chosen, library.refresh, lambda: {"choices": library.names()}, "loraclr_refresh")
        self.shown = gr.State([])
        self.heading = gr.HTML(EMPTY, elem_id="loraclr_heading")
        self.rows, self.names, self.triggers, self.weights, self.kinds = [], [], [], [], []
        for place in range(MOST):
            self._add_row(place)
        self.chosen.change(
            fn=self._arrange,
            inputs=[self.chosen, self.shown, *self.fields],
            outputs=[self.shown, self.heading, *self.rows, *self.names, *self.fields],
            show_progress=False,
        )

    @property
    def fields(self) -> list[Any]:
        """What the user fills in: all trigger words, then all weights, then all kinds."""
        return [*self.triggers, *self.weights, *self.kinds]

    def _add_row(self, place: int) -> None:
        number = place + 1
        with gr.Row(visible=False, elem_id=f"loraclr_concept_{number}", elem_classes=["loraclr-concept"]) as row:
            self.names.append(gr.HTML(elem_id=f"loraclr_concept_name_{number}", elem_classes=["loraclr-name"]))
            self.triggers.append(
                gr.Textbox(
                    label=f"Trigger words of LoRA {number}",
                    placeholder="the words that call it",
                    elem_id=f"loraclr_trigger_{number}",
                    show_label=False,
                    container=False,
                    max_lines=1,
                    scale=4,
                    min_width=140,
                )
            )
            self.weights.append(
                gr.Number(
                    1.0,
                    step=0.05,
                    label=f"Weight of LoRA {number}",
                    elem_id=f"loraclr_weight_{number}",
                    show_label=False,
                    container=False,
                    scale=0,
                    min_width=80,
                )
            )
            self.kinds.append(
                gr.Dropdown(
                    KINDS,
                    value=KINDS[0],
                    label=f"Kind of LoRA {number}",
                    elem_id=f"loraclr_kind_{number}",
                    show_label=False,
                    container=False,
                    scale=0,
                    min_width=110,
                )
            )
        self.rows.append(row)
        for field in (self.triggers[-1], self.weights[-1], self.kinds[-1]):
            field.do_not_save_to_config = True

    @staticmethod
    def _arrange(chosen: list[str], shown: list[str], *fields: Any) -> list[Any]:
        """Rows for what is chosen now; a LoRA that was there before keeps what the user wrote."""
        chosen = (chosen or [])[:MOST]
        written = {name: values for name, *values in zip(shown, *_thirds(fields), strict=False)}
        lines = [written.get(name) or _guess(name) for name in chosen]
        spare = MOST - len(chosen)
        return [
            chosen,
            HEADING if chosen else EMPTY,
            *(gr.update(visible=place < len(chosen)) for place in range(MOST)),
            *(f'<span title="{escape(name)}">{escape(name)}</span>' for name in chosen),
            *[""] * spare,
            *(trigger for trigger, _, _ in lines),
            *[""] * spare,
            *(weight for _, weight, _ in lines),
            *[1.0] * spare,
            *(kind for _, _, kind in lines),
            *[KINDS[0]] * spare,
        ]


def _guess(name: str) -> tuple[str, float, str]:
    """Trigger words, weight and kind of a LoRA that was just chosen."""
    trigger = library.trigger_of(name)
    return trigger, 1.0, KINDS["style" in f"{name} {trigger}".casefold()]


def _thirds(fields: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Trigger words, weights and kinds of all rows."""
    return fields[:MOST], fields[MOST : 2 * MOST], fields[2 * MOST :]


def _advanced() -> list[Any]:
    """The method's own settings, in the order that `_settings` reads them."""
    with gr.Accordion("Advanced", open=False, elem_id="loraclr_advanced"):
        closed = gr.Checkbox(
            USUAL.speed == "closed",
            label="Closed form only: quickest, without the polish that brings the concepts to full strength",
            elem_id="loraclr_closed",
        )
        with FormRow():
            rank = gr.Slider(
                0,
                256,
                value=USUAL.rank or 0,
                step=1,
                label="Largest rank of the merged LoRA",
                info="0: exact, the sum of the LoRAs' ranks. Smaller makes a smaller file.",
                elem_id="loraclr_rank",
            )
            neutral = gr.Slider(
                0,
                1,
                value=USUAL.neutral,
                step=0.05,
                label="Protection of everything else",
                info="How much the merged LoRA must leave prompts without any trigger word as they are.",
                elem_id="loraclr_neutral",
            )
        with FormRow():
            steps = gr.Slider(
                1,
                50,
                value=USUAL.steps,
                step=1,
                label="Sampling steps looked at",
                info="Denoising steps of each picture that the LoRAs are watched in.",
                elem_id="loraclr_steps",
            )
            size = gr.Slider(
                0,
                1024,
                value=USUAL.size or 0,
                step=64,
                label="Picture size looked at",
                info="Width and height in pixels; 0: the checkpoint's own. Smaller needs less memory.",
                elem_id="loraclr_size",
            )
        with FormRow():
            guidance = gr.Slider(
                1, 15, value=USUAL.guidance, step=0.5, label="CFG scale looked at", elem_id="loraclr_guidance"
            )
            ridge = gr.Number(USUAL.ridge, label="Ridge λ of the closed form", elem_id="loraclr_ridge")
            seed = gr.Number(USUAL.seed, label="Seed of the merge", precision=0, elem_id="loraclr_seed")
    return [closed, rank, neutral, steps, size, guidance, ridge, seed]


def _settings(
    speed: str,
    closed: bool,
    rank: float,
    neutral: float,
    steps: float,
    size: float,
    guidance: float,
    ridge: float | None,
    seed: float | None,
) -> Settings:
    """The form's settings. Raises ValueError, one sentence."""
    if ridge is None or ridge <= 0:
        raise ValueError("The ridge λ must be a number above 0, 0.001 for example.")
    return Settings(
        speed="closed" if closed else speed.lower(),
        rank=int(rank) or None,
        neutral=neutral,
        ridge=ridge,
        steps=int(steps),
        guidance=guidance,
        size=int(size) or None,
        seed=int(seed or 0),
    )


def _merge(task: str, name: str, replace: bool, speed: str, *rest: Any) -> list[Any]:
    """The Merge button: the chosen LoRAs' list, the prompt's panel, the prompt, and what to say about it."""
    advanced, chosen, fields = rest[:8], rest[8] or [], rest[9:]
    try:
        if len(chosen) > MOST:
            raise ValueError(f"{len(chosen)} LoRAs are chosen; the tab merges up to {MOST} at a time.")
        rows = [
            job.Row(lora, trigger, weight, kind.lower())
            for lora, trigger, weight, kind in zip(chosen, *_thirds(fields), strict=False)
        ]
        done = job.run(task, rows, name, replace, _settings(speed, *advanced))
    except Cancelled:
        return _failed("The merge was interrupted; no file was written.", "loraclr-note")
    except torch.cuda.OutOfMemoryError:
        errors.report("LoRACLR Merge ran out of memory", exc_info=True)
        return _failed("The graphics card ran out of memory; choose a smaller picture size under Advanced.")
    except (ValueError, OSError) as error:
        return _failed(str(error))
    return [
        gr.update(choices=library.names()),
        gr.update(visible=True),
        done.merge.prompt(done.path.stem),
        _summary(done),
    ]


def _failed(sentence: str, look: str = "loraclr-error") -> list[Any]:
    """Nothing was written: say why, and show no prompt of an earlier merge."""
    return [gr.update(), gr.update(visible=False), gr.update(), f"<div class='{look}'>{escape(sentence)}</div>"]


def _summary(done: job.Done) -> str:
    """What was made, and how well it does what each LoRA does alone."""
    size, rank = done.path.stat().st_size / 2**20, done.merge.ranks
    kept = "".join(
        f"<tr><td>{escape(concept.lora.name)}</td><td><code>{escape(concept.trigger)}</code></td>"
        f"<td>{max(0, 1 - done.merge.missed[concept.lora.name][1]):.0%}</td></tr>"
        for concept in done.merge.concepts
    )
    about = "How much of the LoRA's effect on the model's predictions the merged one has, on steps kept aside"
    return f"""<div class="loraclr-note loraclr-done">
<p><b>{escape(done.path.stem)}</b> is ready: {len(done.merge.concepts)} LoRAs in one, {rank}, {size:.1f} MB.</p>
<p class="loraclr-path">{escape(str(done.path))}</p>
<table><tr><th>LoRA</th><th>Trigger words</th><th title="{escape(about)}">Effect kept</th></tr>{kept}</table></div>"""
