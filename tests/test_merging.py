"""The merge on a toy host: what it must reproduce, what it must leave alone, and how it ends."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from toy import ToyHost, toy_lora

from loraclr import files
from loraclr.blocks import block_weights
from loraclr.capture import applied
from loraclr.changes import changes_of
from loraclr.concept import Concept
from loraclr.formats import BOFT, IA3, OFT, Bias, DoRA, Full, GLoRA, LoHa, LoKr, Norm
from loraclr.hosts import Cancelled, Context
from loraclr.lora import Layer, LoRA
from loraclr.merging import _Run, by_closed_form, cares, merge
from loraclr.plan import POLISH_STEPS, Settings, work
from loraclr.recipe import read as recipe_of
from loraclr.result import Merge, note_bled, with_whole_attention, write

CLOSED = Settings(speed="closed", steps=4, guidance=5.0, ridge=1e-8)


def weights(host: ToyHost) -> list[torch.Tensor]:
    return [value.clone() for module in (host.unet, host.text) for value in module.state_dict().values()]


def predictions(host: ToyHost, changes, prompt: str) -> torch.Tensor:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), applied(host.layers(), changes):
        return host.predict(x, torch.full((3,), 500.0), host.encode([prompt])[[0, 0, 0]])


@pytest.mark.parametrize(("weight", "text_weight"), [(0.7, None), (1.5, -0.5), (-0.4, 2.0)])
def test_one_lora_merges_to_itself(weight: float, text_weight: float | None) -> None:
    """At any strength: of the UNet and of the text encoder each its own, and linearly."""
    host = ToyHost()
    lora = toy_lora(host, "one", 1)
    result = merge(host, [Concept(lora, "sks", weight, text_weight)], CLOSED)
    assert result.layers.keys() == lora.layers.keys()
    merged = {name: (layer.scale * layer.up, layer.down) for name, layer in result.layers.items()}
    for prompt in ("a photo of a sks", "a sks on a red background"):
        wanted = predictions(host, changes_of(lora, host.layers(), weight, text_weight), prompt)
        torch.testing.assert_close(predictions(host, merged, prompt), wanted, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(predictions(host, {}, prompt), wanted, atol=0.02)
    assert result.missed["one"][0] < 1e-4


def kinds_of_layers(modules, random: torch.Generator) -> dict[str, list]:
    """Layers for the toy's eight inputs and outputs, in its order."""
    names = list(modules)

    def factors(*sizes: tuple[int, int]) -> list[torch.Tensor]:
        return [torch.randn(*size, generator=random) for size in sizes]

    first = [
        IA3(torch.randn(8, generator=random) * 0.3, on_input=True),
        OFT(torch.linalg.qr(torch.randn(2, 4, 4, generator=random)).Q, None),
        Full(torch.randn(8, 8, generator=random) * 0.2),
        DoRA(toy_lora(ToyHost(), "a", 1).layers[names[3]], modules[names[3]].weight.norm(dim=1) * 1.3),
        LoKr(*factors((2, 1), (1, 4), (4, 1), (1, 2)), 0.2, 1),
    ]
    second = [
        LoHa(*factors((8, 2), (2, 8), (8, 2), (2, 8)), 0.1),
        BOFT(torch.linalg.qr(torch.randn(2, 2, 4, 4, generator=random)).Q, None),
        GLoRA(*factors((8, 2), (2, 8), (8, 2), (2, 8)), 0.1),
        Full(torch.randn(8, 8, generator=random), absolute=True),
        DoRA(toy_lora(ToyHost(), "a", 1).layers[names[4]], modules[names[4]].weight.norm(dim=0) * 1.3, True),
    ]
    return {"first": first, "second": second}


