"""Files of LyCORIS' own networks for UNet and text encoder: the model with them is the model with our ΔW."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loraclr import files, keys
from loraclr.capture import applied
from loraclr.changes import changes_of

network = pytest.importorskip("lycoris.kohya")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PRESET = """
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""
#: Algorithm and what else its network is told.
NETWORKS = {
    "locon": ("locon", {}),
    "locon with mid": ("locon", {"use_tucker": "True"}),
    "dora": ("locon", {"dora_wd": "True"}),
    "dora on input": ("locon", {"dora_wd": "True", "wd_on_output": "False"}),
    "rank-stabilised": ("locon", {"rs_lora": "True"}),
    "scalar": ("locon", {"use_scalar": "True"}),
    "norms": ("locon", {"train_norm": "True"}),
    "loha": ("loha", {}),
    "lokr": ("lokr", {}),
    "lokr, both factorised": ("lokr", {"decompose_both": "True"}),
    "lokr, both whole": ("lokr", {"full_matrix": "True"}),
    "glora": ("glora", {}),
    "ia3": ("ia3", {}),
    "oft": ("diag-oft", {"rescaled": "True", "constraint": "0.05"}),
    "full": ("full", {}),
}


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """A UNet of SD 1.x' layout and a CLIP, small."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16), norm_num_groups=4, layers_per_block=2, attention_head_dim=4,
        cross_attention_dim=8,
    )  # fmt: skip
    clip = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, eos_token_id=1
    )
    return unet.eval().requires_grad_(False), transformers.CLIPTextModel(clip).eval().requires_grad_(False)


@torch.no_grad()
def outputs(unet: nn.Module, clip: nn.Module) -> tuple[Tensor, Tensor]:
    context = clip(torch.tensor([[2, 3, 4, 5]])).last_hidden_state
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return context, unet(noise, 500, encoder_hidden_states=context).sample


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_does_what_we_read_in_its_file(name: str, models, tmp_path: Path) -> None:
    algorithm, options = NETWORKS[name]
    (tmp_path / "preset.toml").write_text(PRESET)
    unet, clip = (copy.deepcopy(model) for model in models)
    torch.manual_seed(1)
    trained = network.create_network(
        1.0, 4, 2.0, None, clip, unet, algo=algorithm, preset=str(tmp_path / "preset.toml"), conv_dim="4",
        conv_alpha="2", **options,
    )  # fmt: skip
    trained.apply_to(clip, unet, True, True)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    told = {"ss_network_args": '{"rs_lora": "True"}'} if "rs_lora" in options else {}
    tensors = {key: tensor.clone().contiguous() for key, tensor in trained.eval().state_dict().items()}
    save_file(tensors, tmp_path / "x.safetensors", told)

    lora = files.load(tmp_path / "x.safetensors")
    assert lora.unused == () and lora.family == "sd1"
    assert len(lora.layers) == len(trained.loras) > 250
    modules = {
        keys.kohya_name(part, path): module
        for part, model in (("unet", models[0]), ("text_encoder", models[1]))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm)
    }
    plain, wanted = outputs(*models), outputs(unet, clip)
    with applied(modules, changes_of(lora, modules)):
        found = outputs(*models)
    for ours, theirs, base in zip(found, wanted, plain, strict=True):
        assert (theirs - base).norm() > 1e-3 * base.norm()
        assert (ours - theirs).norm() < 1e-3 * (theirs - base).norm()
