"""What the miniature can do, as one table: `python -m miniature.evaluate`.

Everything is drawn by the standalone host (DDIM, classifier-free guidance) and judged by `miniature.judge`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL import Image
from tqdm import tqdm

from loraclr import files, report
from loraclr.changes import changes_of
from loraclr.cli import quiet
from loraclr.hosts.standalone import Standalone
from loraclr.lora import LoRA
from loraclr.report import Share, Table
from miniature import LORAS, WEIGHTS
from miniature.drawing import GUIDANCE, open_miniature
from miniature.drawing import draw as draw_pictures
from miniature.judge import Judge, accuracy, halves
from miniature.scenes import prompt
from miniature.vocabulary import CLASSES, COLOURS, CONCEPTS, Concept

STEPS = 20
HUES = tuple(COLOURS)
NOTE = f"""\
alone: one object in the picture. side by side: two, left and right half judged apart; a LoRA's concept in its own half.
beside it: the base object next to a LoRA's concept; for the styles, outline and mosaic, the look counts as the concept,
and this is how often the objects drawn in it are still right. Judge: objects, looks, backgrounds.
± is one standard error. {STEPS} steps of DDIM, guidance {GUIDANCE:g}."""


@dataclass(frozen=True)
class Counts:
    """How many pictures: seeds of each class, pictures of two objects, pictures of each concept."""

    seeds: int = 4
    pairs: int = 96
    concept: int = 24


QUICK = Counts(seeds=1, pairs=16, concept=4)


@dataclass(frozen=True)
class Wanted:
    """A prompt and what must be found: one object on the whole picture or two in its halves, the look, the colour."""

    prompt: str
    objects: tuple[str, ...]
    look: str = "plain"
    colour: str = ""


@dataclass(frozen=True)
class Seen:
    """What one picture got right: each object by place, and the look in every part."""

    objects: tuple[bool, ...]
    look: bool


Draw = Callable[[LoRA | None, Sequence[Wanted]], list[Seen]]


def on(words: Sequence[str], objects: tuple[str, ...], colour: str) -> Wanted:
    """Objects, named by words, on a background."""
    return Wanted(prompt(list(words), colour), objects, colour=colour)


def singles(count: int, hues: Sequence[str] = HUES, first: int = 0) -> list[Wanted]:
    """`count` pictures of one base class, classes and backgrounds in turn, from class number `first` on."""
    names = list(CLASSES)
    wanted = []
    for place in range(first, first + count):
        name = names[place % len(names)]
        wanted.append(on([name], (name,), hues[place % len(hues)]))
    return wanted


def pairs(count: int, hues: Sequence[str] = HUES, first: int = 0) -> list[Wanted]:
    """`count` pictures of two different base classes, from number `first` on, all about as often on either side."""
    names = list(CLASSES)
    wanted = []
    for place in range(first, first + count):
        left = names[place % len(names)]
        apart = 1 + (6 + 5 * (place // len(names))) % (len(names) - 1)  # never 0: two different classes
        right = names[(place + apart) % len(names)]
        wanted.append(on([left, right], (left, right), hues[place % len(hues)]))
    return wanted


def alone(concept: Concept, count: int, hues: Sequence[str] = HUES, first: int = 0) -> list[Wanted]:
    """A thing by itself, or (styles) a base class in the style, from number `first` on."""
    if not concept.is_style:
        return [on([concept.trigger], (concept.name,), hues[k % len(hues)]) for k in range(count)]
    return [styled(wanted, concept) for wanted in singles(count, hues, first)]


def beside(concept: Concept, count: int, hues: Sequence[str] = HUES, first: int = 0) -> list[Wanted]:
    """A thing beside a base object, left and right in turn, or (styles) two base objects in the style.

    first: number of the first base object; with numbers of their own, concepts stand beside different ones.
    """
    if concept.is_style:
        return [styled(wanted, concept) for wanted in pairs(count, hues, first)]
    names = list(CLASSES)
    wanted = []
    for place in range(first, first + count):
        other = names[5 * place % len(names)]
        order = slice(None, None, 1 if place % 2 else -1)
        words, objects = [concept.trigger, other][order], (concept.name, other)[order]
        wanted.append(on(words, objects, hues[place % len(hues)]))
    return wanted


def styled(wanted: Wanted, concept: Concept) -> Wanted:
    """The same in a style."""
    return replace(wanted, prompt=f"{wanted.prompt} in {concept.phrase}", look=concept.name)


def judged(judge: Judge, wanted: Wanted, picture: Image.Image) -> Seen:
    """Compare a picture with what was asked for."""
    verdicts = judge.verdicts([picture] if len(wanted.objects) == 1 else list(halves(picture)))
    objects = tuple(verdict.object == name for verdict, name in zip(verdicts, wanted.objects, strict=True))
    return Seen(objects, all(verdict.look == wanted.look for verdict in verdicts))


def drawing(host: Standalone, judge: Judge, bar: tqdm) -> Draw:
    """A function that draws with a LoRA applied, in batches, and judges; picture k starts from noise k."""

    layers = host.layers()

    def draw(lora: LoRA | None, wanted: Sequence[Wanted]) -> list[Seen]:
        changes = {} if lora is None else changes_of(lora, layers)
        pictures = draw_pictures(host, changes, [one.prompt for one in wanted], 0, STEPS, bar.update)
        return [judged(judge, one, picture) for one, picture in zip(wanted, pictures, strict=True)]

    return draw


def share(hits: Sequence[bool]) -> Share:
    return Share(sum(hits), len(hits))


def base_row(draw: Draw, counts: Counts) -> tuple[str, ...]:
    """The base model on one object and on two, each half counted."""
    one = share([seen.objects[0] for seen in draw(None, singles(counts.seeds * len(CLASSES)))])
    two = share([right for seen in draw(None, pairs(counts.pairs)) for right in seen.objects])
    return ("base model", str(one), str(two), "", _goal((one, 0.9), (two, 0.8)))


def concept_row(draw: Draw, concept: Concept, count: int) -> tuple[str, ...]:
    """One LoRA alone, beside a base object in its own half, and what stands beside it.

    For a style the looks count, and what stands beside is the base objects that it is applied to.
    """
    lora = files.load(LORAS / f"{concept.name}.safetensors")
    lone, wanted = draw(lora, alone(concept, count)), beside(concept, count)
    near = draw(lora, wanted)
    if concept.is_style:
        one, two = share([seen.look for seen in lone]), share([seen.look for seen in near])
        rest = share([right for seen in (*lone, *near) for right in seen.objects])
    else:
        places = [one.objects.index(concept.name) for one in wanted]
        one = share([seen.objects[0] for seen in lone])
        two = share([seen.objects[place] for seen, place in zip(near, places, strict=True)])
        rest = share([seen.objects[1 - place] for seen, place in zip(near, places, strict=True)])
    return (f"LoRA {concept.name}", str(one), str(two), str(rest), _goal((one, 0.9), (two, 0.7)))


def judge_row(judge: Judge, count: int) -> tuple[str, ...]:
    """The judge's objects, looks and backgrounds on fresh renders; not measured where the font is missing."""
    try:
        found = accuracy(judge, count)
    except FileNotFoundError as error:
        return ("judge on real renders", "not measured", "", "", str(error))
    count = count // 50 * 50
    shares = [Share(round(value * count), count) for value in found.values()]
    return ("judge on real renders", *map(str, shares), _goal(*((one, 0.99) for one in shares)))


