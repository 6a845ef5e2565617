"""An extension of the test's own: asks the webui from inside what a test cannot see from outside, by two routes."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import networks
import torch
from fastapi import Body, FastAPI
from modules import devices, script_callbacks, shared
from modules.call_queue import queue_lock
from torch import nn

import loraclr
from loraclr import files, merging, plan
from loraclr.capture import applied, is_cross_kv
from loraclr.changes import Changes, changes_of
from loraclr.hosts.a1111 import A1111
from loraclr.lora import LoRA
from loraclr.plan import Settings

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


def with_word(host: A1111, lora: LoRA, word: str) -> LoRA:
    """The LoRA with embeddings for the model's text encoders; for SD 1.x one for each cross-attention layer."""
    random = torch.Generator().manual_seed(0)
    encoders = {"sd1": ("clip_l", ""), "sd2": ("clip_h", ""), "sdxl": ("clip_l", "1", "clip_g", "2")}[host.family]
    vectors = {}
    for encoder, number in zip(encoders[::2], encoders[1::2], strict=True):
        layer = host.layers()[f"lora_te{number}_text_model_encoder_layers_0_mlp_fc1"]
        vectors[encoder] = 0.1 * torch.randn(16 if host.family == "sd1" else 2, layer.weight.shape[1], generator=random)
    if host.family == "sd1":
        return replace(lora, layer_embeddings={word: vectors["clip_l"]})
    return replace(lora, embeddings={word: vectors})


def read_in_order(host: A1111) -> list[str]:
    """The layers that read the text, as the UNet calls them."""
    called, handles = [], []
    for name, module in host.layers().items():
        if is_cross_kv(name):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: called.append(name)))
    seen(host)
    for handle in handles:
        handle.remove()
    return called


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
    """Inside, keeps what the webui says of keys that it does not know and of layers that it fails at.

    It says so of every bundled word, too, and uses it.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        keys = re.findall(r"'([^']+)': ", text)
        if text.startswith("Network ") and not (keys and all(key.startswith("bundle_emb.") for key in keys)):
            self.said.append(text)

    def __enter__(self) -> Unmatched:
        root = logging.getLogger()
        self.before = root.level
        root.addHandler(self)
        root.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        root.removeHandler(self)
        root.setLevel(self.before)


def put_in(names: list[str]) -> None:
    """These LoRAs of the webui's own in all of its layers."""
    load(names)
    modules = shared.sd_model.network_layer_mapping.values()
    # An attention's last layer is never called: what it multiplies by is given to the attention.
    inside = {module.out_proj for module in modules if isinstance(module, nn.MultiheadAttention)}
    for module in set(modules) - inside:
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)):
            networks.network_apply_weights(module)


