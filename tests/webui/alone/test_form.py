"""The form's settings: what a recipe says gets into it, and out of it again as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from alone_driver import environment_of

from loraclr.plan import Settings

USUAL = asdict(Settings())
#: The form, filled from each recipe of (method, settings) and read; run where this version of gradio is.
ROUND_TRIP = """
import inspect, json, sys
from dataclasses import asdict
from types import SimpleNamespace
import gradio as gr
from loraclr.webui import settings, surroundings

surroundings.settle(SimpleNamespace(row=lambda **look: gr.Row(**look), option=lambda name, usual: usual))
with gr.Blocks():
    fields = settings.Form().fields
orders = []
for method, told in json.load(sys.stdin):
    order = settings.read(*settings.written(method, told))
    orders.append({**order, "settings": asdict(order["settings"])})
ids = [field.elem_id for field in fields]
print(json.dumps({"ids": ids, "arguments": list(inspect.signature(settings.read).parameters), "orders": orders}))
"""


def round_trip(gradio: Path, *recipes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """What `ROUND_TRIP` prints."""
    ended = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP],
        input=json.dumps(recipes),
        env=environment_of(gradio),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_every_setting_comes_back(gradio: Path) -> None:
    unusual = {
        "speed": "best", "rank": 16, "neutral": 0.5, "scenes": 0, "ridge": 0.01, "steps": 20, "guidance": 7.5,
        "size": 512, "neutral_prompts": ["a house", "a tree"], "seed": 7, "margin": 0.25, "penalty": 0.01,
        "iterations": 300, "rate": 0.003, "distance": "token",
    }  # fmt: skip
    assert all(unusual[name] != USUAL[name] for name in unusual)
    recipes = [("loraclr", {}), ("ties", {**unusual, "density": 0.3}), ("loraclr", {"speed": "closed", "rank": "auto"})]
    usual, changed, closed = round_trip(gradio, *recipes)["orders"]
    assert usual["method"] == "loraclr"
    assert usual["settings"] == json.loads(json.dumps(USUAL))
    assert changed["method"] == "ties"
    assert changed["density"] == 0.3
    assert changed["settings"] == json.loads(json.dumps({**USUAL, **unusual}))
    assert closed["settings"] == json.loads(json.dumps({**USUAL, "speed": "closed", "rank": "auto"}))


@pytest.mark.parametrize("name", ["speed", "distance", "method"])
def test_a_choice_that_the_form_does_not_have_becomes_the_usual_one(gradio: Path, name: str) -> None:
    recipe = ("sideways", {}) if name == "method" else ("loraclr", {name: "sideways"})
    (order,) = round_trip(gradio, recipe)["orders"]
    assert order["method"] == "loraclr"
    assert order["settings"] == json.loads(json.dumps(USUAL))


def test_a_size_that_cannot_be_drawn_is_refused(gradio: Path) -> None:
    """The field beside the slider takes any number."""
    with pytest.raises(AssertionError, match="ValueError: The picture size is 500: choose a multiple of 64"):
        round_trip(gradio, ("loraclr", {"size": 500}))


def test_the_form_has_its_fields_in_the_order_of_the_arguments(gradio: Path) -> None:
    told = round_trip(gradio)
    arguments = ["neutral_prompts" if name == "kept" else name for name in told["arguments"]]
    assert told["ids"] == [f"loraclr_{name}" for name in arguments]
