"""How a LoRA stands in the list: by name, folder and trigger words, so that it is found by each of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from loraclr.files import activation_text
from loraclr.lora import trigger_from

# No file's name has a dot between two such wide spaces, so that a label tells the name again.
_BETWEEN = "\u2003·\u2003"

# Path → the state of its sidecar, its metadata, and the trigger words that these two told.
_read: dict[str, tuple[tuple[int, int], Mapping[str, Any], str]] = {}


def of(name: str, path: str, root: str, metadata: Mapping[str, Any]) -> str:
    """What the list says of a LoRA: its name, its folder below `root`, and the words that call it.

    The file itself is not opened: `metadata` is what the webui has read of it. Its sidecar is opened again only if it
    has changed.
    """
    return _BETWEEN.join(filter(None, (name, folder(path, root), " ".join(_trigger(path, metadata).split()))))


def name_of(label: str) -> str:
    """The name in a label; a plain name is one, too."""
    return label.partition(_BETWEEN)[0]


def folder(path: str, root: str) -> str:
    """The folder of a file, relative to `root`, with slashes; "" directly in it or elsewhere."""
    place, root = (part.replace("\\", "/").rstrip("/") + "/" for part in (os.path.dirname(path), root))
    return place[len(root) : -1] if place.startswith(root) else ""


def hidden(path: str, root: str) -> bool:
    """Whether a file or a folder on the way to it is hidden: has a name that begins with a dot."""
    return any(part.startswith(".") for part in (*folder(path, root).split("/"), os.path.basename(path)))


def _trigger(path: str, metadata: Mapping[str, Any]) -> str:
    state = _state(os.path.splitext(path)[0] + ".json")
    known = _read.get(path)
    if known is None or known[0] != state or known[1] != metadata:
        known = _read[path] = state, metadata, (activation_text(path) if any(state) else "") or trigger_from(metadata)
    return known[2]


def _state(path: str) -> tuple[int, int]:
    try:
        told = os.stat(path)
    except OSError:
        return 0, 0
    return told.st_mtime_ns, told.st_size
