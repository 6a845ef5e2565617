"""The merge on a toy host: what it must reproduce, what it must leave alone, and how it ends."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from toy import ToyHost, toy_lora

from loraclr import files
from loraclr.blocks import block_weights
from loraclr.capture import applied, changes_of
from loraclr.formats import IA3, OFT, Bias, DoRA, Full, LoKr, Norm
from loraclr.lora import Layer, LoRA
from loraclr.merging import Cancelled, Concept, Settings, merge, write

CLOSED = Settings(speed="closed", steps=4, guidance=5.0, ridge=1e-8)


def weights(host: ToyHost) -> list[torch.Tensor]:
    return [value.clone() for module in (host.unet, host.text) for value in module.state_dict().values()]


def predictions(host: ToyHost, changes, prompt: str) -> torch.Tensor:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), applied(host.layers(), changes):
        return host.predict(x, torch.full((3,), 500.0), host.encode([prompt]).expand(3, -1, -1))


def test_one_lora_merges_to_itself() -> None:
    host = ToyHost()
    lora = toy_lora(host, "one", 1)
    result = merge(host, [Concept(lora, "sks", weight=0.7)], CLOSED)
    assert result.layers.keys() == lora.layers.keys()
    merged = {name: (layer.scale * layer.up, layer.down) for name, layer in result.layers.items()}
    for prompt in ("a photo of a sks", "a sks on a red background"):
        wanted = predictions(host, changes_of(lora, host.layers(), 0.7), prompt)
        torch.testing.assert_close(predictions(host, merged, prompt), wanted, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(predictions(host, {}, prompt), wanted, atol=0.02)
    assert result.missed["one"][0] < 1e-4


def test_layers_of_every_kind_merge_to_themselves_from_the_live_weights() -> None:
    host = ToyHost()
    names, modules = list(host.layers()), host.layers()
    random = torch.Generator().manual_seed(3)
    kinds = [
        IA3(torch.randn(8, generator=random) * 0.3, on_input=True),
        OFT(torch.linalg.qr(torch.randn(2, 4, 4, generator=random)).Q, None),
        Full(torch.randn(8, 8, generator=random) * 0.2),
        DoRA(toy_lora(host, "a", 1).layers[names[3]], modules[names[3]].weight.norm(dim=1) * 1.3),
        LoKr(*(torch.randn(*size, generator=random) for size in ((2, 1), (1, 4), (4, 1), (1, 2))), 0.2, 1),
    ]
    lora = LoRA("mixed", None, "sd1", dict(zip(names, kinds, strict=False)))
    result = merge(host, [Concept(lora, "sks", weight=-0.5)], CLOSED)
    merged = {name: (layer.scale * layer.up, layer.down) for name, layer in result.layers.items()}
    assert merged.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        up, down = changes_of(lora, modules, -0.5)[name]
        torch.testing.assert_close(up @ down, -0.5 * layer.delta(modules[name].weight), rtol=1e-4, atol=1e-5)
    wanted = predictions(host, changes_of(lora, modules, -0.5), "a photo of a sks")
    torch.testing.assert_close(predictions(host, merged, "a photo of a sks"), wanted, rtol=5e-3, atol=5e-3)
    assert not torch.allclose(predictions(host, {}, "a photo of a sks"), wanted, atol=0.02)


def test_changes_of_full_rank_make_no_more_factors_than_a_layer_has_directions(monkeypatch) -> None:
    host = ToyHost()
    seen = {}

    def no_polish(_host, _modules, merged, *_):
        seen.update(merged)
        return merged

    monkeypatch.setattr("loraclr.merging.polish", no_polish)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    loras = [LoRA(str(k), None, "sd1", {name: Full(torch.randn(8, 8) * 0.2)}) for k in range(3)]
    concepts = [Concept(lora, word) for lora, word in zip(loras, ("sks", "zyk", "ohwx"), strict=True)]
    result = merge(host, concepts, replace(CLOSED, speed="fast"))
    assert seen[name][0].shape == seen[name][1].shape == (8, 8)
    exact = merge(host, concepts, CLOSED)
    torch.testing.assert_close(result.layers[name].delta(), exact.layers[name].delta(), rtol=1e-4, atol=1e-5)


def test_block_weights_are_part_of_what_is_asked_for() -> None:
    host = ToyHost()
    lora = toy_lora(host, "one", 1)
    concept = Concept(lora, "sks", weight=2.0, text_weight=-0.5, blocks=block_weights("BASE=0.5 M00=0.3"))
    result = merge(host, [concept], CLOSED)
    for name, layer in result.layers.items():
        share = -0.25 if name.startswith("lora_te") else 0.6
        torch.testing.assert_close(layer.delta(), share * lora.layers[name].delta(), rtol=1e-2, atol=1e-3)
    assert result.recipe()["concepts"][0]["blocks"]["M00"] == 0.3
    without = merge(host, [replace(concept, blocks=block_weights("BASE=0"))], CLOSED)
    assert without.layers.keys() == {name for name in lora.layers if not name.startswith("lora_te")}


def test_two_loras_closer_than_base_and_than_their_sum() -> None:
    host = ToyHost()
    loras = [toy_lora(host, name, seed) for seed, name in enumerate(("a", "b"), start=1)]
    concepts = [Concept(lora, trigger) for lora, trigger in zip(loras, ("sks", "zyk"), strict=True)]
    result = merge(host, concepts, CLOSED)
    merged = {name: (layer.scale * layer.up, layer.down) for name, layer in result.layers.items()}
    asked = [changes_of(lora, host.layers()) for lora in loras]
    total = {name: tuple(torch.cat([c[name][k] for c in asked], 1 - k) for k in (0, 1)) for name in asked[0]}
    for changes, trigger in zip(asked, ("sks", "zyk"), strict=True):
        wanted = predictions(host, changes, f"a photo of a {trigger}")
        missed = {kind: (predictions(host, c, f"a photo of a {trigger}") - wanted).square().mean()
                  for kind, c in (("base", {}), ("sum", total), ("merged", merged))}  # fmt: skip
        assert missed["merged"] < 0.8 * missed["base"]
        assert missed["merged"] < 0.8 * missed["sum"]


def test_polish_lowers_what_is_missed_and_the_model_stays_bit_identical() -> None:
    host = ToyHost()
    before = weights(host)
    concepts = [Concept(toy_lora(host, name, seed), name) for seed, name in enumerate(("sks", "zyk", "kts"), start=1)]
    result = merge(host, concepts, Settings(speed="balanced", steps=4, scenes=0))
    assert all(after < closed for closed, after in result.missed.values())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(host), strict=True))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in host.layers().values())
    assert all(parameter.grad is None for parameter in host.unet.parameters())


def test_same_seed_same_result() -> None:
    runs = []
    for _ in range(2):
        host = ToyHost()
        concepts = [Concept(toy_lora(host, name, seed), name) for seed, name in enumerate(("sks", "zyk"), start=1)]
        runs.append(merge(host, concepts, Settings(speed="fast", steps=3)).layers)
    assert all(torch.equal(runs[0][name].delta(), runs[1][name].delta()) for name in runs[0])


def test_rank_is_exact_or_at_most_the_one_asked_for() -> None:
    host = ToyHost()
    concepts = [Concept(toy_lora(host, "a", 1, rank=2), "sks"), Concept(toy_lora(host, "b", 2, rank=1), "zyk")]
    assert {layer.rank for layer in merge(host, concepts, CLOSED).layers.values()} == {3}
    assert {layer.rank for layer in merge(host, concepts, replace(CLOSED, rank=2)).layers.values()} == {2}


def test_layers_that_only_one_lora_touches_take_part() -> None:
    host = ToyHost()
    a, b = toy_lora(host, "a", 1), toy_lora(host, "b", 2)
    only = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"
    b = replace(b, layers={name: layer for name, layer in b.layers.items() if name != only})
    result = merge(host, [Concept(a, "sks"), Concept(b, "zyk")], CLOSED)
    assert result.layers[only].rank == 2
    assert not torch.allclose(result.layers[only].delta(), a.layers[only].delta(), atol=1e-3)


def test_progress_rises_to_one_and_tells_the_stages() -> None:
    seen = []
    host = ToyHost()
    merge(
        host,
        [Concept(toy_lora(host, "tiger", 1), "sks")],
        Settings(speed="fast", steps=3),
        lambda *told: seen.append(told),
    )
    shares = [share for _, share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    stages = " ".join(dict.fromkeys(stage for stage, _, _ in seen))
    assert "words" in stages and "tiger" in stages and "Polishing" in stages
    assert all(left >= 0 for _, _, left in seen if left is not None)


@pytest.mark.parametrize("when", [0.05, 0.5, 0.9])
def test_cancel_anywhere_leaves_the_model_alone(when: float) -> None:
    host = ToyHost()
    before = weights(host)

    def stop(stage: str, share: float, left: float | None) -> None:
        if share >= when:
            raise Cancelled

    with pytest.raises(Cancelled):
        merge(host, [Concept(toy_lora(host, "a", 1), "sks")], Settings(speed="fast", steps=3), stop)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(host), strict=True))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in host.layers().values())
    assert not host.records


def test_refusals_name_the_lora_and_draw_nothing() -> None:
    host = ToyHost()
    good = toy_lora(host, "good", 1)
    wide = replace(
        good,
        name="wide",
        layers={
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": Layer(
                torch.ones(9, 1), torch.ones(1, 9), 1.0
            )
        },
    )
    foreign = replace(
        good,
        name="foreign",
        layers={"lora_unet_nowhere": good.layers["lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"]},
    )
    xl = replace(good, name="xl", family="sdxl")
    norms = replace(good, name="norms", layers={"lora_unet_norm1": Norm(torch.ones(8))})
    biased = replace(
        good,
        name="biased",
        layers={"lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": Bias(bias=torch.ones(8))},
    )
    cases = [
        ([], "choose at least one"),
        ([Concept(good, " ")], "good has no trigger"),
        ([Concept(good, "sks", weight=0.0)], "good has weight 0"),
        ([Concept(good, "sks", weight=float("nan"))], "good has weight nan"),
        ([Concept(wide, "sks")], "wide does not fit.*9×9.*8×8"),
        ([Concept(foreign, "sks")], "foreign has layers that the loaded model lacks"),
        ([Concept(norms, "sks")], "norms changes norm layers.*cannot be merged yet"),
        ([Concept(biased, "sks")], "biased changes biases.*cannot be merged yet"),
        ([Concept(xl, "sks")], "xl is for SDXL, but the loaded checkpoint is SD1"),
    ]
    for concepts, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            merge(host, concepts, CLOSED)
    assert host.drawn == 0


def test_auto_takes_the_rank_that_each_layer_needs() -> None:
    host = ToyHost()
    concepts = [Concept(toy_lora(host, name, seed), word) for name, seed, word in (("a", 1, "sks"), ("b", 2, "zyk"))]
    exact = merge(host, concepts, CLOSED)
    small = merge(host, concepts, replace(CLOSED, rank="auto"))
    ranks = {name: (layer.rank, exact.layers[name].rank) for name, layer in small.layers.items()}
    assert all(ours <= most for ours, most in ranks.values()) and any(ours < most for ours, most in ranks.values())


def test_written_file_holds_the_recipe_and_loads_again(tmp_path) -> None:
    host = ToyHost()
    concepts = [Concept(toy_lora(host, "tiger", 1), "sks"), Concept(toy_lora(host, "panda", 2), "zyk", weight=0.8)]
    result = merge(host, concepts, CLOSED)
    path = write(result, tmp_path / "both.safetensors", torch.float32)
    loaded = files.load(path)
    assert loaded.triggers() == "sks, zyk"
    recipe = json.loads(loaded.metadata["loraclr.recipe"])
    assert [c["weight"] for c in recipe["concepts"]] == [1.0, 0.8]
    assert recipe["settings"]["speed"] == "closed"
    for name, layer in result.layers.items():
        torch.testing.assert_close(loaded.layers[name].delta(), layer.delta())
    assert result.prompt("both") == "<lora:both:1> sks, zyk"
    with pytest.raises(FileExistsError):
        write(result, path)
