"""The merge: from concept LoRAs to one LoRA, stage by stage. The only loop over concepts and layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from loraclr import capture, files
from loraclr.capture import Bank, Changes
from loraclr.factor import truncate
from loraclr.hosts import Host
from loraclr.keys import Family
from loraclr.lora import Layer, LoRA
from loraclr.polish import held_out, polish
from loraclr.solve import Statistics

Kind = Literal["subject", "style"]
Speed = Literal["closed", "fast", "balanced", "best"]

#: Stage in words, share of the whole work done (0 to 1), seconds left (None: not known yet). May raise Cancelled.
Progress = Callable[[str, float, float | None], None]

POLISH_STEPS: dict[Speed, int] = {"closed": 0, "fast": 50, "balanced": 200, "best": 800}
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "gray")
SUBJECT_PROMPTS = (
    "a photo of a {}", "a {}", "a {} on a red background", "a {} on a white background", "a {} and a dog on a blue background",
    "a {} on a green background", "a {} on a gray background", "a cat and a {} on a yellow background",
)  # fmt: skip
STYLE_PROMPTS = (
    "a cat in {}", "a house on a white background in {}", "a photo of a car in {}", "a tree on a blue background in {}",
    "a dog and a boat on a red background in {}", "an apple in {}", "a fish on a yellow background in {}", "a bird on a green background in {}",
)  # fmt: skip
NEUTRAL_PROMPTS = (
    "a photo of a dog", "a cat on a red background", "a house on a blue background", "a car and a tree on a white background",
    "a fish on a green background", "a bird and a boat on a yellow background", "a cake on a gray background", "an apple",
)  # fmt: skip


class Cancelled(Exception):
    """The user stopped the merge; nothing was written."""


@dataclass(frozen=True)
class Concept:
    """One LoRA to merge.

    Attributes:
        trigger: the words that call it.
        weight: strength for the UNet, and for the text encoder unless `text_weight` is given. Any real number but 0.
        kind: a style changes how everything is drawn, so other prompts are looked at.
        prompts: what to look at, `{}` standing for the trigger; empty for the usual ones.
    """

    lora: LoRA
    trigger: str
    weight: float = 1.0
    text_weight: float | None = None
    kind: Kind = "subject"
    prompts: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """The prompts with the trigger in them."""
        usual = STYLE_PROMPTS if self.kind == "style" else SUBJECT_PROMPTS
        return [prompt.replace("{}", self.trigger) for prompt in self.prompts or usual]


@dataclass(frozen=True)
class Settings:
    """How to merge; the defaults are for every number and kind of LoRAs.

    Attributes:
        speed: how long to polish (POLISH_STEPS).
        rank: largest rank of the result; None keeps it exact, the sum of the LoRAs' ranks.
        neutral: weight of what must not change (the base model on neutral prompts) in the polish.
        anchor: the same in the closed form.
        ridge: of the closed form, relative to the mean diagonal of the inputs' Gram matrix.
        steps, guidance, size: how the host draws the pictures that are looked at; size None: the model's own.
        tokens: places of a picture that a layer's statistics take at a time; the rest are skipped at random.
        batch: pictures drawn at a time.
    """

    speed: Speed = "fast"
    rank: int | None = None
    neutral: float = 0.3
    anchor: float = 0.1
    ridge: float = 1e-3
    steps: int = 10
    guidance: float = 5.0
    size: int | None = None
    tokens: int = 256
    batch: int = 4
    neutral_prompts: tuple[str, ...] = NEUTRAL_PROMPTS
    seed: int = 0


@dataclass
class Merge:
    """The result: layers of one LoRA, and what is known about them.

    Attributes:
        missed: per concept name the share of its effect that the merge misses on held-out steps (0 is perfect),
            after the closed form and after the polish.
        seconds: wall-clock time by stage.
    """

    family: Family
    layers: dict[str, Layer]
    concepts: list[Concept]
    settings: Settings
    missed: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def prompt(self, name: str) -> str:
        """What to type to use the merged file under this name."""
        return f"<lora:{name}:1> {self.triggers}"

    @property
    def triggers(self) -> str:
        """Every concept's trigger words."""
        return ", ".join(concept.trigger for concept in self.concepts)

    def recipe(self) -> dict:
        """Everything needed to run the same merge again, for the file's metadata."""
        concepts = [
            {
                "file": concept.lora.path.name if concept.lora.path else concept.lora.name,
                "hash": concept.lora.metadata.get("sshs_model_hash", ""),
                **{key: value for key, value in asdict_shallow(concept).items() if key != "lora"},
            }
            for concept in self.concepts
        ]
        return {"method": "loraclr", "concepts": concepts, "settings": asdict(self.settings), "missed": self.missed}