@pytest.mark.parametrize("part", ["first", "second"])
def test_layers_of_every_kind_merge_to_themselves_from_the_live_weights(part: str) -> None:
    host = ToyHost()
    modules = host.layers()
    kinds = kinds_of_layers(modules, torch.Generator().manual_seed(3))[part]
    lora = LoRA("mixed", None, "sd1", dict(zip(modules, kinds, strict=False)))
    result = merge(host, [Concept(lora, "sks", weight=-0.5)], CLOSED)
    merged = {name: (layer.scale * layer.up, layer.down) for name, layer in result.layers.items()}
    assert merged.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        up, down = changes_of(lora, modules, -0.5)[name]
        torch.testing.assert_close(up @ down, -0.5 * layer.delta(modules[name].weight), rtol=1e-4, atol=1e-5)
    wanted = predictions(host, changes_of(lora, modules, -0.5), "a photo of a sks")
    torch.testing.assert_close(predictions(host, merged, "a photo of a sks"), wanted, rtol=5e-3, atol=5e-3)
    assert not torch.allclose(predictions(host, {}, "a photo of a sks"), wanted, atol=0.02)


MID = "lora_unet_mid_block_attentions_0"


def lora_with_biases_and_norms(host: ToyHost, name: str, seed: int) -> LoRA:
    """Every kind of change of bias and of norm layers, beside ordinary layers."""
    random = torch.Generator().manual_seed(seed)
    lora = toy_lora(host, name, seed)
    vector = [torch.randn(8, generator=random) * 0.3 for _ in range(6)]
    four = torch.randn(4, generator=random) * 0.3
    return replace(
        lora,
        layers={
            "lora_te_text_model_encoder_layers_0_mlp_fc1": Bias(bias=vector[0]),
            f"{MID}_transformer_blocks_0_attn2_to_k": lora.layers[f"{MID}_transformer_blocks_0_attn2_to_k"],
            f"{MID}_transformer_blocks_0_ff_net_2": replace(
                lora.layers[f"{MID}_transformer_blocks_0_ff_net_2"], bias=vector[1]
            ),
            f"{MID}_proj_out": replace(lora.layers[f"{MID}_proj_out"], bias=four),
            f"{MID}_transformer_blocks_0_norm3": Norm(vector[2], bias=vector[3]),
            f"{MID}_norm": Norm(vector[4]),
        },
    )


def written(host: ToyHost, lora: LoRA, strength: float) -> ToyHost:
    """A copy of the host with the LoRA written into its weights and biases."""
    changed = copy.deepcopy(host)
    for name, module in changed.layers().items():
        if name in lora.layers:
            module.weight.data += strength * lora.layers[name].delta(module.weight)
        if name in lora.layers and lora.layers[name].bias is not None:
            module.bias.data += strength * lora.layers[name].bias_delta(module.bias)
    return changed


def test_biases_and_norm_layers_merge_to_themselves() -> None:
    host = ToyHost(norms=True)
    lora = lora_with_biases_and_norms(host, "one", 1)
    result = merge(host, [Concept(lora, "sks", weight=0.7)], CLOSED)
    assert result.layers.keys() == lora.layers.keys()
    merged = replace(lora, layers=result.layers)
    prompt = "a photo of a sks"
    wanted = predictions(written(host, lora, 0.7), {}, prompt)
    torch.testing.assert_close(predictions(host, changes_of(lora, host.layers(), 0.7), prompt), wanted)
    torch.testing.assert_close(predictions(written(host, merged, 1.0), {}, prompt), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        predictions(host, changes_of(merged, host.layers()), prompt), wanted, rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(predictions(host, {}, prompt), wanted, atol=0.02)


def test_loras_with_and_without_biases_merge_and_polish(tmp_path) -> None:
    host = ToyHost(norms=True)
    before = weights(host)
    loras = [lora_with_biases_and_norms(host, "a", 1), toy_lora(host, "b", 2)]
    concepts = [Concept(lora, word) for lora, word in zip(loras, ("sks", "zyk"), strict=True)]
    result = merge(host, concepts, Settings(speed="balanced", steps=4))
    closed, polished = (sum(each) for each in zip(*result.missed.values(), strict=True))
    assert polished < closed < len(concepts)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(host), strict=True))
    path = write(result, tmp_path / "both.safetensors", torch.float32)
    loaded = files.load(path)
    assert loaded.unused == ()
    prompt = "a photo of a sks"
    wanted = predictions(host, changes_of(replace(loaded, layers=result.layers), host.layers()), prompt)
    torch.testing.assert_close(predictions(written(host, loaded, 1.0), {}, prompt), wanted, rtol=1e-4, atol=1e-4)
    assert {type(layer).__name__ for layer in loaded.layers.values()} == {"Layer", "Full", "Norm"}


