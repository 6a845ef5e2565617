"""The merge: from concept LoRAs to one LoRA, stage by stage. The only loop over concepts and layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loraclr import capture, files, prompts, scenes
from loraclr.capture import Bank, Changes
from loraclr.factor import Rank, truncate
from loraclr.formats import Norm
from loraclr.hosts import Host
from loraclr.keys import Family
from loraclr.lora import Layer, LoRA
from loraclr.polish import missed, polish
from loraclr.solve import Change, Statistics

Speed = Literal["closed", "fast", "balanced", "best"]

#: (layer name, module, the concepts' changes of it, device) → what counts the layer's inputs and solves it.
Fit = Callable[[str, nn.Module, Sequence[Change | None], torch.device], Statistics]

#: Stage in words, share of the whole work done (0 to 1), seconds left (None: not known yet). May raise Cancelled.
Progress = Callable[[str, float, float | None], None]

POLISH_STEPS: dict[Speed, int] = {"closed": 0, "fast": 50, "balanced": 200, "best": 800}


class Cancelled(Exception):
    """The user stopped the merge; nothing was written."""


@dataclass(frozen=True)
class Concept:
    """One LoRA to merge.

    Attributes:
        trigger: the words that call it.
        weight: strength for the UNet, and for the text encoder unless `text_weight` is given; any real number.
        blocks: for each block what its strength is multiplied by, as `loraclr.blocks.block_weights` returns it.
        kind: a style changes how everything is drawn, so other prompts are looked at.
        prompts: what to look at, `{}` standing for the trigger; empty for the usual ones.
    """

    lora: LoRA
    trigger: str
    weight: float = 1.0
    text_weight: float | None = None
    kind: prompts.Kind = "subject"
    prompts: tuple[str, ...] = ()
    blocks: Mapping[str, float] | None = None

    def strength(self, name: str) -> float:
        """How much of the LoRA's change a layer gets, 0 for a layer that is left alone."""
        return capture.strength(name, self.lora.family, self.weight, self.text_weight, self.blocks)

    def changes(self, modules: Mapping[str, nn.Module]) -> Changes:
        """What the concept asks for, see `loraclr.capture.changes_of`."""
        return capture.changes_of(self.lora, modules, self.weight, self.text_weight, self.blocks)


@dataclass(frozen=True)
class Settings:
    """How to merge; the defaults are for every number and kind of LoRAs.

    Attributes:
        speed: how long to polish (POLISH_STEPS).
        rank: largest rank of the result; None keeps it exact, the sum of the LoRAs' ranks; "auto" takes for each layer
            the smallest that keeps 99.5 % of its output energy.
        neutral: weight of what must not change (the base model on neutral prompts) in the polish.
        anchor: the same in the closed form.
        scenes: pictures of two concepts side by side to learn from, for each concept; styles take no part.
        binding: weight of these scenes in the polish, relative to the pictures of one concept.
        ridge: of the closed form, relative to the mean diagonal of the inputs' Gram matrix.
        steps, guidance, size: how the host draws the pictures that are looked at; size None: the model's own.
        tokens: places of a picture that a layer's statistics take at a time; the rest are skipped at random.
        batch: pictures drawn at a time.
    """

    speed: Speed = "fast"
    rank: Rank = None
    neutral: float = 0.3
    anchor: float = 0.0
    scenes: int = 0
    binding: float = 0.5
    ridge: float = 1e-3
    steps: int = 16
    guidance: float = 4.0
    size: int | None = None
    tokens: int = 256
    batch: int = 4
    neutral_prompts: tuple[str, ...] = prompts.NEUTRAL
    seed: int = 0


