"""Progress on stderr: one line rewritten in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

EVERY_SECONDS = 0.1  # on a terminal
EVERY_SHARE = 0.1  # elsewhere, within a stage


class Line:
    """A `loraclr.merging.Progress` that writes stage, percent and time left.

    As a context manager it leaves the terminal's cursor on a fresh line, whatever happens inside.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.stage, self.share, self.since, self.open = "", -1.0, 0.0, False

    def __call__(self, stage: str, share: float, left: float | None) -> None:
        if self._is_news(stage, share):
            self._show(sentence(stage, share, left))
            self.stage, self.share, self.since = stage, share, time.monotonic()

    def _is_news(self, stage: str, share: float) -> bool:
        if share >= 1 > self.share:
            return True
        if self.terminal:
            return stage != self.stage or time.monotonic() - self.since >= EVERY_SECONDS
        # Behind a comma a stage may count its steps: no line for each of these.
        return stage.partition(",")[0] != self.stage.partition(",")[0] or share - self.share >= EVERY_SHARE

    def _show(self, text: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be rewritten
            self.stream.write(f"\r\x1b[K{text[:width]}")
        else:
            self.stream.write(f"{text}\n")
        self.open = self.terminal
        self.stream.flush()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self.open:
            self.stream.write("\n")
            self.stream.flush()
            self.open = False


def sentence(stage: str, share: float, left: float | None) -> str:
    """`Polishing: 42 %, 1:05 left`."""
    text = f"{stage}: {share:.0%}".replace("%", " %")
    return text if left is None or share >= 1 else f"{text}, {clock(left)} left"


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
