"""The demo: merge the miniature's LoRAs, draw with them one by one, merged and stacked, and let the judge decide."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import loraclr
from loraclr import files, merging, report
from loraclr.changes import Changes, changes_of
from loraclr.hosts.standalone import Standalone
from loraclr.methods import stacked
from loraclr.plan import Settings, Speed, work
from loraclr.report import Gallery, Mean, Share, Shot, Table
from miniature import LORAS
from miniature.drawing import draw, open_miniature
from miniature.judge import Judge, Verdict, halves
from miniature.vocabulary import STYLES, THINGS, Concept

STEPS = 16
COLOURS = ("orange", "teal", "purple", "pink")  # no prompt of the merge names these
OBJECTS = ("bus", "rabbit", "mushroom", "turtle", "balloon", "lemon", "pizza", "crown")  # nor these: for styles
SHOWN = 2  # pictures of each concept in the report
OWN, MERGED, SUM = "its own LoRA", "merged", "plain sum"
METHODS = (OWN, MERGED, SUM)


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        counts: how many LoRAs to merge, several times.
        pictures: of each concept, and of pairs.
        scenes: see `loraclr.plan.Settings`.
        style: whether one of the LoRAs is a style.
    """

    counts: tuple[int, ...] = (2, 4)
    speed: Speed = "fast"
    pictures: int = 8
    seed: int = 0
    scenes: int = 2
    style: bool = True

    @property
    def settings(self) -> Settings:
        """Of the merges."""
        return Settings(speed=self.speed, seed=self.seed, scenes=self.scenes)


@dataclass(frozen=True)
class Result:
    """Where the report is, and its table as text."""

    report: Path
    table: str


@dataclass(frozen=True)
class Drawing:
    """Pictures of one method for one concept, or pair of concepts, with what the judge saw in them."""

    prompts: list[str]
    pictures: list[Image.Image]
    found: list[str]
    right: list[bool]
    identity: list[float] = field(default_factory=list)

    @property
    def share(self) -> Share:
        return Share(sum(self.right), len(self.right))

    def shot(self, place: int) -> Shot:
        return Shot(self.pictures[place], self.found[place], self.right[place])


@dataclass
class Round:
    """One merge and what was drawn with it: by method, then by concept's name or pair of names."""

    concepts: tuple[Concept, ...]
    merge: loraclr.Merge
    singles: dict[str, dict[str, Drawing]] = field(default_factory=dict)
    pairs: dict[str, dict[str, Drawing]] = field(default_factory=dict)


def run(output: Path, plan: Plan, progress: merging.Progress, device: str | None = None) -> Result:
    """Do the whole demo and write `report.html`, `before-after.png` and the merged LoRAs to a folder that exists.

    Raises:
        Cancelled: `progress` may raise it to stop.
    """
    judge = Judge.load()
    host = open_miniature(device)
    pace = _Pace(host, plan, progress)
    own: dict[str, Drawing] = {}  # a concept's own LoRA draws the same pictures whatever it is merged with
    rounds = [_round(host, judge, chosen(count, plan.style), plan, output, own, pace) for count in plan.counts]
    progress("Writing the report", 1.0, 0.0)

    table = figures(rounds)
    parts = [table, *(gallery for turn in rounds for gallery in galleries(turn))]
    path = output / "report.html"
    path.write_text(report.page("LoRACLR on the miniature", LEAD, parts), encoding="utf-8")
    before_after(rounds[-1]).save(output / "before-after.png")
    return Result(path, report.text(table))


LEAD = (
    "A small Stable Diffusion 1.x, and LoRAs for things that it never saw. Each LoRA alone, all of them merged into "
    "one file, and all of them stacked at weight 1, draw the same prompts from the same noise. A small classifier says "
    "what is in the pictures."
)


class _Pace:
    """Progress of merges and drawings together, measured in rows that go through the UNet."""

    def __init__(self, host: Standalone, plan: Plan, progress: merging.Progress) -> None:
        self.progress, self.done, self.start = progress, 0.0, time.monotonic()
        self.merges = {}
        for count in plan.counts:
            concepts = [to_merge(concept) for concept in chosen(count, plan.style)]
            self.merges[count] = work(host, concepts, plan.settings)
        drawn = max(plan.counts) + sum(2 * count + 2 * (count > 1) for count in plan.counts)
        self.whole = sum(self.merges.values()) + 2 * STEPS * plan.pictures * drawn

    def __call__(self, stage: str, rows: float) -> None:
        """`rows` more are done or, fractions of a merge included, about to be."""
        self.done += rows
        share, spent = min(0.99, self.done / self.whole), time.monotonic() - self.start
        self.progress(stage, share, spent * (1 - share) / share if share > 0.02 else None)

    def of_merge(self, count: int) -> merging.Progress:
        """A merge's own progress as a part of this one."""
        reached = 0.0

        def tell(stage: str, share: float, left: float | None) -> None:
            nonlocal reached
            self(f"Merging {count}: {stage}", (share - reached) * self.merges[count])
            reached = share

        return tell


