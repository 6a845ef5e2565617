"""What the tab needs, without a webui: a loaded checkpoint, a folder of LoRAs, and a queue of jobs."""

from __future__ import annotations

import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from loraclr.hosts.standalone import Standalone
from loraclr.keys import Family
from loraclr.webui.alone import listing
from loraclr.webui.alone.jobs import Jobs
from loraclr.webui.alone.listing import Listing
from loraclr.webui.surroundings import Listed


class Host(Standalone):
    """The checkpoint; it can be interrupted between two blocks of its UNet, and shows what it draws."""

    def __init__(self, loaded: Standalone, jobs: Jobs, loras: Listing) -> None:
        super().__init__(loaded.pipeline, loaded.path)
        self._jobs, self._loras = jobs, loras
        unet = self.pipeline.unet
        for part in (unet, *unet.down_blocks, unet.mid_block, *unet.up_blocks):
            part.register_forward_pre_hook(lambda *_: jobs.check())

    def sample(self, *args: Any, **kwargs: Any) -> list[Image.Image]:
        drawn = super().sample(*args, **kwargs)
        if drawn:
            self._jobs.show(drawn[0])
        return drawn

    def publish(self, path: Path) -> None:
        """List the new file; nothing of an older one is kept in memory."""
        self._loras.refresh()


class Alone:
    """Our own program as `loraclr.webui.surroundings.Surroundings`.

    Attributes:
        name: of the checkpoint.
        options: the settings that differ from the usual ones.
    """

    txt2img = False
    api = True

    def __init__(
        self, loaded: Standalone, name: str, folder: Path, options: Mapping[str, Any] | None = None, api_auth: str = ""
    ) -> None:
        self.name, self.options, self.api_auth = name, options or {}, api_auth
        self.jobs, self.loras = Jobs(), Listing(folder)
        self._host = Host(loaded, self.jobs, self.loras)

    def folder(self) -> Path:
        return self.loras.folder

    def files(self, suffixes: tuple[str, ...]) -> list[Path]:
        return self.loras.files(suffixes)

    def listed(self) -> list[Listed]:
        return list(self.loras.entries.values())

    def found(self, name: str) -> Listed | None:
        return self.loras.entries.get(name)

    def meant(self, word: str) -> Listed | None:
        return self.loras.meant(word)

    def refresh(self) -> None:
        self.loras.refresh()

    def notes(self, path: Path) -> Mapping[str, Any]:
        return listing.notes(path)

    def checkpoint(self) -> str:
        return self.name

    def family(self) -> Family | None:
        return self._host.family

    def missing_checkpoint(self) -> str:
        return ""  # it was named when the program was started

    def host(self) -> Host:
        return self._host

    def option(self, name: str, usual: Any) -> Any:
        return self.options.get(name, usual)

    def queued(self, work: Callable[..., list[Any]], otherwise: list[Any]) -> Callable[..., Any]:
        def run(task: str, *values: Any) -> list[Any]:
            task = task or f"task({secrets.token_hex(6)})"  # from a page without scripts
            with self.jobs.turn(task):
                try:
                    outputs = work(task, *values)
                except Exception as error:  # noqa: BLE001 (the page's side of the program; the log has the rest)
                    self.log("The job failed")
                    sentence = escape(f"{type(error).__name__}: {error}")
                    outputs = [*otherwise, f"<div class='loraclr-error'>{sentence}</div>"]
                self.jobs.record(task, outputs)
            return outputs

        return run

    @contextmanager
    def job(self, task: str) -> Iterator[None]:
        with self.jobs.turn(task):
            yield

    def enqueue(self, task: str) -> None:
        self.jobs.enqueue(task)

    def runs(self, task: str) -> bool:
        return self.jobs.runs(task)

    def waits(self, task: str) -> bool:
        return task in self.jobs.waiting

    def outcome(self, task: str) -> list[Any] | None:
        return self.jobs.outcome(task)

    def report(self, stage: str, share: float, left: float | None = None) -> None:
        self.jobs.report(stage, share)  # the page's estimate counts the drawing too

    def progress(self) -> tuple[str, float]:
        running = self.jobs.running
        return ("", 0.0) if running is None else (running.stage, running.share)

    def interrupt(self) -> None:
        self.jobs.interrupt()

    def log(self, what: str) -> None:
        sys.stderr.write(f"{what}:\n{traceback.format_exc()}")

    def row(self, **look: Any) -> gr.Row:
        return gr.Row(**look)

    def tool(self, sign: str, **look: Any) -> gr.Button:
        classes = [*look.pop("elem_classes", []), "loraclr-tool"]
        return gr.Button(sign, size="sm", min_width=20, scale=0, elem_classes=classes, **look)
