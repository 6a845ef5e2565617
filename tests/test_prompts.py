"""Prompts that a merge looks at."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loraclr import prompts


def test_a_quick_merge_looks_at_a_part_of_what_a_thorough_one_does() -> None:
    for kind in ("subject", "style"):
        quick, thorough = prompts.filled("sks", kind), prompts.filled("sks", kind, thorough=True)
        assert quick == thorough[: len(quick)] and len(quick) < len(thorough) == len(set(thorough))
        assert all("sks" in text and "{}" not in text for text in thorough)


def test_given_prompts_are_all_looked_at_and_twice_by_a_thorough_merge() -> None:
    assert prompts.filled("sks", "subject", ("{}", "my {}")) == ["sks", "my sks"]
    assert prompts.filled("sks", "subject", ("{}", "my {}"), True) == ["sks", "my sks"] * 2


def test_what_must_not_change_is_what_is_given_and_more_in_a_thorough_merge() -> None:
    assert prompts.kept(prompts.NEUTRAL) == list(prompts.NEUTRAL)
    thorough = prompts.kept(prompts.NEUTRAL, thorough=True)
    assert thorough[: len(prompts.NEUTRAL)] == list(prompts.NEUTRAL) and len(set(thorough)) == 2 * len(prompts.NEUTRAL)
    assert prompts.kept(("a dog",), thorough=True) == ["a dog", "a dog"]


def test_what_must_not_change_is_told_by_the_trigger_alone() -> None:
    """A background that only neutral prompts had would be learnt as a sign that no concept is wanted."""
    for kind in ("subject", "style"):
        for thorough in (False, True):
            own = grounds(prompts.filled("sks", kind, thorough=thorough))
            assert grounds(prompts.kept(prompts.NEUTRAL, thorough)) <= own


def grounds(texts: Iterable[str]) -> set[str]:
    return {match[1] for text in texts if (match := re.search(r"on a (\w+) background", text))}
