"""The standalone host with SD 2.x and SDXL of the real block layouts: merged, written, and read by diffusers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from peft.tuners.lora import LoraLayer

import loraclr
from loraclr import files, merging, plan, scenes
from loraclr.bank import Bank, filing
from loraclr.capture import applied
from loraclr.changes import changes_of
from loraclr.concept import Concept
from loraclr.hosts.standalone import Standalone, open_checkpoint, predicts_noise
from loraclr.keys import Family, kohya_name
from loraclr.plan import POLISH_STEPS, READING_STEPS, Settings
from loraclr.polish import missed, polish
from miniature import checkpoint, drawing

QUICK = {"steps": 2, "guidance": 2.0, "size": 64, "tokens": 32, "neutral_prompts": ("a dog",)}


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def host(family: Family, tmp_path_factory) -> Standalone:
    return Standalone(tiny.pipeline(family, tmp_path_factory.mktemp("clip"), "v" if family == "sd2" else "epsilon"))


def concepts(host: Standalone) -> list[Concept]:
    layers = tiny.usual(host.layers())
    loras = [tiny.random_lora(layers, host.family, f"lora{seed}", seed) for seed in (1, 2)]
    return [Concept(lora, word, prompts=("a {}",)) for lora, word in zip(loras, ("sks", "zyk"), strict=True)]


def adapted(host: Standalone) -> dict[str, LoraLayer]:
    """The layers that diffusers has put a LoRA on."""
    return {
        kohya_name(part, path, host.family): module
        for part in ("unet", "text_encoder", "text_encoder_2")
        if getattr(host.pipeline, part, None) is not None
        for path, module in getattr(host.pipeline, part).named_modules()
        if isinstance(module, LoraLayer)
    }


def test_a_folder_of_diffusers_is_opened(host, family: Family, tmp_path: Path) -> None:
    host.pipeline.save_pretrained(tmp_path)
    again = open_checkpoint(tmp_path, "cpu")
    assert again.family == family
    assert again.target == ("v" if family == "sd2" else "epsilon")
    assert again.size == 8 * tiny.SIDE
    torch.testing.assert_close(again.encode(["a cat"]).tokens, host.encode(["a cat"]).tokens)
    assert again.layers().keys() == host.layers().keys()


def behind(monkeypatch: pytest.MonkeyPatch, pipeline, folder: Path) -> None:
    """Let the folder stand in for the hub, where diffusers looks for what a checkpoint lacks."""
    pipeline.save_pretrained(folder)
    kind = type(pipeline)
    monkeypatch.setattr(kind, "from_single_file", partial(kind.from_single_file, config=str(folder)))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_usual_yaml_beside_a_checkpoint_is_no_hindrance(family: Family, tmp_path: Path, monkeypatch) -> None:
    """It does not say where a tokenizer is, as the miniature's does."""
    if family == "sd1":
        path = checkpoint.install(tmp_path / "models")
        pipeline = open_checkpoint(path, "cpu").pipeline
        path.with_suffix(".yaml").write_text(yaml.safe_dump(without_tokenizer()))
    else:
        path, pipeline = tiny.install(family, tmp_path / "models"), tiny.pipeline(family, tmp_path / "clip")
    behind(monkeypatch, pipeline, tmp_path / "hub")
    host, wanted = open_checkpoint(path, "cpu"), Standalone(pipeline).encode(["a cat"]).tokens
    assert host.family == family
    assert (host.encode(["a cat"]).tokens - wanted).norm() < 1e-2 * wanted.norm()  # the file is in half precision


def without_tokenizer() -> dict:
    """The miniature's yaml as that of SD 1.x is."""
    config = checkpoint.ldm_yaml("")
    del config["model"]["params"]["cond_stage_config"]["params"]
    return config


@pytest.mark.parametrize("tokenizer", ["miniature-clip", "openai/clip-vit-large-patch14", None])
def test_a_yaml_that_says_v_is_believed(tokenizer: str | None, tmp_path: Path, monkeypatch) -> None:
    """Nothing in a checkpoint of SD 1.x tells. Only the first tokenizer is a folder here."""
    path = checkpoint.install(tmp_path)
    behind(monkeypatch, open_checkpoint(path, "cpu").pipeline, tmp_path / "hub")
    config = checkpoint.ldm_yaml(tokenizer) if tokenizer else without_tokenizer()
    config["model"]["params"]["parameterization"] = "v"
    path.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    assert open_checkpoint(path, "cpu").target == "v"


def test_files_that_are_no_checkpoint_are_refused_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match=r"^The checkpoint x\.ckpt is cut off or is not a \.safetensors file; .*\.$"):
        open_checkpoint(path, "cpu")
    for said in ("model: {", "- a list", "model: {}"):
        (tmp_path / "x.yaml").write_text(said)
        with pytest.raises(ValueError, match=r"x\.yaml beside it describes no model; correct it or move it away$"):
            open_checkpoint(path, "cpu")