def size_row() -> tuple[str, ...]:
    """All files that the repository carries for the miniature."""
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) / 1e6
    return ("weights in git", f"{size:.1f} MB", "", "", f"{'reached' if size <= 32 else 'missed'}: 32 MB")


def _goal(*found: tuple[Share, float]) -> str:
    """Whether every share reaches what is asked of it."""
    reached = all(one.value >= least for one, least in found)
    return f"{'reached' if reached else 'missed'}: " + ", ".join(f"{100 * least:.0f} %" for _, least in found)


def evaluate(device: str | None = None, counts: Counts | None = None) -> Table:
    """Draw, judge, and put every figure beside its target."""
    counts = counts or Counts()
    judge = Judge.load()
    pictures = counts.seeds * len(CLASSES) + counts.pairs + 2 * counts.concept * len(CONCEPTS)
    host = open_miniature(device)
    with tqdm(total=pictures, desc="drawing", unit="picture", file=sys.stderr) as bar:
        draw = drawing(host, judge, bar)
        rows = [base_row(draw, counts), *(concept_row(draw, concept, counts.concept) for concept in CONCEPTS)]
    rows += [judge_row(judge, 600 if counts.seeds > 1 else 100), size_row()]
    return Table("The miniature", ("top-1", "alone", "side by side", "beside it", "goal"), rows, NOTE)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("miniature.evaluate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a sixth of the pictures")
    parser.add_argument("--device", help="cpu, cuda, … (default: the graphics card if there is one)")
    args = parser.parse_args(argv)
    quiet()
    print(report.text(evaluate(args.device, QUICK if args.quick else Counts())))


if __name__ == "__main__":
    main()
