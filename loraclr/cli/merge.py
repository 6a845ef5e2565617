"""`python -m loraclr merge`: LoRA files and, for methods that look at the model, a checkpoint in, one LoRA file out."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraclr.cli import Refused, quiet
from loraclr.cli.progress import Line
from loraclr.cli.summary import summary

if TYPE_CHECKING:
    from loraclr.concept import Concept
    from loraclr.hosts.standalone import Standalone
    from loraclr.methods import Method
    from loraclr.recipe import Recipe
    from loraclr.result import Merge

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `merge`; those of a LoRA follow its --lora."""
    parser.set_defaults(run=run, entries=None)
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


def offered() -> list[Method]:
    """The methods that users can choose."""
    from loraclr.methods import METHODS

    return [method for method in METHODS.values() if method.offered]


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, merge, write, and say what was written."""
    import torch

    from loraclr import methods, preview
    from loraclr.cli import remote
    from loraclr.plan import Settings

    if args.server is not None:
        check_options(args, methods.METHODS[args.method])
        return remote.run(args)
    for option in ("api_auth", "name"):
        if getattr(args, option) is not None:
            raise Refused(f"--{option.replace('_', '-')} means nothing without --server: leave it out.")
    if args.output is None:
        raise Refused("There is no --output: give the LoRA file to write, or a --server that merges.")
    picture = None
    told = read_recipe(args) if args.recipe else None
    method = methods.METHODS[told.method if told else args.method]
    concepts = prepare(args, method, told)
    if method.needs_model:
        host = prepare_host(args, concepts)
        asked = Settings(speed=args.speed or "fast", rank=args.rank, seed=args.seed)
        given = {name: getattr(args, name) for name in ("scenes", *LOOP) if getattr(args, name) is not None}
        asked = replace(asked, **given)
        settings = told.settings if told else asked
        with Line() as line, refusing():
            merge = methods.merge(host, concepts, method.name, settings, line)
            if not args.no_preview and preview.wanted(args.output):
                line("Drawing a picture for its card", 1.0, None)
                try:
                    picture = preview.drawn(host, merge, settings)
                except torch.cuda.OutOfMemoryError:  # a merge that is done is worth more than its picture
                    merge.notes.append("There is no picture for its card: the graphics card's memory is full.")
    else:
        host = prepare_weights(args, concepts)
        options = told.settings if told else methods.Options(args.rank, args.density or 0.5, seed=args.seed)
        with Line() as line, refusing():
            merge = methods.combine(concepts, method.name, options, line, host and host.layers())
        merge.checkpoint = host and host.checkpoint
    if told and (note := told.note(merge.checkpoint)):
        merge.notes.append(note)
    write(merge, args)
    if picture is not None:
        preview.save(picture, args.output)
    print(summary(merge, args.output))
    return 0


def read_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that --recipe names, which says all that the other options would.

    Raises:
        Refused: one sentence for whatever is wrong.
    """
    from loraclr import recipe

    usual = {"method": "loraclr", "seed": 0, **dict.fromkeys(("speed", "density", "rank", "scenes", *LOOP, "entries"))}
    for name, value in usual.items():
        if getattr(args, name) != value:
            option = "lora" if name == "entries" else name
            raise Refused(f"--recipe says which LoRAs to merge and how: leave --{option} out.")
    with refusing():
        return recipe.read(args.recipe)


def prepare(args: argparse.Namespace, method: Method, told: Recipe | None = None) -> list[Concept]:
    """What a merge needs of the user and of the files, checked, the cheapest first.

    Raises:
        Refused: one sentence for whatever is wrong.
    """
    from loraclr import methods

    entries: list[Entry] = args.entries or []
    if not entries and told is None:
        raise Refused("No LoRA is chosen: give at least one --lora.")
    check_options(args, method, told)
    inputs = [
        *([args.recipe] if args.recipe else []),
        *(entry.path for entry in entries),
        *([args.checkpoint] if args.checkpoint else []),
    ]
    check_output(args.output, inputs, args.overwrite)
    check_device(args.device)
    if args.checkpoint is not None:
        check_checkpoint(args.checkpoint)
    with refusing():
        if told is None:
            concepts = [concept_of(entry, method.needs_model) for entry in entries]
        else:
            concepts = told.concepts([args.recipe.parent, Path()])
        if method.needs_model:  # which of the LoRAs do not fit, the model tells better
            methods.check_family([concept.lora for concept in concepts])
        elif args.checkpoint is None:
            methods.check(concepts)
    return concepts