def test_changes_of_full_rank_make_no_more_factors_than_a_layer_has_directions(monkeypatch) -> None:
    host = ToyHost()
    seen = {}

    def no_polish(_host, _modules, merged, *_, **__):
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
    shares = {name: -0.25 if name.startswith("lora_te") else 0.6 for name in lora.layers}
    asked = {name: (shares[name] * layer.scale * layer.up, layer.down) for name, layer in lora.layers.items()}
    wanted = predictions(host, asked, "a photo of a sks")
    merged = changes_of(replace(lora, layers=result.layers))
    torch.testing.assert_close(predictions(host, merged, "a photo of a sks"), wanted, rtol=1e-3, atol=1e-3)
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


def test_many_concepts_are_each_learnt_from_as_often_as_few() -> None:
    assert [Settings("fast").polish_steps(count) for count in (1, 2, 4, 5, 8, 12)] == [128, 128, 128, 160, 256, 384]
    assert [Settings("closed").polish_steps(count) for count in (2, 12)] == [0, 0]


@pytest.mark.parametrize("factor", [3.0, math.nan])
def test_a_polish_that_leads_away_changes_nothing(factor: float, monkeypatch) -> None:
    host = ToyHost()
    concepts = [Concept(toy_lora(host, name, seed), name) for name, seed in (("sks", 1), ("zyk", 2))]
    settings = Settings(steps=4, scenes=0)
    closed = merge(host, concepts, replace(settings, speed="closed"))
    assert closed.checkpoint == host.checkpoint

    def away(_host, _modules, merged, *_, **__):
        return {name: (factor * up, down) for name, (up, down) in merged.items()}

    monkeypatch.setattr("loraclr.merging.polish", away)
    result = merge(host, concepts, settings)
    assert result.missed == closed.missed
    for name, layer in result.layers.items():
        torch.testing.assert_close(layer.delta(), closed.layers[name].delta(), rtol=1e-4, atol=1e-6)


def test_polish_lowers_what_is_missed_and_the_model_stays_bit_identical() -> None:
    host = ToyHost()
    before = weights(host)
    concepts = [Concept(toy_lora(host, name, seed), name) for seed, name in enumerate(("sks", "zyk", "kts"), start=1)]
    result = merge(host, concepts, Settings(speed="balanced", steps=4, scenes=0))
    closed, polished = (sum(each) for each in zip(*result.missed.values(), strict=True))
    assert polished < 0.9 * closed
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


def test_progress_counts_the_pictures_of_two() -> None:
    """They take their part of the way, and the end is reached only by the last step of the polish."""
    host, seen = ToyHost(), []
    concepts = [Concept(toy_lora(host, name, k), name) for k, name in enumerate(("tiger", "panda"), 1)]
    settings = Settings(speed="fast", steps=3, size=32, scenes=2)
    merge(host, concepts, settings, lambda *told: seen.append(told))
    last = POLISH_STEPS["fast"]
    ends = [share for stage, share, _ in seen if stage == f"Polishing, step {last} of {last}"]
    assert ends == [pytest.approx(1.0, abs=0.01)]
    assert max(share for stage, share, _ in seen if stage == f"Polishing, step {last - 1} of {last}") < 1.0
    looked = [share for stage, share, _ in seen if stage == "Looking at two in one picture"]
    rows = 4 * 2 * 2 * settings.steps  # scenes, halves of each, with and without the prompt
    assert looked[-1] - looked[0] == pytest.approx(rows / work(host, concepts, settings))


