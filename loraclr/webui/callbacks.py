"""What the webui calls: registered anew each time it runs our script, since "Reload UI" forgets all callbacks."""

from __future__ import annotations

from modules import script_callbacks

from loraclr.webui import tab


def register() -> None:
    """Add the tab."""
    script_callbacks.on_ui_tabs(lambda: [(tab.build(), "LoRACLR Merge", "loraclr")])
