"""Files that PEFT and diffusers write: ΔW is what PEFT itself merges into each layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loraclr import files, keys
from loraclr.formats import DoRA

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

TARGETS = ["to_q", "to_out.0", "proj_in", "conv1"]


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        layers_per_block=2,
        attention_head_dim=4,
        cross_attention_dim=8,
    )


def scrambled(model: nn.Module) -> nn.Module:
    """Every trained tensor set to something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Weights by canonical name."""
    return {
        keys.kohya_name("unet", path): module.weight.detach().clone()
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False),
    "rslora": peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=TARGETS, init_lora_weights=False),
    "dora": peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=TARGETS, init_lora_weights=False),
    "biased": peft.LoraConfig(
        r=4, lora_alpha=2, lora_bias=True, target_modules=TARGETS[1:], init_lora_weights=False
    ),
    "patterns": peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False,
        rank_pattern={"conv1": 2}, alpha_pattern={"down_blocks.1.attentions.0.proj_in": 7},
    ),
    "loha": peft.LoHaConfig(r=3, alpha=2, target_modules=TARGETS, init_weights=False),
    "loha tucker": peft.LoHaConfig(
        r=3, alpha=2, target_modules=TARGETS, init_weights=False, use_effective_conv2d=True
    ),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, init_weights=False),
    "lokr both": peft.LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, init_weights=False, decompose_both=True, use_effective_conv2d=True
    ),
    "lokr whole": peft.LoKrConfig(r=16, alpha=3, target_modules=TARGETS, init_weights=False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_deltas_are_what_peft_merges(name: str, unet: nn.Module, tmp_path) -> None:
    """A folder that PEFT saves: the scale lies in adapter_config.json beside the file."""
    before = weights(unet)
    biases = {
        keys.kohya_name("unet", p): m.bias for p, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    model = scrambled(peft.get_peft_model(copy.deepcopy(unet), copy.deepcopy(CONFIGS[name])))
    model.save_pretrained(tmp_path)
    lora = files.load(tmp_path / "adapter_model.safetensors")
    assert lora.unused == () and len(lora.layers) > 50

    merged = model.merge_and_unload()
    after, seen = weights(merged), 0
    for path, module in merged.named_modules():
        layer = keys.kohya_name("unet", path)
        if layer not in lora.layers or not isinstance(module, nn.Linear | nn.Conv2d):
            continue  # a list of modules may share its name with the first of them
        change, expected = lora.layers[layer], after[layer] - before[layer]
        assert (change.delta(before[layer]) - expected).norm() < 1e-5 * (expected.norm() + before[layer].norm())
        assert expected.norm() > 1e-3 * before[layer].norm()
        assert isinstance(change, DoRA) == (name == "dora")
        if name == "biased" and biases[layer] is not None:
            torch.testing.assert_close(change.bias_delta(biases[layer]), module.bias - biases[layer])
        seen += 1
    assert seen == len(lora.layers)
    assert {layer for layer in after if not torch.equal(after[layer], before[layer])} == set(lora.layers)


def test_a_dora_that_diffusers_saves(unet: nn.Module, tmp_path) -> None:
    model = copy.deepcopy(unet)
    before = weights(model)
    model.add_adapter(copy.deepcopy(CONFIGS["dora"]))
    scrambled(model)
    from diffusers.training_utils import _collate_lora_metadata

    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(model),
        safe_serialization=True,
        **_collate_lora_metadata({"unet": model}),
    )
    lora = files.load(tmp_path / "pytorch_lora_weights.safetensors")
    assert lora.unused == ()
    model.fuse_lora()
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            layer = keys.kohya_name("unet", path)
            expected = module.base_layer.weight.detach() - before[layer]
            found = lora.layers[layer].delta(before[layer])
            assert (found - expected).norm() < 1e-5 * (expected.norm() + before[layer].norm())


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["to_q"]),
        peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]),
    ],
)
def test_what_is_not_read_is_refused_by_name(config, unet: nn.Module, tmp_path) -> None:
    peft.get_peft_model(copy.deepcopy(unet), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^adapter_model.safetensors is PEFT's OFT, BOFT or IA3, which are not read"):
        files.load(tmp_path / "adapter_model.safetensors")
