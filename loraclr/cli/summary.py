"""What a finished merge is said to be: file, how well each LoRA is kept, figures, and the prompt to use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraclr.cli.progress import clock

if TYPE_CHECKING:
    from loraclr.result import Merge


def summary(merge: Merge, output: Path) -> str:
    """What was written, how well each LoRA is kept, and the prompt to use."""
    size = f"{output.stat().st_size / 1e6:.1f} MB"
    many = f"{len(merge.concepts)} LoRA{'s' if len(merge.concepts) > 1 else ''}"
    lines = [f"Wrote {output}: {many}, {merge.ranks}, {size}, in {clock(sum(merge.seconds.values()))}."]
    for name, (_, missed) in merge.missed.items():
        lines.append(f"  {name}: {max(0.0, 1 - missed):.0%} of its effect kept".replace("%", " %"))
    if merge.kept:
        worst = min(merge.kept, key=merge.kept.get)
        mean, least = 100 * sum(merge.kept.values()) / len(merge.kept), 100 * merge.kept[worst]
        lines.append(
            f"  The rank keeps {mean:.1f} % of a layer's change on average, {least:.1f} % in the worst ({worst})."
        )
    lines += measured(merge.figures())
    return "\n".join([*lines, *merge.notes, f"Prompt: {merge.prompt(output.stem)}"])


def measured(figures: Mapping[str, Any]) -> list[str]:
    """The objective and the memory of `loraclr.result.Merge.figures`, also as an API has sent them."""
    lines = []
    if whole := figures.get("objective_overall"):
        lines.append(
            f"  The paper's objective over {whole['layers']} layers: {whole['start']:.3g} without a LoRA, "
            f"{whole['merged']:.3g} with the merged one; "
            f"its negative term acts on {100 * whole['active']:.0f} % of the outputs."
        )
    if memory := figures.get("peak_bytes"):
        peaks = ", ".join(f"{what} {size / 2**30:.1f} GB" for what, size in memory.items())
        lines.append(f"  Most memory in use: {peaks}.")
    return lines
