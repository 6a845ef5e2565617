"""The UNet's layers: every layer of each family under its two paths, diffusers' and the original ("compvis") one.

Both follow from one layout: each level has two resnets going down and three going up, an attention block beside each
resnet where the level has attention, and a down- or upsampler at its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from loraclr.families import Family

# Transformer blocks per attention block: by level from the outside in (0: no attention there), and in the middle.
_DEPTHS: dict[Family, tuple[tuple[int, ...], int]] = {
    "sd1": ((1, 1, 1, 0), 1),
    "sd2": ((1, 1, 1, 0), 1),
    "sdxl": ((0, 2, 10), 10),
}

_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_ADDED = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# The inside of an attention block is named alike on both sides.
_ATTENTION = ("norm", "proj_in", "proj_out")
_TRANSFORMER = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"{attn}.{layer}" for attn in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")),
)


def unet_paths(family: Family) -> Iterator[tuple[str, str]]:
    """Every layer of the family's UNet as (diffusers path, compvis path).

    A shortcut convolution is listed for every resnet, although only those that change the channels have one.
    """
    depths, middle = _DEPTHS[family]
    last = len(depths) - 1
    yield from _ENDS.items()
    if family == "sdxl":
        yield from _ADDED.items()
    for level, depth in enumerate(depths):
        for layer in range(2):
            yield from _layer(f"down_blocks.{level}", layer, f"input_blocks.{3 * level + layer + 1}", depth)
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op"
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield from _attention("mid_block.attentions.0", "middle_block.1", middle)
    yield from _resnet("mid_block.resnets.1", "middle_block.2")
    for level, depth in enumerate(reversed(depths)):
        for layer in range(3):
            yield from _layer(f"up_blocks.{level}", layer, f"output_blocks.{3 * level + layer}", depth)
        if level < last:
            # Without attention the upsampler stands in the attention's place.
            child = 2 if depth else 1
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{3 * level + 2}.{child}.conv"


@cache
def to_compvis(family: Family) -> dict[str, str]:
    """diffusers path → compvis path, dotted."""
    return dict(unet_paths(family))


@cache
def to_diffusers(family: Family) -> dict[str, str]:
    """compvis path → diffusers path, dotted; an upsampler is also found under the other family's number."""
    paths = {compvis: diffusers for diffusers, compvis in unet_paths(family)}
    for compvis, diffusers in list(paths.items()):
        if compvis.endswith(".conv"):
            block = compvis.rsplit(".", 2)[0]
            # OneTrainer and the webui each write one of the two for both families.
            paths |= {f"{block}.1.conv": diffusers, f"{block}.2.conv": diffusers}
    return paths


def kernel(diffusers: str, family: Family) -> tuple[int, int] | None:
    """The size of a convolution's kernel by its diffusers path; None for a layer that is no convolution."""
    last = diffusers.rpartition(".")[2]
    if last in ("conv_in", "conv_out", "conv1", "conv2", "conv"):
        return 3, 3
    # Around a transformer SD 1.x has 1×1 convolutions, the later families Linear layers.
    return (1, 1) if last == "conv_shortcut" or (family == "sd1" and last in ("proj_in", "proj_out")) else None


def _layer(diffusers: str, layer: int, compvis: str, depth: int) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{diffusers}.resnets.{layer}", f"{compvis}.0")
    if depth:
        yield from _attention(f"{diffusers}.attentions.{layer}", f"{compvis}.1", depth)


def _resnet(diffusers: str, compvis: str) -> Iterator[tuple[str, str]]:
    for ours, theirs in _RESNET.items():
        yield f"{diffusers}.{ours}", f"{compvis}.{theirs}"


def _attention(diffusers: str, compvis: str, depth: int) -> Iterator[tuple[str, str]]:
    inside = [*_ATTENTION, *(f"transformer_blocks.{n}.{layer}" for n in range(depth) for layer in _TRANSFORMER)]
    for layer in inside:
        yield f"{diffusers}.{layer}", f"{compvis}.{layer}"
