"""Where a layer's name ends in a key of a LoRA file, and what the rest is: every spelling → one suffix."""

from __future__ import annotations

import re

from loraclr.formats import dora
from loraclr.formats.change import Change

_LOW_RANK = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<kohya>up|down|mid)"
    r"|\.lora_(?P<peft>[AB])(?:\.[^.]+)?"
    r"|[._]lora\.(?P<diffusers>up|down)"
    r"|\.lora_linear_layer\.(?P<linear>up|down)"
    r")\.(?P<kind>weight|bias)"
)
# Whatever comes between the layer's own name and these is the spelling of a low-rank key (`….lora.alpha`).
_BESIDE = re.compile(r"(?P<stem>.+?)(?:[._]lora|\.lora_linear_layer)?\.(?P<suffix>alpha|dora_scale)")
_MAGNITUDE = re.compile(r"(?P<stem>.+?)\.lora_magnitude_vector(\.[^.]+)?(\.weight)?")


def splitter(kinds: tuple[type[Change], ...]):
    """A function that splits a key into stem and suffix, or says None if it ends in nothing that a kind owns.

    Low-rank keys get kohya's suffixes (``lora_up.weight``, ``lora_down.weight``, ``lora_mid.weight``) and
    ``lora_up.bias``, all others keep their own.
    """
    owned = frozenset().union(*(kind.owns | kind.marks for kind in kinds)) | dora.SUFFIXES
    rest = sorted(re.escape(suffix) for suffix in owned)
    other = re.compile(rf"(?P<stem>.+?)\.(?P<suffix>{'|'.join(rest)})")

    def split(key: str) -> tuple[str, str] | None:
        low_rank = _LOW_RANK.fullmatch(key)
        if low_rank:
            side = low_rank["kohya"] or low_rank["diffusers"] or low_rank["linear"]
            side = side or {"A": "down", "B": "up"}[low_rank["peft"]]
            return low_rank["stem"], f"lora_{side}.{low_rank['kind']}"
        magnitude = _MAGNITUDE.fullmatch(key)
        if magnitude:
            return magnitude["stem"], "lora_magnitude_vector"
        match = _BESIDE.fullmatch(key) or other.fullmatch(key)
        return (match["stem"], match["suffix"]) if match else None

    return split
