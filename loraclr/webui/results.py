"""The result's panel: what was written, the prompt that uses it, how much was kept, pictures, figures and downloads."""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from safetensors import safe_open

from loraclr import report
from loraclr.alignment import ATTENTION, FEED_FORWARD, KINDS, OTHER, TEXT, WORDS
from loraclr.memory import CARD, PROCESS
from loraclr.report import Gallery, Shot, Table
from loraclr.result import Merge
from loraclr.webui import pictures, titles
from loraclr.webui.components import script
from loraclr.webui.job import Done
from loraclr.webui.language import retell, say, shown
from loraclr.webui.pictures import Comparison
from loraclr.webui.surroundings import OUTCOMES, here

WELCOME = (
    '<div class="loraclr-note">'
    "<p>The result appears here: a LoRA file in your LoRA folder, and the prompt that uses it.</p>"
    "<p>Nothing is trained on pictures. The merge looks at what each LoRA does to the loaded checkpoint and finds the "
    "one LoRA that does all of it, so load the checkpoint that you mean to use.</p></div>"
)
#: From what share of its effect on a concept counts as kept, and as weaker. A choice, not a measurement.
_GOOD, _FAIR = 0.8, 0.6
#: Of the last merges, for a page that is reloaded; gradio gives out copies of its own. Removed with the program.
_reports: list[tempfile.TemporaryDirectory] = []


class Panel:
    """The components; `outputs` are what a finished job fills, in the order of `filled` and `failed`."""

    def __init__(self) -> None:
        with gr.Group(elem_id="loraclr_result_panel"):
            self.result = gr.HTML(WELCOME, elem_id="loraclr_result")
        with gr.Column(visible=False, elem_id="loraclr_use") as self.use:
            self.made = gr.State({})  # the result's name, and the trigger words of its LoRAs
            self.subset = gr.CheckboxGroup([], label="Concepts in the prompt", elem_id="loraclr_subset")
            self.prompt = gr.Textbox(
                label="Prompt that uses it", lines=2, show_copy_button=True, interactive=True, elem_id="loraclr_prompt"
            )
            self.send = gr.Button("Send to txt2img", elem_id="loraclr_send", visible=here().txt2img)
            self.pictures = gr.HTML(elem_id="loraclr_pictures")
            self.downloads = gr.File(label="Report and recipe", file_count="multiple", elem_id="loraclr_downloads")
            with gr.Accordion("Details", open=False, elem_id="loraclr_details"):
                self.details = gr.HTML(elem_id="loraclr_figures")
        for component in (self.prompt, self.subset, self.downloads):
            component.do_not_save_to_config = True
        self.subset.change(
            fn=_prompt, inputs=[self.made, self.subset], outputs=[self.prompt], show_progress=False, queue=False
        )
        self.send.click(fn=None, inputs=[self.prompt], outputs=[], **script("loraclrSend"))

    @property
    def outputs(self) -> list[Any]:
        shown = [self.use, self.made, self.subset, self.prompt, self.pictures]
        return [*shown, self.details, self.downloads, self.result]


def filled(done: Done) -> list[Any]:
    """The panel of a finished merge."""
    triggers = {concept.lora.name: concept.trigger for concept in done.merge.concepts}
    made = {"name": done.path.stem, "triggers": triggers}
    return [
        gr.update(visible=True),
        made,
        gr.update(choices=list(triggers), value=list(triggers)),
        done.merge.prompt(done.path.stem),
        _gallery(done.comparison),
        "".join(_html(table) for table in tables(done)),
        [str(path) for path in downloads(done)],
        summary(done),
    ]


def unfilled() -> list[Any]:
    """The panel without an earlier merge's prompt; its last part, what to say instead, is left out."""
    return [gr.update(visible=False), *[gr.update()] * 6]


def _prompt(made: dict[str, Any], names: Sequence[str]) -> str:
    """The prompt for some of the concepts, in the merge's order."""
    words = [words for name, words in made.get("triggers", {}).items() if name in names]
    return f"<lora:{made.get('name', '')}:1> {', '.join(words)}".rstrip()


