"""The standalone host with SD 2.x and SDXL of the real block layouts: merged, written, and read by diffusers."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny
import torch

from loraclr import files, merging
from loraclr.capture import applied, changes_of
from loraclr.hosts.standalone import Standalone
from loraclr.merging import Concept, Settings

QUICK = {"steps": 2, "guidance": 2.0, "size": 64, "tokens": 32, "neutral_prompts": ("a dog",)}


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def host(request, tmp_path_factory) -> Standalone:
    pipeline = tiny.pipeline(
        request.param, tmp_path_factory.mktemp("clip"), "v" if request.param == "sd2" else "epsilon"
    )
    return Standalone(pipeline)


def concepts(host: Standalone) -> list[Concept]:
    layers = tiny.usual(host.layers())
    loras = [tiny.random_lora(layers, host.family, f"lora{seed}", seed) for seed in (1, 2)]
    return [Concept(lora, word, prompts=("a {}",)) for lora, word in zip(loras, ("sks", "zyk"), strict=True)]


def test_the_family_and_what_the_model_predicts(host) -> None:
    assert host.family in ("sd2", "sdxl")
    assert host.target == ("v" if host.family == "sd2" else "epsilon")
    assert host.size == 8 * tiny.SIDE


def test_the_host_reports_the_calls_that_it_can_repeat(host) -> None:
    calls = []
    with host.watch(lambda *call: calls.append(call)):
        host.sample(["a cat"], 3, 2, 4.0, 64, 96)
    x, t, context, prediction = calls[0]
    assert x.shape == (2, 4, 12, 8) and len(calls) == 2
    ours = host.encode(["", "a cat"])
    torch.testing.assert_close(ours.tokens, context.tokens)
    if host.family == "sdxl":
        torch.testing.assert_close(ours.pooled, context.pooled)
    torch.testing.assert_close(host.predict(x, t, ours), prediction)


def test_a_merge_is_a_file_that_diffusers_loads(host, tmp_path: Path, caplog) -> None:
    before = host.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), host.encode(["a sks"]))
    merged = merging.merge(host, concepts(host), Settings(speed="closed", **QUICK))
    assert set(merged.layers) == set(concepts(host)[0].lora.layers)
    assert any("te2" in name for name in merged.layers) == (host.family == "sdxl")
    path = merging.write(merged, tmp_path / "both.safetensors", dtype=torch.float32)
    assert files.load(path).family == host.family

    def seen() -> tuple[torch.Tensor, torch.Tensor]:
        context = host.encode(["a sks beside a zyk"])
        return context.tokens, host.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), context)

    ours = files.load(path)
    assert not ours.unused
    with torch.no_grad():
        with applied(host.layers(), changes_of(ours, host.layers())):
            wanted = seen()
        plain = seen()
        host.pipeline.load_lora_weights(tmp_path, weight_name=path.name)
        try:
            with caplog.at_level(logging.WARNING):
                theirs = seen()
        finally:
            host.pipeline.unload_lora_weights()
    assert not [r for r in caplog.records if "unexpected" in r.message.lower() or "no lora keys" in r.message.lower()]
    for a, b, c in zip(theirs, wanted, plain, strict=True):
        assert (a - b).norm() < 1e-3 * (b - c).norm()
    assert torch.equal(before, host.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), host.encode(["a sks"])))


def test_polish_and_scenes_learn(host) -> None:
    settings = Settings(speed="fast", scenes=1, **QUICK)
    merged = merging.merge(host, concepts(host), settings)
    assert all(after < before for before, after in merged.missed.values())
