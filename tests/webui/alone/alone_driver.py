"""Drives the tab alone: its process, its API, and what a user does in its page."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from webui_driver import Tab

REPOSITORY = Path(__file__).parents[3]
USER = "someone:secret"


def environment_of(gradio: Path) -> dict[str, str]:
    """Variables of a process that finds this version of gradio, and the package."""
    path = os.pathsep.join([str(gradio), str(REPOSITORY)])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Alone:
    """A running `python -m loraclr ui`, with what `Tab` and the tests need of it.

    Attributes:
        loras: its LoRA folder.
        address: where it listens.
        started: how many seconds its start took.
    """

    def __init__(self, gradio: Path, data: Path, more: Sequence[str] = ()) -> None:
        from miniature import checkpoint

        self.loras = data / "Lora"
        model = checkpoint.install(data / "Stable-diffusion")
        checkpoint.install_loras(self.loras)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "loraclr", "ui", "--checkpoint", str(model), "--port", str(self.port)]
        command += ["--api-auth", USER, "--device", "cpu", *more]
        environment = environment_of(gradio)
        self.log = data / "log"
        since = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=data, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        while "Ctrl-C ends it" not in self.tail():
            if self.process.poll() is not None or time.monotonic() - since > 600:
                self.stop()
                raise RuntimeError(f"the page did not start:\n{self.tail()}")
            time.sleep(0.2)
        self.started = time.monotonic() - since

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-4000:]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Inside, it stands still."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGCONT)

    def files(self) -> set[str]:
        """All files in the LoRA folder, hidden and temporary ones too."""
        return {path.name for path in self.loras.rglob("*")}

    def ask(self, path: str, body: Any = None, user: str | None = USER, headers: dict[str, str] | None = None) -> Any:
        """GET, or POST with a body; the decoded answer."""
        sent = {"Content-Type": "application/json", **(headers or {})}
        if user:
            sent["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        content = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.address + path, content, sent), timeout=60) as answer:
            return json.load(answer)

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class Page(Tab):
    """The tab as a page of its own."""

    def open(self) -> None:
        self.page.locator("#loraclr_buttons").wait_for()
        self.page.wait_for_function("() => typeof requestProgress == 'function'")

    def start(self) -> None:
        self.expect()
        self.page.locator("#loraclr_merge").click()

    def expect(self) -> None:
        """Remember what the result says before Merge is pressed."""
        self.before = self.said("result").evaluate("part => part.innerHTML")

    def finish(self, seconds: float = 900) -> str:
        """Wait until the result says something else; the bar may end a moment before that."""
        self.page.wait_for_function(
            "before => { const said = document.querySelector('#loraclr_result.prose, #loraclr_result .prose');"
            " return said && said.innerHTML != before; }",
            arg=self.before,
            timeout=1000 * seconds,
        )
        return super().finish(seconds)