def summary(done: Done) -> str:
    """What was made, and how well it does what each LoRA does alone."""
    merge, size = done.merge, done.path.stat().st_size / 2**20
    bled = [_bled(shares) for shares in done.comparison.crosstalk] if done.comparison else []
    bled += [None] * (len(merge.concepts) - len(bled))
    lines = [
        _bar(concept.lora.name, concept.trigger, _kept(merge, concept.lora.name), share)
        for concept, share in zip(merge.concepts, bled, strict=True)
    ]
    notes = [retell(note) for note in merge.notes]
    if done.comparison is not None and not done.comparison.complete:
        notes.append(say("The drawing ended early; the file is complete."))
    note = "".join(f"<p>{escape(line)}</p>" for line in notes)
    ready = say(
        "{name} is ready: {count} LoRAs in one, {ranks}, {size} MB.",
        name=done.path.stem, count=len(merge.concepts), ranks=_ranks(merge), size=f"{size:.1f}",
    )  # fmt: skip
    return f"""<div class="loraclr-note loraclr-done">
<p>{_bold(ready, done.path.stem)}</p>
<p class="loraclr-path">{escape(str(done.path))}</p>{note}
<div class="loraclr-bars">{"".join(lines)}</div></div>"""


def _bold(sentence: str, name: str) -> str:
    """A sentence as HTML, with a name in it set off."""
    before, found, after = sentence.partition(name)
    return f"{escape(before)}<b>{escape(found)}</b>{escape(after)}"


def _ranks(merge: Merge) -> str:
    """The ranks of a merge's layers in words."""
    ranks = sorted({layer.rank for layer in merge.layers.values() if layer.rank is not None})
    if not ranks:
        return say("norm layers only")
    if len(ranks) == 1:
        return say("rank {rank}", rank=ranks[0])
    return say("ranks {least} to {most}", least=ranks[0], most=ranks[-1])


def _about_kept() -> str:
    return say("How much of the LoRA's effect on the model's predictions the merged one has, on a picture kept aside")


def _about_bled() -> str:
    return say("The largest share of another LoRA's effect in this concept's pictures; stacked LoRAs have about 100 %")


def _kept(merge: Merge, name: str) -> float | None:
    """The share of a LoRA's effect that the merge has; None for a method that did not look at the model."""
    return max(0.0, 1 - merge.missed[name][1]) if name in merge.missed else None


def _bled(shares: Sequence[float]) -> float | None:
    """The largest share of another LoRA's effect in a concept's pictures."""
    return max((abs(share) for share in shares if not math.isnan(share)), default=None)


def _bar(name: str, trigger: str, kept: float | None, bled: float | None) -> str:
    """A concept's line: its name and words, and a bar with a verdict for what was kept and for what bled in."""
    line = f'<div class="loraclr-of"><b>{escape(name)}</b> <code>{escape(trigger)}</code></div>'
    if kept is not None:
        look, verdict = (
            ("good", say("{share} kept", share=f"{kept:.0%}")) if kept >= _GOOD
            else ("fair", say("{share} kept: weaker", share=f"{kept:.0%}")) if kept >= _FAIR
            else ("poor", say("{share} kept: weak", share=f"{kept:.0%}"))
        )  # fmt: skip
        line += _share(kept, look, verdict, _about_kept())
    if bled is not None:
        look = "good" if bled <= 1 - _GOOD else "fair" if bled <= 1 - _FAIR else "poor"
        line += _share(bled, look, say("{share} bled in", share=f"{bled:.0%}"), _about_bled())
    return line


def _share(share: float, look: str, verdict: str, about: str) -> str:
    return (
        f'<div class="loraclr-share {look}" title="{escape(about)}">'
        f'<span><i style="width:{min(share, 1):.0%}"></i></span> {escape(verdict)}</div>'
    )


