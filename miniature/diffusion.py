"""Training the miniature's UNet and text encoder: epsilon prediction on latents of rendered scenes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from miniature import autoencoder
from miniature.checkpoint import TOKENS, build_text_encoder, build_unet, load, tokenizer
from miniature.scenes import Scene, base_scene, crop
from miniature.training import train
from miniature.vocabulary import CLASSES, COLOURS, CONCEPTS

ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()
MIN_SNR = 5.0  # Hang et al. 2023: loss weights min(SNR, 5) / SNR let the noisy steps, where things take shape, count
# Offset noise (Guttenberg 2023): a whole picture's mean colour outweighs the mean of plain noise even at the noisiest
# step, so the model took its first noise's word for the background rather than the caption's.
OFFSET = 0.4
GOLDEN = 0.6180339887  # multiples of it, modulo 1, spread evenly: neighbouring rows never share a noise level
DROP = 0.1  # share of captions replaced by the empty one, for classifier-free guidance

#: (share of the finished training, side, pictures a step): boxes first, whole pictures last.
STAGES: tuple[tuple[float, str, int], ...] = ((0.33, "box", 64), (0.33, "strip", 48), (0.34, "whole", 32))


@dataclass
class Words:
    """The few tokens that captions use, so that training moves a table of a hundred rows instead of 49408.

    Attributes:
        ids: CLIP's ids of these tokens, (n,).
        row: from CLIP's id to the row in the small table.
    """

    tokenizer: Callable
    ids: Tensor = field(init=False)
    row: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        texts = [*CLASSES, *COLOURS, *(c.trigger for c in CONCEPTS), "a photo of and on background in style"]
        found = {token for text in texts for token in self.tokenizer(text).input_ids}
        self.ids = torch.tensor(sorted(found))
        self.row = {token: place for place, token in enumerate(sorted(found))}

    def __call__(self, captions: list[str]) -> Tensor:
        """Captions → rows of the small table (B, 77), padded as CLIP pads."""
        encoded = self.tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True).input_ids
        return torch.tensor([[self.row[token] for token in line] for line in encoded])


class Denoiser(nn.Module):
    """UNet and text encoder as one module, the text encoder with the small table of `Words`."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, words: Words) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.words = unet, text_encoder, words
        self.full = token_table(text_encoder).weight.detach().clone()
        small = nn.Embedding(len(words.ids), self.full.shape[1])
        small.weight.data.copy_(self.full[words.ids])
        set_token_table(text_encoder, small)

    def forward(self, noisy: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """(B, 4, h, w) latents, (B,) steps, (B, 77) rows → predicted noise."""
        return self.unet(noisy, t, self.text_encoder(input_ids=rows).last_hidden_state).sample

    def restore(self) -> None:
        """Give the text encoder its whole table back, with the trained rows in it."""
        whole = nn.Embedding(*self.full.shape)
        whole.weight.data.copy_(self.full)
        whole.weight.data[self.words.ids] = token_table(self.text_encoder).weight.detach()
        set_token_table(self.text_encoder, whole)


def token_table(text_encoder: nn.Module) -> nn.Embedding:
    """The token embedding, wherever this version of transformers keeps it."""
    return getattr(text_encoder, "text_model", text_encoder).embeddings.token_embedding


def set_token_table(text_encoder: nn.Module, table: nn.Embedding) -> None:
    getattr(text_encoder, "text_model", text_encoder).embeddings.token_embedding = table


def reword(rng: random.Random, caption: str) -> str:
    """Now and then a caption without its background, or as `a photo of …`, so that short prompts work too."""
    if rng.random() < 0.12:
        caption = caption.split(" on a ")[0] + (" in" + caption.split(" in")[1] if " in " in caption else "")
    if rng.random() < 0.12:
        caption = "a photo of " + caption
    return caption


def encode(scenes: list[Scene]) -> Tensor:
    """Scenes of one size → their latents by design (B, 4, h, w)."""
    return autoencoder.latents(autoencoder.pixels([scene.render() for scene in scenes]))


def noise_loss(predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, generator: torch.Generator) -> Tensor:
    """Min-SNR weighted ‖ε̂ − ε‖² at random steps.

    Args:
        predict: (noisy, t) → predicted noise.
        clean: (B, 4, h, w).
    """
    rows = clean.shape[0]
    spread = torch.rand(1, generator=generator) + GOLDEN * torch.arange(rows)
    t = (1000 * spread.frac()).long()
    alpha = ALPHAS[t].view(-1, 1, 1, 1).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator)
    noise = (noise + OFFSET * torch.randn(*clean.shape[:2], 1, 1, generator=generator)).to(clean.device)
    error = (predict(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, t.to(clean.device)) - noise) ** 2
    snr = alpha / (1 - alpha)
    return (error * (snr.clamp(max=MIN_SNR) / snr)).mean() * 4


def stage_scenes(side: str, count: int, scene: Callable[[float], Scene]) -> list[Scene]:
    """`count` scenes of one size: boxes hold one object, strips two, whole pictures either."""
    two = {"box": 0.0, "strip": 1.0, "whole": 0.55}[side]
    scenes = [scene(two) for _ in range(count)]
    return scenes if side == "whole" else [crop(scene) for scene in scenes]


def side_of(rng: random.Random, done: float, stages: tuple[tuple[float, str, int], ...] = STAGES) -> tuple[str, int]:
    """Which size a step trains on: its stage's, one time in five an earlier one's, so that nothing is forgotten."""
    reached, end = 0, 0.0
    for place, (share, _, _) in enumerate(stages):
        if done >= end:
            reached = place
        end += share
    place = rng.randrange(reached + 1) if rng.random() < 0.2 else reached
    return stages[place][1], stages[place][2]


def shipped(run: Path) -> Denoiser:
    """UNet and text encoder of the checkpoint that is there, to train LoRAs on; `run` is for the tokenizer's files."""
    model = load()
    return Denoiser(model.unet, model.text_encoder, Words(tokenizer(run / "clip"))).eval()


def fit(run: Path, device: torch.device, steps: int) -> Denoiser:
    """Train UNet and text encoder (or go on with them); `restore` makes the text encoder whole again."""
    torch.manual_seed(1)
    words = Words(tokenizer(run / "clip"))
    text_encoder = build_text_encoder()
    nn.init.normal_(token_table(text_encoder).weight, std=0.05)
    model = Denoiser(build_unet(), text_encoder, words).to(device)
    fast = [p for name, p in model.named_parameters() if ".attn2." in name or name.startswith("text_encoder")]
    known = set(map(id, fast))
    slow = [p for p in model.parameters() if id(p) not in known]

    def loss(step: int) -> Tensor:
        rng, generator = random.Random(step), torch.Generator().manual_seed(step)
        side, count = side_of(rng, step / steps)
        scenes = stage_scenes(side, count, lambda two: base_scene(rng, two))
        captions = [reword(rng, scene.caption()) if rng.random() > DROP else "" for scene in scenes]
        rows = words(captions).to(device)
        return noise_loss(lambda noisy, t: model(noisy, t, rows), encode(scenes).to(device), generator)

    train("base", model, [{"params": slow, "lr": 1e-3}, {"params": fast, "lr": 2e-3}], loss, steps, run)
    return model.eval()
