"""The command line, one file for each command (see `loraclr.__main__`)."""

from __future__ import annotations

import logging
import warnings


class Refused(Exception):
    """Input that cannot be worked with; the message is one sentence for the user, and nothing was written."""


def quiet() -> None:
    """Keep the libraries' own remarks off stderr: a sentence or a progress line is all that is written there."""
    warnings.filterwarnings("ignore")
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
