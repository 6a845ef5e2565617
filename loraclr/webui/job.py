"""The merge as a job of the webui: from the filled-in form to a file in the LoRA folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules import progress, shared

from loraclr import files
from loraclr.hosts.a1111 import A1111, report
from loraclr.merging import Cancelled, Concept, Merge, Settings, merge, write
from loraclr.prompts import Kind
from loraclr.webui import library

# Jobs that were interrupted while another one was running before them.
_called_off: set[str] = set()


@dataclass(frozen=True)
class Row:
    """One chosen LoRA as the form has it; `weight` is None if the user left it empty."""

    name: str
    trigger: str
    weight: float | None
    kind: Kind


@dataclass(frozen=True)
class Done:
    """A finished merge and its file."""

    merge: Merge
    path: Path


def run(task: str, rows: Sequence[Row], name: str, replace: bool, settings: Settings) -> Done:
    """Merge the rows' LoRAs and list the result; inside the webui's queue only.

    Raises ValueError or OSError, one sentence for the user, or Cancelled. Then no file was written.
    """
    if task in _called_off:
        _called_off.discard(task)
        raise Cancelled("The merge was interrupted.")
    if len(rows) < 2:
        raise ValueError(
            "Choose two or more LoRAs to merge." if rows else "No LoRA is chosen yet: choose two or more above."
        )
    path = library.target(name, [row.name for row in rows], replace)
    concepts = []
    for row in rows:
        if row.weight is None:
            raise ValueError(f"{row.name} has no weight; 1 is its usual strength.")
        if not row.trigger.strip():
            raise ValueError(f"{row.name} has no trigger words yet: write the words that call it into its row.")
        concepts.append(
            Concept(files.load(library.path_of(row.name)), row.trigger.strip(), float(row.weight), kind=row.kind)
        )
    host = A1111()
    merged = merge(host, concepts, settings, report)
    write(merged, path, overwrite=replace)
    host.publish(path)
    return Done(merged, path)


def interrupt(task: str) -> None:
    """Stop the job of this id, running or still waiting, and no other one."""
    if task and progress.current_task == task:
        shared.state.interrupt()
    elif task in progress.pending_tasks:
        _called_off.add(task)
