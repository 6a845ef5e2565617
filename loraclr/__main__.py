"""The command line: `python -m loraclr merge …`, `inspect FILE…`, `demo` and `ui …`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from loraclr.cli import Refused, demo, inspect, merge, ui

CANCELLED = 130  # what shells give for Ctrl-C


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise Refused(message)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    root = _Parser("loraclr", description="Merge many LoRAs into one that keeps every concept.", allow_abbrev=False)
    commands = root.add_subparsers(required=True, metavar="command")
    for command, text in (
        (merge, "merge LoRA files into one"),
        (inspect, "tell what is in LoRA files"),
        (demo, "merge the miniature's LoRAs and judge the result"),
        (ui, "the webui's tab as a page of its own"),
    ):
        name = command.__name__.rpartition(".")[2]
        command.add_arguments(commands.add_parser(name, help=text, description=command.__doc__, allow_abbrev=False))
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        exit status: 0 done, 1 something is not installed, 2 bad input or a full graphics card (nothing written),
        130 cancelled.
    """
    from loraclr.hosts import Cancelled

    try:
        args = parser().parse_args(argv)
        return args.run(args)
    except Refused as error:
        return _say(str(error), 2)
    except ImportError as error:
        return _say(str(error), 1)
    except (KeyboardInterrupt, Cancelled):
        return _say("Cancelled; nothing was written.", CANCELLED)


def _say(sentence: str, status: int) -> int:
    print(f"loraclr: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