@dataclass
class Merge:
    """The result: layers of one LoRA, and what is known about them.

    Attributes:
        settings: a dataclass of what the method was told.
        method: its name in `loraclr.methods`.
        missed: per concept name the share of its effect that the merge misses on a picture that it has not learnt from
            (0 is perfect), after the closed form and after the polish.
        seconds: wall-clock time by stage.
    """

    family: Family
    concepts: list[Concept]
    settings: Any
    method: str = "loraclr"
    layers: dict[str, Layer] = field(default_factory=dict)
    missed: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def prompt(self, name: str) -> str:
        """What to type to use the merged file under this name."""
        return f"<lora:{name}:1> {self.triggers}".rstrip()

    @property
    def triggers(self) -> str:
        """Every concept's trigger words."""
        return ", ".join(concept.trigger for concept in self.concepts if concept.trigger)

    def recipe(self) -> dict:
        """Everything needed to run the same merge again, for the file's metadata."""
        concepts = [
            {
                "file": concept.lora.path.name if concept.lora.path else concept.lora.name,
                "hash": concept.lora.metadata.get("sshs_model_hash", ""),
                "trigger": concept.trigger,
                "weight": concept.weight,
                "text_weight": concept.text_weight,
                "kind": concept.kind,
                "prompts": concept.prompts,
                "blocks": concept.blocks,
            }
            for concept in self.concepts
        ]
        return {"method": self.method, "concepts": concepts, "settings": asdict(self.settings), "missed": self.missed}


def check(host: Host, concepts: Sequence[Concept]) -> None:
    """Refuse what cannot be merged.

    Raises:
        ValueError: one sentence that names the LoRA and says what to do.
    """
    if not concepts:
        raise ValueError("No LoRA is chosen: choose at least one.")
    modules = host.layers()
    for concept in concepts:
        name, lora = concept.lora.name, concept.lora
        if not concept.trigger.strip():
            raise ValueError(f"{name} has no trigger words: write the words that call it into its row.")
        check_weights(concept)
        if lora.family != host.family:
            raise ValueError(
                f"{name} is for {lora.family.upper()}, but the loaded checkpoint is {host.family.upper()}."
            )
        norms = sorted(layer_name for layer_name, layer in lora.layers.items() if isinstance(layer, Norm))
        if norms:
            raise ValueError(f"{name} changes norm layers ({norms[0]}), which cannot be merged yet: leave it out.")
        missing = sorted(set(lora.layers) - set(modules))
        if missing:
            raise ValueError(f"{name} has layers that the loaded model lacks ({missing[0]}): it is for another model.")
        for layer_name, layer in lora.layers.items():
            lora.check_fits(layer_name, modules[layer_name].weight)
            if layer.bias is not None:
                raise ValueError(
                    f"{name} changes biases ({layer_name}), which cannot be merged yet: leave it out of the merge."
                )


def check_weights(concept: Concept) -> None:
    """Refuse weights that are no numbers, or that leave nothing of the LoRA.

    Raises:
        ValueError: one sentence that names the LoRA.
    """
    name, blocks = concept.lora.name, concept.blocks or {}
    given = {"weight": concept.weight, "text weight": concept.text_weight}
    given |= {f"block weight {block}": weight for block, weight in blocks.items()}
    for what, weight in given.items():
        if weight is not None and not math.isfinite(weight):
            raise ValueError(f"{name} has {what} {weight:g}: give it a number.")
    if not any(map(concept.strength, concept.lora.layers)):
        raise ValueError(f"{name} has weight 0 in every layer that it changes: give it another one, or leave it out.")


def by_closed_form(name: str, module: nn.Module, changes: Sequence[Change | None], device: torch.device) -> Statistics:
    """The usual fit of a layer."""
    return Statistics(module.weight[0].numel(), changes, device=device)


def merge(
    host: Host,
    concepts: Sequence[Concept],
    settings: Settings | None = None,
    progress: Progress = lambda *_: None,
    fit: Fit = by_closed_form,
) -> Merge:
    """Merge concept LoRAs into one.

    Stages: the text encoder is solved in closed form; then cross-attention keys and values, fed by the merged text
    encoder; then the UNet's other layers, from each concept's own denoising run; then the factors of all layers are
    polished together on what those runs predicted. `fit` solves a layer in another way than the closed form.

    Raises:
        ValueError: see `check`.
        Cancelled: `progress` may raise it to stop; the model is left as it was.
    """
    settings = settings or Settings()
    check(host, concepts)
    result = Merge(host.family, list(concepts), settings)
    with host.session():
        run = _Run(host, concepts, settings, progress, fit)
        run.fit_text()
        run.fit_cross_attention()
        result.seconds["text"] = run.lap()
        for place in range(len(run.texts)):
            run.look(place)
        run.compose()
        result.seconds["capture"] = run.lap()
        run.solve("Fitting the picture layers")
        result.seconds["solve"] = run.lap()
        closed, polished = run.polish()
        result.seconds["polish"] = run.lap()
        result.layers = run.layers()
    result.missed = {concept.lora.name: (closed[place], polished[place]) for place, concept in enumerate(concepts)}
    progress("Done", 1.0, 0.0)
    return result


