"""`inspect` says everything that is in a file, and by name what was not understood."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraclr.__main__ import main
from loraclr.cli.inspect import block_of

TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{}"


def mixed(path: Path) -> Path:
    """A file with several kinds of layers, an embedding, metadata, and two keys that nobody understands."""
    tensors = {
        f"{TEXT}.lora_up.weight": torch.ones(4, 2),
        f"{TEXT}.lora_down.weight": torch.ones(2, 4),
        f"{TEXT}.alpha": torch.tensor(1.0),
        f"{UNET.format('q')}.diff": torch.full((3, 3), 2.0),
        f"{UNET.format('q')}.diff_b": torch.ones(3),
        f"{UNET.format('k')}.lora_up.weight": torch.ones(4, 3),
        f"{UNET.format('k')}.lora_down.weight": torch.ones(3, 4),
        f"{UNET.format('k')}.dora_scale": torch.ones(4, 1),
        "lora_unet_mid_block_attentions_0_proj_in.on_input": torch.tensor(1),
        "lora_unet_mid_block_attentions_0_proj_in.weight": torch.ones(4),
        "bundle_emb.zyk.emb_params": torch.ones(5, 768),
        "odd.key": torch.ones(1),
        f"{TEXT}.strange": torch.ones(1),
    }
    save_file(tensors, path, {"ss_base_model_version": "sd_v1", "ss_network_args": "x" * 300, "ss_other": "1"})
    return path


def test_everything_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(mixed(tmp_path / "mixed.safetensors"))]) == 0
    told = capsys.readouterr().out
    lines = [line.strip() for line in told.splitlines()]
    assert lines[0] == "mixed.safetensors"
    for line in (
        "family    SD 1.x",
        "1 LoRA, rank 2",
        "1 full, 1 with a bias",
        "1 IA3",
        "triggers  zyk",
        "words     zyk: clip_l 5 × 768",
        "metadata  ss_base_model_version: sd_v1",
        "1 more entries",
    ):
        assert any(line in seen for seen in lines), line
    assert "1 LoRA with DoRA, rank 3" in told
    # ΔW of ones(4, 2) @ ones(2, 4) / 2 is ones(4, 4), of length 4; nine twos have length 6.
    assert re.search(r"text encoder +1 layers  ‖ΔW‖ 4\n", told)
    assert re.search(r"IN01 +2 layers  ‖ΔW‖ 6 \(1 depend on the base model\)\n", told)
    assert re.search(r"M00 +1 layers  ‖ΔW‖ unknown \(1 depend on the base model\)\n", told)
    assert told.rstrip().endswith(f"unknown   {TEXT}.strange\n            odd.key")
    assert max(map(len, told.splitlines())) <= 112


def test_sizes_add_up_in_squares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deltas = {part: torch.randn(4, 5) for part in "qkv"}
    save_file({f"{UNET.format(part)}.diff": delta for part, delta in deltas.items()}, tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    expected = math.sqrt(sum(float(delta.square().sum()) for delta in deltas.values()))
    told = capsys.readouterr().out
    assert float(re.search(r"‖ΔW‖ ([\d.]+)", told)[1]) == pytest.approx(expected, rel=1e-3)
    assert "every key was understood" in told and "none are told" in told and "none are bundled" in told


def test_an_edloras_words_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    unet = {f"{path}.lora_up.weight": torch.ones(8, 2), f"{path}.lora_down.weight": torch.ones(2, 768)}
    words = {"<potter1>": torch.ones(16, 768)}
    torch.save({"params": {"unet": unet, "new_concept_embedding": words}}, tmp_path / "x.pth")
    assert main(["inspect", str(tmp_path / "x.pth")]) == 0
    assert "<potter1>: one for each of 16 cross-attention layers, width 768" in capsys.readouterr().out


def test_bad_files_get_a_sentence_each_and_the_good_ones_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = mixed(tmp_path / "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    status = main(["inspect", str(tmp_path / "bad.safetensors"), str(good), str(tmp_path / "gone.safetensors")])
    told = capsys.readouterr()
    assert status == 2
    assert told.out.startswith("good.safetensors\n")
    assert re.fullmatch(r"loraclr: bad\.safetensors is empty; .*\. gone\.safetensors does not exist .*\.\n", told.err)


def test_without_a_file_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 2
    assert "FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "family", "block"),
    [
        (TEXT, "sd1", "text encoder"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "sdxl", "text encoder"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "sdxl", "text encoder 2"),
        (UNET.format("q"), "sd1", "IN01"),
        ("lora_unet_input_blocks_8_1_proj_in", "sdxl", "IN08"),
        ("lora_unet_conv_out", "sd1", "BASE"),
    ],
)
def test_blocks(name: str, family: str, block: str) -> None:
    assert block_of(name, family) == block
