"""What a merge keeps of SDXL's layers, counted on the real shapes: the figures that `solve` and `merging` state."""

from __future__ import annotations

from math import prod

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import architectures

from loraclr import keys
from loraclr.capture import is_cross_kv, same_inputs
from loraclr.changes import is_text
from loraclr.merging import HELD

USUAL = ("attn", "_ff_", "proj_in", "proj_out")


@pytest.fixture(scope="module")
def inputs() -> dict[str, int]:
    """Layer name → its number of inputs, of everything in SDXL that has a Gram matrix."""
    parts = {"unet": architectures.diffusers_unet("sdxl")}
    for part, *size in architectures.TEXT_ENCODERS["sdxl"]:
        parts[part] = architectures.transformers_text_encoder(*size)
    shapes = {
        keys.kohya_name(part, path, "sdxl"): shape for part, each in parts.items() for path, shape in each.items()
    }
    return {name: prod(shape[1:]) for name, shape in shapes.items() if len(shape) > 1}


def gigabytes(inputs: dict[str, int], names: list[str]) -> float:
    """Of the Gram matrices in float32, one for layers that read the same."""
    return sum(4 * inputs[group[0]] ** 2 for group in same_inputs(names)) / 1e9


def test_gram_matrices_of_sdxl(inputs: dict[str, int]) -> None:
    text = [name for name in inputs if is_text(name)]
    pictures = [name for name in inputs if not is_text(name) and not is_cross_kv(name)]
    usual = [name for name in pictures if any(part in name for part in USUAL)]
    rest = [name for name in pictures if name not in set(usual)]
    assert (len(usual), len(rest), len(text)) == (582, 72, 265)
    assert sum(map(is_cross_kv, inputs)) == 140
    assert gigabytes(inputs, usual) == pytest.approx(8.7, abs=0.05)
    assert gigabytes(inputs, rest) == pytest.approx(15.7, abs=0.06)
    assert gigabytes(inputs, text) == pytest.approx(4.5, abs=0.05)
    assert gigabytes(inputs, usual) * 1e9 < HELD, "most merges draw each picture once"
