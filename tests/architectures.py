"""The real SD 1.x, SD 2.x and SDXL as names and shapes, without memory.

Once as diffusers' and transformers' own modules, once counted out from the numbers in the original models' yaml files.
"""

from __future__ import annotations

from functools import cache

import diffusers
import torch
import transformers
from torch import nn

Shapes = dict[str, tuple[int, ...]]

_SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
DIFFUSERS_UNETS = {
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        **_SDXL_BLOCKS,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
ORIGINAL_UNETS = {
    "sd1": {"channel_mult": (1, 2, 4, 4), "attention_resolutions": (4, 2, 1), "depth": (1, 1, 1, 1), "context": 768},
    "sd2": {
        "channel_mult": (1, 2, 4, 4),
        "attention_resolutions": (4, 2, 1),
        "depth": (1, 1, 1, 1),
        "context": 1024,
        "linear": True,
    },
    "sdxl": {
        "channel_mult": (1, 2, 4),
        "attention_resolutions": (4, 2),
        "depth": (1, 2, 10),
        "context": 2048,
        "linear": True,
        "adm": 2816,
    },
}
# Which text encoders a family has: part, width, heads, layers, and whether it is OpenCLIP's.
TEXT_ENCODERS = {
    "sd1": [("text_encoder", 768, 12, 12, False)],
    "sd2": [("text_encoder", 1024, 16, 24, True)],
    "sdxl": [("text_encoder", 768, 12, 12, False), ("text_encoder_2", 1280, 20, 32, True)],
}


@cache
def diffusers_unet(family: str) -> Shapes:
    """diffusers path → shape of the weight, of every Linear, Conv2d and norm."""
    with torch.device("meta"):
        return _shapes(diffusers.UNet2DConditionModel(layers_per_block=2, **DIFFUSERS_UNETS[family]))


@cache
def transformers_text_encoder(width: int, heads: int, layers: int, projection: bool) -> Shapes:
    """transformers path → shape of the weight, of every Linear and norm."""
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    model = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    with torch.device("meta"):
        return _shapes(model(config))


def _shapes(model: nn.Module) -> Shapes:
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    return {path: tuple(layer.weight.shape) for path, layer in model.named_modules() if isinstance(layer, kinds)}


def original_unet(
    channel_mult: tuple[int, ...],
    attention_resolutions: tuple[int, ...],
    depth: tuple[int, ...],
    context: int,
    linear: bool = False,
    adm: int | None = None,
    channels: int = 320,
    num_res_blocks: int = 2,
) -> Shapes:
    """compvis path → shape, built as the original UNet is: block by block with a stack of what goes across."""
    shapes: Shapes = {}
    time = 4 * channels

    def linears(path: str, *sizes: tuple[int, int]) -> None:
        """A Sequential of Linear layers with an activation between them."""
        shapes.update({f"{path}.{2 * k}": (o, d) for k, (d, o) in enumerate(sizes)})

    def resblock(path: str, d: int, o: int) -> None:
        shapes.update({f"{path}.in_layers.0": (d,), f"{path}.in_layers.2": (o, d, 3, 3)})
        shapes.update({f"{path}.emb_layers.1": (o, time)})
        shapes.update({f"{path}.out_layers.0": (o,), f"{path}.out_layers.3": (o, o, 3, 3)})
        if d != o:
            shapes[f"{path}.skip_connection"] = (o, d, 1, 1)

    def transformer(path: str, c: int, blocks: int) -> None:
        shapes[f"{path}.norm"] = (c,)
        for side in ("proj_in", "proj_out"):
            shapes[f"{path}.{side}"] = (c, c) if linear else (c, c, 1, 1)
        for n in range(blocks):
            inner = f"{path}.transformer_blocks.{n}"
            for attn, width in (("attn1", c), ("attn2", context)):
                shapes.update({f"{inner}.{attn}.to_q": (c, c), f"{inner}.{attn}.to_out.0": (c, c)})
                shapes.update({f"{inner}.{attn}.to_k": (c, width), f"{inner}.{attn}.to_v": (c, width)})
            shapes.update({f"{inner}.ff.net.0.proj": (8 * c, c), f"{inner}.ff.net.2": (c, 4 * c)})
            shapes.update({f"{inner}.norm{k}": (c,) for k in (1, 2, 3)})

    linears("time_embed", (channels, time), (time, time))
    if adm:
        linears("label_emb.0", (adm, time), (time, time))
    shapes["input_blocks.0.0"] = (channels, 4, 3, 3)
    across, c, scale, number = [channels], channels, 1, 1
    for level, mult in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            resblock(f"input_blocks.{number}.0", c, mult * channels)
            c = mult * channels
            if scale in attention_resolutions:
                transformer(f"input_blocks.{number}.1", c, depth[level])
            across.append(c)
            number += 1
        if level < len(channel_mult) - 1:
            shapes[f"input_blocks.{number}.0.op"] = (c, c, 3, 3)
            across.append(c)
            number += 1
            scale *= 2
    resblock("middle_block.0", c, c)
    transformer("middle_block.1", c, depth[-1])
    resblock("middle_block.2", c, c)
    number = 0
    for level in reversed(range(len(channel_mult))):
        for k in range(num_res_blocks + 1):
            resblock(f"output_blocks.{number}.0", c + across.pop(), channel_mult[level] * channels)
            c = channel_mult[level] * channels
            child = 1
            if scale in attention_resolutions:
                transformer(f"output_blocks.{number}.1", c, depth[level])
                child = 2
            if level and k == num_res_blocks:
                shapes[f"output_blocks.{number}.{child}.conv"] = (c, c, 3, 3)
                scale //= 2
            number += 1
    return shapes | {"out.0": (channels,), "out.2": (4, channels, 3, 3)}


def open_clip_text_encoder(width: int, layers: int) -> Shapes:
    """OpenCLIP path → shape; the fused projection under its parameter's name."""
    shapes: Shapes = {"ln_final": (width,), "text_projection": (width, width)}
    for n in range(layers):
        layer = f"transformer.resblocks.{n}"
        shapes |= {f"{layer}.ln_1": (width,), f"{layer}.ln_2": (width,)}
        shapes |= {f"{layer}.attn.in_proj": (3 * width, width), f"{layer}.attn.out_proj": (width, width)}
        shapes |= {f"{layer}.mlp.c_fc": (4 * width, width), f"{layer}.mlp.c_proj": (width, 4 * width)}
    return shapes