def prepare_host(args: argparse.Namespace, concepts: list[Concept]) -> Standalone:
    """The loaded checkpoint, which the LoRAs fit.

    Raises:
        Refused: one sentence for whatever is wrong.
    """
    from loraclr.concept import check
    from loraclr.hosts.standalone import open_checkpoint

    with refusing():
        quiet()
        host = open_checkpoint(args.checkpoint, args.device)
        check(host, concepts)
    return host


def prepare_weights(args: argparse.Namespace, concepts: list[Concept]) -> Standalone | None:
    """The checkpoint, if one is given, for a merge by weights: some LoRAs' changes depend on its own.

    Raises:
        Refused: one sentence for whatever is wrong.
    """
    from loraclr import methods
    from loraclr.hosts.standalone import open_checkpoint

    if args.checkpoint is None:
        return None
    with refusing():
        quiet()
        host = open_checkpoint(args.checkpoint, "cpu")
        methods.check(concepts, host.layers())
    return host


def check_options(args: argparse.Namespace, method: Method, told: Recipe | None = None) -> None:
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


@contextmanager
def refusing() -> Iterator[None]:
    """Inside, a ValueError's or OSError's message is a sentence for the user."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(" ".join(str(error).split())) from error


def concept_of(entry: Entry, needs_trigger: bool = True) -> Concept:
    """Load an entry's file; its trigger words come from the file if none are given."""
    from loraclr import blocks, files
    from loraclr.concept import Concept, check_weights

    lora = files.load(entry.path)
    trigger = (entry.trigger if entry.trigger is not None else lora.triggers()).strip()
    if not trigger and needs_trigger:
        raise ValueError(f'{entry.path.name} does not say which words call it: write --trigger "…" after its --lora.')
    try:
        weights = None if entry.blocks is None else blocks.block_weights(entry.blocks, lora.family)
    except ValueError as error:
        raise ValueError(f"{entry.path.name}: {error}") from error
    weight = 1.0 if entry.weight is None else entry.weight
    concept = Concept(lora, trigger, weight, entry.text_weight, entry.kind or "subject", blocks=weights)
    check_weights(concept)
    return concept


def check_output(output: Path, inputs: list[Path], overwrite: bool) -> None:
    """Refuse an output that could not be written, or that would replace what is read."""
    if output.suffix != ".safetensors":
        raise Refused(f"The output {output.name} must end in .safetensors.")
    if not output.parent.is_dir():
        raise Refused(f"The folder {output.parent} does not exist: create it, or choose another --output.")
    if output.is_dir():
        raise Refused(f"The output {output} is a folder: choose another name.")
    if any(output.exists() and path.exists() and output.samefile(path) for path in inputs):
        raise Refused(f"The output {output.name} is one of the files that are read: choose another name.")
    if output.exists() and not overwrite:
        raise Refused(f"{output} exists already: choose another --output, or add --overwrite to replace it.")
    if not os.access(output.parent, os.W_OK):
        raise Refused(f"The folder {output.parent} cannot be written to: choose another --output.")


def check_checkpoint(path: Path) -> None:
    """Look at a checkpoint's names only, which takes no time, and refuse what nothing can be merged for."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise Refused(f"The folder {path.name} holds no model of diffusers: give one that does, or a file.")
        return
    if not path.is_file():
        raise Refused(f"The checkpoint {path} does not exist: give the path of a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise Refused(f"The checkpoint {path.name} is cut off or is not a .safetensors file.") from error
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise Refused(f"{path.name} is not a Stable Diffusion checkpoint: it holds no UNet.")
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise Refused(f"{path.name} is SDXL's refiner or an SD 2.x Turbo: give a checkpoint of SD 1.x, 2.x or SDXL.")


def check_device(name: str | None) -> str | None:
    """Refuse a device that this machine does not have."""
    import torch

    if name is None:
        return None
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Refused(f"The device {name} cannot be used here: leave --device out, or give --device cpu.") from error
    return name


def write(merge: Merge, args: argparse.Namespace) -> None:
    """Write the file; Ctrl-C waits until both file and sidecar are there."""
    import torch

    from loraclr import result

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with refusing():
            if args.plain:
                result.make_plain(merge)
            result.write(
                merge,
                args.output,
                getattr(torch, DTYPES[args.dtype or "fp16"]),
                args.overwrite,
                not args.separate_embeddings,
            )
    finally:
        signal.signal(signal.SIGINT, before)
