"""What the webui calls: registered anew each time it runs our script, since "Reload UI" forgets all callbacks."""

from __future__ import annotations

from modules import script_callbacks

from loraclr.webui import api, options, surroundings, tab, thumbnails
from loraclr.webui.inside import Webui


def register() -> None:
    """Add the tab, its settings, its pictures, and the API."""
    surroundings.settle(Webui())
    script_callbacks.on_ui_settings(options.add)
    script_callbacks.on_ui_tabs(lambda: [(tab.build(), "LoRACLR Merge", "loraclr")])
    script_callbacks.on_app_started(lambda _, app: (api.add_routes(app), thumbnails.add_route(app)))
