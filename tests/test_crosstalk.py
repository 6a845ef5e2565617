"""Cross-talk: 0 for a LoRA alone, 1 for LoRAs that are stacked, as far as effects add up."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from toy import ToyHost, toy_lora

from loraclr import capture, methods
from loraclr.bank import Bank, filing
from loraclr.changes import Changes
from loraclr.concept import Concept
from loraclr.crosstalk import crosstalk


def looked_at(host: ToyHost, prompt: str, changes: Changes) -> Bank:
    """The UNet calls of a drawing of `prompt`."""
    bank = Bank([prompt, ""])
    with capture.applied(host.layers(), changes), torch.no_grad(), ExitStack() as watching:
        watching.enter_context(host.watch(filing(bank, host.encode(bank.prompts))))
        host.sample([prompt], 3, 6, 4.0, 32, 32)
    return bank


@pytest.fixture
def host() -> ToyHost:
    return ToyHost()


def test_alone_stacked_and_between(host: ToyHost) -> None:
    """Half of the other LoRA counts as half; changes are small, so that effects add up."""
    modules = host.layers()
    asked = [Concept(toy_lora(host, n, k, size=0.004), n).changes(modules) for k, n in enumerate(("cat", "dog"))]
    bank = looked_at(host, "a cat", asked[0])
    half = {name: (up / 2, down) for name, (up, down) in asked[1].items()}
    for merged, share in (
        (asked[0], 0.0),
        (methods.stacked(asked), 1.0),
        (methods.stacked([asked[0], half]), 0.5),
    ):
        own, other = crosstalk(host, modules, asked, merged, 0, bank)
        assert math.isnan(own)
        assert other == pytest.approx(share, abs=0.02)


def test_a_lora_that_does_nothing_has_no_share(host: ToyHost) -> None:
    """There is no effect to find, so nothing is divided by 0; the model has no hooks left."""
    modules = host.layers()
    asked = [Concept(toy_lora(host, "cat", 1), "cat").changes(modules), {}]
    bank = looked_at(host, "a cat", asked[0])
    assert all(map(math.isnan, crosstalk(host, modules, asked, asked[0], 0, bank)))
    assert not any(module._forward_hooks for module in modules.values())
    assert all(map(math.isnan, crosstalk(host, modules, asked, asked[0], 0, Bank(["", ""]))))
