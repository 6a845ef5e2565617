"""What the webui calls: registered anew each time it runs our script, since "Reload UI" forgets all callbacks."""

from __future__ import annotations

from modules import script_callbacks

from loraclr.webui import api, options, tab


def register() -> None:
    """Add the tab, its settings, and the API."""
    script_callbacks.on_ui_settings(options.add)
    script_callbacks.on_ui_tabs(lambda: [(tab.build(), "LoRACLR Merge", "loraclr")])
    script_callbacks.on_app_started(lambda _, app: api.add_routes(app))
