"""The merge as a job: from a checked form to a file in the LoRA folder, and pictures of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from loraclr import blocks, files, methods, preview
from loraclr.concept import Concept
from loraclr.hosts import Cancelled, Host
from loraclr.plan import Settings, work
from loraclr.prompts import Kind
from loraclr.result import Merge, make_plain, note_bled, write
from loraclr.webui import library, pictures, target
from loraclr.webui.language import retell, say
from loraclr.webui.pictures import Comparison
from loraclr.webui.surroundings import here

# Jobs that were interrupted while another one was running before them.
_called_off: set[str] = set()


@dataclass(frozen=True)
class Row:
    """One chosen LoRA as the form has it.

    Attributes:
        weight: for the UNet; None if the user left it empty.
        text_weight: for the text encoder; None: as `weight`.
        blocks: block weights as a user writes them (see `loraclr.blocks`), "" for none.
        prompts: what to look at, `{}` standing for the trigger; empty for the usual ones.
    """

    name: str
    trigger: str = ""
    weight: float | None = 1.0
    text_weight: float | None = None
    kind: Kind = "subject"
    blocks: str = ""
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """Everything that a merge is asked for, by the tab or by the API.

    Attributes:
        name: of the result; "" for one that is made up.
        density: share of the weights that the methods which drop some keep.
        draw: whether to draw pictures to compare afterwards.
        against_sum: whether to draw these by the weighted sum of the LoRAs, too.
        plain: whether to leave out changes of biases and norm layers, which not every program loads.
        separate: whether to write the LoRAs' embeddings beside the file, not into it.
    """

    rows: Sequence[Row]
    name: str = ""
    replace: bool = False
    method: str = "loraclr"
    settings: Settings = field(default_factory=Settings)
    density: float = 0.5
    draw: bool = True
    against_sum: bool = False
    plain: bool = False
    separate: bool = False


@dataclass(frozen=True)
class Done:
    """A finished merge, its file, and the pictures if any were asked for."""

    merge: Merge
    path: Path
    comparison: Comparison | None = None


def run(task: str, order: Order) -> Done:
    """Merge the rows' LoRAs and list the result; inside the queue only.

    Raises ValueError or OSError, one sentence for the user, or Cancelled. Then no LoRA was written. Once it is, nothing
    is raised: an interruption only ends the drawing, and so does an error, which the log and the merge's notes tell.
    """
    if task in _called_off:
        _called_off.discard(task)
        raise Cancelled("The merge was interrupted.")
    path = check(order)
    method = methods.METHODS[order.method]
    host = here().host()
    concepts = [concept_of(row) for row in order.rows]
    share = _share_of_merge(host, concepts, order)

    def tell(stage: str, fraction: float, left: float | None = None) -> None:
        here().report(retell(stage), share * fraction, left)

    if method.needs_model:
        merged = methods.merge(host, concepts, order.method, order.settings, tell)
    else:
        options = methods.Options(order.settings.rank, order.density, seed=order.settings.seed)
        # Some kinds of LoRA depend on the model's weights; those of another family do without, or say so.
        modules = host.layers() if concepts[0].lora.family == host.family else None
        merged = methods.combine(concepts, order.method, options, tell, modules)
        merged.checkpoint = None if modules is None else host.checkpoint
    if order.plain:
        make_plain(merged)
    write(merged, path, dtype=_dtype(), overwrite=order.replace, bundle=not order.separate)
    done = Done(merged, path)

    def drawing(what: str, done: float) -> None:
        here().report(retell(what), share + (1 - share) * done)

    try:
        host.publish(path)
        # A merge by weights alone may be for another checkpoint than the loaded one.
        if order.draw and merged.family == host.family and merged.layers.keys() <= host.layers().keys():
            done = Done(merged, path, pictures.compare(host, merged, order.settings, drawing, order.against_sum))
            note_bled(path, bled(done))
            _preview(done.comparison, path)
            host.publish(path)
    except Exception as error:  # noqa: BLE001 (whatever it is, the file is there)
        here().log("LoRACLR Merge wrote the file, but failed after that")
        merged.notes.append(say("The file is complete, but what follows it failed: {reason}", reason=reason(error)))
    return done


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def check(order: Order) -> Path:
    """Where the result will be, if all that can be told without opening a file is right.

    Raises ValueError, one sentence for the user.
    """
    if len(order.rows) < 2:
        raise ValueError(
            say("Choose two or more LoRAs to merge.")
            if order.rows
            else say("No LoRA is chosen yet: choose two or more above.")
        )
    if order.method not in methods.METHODS:
        raise ValueError(f"There is no method {order.method}: choose one of {', '.join(methods.METHODS)}.")
    path = target.path_for(order.name, [row.name for row in order.rows], order.replace)
    for row in order.rows:
        library.path_of(row.name)
        if row.weight is None:
            raise ValueError(say("{name} has no weight; 1 is its usual strength.", name=row.name))
        if not row.trigger.strip():
            raise ValueError(
                say("{name} has no trigger words yet: write the words that call it into its row.", name=row.name)
            )
    return path


def concept_of(row: Row) -> Concept:
    """A row's LoRA, read. Raises ValueError, one sentence that names it."""
    lora = files.load(library.path_of(row.name))
    weights = None
    if row.blocks.strip():
        try:
            weights = blocks.block_weights(row.blocks, lora.family)
        except ValueError as error:
            raise ValueError(f"{row.name}: {retell(str(error))}") from error
    return Concept(lora, row.trigger.strip(), float(row.weight), row.text_weight, row.kind, row.prompts, blocks=weights)


def _dtype() -> torch.dtype:
    """The number format that the user's settings ask for."""
    chosen = here().option("loraclr_precision", "fp16")
    return {"bf16": torch.bfloat16, "fp32": torch.float32}.get(chosen, torch.float16)


def _share_of_merge(host: Host, concepts: Sequence[Concept], order: Order) -> float:
    """How much of the whole work is the merge; the rest is the pictures."""
    if not order.draw:
        return 1.0
    method = methods.METHODS[order.method]
    if not method.needs_model:
        return 0.1
    drawing = pictures.rows_through_unet(concepts, order.settings, order.against_sum)
    return 1 - drawing / (drawing + work(host, concepts, replace(order.settings, **method.settings)))


def bled(done: Done) -> dict[str, dict[str, float]]:
    """How much of the other LoRAs showed in the pictures of each concept that was drawn."""
    names, shares = [concept.lora.name for concept in done.merge.concepts], done.comparison
    return {
        name: {other: share for other, share in zip(names, line, strict=True) if not math.isnan(share)}
        for name, line in zip(names, shares.crosstalk if shares else (), strict=False)
    }


def _preview(comparison: Comparison, path: Path) -> None:
    """A picture for the LoRA's card: its first concepts as the merged file draws them."""
    drawn = [row.after[0] for row in comparison.concepts[: preview.MOST]]
    if drawn and here().option("loraclr_preview", True):
        preview.save(preview.sheet(drawn), path)


def interrupt(task: str) -> None:
    """Stop the job of this id, running or still waiting, and no other one."""
    if task and here().runs(task):
        here().interrupt()
    elif here().waits(task):
        _called_off.add(task)
