"""SD 2.x and SDXL with their real block layouts and random weights, small enough for a test, as pipelines of diffusers.

The text encoders are a CLIP of 3 layers and OpenCLIP's smallest, ViT-S-32-alt, whose layout the webui can build too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from loraclr import files
from loraclr.hosts.standalone import Standalone
from loraclr.keys import Family, compvis_unet_name
from loraclr.lora import Layer, LoRA
from miniature import autoencoder, checkpoint

OPEN_WIDTH, OPEN_LAYERS, SIZE_WIDTH, SIDE = 256, 10, 32, 16
PROJECTION = "lora_te2_text_projection"  # of what SDXL's second text encoder says of a whole prompt
OPEN_CLIP = {
    **checkpoint.CLIP, "hidden_size": OPEN_WIDTH, "intermediate_size": 4 * OPEN_WIDTH, "num_attention_heads": 4,
    "hidden_act": "gelu", "projection_dim": OPEN_WIDTH, "num_hidden_layers": OPEN_LAYERS,
}  # fmt: skip
_UNETS = {
    "sd2": {
        "block_out_channels": (32, 64, 96, 96), "attention_head_dim": (1, 2, 3, 3), "cross_attention_dim": OPEN_WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 96), "attention_head_dim": (1, 2, 3), "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": checkpoint.CONTEXT + OPEN_WIDTH,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": OPEN_WIDTH + 6 * SIZE_WIDTH,
    },
}  # fmt: skip


def pipeline(family: Family, folder: Path, target: str = "epsilon"):
    """A pipeline with random weights; the tokenizer is written to `folder`."""
    torch.manual_seed(0)
    made = _made(family, folder, target)
    for encoder in (made.text_encoder, getattr(made, "text_encoder_2", None)):
        for name, parameter in encoder.named_parameters() if encoder else ():
            if name.endswith("final_layer_norm.bias"):  # the webui divides by the mean of what comes out
                nn.init.normal_(parameter, 0.05, 0.1)
    return made


def _made(family: Family, folder: Path, target: str):
    tokenizer = CLIPTokenizer.from_pretrained(str(checkpoint.tokenizer_folder(folder)))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[target],
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=SIDE, layers_per_block=2, use_linear_projection=True, **_UNETS[family])
    # OpenCLIP fills up with its first word, not with its last one as CLIP does.
    padded = CLIPTokenizer.from_pretrained(str(folder), pad_token="!")
    parts = {"unet": unet, "vae": autoencoder.build(), "scheduler": scheduler}
    if family == "sd2":
        # What comes out of the last layer but one is used, so diffusers leaves the last one out.
        encoder = CLIPTextModel(CLIPTextConfig(**{**OPEN_CLIP, "num_hidden_layers": OPEN_LAYERS - 1}))
        return StableDiffusionPipeline(
            **parts,
            tokenizer=padded,
            text_encoder=encoder,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=padded,
        text_encoder=CLIPTextModel(CLIPTextConfig(**checkpoint.CLIP)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**OPEN_CLIP)),
        add_watermarker=False,
    )


def random_lora(
    layers: Mapping[str, nn.Module], family: Family, name: str, seed: int, rank: int = 2, size: float = 0.1
) -> LoRA:
    """A random LoRA on the given layers."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for layer, module in layers.items():
        shape, conv = module.weight.shape, module.weight.dim() == 4
        up = torch.randn(shape[0], rank, generator=generator) * size / rank**0.5
        down = torch.randn(rank, shape[1:].numel(), generator=generator) / shape[1:].numel() ** 0.5
        changes[layer] = Layer(up, down, float(rank), conv, tuple(shape[2:]) if conv else (1, 1))
    return LoRA(name, None, family, changes, {})


def install(family: Family, folder: Path, target: str = "epsilon") -> Path:
    """Write the same model as a checkpoint in the original layout, with its yaml, as the webui loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    clip = folder.resolve() / "tiny-clip"
    model, path = pipeline(family, clip, target), folder / f"tiny-{family}.safetensors"
    save_file({name: value.detach().half().contiguous() for name, value in _original(model, family).items()}, path)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(_yaml(family, str(clip), target), sort_keys=False))
    return path


def _original(model, family: Family) -> dict[str, Tensor]:
    tensors = {}
    for name, value in model.unet.state_dict().items():
        layer, kind = name.rsplit(".", 1)
        tensors[f"{checkpoint.UNET}{compvis_unet_name(layer, family)}.{kind}"] = value
    for name, value in model.vae.state_dict().items():
        in_attention = ".attentions." in name and name.endswith("weight") and value.dim() == 2
        tensors[checkpoint.VAE + checkpoint.vae_ldm_name(name)] = value[..., None, None] if in_attention else value
    if family == "sd2":
        return tensors | _open_clip(model.text_encoder, "cond_stage_model.model.")
    prefix = "conditioner.embedders.0.transformer.text_model."
    for name, value in model.text_encoder.state_dict().items():
        tensors[prefix + name.removeprefix("text_model.")] = value
    return tensors | _open_clip(model.text_encoder_2, "conditioner.embedders.1.model.")


def _open_clip(encoder, prefix: str) -> dict[str, Tensor]:
    """transformers' CLIP under OpenCLIP's names; layers that diffusers leaves out are filled with zeros."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state.get("text_projection.weight", torch.eye(OPEN_WIDTH)).T,
        "logit_scale": torch.tensor(1.0),
    }
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inside |= {"self_attn.out_proj": "attn.out_proj"}
    for number in range(OPEN_LAYERS):
        for kind in ("weight", "bias"):
            block, layer = f"transformer.resblocks.{number}", f"encoder.layers.{number}"
            sides = [state.get(f"{layer}.self_attn.{side}_proj.{kind}") for side in "qkv"]
            if sides[0] is None:
                like = f"encoder.layers.0.{{}}.{kind}"
                sides = [torch.zeros_like(state[like.format("self_attn.q_proj")])] * 3
                state |= {f"{layer}.{ours}.{kind}": torch.zeros_like(state[like.format(ours)]) for ours in inside}
            tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat(sides)
            for ours, theirs in inside.items():
                tensors[f"{block}.{theirs}.{kind}"] = state[f"{layer}.{ours}.{kind}"]
    return {prefix + name: value for name, value in tensors.items()}


