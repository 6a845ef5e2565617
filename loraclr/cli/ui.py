"""`python -m loraclr ui`: the webui's tab as a page of its own, for a checkpoint and a folder of LoRAs."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraclr.cli import Refused, quiet
from loraclr.cli.checks import check_checkpoint, check_device, refusing
from loraclr.cli.options import DTYPES
from loraclr.webui import beside

PORT = 7861  # the webui has 7860


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ui`."""
    parser.set_defaults(run=run)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="Stable Diffusion 1.x, 2.x or XL, file or diffusers' folder"
    )
    parser.add_argument(
        "--lora-dir",
        type=Path,
        metavar="DIR",
        help="the LoRAs, and where merged ones go (default: Lora beside the checkpoint's folder, as a webui has it, or "
        "loras beside the checkpoint)",
    )
    parser.add_argument("--port", type=_port, default=PORT, metavar="N", help=f"default: {PORT}")
    parser.add_argument("--listen", action="store_true", help="let other machines in: anyone who reaches this one")
    parser.add_argument(
        "--api-auth", type=_users, metavar="USER:PASS", help="ask for these by the API (not by the page)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="number format of files (default: fp16)")
    languages = [path.stem for path in beside.files("localizations/*.json")]
    parser.add_argument("--language", choices=languages, help="of the page (default: English)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the graphics card if there is one)")


def _port(text: str) -> int:
    if not 1 <= int(text) <= 65535:
        raise ValueError
    return int(text)


def _users(text: str) -> str:
    if not all(user and password for user, _, password in (entry.partition(":") for entry in text.split(","))):
        raise ValueError
    return text


# argparse: "invalid port from 1 to 65535 value: '0'"
_port.__name__ = "port from 1 to 65535"
_users.__name__ = "USER:PASS"


def run(args: argparse.Namespace) -> int:
    """Load the checkpoint and give out the page until Ctrl-C."""
    check_checkpoint(args.checkpoint)
    device = check_device(args.device)
    folder = lora_folder(args)
    with listening("0.0.0.0" if args.listen else "127.0.0.1", args.port) as taken:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported
        quiet()
        try:
            from loraclr.hosts.standalone import open_checkpoint
            from loraclr.webui import surroundings
            from loraclr.webui.alone import program, server
        except ImportError as error:
            raise ImportError(
                f"The page needs gradio 3.41 or 4 ({error}): pip install 'sd-webui-loraclr[standalone,ui]'"
            ) from error

        with refusing():
            host = open_checkpoint(args.checkpoint, device)
            options = {"loraclr_precision": args.dtype, "localization": args.language}
            alone = program.Alone(host, args.checkpoint.stem, folder, options, args.api_auth or "")
            surroundings.settle(alone)
            page = server.app(alone, None if args.listen else server.OWN_NAMES)
        taken.listen()  # who comes now waits for the server instead of being refused
        print(f"LoRACLR Merge is at http://127.0.0.1:{args.port}/ (Ctrl-C ends it).", flush=True)
        server.serve(page, alone, taken)
    return 0


@contextmanager
def listening(address: str, port: int) -> Iterator[socket.socket]:
    """The port, taken before the slow part of the start.

    Raises:
        Refused: it is not to be had.
    """
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((address, port))
        except OSError as error:
            raise Refused(f"Port {port} cannot be used ({error.strerror}): choose another --port.") from error
        yield taken


def lora_folder(args: argparse.Namespace) -> Path:
    """The folder that --lora-dir names, else the first usual one that is there."""
    if args.lora_dir is not None:
        if not args.lora_dir.is_dir():
            raise Refused(f"The folder {args.lora_dir} does not exist: give the folder of your LoRAs as --lora-dir.")
        return args.lora_dir.resolve()
    beside = args.checkpoint.resolve().parent
    for folder in (beside.parent / "Lora", beside / "loras"):
        if folder.is_dir():
            return folder
    raise Refused("There is no folder Lora or loras near the checkpoint: give the folder of your LoRAs as --lora-dir.")
