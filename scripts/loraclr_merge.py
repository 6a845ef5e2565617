"""What the webui runs: registers the LoRACLR Merge tab."""

from loraclr.webui import callbacks

callbacks.register()
