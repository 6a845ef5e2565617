"""ED-LoRA's embeddings for single layers: what one text for all of them gives, against a text for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_words import CLOSED, WORD, embedded
from toy import ToyHost, toy_lora

from loraclr import files, folding
from loraclr.bank import Bank
from loraclr.capture import applied, is_cross_kv
from loraclr.changes import changes_of, is_text
from loraclr.concept import Concept
from loraclr.hosts import Context
from loraclr.merging import _Run, by_closed_form, merge
from loraclr.plan import Settings
from loraclr.prompts import filled

#: In none of the prompts that are folded on.
UNSEEN = ["a {} on a purple background", "a house and a {}", "two {}", "a fish beside a {}"]
OTHERS = ["a bird", "a photo of a cake on a purple background", "a boat on a gray background"]


@pytest.fixture(scope="module")
def host():
    """The miniature, run by diffusers."""
    pytest.importorskip("diffusers")
    from miniature import drawing

    return drawing.open_miniature("cpu")


@pytest.fixture(scope="module")
def lora(host):
    """One of the miniature's LoRAs, called by a word whose embeddings are 30 % away from its trigger's."""
    from miniature import LORAS

    trigger = host.pipeline.tokenizer("sks", add_special_tokens=False).input_ids
    own = host.pipeline.text_encoder.get_input_embeddings().weight[trigger].detach()
    noise = torch.randn(16, own.shape[1], generator=torch.Generator().manual_seed(0))
    vectors = own + 0.3 * own.norm() * torch.nn.functional.normalize(noise)
    return replace(files.load(LORAS / "tiger.safetensors"), layer_embeddings={WORD: vectors})


def test_the_layers_are_those_that_read_the_text_in_the_order_of_calls(host) -> None:
    called, handles = [], []
    for name, module in filter(lambda item: is_cross_kv(item[0]), host.layers().items()):
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: called.append(name)))
    host.predict(torch.zeros(1, 4, 16, 16), torch.tensor([500]), host.encode([""]))
    for handle in handles:
        handle.remove()
    assert called == [f"{layer}_to_{side}" for layer in folding.cross_layers() for side in "kv"]


@torch.no_grad()
def test_less_is_lacking_of_prompts_that_were_not_seen_and_others_stay(host, lora) -> None:
    layers = host.layers()
    own = changes_of(lora, layers)
    changed = folding.folded(host, layers, lora, own, filled(WORD))
    assert {name for name in changed if changed[name] is not own.get(name)} == set(filter(is_cross_kv, layers))
    texts = folding.read(host, layers, lora, own, [text.format(WORD) for text in UNSEEN])
    lacking = []
    for layer, read in texts.by_layer.items():
        for name in (f"{layer}_to_k", f"{layer}_to_v"):
            weight = layers[name].weight + (own[name][0] @ own[name][1] if name in own else 0)
            wanted = (read - texts.usual) @ weight.T
            found = texts.usual @ (changed[name][0] @ changed[name][1] + layers[name].weight - weight).T
            lacking.append(float((found - wanted).norm() / wanted.norm()))
            assert changed[name][0].shape[1] <= folding.RANK + (own[name][0].shape[1] if name in own else 0)
    assert max(lacking) < 1 and sum(lacking) / len(lacking) < 0.75, lacking

    def predicted(changes: dict, context: torch.Tensor) -> torch.Tensor:
        x = torch.randn(len(context), 4, 16, 16, generator=torch.Generator().manual_seed(1))
        with applied(layers, {name: pair for name, pair in changes.items() if not is_text(name)}):
            return host.predict(x, torch.full((len(x),), 500), Context(context))

    with folding.layered(layers, texts):
        wanted = predicted(own, texts.usual)
    mean, fold = predicted(own, texts.usual), predicted(changed, texts.usual)
    missed = (mean - wanted).norm()
    assert missed > 0.005 * wanted.norm() and (fold - wanted).norm() < 0.7 * missed
    beside = host.encode(OTHERS).tokens
    moved = predicted(changed, beside) - predicted(own, beside)
    assert moved.norm() / len(OTHERS) ** 0.5 < 0.25 * missed / len(UNSEEN) ** 0.5


@torch.no_grad()
def test_inside_every_layer_reads_its_own_text(host) -> None:
    layers = host.layers()
    usual = host.encode(["a cat", "a dog", ""]).tokens
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([500, 500])
    last = folding.cross_layers()[-1]
    by_layer = {layer: usual.flip(0) if layer == last else usual for layer in folding.cross_layers()}
    seen = []
    handle = layers[f"{last}_to_k"].register_forward_hook(lambda module, args, _: seen.append(args[0]))
    with folding.layered(layers, folding.Texts(usual, by_layer)):
        host.predict(x, t, Context(usual[[0, 2]]))
    after = host.predict(x, t, Context(usual[[0, 2]]))
    handle.remove()
    assert torch.equal(seen[0], usual[[2, 0]]) and torch.equal(seen[1], usual[[0, 2]])
    same = folding.Texts(usual, dict.fromkeys(folding.cross_layers(), usual))
    with folding.layered(layers, same):
        torch.testing.assert_close(host.predict(x, t, Context(usual[[0, 2]])), after)


@torch.no_grad()
def test_what_was_read_longer_than_it_is_drawn_is_found(host) -> None:
    """The webui pads all prompts of one call to its longest."""
    layers, usual = host.layers(), host.encode(["a cat", "a dog"]).tokens
    x, t = torch.zeros(2, 4, 16, 16), torch.tensor([500, 500])
    longer = torch.cat([usual, torch.ones_like(usual)], 1)
    texts = folding.Texts(longer, dict.fromkeys(folding.cross_layers(), longer.flip(0)))
    with folding.layered(layers, texts):
        found = host.predict(x, t, Context(usual))
    torch.testing.assert_close(found, host.predict(x, t, Context(usual.flip(0))))


@torch.no_grad()
def test_what_a_merge_learns_from_is_drawn_with_each_layers_embedding() -> None:
    """Its own pictures and its half of scenes. The toy has one cross-attention layer, so one text is all it reads."""
    host = ToyHost()
    lora = embedded(host)
    concepts = [Concept(lora, WORD), Concept(toy_lora(host, "two", 2), "zyk")]
    run = _Run(host, concepts, Settings(steps=2), lambda *_: None, by_closed_form)
    with host.words(lora.words):
        run.look(0, ())
        run.teachers.compose()
    (middle,) = {name for name in host.layers() if name.endswith("attn2_to_k")}
    place = folding.cross_layers().index(middle.removesuffix("_to_k"))
    own = {WORD: {"clip_l": lora.layer_embeddings[WORD][place : place + 1]}}
    changes = changes_of(lora, host.layers())

    def away(bank: Bank, entry: int, text: str, words: dict, region: slice) -> float:
        with host.words(words), applied(host.layers(), changes):
            wanted = host.predict(bank.x[entry][None], bank.t[entry][None], host.encode([text]))
        return float((bank.prediction[entry] - wanted[0])[..., region].abs().max())

    (pictures,), ((joint,), _), (beside, _) = run.teachers.own, run.teachers.joint, run.teachers.scenes
    seen = [(pictures, entry, pictures.prompts[n], slice(None)) for entry, n in enumerate(pictures.prompt)]
    for entry, number in enumerate(joint.prompt):
        if number < len(beside):
            (part,) = (part for part in beside[number].parts if part.concepts == (0,))
            seen.append((joint, entry, part.prompt, part.columns(joint.x[entry].shape[-1])))
    assert len(seen) > len(pictures) + 4
    assert max(away(bank, entry, text, own, region) for bank, entry, text, region in seen) < 1e-5
    with_word = [row for row in seen if WORD in row[2]]
    assert min(away(bank, entry, text, lora.words, region) for bank, entry, text, region in with_word) > 1e-3


def test_a_merge_misses_less_of_what_the_sixteen_embeddings_do(monkeypatch) -> None:
    def missed() -> float:
        host = ToyHost()
        return merge(host, [Concept(embedded(host), WORD)], CLOSED).missed["one"][0]

    folded = missed()
    monkeypatch.setattr(folding, "folded", lambda host, modules, lora, changes, texts: changes)
    assert folded < 0.9 * missed()
