"""SD 2.x and SDXL in a real webui: merged there, loaded there, and the same as by our hooks."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from webui_driver import Webui

REPOSITORY = Path(__file__).parents[2]
NAMES, TRIGGERS = ["first", "second"], ["sks", "zyk"]


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """A family, and what the probe says of a merge on a tiny model of it."""
    if not os.environ.get("WEBUI_DIR"):
        pytest.skip("set WEBUI_DIR to a stable-diffusion-webui checkout (and WEBUI_PYTHON to its python) to run these")
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import tiny

    family, data = request.param, tmp_path_factory.mktemp("webui")
    # Extensions load in the order of their names, and the probe imports the other's package.
    probe = data / "extensions" / "zz-probe" / "scripts"
    probe.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("probe.py"), probe)
    (data / "extensions" / "sd-webui-loraclr").symlink_to(REPOSITORY, target_is_directory=True)
    # Its usual previews come from a model that it downloads.
    (data / "config.json").write_text(json.dumps({"show_progress_type": "Approx cheap"}))
    target = "v" if family == "sd2" else "epsilon"
    tiny.install(family, data / "models" / "Stable-diffusion", target)
    tiny.install_loras(family, data / "models" / "Lora", NAMES)
    running = Webui(Path(os.environ["WEBUI_DIR"]).resolve(), os.environ.get("WEBUI_PYTHON", sys.executable), data)
    try:
        running.wait()
        asked = {"names": NAMES, "triggers": TRIGGERS, "name": "both"}
        return family, running.ask("/probe", asked)
    finally:
        running.stop()


def test_the_host_knows_the_model(probed) -> None:
    family, said = probed
    assert said["family"] == family and said["target"] == ("v" if family == "sd2" else "epsilon")
    assert max(said["repeated"]) < 1e-4, "what was watched can be asked for again"


def test_every_layer_takes_part_and_the_model_stays_as_it_was(probed) -> None:
    family, said = probed
    text = "lora_te2" if family == "sdxl" else "lora_te"
    sides = [f"{text}_text_model_encoder_layers_0_self_attn_{side}_proj" for side in ("q", "k", "v", "out")]
    assert set(sides) <= set(said["layers"]) and said["missing"] == [] and said["unused"] == []
    assert said["untouched"] and said["restored"]


def test_gradients_reach_every_layer_that_is_used(probed) -> None:
    family, said = probed
    # Of SDXL's first encoder the last layer's output is left out.
    unused = [name for name in said["layers"] if name.startswith("lora_te1_text_model_encoder_layers_2_")]
    assert said["without_gradient"] == (unused if family == "sdxl" else [])


def test_the_webui_loads_the_result_as_our_hooks_apply_it(probed) -> None:
    _, said = probed
    assert said["complaints"] == []
    assert min(said["effect"]) > 0.01 and max(said["apart"]) < 1e-3, said
