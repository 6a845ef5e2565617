"""The API: the same merges as the tab's, in the same queue, with the same sentences."""

from __future__ import annotations

import json
import time
import urllib.error
from typing import Any

import pytest
from webui_driver import Webui

from miniature.vocabulary import CONCEPT

BASE = "/loraclr/v1"
HURRY = {"speed": "closed", "steps": 2, "size": 64}
PAIR = [{"name": "tiger"}, {"name": "panda", "weight": 0.8, "trigger": "my panda"}]


def refused(webui: Webui, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    """Status and sentence of a request that is refused."""
    with pytest.raises(urllib.error.HTTPError) as error:
        webui.ask(f"{BASE}/{path}", body)
    return error.value.code, json.load(error.value)["detail"]


def ended(webui: Webui, job: str) -> dict[str, Any]:
    """A job's status when it no longer waits or runs."""
    for _ in range(900):
        status = webui.ask(f"{BASE}/jobs/{job}")
        if status["state"] not in ("queued", "running"):
            return status
        time.sleep(1)
    raise TimeoutError(status)


def test_what_there_is(webui: Webui) -> None:
    """LoRAs, methods and the schema, whose defaults are accepted."""
    assert {"name": "tiger", "path": str(webui.loras / "tiger.safetensors"), "family": "sd1"} in webui.ask(
        f"{BASE}/loras"
    )
    tiger = webui.ask(f"{BASE}/loras/tiger")
    assert tiger["trigger"] == CONCEPT["tiger"].trigger
    assert tiger["problem"] == ""
    assert "ties" in webui.ask(f"{BASE}/methods")
    assert webui.ask(f"{BASE}/schema")["settings"]["steps"] == 16
    assert refused(webui, "loras/nobody")[0] == 404
    assert refused(webui, "jobs/nobody")[0] == 404


def test_merge(webui: Webui) -> None:
    """A file like the tab's, with the triggers that were given or found."""
    job = webui.ask(f"{BASE}/merge", {"loras": PAIR, "name": "by api", "settings": HURRY, "draw": False})["job"]
    done = ended(webui, job)
    assert done["state"] == "done", done
    assert done["prompt"] == f"<lora:by api:1> {CONCEPT['tiger'].trigger}, my panda"
    assert done["kept"].keys() == {"tiger", "panda"}
    assert done["bled"] == {}, "nothing was drawn"
    assert done["figures"]["objective"]["feed-forward"]["layers"] == 32
    assert (webui.loras / "by api.safetensors").exists()
    assert "by api" in {lora["name"] for lora in webui.ask("/sdapi/v1/loras")}


def test_english_whatever_the_page_speaks(webui: Webui) -> None:
    """Programs read the sentences, too."""
    webui.ask("/sdapi/v1/options", {"localization": "de_DE"})
    try:
        assert "two or more" in refused(webui, "merge", {"loras": PAIR[:1]})[1]
    finally:
        webui.ask("/sdapi/v1/options", {"localization": "None"})


def test_by_weights_alone(webui: Webui) -> None:
    """A method that does not look at the model, with pictures."""
    order = {"loras": PAIR, "name": "by ties", "method": "ties", "settings": {"steps": 2, "size": 64}}
    done = ended(webui, webui.ask(f"{BASE}/merge", order)["job"])
    assert done["state"] == "done", done
    assert (webui.loras / "by ties.preview.png").exists()


def test_cancel(webui: Webui) -> None:
    """A running job and one that waits behind it end without a file."""
    files = webui.files()
    slow = {"loras": PAIR, "name": "never", "settings": {"speed": "best"}}
    jobs = [webui.ask(f"{BASE}/merge", {**slow, "name": name})["job"] for name in ("never", "never either")]
    time.sleep(3)
    for job in reversed(jobs):
        webui.ask(f"{BASE}/jobs/{job}/cancel", {})
    assert [ended(webui, job)["state"] for job in jobs] == ["cancelled", "cancelled"]
    assert webui.files() == files


@pytest.mark.parametrize(
    ("order", "answer"),
    [
        ({}, 'has no list of "loras"'),
        ({"loras": PAIR[:1]}, "two or more"),
        ({"loras": [{"name": "tiger"}, {"name": "nobody"}]}, "nobody is no longer in the LoRA folder"),
        ({"loras": PAIR, "name": "../x"}, "must not contain /"),
        ({"loras": PAIR, "name": "tiger"}, "one of the LoRAs to merge"),
        ({"loras": PAIR, "method": "magic"}, "no method magic"),
        ({"loras": PAIR, "settings": {"steps": 1000}}, "steps is 1000"),
        ({"loras": PAIR, "settings": {"rank": "few"}}, 'largest rank is "few"'),
        ({"loras": PAIR, "settings": {"rank": 0}}, 'largest rank is "0"'),
        ({"loras": PAIR, "settings": {"size": 100.5}}, "picture size is 100.5: choose a multiple of 64"),
        ({"loras": PAIR, "sped": 1}, '"sped"'),
        ({"loras": [{"name": "tiger", "weight": "much"}, *PAIR[1:]]}, '"weight" cannot be'),
    ],
)
def test_refusals(webui: Webui, order: dict[str, Any], answer: str) -> None:
    """One sentence, at once; nothing is queued."""
    files = webui.files()
    status, sentence = refused(webui, "merge", order)
    assert status == 422
    assert answer in sentence
    assert webui.files() == files
