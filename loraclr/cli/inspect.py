"""`python -m loraclr inspect`: what is in LoRA files, and what of it was not understood."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from loraclr.blocks import BLOCKS, block
from loraclr.cli import Refused

if TYPE_CHECKING:
    from loraclr.families import Family
    from loraclr.formats import Change
    from loraclr.lora import LoRA

_FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
# What says the most about a file; the rest is counted.
_TELLING = (
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "modelspec.title",
    "modelspec.author",
    "modelspec.architecture",
    "modelspec.merged_from",
)
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `inspect`."""
    parser.set_defaults(run=run)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="LoRA file to look into")


def run(args: argparse.Namespace) -> int:
    """Describe every file that can be read; the others are refused, each in a sentence."""
    from loraclr import files

    bad = []
    for path in args.files:
        try:
            print(described(files.load(path)))
        except (ValueError, OSError) as error:
            bad.append(" ".join(str(error).split()))
    if bad:
        raise Refused(" ".join(bad))
    return 0


def described(lora: LoRA) -> str:
    """A LoRA in words: a line for its file, then indented lines."""
    rows = [
        ("family", [_FAMILIES[lora.family]]),
        ("layers", _kinds(lora)),
        ("triggers", [lora.triggers() or "none are told"]),
        ("words", _words(lora)),
        ("change", _sizes(lora)),
        ("metadata", _metadata(lora)),
        ("unknown", list(lora.unused) or ["every key was understood"]),
    ]
    lines = [lora.path.name if lora.path else lora.name]
    for title, values in rows:
        lines += [f"  {title if k == 0 else '':<10}{value}" for k, value in enumerate(values)]
    return "\n".join(lines)


def _kinds(lora: LoRA) -> list[str]:
    """Each format with its number of layers and its ranks."""
    kinds: dict[str, list[Change]] = defaultdict(list)
    for layer in lora.layers.values():
        kinds[layer.format].append(layer)
    lines = []
    for name, layers in sorted(kinds.items()):
        ranks = sorted({layer.rank for layer in layers if layer.rank is not None})
        told = f", rank {', '.join(map(str, ranks))}" if ranks else ""
        biases = sum(layer.bias is not None for layer in layers)
        lines.append(f"{len(layers)} {name}{told}" + (f", {biases} with a bias" if biases else ""))
    return lines


def _words(lora: LoRA) -> list[str]:
    """The embeddings that the file brings along."""
    lines = []
    for name, encoders in lora.embeddings.items():
        each = ", ".join(f"{encoder} {len(vectors)} × {vectors.shape[1]}" for encoder, vectors in encoders.items())
        lines.append(f"{name}: {each}")
    for name, vectors in lora.layer_embeddings.items():
        lines.append(f"{name}: one for each of {len(vectors)} cross-attention layers, width {vectors.shape[1]}")
    return lines or ["none are bundled"]


def _sizes(lora: LoRA) -> list[str]:
    """‖ΔW‖ by block, and how many of a block's layers have none without the base weights."""
    blocks: dict[str, list[Change]] = defaultdict(list)
    for name, layer in lora.layers.items():
        blocks[block_of(name, lora.family)].append(layer)
    order = ["text encoder", "text encoder 2", *BLOCKS[26]]
    lines = []
    for place, layers in sorted(blocks.items(), key=lambda item: order.index(item[0])):
        known = [layer for layer in layers if not layer.needs_base]
        size = f"‖ΔW‖ {math.hypot(*(layer.norm() for layer in known)):.4g}" if known else "‖ΔW‖ unknown"
        rest = f" ({len(layers) - len(known)} depend on the base model)" if len(known) < len(layers) else ""
        lines.append(f"{place:<16}{len(layers):>4} layers  {size}{rest}")
    return lines


def block_of(name: str, family: Family) -> str:
    """The UNet's block that a layer belongs to, by the name that block weights know it by, or its text encoder."""
    if name.startswith("lora_te"):
        return "text encoder 2" if name.startswith("lora_te2_") else "text encoder"
    return block(name, family)


def _metadata(lora: LoRA) -> list[str]:
    told = [key for key in _TELLING if lora.metadata.get(key)]
    lines = [f"{key}: {lora.metadata[key]}" for key in told]
    lines = [line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…" for line in lines]
    more = len(lora.metadata) - len(told)
    return [*lines, f"{more} more entries"] if more else lines or ["none"]
