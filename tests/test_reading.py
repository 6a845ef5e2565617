"""Reading: keys and values learn from words alone what each LoRA makes of them, the text encoder with them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import pipeline
from torch import Tensor
from toy import ToyHost, toy_lora

from benchmarks.scenes import REPORTING
from loraclr import prompts
from loraclr.capture import NORMS, applied, is_cross_kv
from loraclr.changes import changes_of
from loraclr.concept import Concept
from loraclr.hosts.standalone import Standalone
from loraclr.reading import Lesson, Reading, practise
from loraclr.training import Trained
from miniature.demo import OBJECTS

LAYERS = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_"


def reading_of(host, concepts: list[Concept], seed: int = 0) -> Reading:
    layers = host.layers()
    asked = [*(concept.changes(layers) for concept in concepts), {}]
    modules = {name: layers[name] for changes in asked for name in changes}
    texts = [[f"a {concept.trigger}", f"a photo of a {concept.trigger}"] for concept in concepts]
    return Reading(host, modules, asked, concepts, [*texts, ["a dog"]], 0.3, seed)


def toys(host: ToyHost) -> list[Concept]:
    return [Concept(toy_lora(host, name, seed), name) for name, seed in (("sks", 1), ("zyk", 2))]


def misread(reading: Reading, changes, lesson: Lesson) -> float:
    live = Trained(changes, {}, reading.host.device).live()
    with applied(reading.modules, live):
        return reading.learn(lesson, live)


def written_out(reading: Reading, lesson: Lesson, live) -> Tensor:
    """The definition, with whole layers: mean over layers of ‖k_merged − k_i‖² / E ‖k_base − k_i‖²."""
    host, parts = reading.host, []
    with applied(reading.modules, live):
        tokens = host.encode(lesson.texts).tokens
        outputs = {name: reading.modules[name](tokens) for name in reading.readers}
    for name in reading.readers:
        wanted = []
        for place, text in zip(lesson.places, lesson.texts, strict=True):
            with applied(reading.modules, reading.asked[place]), torch.no_grad():
                wanted.append(reading.modules[name](host.encode([text]).tokens))
        parts.append(F.mse_loss(outputs[name], torch.cat(wanted)) / reading.scales[name])
    return torch.stack(parts).mean()


def test_what_is_learnt_against_its_definition() -> None:
    host = ToyHost()
    concepts = toys(host)
    reading = reading_of(host, concepts)
    lesson = reading.read([(0, "a sks"), (0, "a sks at sea"), (1, "a zyk on a hill"), (2, "a dog")])
    trained = Trained(changes_of(toy_lora(host, "c", 3), host.layers()), {}, host.device)
    live, again = trained.live(), trained.live()
    with applied(reading.modules, live):
        found = reading.learn(lesson, live, 2.0)
    loss = written_out(reading, lesson, again)
    assert found == pytest.approx(loss.item(), rel=1e-4)
    (2.0 * loss).backward()
    names = [name for name in live if name.startswith("lora_te") or is_cross_kv(name)]
    assert len(names) == 3
    for name in names:
        for mine, its in zip(live[name], again[name], strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-3, atol=1e-6)


def test_prompts_of_different_lengths_are_read_together() -> None:
    """The webui's encoder makes a prompt as long as the longest that it is encoded with."""
    host = ToyHost(pieces=True)
    loras = [toy_lora(host, name, seed) for name, seed in (("sks", 1), ("zyk", 2))]
    concepts = [Concept(loras[0], "sks of many words that say what it wears"), Concept(loras[1], "zyk")]
    reading = reading_of(host, concepts)
    lesson = reading.read([(0, "a sks"), (1, "a zyk and a few more words here"), (2, "a dog")])
    assert lesson.own.tokens.shape[:2] == (3, 2 * 5)
    for row, (place, text) in enumerate(zip(lesson.places, lesson.texts, strict=True)):
        with applied(reading.modules, {n: p for n, p in reading.asked[place].items() if n.startswith("lora_te")}):
            alone = host.encode([text, "a few words more than it takes"]).tokens[0]
        torch.testing.assert_close(lesson.own.tokens[row], alone)
    practise(reading, changes_of(toy_lora(host, "c", 3), host.layers()), {}, 3, lambda _: None)


def test_layers_that_no_lora_changes_are_read_too() -> None:
    host = ToyHost()
    lora = toy_lora(host, "sks", 1)
    lora = replace(lora, layers={name: layer for name, layer in lora.layers.items() if name.startswith("lora_te")})
    reading = reading_of(host, [Concept(lora, "sks")])
    assert set(reading.readers) == {LAYERS + "k", LAYERS + "v"} and reading.has_any
    changes = {name: (0.3 * up, down) for name, (up, down) in changes_of(lora, host.layers()).items()}
    lesson = reading.read([(0, "a sks"), (0, "a sks at sea")])
    learnt = practise(reading, changes, {}, 200, lambda _: None)
    assert misread(reading, learnt, lesson) < 0.3 * misread(reading, changes, lesson)


def test_without_a_layer_that_reads_nothing_is_learnt() -> None:
    host = ToyHost()
    reading = reading_of(host, toys(host))
    changes = {n: p for n, p in changes_of(toy_lora(host, "c", 3), host.layers()).items() if n.endswith("ff_net_2")}
    assert practise(reading, changes, {}, 3, lambda _: None) == changes


