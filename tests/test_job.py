"""The tab's job, without a webui: once the LoRA is written, nothing that follows makes the merge a failed one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy import ToyAround, toy_lora

from loraclr import files
from loraclr.hosts import Cancelled
from loraclr.plan import Settings
from loraclr.webui import job, surroundings

ORDER = job.Order(
    [job.Row(name, f"sks {name}") for name in ("cat", "dog")], "both", settings=Settings("closed", steps=1, size=32)
)


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToyAround:
    """A folder with two LoRAs, and a program around it."""
    around = ToyAround(tmp_path)
    for seed, name in enumerate(("cat", "dog")):
        files.save(tmp_path / f"{name}.safetensors", toy_lora(around.toy, name, seed).layers, {})
    monkeypatch.setattr(surroundings, "_around", [around])
    return around


def test_a_file_its_pictures_and_a_card(around: ToyAround) -> None:
    done = job.run("task", ORDER)
    assert {"both.safetensors", "both.json", "both.preview.png"} <= {path.name for path in around.loras.iterdir()}
    assert len(done.comparison.concepts) == 2 and done.comparison.complete
    recipe = json.loads(files.load(done.path).metadata["loraclr.recipe"])
    assert recipe["bled"] == job.bled(done)
    assert not around.logged


@pytest.mark.parametrize(
    ("part", "error", "told"),
    [
        ("host.publish", OSError(2, "gone"), "[Errno 2] gone"),
        ("pictures.compare", RuntimeError("A tensor with NaNs\nwas produced"), "A tensor with NaNs was produced"),
        ("job.note_bled", OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        ("preview.save", OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        ("preview.sheet", AssertionError(), "AssertionError"),
    ],
)
def test_what_fails_after_the_file_is_a_note(
    around: ToyAround, monkeypatch: pytest.MonkeyPatch, part: str, error: Exception, told: str
) -> None:
    """A retry would only hear that the file exists already. What was drawn until then is shown."""

    def fails(*_: object) -> None:
        assert (around.loras / "both.json").exists()
        raise error

    owner, name = part.split(".")
    place = {"host": around.toy, "job": job, "pictures": job.pictures, "preview": job.preview}[owner]
    monkeypatch.setattr(place, name, fails)
    done = job.run("task", ORDER)
    assert done.path == around.loras / "both.safetensors"
    assert files.load(done.path).triggers() == "sks cat, sks dog"
    assert done.merge.notes[-1] == f"The file is complete, but what follows it failed: {told}"
    assert (done.comparison is None) == (owner in ("host", "pictures"))
    assert around.logged == ["LoRACLR Merge wrote the file, but failed after that"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Cancelled(), RuntimeError("no memory")])
def test_what_fails_before_it_fails_the_merge(
    around: ToyAround, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(job, "write", fails)
    with pytest.raises(type(error)):
        job.run("task", ORDER)
    assert {path.name for path in around.loras.iterdir()} == {"cat.safetensors", "dog.safetensors"}
