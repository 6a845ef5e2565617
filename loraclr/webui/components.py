"""What the webui, our own page, gradio 3 and gradio 4 have in different forms: some components, and events' scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from loraclr.webui.surroundings import here

_THREE = gr.__version__.startswith("3.")
_SCRIPT = "_js" if _THREE else "js"

# The argument by which an event that happens once more before it is answered is answered once more: gradio 4 would
# forget it, as gradio 3 does, which cannot be told.
AGAIN: dict[str, Any] = {} if _THREE else {"trigger_mode": "always_last"}


def script(function: str) -> dict[str, str]:
    """The argument by which an event runs a function of the page before, or instead of, one of ours."""
    return {_SCRIPT: function}


def script_on(function: str, inputs: Sequence[Any]) -> dict[str, str]:
    """The same for a function that takes the inputs' values as an array, and returns them changed.

    gradio gives a script the outputs' values, too; given these back, gradio 4 takes the inputs for others if there is a
    State among them.
    """
    return script(f"(...values) => {function}(values.slice(0, {len(inputs)}))")


def FormRow(**look: Any) -> Any:
    """A row of fields, as a context."""
    return here().row(**look)


def ToolButton(sign: str, **look: Any) -> Any:
    """A small button that shows a sign; what it is for is among the page's tooltips."""
    return here().tool(sign, **look)
