"""The command line, one file for each command (see `loraclr.__main__`)."""

from __future__ import annotations

import os
import sys
import warnings


class Refused(Exception):
    """Input that cannot be worked with; the message is one sentence for the user, and nothing was written."""


def quiet() -> None:
    """Keep the libraries' own remarks off stderr: a sentence or a progress line is all that is written there."""
    warnings.filterwarnings("ignore")
    for name in ("diffusers", "transformers"):
        os.environ.setdefault(f"{name.upper()}_VERBOSITY", "error")  # read when it is imported
        if name in sys.modules:
            sys.modules[name].utils.logging.set_verbosity_error()
