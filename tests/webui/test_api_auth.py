"""--api-auth and --gradio-auth in a real webui: who may use our API, and the command line through it."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from webui_driver import Webui

REPOSITORY = Path(__file__).parents[2]
ROUTES = [
    ("loras", None), ("loras/tiger", None), ("methods", None), ("schema", None), ("jobs/x", None),
    ("merge", {}), ("jobs/x/cancel", {}),
]  # fmt: skip


def status(webui: Webui, path: str, body: Any, user: str | None) -> int:
    """What a route answers to this user."""
    kept, webui.api_auth = webui.api_auth, user
    try:
        webui.ask(f"/loraclr/v1/{path}", body)
    except urllib.error.HTTPError as error:
        return error.code
    finally:
        webui.api_auth = kept
    return 200


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_every_route_asks(guarded: Webui, path: str, body: Any) -> None:
    """401 without a password, with a wrong one, and with the page's; both users of --api-auth get in."""
    for user in (None, "someone:word", "nobody:secret", "page:pass"):
        assert status(guarded, path, body, user) == 401
    usual = 404 if "x" in path.split("/") else 422 if path == "merge" else 200
    for user in ("someone:secret", "other:word"):
        assert status(guarded, path, body, user) == usual


def test_the_command_line(guarded: Webui) -> None:
    """Merges with a password, and says what is missing without."""
    line = [
        *[sys.executable, "-m", "loraclr", "merge", "--server", guarded.address, "--lora", "tiger", "--lora", "panda"],
        *["--method", "sum", "--name", "by command"],
    ]
    how = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": 600, "check": False}
    without = subprocess.run(line, **how)
    assert (without.returncode, without.stderr.count("\n")) == (2, 1)
    assert "give --api-auth USER:PASS" in without.stderr
    wrong = subprocess.run([*line, "--api-auth", "someone:word"], **how)
    assert "does not know this user name and password" in wrong.stderr
    done = subprocess.run([*line, "--api-auth", "other:word"], **how)
    assert done.returncode == 0, done.stderr
    assert "Prompt: <lora:by command:1> sks, zyk" in done.stdout
    assert (guarded.loras / "by command.safetensors").exists()
