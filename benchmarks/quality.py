"""`python -m benchmarks.quality`: how good are merges on the miniature, ours and others', against the LoRAs alone.

Every row is one method at one number of concepts. Options of the others are chosen on tuning prompts; reporting
prompts and noise are others. A stopped run goes on where it was: beside FILE.json, FILE.jsonl holds what is finished,
and FILE-pictures/ the pictures. Remove both after a change of a method or of the miniature. The rows base and single
are always there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import loraclr
from benchmarks import metrics, scenes
from benchmarks.contenders import CONTENDERS, Contender, Entry
from benchmarks.ingredients import INGREDIENTS
from benchmarks.results import COLUMNS, Piece, Pieces, rows, table
from benchmarks.scenes import Plan, Shot
from loraclr import report
from loraclr.cli import quiet
from loraclr.hosts.standalone import Standalone
from miniature.demo import to_merge
from miniature.drawing import draw, open_miniature
from miniature.evaluate import judged
from miniature.judge import Judge, halves
from miniature.vocabulary import CONCEPTS, Concept

COUNTS, SEEDS = (2, 4, 8, 12), 3
QUICK_COUNTS, QUICK_SEEDS = (2, 4), 1
KNOWN = CONTENDERS | INGREDIENTS
QUICK_METHODS = ("base", "single", "sum", "average", "svd", "ties", "loraclr-closed", "loraclr-fast")
ALWAYS = ("base", "single")
REFERENCES = {"single": "concepts", "base": "base"}  # method → the part that all pictures are compared with

Pictures = dict[str, list[Image.Image]]


@dataclass(frozen=True)
class Bench:
    """What a run works with."""

    host: Standalone
    judge: Judge
    plan: Plan
    pieces: Pieces
    folder: Path
    tick: Callable[[int], object] = lambda _: None

    def strip(self, key: tuple[int, str, int], part: str) -> Path:
        """Where a piece's pictures of a part are, side by side."""
        count, method, seed = key
        return self.folder / f"{count}-{seed}-{method}-{part}.png"

    def pictures(self, key: tuple[int, str, int], part: str) -> list[Image.Image]:
        """Pictures that were drawn before."""
        with Image.open(self.strip(key, part)) as strip:
            side = strip.height
            return [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]


def measure(bench: Bench, key: tuple[int, str, int], contender: Contender) -> Piece:
    """Merge, draw and judge one piece, and keep it."""
    count, method, seed = key
    chosen = scenes.chosen(count, seed)
    asked = [to_merge(concept) for concept in chosen]
    about = {"concepts": count, "method": method, "seed": seed, "plan": bench.pieces.plan}
    about |= {"names": [concept.name for concept in chosen], "date": date.today().isoformat()}
    options = bench.pieces.settings_of(count, method)
    try:
        if options is None:
            options = tuned(bench, contender, chosen, asked, seed)
        entry = contender.run(bench.host, asked, seed, options)
    except ValueError as error:
        piece = Piece(**about, refused=str(error))
    else:
        shots = scenes.reporting(chosen, bench.plan, seed)
        draw_references(bench, count, seed, asked, shots)
        drawn = {}
        for part in shots:
            known = REFERENCES.get(method) == part
            drawn[part] = bench.pictures(key, part) if known else drawings(bench, entry, shots[part])
            save_strip(drawn[part], bench.strip(key, part))
        values = figures(bench, key, chosen, shots, drawn, entry.seen)
        piece = Piece(**about, values=values, capture_s=entry.capture_s, merge_s=entry.merge_s, settings=dict(options))
    bench.pieces.add(piece)
    return piece


def draw_references(
    bench: Bench, count: int, seed: int, asked: Sequence[loraclr.Concept], shots: dict[str, list[Shot]]
) -> None:
    """Draw what every method is compared with, if it is not there: the single LoRAs' concepts, the base's classes."""
    for method, part in REFERENCES.items():
        strip = bench.strip((count, method, seed), part)
        if not strip.exists():
            entry = CONTENDERS[method].run(bench.host, asked, seed, {})
            save_strip(drawings(bench, entry, shots[part]), strip)