def _round(
    host: Standalone,
    judge: Judge,
    concepts: tuple[Concept, ...],
    plan: Plan,
    output: Path,
    own: dict[str, Drawing],
    pace: _Pace,
) -> Round:
    """Merge some concepts, and draw and judge them with every method."""
    asked = [to_merge(concept) for concept in concepts]
    merge = merging.merge(host, asked, plan.settings, pace.of_merge(len(concepts)))
    path = loraclr.write(merge, output / f"merged-{len(concepts)}.safetensors", overwrite=True)
    layers = host.layers()
    single = [changes_of(concept.lora, layers) for concept in asked]
    merged = changes_of(files.load(path), layers)  # what is judged is the file
    stack = stacked(single)
    turn = Round(concepts, merge, {method: {} for method in METHODS}, {method: {} for method in (MERGED, SUM)})

    def drawn(changes: Changes, prompts: list[str], what: str) -> list[Image.Image]:
        return draw(
            host, changes, prompts, plan.seed + 1000, STEPS, lambda count: pace(f"Drawing {what}", 2 * STEPS * count)
        )

    for concept, change in zip(concepts, single, strict=True):
        prompts = prompts_of(concept, plan.pictures)
        if concept.name not in own:
            own[concept.name] = judged(judge, concept, prompts, drawn(change, prompts, f"{concept.name}, {OWN}"))
        turn.singles[OWN][concept.name] = own[concept.name]
        for method, changes in ((MERGED, merged), (SUM, stack)):
            pictures = drawn(changes, prompts, f"{concept.name}, {method}")
            turn.singles[method][concept.name] = judged(judge, concept, prompts, pictures)

    pairs = pairs_of(concepts, plan.pictures)
    for method, changes in ((MERGED, merged), (SUM, stack)):
        if pairs:
            prompts = [prompt for _, _, prompt in pairs]
            pictures = drawn(changes, prompts, f"two in one picture, {method}")
            turn.pairs[method] = judged_pairs(judge, pairs, pictures)
    return turn


def chosen(count: int, style: bool = True) -> tuple[Concept, ...]:
    """What `count` LoRAs are merged: things, and if there is to be one, or if there are no more, a style among them."""
    styles = STYLES[: max(int(style and count > 1), count - len(THINGS))]
    return (*THINGS[: count - len(styles)], *styles)


def to_merge(concept: Concept) -> loraclr.Concept:
    """A concept's LoRA, as a merge takes it."""
    lora = files.load(LORAS / f"{concept.name}.safetensors")
    return loraclr.Concept(lora, concept.phrase, kind="style" if concept.is_style else "subject")


def prompts_of(concept: Concept, count: int) -> list[str]:
    """Prompts for one concept that the merge has not seen."""
    prompts = []
    for place in range(count):
        colour = COLOURS[place % len(COLOURS)]
        if concept.is_style:
            prompts.append(f"a {OBJECTS[place % len(OBJECTS)]} on a {colour} background in {concept.phrase}")
        else:
            prompts.append(f"a {concept.phrase} on a {colour} background")
    return prompts


def pairs_of(
    concepts: Sequence[Concept], count: int, rng: random.Random | None = None
) -> list[tuple[Concept, Concept, str]]:
    """`count` prompts for two concepts in one picture, in both orders: two things, or a thing in a style.

    rng: chooses, if there are more such pairs than `count`; None takes the first ones, which are of the first concepts.
    """
    usable = [pair for pair in itertools.permutations(concepts, 2) if not pair[0].is_style]
    if rng is not None and len(usable) > count:
        usable = _spread(usable, count, rng)
    prompts = []
    for place, (left, right) in zip(range(count), itertools.cycle(usable or [()]), strict=False) if usable else ():
        colour = COLOURS[place % len(COLOURS)]
        if right.is_style:
            prompts.append((left, right, f"a {left.phrase} on a {colour} background in {right.phrase}"))
        else:
            prompts.append((left, right, f"a {left.phrase} and a {right.phrase} on a {colour} background"))
    return prompts


def _spread(pairs: Sequence[tuple[Concept, Concept]], count: int, rng: random.Random) -> list[tuple[Concept, Concept]]:
    """`count` of the pairs at random, but every concept in about as many of them as any other."""
    left, times, chosen = rng.sample(pairs, len(pairs)), Counter[Concept](), []
    for _ in range(count):
        pair = min(left, key=lambda two: sorted((times[two[0]], times[two[1]]), reverse=True))
        left.remove(pair)
        times.update(pair)
        chosen.append(pair)
    return chosen


