"""A list that another thread makes anew is taken whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from threading import Event, Thread

import pytest

from loraclr.webui.relisting import whole

NAMES = [f"lora {number}" for number in range(20)]


class Shelf:
    """A list that is emptied and filled again, slowly, over and over."""

    def __init__(self) -> None:
        self.entries = {name: object() for name in NAMES}
        self.ended = Event()

    def make(self) -> None:
        self.entries.clear()
        for name in NAMES:
            time.sleep(0.002)
            self.entries[name] = object()

    def go_on(self) -> None:
        while not self.ended.is_set():
            self.make()
            time.sleep(0.02)


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf()
    thread = Thread(target=made.go_on)
    thread.start()
    yield made
    made.ended.set()
    thread.join()


def test_whole_while_it_is_made_anew(shelf: Shelf) -> None:
    """However often it is asked for; a plain look finds parts of it."""
    plain = set()
    for _ in range(200):
        plain.add(len(shelf.entries))
        time.sleep(0.001)
    assert min(plain) < len(NAMES), "the test's own list is never in parts"
    for _ in range(30):
        assert list(whole(shelf.entries, shelf.make)) == NAMES
        time.sleep(0.003)


def test_nobody_makes_it() -> None:
    """Then it is what it is, at once."""
    shelf = Shelf()
    since = time.monotonic()
    assert whole(shelf.entries, shelf.make) == shelf.entries
    assert time.monotonic() - since < 1


def test_patience_ends() -> None:
    """A folder on a disk that does not answer holds nobody up for ever."""
    stuck, go = {"a": 1}, Event()

    def make() -> None:
        go.wait()

    thread = Thread(target=make)
    thread.start()
    try:
        assert whole(stuck, make, patience=0.2) == {"a": 1}
    finally:
        go.set()
        thread.join()
