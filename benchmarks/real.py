"""`python -m benchmarks.real`: the paper's Table 1 on a checkpoint and LoRAs of your own.

Merges are made by the benchmark's methods with their usual options: nothing is tuned. Each concept is drawn on the
same prompts from the same noise by its own LoRA (the row single) and by every merge. docs/benchmarks.md says how.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.contenders import CONTENDERS, Entry
from benchmarks.similarity import CLIP, Clip, Faces
from loraclr import files, report
from loraclr.capture import applied
from loraclr.changes import Changes
from loraclr.cli import quiet
from loraclr.concept import Concept, check
from loraclr.hosts.standalone import Standalone, open_checkpoint
from loraclr.report import Gallery, Mean, Shot, Table
from loraclr.result import begun

#: None of these is a prompt that a merge looks at.
SUBJECT = (
    "a portrait of {}", "{} in front of a castle", "{} on a beach at sunset", "{} in a library", "{} in deep snow",
    "{} wearing a straw hat", "{} in a busy street at night", "{} between sunflowers", "an oil painting of {}",
    "a pencil drawing of {}",
)  # fmt: skip
STYLE = (
    "a lighthouse by the sea, {}", "a village in the mountains, {}", "a bowl of fruit, {}", "an old man reading, {}",
    "a horse on a meadow, {}",
)  # fmt: skip
PAIR = ("{} and {} in a library", "{} and {} on a beach at sunset")
#: Measured pictures begin with noise from here on; a merge draws from its own small seed on.
NOISE = 1_000_000
METHODS = ("single", "sum", "average", "svd", "ties", "loraclr-closed", "loraclr-fast", "loraclr", "loraclr-best")
FIGURES = {"text": "text alignment", "image": "image alignment", "identity": "identity alignment"}
NOTE = """\
± is one standard error over pictures; Δ: merged − single, same prompt and noise. text: CLIP's cosine of a picture and
its prompt, the class words in place of the trigger. image: CLIP's cosine to the concept's references, averaged.
identity: ArcFace's cosine of the largest face and the references' mean face, 0 where no face is found. two: two
concepts in one picture, the worse of both, each with the face that suits it best; 0 unless there are two faces; of
single, the LoRAs of both are stacked in the prompt. Without pictures of one's own the references are pictures by the
concept's own LoRA, from other noise."""


@dataclass(frozen=True)
class Asked:
    """One concept of the list: what to merge, what to call its class, and pictures of it (none: drawn)."""

    concept: Concept
    kind_word: str
    references: Sequence[Image.Image] = ()

    @property
    def templates(self) -> tuple[str, ...]:
        return STYLE if self.concept.kind == "style" else SUBJECT


@dataclass(frozen=True)
class Plan:
    """How pictures are drawn: from how many noises each prompt, and how."""

    pictures: int = 2
    steps: int = 30
    guidance: float = 7.0
    seed: int = 0


@dataclass
class Found:
    """One method's pictures and figures: concept by concept, prompt by prompt, noise by noise."""

    pictures: list[list[Image.Image]] = field(default_factory=list)
    pairs: list[Image.Image] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*FIGURES, "two")})
    refused: str = ""


