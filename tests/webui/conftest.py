"""A real webui with this extension and the miniature in it, and a browser on it.

    WEBUI_DIR=/path/to/stable-diffusion-webui WEBUI_PYTHON=/path/to/its/venv/bin/python python -m pytest tests/webui

The checkout is only run: models, extension, settings and outputs are in a temporary data folder. It runs on the CPU, so
that pixels are reproducible. The pictures that the tests look at are kept in WEBUI_SHOTS, if that is set.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from webui_driver import Tab, Webui

REPOSITORY = Path(__file__).parents[2]
# Debian's Chromium would look for updates and accounts.
CHROMIUM = [
    *["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"],
    *["--disable-component-update", "--disable-sync"],
    # A page of the webui asks for fonts and scripts on the net; waiting for names that do not resolve takes long.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def checkout() -> Path:
    """The webui to run; skips the test if there is none."""
    if not os.environ.get("WEBUI_DIR"):
        pytest.skip("set WEBUI_DIR to a stable-diffusion-webui checkout (and WEBUI_PYTHON to its python) to run these")
    return Path(os.environ["WEBUI_DIR"]).resolve()


@contextmanager
def running(data: Path, probe: bool = False, more: Sequence[str] = ()) -> Iterator[Webui]:
    """A webui with this extension on a data folder that has its models, and may have other extensions.

    With the test's own probe and flags on wish.
    """
    extensions = data / "extensions"
    extensions.mkdir(exist_ok=True)
    (extensions / "sd-webui-loraclr").symlink_to(REPOSITORY, target_is_directory=True)
    if probe:  # extensions load in the order of their names, and the probe imports the other's package
        (extensions / "zz-probe" / "scripts").mkdir(parents=True)
        shutil.copy(Path(__file__).with_name("probe.py"), extensions / "zz-probe" / "scripts")
    started = Webui(checkout(), os.environ.get("WEBUI_PYTHON", sys.executable), data, more)
    if "--api-auth" in more:
        started.api_auth = more[more.index("--api-auth") + 1].split(",")[0]
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    """A webui with the extension, the miniature and its LoRAs."""
    with with_miniature(tmp_path_factory.mktemp("webui")) as started:
        yield started


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    """Another one, whose API and page ask for users and passwords."""
    flags = "--api-auth", "someone:secret,other:word", "--gradio-auth", "page:pass"
    with with_miniature(tmp_path_factory.mktemp("guarded"), *flags) as started:
        yield started


@contextmanager
def with_miniature(data: Path, *more: str) -> Iterator[Webui]:
    """A webui with the extension, the miniature and its LoRAs, started with more flags."""
    checkout()
    from miniature import checkpoint

    checkpoint.install(data / "models" / "Stable-diffusion")
    checkpoint.install_loras(data / "models" / "Lora")
    with running(data, more=more) as started:
        yield started


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium: CHROMIUM, Debian's, or playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright, and have a Chromium")
    path = os.environ.get("CHROMIUM") or ("/usr/bin/chromium" if Path("/usr/bin/chromium").exists() else None)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def tab(webui: Webui, chromium: Any) -> Iterator[Tab]:
    """The LoRACLR Merge tab in a fresh page."""
    opened = Tab(webui, chromium)
    yield opened
    opened.browser.close()
    assert not opened.errors
    assert not [line for line in opened.console if "loraclr" in line.lower()]


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go."""
    folder = os.environ.get("WEBUI_SHOTS")
    if not folder:
        return tmp_path_factory.mktemp("shots")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)
