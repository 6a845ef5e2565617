"""The API: /loraclr/v1/, the same merges as the tab's, in the same queue. There if the webui runs with --api."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from secrets import compare_digest
from typing import Any

import torch
from fastapi import Body, Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from loraclr.hosts import Cancelled
from loraclr.methods import METHODS
from loraclr.webui import card, job, library, orders
from loraclr.webui.job import Done, Order
from loraclr.webui.language import english
from loraclr.webui.surroundings import here

_REMEMBERED = 64  # jobs


@dataclass
class Job:
    """A merge that was asked for. Many are remembered, so that it holds none of a merge's tensors and pictures.

    Attributes:
        state: queued, running, done, failed or cancelled.
        outcome: what else its status says once it has ended.
    """

    task: str
    state: str = "queued"
    outcome: dict[str, Any] = field(default_factory=dict)


_jobs: dict[str, Job] = {}


def add_routes(app: FastAPI) -> None:
    """Add the routes, behind the same user names and passwords as the webui's own (--api-auth)."""
    if not here().api:
        return
    guard = [Depends(_authorised)] if here().api_auth else []
    for method, path, endpoint in (
        ("GET", "loras", loras),
        ("GET", "loras/{name:path}", lora),
        ("POST", "merge", merge),
        ("GET", "jobs/{task}", status),
        ("POST", "jobs/{task}/cancel", cancel),
        ("GET", "methods", methods),
        ("GET", "schema", orders.schema),
    ):
        app.add_api_route(f"/loraclr/v1/{path}", endpoint, methods=[method], dependencies=guard)


def _authorised(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 (how fastapi is told)
    """Refuse whoever is not named by --api-auth, which lists user:password, separated by commas."""
    for entry in here().api_auth.split(","):
        user, _, password = entry.partition(":")
        right = [
            compare_digest(a.encode(), b.encode()) for a, b in ((given.username, user), (given.password, password))
        ]
        if all(right):
            return
    raise HTTPException(401, "Incorrect user name or password.", {"WWW-Authenticate": "Basic"})


def loras() -> list[dict[str, Any]]:
    """Every LoRA, and the family that the webui takes it to be of."""
    return [
        {"name": name, "path": str(library.path_of(name)), "family": library.believed(name)} for name in library.names()
    ]


def lora(name: str) -> dict[str, Any]:
    """What one LoRA is, and what is wrong with it."""
    with english():
        try:
            found = card.of(library.path_of(name))
        except ValueError as error:
            raise HTTPException(404, str(error)) from error
        return {
            "name": name,
            "family": None if found.lora is None else found.lora.family,
            "facts": found.facts,
            "trigger": found.trigger,
            "problem": found.wrong(library.loaded_family()),
            "unused": [] if found.lora is None else list(found.lora.unused),
        }


def _checked(order: dict) -> Order:
    """The order that a JSON object asks for. Raises ValueError, one sentence."""
    asked = orders.parse(order)
    job.check(asked)
    return asked


def merge(order: dict = Body(...)) -> dict[str, str]:  # noqa: B008 (how fastapi is told)
    """Put a merge into the webui's queue; what is wrong with it is said at once."""
    try:
        with english():
            try:
                asked = _checked(order)
            except library.Gone:  # it may be newer than the list of them
                library.refresh()
                asked = _checked(order)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    wanted = Job(f"task(loraclr-{secrets.token_hex(6)})")
    for old in [task for task, other in _jobs.items() if other.state not in ("queued", "running")][:-_REMEMBERED]:
        del _jobs[old]
    _jobs[wanted.task] = wanted
    here().enqueue(wanted.task)
    threading.Thread(target=_work, args=[wanted, asked], daemon=True).start()
    return {"job": wanted.task}


def status(task: str) -> dict[str, Any]:
    """How far a job is, and what came of it."""
    found = _found(task)
    answer: dict[str, Any] = {"job": task, "state": found.state}
    if found.state == "running":
        stage, share = here().progress()
        answer |= {"stage": stage, "progress": share}
    return answer | found.outcome


def cancel(task: str) -> dict[str, Any]:
    """Stop a job that runs or waits; its state says "cancelled" soon after."""
    _found(task)
    job.interrupt(task)
    return status(task)


def methods() -> dict[str, str]:
    """The ways of merging, a sentence on each."""
    return {name: method.text for name, method in METHODS.items() if method.offered}


def _found(task: str) -> Job:
    if task not in _jobs:
        raise HTTPException(404, f"There is no job {task}.")
    return _jobs[task]


def _outcome(done: Done) -> dict[str, Any]:
    """What is told of a finished merge."""
    made, name = done.merge, done.path.stem
    return {
        "name": name,
        "path": str(done.path),
        "prompt": made.prompt(name),
        "kept": {lora: max(0.0, 1 - after) for lora, (_, after) in made.missed.items()},
        "bled": job.bled(done),
        "seconds": made.seconds,
        "figures": made.figures(),
        "notes": made.notes,
    }


def _work(wanted: Job, order: Order) -> None:
    """Wait for the queue, then merge, as the tab's button does."""
    with here().job(wanted.task), english():
        wanted.state = "running"
        try:
            wanted.outcome = _outcome(job.run(wanted.task, order))
            wanted.state = "done"
        except Cancelled:
            wanted.state = "cancelled"
        except (ValueError, OSError, torch.cuda.OutOfMemoryError) as error:
            wanted.outcome, wanted.state = {"error": job.reason(error)}, "failed"
        except Exception:  # noqa: BLE001 (the thread's end; the log has the rest)
            here().log("LoRACLR Merge failed")
            wanted.outcome, wanted.state = {"error": "The merge failed; the log says where."}, "failed"
