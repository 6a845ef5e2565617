"""The files that the webui reads from an extension's own folder: in a clone, or as pip has installed them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

_FOLDERS = (Path(__file__).parents[2], Path(sysconfig.get_path("data")) / "share" / "loraclr")


def files(pattern: str) -> list[Path]:
    """Those that a pattern names, from the first folder that has any."""
    return next((found for folder in _FOLDERS if (found := sorted(folder.glob(pattern)))), [])


def text(name: str) -> str:
    """The text of one. Raises FileNotFoundError if it is not installed."""
    found = files(name)
    if not found:
        raise FileNotFoundError(f"{Path(name).name} is not installed; run this from a clone of the repository.")
    return found[0].read_text("utf-8")
