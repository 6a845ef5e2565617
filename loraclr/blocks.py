"""Block weights: a weight per block of the model, named and ordered as sd-webui-lora-block-weight users know them.

BASE is the text encoder, IN, M00 and OUT are the UNet's original ("compvis") blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from loraclr.families import Family
from loraclr.keys import compvis_unet_path


def _numbered(side: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{side}{number:02}" for number in numbers)


# How many weights a user writes → the blocks they are for, in order. 26 is every block of SD 1.x and 2.x, 20 of SDXL;
# 17 and 12 are the blocks that have attention, which is all that an ordinary LoRA of the family changes.
BLOCKS: dict[int, tuple[str, ...]] = {
    26: ("BASE", *_numbered("IN", *range(12)), "M00", *_numbered("OUT", *range(12))),
    20: ("BASE", *_numbered("IN", *range(9)), "M00", *_numbered("OUT", *range(9))),
    17: ("BASE", *_numbered("IN", 1, 2, 4, 5, 7, 8), "M00", *_numbered("OUT", *range(3, 12))),
    12: ("BASE", *_numbered("IN", 4, 5, 7, 8), "M00", *_numbered("OUT", *range(6))),
}
_COUNTS: dict[Family, tuple[int, ...]] = {"sd1": (17, 26), "sd2": (17, 26), "sdxl": (12, 20, 26)}
_TITLE: dict[Family, str] = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}


def block(name: str, family: Family = "sd1") -> str:
    """The block that a layer belongs to, by its canonical name (see `loraclr.keys`).

    BASE also holds the few layers around the UNet's blocks: its time and label embeddings and its output.
    """
    path = (compvis_unet_path(name, family) or "").split(".")
    match path:
        case ["input_blocks", number, *_]:
            return f"IN{int(number):02}"
        case ["middle_block", *_]:
            return "M00"
        case ["output_blocks", number, *_]:
            return f"OUT{int(number):02}"
    return "BASE"


def block_weights(weights: str | Sequence[float] | Mapping[str, float], family: Family = "sd1") -> dict[str, float]:
    """A weight for every one of the 26 blocks, from what a user writes.

    Either the numbers of a preset in its order (17 or 26 for SD 1.x and 2.x; 12, 20 or 26 for SDXL), where a block that
    the preset lacks gets 0 as in that extension, or one number for all blocks, or blocks by name, ``OUT03=0.5
    IN04-IN08=0``, where the others keep 1; later ones win. Raises ValueError, one sentence for the user.
    """
    if isinstance(weights, Mapping):
        return _named(list(weights.items()))
    if isinstance(weights, str):
        text = weights.strip().strip(",")
        if not text:
            raise ValueError("The block weights are empty; leave the field out or write one number per block.")
        if "=" in text or ":" in text:
            return _named(_assignments(text))
        weights = [_number(word) for word in re.split(r"[\s,;]+", text)]
    numbers = [_number(weight) for weight in weights]
    if len(numbers) == 1:
        return dict.fromkeys(BLOCKS[26], numbers[0])
    if len(numbers) not in _COUNTS[family]:
        counts = ", ".join(str(count) for count in _COUNTS[family][:-1])
        raise ValueError(
            f"{len(numbers)} block weights were given, but {_TITLE[family]} takes {counts} or {_COUNTS[family][-1]}."
        )
    return dict.fromkeys(BLOCKS[26], 0.0) | dict(zip(BLOCKS[len(numbers)], numbers, strict=True))


def _assignments(text: str) -> list[tuple[str, str]]:
    """``A=1, B-C: 0.5`` → [(A, 1), (B-C, 0.5)]."""
    words = re.split(r"[\s,;]+", re.sub(r"\s*([=:-])\s*(?=\S)", r"\1", text))
    pairs = []
    for word in words:
        name, sign, number = re.match(r"([^=:]*)([=:]?)(.*)", word).groups()
        if not sign or not name:
            raise ValueError(f"{word!r} is no block weight; write it like OUT03=0.5.")
        pairs.append((name, number))
    return pairs


def _named(pairs: Sequence[tuple[str, str | float]]) -> dict[str, float]:
    result = dict.fromkeys(BLOCKS[26], 1.0)
    for name, weight in pairs:
        result |= dict.fromkeys(_range(name), _number(weight))
    return result


def _range(name: str) -> tuple[str, ...]:
    """The blocks of a name or of a range of names, ``IN04-OUT03``, in either direction."""
    order = BLOCKS[26]
    ends = [{"MID": "M00"}.get(end, end) for end in name.strip().upper().split("-")]
    unknown = [end for end in ends if end not in order]
    if unknown or len(ends) > 2:
        raise ValueError(f"{name!r} is no block; the blocks are BASE, IN00 to IN11, M00 and OUT00 to OUT11.")
    first, last = sorted(order.index(end) for end in (ends[0], ends[-1]))
    return order[first : last + 1]


def _number(weight: str | float) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{weight!r} is no block weight; write a number such as 0.5.")
    return number
