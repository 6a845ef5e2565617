"""The tab alone, on the miniature, by both versions of gradio that webuis have: `make test-ui` sets them up.

Each version lies in a folder that comes before the packages of the environment that runs the tests, so that torch is
there once: .venv/gradio-3.41 and .venv/gradio-4.40, or in GRADIO_FOLDERS. What needs no browser is asked over HTTP.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alone_driver import REPOSITORY, Alone, Page

FOLDERS = Path(os.environ.get("GRADIO_FOLDERS", REPOSITORY / ".venv"))
VERSIONS = ("3.41", "4.40")


@pytest.fixture(scope="session", params=VERSIONS, ids=lambda version: f"gradio{version}")
def gradio(request: pytest.FixtureRequest) -> Path:
    """The folder of each version of gradio."""
    folder = FOLDERS / f"gradio-{request.param}"
    if not (folder / "gradio").is_dir():
        pytest.skip(f"gradio {request.param} is not in {folder}: make test-ui sets it up")
    return folder


@pytest.fixture(scope="session")
def alone(gradio: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """The page by each version of gradio."""
    running = Alone(gradio, tmp_path_factory.mktemp(gradio.name))
    try:
        yield running
        assert running.stop() == 0, running.tail()
        assert "Traceback" not in running.tail()
    finally:
        running.stop()


@pytest.fixture
def tab(alone: Alone, chromium: Any) -> Iterator[Page]:
    """It in a fresh page."""
    opened = Page(alone, chromium)
    yield opened
    opened.browser.close()
    assert not opened.errors
    assert not opened.console