def judged(judge: Judge, concept: Concept, prompts: list[str], pictures: list[Image.Image]) -> Drawing:
    """Is each picture of the concept; its identity is the cosine with the concept's direction."""
    verdicts = judge.verdicts(pictures)
    right = [verdict.shows(concept.name) for verdict in verdicts]
    identity = [(v.looks if concept.is_style else v.objects)[concept.name] for v in verdicts]
    return Drawing(prompts, pictures, [_named(concept, verdict) for verdict in verdicts], right, identity)


def _named(concept: Concept, verdict: Verdict) -> str:
    return f"{verdict.object}, {verdict.look}" if concept.is_style else verdict.object


def judged_pairs(
    judge: Judge, pairs: list[tuple[Concept, Concept, str]], pictures: list[Image.Image]
) -> dict[str, Drawing]:
    """Are both in the picture: left and right half as the prompt has them, or the thing in the style."""
    drawings: dict[str, Drawing] = {}
    for (left, right, prompt), picture in zip(pairs, pictures, strict=True):
        if right.is_style:
            seen = judge.verdicts([picture])[0]
            found, both = f"{seen.object}, {seen.look}", seen.shows(left.name) and seen.shows(right.name)
        else:
            seen = judge.verdicts(list(halves(picture)))
            found = f"{seen[0].object} | {seen[1].object}"
            both = seen[0].shows(left.name) and seen[1].shows(right.name)
        drawing = drawings.setdefault(f"{left.name} and {right.name}", Drawing([], [], [], []))
        for values, value in ((drawing.prompts, prompt), (drawing.pictures, picture), (drawing.found, found)):
            values.append(value)
        drawing.right.append(both)
    return drawings


def figures(rounds: Sequence[Round]) -> Table:
    """Top-1, identity and both-in-one-picture by number of LoRAs and method."""
    rows, strong = [], set()
    for turn in rounds:
        for method in METHODS:
            drawings = turn.singles[method].values()
            both = sum((drawing.share for drawing in turn.pairs.get(method, {}).values()), Share(0, 0))
            identity = Mean(tuple(value for drawing in drawings for value in drawing.identity))
            top = sum((drawing.share for drawing in drawings), Share(0, 0))
            if method == MERGED:
                strong.add(len(rows))
            rows.append((f"{len(turn.concepts)} LoRAs: {method}", str(top), str(identity), str(both)))
    columns = ("", "concept found (top-1)", "identity (cosine)", "two in one picture")
    note = "± is one standard error. Same prompts and noise in the rows of one number; no prompt was used in the merge."
    return Table("What the judge finds", columns, rows, note, frozenset(strong))


def galleries(turn: Round) -> list[Gallery]:
    """The pictures of one merge: each concept, then two in one picture."""
    count, seconds = len(turn.concepts), sum(turn.merge.seconds.values())
    rows = []
    for concept in turn.concepts:
        drawings = [turn.singles[method][concept.name] for method in METHODS]
        for place in range(min(SHOWN, len(drawings[0].pictures))):
            rows.append((concept.name, drawings[0].prompts[place], [drawing.shot(place) for drawing in drawings]))
    note = f"Merged in {seconds:.0f} s. Below each picture: what the judge takes it for."
    result = [Gallery(f"{count} LoRAs: each concept", METHODS, rows, note)]
    pairs = []
    for name in turn.pairs.get(MERGED, {}):
        drawings = [turn.pairs[method][name] for method in (MERGED, SUM)]
        for place in range(min(SHOWN, len(drawings[0].pictures))):
            pairs.append((name, drawings[0].prompts[place], [drawing.shot(place) for drawing in drawings]))
    if pairs:
        note = "Below each picture: what the judge takes its left and its right half for."
        result.append(Gallery(f"{count} LoRAs: two in one picture", (MERGED, SUM), pairs, note))
    return result


def before_after(turn: Round, concepts: int = 4, pairs: int = 1, zoom: int = 2) -> Image.Image:
    """One picture for the README: the LoRAs stacked above, merged below, same prompts and noise."""
    strips = []
    for method in (SUM, MERGED):
        drawings = [turn.singles[method][concept.name] for concept in turn.concepts[:concepts]]
        drawings += list(turn.pairs.get(method, {}).values())[:pairs]
        # Not chosen by hand: the k-th concept shows its k-th picture, so that backgrounds differ.
        strips.append([drawing.pictures[place % len(drawing.pictures)] for place, drawing in enumerate(drawings)])
    side, gap, head = strips[0][0].width * zoom, 12, 30
    width = len(strips[0]) * (side + gap) + gap
    sheet = Image.new("RGB", (width, 2 * (side + gap + head) + gap), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    names = f"before: {len(turn.concepts)} LoRAs stacked", "after: one merged LoRA"
    for row, (name, strip) in enumerate(zip(names, strips, strict=True)):
        top = row * (side + gap + head)
        pen.text((gap, top + 6), name, (40, 40, 50), font)
        for place, picture in enumerate(strip):
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (gap + place * (side + gap), top + head))
    return sheet
