"""The entry for the webui's list of extensions is of the form that this list asks for."""

from __future__ import annotations

import json
from pathlib import Path

ENTRY = Path(__file__).parents[1] / "docs" / "extension-index.json"
#: Of the list's own, those that describe what an extension does.
TAGS = {
    "script", "tab", "dropdown", "training", "models", "UI related", "prompting", "editing", "manipulations",
    "animation", "query", "science",
}  # fmt: skip


def test_the_entry() -> None:
    """All four fields, tags that exist there, and a description without line breaks; only the address is still open."""
    entry = json.loads(ENTRY.read_text(encoding="utf-8"))
    assert list(entry) == ["name", "url", "description", "tags"]
    assert entry["name"] and "\n" not in entry["description"]
    assert set(entry["tags"]) <= TAGS
    assert entry["url"] == "" or entry["url"].endswith(".git")
