"""Sentences in the user's language: the page itself translates fixed strings only, not what holds names or figures."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from modules import shared

_FOLDER = Path(__file__).parents[2] / "localizations"


def say(sentence: str, **values: Any) -> str:
    """A sentence, translated if there is a translation, and then with the values in the place of their names."""
    return _translations(str(shared.opts.data.get("localization"))).get(sentence, sentence).format(**values)


@lru_cache
def _translations(language: str) -> dict[str, str]:
    """Sentence → translation, as in this extension's file for a language; empty without one."""
    try:
        return json.loads((_FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
