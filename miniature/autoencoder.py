"""The miniature's VAE: Stable Diffusion's AutoencoderKL (factor 8, 4 channels) in small, with latents by design.

Training an encoder and a decoder together takes a CPU many hours until colours survive. Here the latents are given:
the mean colour of each block of 8×8 pixels on three opponent axes, and how busy the block is. So the UNet can be
trained before the VAE exists; the decoder learns to draw pictures from such latents, the encoder to compute them.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from miniature.scenes import BOX, GRID, SIDE, any_scene, crop
from miniature.training import train

SCALE = 0.18215  # Stable Diffusion's scale factor: the VAE's own latents are 1 / SCALE as large as the UNet's
MEAN = torch.tensor([0.21, 0.20, -0.04, 0.07]).view(1, 4, 1, 1)  # of the four features over scenes
SPREAD = torch.tensor([0.34, 0.65, 0.33, 0.145]).view(1, 4, 1, 1)
NOISE = 0.15  # on the latents while the decoder trains, so that it forgives the UNet's errors


def build() -> AutoencoderKL:
    """An untrained autoencoder, 1.0 M parameters."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=SIDE,
        scaling_factor=SCALE,
    )
    nn.init.eye_(vae.post_quant_conv.weight.data[:, :, 0, 0]).mul_(SCALE)
    return vae


def pixels(pictures: list) -> Tensor:
    """PIL pictures of one size → (B, 3, H, W) in -1..1."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def latents(picture: Tensor) -> Tensor:
    """The latents by design: (B, 3, H, W) in -1..1 → (B, 4, H/8, W/8), about zero mean and unit variance.

    Channels: brightness, red - blue, green - magenta, standard deviation of the brightness inside the block.
    """
    red, green, blue = F.avg_pool2d(picture, 8).unbind(1)
    grey = picture.mean(1, keepdim=True)
    variance = F.avg_pool2d(grey**2, 8) - F.avg_pool2d(grey, 8) ** 2
    busy = variance.clamp(min=0).sqrt().squeeze(1)
    features = torch.stack([(red + green + blue) / 3, red - blue, green - (red + blue) / 2, busy], dim=1)
    return (features - MEAN.to(picture)) / SPREAD.to(picture)


def batch(rng: random.Random, step: int) -> Tensor:
    """Mostly boxes of 64×64 around objects, every fourth time whole pictures."""
    if step % 4 == 3:
        return pixels([any_scene(rng).render() for _ in range(4)])
    pictures = []
    for _ in range(16):
        scene = any_scene(rng)
        if rng.random() < 0.5:
            left = BOX * rng.randrange(len(scene.objects))
            pictures.append(crop(scene).render().crop((left, 0, left + BOX, BOX)))
        else:
            x, y = (min(max(c + rng.choice((-GRID, 0, GRID)), 0), SIDE - BOX) for c in rng.choice(scene.corners))
            pictures.append(scene.render().crop((x, y, x + BOX, y + BOX)))
    return pixels(pictures)


def slopes(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, downwards and to the right."""
    return picture[..., 1:, :] - picture[..., :-1, :], picture[..., 1:] - picture[..., :-1]


def drawing_loss(vae: AutoencoderKL, picture: Tensor) -> Tensor:
    """L1 + MSE on pixels and L1 on their slopes (edges) of what the decoder draws from noisy latents."""
    latent = latents(picture)
    with torch.autocast(picture.device.type, torch.bfloat16):
        drawn = vae.decode((latent + NOISE * torch.randn_like(latent)) / SCALE).sample.float()
    edges = sum(F.l1_loss(ours, real) for ours, real in zip(slopes(drawn), slopes(picture), strict=True))
    return F.l1_loss(drawn, picture) + F.mse_loss(drawn, picture) + edges


def encoding_loss(vae: AutoencoderKL, picture: Tensor) -> Tensor:
    """How far the encoder's mean is from the latents by design, in units of their spread."""
    return F.mse_loss(vae.encode(picture).latent_dist.mean * SCALE, latents(picture))


def fit(run: Path, device: torch.device, decoder_steps: int, encoder_steps: int) -> AutoencoderKL:
    """Train decoder and encoder (or go on with them)."""
    torch.manual_seed(0)
    vae = build().to(device)

    def run_part(name: str, parts: list[nn.Module], loss, steps: int, rate: float) -> None:
        module = nn.ModuleList(parts)
        groups = [{"params": list(module.parameters()), "lr": rate}]
        train(name, module, groups, lambda step: loss(vae, batch(random.Random(step), step).to(device)), steps, run)

    run_part("decoder", [vae.post_quant_conv, vae.decoder], drawing_loss, decoder_steps, 2e-3)
    run_part("encoder", [vae.encoder, vae.quant_conv], encoding_loss, encoder_steps, 1e-3)
    with torch.no_grad():  # a posterior without spread: encoding is deterministic
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    return vae.eval()
