"""What the tab needs of the program around it: the webui (`inside`), or a page of our own (`alone.program`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loraclr.hosts import Host
from loraclr.keys import Family

#: Of so many jobs, the last ones, `Surroundings.outcome` has the outputs, with all their pictures; as the webui does.
OUTCOMES = 2


@dataclass(frozen=True)
class Listed:
    """A LoRA of the user's, as it is listed.

    Attributes:
        name: what `<lora:NAME:1>` takes.
        family: what its metadata says it is for; None if that is not known.
    """

    name: str
    path: Path
    metadata: Mapping[str, Any]
    family: Family | None


class MergeHost(Host, Protocol):
    """A host that also makes a newly written LoRA known, and shows every finished picture while a merge runs."""

    def publish(self, path: Path) -> None:
        """List the file, also if it replaced one that was in use."""


class Surroundings(Protocol):
    """One interface, two programs. Everything of the webui's that the tab uses goes through it."""

    txt2img: bool
    """Whether there is a txt2img tab, to take LoRAs from and to send a prompt to."""

    api: bool
    """Whether the API is wanted."""

    api_auth: str
    """The API's "user:password,…"; "" for none."""

    # The user's LoRAs, and the loaded checkpoint.

    def folder(self) -> Path:
        """Where they are."""

    def files(self, suffixes: tuple[str, ...]) -> list[Path]:
        """The folder's files with these endings, those in sub-folders too."""

    def listed(self) -> list[Listed]:
        """All of them; no file is opened for that."""

    def found(self, name: str) -> Listed | None:
        """The one of this name."""

    def meant(self, word: str) -> Listed | None:
        """The one that a prompt's tag means: of this name or alias."""

    def refresh(self) -> None:
        """Look into the folder again."""

    def notes(self, path: Path) -> Mapping[str, Any]:
        """What the user has noted of one, beside it."""

    def checkpoint(self) -> str:
        """The name of the loaded checkpoint, "" if none is."""

    def family(self) -> Family | None:
        """Its family; None if none is loaded, or one of another kind."""

    def missing_checkpoint(self) -> str:
        """The folder where one belongs, if there is none to be loaded; "" if there is."""

    def host(self) -> MergeHost:
        """It, to merge for. Raises ValueError, one sentence for the user, if that cannot be."""

    def option(self, name: str, usual: Any) -> Any:
        """What the user has set a setting of ours to."""

    # Jobs: one at a time, in the order in which they were asked for.

    def queued(self, work: Callable[..., list[Any]], otherwise: list[Any]) -> Callable[..., Any]:
        """A button's function as a job; its first argument is the job's id, its last output a text.

        If it raises, `otherwise` and what went wrong are the outputs.
        """

    def job(self, task: str) -> AbstractContextManager[None]:
        """Wait for one's turn, then run what is inside as the job of this id."""

    def enqueue(self, task: str) -> None:
        """Put a job in the queue that `job` will run."""

    def runs(self, task: str) -> bool:
        """Whether this job is the running one."""

    def waits(self, task: str) -> bool:
        """Whether this job is in the queue."""

    def outcome(self, task: str) -> list[Any] | None:
        """The outputs of a job of `queued` that has ended lately."""

    def report(self, stage: str, share: float, left: float | None = None) -> None:
        """Tell how far the running job is. Raises Cancelled if it was interrupted."""

    def progress(self) -> tuple[str, float]:
        """The stage of the running job and the share of it that is done."""

    def interrupt(self) -> None:
        """Make the running job end soon."""

    def log(self, what: str) -> None:
        """Write the exception that is being handled to the log."""

    # Components that the page has in a form of its own.

    def row(self, **look: Any) -> Any:
        """A row of fields, as a context."""

    def tool(self, sign: str, **look: Any) -> Any:
        """A small button that shows a sign."""


_around: list[Surroundings] = []


def settle(program: Surroundings) -> None:
    """Say which program is around the tab; before anything else of the tab is used."""
    _around[:] = [program]


def here() -> Surroundings:
    """The program around the tab."""
    return _around[0]
