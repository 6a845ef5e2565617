"""Sentences in the user's language: the page itself translates fixed strings only, not what holds names or figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from string import Formatter
from typing import Any

from loraclr.webui import beside
from loraclr.webui.sentences import CORE
from loraclr.webui.surroundings import here

_plain: ContextVar[bool] = ContextVar("_plain", default=False)


@contextmanager
def english() -> Iterator[None]:
    """Inside, nothing is translated: programs are answered alike wherever they ask."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def say(sentence: str, **values: Any) -> str:
    """A sentence, translated if there is a translation, and then with the values in the place of their names."""
    return ({} if _plain.get() else translations()).get(sentence, sentence).format(**values)


def translations() -> dict[str, str]:
    """Sentence → translation into the user's language; empty for English."""
    return _translations(str(here().option("localization", "None")))


def retell(sentence: str) -> str:
    """A sentence of the core's, translated if it is one of `CORE`."""
    for known in CORE:
        if told := re.fullmatch(_pattern(known), sentence):
            return say(known, **told.groupdict())
    return sentence


def shown(value: Any) -> str:
    """A setting's value in a table."""
    return "; ".join(map(str, value)) if isinstance(value, (list, tuple)) else "–" if value is None else str(value)


@lru_cache
def _pattern(sentence: str) -> str:
    """What matches a sentence with values in it."""
    pattern, seen = "", set()
    for text, name, _, _ in Formatter().parse(sentence):
        pattern += re.escape(text)
        pattern += "" if not name else f"(?P={name})" if name in seen else f"(?P<{name}>.+)"
        seen.add(name)
    return pattern


@lru_cache
def _translations(language: str) -> dict[str, str]:
    """Sentence → translation, as in this extension's file for a language; empty without one."""
    try:
        return json.loads(beside.text(f"localizations/{language}.json"))
    except (OSError, ValueError):
        return {}
