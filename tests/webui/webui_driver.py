"""Drives a webui: its process and API, and what a user does in the LoRACLR Merge tab."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

FLAGS = [
    *["--use-cpu", "all", "--no-half", "--precision", "full", "--skip-torch-cuda-test", "--skip-version-check"],
    *["--skip-python-version-check", "--skip-install", "--skip-prepare-environment", "--no-download-sd-model"],
    *["--do-not-download-clip", "--api"],
]


class Webui:
    """A running webui.

    Attributes:
        data: its data folder.
        address: where it listens.
        api_auth: "user:password" to ask with.
    """

    api_auth: str | None = None

    def __init__(self, checkout: Path, python: str, data: Path, more: Sequence[str] = ()) -> None:
        self.data = data
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ,
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # the webui reads its own files with a plain torch.load
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        environment.pop("COMMANDLINE_ARGS", None)
        environment.pop("PYTHONPATH", None)
        command = [python, "launch.py", *FLAGS, "--port", str(port), "--data-dir", str(data), *more]
        self.log = data / "webui.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=checkout, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def loras(self) -> Path:
        """Its LoRA folder."""
        return self.data / "models" / "Lora"

    def wait(self, seconds: float = 600, starts: int = 1) -> None:
        """Until it answers, after having started this often."""
        deadline = time.monotonic() + seconds
        while self.starts() < starts or not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the webui did not start:\n{self.tail()}")
            time.sleep(1)
        if "Error loading script: loraclr_merge.py" in self.log.read_text(errors="replace"):
            raise RuntimeError(f"the webui could not load the extension:\n{self.tail()}")

    def starts(self) -> int:
        """How often its page was built: once, and again with every "Reload UI"."""
        return self.log.read_text(errors="replace").count("Startup time:")

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-4000:]

    def _answers(self) -> bool:
        try:
            self.ask("/sdapi/v1/loras")
        except OSError:
            return False
        return True

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST with a body; the decoded answer."""
        headers = {"Content-Type": "application/json"}
        if self.api_auth:
            headers["Authorization"] = "Basic " + base64.b64encode(self.api_auth.encode()).decode()
        request = urllib.request.Request(
            self.address + path, None if body is None else json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def draw(self, prompt: str, seed: int = 1, size: tuple[int, int] = (128, 128), steps: int = 12) -> Image.Image:
        """A txt2img picture, through the API."""
        body = {
            "prompt": prompt, "seed": seed, "width": size[0], "height": size[1], "steps": steps, "cfg_scale": 4,
            "sampler_name": "Euler", "save_images": False,
        }  # fmt: skip
        answer = self.ask("/sdapi/v1/txt2img", body)
        return Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB")

    def files(self) -> set[str]:
        """All files in the LoRA folder, hidden and temporary ones too."""
        return {path.name for path in self.loras.rglob("*")}

    def stop(self) -> None:
        """End the process and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class Tab:
    """What a user does in the tab.

    Attributes:
        browser: with cookies and storage of its own, as another person's would have.
        page: the page of it that is looked at.
        errors: exceptions of the pages' scripts so far.
        console: errors in the console and where they are from, but for names on the net, which the browser here cannot
            reach.
    """

    def __init__(self, webui: Webui, chromium: Any, theme: str = "light", width: int = 1280, height: int = 900) -> None:
        self.address = f"{webui.address}/?__theme={theme}"
        self.errors: list[str] = []
        self.console: list[str] = []
        self.browser = chromium.new_context(viewport={"width": width, "height": height})
        self.browser.set_default_timeout(120_000)  # a busy machine is slow, not broken
        self.page = self.another()

    def another(self) -> Any:
        """A further page of the same browser, with the tab open; the driver goes on with it."""
        self.page = self.browser.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.goto(self.address)
        self.open()
        return self.page

    def _note(self, message: Any) -> None:
        if message.type == "error" and "ERR_NAME_NOT_RESOLVED" not in message.text:
            self.console.append(f"{message.text} ({message.location['url']})")

    def open(self) -> None:
        """Click the tab."""
        button = self.page.locator("#tabs > .tab-nav > button", has_text="LoRACLR Merge")
        button.wait_for()
        # The webui's scripts are ready when its options are there.
        self.page.wait_for_function("() => typeof opts !== 'undefined' && Object.keys(opts).length > 0")
        button.click()
        self.page.locator("#loraclr_buttons").wait_for()

    def choose(self, *names: str) -> None:
        """Search for LoRAs by name and choose them."""
        for name in names:
            field = self.page.locator("#loraclr_loras input")
            field.click()
            field.fill(name)
            self.listed(name).click()
            self.page.locator(f'.loraclr-concept:visible [data-name="{name}"]').wait_for()
        self.page.keyboard.press("Escape")

    def listed(self, name: str) -> Any:
        """A LoRA in the open list, whatever folder and trigger words stand behind its name."""
        option = "#loraclr_loras ul.options li"
        return self.page.locator(f'{option}[aria-label="{name}"], {option}[aria-label^="{name}\u2003"]')

    def trigger(self, number: int) -> Any:
        """The field of a row's trigger words."""
        return self.page.locator(f"#loraclr_trigger_{number} input")

    def name(self, name: str, replace: bool = False) -> None:
        """Fill in the result's name."""
        self.page.locator("#loraclr_name input").fill(name)
        self.page.locator("#loraclr_replace input").set_checked(replace)

    def hurry(self, closed: bool = True, method: str = "") -> None:
        """Settings for a merge of seconds, where its quality does not matter; in closed form only, or all stages.

        method: another one than loraclr, where the test is not about that.
        """
        if method:
            self.page.locator("#loraclr_method input").click()
            self.page.locator(f'#loraclr_method ul.options li[aria-label="{method}"]').click()
        self.page.locator("#loraclr_unchanged > .label-wrap").click()
        self.page.locator("#loraclr_neutral_prompts textarea").fill("a cat\na house")
        self.page.locator("#loraclr_unchanged > .label-wrap").click()
        self.page.locator("#loraclr_advanced > .label-wrap").click()
        self.page.locator("#loraclr_closed input").set_checked(closed)
        for setting, value in (("steps", "2"), ("size", "64")):
            number = self.page.locator(f"#loraclr_{setting} input[type=number]")
            number.fill(value)
            number.press("Tab")

    def start(self) -> None:
        """Press Merge."""
        self.page.locator("#loraclr_merge").click()
        self.page.locator("#loraclr_buttons.running").wait_for()

    def finish(self, seconds: float = 900) -> str:
        """Wait for the end; what the result says."""
        self.page.locator("#loraclr_buttons:not(.running)").wait_for(timeout=1000 * seconds)
        self.said("result").locator(":is(.loraclr-note, .loraclr-error):visible").wait_for()
        # gradio greys what is about to change.
        self.page.wait_for_function("() => !document.querySelector('#loraclr_results .pending')")
        self.page.wait_for_timeout(500)
        return self.said("result").inner_text()

    def merge(self, seconds: float = 900) -> str:
        """Press Merge and wait; what the result says."""
        self.start()
        return self.finish(seconds)

    def said(self, part: str) -> Any:
        """A text of the tab; gradio 3 gives the part's id to the text itself, gradio 4 to what is around it."""
        return self.page.locator(f":is(#loraclr_{part}.prose, #loraclr_{part} .prose)")

    def facts(self, number: int) -> str:
        """What a row says about its LoRA."""
        return self.said(f"facts_{number}").inner_text()

    def names(self) -> list[str]:
        """The LoRAs of the rows, in order."""
        return self.page.locator(".loraclr-concept:visible .loraclr-name span").all_inner_texts()

    def settle(self) -> None:
        """Wait until the page has heard back from the server."""
        self.page.wait_for_timeout(1000)
        self.page.wait_for_function("() => !document.querySelector('#tab_loraclr .pending')")

    @property
    def prompt(self) -> str:
        """The prompt that uses the result."""
        return self.page.locator("#loraclr_prompt textarea").input_value()