def test_no_lora_misreads_all_and_its_own_nothing() -> None:
    host = ToyHost()
    concept = toys(host)[0]
    reading = reading_of(host, [concept])
    lesson = reading.read([(0, f"a sks {word}") for word in prompts.WORDS[:40]])
    own = reading.asked[0]
    assert misread(reading, own, lesson) < 1e-6
    nothing = {name: (torch.zeros_like(up), down) for name, (up, down) in own.items()}
    assert 0.5 < misread(reading, nothing, lesson) < 2.0


def test_practice_helps_with_words_that_it_did_not_have() -> None:
    host = ToyHost()
    concepts = toys(host)
    reading = reading_of(host, concepts)
    start = changes_of(toy_lora(host, "c", 3), host.layers())
    told = []
    after = practise(reading, start, {}, 60, told.append)
    assert told == list(range(1, 61))
    others = [(place, f"{word} {concepts[place].trigger}") for place in (0, 1) for word in ("qwerty", "asdf", "uiop")]
    lesson = reading.read(others)
    assert misread(reading, after, lesson) < 0.7 * misread(reading, start, lesson)
    for name, (up, down) in start.items():
        same = torch.equal(after[name][0] @ after[name][1], up @ down)
        assert same != (name.startswith("lora_te") or is_cross_kv(name)), name


def test_a_caller_without_gradients_may_ask_for_it() -> None:
    host = ToyHost()
    reading = reading_of(host, toys(host))
    start = changes_of(toy_lora(host, "c", 3), host.layers())
    with torch.no_grad():
        after = practise(reading, start, {}, 2, lambda _: None)
    assert any(not torch.equal(after[name][0], start[name][0]) for name in start)


def test_the_pooled_text_of_sdxl_is_learnt_too(tmp_path: Path) -> None:
    host = Standalone(pipeline("sdxl", tmp_path / "clip"))
    layers = {
        name: module
        for name, module in host.layers().items()
        if (name.startswith("lora_te") or is_cross_kv(name)) and not isinstance(module, NORMS)
    }
    generator = torch.Generator().manual_seed(0)

    def random_changes(size: float) -> dict:
        return {
            name: (
                size * torch.randn(module.weight.shape[0], 2, generator=generator),
                torch.randn(2, module.weight[0].numel(), generator=generator) / module.weight[0].numel() ** 0.5,
            )
            for name, module in layers.items()
        }

    class Given(Concept):
        def changes(self, modules=None):
            return random_changes(0.1)

    reading = reading_of(host, [Given(None, "sks")])
    assert reading.scales[""] > 0
    lesson = reading.read([(0, "a sks on a hill"), (0, "an old sks")])
    start = random_changes(0.05)

    def pooled(changes) -> float:
        with applied(layers, changes), torch.no_grad():
            return F.mse_loss(host.encode(lesson.texts).pooled, lesson.own.pooled).item()

    after = practise(reading, start, {}, 30, lambda _: None)
    assert misread(reading, after, lesson) < 0.7 * misread(reading, start, lesson)
    assert pooled(after) < 0.7 * pooled(start)


def test_loras_that_change_nothing_that_is_read_have_nothing_to_learn() -> None:
    host = ToyHost()
    lora = toy_lora(host, "a", 1)
    for name in [name for name in lora.layers if name.startswith("lora_te") or is_cross_kv(name)]:
        del lora.layers[name]
    assert not reading_of(host, [Concept(lora, "sks")]).has_any


def test_random_prompts_hold_the_trigger_and_no_word_that_is_reported_on() -> None:
    rng = random.Random(0)
    texts = [prompts.wandering(rng, "sks", kind) for kind in ("subject", "style") for _ in range(300)]
    assert all("sks" in text.replace(",", "").split() for text in texts) and len(set(texts)) > 500
    assert not any("{" in text for text in texts)
    words = {word for _ in range(3000) for word in prompts.wandering(rng).replace(",", "").split()}
    assert set(prompts.WORDS) <= words and "sks" not in words
    assert not words & {*REPORTING, *OBJECTS}


def test_words_that_call_a_concept_are_not_drawn_at_random() -> None:
    """Else its own LoRA, another's and the base would each ask for something else of one word."""
    host = ToyHost()
    words = ("sks Dragon", "queen, portrait")
    reading = reading_of(host, [Concept(toy_lora(host, trigger, 1), trigger) for trigger in words])
    drawn = [pair for _ in range(200) for pair in _pairs(reading.lesson())]
    others = [text.replace(words[place], "") if place < 2 else text for place, text in drawn]
    found = {word for text in others for word in text.replace(",", "").split()}
    assert not found & {"dragon", "queen", "portrait"} and {"wizard", "king", "painting"} <= found


def test_a_lora_without_trigger_learns_from_its_own_prompts_only() -> None:
    host = ToyHost()
    reading = reading_of(host, [Concept(toy_lora(host, "a", 1), "", prompts=("a hill",))])
    texts = {text for _ in range(10) for place, text in _pairs(reading.lesson()) if place == 0}
    assert texts == {"a ", "a photo of a "}


def _pairs(lesson: Lesson) -> list[tuple[int, str]]:
    return list(zip(lesson.places, lesson.texts, strict=True))
