"""Blocks of a Stable Diffusion UNet, and LoRAs with another strength in each of them (block weights).

The users of block weights write a list of numbers whose length tells the layout: for SD 1.x and 2.x 17 (blocks with
attention) or 26 (all), for SDXL 12 or 20. The first number, BASE, is for the text encoder and whatever is in no block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from loraclr.capture import Changes
from loraclr.keys import Family


def _named(inward: Sequence[int], outward: Sequence[int]) -> tuple[str, ...]:
    return ("BASE", *(f"IN{place:02}" for place in inward), "MID", *(f"OUT{place:02}" for place in outward))


_SD = {17: _named((1, 2, 4, 5, 7, 8), range(3, 12)), 26: _named(range(12), range(12))}
#: Family → number of weights → the blocks that they are for.
LAYOUTS: dict[Family, dict[int, tuple[str, ...]]] = {
    "sd1": _SD,
    "sd2": _SD,
    "sdxl": {12: _named((4, 5, 7, 8), range(6)), 20: _named(range(9), range(9))},
}


def block_of(name: str) -> str:
    """The block of a layer by its canonical name: BASE, IN00-IN11, MID or OUT00-OUT11."""
    if match := re.match(r"lora_unet_(input|output)_blocks_(\d+)_", name):
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"
    if re.match(r"lora_unet_mid(dle)?_block_", name):
        return "MID"
    if name.startswith("lora_unet_conv_in"):
        return "IN00"
    match = re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets|downsamplers|upsamplers)_(\d+)", name)
    if match is None:
        return "BASE"
    # In the original layout a level has three places: two layers and the way down, or three layers, the last with the
    # way up.
    place = 2 if match[3].endswith("samplers") else int(match[4])
    return f"IN{1 + 3 * int(match[2]) + place:02}" if match[1] == "down" else f"OUT{3 * int(match[2]) + place:02}"


def weights_of(numbers: Sequence[float], family: Family) -> dict[str, float]:
    """Numbers as users write them → weight by block.

    Raises:
        ValueError: the list has no length that is known for this family.
    """
    layouts = LAYOUTS[family]
    if len(numbers) not in layouts:
        known = " or ".join(map(str, layouts))
        raise ValueError(f"{len(numbers)} block weights are given, but {family.upper()} has {known}.")
    return dict(zip(layouts[len(numbers)], map(float, numbers), strict=True))


def weighted(changes: Changes, weights: Mapping[str, float]) -> Changes:
    """A LoRA with each block at its own weight, counted once; a block without one stays as it is, weight 0 drops it."""
    factors = {name: weights.get(block_of(name), 1.0) for name in changes}
    return {name: (up * factors[name], down) for name, (up, down) in changes.items() if factors[name]}
