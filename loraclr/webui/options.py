"""The section of the webui's Settings page: what is no field of the tab (their defaults are on the Defaults page)."""

from __future__ import annotations

import gradio as gr
from modules import shared

_SECTION = ("loraclr", "LoRACLR Merge")


def add() -> None:
    """Add the section."""
    for key, option in {
        "loraclr_precision": shared.OptionInfo(
            "fp16", "Number format of merged LoRAs", gr.Radio, {"choices": ["fp16", "bf16", "fp32"]}, section=_SECTION
        ).info("fp32 makes files twice as large"),
        "loraclr_preview": shared.OptionInfo(True, "Save a preview picture for the Lora page", section=_SECTION).info(
            "four of the pictures that are drawn to compare"
        ),
    }.items():
        shared.opts.add_option(key, option)
