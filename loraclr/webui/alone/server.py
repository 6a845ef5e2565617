"""The page of the tab alone, and the server that gives it out with the API."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from loraclr.webui import api, beside, language, tab, thumbnails
from loraclr.webui.alone.program import Alone
from loraclr.webui.components import script

_HERE = Path(__file__).parent
OWN_NAMES = ["127.0.0.1", "localhost"]


def page() -> gr.Blocks:
    """The tab as a page: with its scripts, and what of the webui's these use."""
    words = f"loraclrTranslate({json.dumps(language.translations())});"
    scripts = "\n".join([(_HERE / "page.js").read_text("utf-8"), beside.text("javascript/loraclr_merge.js"), words])
    # A page of gradio 3 has no other place for scripts; run by the window, so that all of them find all functions.
    load = f"() => {{ (0, eval)({json.dumps(scripts)}); return []; }}"
    css = beside.text("style.css") + (_HERE / "page.css").read_text("utf-8")
    look = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # gradio's own are on the net
    with gr.Blocks(title="LoRACLR Merge", theme=look, css=css, analytics_enabled=False) as whole:
        with gr.Column(elem_id="tab_loraclr"):
            tab.build()
        whole.load(fn=None, inputs=[], outputs=[], **script(load))
    return whole


def app(program: Alone, names: list[str] | None = None) -> FastAPI:
    """Everything that the server answers.

    Args:
        names: of this machine, by which it may be asked; None: by any. A page of another site that has its name point
            here is refused by it.
    """
    whole = FastAPI(title="LoRACLR Merge", docs_url=None, redoc_url=None)
    if names is not None:
        whole.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    api.add_routes(whole)
    thumbnails.add_route(whole)

    @whole.get("/loraclr/progress")
    def progress(task: str, seen: int = 0) -> dict[str, Any]:
        return program.jobs.told(task, seen)

    blocks = page()
    # Version 3's queue asks its own server by httpx, which since 0.27 gives an answer 5 s: a longer merge's was lost.
    # Without it each event is a request of the page's own.
    if not gr.__version__.startswith("3."):
        blocks.queue(api_open=False, default_concurrency_limit=16)
    gr.mount_gradio_app(whole, blocks, path="/")
    for route in whole.routes:
        if isinstance(getattr(route, "app", None), FastAPI):  # gradio's; version 3 lets pages of any site ask it
            kept = [one for one in route.app.user_middleware if one.cls is not CORSMiddleware]
            route.app.user_middleware = kept
    return whole


class _Server(uvicorn.Server):
    """Ends the jobs first: it waits for the threads that they run in."""

    def __init__(self, config: uvicorn.Config, program: Alone) -> None:
        super().__init__(config)
        self.program = program

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.program.jobs.close()
        super().handle_exit(sig, frame)


def serve(page: FastAPI, program: Alone, taken: socket.socket) -> None:
    """Answer on this port until Ctrl-C; what runs or waits then is stopped."""
    config = uvicorn.Config(page, log_level="warning", timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):  # how it is meant to end
        _Server(config, program).run(sockets=[taken])
