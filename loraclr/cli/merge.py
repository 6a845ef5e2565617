"""`python -m loraclr merge`: LoRA files and, for methods that look at the model, a checkpoint in, one LoRA file out."""

from __future__ import annotations

import argparse
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraclr.cli import Refused, options, quiet, remote
from loraclr.cli.checks import check_checkpoint, check_device, check_output, refusing
from loraclr.cli.options import DTYPES, LOOP, Entry
from loraclr.cli.progress import Line
from loraclr.cli.summary import summary

if TYPE_CHECKING:
    from loraclr.concept import Concept
    from loraclr.hosts.standalone import Standalone
    from loraclr.methods import Method
    from loraclr.plan import Settings
    from loraclr.recipe import Recipe
    from loraclr.result import Merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `merge`."""
    parser.set_defaults(run=run)
    options.declare(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, merge, write, and say what was written."""
    from loraclr import methods
    from loraclr.plan import Settings

    if args.server is not None:
        options.refuse_ignored(args, methods.METHODS[args.method])
        return remote.run(args)
    for option in ("api_auth", "name"):
        if getattr(args, option) is not None:
            raise Refused(f"--{option.replace('_', '-')} means nothing without --server: leave it out.")
    if args.output is None:
        raise Refused("There is no --output: give the LoRA file to write, or a --server that merges.")
    told = read_recipe(args) if args.recipe else None
    method = methods.METHODS[told.method if told else args.method]
    concepts = prepare(args, method, told)
    if method.needs_model:
        host = prepare_host(args, concepts)
        given = {name: getattr(args, name) for name in ("scenes", *LOOP) if getattr(args, name) is not None}
        asked = replace(Settings(speed=args.speed or "fast", rank=args.rank, seed=args.seed), **given)
        settings = told.settings if told else asked
        with Line() as line, refusing():
            merge = methods.merge(host, concepts, method.name, settings, line)
    else:
        host = prepare_weights(args, concepts)
        asked = told.settings if told else methods.Options(args.rank, args.density or 0.5, seed=args.seed)
        with Line() as line, refusing():
            merge = methods.combine(concepts, method.name, asked, line, host and host.layers())
        merge.checkpoint = host and host.checkpoint
    if told and (note := told.note(merge.checkpoint)):
        merge.notes.append(note)
    write(merge, args)
    if method.needs_model and not args.no_preview:
        picture(host, merge, settings, args.output)
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
    options.refuse_ignored(args, method, told)
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
            check_output(args.output, [concept.lora.path for concept in concepts], args.overwrite)
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


def picture(host: Standalone, merge: Merge, settings: Settings, output: Path) -> None:
    """A picture for the written file's card; an error or Ctrl-C costs the picture only, and a note says so."""
    import torch

    from loraclr import preview

    try:
        if preview.wanted(output):
            with Line() as line:
                line("Drawing a picture for its card", 1.0, None)
                preview.save(preview.drawn(host, merge, settings), output)
    except torch.cuda.OutOfMemoryError:
        merge.notes.append("There is no picture for its card: the graphics card's memory is full.")
    except KeyboardInterrupt:
        merge.notes.append("There is no picture for its card: it was cancelled.")
    except Exception as error:  # noqa: BLE001 (whatever it is, the LoRA is there)
        reason = " ".join(str(error).split()) or type(error).__name__
        merge.notes.append(f"There is no picture for its card: {reason}")
