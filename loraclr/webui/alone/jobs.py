"""Jobs one after the other, in the order in which they were asked for, and how far the running one is."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from loraclr.hosts import Cancelled
from loraclr.webui.surroundings import OUTCOMES

_REMEMBERED = 64  # jobs that have ended
_SHOWN = 512  # pixels on a side of the picture that is shown while a job runs


@dataclass
class Running:
    """The job whose turn it is.

    Attributes:
        pictures: how many have been shown so far.
    """

    task: str
    stage: str = ""
    share: float = 0.0
    since: float = field(default_factory=time.monotonic)
    stop: bool = False
    picture: str = ""
    pictures: int = 0

    @property
    def left(self) -> float | None:
        """Seconds until the end, should the rest be as fast as what was done; None: too early to tell."""
        return (time.monotonic() - self.since) * (1 - self.share) / self.share if self.share > 0.01 else None


class Jobs:
    """The queue."""

    def __init__(self) -> None:
        self.running: Running | None = None
        self.waiting: list[str] = []
        self._outcomes: OrderedDict[str, list[Any]] = OrderedDict()
        self._ended: deque[str] = deque(maxlen=_REMEMBERED)
        self._changed = threading.Condition()
        self._closed = False

    def enqueue(self, task: str) -> None:
        """Put a job at the end of the queue."""
        with self._changed:
            if task not in self.waiting:
                self.waiting.append(task)

    @contextmanager
    def turn(self, task: str) -> Iterator[Running]:
        """Wait until it is this job's turn; what is inside is the job."""
        self.enqueue(task)
        with self._changed:
            self._changed.wait_for(lambda: self.running is None and self.waiting[0] == task)
            self.waiting.remove(task)
            self.running = Running(task)
        try:
            yield self.running
        finally:
            with self._changed:
                self.running = None
                self._ended.append(task)
                self._changed.notify_all()

    def runs(self, task: str) -> bool:
        """Whether it is this job's turn."""
        running = self.running
        return running is not None and running.task == task

    def record(self, task: str, outputs: list[Any]) -> None:
        """Keep what a job gave, for a page that was reloaded meanwhile."""
        self._outcomes[task] = outputs
        while len(self._outcomes) > OUTCOMES:
            self._outcomes.popitem(last=False)

    def outcome(self, task: str) -> list[Any] | None:
        """What a job gave."""
        return self._outcomes.get(task)

    def report(self, stage: str, share: float) -> None:
        """The running job's progress. Raises Cancelled if it is to stop."""
        if self.running is not None:
            self.running.stage, self.running.share = stage, min(share, 1.0)
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the running job is to stop."""
        if self._closed or (self.running is not None and self.running.stop):
            raise Cancelled("The merge was interrupted.")

    def interrupt(self) -> None:
        """Stop the running job at its next look."""
        running = self.running
        if running is not None:
            running.stop = True

    def close(self) -> None:
        """Stop every job, also those that have not begun."""
        self._closed = True

    def show(self, picture: Image.Image) -> None:
        """A picture of the running job, for whoever looks on."""
        if self.running is None:
            return
        small = picture.convert("RGB")
        small.thumbnail((_SHOWN, _SHOWN))
        content = io.BytesIO()
        small.save(content, "JPEG", quality=90)
        self.running.picture = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
        self.running.pictures += 1

    def told(self, task: str, seen: int = 0) -> dict[str, Any]:
        """What a page that has seen so many of its pictures is told of a job; an unknown one may be on its way."""
        running = self.running
        if running is None or running.task != task:
            waiting = list(self.waiting)
            if task in waiting:
                return {"state": "waiting", "place": waiting.index(task) + 1, "of": len(waiting)}
            return {"state": "ended" if task in self._ended else "unknown"}
        answer = {"state": "running", "stage": running.stage, "share": running.share, "left": running.left}
        if running.pictures > seen:
            answer |= {"picture": running.picture, "seen": running.pictures}
        return answer
