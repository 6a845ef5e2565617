"""SD 2.x and SDXL with their real block layouts and random weights, small enough for a test, as pipelines of diffusers.

The text encoders are a CLIP of 3 layers and OpenCLIP's smallest, ViT-S-32-alt, whose layout the webui can build too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from loraclr.keys import Family
from loraclr.lora import Layer, LoRA
from miniature import autoencoder, checkpoint

OPEN_WIDTH, OPEN_LAYERS, SIZE_WIDTH, SIDE = 256, 10, 32, 16
OPEN_CLIP = {
    **checkpoint.CLIP, "hidden_size": OPEN_WIDTH, "intermediate_size": 4 * OPEN_WIDTH, "num_attention_heads": 4,
    "hidden_act": "gelu", "projection_dim": OPEN_WIDTH, "num_hidden_layers": OPEN_LAYERS,
}  # fmt: skip
_UNETS = {
    "sd2": {
        "block_out_channels": (32, 64, 64, 64), "attention_head_dim": (1, 2, 2, 2), "cross_attention_dim": OPEN_WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64), "attention_head_dim": (1, 2, 2), "transformer_layers_per_block": (1, 2, 10),
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
    tokenizer = CLIPTokenizer.from_pretrained(str(checkpoint.tokenizer_folder(folder)))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[target],
    )  # fmt: skip
    unet = UNet2DConditionModel(sample_size=SIDE, layers_per_block=2, use_linear_projection=True, **_UNETS[family])
    parts = {"unet": unet, "vae": autoencoder.build(), "scheduler": scheduler, "tokenizer": tokenizer}
    if family == "sd2":
        # What comes out of the last layer but one is used, so diffusers leaves the last one out.
        encoder = CLIPTextModel(CLIPTextConfig(**{**OPEN_CLIP, "num_hidden_layers": OPEN_LAYERS - 1}))
        return StableDiffusionPipeline(
            **parts, text_encoder=encoder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(CLIPTextConfig(**checkpoint.CLIP)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**OPEN_CLIP)),
        add_watermarker=False,
    )


def random_lora(layers, family: Family, name: str, seed: int, rank: int = 2, size: float = 0.1) -> LoRA:
    """A random LoRA on the given layers; `layers` as `loraclr.hosts.Host.layers` gives them."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for layer, module in layers.items():
        shape, conv = module.weight.shape, module.weight.dim() == 4
        up = torch.randn(shape[0], rank, generator=generator) * size / rank**0.5
        down = torch.randn(rank, shape[1:].numel(), generator=generator) / shape[1:].numel() ** 0.5
        changes[layer] = Layer(up, down, float(rank), conv, tuple(shape[2:]) if conv else (1, 1))
    return LoRA(name, None, family, changes, {})
