"""`python -m loraclr demo`: the whole way on the miniature, from its LoRAs to a judged report."""

from __future__ import annotations

import argparse
from pathlib import Path

from loraclr.cli import Refused, quiet
from loraclr.cli.checks import check_device
from loraclr.cli.progress import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `demo`."""
    parser.set_defaults(run=run)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for the report (default: demo)")
    parser.add_argument(
        "--concepts", type=int, nargs="+", default=[2, 4], metavar="N", help="how many LoRAs to merge (default: 2 4)"
    )
    parser.add_argument("--speed", choices=["closed", "fast", "balanced", "best"], default="fast", help="default: fast")
    parser.add_argument("--pictures", type=int, default=8, metavar="K", help="pictures of each concept (default: 8)")
    parser.add_argument("--things", action="store_true", help="merge things only; else one of the LoRAs is a style")
    parser.add_argument("--scenes", type=int, default=2, help="as in merge; default: 2")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", help="cpu, cuda, … (default: the graphics card if there is one)")


def run(args: argparse.Namespace) -> int:
    """Merge, draw, judge; print the table and the report's path."""
    device = check_device(args.device)
    try:
        quiet()
        from miniature import CHECKPOINT, demo
        from miniature.vocabulary import CONCEPTS
    except ImportError as error:
        raise Refused(f"The demo needs this repository's miniature and its packages ({error}): see README.") from error
    if not CHECKPOINT.exists():
        raise Refused(f"The miniature is not there ({CHECKPOINT}): train it with python -m miniature.train.")
    most = len(CONCEPTS)
    for count in args.concepts:
        if not 1 <= count <= most:
            raise Refused(f"The miniature has {most} LoRAs, so --concepts {count} cannot be merged.")
    if args.pictures < 1:
        raise Refused(f"--pictures {args.pictures} draws nothing: give 1 or more.")
    if args.scenes < 0:
        raise Refused(f"--scenes {args.scenes} cannot be drawn: give 0 or more.")
    if args.seed < 0:
        raise Refused(f"--seed {args.seed} is below 0: give 0 or more.")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(
            f"The folder {args.output} cannot be made ({error.strerror}): choose another --output."
        ) from error

    plan = demo.Plan(
        tuple(dict.fromkeys(args.concepts)), args.speed, args.pictures, args.seed, args.scenes, not args.things
    )
    with Line() as line:
        result = demo.run(args.output, plan, line, device)
    print(result.table)
    print(f"Report: {result.report.resolve()}")
    return 0
