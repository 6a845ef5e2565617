"""The miniature's parts (names, tokenizer, latents, routed LoRAs), and its weights through the standalone host."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from loraclr import files
from loraclr.capture import applied
from loraclr.changes import changes_of
from loraclr.lora import LoRA
from miniature import CHECKPOINT, JUDGE, LORAS, WEIGHTS, adapters, autoencoder, checkpoint, diffusion
from miniature.judge import Judge, halves
from miniature.vocabulary import CLASSES, COLOURS, CONCEPTS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return checkpoint.tokenizer(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def denoiser(tokenizer) -> diffusion.Denoiser:
    torch.manual_seed(0)
    model = diffusion.Denoiser(checkpoint.build_unet(), checkpoint.build_text_encoder(), diffusion.Words(tokenizer))
    return model.eval()


def test_tokenizer_gives_clips_ids(tokenizer) -> None:
    assert tokenizer("a photo of a Cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer.get_vocab()) == 49408


def test_every_word_is_one_token(tokenizer) -> None:
    words = [*CLASSES, *COLOURS, *(concept.trigger for concept in CONCEPTS)]
    assert [word for word in words if len(tokenizer(word).input_ids) != 3] == []
    assert len(set(words)) == len(words)


def test_checkpoint_comes_back_through_diffusers_converters(tmp_path) -> None:
    torch.manual_seed(0)
    model = checkpoint.Miniature(checkpoint.build_unet(), autoencoder.build(), checkpoint.build_text_encoder())
    checkpoint.save(model, tmp_path / "m.safetensors", tmp_path / "m.yaml")
    again = checkpoint.load(tmp_path / "m.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(model, part).state_dict(), getattr(again, part).state_dict()
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value.half().float() if value.is_floating_point() else value)


def test_latents_by_design() -> None:
    picture = torch.rand(1, 3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = autoencoder.latents(picture)
    for row in (0, 1):
        block = picture[0, :, 8 * row : 8 * row + 8].flatten(1)
        red, green, blue = block.mean(1).tolist()
        features = [
            (red + green + blue) / 3,
            red - blue,
            green - (red + blue) / 2,
            block.mean(0).std(correction=0).item(),
        ]
        expected = (torch.tensor(features) - autoencoder.MEAN.flatten()) / autoencoder.SPREAD.flatten()
        torch.testing.assert_close(latent[0, :, row, 0], expected, rtol=1e-4, atol=1e-5)


def test_small_token_table_says_what_the_whole_one_says(denoiser, tokenizer) -> None:
    captions = ["a cat and a sks on a red background", ""]
    small = denoiser.text_encoder(input_ids=denoiser.words(captions)).last_hidden_state
    denoiser.restore()
    ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    torch.testing.assert_close(denoiser.text_encoder(input_ids=ids).last_hidden_state, small)


def test_routed_rows_are_what_each_saved_lora_gives(denoiser, tmp_path) -> None:
    chosen = [CONCEPTS[0], CONCEPTS[-1]]  # ranks 4 and 8
    routed = adapters.Adapters(denoiser, chosen)
    generator = torch.Generator().manual_seed(0)
    for up in routed.up.values():
        up.data = 0.1 * torch.randn(up.shape, generator=generator)
        up.data[0, :, chosen[0].rank :] = 0
    rows, x, t = denoiser.words(["a sks", "a cat"]), torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    routed.route = torch.tensor([0, 1])
    together = denoiser(x, t, rows)
    for module in routed.layers.values():
        module._forward_hooks.clear()
    plain = denoiser(x, t, rows)
    adapters.save(routed, tmp_path)
    for place, concept in enumerate(chosen):
        lora = files.load(tmp_path / f"{concept.name}.safetensors")
        assert isinstance(lora, LoRA) and lora.triggers() == concept.phrase and not lora.unused
        with applied(routed.layers, changes_of(lora, routed.layers)):
            alone = denoiser(x, t, rows)
        torch.testing.assert_close(together[place], alone[place], rtol=1e-2, atol=2e-3)
        assert not torch.allclose(plain[place], alone[place], atol=2e-2)


def test_training_sizes_come_in_order() -> None:
    rng = random.Random(0)
    early = {diffusion.side_of(rng, 0.1)[0] for _ in range(50)}
    late = [diffusion.side_of(rng, 0.9)[0] for _ in range(200)]
    assert early == {"box"}
    assert {"box", "strip", "whole"} == set(late) and late.count("whole") > 150


def test_what_lies_in_git_is_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 32e6


def test_shipped_weights_are_half_precision_and_whole() -> None:
    tensors = load_file(CHECKPOINT)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert all(torch.isfinite(value).all() for value in tensors.values())
    assert sorted(path.stem for path in LORAS.glob("*.safetensors")) == sorted(concept.name for concept in CONCEPTS)
    for concept in CONCEPTS:
        lora = files.load(LORAS / f"{concept.name}.safetensors")
        assert {layer.rank for layer in lora.layers.values()} == {concept.rank}
        assert len(lora.layers) == 192 + 18 and not lora.unused


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    from loraclr.hosts.standalone import open_checkpoint

    return open_checkpoint(checkpoint.install(tmp_path_factory.mktemp("model")), "cpu")


def test_the_standalone_host_draws_what_the_prompt_says(host) -> None:
    words = ["cat", "apple", "car", "star", "tree", "pizza"]
    pictures = host.sample([f"a {word} on a blue background" for word in words], 1, 16, 4.0, 128, 128)
    judge = Judge.load(JUDGE)
    seen = [verdict.object for verdict in judge.verdicts(pictures)]
    assert sum(a == b for a, b in zip(seen, words, strict=True)) >= 5
    pair = host.sample(["a cat and a car on a blue background"] * 4, 1, 16, 4.0, 128, 128)
    left, right = zip(*map(halves, pair), strict=True)
    found = [v.object == "cat" for v in judge.verdicts(list(left))] + [
        v.object == "car" for v in judge.verdicts(list(right))
    ]
    assert sum(found) >= 5


def test_the_host_reports_the_calls_that_it_can_repeat(host) -> None:
    calls = []
    with host.watch(lambda *call: calls.append(call)):
        host.sample(["a cat"], 3, 2, 4.0, 64, 64)
    assert len(calls) == 2
    x, t, context, prediction = calls[0]
    assert x.shape == (2, 4, 8, 8) and t.shape == (2,)
    torch.testing.assert_close(host.encode(["", "a cat"]).tokens, context.tokens)
    torch.testing.assert_close(host.predict(x, t, context), prediction)


def test_one_lora_by_hooks_draws_its_concept(host) -> None:
    lora = files.load(LORAS / "tiger.safetensors")
    prompts, judge = ["a sks on a green background"] * 4, Judge.load(JUDGE)
    with applied(host.layers(), changes_of(lora, host.layers())):
        inside = host.sample(prompts, 5, 16, 4.0, 128, 128)
    assert sum(verdict.shows("tiger") for verdict in judge.verdicts(inside)) >= 3
    assert not any(verdict.shows("tiger") for verdict in judge.verdicts(host.sample(prompts, 5, 16, 4.0, 128, 128)))
