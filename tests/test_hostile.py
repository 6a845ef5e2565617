"""Whatever is in a file, it is merged or refused in one sentence that names it, and then nothing is written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from loraclr import files, formats, methods
from loraclr.cli.inspect import described
from loraclr.concept import Concept
from loraclr.formats import dora
from loraclr.lora import LoRAFormatError, parse
from loraclr.result import write

BLOCK = "lora_unet_down_blocks_0_attentions_0"
QUERY, NORM, CONV = f"{BLOCK}_transformer_blocks_0_attn1_to_q", f"{BLOCK}_norm", f"{BLOCK}_proj_in"
STEMS = (QUERY, "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", NORM, CONV, "odd")
SUFFIXES = sorted(
    frozenset().union(*(kind.owns | kind.marks for kind in formats.KINDS), dora.SUFFIXES, ["alpha", "lora_up.bias"])
)
GOOD = {f"{QUERY}.lora_up.weight": torch.ones(8, 2), f"{QUERY}.lora_down.weight": torch.ones(2, 8)}
MODULES = {QUERY: nn.Linear(8, 8), NORM: nn.GroupNorm(2, 8), CONV: nn.Conv2d(8, 8, 1)}
METADATA = st.sampled_from(
    ["{}", "[]", "{", "[" * 5000, '{"a": {"b": ' + "9" * 5000 + "}}", '{"a": {"b": "c"}}', '"x"']
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    sizes = st.lists(st.sampled_from([8, 2, 1, 3, 0]), max_size=4)
    filled = torch.full(draw(sizes), draw(st.sampled_from([1.0, 0.0, -2.0, math.nan, math.inf, 6e4])))
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool)
    kind = draw(st.sampled_from(kinds))
    return filled.to(kind) if kind.is_floating_point else filled.nan_to_num(1.0).clamp(-9, 9).to(kind)


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Tensor]:
    """Up to six tensors under keys that mean something, perhaps beside a layer that is in order."""
    names = st.builds("{}.{}".format, st.sampled_from(STEMS), st.sampled_from(SUFFIXES))
    words = st.builds("bundle_emb.{}".format, st.sampled_from(["x.emb_params", "x", "", ".y", "../x.clip_l"]))
    odd = draw(st.dictionaries(names | words, tensors(), min_size=1, max_size=6))
    return (GOOD if draw(st.booleans()) else {}) | odd


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents(), told=METADATA, modules=st.sampled_from([None, MODULES]))
@example(content=GOOD | {f"{QUERY}.diff_b": torch.ones(3)}, told="{}", modules=None)
@example(content={f"{NORM}.w_norm": torch.ones(2, 4)}, told="{}", modules=None)
@example(content=GOOD, told="[" * 5000, modules=None)
def test_a_file_is_merged_or_refused(
    tmp_path: Path, content: dict[str, Tensor], told: str, modules: dict | None
) -> None:
    path = tmp_path / "bad.safetensors"
    keys = ("ss_tag_frequency", "ss_network_args", "lora_adapter_metadata")
    save_file({key: tensor.clone() for key, tensor in content.items()}, path, dict.fromkeys(keys, told))
    output = tmp_path / "merged.safetensors"
    output.unlink(missing_ok=True)
    try:
        lora = files.load(path)
        described(lora)
        merge = methods.combine([Concept(lora, "")] * 2, "sum", modules=modules)
        write(merge, output, torch.float32)
    except ValueError as error:
        assert "bad" in str(error) or "layer lora_" in str(error), (
            "it names the file or, where it is written, the layer"
        )
        assert "\n" not in str(error) and not output.exists()
    else:
        merged = files.load(output)
        assert merged.layers.keys() >= {QUERY} if content.keys() >= GOOD.keys() else merged.layers
        assert any("not understood" in note for note in merge.notes) == bool(lora.unused)


def test_tags_without_end_are_no_tags(tmp_path: Path) -> None:
    for told in ("[" * 5000, json.dumps({"a": {"b": 1}}).replace("1", "9" * 5000)):
        assert parse(GOOD, {"ss_tag_frequency": told}, "x").triggers() == ""


def test_values_whose_sum_is_too_large_are_read() -> None:
    large = GOOD | {f"{QUERY}.lora_up.weight": torch.full((8, 2), 3e38)}
    assert parse(large, {}, "x").layers[QUERY].up.max() == torch.tensor(3e38)
    for value in (math.inf, -math.inf, math.nan):
        large[f"{QUERY}.lora_up.weight"][0, 0] = value
        with pytest.raises(LoRAFormatError, match="holds NaN or infinite values"):
            parse(large, {}, "x")