def _gallery(comparison: Comparison | None) -> str:
    """The pictures, each row the same seeds before and after."""
    if comparison is None or not (comparison.concepts or comparison.scenes):
        return ""
    parts = []
    for title, before, rows in _galleries(comparison):
        ways = _ways(before, rows)
        lines = "".join(
            f'<div class="loraclr-label"><b>{escape(row.label)}</b> <small>{escape(row.prompt)}</small></div>'
            + "".join(f"<div>{_images(drawn)}</div>" for drawn in _drawn(row))
            for row in rows
        )
        head = "".join(f"<div>{escape(way)}</div>" for way in ways)
        look = f"loraclr-pictures loraclr-{len(ways)}-ways"
        parts.append(f'<h4>{escape(title)}</h4><div class="{look}">{head}{lines}</div>')
    return "".join(parts)


def _galleries(comparison: Comparison) -> list[tuple[str, str, Sequence[pictures.Row]]]:
    every = [
        (say("Each concept, with the same seeds"), say("its own LoRA"), comparison.concepts),
        (say("Two in one picture, with the same seeds"), say("the LoRAs stacked"), comparison.scenes),
    ]
    return [part for part in every if part[2]]


def _ways(before: str, rows: Sequence[pictures.Row]) -> list[str]:
    """In what ways the rows were drawn, in the order of `_drawn`."""
    return [before, say("the merged LoRA"), *([say("their weighted sum")] if rows[0].by_sum else [])]


def _drawn(row: pictures.Row) -> list[Sequence[Image.Image]]:
    return [row.before, row.after, *([row.by_sum] if row.by_sum else [])]


def _images(drawn: Sequence[Image.Image]) -> str:
    return "".join(f'<img src="{report.inline(picture, 90)}" alt="">' for picture in drawn)


def tables(done: Done) -> list[Table]:
    """The figures behind the summary."""
    merge, found = done.merge, []
    if merge.missed:
        rows = [(name, f"{1 - closed:.1%}", f"{1 - polished:.1%}") for name, (closed, polished) in merge.missed.items()]
        columns = ("LoRA", say("Closed form"), say("After the polish"))
        found.append(Table(say("Effect kept"), columns, rows, f"{_about_kept()}."))
    if done.comparison and done.comparison.crosstalk:
        names = [concept.lora.name for concept in merge.concepts]
        rows = [
            (name, *("–" if math.isnan(share) else f"{share:.0%}" for share in shares))
            for name, shares in zip(names, done.comparison.crosstalk, strict=False)
        ]
        note = say(
            "How much of the column's LoRA shows in pictures of the row's concept; stacked LoRAs have about 100 %."
        )
        found.append(Table(say("Bled in"), (say("Concept"), *names), rows, note))
    kinds = [kind for kind in KINDS if any(kind in shares for shares in merge.alignment.values())]
    if kinds:
        rows = [
            (name, *(f"{shares[kind]:.0%}" if kind in shares else "–" for kind in kinds))
            for name, shares in merge.alignment.items()
        ]
        note = say(
            "How near the merged layers' outputs come to the LoRA's own, where it is at work: 100 % is the same, "
            "0 % as far off as without any LoRA."
        )
        found.append(Table(say("Layer by layer"), ("LoRA", *map(_kind, kinds)), rows, note))
    if merge.overall:
        found.append(_objective_table(merge))
    found.append(_ranks_table(merge))
    seconds = [(_stage(stage), f"{time:.1f} s") for stage, time in merge.seconds.items()]
    whole = (say("Altogether"), f"{sum(merge.seconds.values()):.1f} s")
    found.append(Table(say("Time taken"), (say("Stage"), say("Time")), [*seconds, whole]))
    if merge.memory:
        rows = [(_owner(what), f"{size / 2**30:.2f} GB") for what, size in merge.memory.items()]
        columns = (say("Memory"), say("At most"))
        note = say("The graphics card during this merge; the program since its start, whatever it has done.")
        found.append(Table(say("Memory needed"), columns, rows, note))
    told = [(titles.title(name), shown(value)) for name, value in asdict(merge.settings).items()]
    found.append(
        Table(
            say("Settings of the merge"),
            (say("Setting"), say("Value")),
            [(say("Method of merging"), merge.method), *told],
        )
    )
    return found