def test_of_what_is_missed_more_the_polish_learns_more() -> None:
    assert cares([0.2, 0.2, 0.2], 0.5) == pytest.approx([1, 1, 1])
    assert cares([0.04, 0.36], 0.5) == pytest.approx([0.5, 1.5])
    assert cares([0.0, 0.0], 0.5) == cares([0.1, 0.9], 0.0) == [1, 1] and cares([0.0, 0.1], 0.5) == [0, 2]
    for overflown in (math.nan, math.inf, -math.inf):
        assert cares([overflown, 0.25], 0.5) == pytest.approx([4 / 3, 2 / 3])


def test_a_model_that_overflows_is_named_with_the_layer_and_what_to_do() -> None:
    class Broken(ToyHost):
        def predict(self, x: torch.Tensor, t: torch.Tensor, context: Context) -> torch.Tensor:
            return super().predict(x * torch.nan, t, context)

    with pytest.raises(ValueError, match=r"What lora_unet_\w+ is fed with holds NaN .* --no-half"):
        merge(host := Broken(), [Concept(toy_lora(host, "a", 1), "sks")], Settings(speed="fast", steps=3))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in host.layers().values())


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
        layers={"lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": Bias(bias=torch.ones(9))},
    )
    cases = [
        ([], "choose at least one"),
        ([Concept(good, " ")], "good has no trigger"),
        ([Concept(good, "sks", weight=0.0)], "good has weight 0"),
        ([Concept(good, "sks", weight=float("nan"))], "good has weight nan"),
        ([Concept(wide, "sks")], "wide does not fit.*9×9.*8×8"),
        ([Concept(foreign, "sks")], "foreign has layers that the loaded model lacks"),
        ([Concept(norms, "sks")], "norms has layers that the loaded model lacks"),
        ([Concept(biased, "sks")], "biased does not fit.*9 biases, the model's 8"),
        ([Concept(xl, "sks")], "xl is for SDXL, but the loaded checkpoint is SD1"),
    ]
    for concepts, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            merge(host, concepts, CLOSED)
    assert host.drawn == 0


def test_what_must_not_change_is_something() -> None:
    with pytest.raises(ValueError, match=r"^neutral_prompts is empty: give one prompt at least"):
        Settings(neutral_prompts=())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"seed": -1}, "^The seed -1 is below 0"),  # a webui would draw another each time
        ({"speed": "quick"}, "^There is no speed quick: choose closed, fast"),
        ({"rank": 0}, "^The rank 0 is below 1"),
        ({"steps": 0}, "counts: give 1 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Settings(**wrong)


def test_words_longer_than_a_text_encoders_piece_lose_no_picture() -> None:
    """The webui makes a prompt longer with another that it is encoded with, and draws without one of usual length."""
    host = ToyHost(pieces=True)
    words = "sks with a hat and a coat of many colours"
    concepts = [Concept(toy_lora(host, "a", 1), words), Concept(toy_lora(host, "b", 2), "zyk")]
    own = replace(concepts[1], prompts=("a {}", "a {} on a hill with many trees"))
    run = _Run(host, [concepts[0], own], Settings(steps=3), lambda *_: None, by_closed_form)
    for place, pictures in ((0, 8), (1, 2)):
        run.look(place, [])
        bank = run.teachers.own[place]
        told = [bank.prompts[prompt] for prompt in bank.prompt]
        assert {told.count(text) for text in bank.prompts if text} == {3}
        assert len(bank.prompts) == pictures + 1 and told.count("") == 3 * pictures
    result = merge(host, concepts, Settings(speed="fast", steps=3))
    assert result.missed["a"][1] < 1 and result.missed["b"][1] < 1


def test_a_merge_that_cannot_be_measured_is_there_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_Run, "measured", full)
    host = ToyHost()
    result = merge(host, [Concept(toy_lora(host, "a", 1), "sks")], CLOSED)
    assert result.layers and not result.alignment and "could not be measured in full" in result.notes[-1]


