"""A host small enough for a test: the same few functions over a network of a few layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from loraclr.hosts import Checkpoint, Context
from loraclr.lora import Layer, LoRA
from loraclr.webui.surroundings import Listed

WIDTH, TOKENS = 8, 5


class ToyUNet(nn.Module):
    """Cross-attention to the text and a feed-forward layer, over (B, 4, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Conv2d(4, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.ff = nn.Linear(WIDTH, WIDTH)
        self.norm, self.group = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        hidden = self.inward(x * (1 + t.view(-1, 1, 1, 1) / 1000))
        rows = hidden.flatten(2).mT
        rows = rows + nn.functional.scaled_dot_product_attention(
            self.to_q(rows), self.to_k(context), self.to_v(context)
        )
        rows = rows + self.ff(self.norm(rows)).tanh()
        return self.outward(self.group(rows.mT.reshape(hidden.shape)))


class ToyHost:
    """See `loraclr.hosts.Host`. Prompts are hashed into token embeddings. With `norms` it has two norm layers.

    With `pieces` a prompt of more words than TOKENS makes all that are encoded with it longer.
    """

    family, size, target, checkpoint = "sd1", 64, "epsilon", Checkpoint("toy.safetensors", "1")

    def __init__(self, seed: int = 0, norms: bool = False, pieces: bool = False) -> None:
        torch.manual_seed(seed)
        self.device = torch.device("cpu")
        self.alphas = torch.linspace(0.999, 0.005, 1000)
        self.unet, self.text = ToyUNet(), nn.Linear(WIDTH, WIDTH)
        if norms:
            self.unet.norm, self.unet.group = nn.LayerNorm(WIDTH), nn.GroupNorm(2, WIDTH)
        self.own_words: dict[str, Tensor] = {}
        self.records: list = []
        self.drawn, self.pieces = 0, pieces

    def layers(self) -> dict[str, nn.Module]:
        norms = {
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm3": self.unet.norm,
            "lora_unet_mid_block_attentions_0_norm": self.unet.group,
        }
        return {
            **{name: module for name, module in norms.items() if not isinstance(module, nn.Identity)},
            "lora_te_text_model_encoder_layers_0_mlp_fc1": self.text,
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_q": self.unet.to_q,
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": self.unet.to_k,
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": self.unet.to_v,
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": self.unet.ff,
            "lora_unet_mid_block_attentions_0_proj_out": self.unet.outward,
        }

    def encode(self, prompts: list[str]) -> Context:
        """As long as the longest prompt needs, in pieces of TOKENS words, as the webui does."""
        tokens, length = [], TOKENS * max(-(-len(prompt.split()) // TOKENS) or 1 for prompt in prompts)
        length = length if self.pieces else TOKENS
        for prompt in prompts:
            words = [*prompt.split()[:length], *[""] * length][:length]
            seeds = [sum((place + 1) * ord(letter) for place, letter in enumerate(word)) for word in words]
            usual = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(s)) for s in seeds]
            tokens.append(torch.stack([self.own_words.get(w, u) for w, u in zip(words, usual, strict=True)]))
        return Context(self.text(torch.stack(tokens)))

    def predict(self, x: Tensor, t: Tensor, context: Context) -> Tensor:
        return self.unet(x, t, context.tokens)

    @torch.no_grad()
    def sample(
        self, prompts: list[str], seed: int, steps: int, guidance: float, width: int, height: int
    ) -> list[Image.Image]:
        self.drawn += len(prompts)
        noise = [
            torch.randn(4, height // 8, width // 8, generator=torch.Generator().manual_seed(seed + k))
            for k in range(len(prompts))
        ]
        x = torch.stack(noise)
        contexts = self.encode(prompts), self.encode([""] * len(prompts))
        for t in torch.linspace(999, 1, steps):
            times = t.expand(len(prompts))
            told, untold = (self.predict(x, times, context) for context in contexts)
            for context, prediction in zip(contexts, (told, untold), strict=True):
                for record in self.records:
                    record(x, times, context, prediction)
            x = x - (untold + guidance * (told - untold)) / steps
        return [Image.new("RGB", (width, height)) for _ in prompts]

    @contextmanager
    def watch(self, record) -> Iterator[None]:
        self.records.append(record)
        try:
            yield
        finally:
            self.records.remove(record)

    @contextmanager
    def words(self, embeddings) -> Iterator[None]:
        self.own_words = {word: vectors["clip_l"][0] for word, vectors in embeddings.items()}
        yield
        self.own_words = {}

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def publish(self, path: Path) -> None:
        assert path.is_file()


class ToyAround:
    """As much of `loraclr.webui.surroundings.Surroundings` as a job needs: a toy, and a folder of LoRAs for it.

    Attributes:
        logged: what the log has been told.
    """

    api, api_auth = True, ""

    def __init__(self, loras: Path) -> None:
        self.loras, self.toy = loras, ToyHost()
        self.logged: list[str] = []

    def folder(self) -> Path:
        return self.loras

    def files(self, suffixes: tuple[str, ...]) -> list[Path]:
        return []

    def listed(self) -> list[Listed]:
        return [Listed(path.stem, path, {}, "sd1") for path in sorted(self.loras.glob("*.safetensors"))]

    def found(self, name: str) -> Listed | None:
        return next((entry for entry in self.listed() if entry.name == name), None)

    def host(self) -> ToyHost:
        return self.toy

    def option(self, name: str, usual: Any) -> Any:
        return usual

    def report(self, stage: str, share: float, left: float | None = None) -> None:
        pass

    @contextmanager
    def job(self, task: str) -> Iterator[None]:
        yield

    def log(self, what: str) -> None:
        self.logged.append(what)


def toy_lora(host: ToyHost, name: str, seed: int, rank: int = 2, size: float = 0.4) -> LoRA:
    """A random LoRA on every layer of the toy."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer, module in host.layers().items():
        if module.weight.ndim == 1:
            continue
        o, d = module.weight.shape[:2]
        up, down = torch.randn(o, rank, generator=generator), torch.randn(rank, d, generator=generator)
        layers[layer] = Layer(up * size / rank**0.5, down / d**0.5, float(rank), module.weight.dim() == 4)
    return LoRA(name, None, "sd1", layers, {})