def tuned(
    bench: Bench, contender: Contender, chosen: Sequence[Concept], asked: Sequence[loraclr.Concept], seed: int
) -> dict:
    """The options of the grid with the highest identity on the tuning prompts; the defaults if there is no choice."""
    if not contender.grid or not bench.plan.tune:
        return {}
    shots = scenes.tuning(chosen, bench.plan, seed)

    def identity(options: dict) -> float:
        entry = contender.run(bench.host, asked, seed, options)
        verdicts = bench.judge.verdicts(drawings(bench, entry, shots))
        return sum(metrics.identity(v, chosen[shot.places[0]]) for v, shot in zip(verdicts, shots, strict=True))

    return dict(max(contender.grid, key=identity))


def drawings(bench: Bench, entry: Entry, shots: Sequence[Shot]) -> list[Image.Image]:
    """The pictures of one part."""
    pictures: list[Image.Image] = []
    each = [(entry.changes(shot.places), shot) for shot in shots]
    for _, group in itertools.groupby(each, key=lambda pair: id(pair[0])):
        (changes, first), *rest = group
        prompts = [first.wanted.prompt, *(shot.wanted.prompt for _, shot in rest)]
        pictures += draw(bench.host, changes, prompts, first.noise, bench.plan.steps, bench.tick)
    return pictures


def figures(
    bench: Bench,
    key: tuple[int, str, int],
    chosen: Sequence[Concept],
    shots: dict[str, list[Shot]],
    drawn: Pictures,
    seen: Collection[frozenset[int]] = (),
) -> dict[str, list[float]]:
    """Every figure of every picture (see `benchmarks.results.FIGURES`); `seen`: pairs that the merge has looked at."""
    count, _, seed = key
    single, base = (bench.pictures((count, method, seed), part) for method, part in REFERENCES.items())
    judge, own, plain = bench.judge, drawn["concepts"], drawn["base"]
    verdicts, concepts = judge.verdicts(own), [chosen[shot.places[0]] for shot in shots["concepts"]]
    pairs = list(zip(verdicts, concepts, strict=True))
    text = [metrics.text_alignment([v], s.wanted) for v, s in zip(verdicts, shots["concepts"], strict=True)]
    for picture, shot in zip(drawn["beside"], shots["beside"], strict=True):
        text.append(metrics.text_alignment(judge.verdicts(list(halves(picture))), shot.wanted))
    both, beside = (found(judge, shots[part], drawn[part]) for part in ("pairs", "beside"))
    known = {frozenset(chosen[place].name for place in pair) for pair in seen}
    values = {
        "identity": [metrics.identity(verdict, concept) for verdict, concept in pairs],
        "top1": [float(verdict.shows(concept.name)) for verdict, concept in pairs],
        "text": text,
        "image": metrics.alignment(judge.features(own), judge.features(single)),
        "pixel": [metrics.drift(a, b) for a, b in zip(own, single, strict=True)],
        "crosstalk": [float(metrics.crosstalk(verdict, concept, chosen)) for verdict, concept in pairs],
        "two_concept": both,
        "two_new": [right for right, shot in zip(both, shots["pairs"], strict=True) if shot.names not in known],
        "beside": beside,
        "beside_new": [right for right, shot in zip(beside, shots["beside"], strict=False) if shot.is_new],
        "base_top1": found(judge, shots["base"], plain),
        "base_drift": [metrics.drift(a, b) for a, b in zip(plain, base, strict=True)],
        "picture": [metrics.picture_quality(picture) for picture in (*own, *drawn["beside"])],
    }
    return {name: [round(value, 5) for value in found] for name, found in values.items()}


def found(judge: Judge, shots: Sequence[Shot], pictures: Sequence[Image.Image]) -> list[float]:
    """1 for each picture in which everything that was asked for is found in its place, else 0.

    The look counts if a style was asked for.
    """
    pairs = ((shot.wanted, judged(judge, shot.wanted, picture)) for shot, picture in zip(shots, pictures, strict=True))
    return [float(all(seen.objects) and (seen.look or wanted.look == "plain")) for wanted, seen in pairs]