def _objective_table(merge: Merge) -> Table:
    """What the paper minimises, and where its push acts, by kind of layer and altogether."""
    parts = [(_kind(name), part) for name, part in merge.objective.items()]
    rows = [
        (name, str(part.layers), f"{part.start:.4g}", f"{part.merged:.4g}", f"{part.active:.0%}")
        for name, part in [*parts, (say("Altogether"), merge.overall)]
    ]
    columns = (
        say("Kind of layer"), say("Layers"), say("Objective before"), say("Objective after"), say("Hinge active"),
    )  # fmt: skip
    note = say(
        "Equation 5 of the paper, a distance for each token, summed over the layers: before without any LoRA, after "
        "with the merged one. Hinge active: the share of outputs that lie nearer than the margin to another concept's, "
        "on which its negative term pushes. The method loraclr minimises the positive term only."
    )
    return Table(say("The paper's objective"), columns, rows, note)


def _owner(name: str) -> str:
    """Whose memory it is, in words."""
    return {CARD: say("Graphics card"), PROCESS: say("Program")}.get(name, name)


def _ranks_table(merge: Merge) -> Table:
    """How many layers have which rank, and where a rank cut them, what is left of the one that lost most."""
    counts = Counter(layer.rank or 0 for layer in merge.layers.values())
    columns, cells = [say("Rank"), say("Layers")], {rank: [str(number)] for rank, number in sorted(counts.items())}
    if merge.kept:
        columns.append(say("Kept at least"))
        for rank, row in cells.items():
            shares = [merge.kept.get(name, 1.0) for name, layer in merge.layers.items() if (layer.rank or 0) == rank]
            row.append(f"{min(shares):.1%}")
    rows = [(str(rank) if rank else say("Norm layers"), *row) for rank, row in cells.items()]
    return Table(say("Ranks"), columns, rows)


def _stage(name: str) -> str:
    """A stage of a merge in words."""
    words = {
        "text": say("Text encoder"), "capture": say("Looking at pictures"), "solve": say("Closed form"),
        "polish": say("Final polish"), "merge": say("Merge"),
    }  # fmt: skip
    return words.get(name, name)


def _kind(name: str) -> str:
    """A kind of layer in words."""
    words = {
        TEXT: say("Text encoder"), WORDS: say("Words to pictures"), ATTENTION: say("Attention"),
        FEED_FORWARD: say("Feed-forward"), OTHER: say("Other layers"),
    }  # fmt: skip
    return words[name]


def _html(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    note = f"<p class='loraclr-path'>{escape(table.note)}</p>" if table.note else ""
    return f"<h4>{escape(table.title)}</h4>{note}<table><tr>{head}</tr>{body}</table>"


def page(done: Done) -> str:
    """The report: one HTML document that needs nothing else."""
    names = ", ".join(concept.lora.name for concept in done.merge.concepts)
    lead = say("{names} in one LoRA. Prompt: {prompt}", names=names, prompt=done.merge.prompt(done.path.stem))
    galleries = [
        Gallery(
            title,
            [f"{what} · {number + 1}" for what in _ways(before, rows) for number in range(len(rows[0].before))],
            [(row.label, row.prompt, [Shot(p) for drawn in _drawn(row) for p in drawn]) for row in rows],
            say("The same seed has the same number."),
        )
        for title, before, rows in (_galleries(done.comparison) if done.comparison else [])
    ]
    return report.page(done.path.stem, lead, [*galleries, *tables(done)])


def downloads(done: Done) -> list[Path]:
    """The report, and the recipe as the merged file holds it, as files in a temporary folder of their own."""
    _reports.append(tempfile.TemporaryDirectory(prefix="loraclr-", ignore_cleanup_errors=True))
    while len(_reports) > OUTCOMES:
        _reports.pop(0).cleanup()
    folder = Path(_reports[-1].name)
    files = [folder / f"{done.path.stem}.html", folder / f"{done.path.stem} recipe.json"]
    files[0].write_text(page(done), encoding="utf-8")
    with safe_open(done.path, framework="pt") as file:
        recipe = json.loads(file.metadata()["loraclr.recipe"])
    files[1].write_text(json.dumps(recipe, indent=2, ensure_ascii=False), encoding="utf-8")
    return files
