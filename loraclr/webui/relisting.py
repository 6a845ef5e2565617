"""A list that another thread may just be making anew, by emptying and filling it: it is taken when it is whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

_PAUSE, _PATIENCE = 0.05, 60.0  # seconds


def whole(entries: dict[str, Any], maker: Callable[[], None], patience: float = _PATIENCE) -> dict[str, Any]:
    """A copy of what a list has between two runs of the function that makes it anew.

    After `patience` seconds in which it was never whole, a copy of what there is. Not to be called by `maker` itself.
    """
    until = time.monotonic() + patience
    while True:
        before = dict(entries)
        running = _runs(getattr(maker, "__code__", None))
        after = dict(entries)
        # A run that began or ended meanwhile has left other entries.
        if (not running and before == after) or time.monotonic() > until:
            return after
        time.sleep(_PAUSE)


def _runs(code: CodeType | None) -> bool:
    """Whether a thread is in this function."""
    return any(frame.f_code is code for top in sys._current_frames().values() for frame in _stack(top))


def _stack(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield frame
        frame = frame.f_back
