"""Training the concept LoRAs: many at once, each picture of a step routed through its own concept's factors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from loraclr import files
from loraclr.keys import kohya_name
from loraclr.lora import Layer
from miniature import LORAS
from miniature.diffusion import DROP, Denoiser, encode, noise_loss, reword, side_of, stage_scenes
from miniature.scenes import base_scene, concept_scene
from miniature.training import train
from miniature.vocabulary import Concept

ROWS = {"box": 6, "strip": 4, "whole": 3}  # pictures of each concept in a step
STAGES = ((0.2, "box", 0), (0.2, "strip", 0), (0.6, "whole", 0))
PRIOR = 0.12  # share of base scenes without the trigger, so that a LoRA leaves the rest of the model alone
BLOCKS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
          "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
          "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # fmt: skip


def adapted(model: Denoiser) -> dict[str, nn.Module]:
    """kohya's name → module, for every layer that gets factors: attention, feed-forward and projections."""
    found = {}
    for part, root in (("unet", model.unet), ("text_encoder", model.text_encoder)):
        for path, module in root.named_modules():
            if path.endswith(BLOCKS) and isinstance(module, nn.Linear | nn.Conv2d):
                found[kohya_name(part, path)] = module
    return found


class Adapters(nn.Module):
    """Factors of K concepts on every adapted layer, as hooks: row b of a batch goes through concept `route[b]`.

    A concept of less than the largest rank has zeros in the rest, which stay zero: both factors' gradients vanish.
    """

    def __init__(self, model: Denoiser, concepts: Sequence[Concept], seed: int = 0) -> None:
        super().__init__()
        self.concepts, self.route = concepts, torch.zeros(0, dtype=torch.long)
        self.layers = adapted(model)
        generator = torch.Generator().manual_seed(seed)
        rank = max(concept.rank for concept in concepts)
        kept = torch.stack([torch.arange(rank) < concept.rank for concept in concepts]).float()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, module in self.layers.items():
            outputs, inputs = module.weight.shape[:2]
            start = torch.randn(len(concepts), rank, inputs, generator=generator) / inputs**0.5
            self.down[name] = nn.Parameter(start * kept[..., None])
            self.up[name] = nn.Parameter(torch.zeros(len(concepts), outputs, rank))
            module.register_forward_hook(lambda _, args, output, name=name: output + self.change(name, args[0]))

    def change(self, name: str, x: Tensor) -> Tensor:
        """What the rows' own LoRAs add to a layer's output; x is (B, tokens, d) or (B, d, h, w)."""
        down, up = self.down[name][self.route], self.up[name][self.route]
        if x.dim() == 4:
            flat = x.flatten(2)
            return torch.bmm(up, torch.bmm(down, flat)).view(x.shape[0], -1, *x.shape[2:])
        return torch.bmm(torch.bmm(x, down.mT), up.mT)

    @torch.no_grad()
    def layers_of(self, place: int) -> dict[str, Layer]:
        """One concept's LoRA, at its own rank (alpha = rank)."""
        rank = self.concepts[place].rank
        return {
            name: Layer(
                up=self.up[name][place, :, :rank].clone().float(),
                down=self.down[name][place, :rank].clone().float(),
                alpha=float(rank),
                conv=isinstance(module, nn.Conv2d),
            )
            for name, module in self.layers.items()
        }


def fit(model: Denoiser, concepts: Sequence[Concept], run: Path, device: torch.device, steps: int) -> Adapters:
    """Train the LoRAs of `concepts` side by side (or go on with them) on a frozen model, whose hooks they become."""
    torch.manual_seed(2)
    model.requires_grad_(False)
    adapters = Adapters(model, concepts).to(device)

    def loss(step: int) -> Tensor:
        rng, generator = random.Random(f"loras {step}"), torch.Generator().manual_seed(step)
        side, _ = side_of(rng, step / steps, STAGES)
        scenes, captions = [], []
        for concept in concepts:
            for _ in range(ROWS[side]):
                draw = partial(base_scene, rng) if rng.random() < PRIOR else partial(concept_scene, rng, concept.name)
                scenes += stage_scenes(side, 1, draw)
                captions.append(reword(rng, scenes[-1].caption()) if rng.random() > DROP else "")
        adapters.route = torch.arange(len(concepts), device=device).repeat_interleave(ROWS[side])
        rows = model.words(captions).to(device)
        return noise_loss(lambda noisy, t: model(noisy, t, rows), encode(scenes).to(device), generator)

    name = "loras-" + "-".join(concept.name[:3] for concept in concepts)
    train(name, adapters, [{"params": list(adapters.parameters()), "lr": 3e-3}], loss, steps, run, warmup=30)
    return adapters


def save(adapters: Adapters, folder: Path = LORAS) -> None:
    """Write each concept's LoRA as kohya would, with its trigger words in metadata and sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, concept in enumerate(adapters.concepts):
        metadata = {
            "ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_network_module": "networks.lora",
            "ss_network_dim": str(concept.rank), "ss_network_alpha": str(float(concept.rank)),
            "ss_output_name": concept.name, "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.title": concept.name, "modelspec.trigger_phrase": concept.phrase,
        }  # fmt: skip
        path = files.save(folder / f"{concept.name}.safetensors", adapters.layers_of(place), metadata, overwrite=True)
        files.write_sidecar(path, concept.phrase, "sd1", f"The miniature's {concept.name}.")
