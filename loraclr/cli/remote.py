"""`merge --server`: the merge is done by a running webui, or by our own page, through its API."""

from __future__ import annotations

import argparse
import base64
import json
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from loraclr.cli import Refused
from loraclr.cli.options import LOOP
from loraclr.cli.progress import Line, clock
from loraclr.cli.summary import measured

EVERY = 0.5  # seconds between two looks at a job
PATIENCE = 30  # seconds for an answer; the API answers at once, but a busy machine may not
RETRIES = 3  # looks in a row that may fail while a merge keeps the server busy
ENDED = ("done", "failed", "cancelled")


class Server:
    """The API of one server.

    Args:
        address: as in a browser, http://127.0.0.1:7860.
        api_auth: "user:password", None without.

    Raises:
        Refused: one sentence, by every request that fails.
    """

    def __init__(self, address: str, api_auth: str | None = None) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Refused(f"{address} is no server's address: it looks like http://127.0.0.1:7860.")
        self.address = address.rstrip("/")
        self.api_auth = api_auth
        own = parts.hostname in ("127.0.0.1", "::1", "localhost")
        self.opener = build_opener(*([ProxyHandler({})] if own else []))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to GET, or to POST with a body."""
        content = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.address}/loraclr/v1/{path}", content, {"Content-Type": "application/json"})
        if self.api_auth is not None:  # for this server only, wherever it may point to
            word = base64.b64encode(self.api_auth.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {word}")
        try:
            with self.opener.open(request, timeout=PATIENCE) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise Refused(self._refusal(error)) from error
        except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise Unreachable(f"No server answers at {self.address} ({reason}): is the webui running there?") from error
        except ValueError as error:
            raise Refused(f"What answers at {self.address} is no webui: its answer is not JSON.") from error

    def _refusal(self, error: HTTPError) -> str:
        """The sentence for a status that is not 200."""
        try:
            told = json.load(error).get("detail")
        except (ValueError, AttributeError, OSError):
            told = None
        if error.code == 401 and self.api_auth is None:
            return f"{self.address} asks for a user name and a password: give --api-auth USER:PASS."
        if error.code == 401:
            return f"{self.address} does not know this user name and password: check --api-auth."
        if error.code == 422 and isinstance(told, str):
            return told
        if error.code == 404 and (told is None or told == "Not Found"):
            return f"{self.address} has no API of LoRACLR Merge: start the webui with --api, and with this extension."
        return f"{self.address} answers with status {error.code}" + (f": {told}" if isinstance(told, str) else ".")


class Unreachable(Refused):
    """No answer; the next try may have one."""


def run(args: argparse.Namespace) -> int:
    """Order the merge, follow it, and say what the server wrote."""
    order = order_of(args)
    server = Server(args.server, args.api_auth)
    job = server.ask("merge", order)["job"]
    with Line() as line:
        ended = _finished(server, job, line)
    if ended["state"] == "cancelled":
        from loraclr.hosts import Cancelled

        raise Cancelled
    if ended["state"] == "failed":
        raise Refused(ended.get("error") or "The merge failed; the server's log says where.")
    print(summary(ended, len(order["loras"])))
    return 0


def order_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the API is asked for.

    Raises:
        Refused: an option that only a merge on this machine has.
    """
    only_here = ("checkpoint", "output", "recipe", "device", "dtype")
    for name in only_here:
        if getattr(args, name) not in (None, False):
            raise Refused(
                f"--server merges with its own checkpoint, settings and LoRA folder: leave --{name.replace('_', '-')} "
                "out, and name the result by --name."
            )
    if not args.entries:
        raise Refused("No LoRA is chosen: give at least two --lora, by their names on the server.")
    loras = []
    for entry in args.entries:
        told = {
            "trigger": entry.trigger, "weight": entry.weight, "text_weight": entry.text_weight, "kind": entry.kind,
            "blocks": entry.blocks,
        }  # fmt: skip
        loras.append({"name": entry.path.as_posix(), **_said(told)})
    settings = _said({name: getattr(args, name) for name in ("speed", "rank", "scenes", "seed", *LOOP)})
    order = {"name": args.name, "replace": args.overwrite, "method": args.method, "density": args.density}
    wished = {"plain": args.plain, "separate": args.separate_embeddings}
    order |= {name: True for name, wish in wished.items() if wish}
    return {"loras": loras, "settings": settings, "draw": False, **_said(order)}


def _said(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _finished(server: Server, job: str, line: Line) -> dict[str, Any]:
    """A job's status once it has ended; Ctrl-C cancels it, and the server has the last word on what became of it."""
    path = f"jobs/{quote(job, safe='')}"
    begun: float | None = None
    failures = 0
    while True:
        try:
            try:
                status = server.ask(path)
                failures = 0
            except Unreachable:
                failures += 1
                if failures > RETRIES:
                    raise
                status = {"state": "unknown"}
            if status["state"] in ENDED:
                return status
            if status["state"] == "queued":
                line("Waiting in the server's queue", 0.0, None)
            elif status["state"] == "running":
                begun = begun or time.monotonic()
                share = status.get("progress", 0.0)
                left = (time.monotonic() - begun) * (1 - share) / share if share > 0.01 else None
                line(status.get("stage") or "Merging", share, left)
            time.sleep(EVERY)
        except KeyboardInterrupt:
            server.ask(f"{path}/cancel", {})
            line("Cancelling", 0.0, None)


def summary(ended: dict[str, Any], loras: int) -> str:
    """What the server wrote, how well each LoRA is kept, what it says of the file, and the prompt to use."""
    lines = [f"Wrote {ended['path']} on the server: {loras} LoRAs, in {clock(sum(ended['seconds'].values()))}."]
    lines += [f"  {name}: {kept:.0%} of its effect kept".replace("%", " %") for name, kept in ended["kept"].items()]
    lines += measured(ended.get("figures", {}))
    return "\n".join([*lines, *ended.get("notes", []), f"Prompt: {ended['prompt']}"])
