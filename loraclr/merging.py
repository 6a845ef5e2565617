"""The merge: from concept LoRAs to one LoRA, stage by stage. The only loop over concepts and layers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr import capture, diagnosis, hinge, memory, plan
from loraclr.alignment import alignment
from loraclr.bank import Bank
from loraclr.capture import NORMS
from loraclr.changes import Changes, aligned, is_text, layer_of
from loraclr.concept import Concept, check
from loraclr.factor import kept, truncate
from loraclr.formats import Norm
from loraclr.hosts import Host
from loraclr.lora import Layer
from loraclr.plan import Settings
from loraclr.polish import Look, missed, polish
from loraclr.reading import PROMPTS, Reading, practise
from loraclr.result import Merge, begun
from loraclr.solve import Factors, LayerFit, NormStatistics, NotFinite, Statistics, width
from loraclr.teachers import Teachers
from loraclr.whitening import Whitening, whitening

#: (layer name, module, the concepts' changes of it, device) → what fits the layer.
Fit = Callable[[str, nn.Module, Sequence[Factors | None], torch.device], LayerFit]

#: Stage in words, share of the whole work done (0 to 1), seconds left (None: not known yet). May raise Cancelled.
Progress = Callable[[str, float, float | None], None]

SEVERAL = 512  # pictures up to this side in pixels go through the polish several at a time, larger ones one by one

#: Bytes of Gram matrices held at a time. SDXL's attention and feed-forward layers need 8.7 GB, its 72 other layers,
#: which only few LoRAs change, 15.7 GB more.
HELD = 10e9


def by_closed_form(name: str, module: nn.Module, changes: Sequence[Factors | None], device: torch.device) -> Statistics:
    """The usual fit of a layer."""
    return Statistics(width(changes), changes, device=device)


def merge(
    host: Host,
    concepts: Sequence[Concept],
    settings: Settings | None = None,
    progress: Progress = lambda *_: None,
    fit: Fit = by_closed_form,
) -> Merge:
    """Merge concept LoRAs into one.

    Stages: the text encoder is solved in closed form; then cross-attention keys and values, fed by the merged text
    encoder; both learn from words alone; then the UNet's other layers are solved, from each concept's own denoising
    run; then scenes of two are drawn, and each LoRA is asked about states of the others' runs; then the factors of all
    layers are polished together on all these predictions. `fit` solves a layer in another way than the closed form.

    Raises:
        ValueError: see `check`.
        Cancelled: `progress` may raise it to stop; the model is left as it was.
    """
    settings = settings or Settings()
    check(host, concepts)
    result = begun(concepts, settings, folded=True)
    result.checkpoint, concepts = host.checkpoint, result.concepts
    memory.begin(host.device)
    with host.session(), ExitStack() as stack:
        run = _Run(host, concepts, settings, progress, fit)
        if result.words:
            stack.enter_context(host.words(result.words))
        run.fit_text()
        run.fit_cross_attention()
        run.practise()
        result.seconds["text"] = run.lap()
        for layers in run.passes:
            for place in range(len(run.texts)):
                run.look(place, layers)
            result.seconds["capture"] = result.seconds.get("capture", 0.0) + run.lap()
            run.solve("Fitting the picture layers")
            result.seconds["solve"] = result.seconds.get("solve", 0.0) + run.lap()
        run.teachers.compose()
        run.teachers.look_astray()
        result.seconds["capture"] += run.lap()
        closed, polished = run.polish()
        result.seconds["polish"] = run.lap()
        result.layers, result.kept = run.layers(), run.kept
        try:
            result.notes += run.reasons(polished)
            result.alignment, result.objective = run.measured()
        except torch.cuda.OutOfMemoryError:  # a merge that is done is worth more than figures about it
            result.notes.append("What came of it could not be measured in full: the graphics card's memory is full.")
    result.memory = memory.peaks(host.device)
    result.missed = {concept.lora.name: (closed[place], polished[place]) for place, concept in enumerate(concepts)}
    progress("Done", 1.0, 0.0)
    return result


def cares(left: Sequence[float], power: float) -> list[float]:
    """How much is to be learnt of each concept, 1 on average: by a power of the share of its effect that is missed."""
    # NaN or infinite: the model overflowed in half precision there.
    powers = [max(share, 0.0) ** power if math.isfinite(share) else 1.0 for share in left]
    whole = sum(powers)
    return [one * len(left) / whole if whole else 1.0 for one in powers]


def scarce(device: torch.device) -> bool:
    """Whether a CUDA device has less than a quarter of its memory free, which drawing and polishing need."""
    free, whole = torch.cuda.mem_get_info(device)
    return free < whole / 4


class _Run:
    """One merge under way: the statistics gathered so far, the factors solved so far, and the progress.

    Number `len(concepts)`, behind the last concept, stands for what must not change: the base on neutral prompts.
    """

    def __init__(
        self, host: Host, concepts: Sequence[Concept], settings: Settings, progress: Progress, fit: Fit
    ) -> None:
        self.host, self.concepts, self.settings = host, concepts, settings
        self.progress, self.fit = progress, fit
        self.teachers = Teachers(host, concepts, settings, self.tick)
        self.texts, self.asked, self.modules = self.teachers.texts, self.teachers.asked, self.teachers.modules
        self.size = self.teachers.size
        self.rows = plan.rows(self.size)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.statistics: dict[str, LayerFit] = {}
        self.inputs: dict[str, int] = {}
        self.merged: dict[str, tuple[Tensor, Tensor]] = {}
        self.kept: dict[str, float] = {}  # where a rank was asked for, what share of the output's energy it keeps
        self.whitenings: dict[str, Whitening] = {}  # of the layers' inputs
        self.whitens = settings.directions > 0 and settings.polish_steps(1) > 0
        self.reading: Reading | None = None
        self.fitted: Changes = {}  # closed forms that have learnt since
        self.passes = self.in_passes()
        self.whole = plan.work(host, concepts, settings, len(self.passes))
        drawn = plan.rows_before_polish(concepts, settings, len(self.passes))
        self.done, self.small = 0.0, 0.1 * drawn / (2 * len(self.texts) + 1)
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
            with capture.applied(self.modules, self.asked[place]), self.watching(place, is_text):
                self.host.encode([*texts, ""])
        self.solve("Fitting the text encoder")

    def fit_cross_attention(self) -> None:
        """Stage 2: keys and values of cross-attention see what the merged text encoder says."""
        for place, texts in enumerate(self.texts):
            self.tick("Fitting words to pictures", self.small)
            with capture.applied(self.modules, self.merged), torch.no_grad():
                context = self.host.encode([*texts, ""])
            readers = list(filter(capture.is_cross_kv, self.modules))
            if readers and self.weight(place):
                chosen = self.chosen(readers, context.tokens.shape[1])
                self.add(place, readers, context.tokens if chosen is None else context.tokens[:, chosen])
        self.solve("Fitting words to pictures")

    def practise(self) -> None:
        """Stage 2, on: what reads text learns from words alone."""
        steps = self.settings.reading_steps(len(self.concepts))
        if not steps:
            return
        reading = Reading(
            self.host, self.modules, self.asked, self.concepts, self.texts, self.settings.neutral, self.settings.seed
        )
        if reading.has_any:
            self.reading, self.fitted = reading, dict(self.merged)
            self.merged = practise(
                reading, self.merged, self.whitenings, steps,
                lambda step: self.tick(f"Learning the words, step {step} of {steps}", plan.PROMPT * PROMPTS),
            )  # fmt: skip

    def look(self, place: int, layers: Collection[str]) -> None:
        """Stage 3: draw with one concept's own LoRA, and count what these layers see."""
        self.teachers.look(place, self.watching(place, layers.__contains__))

    def in_passes(self) -> list[list[str]]:
        """The layers that read the picture, in parts whose Gram matrices fit into memory; each part is drawn for."""
        names = [name for name in self.modules if not capture.reads_text(name)]
        passes: list[list[str]] = [[]]
        room = HELD
        for group in capture.same_inputs(names):
            size = 4 * self.modules[group[0]].weight[0].numel() ** 2
            if passes[-1] and size > room:
                passes.append([])
                room = HELD
            passes[-1] += group
            room -= size
        return passes

    def watching(self, place: int, wanted: Callable[[str], bool]) -> AbstractContextManager:
        """A context in which the wanted layers' inputs are counted for concept `place`."""
        if not self.weight(place):
            return nullcontext()
        groups = {group[0]: group for group in capture.same_inputs(filter(wanted, self.modules))}
        first = {name: self.modules[name] for name in groups}
        return capture.observed(
            first,
            lambda name, rows: self.add(place, groups[name], rows),
            lambda name, count: self.chosen(groups[name], count),
        )

    @torch.no_grad()
    def chosen(self, names: list[str], count: int) -> Tensor | None:
        """Which of the `count` places where these layers read are counted: `tokens` of a picture at most."""
        if names[0] not in self.statistics:
            self.statistics |= self.begun(names)
        if count <= self.settings.tokens:
            return None
        sums = isinstance(self.statistics[names[0]], Statistics | NormStatistics)
        # A fit that keeps rows compares concepts row by row: of all of them it gets the same places.
        generator = self.generator if sums else torch.Generator().manual_seed(self.settings.seed)
        return torch.randperm(count, generator=generator)[: self.settings.tokens]

    @torch.no_grad()
    def add(self, place: int, names: list[str], rows: Tensor) -> None:
        """Count what these layers all read (B, tokens, d) for concept `place`, where it was chosen."""
        rows = rows.float()
        for name in names:
            # The 1 that a change of bias is multiplied by, if any concept changes this layer's bias.
            more = self.inputs[name] - rows.shape[-1]
            own = F.pad(rows, (0, more), value=1.0) if more else rows
            self.statistics[name].add(place, own, self.weight(place))

    def weight(self, place: int) -> float:
        """How much what concept `place` sees counts in the closed form."""
        return 1.0 if place < len(self.concepts) else self.settings.anchor * len(self.concepts)

    def begun(self, names: list[str]) -> dict[str, LayerFit]:
        """Empty statistics of layers that read the same rows: they share one Gram matrix, if it is over as many."""
        device, sums = self.host.device, {}
        for name in names:
            asked, module = aligned([asked.get(name) for asked in self.asked]), self.modules[name]
            self.inputs[name] = width(asked)
            if isinstance(module, NORMS):
                sums[name] = NormStatistics(self.inputs[name], asked, device)
                continue
            sums[name] = fit = self.fit(name, module, asked, device)
            if not isinstance(fit, Statistics):
                continue
            first = next(one for other, one in sums.items() if self.inputs[other] == self.inputs[name])
            if fit is not first:
                fit.share(first)
            elif device.type == "cuda" and scarce(device):
                fit.rest("cpu")
        return sums

    def solve(self, stage: str) -> None:
        """The closed form of every layer watched since the last time, at the rank that was asked for."""
        self.tick(stage)
        whitenings: dict[int, Whitening] = {}  # by Gram matrix: layers that read the same share one
        for name, statistics in self.statistics.items():
            try:
                up, down = statistics.solve(self.settings.ridge)
            except NotFinite as error:
                raise ValueError(
                    f"What {name} is fed with holds NaN or infinite values: run the model in float32 (the webui: "
                    "--no-half, the command line: --device cpu), or leave out the LoRA whose own pictures come out "
                    "black."
                ) from error
            if isinstance(statistics, NormStatistics):
                pass  # has no rank
            elif self.settings.rank is not None:
                cut = truncate(up, down, self.settings.rank, statistics.gram)
                self.kept[name] = kept(up, down, *cut, statistics.gram)
                up, down = cut
            elif up.shape[1] > min(up.shape[0], down.shape[1]):
                up, down = truncate(up, down)  # changes of full rank: more factors than the layer has directions
            self.merged[name] = up.float(), down.float()
            if isinstance(statistics, Statistics) and self.whitens:
                gram = statistics.gram
                known = whitenings.get(id(gram)) or whitening(gram, self.settings.directions, self.host.device)
                whitenings[id(gram)] = self.whitenings[name] = known
        self.statistics = {}

    def polish(self) -> tuple[list[float], list[float]]:
        """Stage 4: all factors together; returns what is missed before and after."""
        teachers, concepts = self.teachers, len(self.concepts)
        steps = self.settings.polish_steps(concepts)
        closed = {**self.merged, **self.fitted}
        before = missed(self.host, self.modules, closed, teachers.held, self.rows)
        if not steps:
            return before, before
        settings = self.settings
        norms = {name: pair for name, pair in self.merged.items() if isinstance(self.modules[name], NORMS)}
        factors = {name: pair for name, pair in self.merged.items() if name not in norms}
        some = [bank.thinned(3) for bank in teachers.held]

        def left(found: Changes) -> list[float]:
            return missed(self.host, self.modules, norms | found, some, self.rows)[:-1]

        def at(found: Changes) -> tuple[list[Bank], list[float]]:
            teachers.look_again(norms | found)
            return teachers.lessons(cares(left(found), settings.care))

        if factors:
            factors = polish(
                self.host, self.modules, factors, *teachers.lessons([1.0] * concepts), steps, self.rows, settings.seed,
                lambda step, _: self.tick(f"Polishing, step {step} of {steps}", 3 * self.rows),
                at_once=1 if self.size > SEVERAL else None,
                whitenings=self.whitenings,
                guidance=settings.guidance,
                guided=settings.guided if settings.thorough else 0.0,
                held_out=lambda found: sum(left(found)),
                reading=self.reading,
                reads=settings.reading,
                fixed=norms,
                look=Look(plan.looks(concepts, settings), at),
            )  # fmt: skip
        after = missed(self.host, self.modules, norms | factors, teachers.held, self.rows)
        if not sum(after[:-1]) <= sum(before[:-1]):
            self.merged = closed  # so few steps may lead away, or overflow: what they began with is better
            return before, before
        self.merged = norms | factors
        return before, after

    def reasons(self, left: Sequence[float]) -> list[str]:
        """Why some concepts stay weak, and what to try; `left` is what is missed of each."""
        found = []
        for place in range(len(self.concepts)):
            if 1 - left[place] < diagnosis.WEAK:
                found += diagnosis.reasons(
                    self.host, self.modules, self.concepts, self.asked[:-1], place, self.teachers.held[place]
                )
        weak = any(1 - share < diagnosis.WEAK for share in left[:-1])
        # Best is not clearly nearer than Balanced (README), so a balanced merge is not told to take longer.
        if weak and self.fit is by_closed_form and not self.settings.thorough:
            found.append("A slower speed, Balanced or Best, brings weak concepts closer to their own LoRAs.")
        return found

    def measured(self) -> tuple[dict[str, dict[str, float]], dict[str, hinge.Objective]]:
        """For each concept how near the merged layers come to its own, and the paper's objective, by kind of layer."""
        found, seen, settings = {}, [], self.settings
        stage = "Measuring what came of it"
        for place, concept in enumerate(self.concepts):
            self.tick(stage)
            inputs: dict[str, Tensor] = {}
            found[concept.lora.name] = alignment(
                self.host, self.modules, self.asked[place], self.merged, self.teachers.held[place],
                lambda name, rows, inputs=inputs: inputs.__setitem__(name, hinge.some(rows)),
            )  # fmt: skip
            seen.append(inputs)
        return found, hinge.objective(
            self.modules, self.asked[:-1], self.merged, seen, settings.margin, settings.penalty,
            lambda: self.tick(stage),
        )  # fmt: skip

    def layers(self) -> dict[str, Layer | Norm]:
        """The factors, both of one size, as layers of a file."""
        layers = {}
        for name, factors in self.merged.items():
            up, down = (factor.cpu() for factor in factors)
            factors = (up, down) if up.ndim == 1 else truncate(up, down)
            layers[name] = layer_of(factors, self.modules[name].weight.shape)
        return layers