class _Run:
    """One merge under way: the statistics gathered so far, the factors solved so far, and the progress.

    Number `len(concepts)`, behind the last concept, stands for what must not change: the base on neutral prompts.
    """

    def __init__(
        self, host: Host, concepts: Sequence[Concept], settings: Settings, progress: Progress, fit: Fit
    ) -> None:
        self.host, self.settings, self.progress, self.fit = host, settings, progress, fit
        self.triggers = [None if concept.kind == "style" else concept.trigger for concept in concepts]
        self.names = [concept.lora.name for concept in concepts] + ["what must not change"]
        live = host.layers()
        self.asked: list[Changes] = [
            *(concept.changes(live) for concept in concepts),
            {},
        ]
        self.texts = [
            *(prompts.filled(concept.trigger, concept.kind, concept.prompts) for concept in concepts),
            list(settings.neutral_prompts),
        ]
        touched = {name for changes in self.asked for name in changes}
        self.modules = {name: module for name, module in live.items() if name in touched}
        self.size = settings.size or host.size
        self.rows = max(4, min(32, 8192 * 64 // self.size**2))  # in a step of polish: as many as small memory holds
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.statistics: dict[str, Statistics] = {}
        self.merged: dict[str, tuple[Tensor, Tensor]] = {}
        self.banks: list[Bank] = []
        self.joint: list[Bank] = []  # two concepts in one picture
        self.held: list[Bank] = []  # one more picture of each concept, not learnt from but measured on

        # Work is counted in rows through the UNet; a step of polish also goes backwards, which counts twice.
        self.plan = scenes.plan(self.triggers, settings.scenes * len(concepts) if settings.speed != "closed" else 0)
        drawn = 2 * (sum(len(texts) + 1 for texts in self.texts) + 2 * len(self.plan)) * settings.steps
        self.whole, self.done = 1.1 * drawn + 3 * self.rows * POLISH_STEPS[settings.speed], 0.0
        self.small = 0.1 * drawn / (2 * len(self.texts) + 1)
        self.started = self.lapped = time.monotonic()

    def tick(self, stage: str, work: float = 0.0) -> None:
        """Tell the progress; it may raise Cancelled."""
        self.done = min(self.whole, self.done + work)
        share, spent = self.done / self.whole, time.monotonic() - self.started
        self.progress(stage, share, spent * (1 - share) / share if share > 0.02 else None)

    def lap(self) -> float:
        """Seconds since the last lap."""
        now, before = time.monotonic(), self.lapped
        self.lapped = now
        return now - before

    def fit_text(self) -> None:
        """Stage 1: each concept's own text encoder reads its prompts."""
        for place, texts in enumerate(self.texts):
            self.tick("Looking at the words", self.small)
            with capture.applied(self.modules, self.asked[place]), self.watching(place, capture.is_text):
                self.host.encode([*texts, ""])
        self.solve("Fitting the text encoder")

    def fit_cross_attention(self) -> None:
        """Stage 2: keys and values of cross-attention see what the merged text encoder says."""
        for place, texts in enumerate(self.texts):
            self.tick("Fitting words to pictures", self.small)
            with capture.applied(self.modules, self.merged), torch.no_grad():
                context = self.host.encode([*texts, ""])
            for name in filter(capture.is_cross_kv, self.modules):
                self.add(place, name, context)
        self.solve("Fitting words to pictures")

    def look(self, place: int) -> None:
        """Stage 3: draw with one concept's own LoRA, count what the picture layers see, keep what the UNet predicts."""
        texts = self.texts[place]

        def picture_layer(name: str) -> bool:
            return not (capture.is_text(name) or capture.is_cross_kv(name))

        with capture.applied(self.modules, self.asked[place]), torch.no_grad():
            with self.watching(place, picture_layer):
                self.banks.append(self.draw(place, texts, 0))
            self.held.append(self.draw(place, texts[:1], len(texts)))

    def compose(self) -> None:
        """Draw several concepts in one picture, each region by its own LoRA."""
        settings, host = self.settings, self.host
        for begin in range(0, len(self.plan), settings.batch):
            part, seed = self.plan[begin : begin + settings.batch], settings.seed + 1000 + begin
            self.tick(stage := "Looking at two in one picture")
            bank, _ = scenes.draw(
                host, self.modules, self.asked, part, seed, settings.steps, settings.guidance, self.size,
                lambda rows: self.tick(stage, rows),
            )  # fmt: skip
            self.joint.append(bank)

    def draw(self, place: int, texts: list[str], first: int) -> Bank:
        """Pictures of `texts`, from noise number `first` on, as the UNet's predictions on the way to them."""
        stage, settings = f"Looking at {self.names[place]}", self.settings
        bank = Bank([*texts, ""])
        record = capture.filing(bank, self.host.encode(bank.prompts))

        def tell(x: Tensor, t: Tensor, context: Tensor, prediction: Tensor) -> None:
            record(x, t, context, prediction)
            self.tick(stage, x.shape[0])

        with self.host.watch(tell):
            for begin in range(0, len(texts), settings.batch):
                self.tick(stage)
                part, seed = texts[begin : begin + settings.batch], settings.seed + first + begin
                self.host.sample(part, seed, settings.steps, settings.guidance, self.size, self.size)
        return bank

    def watching(self, place: int, wanted: Callable[[str], bool]):
        """A context in which the wanted layers' inputs are counted for concept `place`."""
        layers = {name: module for name, module in self.modules.items() if wanted(name)}
        return capture.observed(layers, lambda name, rows: self.add(place, name, rows))

    @torch.no_grad()
    def add(self, place: int, name: str, rows: Tensor) -> None:
        """Count a layer's inputs (B, tokens, d) for concept `place`, `tokens` of each picture at most."""
        if rows.shape[1] > self.settings.tokens:
            chosen = torch.randperm(rows.shape[1], generator=self.generator)[: self.settings.tokens]
            rows = rows[:, chosen.to(rows.device)]
        if name not in self.statistics:
            changes = [asked.get(name) for asked in self.asked]
            self.statistics[name] = self.fit(name, self.modules[name], changes, self.host.device)
        concepts = len(self.asked) - 1
        weight = 1.0 if place < concepts else self.settings.anchor * concepts
        if weight:
            self.statistics[name].add(place, rows.float(), weight)

    def solve(self, stage: str) -> None:
        """The closed form of every layer watched since the last time, at the rank that was asked for."""
        self.tick(stage)
        for name, statistics in self.statistics.items():
            up, down = statistics.solve(self.settings.ridge)
            if self.settings.rank is not None:
                up, down = truncate(up, down, self.settings.rank, statistics.gram)
            elif up.shape[1] > min(up.shape[0], down.shape[1]):
                up, down = truncate(up, down)  # changes of full rank: more factors than the layer has directions
            self.merged[name] = up.float(), down.float()
        self.statistics = {}

    def polish(self) -> tuple[list[float], list[float]]:
        """Stage 4: all factors together; returns what is missed before and after."""
        steps, concepts = POLISH_STEPS[self.settings.speed], len(self.banks) - 1
        before = missed(self.host, self.modules, self.merged, self.held, self.rows)
        if not steps:
            return before, before
        shares = [1.0] * concepts + [self.settings.neutral * concepts]
        shares += [self.settings.binding * concepts / len(self.joint)] * len(self.joint) if self.joint else []
        banks = [*self.banks, *self.joint]
        self.merged = polish(
            self.host, self.modules, self.merged, banks, shares, steps, self.rows, self.settings.seed,
            lambda step, loss: self.tick(f"Polishing, step {step} of {steps}", 3 * self.rows),
        )  # fmt: skip
        return before, missed(self.host, self.modules, self.merged, self.held, self.rows)

    def layers(self) -> dict[str, Layer]:
        """The factors, both of one size, as layers of a file."""
        layers = {}
        for name, (up, down) in self.merged.items():
            module = self.modules[name]
            up, down = truncate(up.cpu(), down.cpu())
            conv = isinstance(module, nn.Conv2d)
            kernel = tuple(module.kernel_size) if conv else (1, 1)
            layers[name] = Layer(up, down, float(up.shape[1]), conv, kernel)
        return layers


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
    named = (f"{source} ({trigger})" if trigger else source for source, trigger in zip(sources, triggers, strict=True))
    notes = f"Merged by {'LoRACLR' if merge.method == 'loraclr' else merge.method} from {', '.join(named)}."
    files.write_sidecar(path, merge.triggers, merge.family, notes)
    return path
