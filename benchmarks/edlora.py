"""`python -m benchmarks.edlora`: an ED-LoRA's embeddings, trained on the miniature, and what one text leaves of them.

The embeddings for single layers start at a concept's trigger and are trained as Mix-of-Show does, its LoRA frozen. The
reference is a forward pass in which each layer reads a text of its own; other programs read one for all.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from loraclr import files, folding, report
from loraclr.capture import applied
from loraclr.changes import Changes, changes_of, is_text
from loraclr.cli import quiet
from loraclr.hosts import Context
from loraclr.hosts.standalone import Standalone
from loraclr.lora import LoRA
from loraclr.prompts import filled
from miniature import LORAS
from miniature.diffusion import DROP, encode, noise_loss, reword, stage_scenes
from miniature.drawing import open_miniature
from miniature.scenes import base_scene, concept_scene
from miniature.vocabulary import CONCEPT

WORD = "<concept1>"
RATE = 0.077  # of an embedding's own root mean square: Mix-of-Show trains at 1e-3 what begins at 0.013
ROWS, PRIOR = 4, 0.12
TIMES = (200, 500, 800)
#: In none of the prompts that are folded on.
UNSEEN = ("a {} on a purple background", "a house and a {}", "two {}", "a fish beside a {}",
          "a {} and a bird on a teal background", "a photo of a {} on an orange background", "{}")  # fmt: skip
OTHERS = ("a bird", "a photo of a cake on a purple background", "a boat on a gray background",
          "a fish and a bee on a teal background", "a snake on a pink background", "an umbrella")  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A concept's LoRA with one embedding for each cross-attention layer, and the model that it is for."""

    host: Standalone
    modules: dict[str, nn.Module]
    lora: LoRA
    changes: Changes

    @contextmanager
    def acting(self, changes: Changes) -> Iterator[None]:
        """Inside, these changes act on the UNet; texts are there already."""
        with applied(self.modules, {name: pair for name, pair in changes.items() if not is_text(name)}):
            yield

    @torch.no_grad()
    def predicted(self, changes: Changes, texts: Tensor, t: int) -> Tensor:
        """What the UNet puts out for texts (B, T, d) with these changes, from noise that is always the same."""
        x = torch.randn(len(texts), 4, 16, 16, generator=torch.Generator().manual_seed(1))
        with self.acting(changes):
            return self.host.predict(x, torch.full((len(texts),), t), Context(texts))


def trained(host: Standalone, name: str, steps: int) -> Trained:
    """Train embeddings of a concept by the diffusion loss, each layer's through its own text."""
    concept, modules = CONCEPT[name], host.layers()
    lora = files.load(LORAS / f"{name}.safetensors")
    changes = changes_of(lora, modules)
    tokenizer, encoder = host.pipeline.tokenizer, host.pipeline.text_encoder
    begin = encoder.get_input_embeddings().weight[tokenizer(concept.trigger, add_special_tokens=False).input_ids]
    vectors = begin.detach().repeat(len(folding.cross_layers()), 1).requires_grad_()
    rate = RATE * float(begin.square().mean().sqrt())
    optimizer = torch.optim.AdamW([vectors], lr=rate, weight_decay=1e-2)
    for step in range(steps):
        rng, generator = random.Random(f"edlora {step}"), torch.Generator().manual_seed(step)
        scenes, captions = [], []
        for _ in range(ROWS):
            draw = partial(base_scene, rng) if rng.random() < PRIOR else partial(concept_scene, rng, name)
            scenes += stage_scenes("whole", 1, draw)
            captions.append(reword(rng, scenes[-1].caption()) if rng.random() > DROP else "")
        captions = [caption.replace(concept.trigger, WORD) for caption in captions]
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        with applied(modules, changes):
            texts = layered_texts(host, vectors, captions)
            with folding.layered(modules, texts):
                predict = partial(_predict, host, texts.usual)
                noise_loss(predict, encode(scenes), generator).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Trained(host, modules, replace(lora, layer_embeddings={WORD: vectors.detach()}), changes)


def _predict(host: Standalone, texts: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    return host.predict(noisy, t, Context(texts))


def layered_texts(host: Standalone, vectors: Tensor, captions: list[str]) -> folding.Texts:
    """Captions as every layer reads them, with gradients to its vector."""
    by_layer, ids = {}, None
    for place, layer in enumerate(folding.cross_layers()):
        with host.words({WORD: {"clip_l": vectors[place : place + 1]}}):
            if ids is None:  # the words are cut off the prompts in the same way every time
                asked = host.pipeline.tokenizer(captions, padding="max_length", max_length=77, truncation=True)
                ids = torch.as_tensor(asked.input_ids)
            by_layer[layer] = host.pipeline.text_encoder(ids).last_hidden_state
    return folding.Texts(next(iter(by_layer.values())).detach(), by_layer)


def left(model: Trained) -> list[str]:
    """Of unseen prompts with the word, what the mean embedding alone misses at each timestep relative to the output,
    how much of that is left with the folding, and how far other prompts' output moves, relative to the same.
    """
    host, modules, lora, own = model.host, model.modules, model.lora, model.changes
    texts = folding.read(host, modules, lora, own, [text.format(WORD) for text in UNSEEN])
    folded = folding.folded(host, modules, lora, own, filled(WORD))
    with torch.no_grad(), applied(modules, {name: pair for name, pair in own.items() if is_text(name)}):
        beside = host.encode(list(OTHERS)).tokens
    rows = []
    for t in TIMES:
        with folding.layered(modules, texts):
            wanted = model.predicted(own, texts.usual, t)
        missed = (model.predicted(own, texts.usual, t) - wanted).norm()
        kept = (model.predicted(folded, texts.usual, t) - wanted).norm()
        moved = (model.predicted(folded, beside, t) - model.predicted(own, beside, t)).norm()
        moved = moved * (len(UNSEEN) / len(OTHERS)) ** 0.5
        rows.append([missed / wanted.norm(), kept / missed, moved / missed])
    missed, kept, moved = zip(*rows, strict=True)
    return [", ".join(f"{float(value):.2f}" for value in values) for values in (missed, kept, moved)]


def main() -> None:
    """Print a line for each concept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--concepts", nargs="+", default=["tiger", "panda", "robot"], choices=list(CONCEPT))
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    quiet()
    host = open_miniature("cpu")
    rows = []
    for name in args.concepts:
        model = trained(host, name, args.steps)
        vectors = model.lora.layer_embeddings[WORD]
        apart = (vectors - vectors.mean(0)).norm(dim=1).mean() / vectors.mean(0).norm()
        rows.append([name, f"{float(apart):.2f}", *left(model)])
    times = ", ".join(map(str, TIMES))
    columns = ["concept", "embeddings apart", "mean misses", "left of it, folded", "other prompts move"]
    title = f"ED-LoRA by one text for all layers; UNet's output at t = {times}"
    print(report.text(report.Table(title, columns, rows)))


if __name__ == "__main__":
    main()