def read(path: Path) -> list[Asked]:
    """The list of concepts, a JSON file; its paths are relative to it.

    Raises:
        ValueError: one sentence for whatever is wrong.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    asked = []
    for place, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        missing = [name for name in ("lora", "trigger", "class") if not (isinstance(entry, dict) and entry.get(name))]
        if missing:
            raise ValueError(f'{path}: concept {place} has no "{missing[0]}".')
        if entry.get("kind", "subject") not in ("subject", "style"):
            raise ValueError(f'{path}: concept {place} is of kind "{entry["kind"]}": choose subject or style.')
        if not isinstance(entry.get("weight", 1.0), int | float):
            raise ValueError(f'{path}: concept {place} has weight "{entry["weight"]}": give a number.')
        lora, folder = files.load(path.parent / entry["lora"]), entry.get("references")
        concept = Concept(lora, entry["trigger"], entry.get("weight", 1.0), kind=entry.get("kind", "subject"))
        asked.append(Asked(concept, entry["class"], pictures_in(path.parent / folder) if folder else ()))
    return asked


def pictures_in(folder: Path) -> list[Image.Image]:
    """Every picture of a folder.

    Raises:
        ValueError: it holds none.
    """
    found = []
    for path in sorted(folder.glob("*")):
        with suppress(OSError):  # is no picture
            found.append(Image.open(path).convert("RGB"))
    if not found:
        raise ValueError(f"{folder} holds no pictures: leave its references out, or give a folder of photographs.")
    return found


def run(
    host: Standalone,
    asked: Sequence[Asked],
    methods: Sequence[str],
    plan: Plan,
    clip: Clip,
    faces: Callable[[Image.Image], np.ndarray] | None,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Found]:
    """Merge, draw and measure; single is always there, and first."""
    merge = begun([one.concept for one in asked], None)
    asked = [Asked(c, one.kind_word, one.references) for c, one in zip(merge.concepts, asked, strict=True)]
    results: dict[str, Found] = {}
    entry = CONTENDERS["single"].run(host, merge.concepts, plan.seed, {})
    with host.words(merge.words):
        tell("references")
        references = [
            one.references or _drawn(host, entry.changes((place,)), one, plan, True) for place, one in enumerate(asked)
        ]
    known = [clip.pictures(pictures) for pictures in references]
    people = [_mean_face(pictures, faces) for pictures in references] if faces else []
    for method in ("single", *(name for name in methods if name != "single")):
        tell(method)
        found = results[method] = Found()
        try:
            entry = CONTENDERS[method].run(host, merge.concepts, plan.seed, {})
        except ValueError as error:
            found.refused = str(error)
            continue
        with host.words(merge.words):
            draw(host, entry, asked, plan, found)
        for place, (one, pictures) in enumerate(zip(asked, found.pictures, strict=True)):
            mine = clip.pictures(pictures)
            prompts = [template.format(one.kind_word) for template in one.templates for _ in range(plan.pictures)]
            found.values["text"] += (mine * clip.texts(prompts)).sum(1).tolist()
            found.values["image"] += (mine @ known[place].T).mean(1).tolist()
            if faces and people[place] is not None:
                found.values["identity"] += [_likeness(faces(picture)[:1], people[place]) for picture in pictures]
        if faces and found.pairs:
            found.values["two"] = _two(found.pairs, people, _pairs(asked), faces)
    return results


def draw(host: Standalone, entry: Entry, asked: Sequence[Asked], plan: Plan, found: Found) -> None:
    """Every concept on its prompts, and pairs in one picture."""
    found.pictures = [_drawn(host, entry.changes((place,)), one, plan) for place, one in enumerate(asked)]
    for left, right in _pairs(asked):
        prompts = [t.format(asked[left].concept.trigger, asked[right].concept.trigger) for t in PAIR]
        found.pairs += _sample(host, entry.changes((left, right)), prompts, plan, plan.seed + NOISE + 9000)


def _pairs(asked: Sequence[Asked]) -> list[tuple[int, int]]:
    """Neighbours in the list; styles take no part."""
    places = [place for place, one in enumerate(asked) if one.concept.kind != "style"]
    return list(zip(places, places[1:], strict=False))


def _drawn(host: Standalone, changes: Changes, one: Asked, plan: Plan, references: bool = False) -> list[Image.Image]:
    begin = plan.seed + NOISE + (5000 if references else 0)
    texts = [template.format(one.concept.trigger) for template in one.templates for _ in range(plan.pictures)]
    return _sample(host, changes, texts, plan, begin)


def _sample(host: Standalone, changes: Changes, prompts: list[str], plan: Plan, seed: int) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    with applied(host.layers(), changes):
        for place, prompt in enumerate(prompts):  # one by one: full-size models fill the memory
            pictures += host.sample([prompt], seed + place, plan.steps, plan.guidance, host.size, host.size)
    return pictures


def _mean_face(pictures: Sequence[Image.Image], faces: Callable) -> np.ndarray | None:
    """The mean of the largest faces, of length 1; None if no picture shows one."""
    found = [embeddings[0] for embeddings in map(faces, pictures) if len(embeddings)]
    mean = np.mean(found, axis=0) if found else None
    return None if mean is None else mean / np.linalg.norm(mean)


def _likeness(found: np.ndarray, person: np.ndarray) -> float:
    """The best cosine of the faces found with a person, 0 if there is none."""
    return float((found @ person).max()) if len(found) else 0.0


def _two(pictures: Sequence[Image.Image], people: Sequence, pairs: Sequence[tuple[int, int]], faces: Callable) -> list:
    """For every picture of a pair how well the worse of both is found; 0 unless there are two faces."""
    values, each = [], iter(pictures)
    for left, right in pairs:
        for picture in (next(each) for _ in PAIR):
            found = faces(picture)
            if people[left] is not None and people[right] is not None:
                worse = min(_likeness(found, people[left]), _likeness(found, people[right]))
                values.append(worse if len(found) > 1 else 0.0)
    return values


def rows(results: Mapping[str, Found]) -> list[dict]:
    """One row for each method; a figure that was not measured is None."""
    single, lines = results["single"], []
    for method, found in results.items():
        line: dict = {"method": method, "refused": found.refused}
        for name in (*FIGURES, "two"):
            mean = Mean(tuple(found.values[name]))
            line[name] = mean.value if mean.values else None
            line[f"{name}_se"] = mean.error if len(mean.values) > 1 else None
        for name in FIGURES:
            pairs = zip(found.values[name], single.values[name], strict=not found.refused)
            delta = Mean(tuple(a - b for a, b in pairs))
            line[f"{name}_delta"] = delta.value if delta.values else None
            line[f"{name}_delta_se"] = delta.error if len(delta.values) > 1 else None
        lines.append(line)
    return lines


def table(found: Sequence[Mapping]) -> Table:
    """The rows as the paper's Table 1 has them."""
    columns = ["", *(head for title in FIGURES.values() for head in (title, "Δ")), "two"]
    lines = [
        [row["method"], *(_cell(row, key) for name in FIGURES for key in (name, f"{name}_delta")), _cell(row, "two")]
        for row in found
    ]
    refused = [f"{row['method']}: {row['refused']}" for row in found if row["refused"]]
    return Table("Merged against single", columns, lines, "\n".join([NOTE, *refused]))


