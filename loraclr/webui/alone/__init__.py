"""The tab without a webui: a checkpoint run by diffusers, a folder of LoRAs, and a page of our own."""
