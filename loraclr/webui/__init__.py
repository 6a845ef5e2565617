"""The LoRACLR Merge tab: gradio and the webui's modules are imported here and in `loraclr.hosts.a1111` only."""