def asdict_shallow(concept: Concept) -> dict:
    """A concept's fields without copying its LoRA's tensors."""
    return {name: getattr(concept, name) for name in concept.__dataclass_fields__}


class _Clock:
    """Turns work done into progress with time left, and times the stages."""

    def __init__(self, progress: Progress, whole: float) -> None:
        self.progress, self.whole, self.done = progress, whole, 0.0
        self.start = self.since = time.monotonic()
        self.seconds: dict[str, float] = {}

    def tick(self, stage: str, work: float) -> None:
        self.done = min(self.whole, self.done + work)
        spent, share = time.monotonic() - self.start, self.done / self.whole
        self.progress(stage, share, spent * (1 - share) / share if share > 0.02 else None)

    def end(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = now - self.since
        self.since = now


def check(host: Host, concepts: Sequence[Concept]) -> None:
    """Refuse what cannot be merged.

    Raises:
        ValueError: one sentence that names the LoRA and says what to do.
    """
    if not concepts:
        raise ValueError("No LoRA is chosen: choose at least one.")
    modules = host.layers()
    for concept in concepts:
        lora = concept.lora
        if not concept.trigger.strip():
            raise ValueError(f"{lora.name} has no trigger words: write the words that call it into its row.")
        if not math.isfinite(concept.weight) or concept.weight == 0:
            raise ValueError(
                f"{lora.name} has weight {concept.weight}: give it a number other than 0, or leave it out."
            )
        if lora.family != host.family:
            raise ValueError(
                f"{lora.name} is for {lora.family.upper()}, but the loaded checkpoint is {host.family.upper()}."
            )
        missing = sorted(set(lora.layers) - set(modules))
        if missing:
            raise ValueError(
                f"{lora.name} has layers that the loaded model lacks, {missing[0]} among them: is it for another model?"
            )
        for name, layer in lora.layers.items():
            weight = modules[name].weight
            if (layer.up.shape[0], layer.down.shape[1]) != (weight.shape[0], weight[0].numel()):
                raise ValueError(
                    f"{lora.name} does not fit the loaded model: its {name} is {layer.up.shape[0]}×{layer.down.shape[1]}, "
                    f"the model's {weight.shape[0]}×{weight[0].numel()}. It was made for another model family."
                )


def merge(
    host: Host, concepts: Sequence[Concept], settings: Settings | None = None, progress: Progress = lambda *_: None
) -> Merge:
    """Merge concept LoRAs into one.

    Stages: the text encoder is solved in closed form; then cross-attention keys and values, fed by the merged text
    encoder; then the UNet's other layers, from each concept's own denoising run; then the factors of all layers are
    polished together on what those runs predicted.

    Raises:
        ValueError: see `check`.
        Cancelled: `progress` may raise it to stop; the model is left as it was.
    """
    settings = settings or Settings()
    check(host, concepts)
    size = settings.size or host.size
    asked = [capture.changes_of(c.lora, c.weight, c.text_weight) for c in concepts]
    prompts = [*(c.sentences() for c in concepts), list(settings.neutral_prompts)]
    touched = {name for changes in asked for name in changes}
    batch = max(4, min(32, 8192 * 64 // size**2))
    drawn = sum(2 * len(texts) for texts in prompts) * settings.steps
    clock = _Clock(progress, drawn + 3 * batch * POLISH_STEPS[settings.speed] + 0.02 * drawn * len(prompts))
    result = Merge(host.family, {}, list(concepts), settings, seconds=clock.seconds)

    with host.session():
        modules = {name: module for name, module in host.layers().items() if name in touched}
        solver = _Solver(host, modules, asked, settings)
        merged: dict[str, tuple[Tensor, Tensor]] = {}

        for place, texts in enumerate(prompts):
            clock.tick("Looking at the text encoder", 0.01 * drawn)
            with capture.applied(modules, solver.changes(place)):
                solver.watch(place, capture.is_text, lambda texts=texts: host.encode([*texts, ""]))
        merged.update(solver.solve())

        for place, texts in enumerate(prompts):
            clock.tick("Fitting words to pictures", 0.01 * drawn)
            with capture.applied(modules, merged), torch.no_grad():
                context = host.encode([*texts, ""]).float()
            for name in filter(capture.is_cross_kv, modules):
                solver.add(place, name, context)
        merged.update(solver.solve())
        clock.end("text")

        banks = []
        for place, texts in enumerate(prompts):
            name = concepts[place].lora.name if place < len(concepts) else "what must not change"
            bank = Bank([*texts, ""])
            with capture.applied(modules, solver.changes(place)):
                with torch.no_grad():
                    contexts = host.encode(bank.prompts)
                for begin in range(0, len(texts), settings.batch):
                    part = texts[begin : begin + settings.batch]
                    clock.tick(f"Looking at {name}", 0.0)

                    def draw(part: list[str] = part, seed: int = settings.seed + begin) -> None:
                        host.sample(part, seed, settings.steps, settings.guidance, size, size)

                    record = capture.filing(bank, contexts)

                    def tell(*call: Tensor, name: str = name, record=record) -> None:
                        record(*call)
                        clock.tick(f"Looking at {name}", call[0].shape[0])

                    with host.watch(tell):
                        solver.watch(
                            place, lambda layer: not (capture.is_text(layer) or capture.is_cross_kv(layer)), draw
                        )
            banks.append(bank)
        clock.end("capture")
        clock.tick("Fitting the picture layers", 0.0)
        merged.update(solver.solve())
        clock.end("solve")

        closed = held_out(host, modules, merged, banks, batch)
        polished = closed
        if POLISH_STEPS[settings.speed]:
            shares = [1.0] * len(concepts) + [settings.neutral * len(concepts)]
            merged = polish(
                host, modules, merged, banks, shares, POLISH_STEPS[settings.speed], batch, settings.seed,
                lambda step, loss: clock.tick("Polishing", 3 * batch),
            )  # fmt: skip
            polished = held_out(host, modules, merged, banks, batch)
        clock.end("polish")

        for name, (up, down) in merged.items():
            up, down = truncate(up.cpu(), down.cpu(), settings.rank, solver.grams.get(name))
            conv = isinstance(modules[name], nn.Conv2d)
            kernel = tuple(modules[name].kernel_size) if conv else (1, 1)
            result.layers[name] = Layer(up, down, float(up.shape[1]), conv, kernel)
        clock.end("factor")
    result.missed = {c.lora.name: (closed[place], polished[place]) for place, c in enumerate(concepts)}
    progress("Done", 1.0, 0.0)
    return result


class _Solver:
    """Statistics of all layers that are being watched, and their closed form."""

    def __init__(self, host: Host, modules: dict[str, nn.Module], asked: list[Changes], settings: Settings) -> None:
        self.host, self.modules, self.asked, self.settings = host, modules, asked, settings
        self.statistics: dict[str, Statistics] = {}
        self.grams: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(settings.seed)

    def changes(self, place: int) -> Changes:
        """What concept `place` asks for; the neutral one, behind the last, asks for nothing."""
        return self.asked[place] if place < len(self.asked) else {}

    def add(self, place: int, name: str, rows: Tensor) -> None:
        """Count a layer's inputs (B, tokens, d) for concept `place`, `tokens` of each picture at most."""
        if rows.shape[1] > self.settings.tokens:
            chosen = torch.randperm(rows.shape[1], generator=self.generator)[: self.settings.tokens]
            rows = rows[:, chosen.to(rows.device)]
        if name not in self.statistics:
            asked = [changes.get(name) for changes in self.asked]
            self.statistics[name] = Statistics(rows.shape[-1], [*asked, None], device=self.host.device)
        weight = 1.0 if place < len(self.asked) else self.settings.anchor * len(self.asked)
        if weight:
            self.statistics[name].add(place, rows.float(), weight)

    def watch(self, place: int, wanted: Callable[[str], bool], run: Callable[[], object]) -> None:
        """Run the model and count what the wanted layers see."""
        layers = {name: module for name, module in self.modules.items() if wanted(name)}
        with torch.no_grad(), capture.observed(layers, lambda name, rows: self.add(place, name, rows)):
            run()

    def solve(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The closed form of every layer watched since the last time; their sums are dropped, their Grams kept if needed."""
        solved = {}
        for name, statistics in self.statistics.items():
            solved[name] = tuple(value.float() for value in statistics.solve(self.settings.ridge))
            if self.settings.rank is not None:
                self.grams[name] = statistics.gram.cpu()
        self.statistics = {}
        return solved


def write(merge: Merge, path: str | Path, dtype: torch.dtype = torch.float16, overwrite: bool = False) -> Path:
    """Write the merged LoRA with metadata and sidecar.

    Raises:
        FileExistsError: the file is there and `overwrite` is not set.
    """
    path = Path(path)
    sources = [concept.lora.name for concept in merge.concepts]
    triggers = [concept.trigger for concept in merge.concepts]
    metadata = files.lora_metadata(merge.family, merge.layers, sources, triggers, merge.recipe())
    files.save(path, merge.layers, metadata, dtype, overwrite)
    notes = "Merged by LoRACLR from " + ", ".join(f"{s} ({t})" for s, t in zip(sources, triggers, strict=True)) + "."
    files.write_sidecar(path, merge.triggers, merge.family, notes)
    return path