def _yaml(family: Family, clip: str, target: str) -> dict:
    config = checkpoint.ldm_yaml(clip)
    params = config["model"]["params"]
    mults = [channels // 32 for channels in _UNETS[family]["block_out_channels"]]
    unet = params["unet_config"]["params"]
    del unet["num_heads"]
    unet |= {
        "channel_mult": mults, "num_head_channels": 32, "use_linear_in_transformer": True,
        "context_dim": _UNETS[family]["cross_attention_dim"], "use_checkpoint": True,
    }  # fmt: skip
    if family == "sd2":
        params |= {"parameterization": {"epsilon": "eps", "v": "v"}[target]}
        params["cond_stage_config"] = {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"arch": "ViT-S-32-alt", "freeze": True, "layer": "penultimate"},
        }
        return config
    unet |= {
        "attention_resolutions": [4, 2], "transformer_depth": [1, 2, 10], "num_classes": "sequential",
        "adm_in_channels": OPEN_WIDTH + 6 * SIZE_WIDTH, "spatial_transformer_attn_type": "softmax-xformers",
    }  # fmt: skip
    del unet["image_size"]
    sgm, texts = "sgm.modules.diffusionmodules", "sgm.modules.encoders.modules"
    encoders = [
        ("txt", "FrozenCLIPEmbedder", {"version": clip, "layer": "hidden", "layer_idx": 2}),
        (
            "txt", "FrozenOpenCLIPEmbedder2",
            {"arch": "ViT-S-32-alt", "layer": "penultimate", "always_return_pooled": True, "legacy": False},
        ),
        *(
            (key, "ConcatTimestepEmbedderND", {"outdim": SIZE_WIDTH})
            for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        ),
    ]  # fmt: skip
    scaling = {"epsilon": "EpsScaling", "v": "VScaling"}[target]
    engine = {
        "scale_factor": autoencoder.SCALE,
        "disable_first_stage_autocast": True,
        "denoiser_config": {
            "target": f"{sgm}.denoiser.DiscreteDenoiser",
            "params": {
                "num_idx": 1000,
                "weighting_config": {"target": f"{sgm}.denoiser_weighting.EpsWeighting"},
                "scaling_config": {"target": f"{sgm}.denoiser_scaling.{scaling}"},
                "discretization_config": {"target": f"{sgm}.discretizer.LegacyDDPMDiscretization"},
            },
        },
        "network_config": {"target": f"{sgm}.openaimodel.UNetModel", "params": unet},
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {
                "emb_models": [
                    {"is_trainable": False, "input_key": key, "target": f"{texts}.{kind}", "params": arguments}
                    for key, kind, arguments in encoders
                ]
            },
        },
        "first_stage_config": {
            **params["first_stage_config"], "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper",
        },
    }  # fmt: skip
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": engine}}


def install_random(family: Family, path: Path, layers: Mapping[str, nn.Module], seed: int, size: float = 0.1) -> None:
    """Write a random LoRA on the given layers."""
    lora = random_lora(layers, family, path.stem, seed, size=size)
    files.save(path, lora.layers, files.lora_metadata(family, lora.layers, [], [], {}))


def install_loras(family: Family, folder: Path, names: list[str]) -> None:
    """Write random LoRAs on attention and feed-forward layers of UNet and text encoders, as trainers make them."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = Standalone(pipeline(family, folder.parent / "tokenizer")).layers()
    for seed, name in enumerate(names, start=1):
        install_random(family, folder / f"{name}.safetensors", usual(layers), seed)
    # The webui does not know the projection, which has a file of its own.
    known = {name: layer for name, layer in whole(layers).items() if name != PROJECTION}
    install_random(family, folder / "whole.safetensors", known, 5, 0.03)
    if family == "sdxl":
        install_random(family, folder / "pooled.safetensors", {PROJECTION: layers[PROJECTION]}, 7)


def usual(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a model's layers that most LoRAs change."""
    parts = ("attn1", "attn2", "_ff_", "proj_in", "proj_out", "self_attn", "mlp")
    return {name: module for name, module in layers.items() if any(part in name for part in parts)}


def whole(layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All of a model's layers but norms."""
    return {name: module for name, module in layers.items() if isinstance(module, nn.Linear | nn.Conv2d)}