def parameters(host: A1111) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of every layer by our names, copied."""
    return {
        name: (module.weight.clone(), None if module.bias is None else module.bias.clone())
        for name, module in host.layers().items()
    }


def away(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The distance of two changes relative to the wanted one."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))


def against_ours(host: A1111, name: str) -> dict[str, Any]:
    """How far the webui's ΔW of a file's layers are from ours."""
    on_disk = networks.available_networks[name]
    lora, before = files.load(on_disk.filename), parameters(host)
    called = {id(module): layer for layer, module in host.layers().items()}
    computed, failed = {}, []
    with Unmatched() as listener:
        try:
            network = networks.load_network(name, on_disk)
        except AssertionError as error:  # one key that it does not know, and the webui reads nothing of a file
            return {"layers": sorted(lora.layers), "unused": lora.unused, "refused": str(error)}
        for module in network.modules.values():
            layer = called.get(id(module.sd_module))
            try:
                found = module.calc_updown(module.sd_module.weight)[0] if layer in lora.layers else None
            except RuntimeError as error:
                failed.append(f"{layer}: {error}")
                continue
            if found is not None and (wanted := lora.layers[layer].delta(before[layer][0])).norm() > 0:
                computed[layer] = away(found, wanted)
        put_in([name])
    after = parameters(host)
    put_in([])
    weights, biases, others = {}, {}, []
    for layer, ((weight, bias), (old, old_bias)) in ((k, (after[k], before[k])) for k in before):
        change = lora.layers.get(layer)
        if change is None:
            others += [layer] * (not torch.equal(weight, old))
            continue
        weights[layer] = away(weight - old, change.delta(old))
        if change.bias is not None:
            biases[layer] = away(bias - old_bias, change.bias_delta(old_bias))
    return {
        "layers": sorted(lora.layers),
        "unused": lora.unused,
        "computed": computed,
        "weights": weights,
        "biases": biases,
        "others": others,
        "failed": failed,
        "complaints": listener.said,
    }


def deltas(names: list[str] = Body(embed=True)) -> Any:  # noqa: B008
    """What the webui makes of each of these files, see `against_ours`."""
    with queue_lock, torch.no_grad():
        networks.list_available_networks()
        host = A1111()
        put_in([])
        return {name: against_ours(host, name) for name in names}


def probe(names: list[str] = Body(), triggers: list[str] = Body(), name: str = Body()) -> Any:  # noqa: B008
    """Merge these LoRAs, the last one with a word, and compare our hooks with the webui's own loading of the result.

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
        worded = with_word(host, concepts[-1].lora, triggers[-1])
        concepts[-1] = replace(concepts[-1], lora=worded)
        merged = merging.merge(host, concepts, Settings(speed="closed", **QUICK))
        stages: list[str] = []
        few = {"scenes": 1, "speed": "balanced", **QUICK}
        with patch.dict(plan.POLISH_STEPS, fast=2, balanced=3), patch.dict(plan.READING_STEPS, balanced=4):
            trained = merging.merge(host, concepts, Settings(**few), lambda stage, *_: stages.append(stage))
        path = loraclr.write(merged, f"{shared.cmd_opts.lora_dir}/{name}.safetensors", torch.float32, overwrite=True)
        untouched = all(torch.equal(a, b) for a, b in zip(before, weights(), strict=True))
        host.publish(path)
        lora = files.load(path)
        changes = changes_of(lora, host.layers())
        dead = without_gradient(host, changes)
        plain = seen(host)
        with host.session(), applied(host.layers(), changes):
            wordless = seen(host)
            with host.words(merged.words):
                wanted = seen(host)
        with Unmatched() as listener:
            load([name])
            theirs = seen(host)
        load([])
        after, order = seen(host), read_in_order(host)
    listed = networks.available_networks[name]
    return {
        "family": host.family,
        "listed": [listed.sd_version.name, listed.hash],
        "hash": files.model_hash(path),
        "order": order,
        "words": {word: list(vectors) for word, vectors in merged.words.items()},
        "word's effect": [float((b - d).norm() / d.norm()) for b, d in zip(wanted, wordless, strict=True)],
        "target": host.target,
        "size": host.size,
        "repeated": [float(tokens), float(repeated)],
        "unused": lora.unused,
        "layers": sorted(merged.layers),
        "missing": sorted(set(concepts[0].lora.layers) - set(merged.layers)),
        "missed": merged.missed,
        "without_gradient": dead,
        "untouched": untouched,
        "stages": stages,
        "trained": sorted(trained.layers),
        "apart": [float((a - b).norm() / (b - c).norm()) for a, b, c in zip(theirs, wanted, plain, strict=True)],
        "effect": [float((b - c).norm() / c.norm()) for b, c in zip(wanted, plain, strict=True)],
        "restored": all(torch.allclose(a, b, atol=1e-6) for a, b in zip(after, plain, strict=True)),
        "complaints": listener.said,
    }


def add_route(_: Any, app: FastAPI) -> None:
    """Called by the webui when its server is there."""
    app.add_api_route("/probe", probe, methods=["POST"])
    app.add_api_route("/deltas", deltas, methods=["POST"])


script_callbacks.on_app_started(add_route)
