"""What a LoRA file is, told from its header before anything is merged: its kind, what it is for, and what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from loraclr import outline
from loraclr.keys import Family
from loraclr.lora import LoRA
from loraclr.webui.language import retell, say
from loraclr.webui.surroundings import here

TITLES: dict[Family, str] = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}


@dataclass(frozen=True)
class Card:
    """What is known of a file.

    Attributes:
        lora: its layers, with shapes but without values; None if it cannot be read.
        problem: why it cannot be read, one sentence; "" if it can.
        trigger: the words that most likely call it: the user's activation text, else what the file tells, else "".
        megabytes: its size in units of 2^20 bytes.
    """

    lora: LoRA | None
    problem: str
    trigger: str
    megabytes: float

    @property
    def facts(self) -> str:
        """Its kinds and ranks, family and size."""
        if self.lora is None:
            return f"{self.megabytes:.1f} MB"
        return f"{_kinds(self.lora)} · {TITLES[self.lora.family]} · {self.megabytes:.1f} MB"

    def wrong(self, loaded: Family | None) -> str:
        """What speaks against merging it for a checkpoint of the family that is loaded; "" if nothing does."""
        if self.lora is None:
            return retell(self.problem)
        if loaded is not None and self.lora.family != loaded:
            return say(
                "It is for {family}, but the loaded checkpoint is {loaded}.",
                family=TITLES[self.lora.family], loaded=TITLES[loaded],
            )  # fmt: skip
        return ""

    @property
    def noted(self) -> str:
        """What was not understood of a file that can be read."""
        unused = () if self.lora is None else self.lora.unused
        if not unused:
            return ""
        return say("{count} of its keys are not understood ({first}).", count=len(unused), first=unused[0])


def of(path: Path) -> Card:
    """The card of a file, remembered until it or its notes change."""
    return _card(path, *(_changed(p) for p in (path, path.with_suffix(".json"), path.parent)))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=256)
def _card(path: Path, *_: int) -> Card:
    lora, problem = None, ""
    try:
        lora = outline.load(path)
    except (ValueError, OSError) as error:
        problem = " ".join(str(error).split())
    noted = here().notes(path).get("activation text")
    trigger = noted.strip() if isinstance(noted, str) and noted.strip() else lora.triggers() if lora else ""
    return Card(lora, problem, trigger, path.stat().st_size / 2**20 if path.is_file() else 0.0)


def _kinds(lora: LoRA) -> str:
    """Its kinds of layers, most frequent first, with their ranks: "LoRA rank 4 to 8, LoHa rank 4"."""
    ranks: dict[str, list[int | None]] = {}
    for layer in lora.layers.values():
        ranks.setdefault(layer.format, []).append(layer.rank)
    told = []
    for kind, each in sorted(ranks.items(), key=lambda item: -len(item[1])):
        known = sorted({rank for rank in each if rank is not None})
        span = f"{known[0]}" if len(known) == 1 else f"{known[0]} to {known[-1]}" if known else ""
        told.append(f"{kind} rank {span}" if span else kind)
    return ", ".join(told)


def megabytes(cards: Sequence[Card], rank: int | None, bytes_per_number: int = 2) -> float:
    """The size of the merged file, in units of 2^20 bytes: what of each layer's summed rank the limit leaves."""
    ranks: dict[str, int] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for card in cards:
        for name, layer in (card.lora.layers if card.lora is not None else {}).items():
            rows, columns = layer.size
            if rows is None or columns is None:
                continue  # the base weight decides; such layers are rare
            sizes[name] = rows, columns
            ranks[name] = ranks.get(name, 0) + (layer.rank or min(rows, columns))
    numbers = 0
    for name, (rows, columns) in sizes.items():
        numbers += (rows + columns) * min(ranks[name], rank or ranks[name], rows, columns)
    return numbers * bytes_per_number / 2**20
