"""Who runs the model: each host offers the same few functions to the merge (see `Host`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from loraclr.embeddings import Embeddings
from loraclr.keys import Family


class Cancelled(Exception):
    """The user stopped the merge; nothing was written."""


@dataclass(frozen=True)
class Context:
    """What the text encoders tell the UNet of B prompts.

    Attributes:
        tokens: (B, T, C), what cross-attention reads; for SDXL of both encoders side by side.
        pooled: (B, P), what SDXL's second encoder says of the whole prompt; None for SD 1.x and SD 2.x.
    """

    tokens: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, rows: list[int]) -> Context:
        """These of the prompts, each as often as it is named."""
        return Context(self.tokens[rows], None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class Checkpoint:
    """Which model a host has loaded: its file's or folder's name, and the file's SHA-256, "" where it is not known."""

    name: str
    hash: str = ""


#: Told of every UNet call: x (B, 4, h, w) as the UNet sees it, t (B,), context of B prompts, prediction (B, 4, h, w).
Record = Callable[[Tensor, Tensor, Context, Tensor], None]


class Host(Protocol):
    """What the merge needs of whoever has the model loaded. The model's weights are never written."""

    family: Family
    device: torch.device
    size: int
    """Side in pixels of the pictures that the model was made for."""

    alphas: Tensor
    """ᾱ_t of every timestep (T,), float32: z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε."""

    target: Literal["epsilon", "v"]
    """What the UNet predicts: the noise ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) z_0 (Salimans and Ho 2022)."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The model that is loaded, for the recipe of a merge."""

    def layers(self) -> dict[str, nn.Module]:
        """Canonical layer name → live module (Linear, Conv2d, LayerNorm or GroupNorm) of UNet and text encoders."""

    def encode(self, prompts: list[str]) -> Context:
        """Prompts through the text encoders as they are now, hooks included; differentiable.

        The empty prompt gives what the host guides away from when nothing is asked for.
        """

    def predict(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        """One raw call of the UNet; differentiable. A UNet that is told the picture's size is told that of x."""

    def sample(
        self, prompts: list[str], seed: int, steps: int, guidance: float, width: int, height: int
    ) -> list[Image.Image]:
        """Draw one picture for each prompt with the host's own pipeline; picture k starts from seed + k.

        Raises Cancelled if the host's own way to stop was used.
        """

    def watch(self, record: Record) -> AbstractContextManager[None]:
        """Report every UNet call made inside to `record`."""

    def words(self, embeddings: Embeddings) -> AbstractContextManager[None]:
        """Inside, prompts may hold these words, which stand for their vectors. Not to be nested."""

    def session(self) -> AbstractContextManager[None]:
        """Inside, no LoRA of the user's is applied and gradients can be taken; on exit everything is as before."""
