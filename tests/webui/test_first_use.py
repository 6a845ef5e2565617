"""What the tab says to somebody who has no checkpoint yet, no LoRA, or a checkpoint that cannot be merged for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import checkout, running
from webui_driver import Tab, Webui

#: An extension of the test's own: makes the webui hold a checkpoint of another kind, in name only (POST /pretend).
PRETEND = """
from types import SimpleNamespace

from modules import script_callbacks, sd_models


def pretend(name: str, loaded: bool):
    info = SimpleNamespace(name_for_extra=name, title=f"{name}.safetensors", filename=name)
    sd_models.checkpoints_list[info.title] = info
    if loaded:
        families = {f"is_{family}": name.startswith(family) for family in ("sd1", "sd2", "sdxl", "ssd", "sd3")}
        sd_models.model_data.sd_model = SimpleNamespace(
            **families, sd_checkpoint_info=info, cond_stage_model=None, lowvram=False
        )
    return {}


script_callbacks.on_app_started(lambda _, app: app.add_api_route("/pretend", pretend, methods=["POST"]))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    """A webui with the extension, and nothing else in it."""
    checkout()
    data = tmp_path_factory.mktemp("webui")
    scripts = data / "extensions" / "pretend" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "pretend.py").write_text(PRETEND)
    with running(data) as started:
        yield started


def test_hints(bare: Webui, chromium: Any) -> None:
    """Each thing that is missing is named, one after the other, with the folder where it belongs."""
    from miniature import checkpoint

    tab = Tab(bare, chromium)
    hint = tab.page.locator("#loraclr_heading.prose")

    def refreshed() -> str:
        tab.page.locator("#loraclr_refresh").click()
        tab.settle()
        return hint.inner_text()

    assert "There is no checkpoint yet" in refreshed()
    assert str(bare.data / "models" / "Stable-diffusion") in hint.inner_text()
    bare.ask("/pretend?name=sd3_medium&loaded=false", {})
    assert "There is no LoRA yet" in refreshed()
    assert str(bare.loras) in hint.inner_text()
    checkpoint.install_loras(bare.loras)
    assert "Choose two or more LoRAs" in refreshed()
    for name in ("flux1_dev", "sd3_medium"):
        bare.ask(f"/pretend?name={name}&loaded=true", {})
        tab.page.reload()
        tab.open()
        assert "The loaded checkpoint is none of SD 1.x, SD 2.x and SDXL" in refreshed()
    tab.choose("tiger", "panda")
    tab.settle()
    assert "sd3_medium is no checkpoint of Stable Diffusion 1.x, 2.x or XL" in tab.merge()
    assert not list(bare.loras.glob("*-*"))
    assert not tab.errors
    tab.browser.close()
