"""An extension of the test's own: asks the webui from inside what a test cannot see from outside (POST /probe)."""

from __future__ import annotations

import logging
from typing import Any

import networks
import torch
from fastapi import Body, FastAPI
from modules import devices, script_callbacks, shared
from modules.call_queue import queue_lock

import loraclr
from loraclr import files, merging
from loraclr.capture import Changes, applied, changes_of
from loraclr.hosts.a1111 import A1111

PROMPT = "a sks beside a zyk"
QUICK = {"steps": 2, "guidance": 2.0, "size": 64, "tokens": 32, "neutral_prompts": ("a dog",)}


def weights() -> list[torch.Tensor]:
    """All of the model's, copied."""
    return [value.clone() for value in shared.sd_model.state_dict().values()]


def seen(host: A1111) -> list[torch.Tensor]:
    """What the text encoders and the UNet put out now."""
    context = host.encode([PROMPT])
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(devices.device)
    outputs = [context.tokens, host.predict(x, torch.tensor([500.0]), context)]
    return outputs if context.pooled is None else [*outputs, context.pooled]


def load(names: list[str]) -> None:
    """LoRAs of the webui's own, at full strength; each layer takes them in when it is next called."""
    networks.load_networks(names, [1.0] * len(names), [1.0] * len(names), [None] * len(names))


@torch.enable_grad()
def without_gradient(host: A1111, changes: Changes) -> list[str]:
    """Layers whose factors get no gradient from the UNet's output."""
    live = {name: tuple(factor.clone().requires_grad_() for factor in pair) for name, pair in changes.items()}
    with host.session(), applied(host.layers(), live):
        output = seen(host)[1]
        downs = [down for _, down in live.values()]
        found = torch.autograd.grad(output.square().sum(), downs, allow_unused=True)
    return sorted(name for name, value in zip(live, found, strict=True) if value is None or not value.abs().max() > 0)


class Unmatched(logging.Handler):
    """Keeps what the webui says of keys that it does not know and of layers that it fails at."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith("Network "):
            self.said.append(text)


def probe(names: list[str] = Body(), triggers: list[str] = Body(), name: str = Body()) -> Any:  # noqa: B008
    """Merge these LoRAs, and compare our hooks with the webui's own loading of the result.

    Returns how far the two are apart relative to what the LoRA does, for each output, and what the webui complained of.
    """
    with queue_lock, torch.no_grad():
        networks.list_available_networks()
        before = weights()
        host = A1111()
        concepts = [
            loraclr.Concept(files.load(networks.available_networks[n].filename), trigger, prompts=("a {}",))
            for n, trigger in zip(names, triggers, strict=True)
        ]
        calls = []
        with host.session(), host.watch(lambda *call: calls.append(call)):
            host.sample([PROMPT], 3, 2, 2.0, 64, 96)
            x, t, context, prediction = calls[0]
            ours = host.encode([PROMPT, ""])
            tokens = (context.tokens - ours.tokens).norm() / ours.tokens.norm()
            repeated = (host.predict(x, t, ours) - prediction).norm() / prediction.norm()
        settings = merging.Settings(speed="closed", **QUICK)
        merged = merging.merge(host, concepts, settings)
        path = loraclr.write(merged, f"{shared.cmd_opts.lora_dir}/{name}.safetensors", torch.float32, overwrite=True)
        untouched = all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
        host.publish(path)
        lora = files.load(path)
        changes = changes_of(lora, host.layers())
        dead = without_gradient(host, changes)
        plain = seen(host)
        with host.session(), applied(host.layers(), changes):
            wanted = seen(host)
        listener, root = Unmatched(), logging.getLogger()
        level = root.level
        root.addHandler(listener)
        root.setLevel(logging.DEBUG)
        try:
            load([name])
            theirs = seen(host)
        finally:
            root.removeHandler(listener)
            root.setLevel(level)
        load([])
        after = seen(host)
    return {
        "family": host.family,
        "target": host.target,
        "size": host.size,
        "repeated": [float(tokens), float(repeated)],
        "unused": lora.unused,
        "layers": sorted(merged.layers),
        "missing": sorted(set(concepts[0].lora.layers) - set(merged.layers)),
        "missed": merged.missed,
        "without_gradient": dead,
        "untouched": untouched,
        "apart": [float((a - b).norm() / (b - c).norm()) for a, b, c in zip(theirs, wanted, plain, strict=True)],
        "effect": [float((b - c).norm() / c.norm()) for b, c in zip(wanted, plain, strict=True)],
        "restored": all(torch.allclose(a, b, atol=1e-6) for a, b in zip(after, plain, strict=True)),
        "complaints": listener.said,
    }


def add_route(_: Any, app: FastAPI) -> None:
    """Called by the webui when its server is there."""
    app.add_api_route("/probe", probe, methods=["POST"])


script_callbacks.on_app_started(add_route)
