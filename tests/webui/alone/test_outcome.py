"""What a merge leaves once it has ended: what the tab shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alone_driver import REPOSITORY, environment_of

#: Merges two LoRAs of a toy in the folder that is its argument, and prints what came of it; run where gradio is.
PROGRAM = """
import json, sys
from pathlib import Path
from safetensors import safe_open
from toy import ToyAround, toy_lora
from loraclr import files
from loraclr.plan import Settings
from loraclr.webui import job, settings, surroundings, tab

folder, told = Path(sys.argv[1]), {}
around = ToyAround(folder)
surroundings.settle(around)
for seed, name in enumerate(("cat", "dog")):
    files.save(folder / f"{name}.safetensors", toy_lora(around.toy, name, seed).layers, {})
rows = [job.Row(name, f"sks {name}") for name in ("cat", "dog")]
order = job.Order(rows, "both", True, settings=Settings("closed", steps=1, size=32))
done = job.run("task", order)

def shown():
    tab.rows.read, tab.settings.read, tab.job.run = (lambda *_: []), (lambda *_: {}), (lambda *_: done)
    return tab._merged("task", "both", True, *[None] * len(settings.FIELDS), [])

for name in ("cat", "dog"):
    (folder / f"{name}.safetensors").unlink()
panel = shown()
told["prompt"], told["said"], (page, recipe) = panel[3], panel[-1], map(Path, panel[6])
told["report"] = page.read_text("utf-8")
with safe_open(done.path, framework="pt") as file:
    told["written"] = json.loads(file.metadata()["loraclr.recipe"])
told["recipe"] = json.loads(recipe.read_text("utf-8"))
done.path.unlink()
told["unseen"], told["logged"] = shown()[-1], around.logged
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(gradio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `PROGRAM` prints."""
    environment = environment_of(gradio)
    environment["PYTHONPATH"] += f"{os.pathsep}{REPOSITORY / 'tests'}"
    folder = tmp_path_factory.mktemp("loras")
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_a_source_that_is_gone_by_then_is_not_missed(told: dict[str, Any]) -> None:
    """The recipe is the file's own, with what was measured after it was written."""
    assert "loraclr-done" in told["said"]
    assert told["prompt"] == "<lora:both:1> sks cat, sks dog"
    assert told["recipe"] == told["written"] and "bled" in told["recipe"]
    assert "Settings of the merge" in told["report"]


def test_a_result_that_cannot_be_shown_is_no_failed_merge(told: dict[str, Any]) -> None:
    assert "loraclr-note" in told["unseen"] and "loraclr-error" not in told["unseen"]
    assert "both.safetensors is written, but its result cannot be shown: " in told["unseen"]
    assert told["logged"] == ["LoRACLR Merge could not show its result"]
