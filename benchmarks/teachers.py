"""`python -m benchmarks.teachers`: what a merge learns two concepts in one picture from, judged by itself.

The miniature's LoRAs draw scenes as a merge has them drawn (`loraclr.scenes`): two things, each half by its own LoRA,
and things in styles, both LoRAs at once. No merge can learn from them what they do not show.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from benchmarks.scenes import TUNING_NOISE
from loraclr import report, scenes
from loraclr.capture import applied
from loraclr.cli import quiet
from loraclr.hosts.standalone import Standalone
from loraclr.report import Share, Table
from miniature.demo import STEPS, to_merge
from miniature.drawing import GUIDANCE, decoded, open_miniature
from miniature.judge import Judge, Verdict, halves
from miniature.vocabulary import CONCEPTS, STYLES

BATCH = 8
NOTE = """\
± is one standard error. The prompts are a merge's own, the noise is not. things: the judge finds each in its half, or
in the whole picture where it is in a style."""


def judged(host: Standalone, judge: Judge, plan: Sequence[scenes.Scene], noise: int) -> list[list[Verdict]]:
    """Draw scenes of CONCEPTS, and what the judge sees in both halves, or where both LoRAs act at once in the whole."""
    layers = host.layers()
    asked = [to_merge(concept).changes(layers) for concept in CONCEPTS]

    @contextmanager
    def acting(places: Sequence[int]) -> Iterator[None]:
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(applied(layers, asked[place]))
            yield

    found = []
    for begin in tqdm(range(0, len(plan), BATCH), desc="drawing", unit="batch", file=sys.stderr):
        part = plan[begin : begin + BATCH]
        _, latents = scenes.draw(host, acting, part, noise + begin, STEPS, GUIDANCE, host.size, lambda _: None)
        for scene, picture in zip(part, decoded(host, latents), strict=True):
            found.append(judge.verdicts(list(halves(picture)) if len(scene.parts) > 1 else [picture]))
    return found


def line(name: str, plan: Sequence[scenes.Scene], seen: Sequence[Sequence[Verdict]]) -> list[str]:
    """How often the things are right, the look, and both."""
    things, looks = [], []
    for scene, verdicts in zip(plan, seen, strict=True):
        shown = [CONCEPTS[place] for part in scene.parts for place in part.concepts]
        look = next((concept.name for concept in shown if concept.is_style), "plain")
        wanted = [concept.name for concept in shown if not concept.is_style]
        things.append([verdict.object for verdict in verdicts] == wanted)
        looks.append(all(verdict.look == look for verdict in verdicts))
    both = [thing and look for thing, look in zip(things, looks, strict=True)]
    return [name, *(str(Share(sum(hits), len(hits))) for hits in (things, looks, both))]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for two things side by side, and one for each style."""
    options = argparse.ArgumentParser("benchmarks.teachers", description=__doc__, allow_abbrev=False)
    options.add_argument("--pictures", type=int, default=20, help="of each line (default: %(default)s)")
    args = options.parse_args(argv)
    quiet()
    host, judge, rows = open_miniature("cpu"), Judge.load(), []
    things = [None if concept.is_style else concept.phrase for concept in CONCEPTS]
    plans = {"two things": scenes.side_by_side(things, args.pictures)}
    for style in STYLES:
        styles = [concept.phrase if concept is style else None for concept in CONCEPTS]
        plans[f"a thing in {style.name}"] = scenes.styled(things, styles, args.pictures)
    for number, (name, plan) in enumerate(plans.items()):
        rows.append(line(name, plan, judged(host, judge, plan, TUNING_NOISE + 1000 * number)))
    print(report.text(Table("What a merge learns two in one picture from", ("", "things", "look", "both"), rows, NOTE)))


if __name__ == "__main__":
    main()