def test_what_a_unet_predicts_shows_at_the_last_timestep() -> None:
    """The trained miniature predicts noise; one that predicts v would give back the clean picture's negative."""

    class Velocity(torch.nn.Module):
        config = SimpleNamespace(sample_size=16, cross_attention_dim=4)
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, x: torch.Tensor, t: int, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
            clean = torch.nn.functional.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
            return SimpleNamespace(sample=0.07 * x - clean)

    assert predicts_noise(checkpoint.load().unet)
    assert not predicts_noise(Velocity())


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


def test_a_merge_is_a_file_that_diffusers_loads(host, tmp_path: Path) -> None:
    before = host.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), host.encode(["a sks"]))
    merged = merging.merge(host, concepts(host), Settings(speed="closed", **QUICK))
    assert set(merged.layers) == set(concepts(host)[0].lora.layers)
    assert any("te2" in name for name in merged.layers) == (host.family == "sdxl")
    path = loraclr.write(merged, tmp_path / "both.safetensors", dtype=torch.float32)
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
            theirs, loaded = seen(), adapted(host)
        finally:
            host.pipeline.unload_lora_weights()
    assert loaded.keys() == merged.layers.keys()
    for a, b, c in zip(theirs, wanted, plain, strict=True):
        assert (a - b).norm() < 1e-3 * (b - c).norm()
    assert torch.equal(before, host.predict(torch.ones(1, 4, 8, 8), torch.tensor([500]), host.encode(["a sks"])))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_diffusers_loads_every_layer_of_a_pipeline(family: Family, tmp_path: Path) -> None:
    """Every linear layer and convolution of UNet and text encoders, and its output is ours."""
    host = drawing.open_miniature("cpu") if family == "sd1" else Standalone(tiny.pipeline(family, tmp_path / "clip"))
    layers = tiny.whole(host.layers())
    tiny.install_random(family, tmp_path / "all.safetensors", layers, 1, 0.03)
    lora = files.load(tmp_path / "all.safetensors")
    assert lora.family == family and lora.unused == () and lora.layers.keys() == layers.keys()
    host.pipeline.load_lora_weights(tmp_path, weight_name="all.safetensors")
    loaded, changes = adapted(host), changes_of(lora)
    assert loaded.keys() == layers.keys()
    for name, module in loaded.items():
        weight = module.get_base_layer().weight
        x = torch.randn(2, weight.shape[1], *([5, 5] if weight.dim() == 4 else []))
        with torch.no_grad():
            base, theirs = module.get_base_layer()(x), module(x)
            with applied({name: module.get_base_layer()}, {name: changes[name]}):
                ours = module.get_base_layer()(x)
        assert (theirs - ours).norm() < 1e-3 * (ours - base).norm(), name


def test_a_model_in_half_precision_is_merged_for(host, tmp_path: Path, monkeypatch) -> None:
    """As on a graphics card: all stages; before the polish as much is missed as in full precision."""
    monkeypatch.setitem(POLISH_STEPS, "fast", 2)
    monkeypatch.setitem(READING_STEPS, "fast", 2)
    monkeypatch.setattr(plan, "rows", lambda size: 4)
    whole = merging.merge(host, concepts(host), Settings(speed="closed", **QUICK))
    host.pipeline.to(torch.bfloat16)
    try:
        half = merging.merge(host, concepts(host), Settings(speed="fast", scenes=1, **QUICK))
    finally:
        host.pipeline.to(torch.float32)
    loraclr.write(half, tmp_path / "half.safetensors")
    assert half.layers.keys() == whole.layers.keys()
    for name, (closed, polished) in half.missed.items():
        assert closed == pytest.approx(whole.missed[name][0], rel=0.15) and polished < 10


def test_polish_learns_and_scenes_are_drawn(host) -> None:
    layers, lora = host.layers(), concepts(host)[0].lora
    whole, half = (changes_of(lora, layers, weight) for weight in (1.0, 0.5))
    banks = []
    for changes in (whole, {}):
        banks.append(Bank(["a sks", ""]))
        with applied(layers, changes), torch.no_grad():
            record = filing(banks[-1], host.encode(["a sks", ""]))
            with host.watch(record):
                host.sample(["a sks"], 0, 2, 2.0, 64, 64)
    after = polish(host, layers, half, banks, [1.0, 0.0], 8, 2, 0, lambda *_: None)
    assert missed(host, layers, after, banks, 4)[0] < 0.9 * missed(host, layers, half, banks, 4)[0]

    bank, latents = scenes.draw(
        host,
        lambda places: applied(layers, (whole, half)[places[0]]),
        scenes.side_by_side(["sks", "zyk"], 1),
        0,
        2,
        2.0,
        64,
        lambda _: None,
    )
    assert len(bank) == 4 and latents.isfinite().all()
