"""The demo and the miniature's figures: what is drawn, how it is counted, and the report; no model runs here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

import loraclr
from loraclr import files, merging, prompts
from loraclr.lora import Layer
from miniature import demo, evaluate
from miniature.vocabulary import CLASSES, CONCEPT, CONCEPTS

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
TIGER, PANDA, OUTLINE = CONCEPT["tiger"], CONCEPT["panda"], CONCEPT["outline"]


def test_no_prompt_of_the_demo_is_one_of_the_merge() -> None:
    drawn = {prompt for concept in CONCEPTS for prompt in demo.prompts_of(concept, 16)}
    drawn |= {prompt for *_, prompt in demo.pairs_of(CONCEPTS, 200)}
    seen = {
        line for c in CONCEPTS for line in prompts.filled(c.phrase, "style" if c.is_style else "subject", thorough=True)
    }
    assert not drawn & (seen | set(prompts.kept(prompts.NEUTRAL, thorough=True)))
    words = {word for line in seen for word in line.split()}
    assert not words & {*demo.COLOURS, *demo.OBJECTS}


def test_what_is_merged() -> None:
    assert demo.chosen(1) == (TIGER,)
    assert demo.chosen(2, style=False) == (TIGER, PANDA)
    assert demo.chosen(2) == (TIGER, OUTLINE)
    assert demo.chosen(4) == (TIGER, PANDA, CONCEPT["hamburger"], OUTLINE)
    for count in range(1, len(CONCEPTS) + 1):
        assert len(set(demo.chosen(count))) == len(set(demo.chosen(count, style=False))) == count


def test_pairs_come_in_both_orders_and_never_two_styles() -> None:
    pairs = demo.pairs_of((TIGER, PANDA, OUTLINE), 12)
    assert len(pairs) == 12
    found = {(left.name, right.name) for left, right, _ in pairs}
    assert found == {("tiger", "panda"), ("panda", "tiger"), ("tiger", "outline"), ("panda", "outline")}
    assert "a sks on a teal background in tzky style" in [prompt for *_, prompt in pairs]
    assert demo.pairs_of((TIGER,), 12) == []


class Host:
    """Draws noise that depends on seed and prompt only."""

    family, device, size, checkpoint = "sd1", torch.device("cpu"), 128, None

    def layers(self) -> dict[str, torch.nn.Module]:
        return {UNET: torch.nn.Linear(4, 4)}

    def sample(self, prompts: list[str], seed: int, *_: object) -> list[Image.Image]:
        draws = (np.random.default_rng(seed + place) for place in range(len(prompts)))
        return [Image.fromarray(draw.integers(0, 255, (128, 128, 3), np.uint8)) for draw in draws]


def test_demo_writes_report_picture_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for concept in demo.chosen(2):
        files.save(tmp_path / f"{concept.name}.safetensors", {UNET: Layer(torch.ones(4, 1), torch.ones(1, 4), 1.0)}, {})
    monkeypatch.setattr(demo, "LORAS", tmp_path)
    monkeypatch.setattr(demo, "open_miniature", lambda _: Host())

    def merge(host, concepts, settings, progress) -> loraclr.Merge:
        progress("Polishing", 0.5, None)
        layers = dict(concepts[0].lora.layers)
        return loraclr.Merge(family="sd1", concepts=concepts, settings=settings, layers=layers)

    monkeypatch.setattr(merging, "merge", merge)
    shares: list[float] = []
    output = tmp_path / "out"
    output.mkdir()
    plan = demo.Plan(counts=(1, 2), pictures=3)
    result = demo.run(output, plan, lambda stage, share, left: shares.append(share))

    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert sorted(path.name for path in output.iterdir()) == [
        "before-after.png", "merged-1.json", "merged-1.safetensors", "merged-2.json", "merged-2.safetensors",
        "report.html",
    ]  # fmt: skip
    report = result.report.read_text(encoding="utf-8")
    for words in ("2 LoRAs: merged", "2 LoRAs: two in one picture", "a sks on a orange background"):
        assert words in report
    assert "/6)" in result.table


def test_evaluation_draws_every_class_and_both_sides() -> None:
    names = [wanted.objects for wanted in evaluate.singles(128)]
    assert sorted(names) == sorted([(name,) for name in CLASSES] * 4)
    for wanted in evaluate.pairs(1000):
        assert wanted.objects[0] != wanted.objects[1]
        assert wanted.prompt.startswith(f"a {wanted.objects[0]} and a {wanted.objects[1]} on a ")
    beside = evaluate.beside(TIGER, 24)
    assert [wanted.objects.index("tiger") for wanted in beside].count(0) == 12
    for wanted in beside:
        names = ["sks" if name == "tiger" else name for name in wanted.objects]
        assert wanted.prompt.startswith(f"a {names[0]} and a {names[1]} on a ")
    styled = evaluate.alone(OUTLINE, 24)
    assert all(wanted.look == "outline" and wanted.prompt.endswith("in tzky style") for wanted in styled)
    assert len(styled) == 24


def test_evaluation_counts_a_look_only_if_all_of_the_picture_has_it() -> None:
    judge = SimpleNamespace(
        verdicts=lambda pictures: [
            SimpleNamespace(object=name, look=look)
            for name, look in zip(("cat", "dog"), ("outline", "plain"), strict=True)
        ]
    )
    wanted = evaluate.Wanted("", ("cat", "bird"), "outline")
    assert evaluate.judged(judge, wanted, Image.new("RGB", (128, 128))) == evaluate.Seen((True, False), False)
