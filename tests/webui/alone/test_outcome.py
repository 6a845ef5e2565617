"""What a merge leaves once it has ended: what the tab shows, the API's job, and no tensors and files beyond that."""

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
import gc, json, sys
from pathlib import Path
from safetensors import safe_open
from toy import ToyAround, toy_lora
from loraclr import files
from loraclr.plan import Settings
from loraclr.result import Merge
from loraclr.webui import api, job, results, settings, surroundings, tab

folder, told = Path(sys.argv[1]), {}
around = ToyAround(folder)
surroundings.settle(around)
for seed, name in enumerate(("cat", "dog")):
    files.save(folder / f"{name}.safetensors", toy_lora(around.toy, name, seed).layers, {})
rows = [job.Row(name, f"sks {name}") for name in ("cat", "dog")]
order = job.Order(rows, "both", True, settings=Settings("closed", steps=1, size=32))
wanted = api.Job("task")
api._work(wanted, order)
api._jobs["task"] = wanted
gc.collect()
told["job"], told["held"] = api.status("task"), sum(type(one) is Merge for one in gc.get_objects())
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
reports = [panel[6][0], *(str(results.downloads(done)[0]) for _ in range(2))]
told["reports"] = [Path(report).exists() for report in reports]
done.path.unlink()
told["unseen"], told["logged"] = shown()[-1], around.logged
told["last"] = reports[-1]
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


def test_the_apis_job_is_what_its_status_says(told: dict[str, Any]) -> None:
    """Many jobs are remembered: none with its merge, which is every LoRA in float32."""
    assert told["job"].pop("figures").keys() >= {"effect_kept", "seconds"}
    assert told["job"].pop("seconds").keys() >= {"solve"}
    assert told["job"].pop("bled").keys() == told["job"].pop("kept").keys() == {"cat", "dog"}
    assert told["job"].pop("path").endswith("both.safetensors")
    notes = told["job"].pop("notes")
    assert all(isinstance(note, str) for note in notes)
    assert told["job"] == {
        "job": "task", "state": "done", "name": "both", "prompt": "<lora:both:1> sks cat, sks dog",
    }  # fmt: skip
    assert told["held"] == 0


def test_reports_of_earlier_merges_are_removed(told: dict[str, Any]) -> None:
    """As many are kept as pages may ask for again, and none once the program has ended."""
    assert told["reports"] == [False, True, True]
    assert not Path(told["last"]).parent.exists()
