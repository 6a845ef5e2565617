"""`merge --server` against a server that answers as the API does: what it asks, what it says, and how it is stopped."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loraclr.__main__ import main
from loraclr.cli import remote

JOB = "task(loraclr-1)"
PAIR = ["--lora", "tiger", "--trigger", "sks tiger", "--weight", "0.8", "--lora", "folder/ink, 2", "--kind", "style"]
DONE = {
    "state": "done", "path": "/loras/both.safetensors", "prompt": "<lora:both:1> sks tiger, ink",
    "kept": {"tiger": 0.912}, "seconds": {"capture": 60.0, "polish": 5.0},
    "figures": {"objective": {}, "peak_bytes": {"graphics card": 3 * 2**29, "process": 2**30}},
    "notes": ["The word x of ink is called x_2 in the merged file."],
}  # fmt: skip


class Api(ThreadingHTTPServer):
    """Answers POST merge with a job, and GET of the job with the next of `statuses`, the last one for ever.

    Attributes:
        asked: method, path, body and Authorization of every request.
        answers: path → (status, body) in place of the usual one.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.statuses: list[dict[str, Any]] = [DONE]
        self.answers: dict[str, tuple[int, str]] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        path = self.path.removeprefix("/loraclr/v1/")
        self.server.asked.append((self.command, path, body, self.headers["Authorization"]))
        status, content = self.server.answers.get(path, (200, ""))
        if not content and path == "merge":
            content = json.dumps({"job": JOB})
        elif not content and path.endswith("/cancel"):
            self.server.statuses = [{"state": "cancelled"}]
            content = json.dumps({"state": "running"})
        elif not content:
            statuses = self.server.statuses
            content = json.dumps(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A server in this process; looks at a job follow each other at once."""
    monkeypatch.setattr(remote, "EVERY", 0.001)
    server = Api()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_order_and_the_end(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    """What was said goes to the server, nothing else; progress on stderr, the result on stdout."""
    api.statuses = [{"state": "queued"}, {"state": "running", "stage": "Looking at tiger", "progress": 0.25}, DONE]
    assert main(["merge", "--server", f"{api.address}/", *PAIR, "--name", "both", "--rank", "8", "--overwrite"]) == 0
    assert api.asked[0][:3] == ("POST", "merge", {
        "loras": [
            {"name": "tiger", "trigger": "sks tiger", "weight": 0.8}, {"name": "folder/ink, 2", "kind": "style"},
        ],
        "settings": {"rank": 8, "seed": 0}, "draw": False, "name": "both", "replace": True, "method": "loraclr",
    })  # fmt: skip
    assert api.asked[1][1] == "jobs/task%28loraclr-1%29"
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Wrote /loras/both.safetensors on the server: 2 LoRAs, in 1:05.",
        "  tiger: 91 % of its effect kept",
        "  Most memory in use: graphics card 1.5 GB, process 1.0 GB.",
        "The word x of ink is called x_2 in the merged file.",
        "Prompt: <lora:both:1> sks tiger, ink",
    ]
    assert err.splitlines()[0] == "Waiting in the server's queue: 0 %"
    assert err.splitlines()[1].startswith("Looking at tiger: 25 %")


def test_the_password_goes_to_every_request(api: Api) -> None:
    """As the webui's --api-auth wants it."""
    assert main(["merge", "--server", api.address, *PAIR, "--api-auth", "me:pass:word"]) == 0
    assert {asked[3] for asked in api.asked} == {"Basic " + base64.b64encode(b"me:pass:word").decode()}


@pytest.mark.parametrize(
    ("answer", "more", "words"),
    [
        ((401, '{"detail": "Not authenticated"}'), [], "asks for a user name and a password: give --api-auth"),
        ((401, '{"detail": "Incorrect"}'), ["--api-auth", "a:b"], "does not know this user name and password"),
        ((404, '{"detail": "Not Found"}'), [], "start the webui with --api"),
        ((422, '{"detail": "tiger is no longer there."}'), [], "loraclr: tiger is no longer there."),
        ((500, "oops"), [], "answers with status 500."),
        ((200, "<html>"), [], "its answer is not JSON"),
    ],
)
def test_refusals(
    api: Api, capsys: pytest.CaptureFixture[str], answer: tuple[int, str], more: list[str], words: str
) -> None:
    """One sentence, status 2."""
    api.answers["merge"] = answer
    assert main(["merge", "--server", api.address, *PAIR, *more]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_merge_that_fails(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    """The server's sentence, status 2."""
    api.statuses = [{"state": "failed", "error": "tiger.safetensors is cut off."}]
    assert main(["merge", "--server", api.address, *PAIR]) == 2
    assert capsys.readouterr().err == "loraclr: tiger.safetensors is cut off.\n"


def test_ctrl_c_cancels_the_job(api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and waits for the server's word."""
    api.statuses = [{"state": "running", "stage": "Polishing", "progress": 0.5}]
    pressed = []

    def sleep(_: float) -> None:
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(remote.time, "sleep", sleep)
    assert main(["merge", "--server", api.address, *PAIR]) == 130
    cancelled = [path for method, path, *_ in api.asked if method == "POST" and path != "merge"]
    assert cancelled == ["jobs/task%28loraclr-1%29/cancel"]
    assert capsys.readouterr().err.endswith("Cancelled; nothing was written.\n")


def test_a_server_that_is_busy_for_a_moment_is_asked_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that gets no answer does not end the merge; many in a row do."""
    real, failures = remote.Server.ask, [remote.Unreachable("no answer")] * 3

    def ask(server: remote.Server, path: str, body: dict[str, Any] | None = None) -> Any:
        if path.startswith("jobs") and failures:
            raise failures.pop()
        return real(server, path, body)

    monkeypatch.setattr(remote.Server, "ask", ask)
    assert main(["merge", "--server", api.address, *PAIR]) == 0
    failures += [remote.Unreachable("no answer")] * 4
    assert main(["merge", "--server", api.address, *PAIR]) == 2


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens on a port that was just given back."""
    server = Api()
    server.server_close()
    assert main(["merge", "--server", server.address, *PAIR]) == 2
    assert "No server answers at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--server", "127.0.0.1:7860", *PAIR], "is no server's address"),
        (["--server", "http://x", *PAIR, "--checkpoint", "m.safetensors"], "leave --checkpoint out"),
        (["--server", "http://x", *PAIR, "--output", "m.safetensors"], "name the result by --name"),
        (["--server", "http://x", *PAIR, "--dtype", "fp32"], "leave --dtype out"),
        (["--server", "http://x"], "give at least two --lora"),
        (["--server", "http://x", *PAIR, "--method", "ties", "--speed", "best"], "means nothing to --method ties"),
        ([*PAIR, "--output", "m.safetensors", "--name", "x"], "--name means nothing without --server"),
        ([*PAIR, "--output", "m.safetensors", "--api-auth", "a:b"], "--api-auth means nothing without --server"),
    ],
)
def test_options_that_do_not_fit(capsys: pytest.CaptureFixture[str], more: list[str], words: str) -> None:
    """Told before anything is asked."""
    assert main(["merge", *more]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
