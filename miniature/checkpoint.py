"""The miniature as a file: Stable Diffusion 1's key layout in one .safetensors, its yaml, and CLIP's tokenizer."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loraclr.keys import compvis_unet_name
from miniature import CHECKPOINT, CONFIG, LORAS, MERGES, autoencoder

CONTEXT = 64  # width of the text features
TOKENS = 77
CLIP = {
    "vocab_size": 49408, "hidden_size": CONTEXT, "intermediate_size": 4 * CONTEXT, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": TOKENS, "hidden_act": "quick_gelu", "projection_dim": CONTEXT,
    "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
}  # fmt: skip
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


@dataclass
class Miniature:
    """Its three networks, as diffusers and transformers classes."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel


def build_unet() -> UNet2DConditionModel:
    """SD 1's block layout, 7.5 M parameters: the widths put most of the work at 8×8 places."""
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(32, 96, 128, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=CONTEXT,
        attention_head_dim=4,  # diffusers' old name: it is the number of heads
    )


def build_text_encoder() -> CLIPTextModel:
    """CLIP's text model, 64 wide."""
    return CLIPTextModel(CLIPTextConfig(**CLIP))


def tokenizer_folder(folder: Path) -> Path:
    """Write CLIP's tokenizer as transformers reads it; the vocabulary follows from the merges."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = gzip.decompress(MERGES.read_bytes()).decode()
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    letters = list(_byte_letters())
    words = ["".join(line.split()) for line in merges.splitlines()]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *words, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_text_model", **CLIP}, indent=1))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True})
    )
    return folder


def _byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE, in CLIP's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]


def ldm_yaml(tokenizer: str) -> dict:
    """The configuration that the webui and diffusers read; `tokenizer` is the folder of CLIP's tokenizer."""
    unet = {
        "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2, "channel_mult": [1, 3, 4, 2], "num_heads": 4, "use_spatial_transformer": True,
        "transformer_depth": 1, "context_dim": CONTEXT, "use_checkpoint": False, "legacy": False,
    }  # fmt: skip
    vae = {
        "double_z": True, "z_channels": 4, "resolution": 128, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    first = {"embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": vae, "lossconfig": {"target": "torch.nn.Identity"}}
    params = {
        "linear_start": 0.00085, "linear_end": 0.0120, "num_timesteps_cond": 1, "timesteps": 1000,
        "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": 16, "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn", "monitor": "val/loss_simple_ema", "scale_factor": autoencoder.SCALE,
        "use_ema": False,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first},
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"version": tokenizer},
        },
    }  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def vae_ldm_name(name: str, levels: int = 4) -> str:
    """A diffusers AutoencoderKL parameter's name in ldm's layout.

    ldm counts the decoder's levels from the picture inwards, diffusers from the latents outwards.
    """
    parts = name.split(".")
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
    if parts[1:2] == ["mid_block"]:
        if parts[2] == "resnets":
            return ".".join([parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]])
        if parts[4] == "to_out":
            return ".".join([parts[0], "mid", "attn_1", "proj_out", *parts[6:]])
        return ".".join([parts[0], "mid", "attn_1", attention[parts[4]], *parts[5:]])
    if parts[1:2] in (["down_blocks"], ["up_blocks"]):
        side = parts[1].split("_")[0]
        level = int(parts[2]) if side == "down" else levels - 1 - int(parts[2])
        if parts[3] == "resnets":
            rest = ["nin_shortcut" if part == "conv_shortcut" else part for part in parts[5:]]
            return ".".join([parts[0], side, str(level), "block", parts[4], *rest])
        return ".".join([parts[0], side, str(level), f"{side}sample", *parts[5:]])
    return name.replace("conv_norm_out", "norm_out")


def to_ldm(model: Miniature) -> dict[str, Tensor]:
    """All weights under Stable Diffusion 1's names, half precision."""
    tensors = {}
    for name, value in model.unet.state_dict().items():
        path, kind = name.rsplit(".", 1)
        tensors[f"{UNET}{compvis_unet_name(path)}.{kind}"] = value
    for name, value in model.vae.state_dict().items():
        in_attention = ".attentions." in name and name.endswith("weight") and value.dim() == 2
        tensors[VAE + vae_ldm_name(name)] = value[..., None, None] if in_attention else value
    for name, value in model.text_encoder.state_dict().items():
        if value.is_floating_point():
            tensors[TEXT + name.removeprefix("text_model.")] = value
    return {name: value.detach().half().contiguous() for name, value in tensors.items()}


def save(model: Miniature, path: Path = CHECKPOINT, config: Path = CONFIG) -> None:
    """Write the checkpoint and its yaml (with a tokenizer folder named `clip`, see `install`)."""
    save_file(to_ldm(model), path, metadata={"format": "pt"})
    config.write_text(yaml.safe_dump(ldm_yaml("clip"), sort_keys=False))


def load(path: Path = CHECKPOINT) -> Miniature:
    """Read the checkpoint, float32; the names go back through diffusers' own converters."""
    tensors = {name: value.float() for name, value in load_file(path).items()}
    model = Miniature(build_unet().eval(), autoencoder.build().eval(), build_text_encoder().eval())
    config = {"layers_per_block": 2, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}
    model.unet.load_state_dict(
        convert_ldm_unet_checkpoint(dict(tensors), {**model.unet.config, **config, "class_embed_type": None})
    )
    model.vae.load_state_dict(convert_ldm_vae_checkpoint(dict(tensors), model.vae.config))
    prefix = "text_model." if any(name.startswith("text_model.") for name in model.text_encoder.state_dict()) else ""
    text = {prefix + name.removeprefix(TEXT): value for name, value in tensors.items() if name.startswith(TEXT)}
    model.text_encoder.load_state_dict(text, strict=False)
    return model


def install(folder: Path) -> Path:
    """Copy the checkpoint into a folder of checkpoints (the webui's models/Stable-diffusion, say), ready to be loaded.

    Beside it go its yaml and the tokenizer, which the yaml names by its whole path.

    Returns:
        path of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clip = tokenizer_folder(folder.resolve() / "miniature-clip")
    path = folder / CHECKPOINT.name
    shutil.copyfile(CHECKPOINT, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(ldm_yaml(str(clip)), sort_keys=False))
    return path


def install_loras(folder: Path) -> list[Path]:
    """Copy the twelve concept LoRAs, with their sidecars, into a folder of LoRAs."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(LORAS.iterdir()):
        shutil.copyfile(path, folder / path.name)
    return sorted(folder / path.name for path in LORAS.glob("*.safetensors"))


@cache
def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer, written to `folder` first."""
    return CLIPTokenizer.from_pretrained(str(tokenizer_folder(folder)))


def device() -> torch.device:
    """The best device there is."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
