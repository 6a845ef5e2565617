"""SD 2.x and SDXL in a real webui: merged there, loaded there, and the same as by our hooks."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import REPOSITORY, checkout, running

from loraclr.files import SD_VERSION

NAMES, TRIGGERS = ["first", "second"], ["sks", "zyk"]


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """A family, and what the probe says of a merge on a tiny model of it."""
    checkout()
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import tiny

    family, data = request.param, tmp_path_factory.mktemp("webui")
    tiny.install(family, data / "models" / "Stable-diffusion", "v" if family == "sd2" else "epsilon")
    tiny.install_loras(family, data / "models" / "Lora", NAMES)
    with running(data, probe=True) as webui:
        said = webui.ask("/probe", {"names": NAMES, "triggers": TRIGGERS, "name": "both"})
        said["whole"] = webui.ask("/deltas", {"names": ["whole"]})["whole"]
        if family == "sdxl":
            pooled = {"names": [NAMES[0], "pooled"], "triggers": TRIGGERS, "name": "three"}
            said["pooled"] = webui.ask("/probe", pooled)
        return family, said | {"log": webui.log.read_text(errors="replace")}


def test_the_host_knows_the_model(probed) -> None:
    family, said = probed
    assert said["family"] == family and said["target"] == ("v" if family == "sd2" else "epsilon")
    assert max(said["repeated"]) < 1e-4, "what was watched can be asked for again"


def test_nothing_is_downloaded_for_previews(probed) -> None:
    """The webui's usual ones of SDXL come from a model that it fetches when it first needs it."""
    assert "Downloading" not in probed[1]["log"]


def test_every_layer_takes_part_and_the_model_stays_as_it_was(probed) -> None:
    family, said = probed
    text = "lora_te2" if family == "sdxl" else "lora_te"
    sides = [f"{text}_text_model_encoder_layers_0_self_attn_{side}_proj" for side in ("q", "k", "v", "out")]
    assert set(sides) <= set(said["layers"]) and said["missing"] == []
    assert said["untouched"] and said["restored"]


def test_gradients_reach_every_layer_that_is_used(probed) -> None:
    family, said = probed
    # Of SDXL's first encoder the last layer's output is left out.
    unused = [name for name in said["layers"] if name.startswith("lora_te1_text_model_encoder_layers_2_")]
    assert said["without_gradient"] == (unused if family == "sdxl" else [])


def test_words_and_pictures_are_learnt_from(probed) -> None:
    """All stages of a merge that trains, with the family's own text encoders."""
    _, said = probed
    assert {"Learning the words, step 4 of 4", "Polishing, step 3 of 3"} <= set(said["stages"])
    polishing = said["stages"][said["stages"].index("Polishing, step 1 of 3") :]
    assert "Looking at what it draws so far" in polishing
    assert said["trained"] == said["layers"]


def test_the_webui_loads_the_result_as_our_hooks_apply_it(probed) -> None:
    _, said = probed
    assert said["complaints"] == []
    assert min(said["effect"]) > 0.01 and max(said["apart"]) < 1e-3, said


def test_the_webui_lists_the_result_and_knows_its_word(probed) -> None:
    """The small model's words have other widths than the family's, so only the webui reads them in the file."""
    family, said = probed
    assert said["listed"] == [SD_VERSION[family], said["hash"]]
    encoders = ["clip_l", "clip_g"] if family == "sdxl" else ["clip_h"]
    keys = {f"bundle_emb.zyk.{encoder}" for encoder in encoders} if family == "sdxl" else {"bundle_emb.zyk.emb_params"}
    assert said["words"] == {"zyk": encoders} and set(said["unused"]) == keys
    assert min(said["word's effect"]) > 10 * max(said["apart"])


def test_every_layer_of_the_family_is_known_to_the_webui_and_its_delta_is_ours(probed) -> None:
    import architectures

    from loraclr.keys import kohya_name

    family, said = probed[0], probed[1]["whole"]
    real = {
        kohya_name("unet", k, family) for k, shape in architectures.diffusers_unet(family).items() if len(shape) > 1
    }
    assert {name for name in said["layers"] if name.startswith("lora_unet_")} == real
    assert said["complaints"] == said["failed"] == said["others"] == said["unused"] == []
    assert sorted(said["weights"]) == said["layers"]
    assert {name: away for name, away in said["weights"].items() if away > 1e-3} == {}
    # What the webui computes for OpenCLIP's attention is for q, k and v at once.
    once = {name for name in said["layers"] if "_self_attn_" not in name}
    assert said["computed"].keys() >= once
    assert {name: away for name, away in said["computed"].items() if away > 1e-3} == {}


def test_the_text_projection_takes_part_although_the_webui_does_not_know_it(probed) -> None:
    family, said = probed
    if family != "sdxl":
        return
    name, said = "lora_te2_text_projection", said["pooled"]
    assert name in said["layers"] and said["missing"] == [] and said["untouched"] and said["restored"]
    assert name not in said["without_gradient"], "what it pools reaches the UNet"
    assert len(said["complaints"]) == 1, said["complaints"]
    assert set(re.findall(r"'(lora_[^']+)':", said["complaints"][0])) == {
        f"{name}.{suffix}" for suffix in ("alpha", "lora_up.weight", "lora_down.weight")
    }
