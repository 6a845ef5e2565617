"""The LoRACLR Merge tab: gradio is imported here only, the webui's modules also in `loraclr.hosts.a1111`."""
