"""The tab without a webui: its queue, its list of LoRAs, and what `python -m loraclr ui` refuses."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from loraclr.__main__ import main
from loraclr.cli import ui
from loraclr.hosts import Cancelled
from loraclr.webui.alone import listing
from loraclr.webui.alone.jobs import Jobs
from loraclr.webui.alone.listing import Listing


def lora(path: Path, **metadata: str) -> Path:
    """A file with this metadata."""
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file({"x": torch.zeros(1)}, path, metadata)
    return path


class TestJobs:
    def test_they_run_in_the_order_in_which_they_were_asked_for(self) -> None:
        jobs, ran = Jobs(), []

        def work(task: str) -> None:
            with jobs.turn(task):
                ran.append(task)

        tasks = [f"task({number})" for number in range(20)]
        with jobs.turn("first"):
            for task in tasks:
                jobs.enqueue(task)
            threads = [threading.Thread(target=work, args=[task]) for task in reversed(tasks)]
            for thread in threads:
                thread.start()
            assert jobs.told(tasks[3]) == {"state": "waiting", "place": 4, "of": 20}
            assert ran == []
        for thread in threads:
            thread.join()
        assert ran == tasks
        assert jobs.told(tasks[3]) == {"state": "ended"}
        assert jobs.told("another") == {"state": "unknown"}

    def test_a_job_that_fails_makes_room(self) -> None:
        jobs = Jobs()
        with pytest.raises(ValueError, match="no"), jobs.turn("a"):
            raise ValueError("no")
        with jobs.turn("b"):
            assert jobs.runs("b")

    def test_an_interruption_is_for_the_running_job_only(self) -> None:
        jobs = Jobs()
        jobs.interrupt()
        with jobs.turn("a"):
            jobs.report("Looking", 0.5)
            jobs.interrupt()
            with pytest.raises(Cancelled):
                jobs.report("Looking", 0.6)
            with pytest.raises(Cancelled):
                jobs.check()
        with jobs.turn("b"):
            jobs.check()

    def test_when_the_program_ends_no_job_goes_on(self) -> None:
        jobs = Jobs()
        with jobs.turn("a"):
            jobs.close()
            with pytest.raises(Cancelled):
                jobs.report("Looking", 0.5)
        with jobs.turn("b"), pytest.raises(Cancelled):
            jobs.check()

    def test_what_a_page_is_told(self) -> None:
        jobs = Jobs()
        with jobs.turn("a") as running:
            running.since = time.monotonic() - 30
            jobs.report("Looking", 0.25)
            told = jobs.told("a")
            assert (told["stage"], told["share"]) == ("Looking", 0.25)
            assert told["left"] == pytest.approx(90, abs=1)
            assert "picture" not in told
            jobs.show(Image.new("RGB", (2000, 1000)))
            assert jobs.told("a")["picture"].startswith("data:image/jpeg;base64,")
            assert "picture" not in jobs.told("a", seen=1)

    def test_outcomes_are_kept_for_a_while(self) -> None:
        """The last two, as in the webui: each has all its pictures in it."""
        jobs = Jobs()
        for number in range(4):
            jobs.record(str(number), [number])
        assert [jobs.outcome(str(number)) for number in range(4)] == [None, None, [2], [3]]


class TestListing:
    def test_names_and_families(self, tmp_path: Path) -> None:
        lora(tmp_path / "a.safetensors", ss_base_model_version="sdxl_base_v1-0")
        lora(tmp_path / "deep" / "b, c:d.safetensors", **{"modelspec.architecture": "stable-diffusion-v1/lora"})
        lora(tmp_path / "deep" / "a.safetensors", ss_v2="True", ss_output_name="alias")
        lora(tmp_path / ".hidden" / "e.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"no")
        (tmp_path / "f.pth").write_bytes(b"no")
        found = Listing(tmp_path)
        families = {name: entry.family for name, entry in found.entries.items()}
        assert families == {"a": "sdxl", "b, c:d": "sd1", "deep/a": "sd2", "broken": None}
        assert found.meant("alias") is found.entries["deep/a"]
        assert found.meant("nobody") is None
        assert found.files((".pth",)) == [tmp_path / "f.pth"]

    def test_files_of_one_name_are_all_listed(self, tmp_path: Path) -> None:
        places = ["a.pt", "a.safetensors", "a.ckpt.pt", "deep/a.ckpt", "deep/a.safetensors", "deep/deeper/a.pt"]
        for place in places:
            lora(tmp_path / place)
        found = {name: entry.path.relative_to(tmp_path).as_posix() for name, entry in Listing(tmp_path).entries.items()}
        assert found == {
            "a": "a.safetensors", "a.ckpt": "a.ckpt.pt", "a.pt": "a.pt",
            "deep/a": "deep/a.safetensors", "deep/a.ckpt": "deep/a.ckpt", "deep/deeper/a": "deep/deeper/a.pt",
        }  # fmt: skip

    def test_a_replaced_file_is_read_again(self, tmp_path: Path) -> None:
        path = lora(tmp_path / "a.safetensors", ss_v2="True")
        found = Listing(tmp_path)
        lora(path, ss_base_model_version="sd_v1")
        os.utime(path, ns=(1, 1))
        found.refresh()
        assert found.entries["a"].family == "sd1"
        path.unlink()
        found.refresh()
        assert found.entries == {}

    def test_notes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        assert listing.notes(path) == {}
        path.with_suffix(".json").write_text(json.dumps({"activation text": "abc"}))
        assert listing.notes(path) == {"activation text": "abc"}
        path.with_suffix(".json").write_text("[1]")
        assert listing.notes(path) == {}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What looks like a checkpoint, without LoRAs near it."""
    path = tmp_path / "models" / "model.safetensors"
    path.parent.mkdir()
    save_file({"model.diffusion_model.out.2.weight": torch.zeros(1)}, path)
    return path


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal."""
    assert main(["ui", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_refused_before_anything_is_loaded(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--checkpoint", str(model)]
    assert "required: --checkpoint" in said(capsys)
    assert "does not exist" in said(capsys, "--checkpoint", "nowhere.safetensors")
    assert "There is no folder Lora or loras" in said(capsys, *given)
    assert "The folder nowhere does not exist" in said(capsys, *given, "--lora-dir", "nowhere")
    assert "port from 1 to 65535" in said(capsys, *given, "--port", "0")
    assert "invalid USER:PASS value" in said(capsys, *given, "--api-auth", "someone")
    assert "The device nowhere cannot be used" in said(capsys, *given, "--device", "nowhere")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"Port {port} cannot be used" in said(
            capsys, *given, "--lora-dir", str(model.parent), "--port", str(port)
        )


def test_the_usual_folders(model: Path) -> None:
    """A webui's, else the one beside the checkpoint."""
    args = Namespace(lora_dir=None, checkpoint=model)
    (model.parent / "loras").mkdir()
    assert ui.lora_folder(args) == model.parent / "loras"
    (model.parent.parent / "Lora").mkdir()
    assert ui.lora_folder(args) == model.parent.parent / "Lora"


def test_without_gradio(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence says what to install, status 1."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "loraclr.webui.alone.program", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert main(["ui", "--checkpoint", str(model), "--lora-dir", str(model.parent), "--port", port]) == 1
    assert "pip install 'sd-webui-loraclr[standalone,ui]'" in capsys.readouterr().err
