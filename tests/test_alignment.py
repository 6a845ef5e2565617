"""Alignment by kind of layer, against its definition layer by layer."""

from __future__ import annotations

import pytest
import torch

from loraclr import capture, merging
from loraclr.alignment import KINDS, alignment, kind
from loraclr.bank import Bank, filing
from loraclr.concept import Concept
from loraclr.plan import Settings
from tests.toy import ToyHost, toy_lora

BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0"


def looked_at(host: ToyHost, own: dict) -> Bank:
    bank = Bank(["a photo of a sks", ""])
    with capture.applied(host.layers(), own):
        record = filing(bank, host.encode(bank.prompts))
        with host.watch(record):
            host.sample(bank.prompts[:1], 0, 4, 4.0, host.size, host.size)
    return bank


def test_kinds() -> None:
    assert kind("lora_te_text_model_encoder_layers_0_self_attn_q_proj") == "text encoder"
    assert kind(f"{BLOCK}_attn2_to_k") == "cross-attention k, v"
    assert kind(f"{BLOCK}_attn2_to_q") == kind(f"{BLOCK}_attn1_to_k") == "attention"
    assert kind(f"{BLOCK}_ff_net_2") == "feed-forward"
    assert kind("lora_unet_mid_block_attentions_0_proj_out") == "other layers"


def test_the_same_none_half_and_twice() -> None:
    host = ToyHost()
    own = Concept(toy_lora(host, "a", 1), "sks").changes()
    bank = looked_at(host, own)
    for share, expected in ((1.0, 1.0), (0.0, 0.0), (0.5, 0.75), (2.0, 0.0), (3.0, -3.0)):
        merged = {name: (share * up, down) for name, (up, down) in own.items()}
        found = alignment(host, host.layers(), own, merged, bank)
        assert list(found) == list(KINDS)
        assert list(found.values()) == pytest.approx([expected] * len(KINDS), abs=1e-4)
    assert alignment(host, host.layers(), own, {}, bank)["feed-forward"] == pytest.approx(0)


def test_of_large_pictures_some_places_all_over_are_taken() -> None:
    places = capture.spread("any", 4096)
    assert len(places.unique()) == capture.PLACES and places.min() == 0 and places.max() >= 4096 - 16
    assert capture.spread("any", 77) is None
    host = ToyHost()
    own = Concept(toy_lora(host, "a", 1), "sks").changes()
    bank, seen = looked_at(host, own), {}
    bank.x = [x.repeat(1, 8, 8) for x in bank.x]  # 64 × 64 latents
    alignment(host, host.layers(), own, own, bank, lambda name, rows: seen.update({name: rows.shape[1]}))
    assert seen[f"{BLOCK}_ff_net_2"] == capture.PLACES and seen[f"{BLOCK}_attn2_to_k"] == 5


def test_against_the_definition() -> None:
    host = ToyHost()
    own, merged = (Concept(toy_lora(host, name, seed), "sks").changes() for seed, name in enumerate("ab"))
    bank, seen = looked_at(host, own), []
    handle = host.unet.ff.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    found = alignment(host, host.layers(), own, merged, bank)["feed-forward"]
    handle.remove()
    (up, down), (other_up, other_down) = (changes[f"{BLOCK}_ff_net_2"] for changes in (own, merged))
    x = seen[0].double().flatten(0, 1)
    wanted = x @ (up @ down).double().T
    missed = x @ (other_up @ other_down).double().T - wanted
    assert found == pytest.approx(1 - float(missed.square().sum() / wanted.square().sum()), rel=1e-4)


def test_the_hooks_are_gone_and_the_merge_reports_it() -> None:
    host = ToyHost()
    concepts = [
        Concept(toy_lora(host, name, seed), word) for seed, (name, word) in enumerate([("a", "sks"), ("b", "zyk")])
    ]
    merge = merging.merge(host, concepts, Settings(speed="closed", steps=3))
    assert set(merge.alignment) == {"a", "b"}
    shares = torch.tensor([list(shares.values()) for shares in merge.alignment.values()])
    assert shares.shape == (2, len(KINDS)) and (shares < 1).all()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in host.layers().values())