def test_auto_takes_the_rank_that_each_layer_needs() -> None:
    host = ToyHost()
    concepts = [Concept(toy_lora(host, name, seed), word) for name, seed, word in (("a", 1, "sks"), ("b", 2, "zyk"))]
    exact = merge(host, concepts, CLOSED)
    small = merge(host, concepts, replace(CLOSED, rank="auto"))
    ranks = {name: (layer.rank, exact.layers[name].rank) for name, layer in small.layers.items()}
    assert all(ours <= most for ours, most in ranks.values()) and any(ours < most for ours, most in ranks.values())
    assert small.kept.keys() == small.layers.keys() and exact.kept == {}
    assert all(0.995 <= share <= 1 + 1e-9 for share in small.kept.values())
    assert any(small.kept[name] < 0.9999 for name, (ours, most) in ranks.items() if ours < most)
    assert small.recipe()["kept"] == {name: round(share, 4) for name, share in small.kept.items()}


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
    note_bled(path, {"tiger": {"panda": 0.125}})
    assert json.loads(files.load(path).metadata["loraclr.recipe"]) == {**recipe, "bled": {"tiger": {"panda": 0.125}}}
    assert recipe_of(path).method == "loraclr", "what was measured is no part of what is to be done"


def test_a_replaced_merge_renews_its_notes_unless_they_are_the_users(tmp_path) -> None:
    host, path = ToyHost(), tmp_path / "it.safetensors"

    def merged(words: str) -> Merge:
        return merge(host, [Concept(toy_lora(host, "tiger", 1), words)], CLOSED)

    write(merged("sks"), path)
    write(again := merged("zyk"), path, overwrite=True)
    assert files.activation_text(path) == "zyk" and not again.notes
    sidecar = path.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace('"zyk"', '"my tiger"'))
    write(again := merged("sks"), path, overwrite=True)
    assert files.activation_text(path) == "my tiger"
    assert again.notes == ["it.json holds notes of yours and stays as it is, activation text included."]


def test_layers_looked_at_in_passes_merge_to_the_same(monkeypatch) -> None:
    results, drawn = [], []
    for held in (10e9, 300.0):
        monkeypatch.setattr("loraclr.merging.HELD", held)
        host = ToyHost()
        concepts = [Concept(toy_lora(host, name, seed), name) for seed, name in enumerate(("a", "b"))]
        told = []
        results.append(merge(host, concepts, CLOSED, lambda *tick, told=told: told.append(tick[1])))
        drawn.append(host.drawn)
        assert told == sorted(told) and told[-1] == 1.0
    assert drawn[1] > drawn[0]
    for name, layer in results[0].layers.items():
        torch.testing.assert_close(results[1].layers[name].delta(), layer.delta(), rtol=1e-4, atol=1e-5)


def test_an_attention_of_open_clip_is_written_whole() -> None:
    """The webui loads nothing of one that lacks q, k, v or out."""
    stem = "_text_model_encoder_layers_3_self_attn_"
    layers = {f"lora_te{n}{stem}v_proj": Layer(torch.ones(4, 2), torch.ones(2, 4), 1.0) for n in (1, 2)}
    whole = with_whole_attention(layers, "sdxl")
    assert set(whole) == {f"lora_te1{stem}v_proj"} | {f"lora_te2{stem}{side}_proj" for side in ("q", "k", "v", "out")}
    assert whole[f"lora_te2{stem}v_proj"] is layers[f"lora_te2{stem}v_proj"]
    assert torch.equal(whole[f"lora_te2{stem}out_proj"].delta(), torch.zeros(4, 4))
    assert with_whole_attention(layers, "sd1") == layers
