"""Who runs the model: each host offers the same few functions to the merge (see `Host`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from loraclr.embeddings import Embeddings
from loraclr.keys import Family

#: Told of every UNet call: x (B, 4, h, w) as the UNet sees it, t (B,), context (B, T, C), prediction (B, 4, h, w).
Record = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class Host(Protocol):
    """What the merge needs of whoever has the model loaded. The model's weights are never written."""

    family: Family
    device: torch.device
    size: int
    """Side in pixels of the pictures that the model was made for."""

    alphas: Tensor
    """ᾱ_t of every timestep (T,), float32: how much of the clean latent z_t holds."""

    def layers(self) -> dict[str, nn.Module]:
        """Canonical layer name → live module (Linear, Conv2d, LayerNorm or GroupNorm) of UNet and text encoders."""

    def encode(self, prompts: list[str]) -> Tensor:
        """Prompts → context (B, T, C) through the text encoder as it is now, hooks included; differentiable."""

    def predict(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """One raw call of the UNet; differentiable."""

    def sample(
        self, prompts: list[str], seed: int, steps: int, guidance: float, width: int, height: int
    ) -> list[Image.Image]:
        """Draw one picture for each prompt with the host's own pipeline; picture k starts from seed + k."""

    def watch(self, record: Record) -> AbstractContextManager[None]:
        """Report every UNet call made inside to `record`."""

    def words(self, embeddings: Embeddings) -> AbstractContextManager[None]:
        """Inside, prompts may hold these words, which stand for their vectors. Not to be nested."""

    def session(self) -> AbstractContextManager[None]:
        """Inside, no LoRA of the user's is applied and gradients can be taken; on exit everything is as before."""
