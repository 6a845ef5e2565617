"""Drawing with the miniature: the host that has it loaded, and pictures of prompts with a change applied."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from loraclr.capture import applied
from loraclr.changes import Changes
from loraclr.hosts.standalone import Standalone, open_checkpoint
from miniature import checkpoint

GUIDANCE, BATCH = 4.0, 16


def open_miniature(device: str | None = None) -> Standalone:
    """The miniature, loaded by the standalone host."""
    with tempfile.TemporaryDirectory() as folder:
        return open_checkpoint(checkpoint.install(Path(folder)), device)


@torch.no_grad()
def decoded(host: Standalone, latents: Tensor) -> list[Image.Image]:
    """The pictures of latents (B, 4, h, w)."""
    vae = host.pipeline.vae
    return host.pipeline.image_processor.postprocess(vae.decode(latents / vae.config.scaling_factor).sample)


def draw(
    host: Standalone,
    changes: Changes,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    tick: Callable[[int], object] = lambda _: None,
) -> list[Image.Image]:
    """Pictures of `prompts` with `changes` applied; picture k starts from noise seed + k. `tick` is told how many."""
    pictures: list[Image.Image] = []
    with applied(host.layers(), changes):
        for begin in range(0, len(prompts), BATCH):
            part = list(prompts[begin : begin + BATCH])
            pictures += host.sample(part, seed + begin, steps, GUIDANCE, host.size, host.size)
            tick(len(part))
    return pictures
