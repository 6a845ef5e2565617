"""Inside the webui: its LoRA list, its loaded checkpoint, its queue, progress bar, settings and components."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import networks  # the webui's own LoRA extension
from modules import errors, extra_networks, progress, sd_models, shared
from modules.call_queue import queue_lock, wrap_gradio_gpu_call
from modules.ui_components import FormRow, ToolButton
from PIL import Image

from loraclr.hosts.a1111 import A1111, report
from loraclr.keys import Family
from loraclr.webui.relisting import whole
from loraclr.webui.surroundings import Listed

_VERSIONS: dict[str, Family] = {"SD1": "sd1", "SD2": "sd2", "SDXL": "sdxl"}


class _Shown(A1111):
    """The host, with every finished picture in the webui's live preview."""

    def sample(self, *args: Any, **kwargs: Any) -> list[Image.Image]:
        # Half-drawn pictures would be decoded beside the sampling: keep the webui from taking any to be due.
        shared.state.current_image_sampling_step = 1_000_000
        drawn = super().sample(*args, **kwargs)
        if drawn:
            shared.state.assign_current_image(drawn[0])
        return drawn


class Webui:
    """The webui as `loraclr.webui.surroundings.Surroundings`. It keeps nothing itself: "Reload UI" makes a new one."""

    txt2img = True

    @property
    def api(self) -> bool:
        return bool(shared.cmd_opts.api or shared.cmd_opts.nowebui)

    @property
    def api_auth(self) -> str:
        return shared.cmd_opts.api_auth or ""

    def folder(self) -> Path:
        return Path(shared.cmd_opts.lora_dir)

    def files(self, suffixes: tuple[str, ...]) -> list[Path]:
        return [Path(path) for path in shared.walk_files(self.folder(), allowed_extensions=suffixes)]

    def listed(self) -> list[Listed]:
        return [_listed(entry) for entry in _whole(networks.available_networks).values()]

    def found(self, name: str) -> Listed | None:
        return _entry(networks.available_networks, name)

    def meant(self, word: str) -> Listed | None:
        return _entry(networks.available_network_aliases, word)

    def refresh(self) -> None:
        networks.list_available_networks()

    def notes(self, path: Path) -> Mapping[str, Any]:
        return extra_networks.get_user_metadata(str(path))

    def checkpoint(self) -> str:
        model = sd_models.model_data.sd_model
        return "" if model is None else model.sd_checkpoint_info.name_for_extra

    def family(self) -> Family | None:
        model = sd_models.model_data.sd_model
        for family in ("sdxl", "sd2", "sd1"):
            if model is not None and getattr(model, f"is_{family}", False):
                return family
        return None

    def missing_checkpoint(self) -> str:
        return "" if sd_models.checkpoints_list else shared.cmd_opts.ckpt_dir or sd_models.model_path

    def host(self) -> A1111:
        return _Shown()

    def option(self, name: str, usual: Any) -> Any:
        return shared.opts.data.get(name, usual)

    def queued(self, work: Callable[..., list[Any]], otherwise: list[Any]) -> Callable[..., Any]:
        return wrap_gradio_gpu_call(work, extra_outputs=otherwise)

    @contextmanager
    def job(self, task: str) -> Iterator[None]:
        with queue_lock:
            shared.state.begin(job=task)
            progress.start_task(task)
            try:
                yield
            finally:
                progress.finish_task(task)
                shared.state.end()
                shared.state.skipped = shared.state.interrupted = shared.state.stopping_generation = False
                shared.state.job_count = 0

    def enqueue(self, task: str) -> None:
        progress.add_task_to_queue(task)

    def runs(self, task: str) -> bool:
        return task == progress.current_task

    def waits(self, task: str) -> bool:
        return task in progress.pending_tasks

    def outcome(self, task: str) -> list[Any] | None:
        return dict(progress.recorded_results).get(task)

    def report(self, stage: str, share: float, left: float | None = None) -> None:
        report(stage, share, left)

    def progress(self) -> tuple[str, float]:
        count = shared.state.job_count
        return shared.state.textinfo, shared.state.job_no / count if count > 0 else 0.0

    def interrupt(self) -> None:
        shared.state.interrupt()

    def log(self, what: str) -> None:
        errors.report(what, exc_info=True)

    def row(self, **look: Any) -> gr.Row:
        return FormRow(**look)

    def tool(self, sign: str, **look: Any) -> gr.Button:
        return ToolButton(sign, **look)


def _whole(entries: dict[str, Any]) -> dict[str, Any]:
    """One of the webui's lists of LoRAs; it makes them anew in many places, each Lora page's Refresh among them."""
    return whole(entries, networks.list_available_networks)


def _entry(entries: dict[str, Any], name: str) -> Listed | None:
    entry = entries.get(name) or _whole(entries).get(name)
    return None if entry is None else _listed(entry)


def _listed(entry: Any) -> Listed:
    return Listed(entry.name, Path(entry.filename), entry.metadata, _VERSIONS.get(entry.sd_version.name))
