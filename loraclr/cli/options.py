"""What `merge` can be asked for: its options, and which of them mean nothing together."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraclr.cli import Refused

if TYPE_CHECKING:
    from loraclr.methods import Method
    from loraclr.recipe import Recipe

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def _rank(text: str) -> int | str:
    if text != "auto" and int(text) < 1:
        raise ValueError
    return text if text == "auto" else int(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError
    return float(text)


def _distance(text: str) -> str:
    if text not in ("flat", "token"):
        raise ValueError
    return text


# argparse: "invalid positive whole number value: '0'"
_rank.__name__ = "positive whole number"
_distance.__name__ = "distance (flat or token)"
_share.__name__ = "share above 0 and up to 1"


#: The settings of the paper's own loop.
LOOP = {
    "margin": (float, "the paper's m (default: 0.5)"),
    "penalty": (float, "the paper's λ (default: 0.001)"),
    "distance": (_distance, "flat: of a concept's features as one long vector, as in the paper's code (default), or "
                 "token: of each token's"),
    "iterations": (int, "steps for each layer (default: 50)"),
    "rate": (float, "learning rate (default: 0.0001)"),
}  # fmt: skip


@dataclass
class Entry:
    """One --lora and the options that follow it; None stands for what was not said."""

    path: Path
    trigger: str | None = None
    weight: float | None = None
    text_weight: float | None = None
    kind: str | None = None
    blocks: str | None = None


class _NewEntry(argparse.Action):
    """--lora begins an entry."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.entries = [*(namespace.entries or []), Entry(values)]


class _OfEntry(argparse.Action):
    """--trigger, --weight and the like belong to the --lora before them."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if not namespace.entries:
            parser.error(f"{option_string} belongs to a LoRA: write it after its --lora.")
        entry = namespace.entries[-1]
        if getattr(entry, self.dest) is not None:
            parser.error(f"{option_string} is given twice for {entry.path.name}; give it once after each --lora.")
        setattr(entry, self.dest, values)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the options; those of a LoRA follow its --lora."""
    parser.set_defaults(entries=None)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="Stable Diffusion 1.x, 2.x or XL, .safetensors or diffusers' folder; for methods that look at the model, "
        "and for LoRAs whose change depends on its weights, such as DoRA",
    )
    parser.add_argument("--output", type=Path, help="the LoRA file to write, .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")

    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="merge again as this merged LoRA was, from the LoRAs beside it, below it or in the current folder",
    )

    there = parser.add_argument_group("by a running webui", "with its checkpoint, into its LoRA folder")
    there.add_argument(
        "--server", metavar="URL", help="let this one merge, http://127.0.0.1:7860 for example; it needs --api"
    )
    there.add_argument("--api-auth", metavar="USER:PASS", help="the server's own --api-auth, one of them")
    there.add_argument("--name", help="of the result on the server (default: after the LoRAs)")

    each = parser.add_argument_group("for each LoRA", "--lora begins one; the options behind it are about that one")
    each.add_argument(
        "--lora",
        type=Path,
        action=_NewEntry,
        dest="entries",
        metavar="FILE",
        help="LoRA to merge; with --server its name there",
    )
    of_entry = {"action": _OfEntry, "default": argparse.SUPPRESS}
    each.add_argument(
        "--trigger", metavar="WORDS", help="what calls it in a prompt (default: what its file says)", **of_entry
    )
    each.add_argument(
        "--weight", type=float, metavar="W", help="its strength, as in <lora:name:W> (default: 1)", **of_entry
    )
    each.add_argument("--text-weight", type=float, metavar="W", help="another one for the text encoder", **of_entry)
    each.add_argument("--kind", choices=["subject", "style"], help="what it is for (default: subject)", **of_entry)
    each.add_argument(
        "--blocks",
        metavar="WEIGHTS",
        help="its weight in each block: 17 or 26 numbers, SDXL 12 or 20, or by name, as in OUT03=0.5,IN04-IN08=0",
        **of_entry,
    )

    how = parser.add_argument_group("how to merge", " ".join(f"{one.name}: {one.text}" for one in offered()))
    how.add_argument("--method", choices=[one.name for one in offered()], default="loraclr", help="default: loraclr")
    how.add_argument("--speed", choices=["closed", "fast", "balanced", "best"], help="of loraclr (default: fast)")
    how.add_argument(
        "--density", type=_share, metavar="D", help="share of the weights that ties and the like keep (default: 0.5)"
    )
    how.add_argument(
        "--rank",
        type=_rank,
        metavar="N",
        help='largest rank, or "auto", in each layer what keeps 99.5 %% of its output (default: exact, the sum of the '
        "ranks)",
    )
    how.add_argument("--dtype", choices=list(DTYPES), help="number format of the file (default: fp16)")
    how.add_argument(
        "--separate-embeddings", action="store_true", help="write the LoRAs' embeddings beside the file, not into it"
    )
    how.add_argument(
        "--plain",
        action="store_true",
        help="leave out changes of biases and norm layers, so that every program loads all of the file",
    )
    how.add_argument("--no-preview", action="store_true", help="draw no picture for the file's card")
    how.add_argument(
        "--scenes",
        type=int,
        metavar="N",
        help="learn also from N pictures of two concepts for each LoRA, drawn by both (loraclr; default: 2)",
    )
    for name, (kind, what) in LOOP.items():
        how.add_argument(f"--{name}", type=kind, metavar=name[0].upper(), help=f"{what}, of reference")
    how.add_argument("--seed", type=int, default=0, help="default: 0")
    how.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the graphics card if there is one)")


def offered() -> list[Method]:
    """The methods that users can choose."""
    from loraclr.methods import METHODS

    return [method for method in METHODS.values() if method.offered]


def refuse_ignored(args: argparse.Namespace, method: Method, told: Recipe | None = None) -> None:
    """Refuse options that the method would ignore, and a checkpoint that is missing here."""
    ignored = {
        "--speed": args.speed is not None and method.name != "loraclr",
        "--device": args.device is not None and not method.needs_model,
        "--density": args.density is not None and not method.uses_density,
        "--rank": args.rank is not None and method.name == "concat",
        "--scenes": args.scenes is not None and method.name != "loraclr",
        **{f"--{name}": getattr(args, name) is not None and method.name != "reference" for name in LOOP},
    }
    for option, given in ignored.items():
        if given:
            raise Refused(f"{option} means nothing to --method {method.name}: leave it out, or choose another method.")
    if args.scenes is not None and args.scenes < 0:
        raise Refused(f"--scenes {args.scenes} cannot be drawn: give 0 or more.")
    for name in ("seed", *LOOP):
        if isinstance(value := getattr(args, name), (int, float)) and value < 0:
            raise Refused(f"--{name} {value:g} is below 0: give 0 or more.")
    if method.needs_model and args.checkpoint is None and args.server is None:
        known = f" ({told.checkpoint.name})" if told and told.checkpoint else ""
        raise Refused(
            f"--method {method.name} looks at the model: give its --checkpoint{known}, or choose a --method that needs "
            "only the LoRA files, such as sum."
        )