def _cell(row: Mapping, key: str) -> str:
    if row[key] is None:
        return "–"
    error = row[f"{key}_se"]
    return f"{row[key]:{'+' if key.endswith('_delta') else ''}.3f}" + ("" if error is None else f" ± {error:.3f}")


def galleries(results: Mapping[str, Found], asked: Sequence[Asked]) -> list[Gallery]:
    """One for each concept, and one of pairs: a row for each method."""
    drawn = {method: found for method, found in results.items() if not found.refused}
    each = []
    for place, one in enumerate(asked):
        lines = [(m, "", [Shot(picture) for picture in found.pictures[place][:5]]) for m, found in drawn.items()]
        each.append(Gallery(one.concept.lora.name, [""] * len(lines[0][2]), lines))
    lines = [(m, "", [Shot(picture) for picture in found.pairs[:5]]) for m, found in drawn.items() if found.pairs]
    if lines:
        each.append(Gallery("Two in one picture", [""] * len(lines[0][2]), lines))
    return each


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser("benchmarks.real", description=__doc__, allow_abbrev=False)
    options.add_argument("--checkpoint", type=Path, required=True, help="Stable Diffusion 1.x, 2.x or XL")
    options.add_argument(
        "--concepts", type=Path, required=True, metavar="FILE.json",
        help='[{"lora": FILE, "trigger": WORDS, "class": WORDS, "references": FOLDER}, …]; see docs/benchmarks.md',
    )  # fmt: skip
    options.add_argument("--output", type=Path, default=Path("out/real"), help="default: %(default)s")
    options.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    options.add_argument("--clip", default=CLIP, help="folder or name of a CLIP model (default: %(default)s)")
    options.add_argument("--pictures", type=int, default=Plan.pictures, help="for each prompt (default: %(default)s)")
    options.add_argument("--steps", type=int, default=Plan.steps, help="default: %(default)s")
    options.add_argument("--guidance", type=float, default=Plan.guidance, help="default: %(default)s")
    options.add_argument("--seed", type=int, default=0, help="default: 0")
    options.add_argument("--device", help="cpu, cuda, … (default: the graphics card if there is one)")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    args = options.parse_args(argv)
    quiet()
    methods = args.methods.split(",")
    unknown = [name for name in methods if name not in CONTENDERS]
    if unknown:
        options.error(f"there is no method {unknown[0]}; there are {', '.join(CONTENDERS)}")
    try:
        asked = read(args.concepts)
        host = open_checkpoint(args.checkpoint, args.device)
        check(host, [one.concept for one in asked])
        clip = Clip(args.clip, host.device)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        options.error(str(error))
    try:
        faces = Faces()
    except ImportError:
        faces = None
        print("insightface is not installed: identity is not measured.", file=sys.stderr)
    plan = Plan(args.pictures, args.steps, args.guidance, args.seed)
    with tqdm(total=len({"single", *methods}) + 1, unit="method", file=sys.stderr) as bar:

        def tell(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        results = run(host, asked, methods, plan, clip, faces, tell)
    found = rows(results)
    (args.output / "rows.json").write_text(json.dumps({"rows": found}, indent=1) + "\n", encoding="utf-8")
    parts = [table(found), *galleries(results, asked)]
    (args.output / "report.html").write_text(report.page("Merged LoRAs", host.checkpoint.name, parts), encoding="utf-8")
    print(report.text(table(found)))
    print(f"Report: {args.output / 'report.html'}")


if __name__ == "__main__":
    main()