def save_strip(pictures: Sequence[Image.Image], path: Path) -> None:
    """Pictures of one size side by side, without loss."""
    if not pictures:
        return
    side = pictures[0].height
    strip = Image.new("RGB", (side * len(pictures), side))
    for place, picture in enumerate(pictures):
        strip.paste(picture, (side * place, 0))
    strip.save(path.with_suffix(".tmp"), "PNG")
    path.with_suffix(".tmp").replace(path)  # complete or not at all


def run(
    path: Path, plan: Plan, counts: Sequence[int], seeds: int, names: Sequence[str], host: Standalone, judge: Judge
) -> list[dict]:
    """Do what is not done yet, write the rows to `path` after every piece, and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "-".join(map(str, asdict(plan).values()))  # pictures of other plans are other pictures
    folder = path.with_name(f"{path.stem}-pictures") / kind
    folder.mkdir(parents=True, exist_ok=True)
    pieces = Pieces(path.with_suffix(".jsonl"), asdict(plan))
    order = [name for name in KNOWN if name in {*ALWAYS, *names}]
    keys = [(count, name, seed) for count in counts for seed in range(seeds) for name in order]
    with tqdm(total=len(keys), desc="pieces", unit="piece", file=sys.stderr) as bar:
        for key in keys:
            doing, drawn = f"{key[0]} concepts, {key[1]}, seed {key[2]}", itertools.count(1)
            tick = partial(_tell, bar, doing, drawn)
            bench = Bench(host, judge, plan, pieces, folder, tick)
            if key not in pieces.done:
                measure(bench, key, KNOWN[key[1]])
            here = rows([pieces.done[k] for k in sorted(keys, key=_reading(order)) if k in pieces.done])
            path.write_text(json.dumps({"rows": here}, indent=1) + "\n", encoding="utf-8")
            bar.update()
    return here


def _tell(bar: tqdm, doing: str, batches: Iterator[int], _: int) -> None:
    bar.set_postfix_str(f"{doing}, batch {next(batches)}")


def _reading(order: Sequence[str]) -> Callable[[tuple[int, str, int]], tuple]:
    return lambda key: (key[0], order.index(key[1]), key[2])


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser("benchmarks.quality", description=__doc__, allow_abbrev=False)
    options.add_argument("--quick", action="store_true", help="fewer pictures, 2 and 4 concepts, one seed, few methods")
    options.add_argument(
        "--json", type=Path, default=Path("out/quality.json"), metavar="FILE", help="default: %(default)s"
    )
    options.add_argument("--counts", type=_listed(range(1, len(CONCEPTS) + 1), int), help="numbers of concepts: 2,4,8")
    options.add_argument(
        "--methods",
        type=_listed(KNOWN, str),
        help=f"of {', '.join(CONTENDERS)} (default: these), and single ingredients: {', '.join(INGREDIENTS)}",
    )
    options.add_argument(
        "--columns", type=_listed(COLUMNS, str), default=COLUMNS, help=f"of the table: {', '.join(COLUMNS)}"
    )
    options.add_argument("--seeds", type=int, help=f"how many (default: {SEEDS})")
    options.add_argument("--device", help="cpu, cuda, … (default: the graphics card if there is one)")
    return options


def _listed(known: Sequence | dict, kind: type) -> Callable[[str], tuple]:
    def read(text: str) -> tuple:
        values = tuple(kind(part) for part in text.split(","))
        unknown = [value for value in values if value not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]}")
        return values

    return read


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    quiet()
    plan = scenes.QUICK if args.quick else Plan()
    counts = args.counts or (QUICK_COUNTS if args.quick else COUNTS)
    seeds = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    usual = QUICK_METHODS if args.quick else tuple(CONTENDERS)
    names = args.methods or usual
    result = run(args.json, plan, counts, seeds, names, open_miniature(args.device), Judge.load())
    print(report.text(table(result, args.columns)))


if __name__ == "__main__":
    main()
