"""Every way of merging by its name: which exist, what each does, and the merges that need only the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from loraclr import merging
from loraclr.baselines import arithmetic
from loraclr.baselines.fitting import Loop, by_gradient_fusion, by_reference
from loraclr.changes import Changes, aligned, factors_of, layer_of
from loraclr.concept import Concept, check_layers, check_weights
from loraclr.factor import Rank, decompose, energy, kept, truncate
from loraclr.formats import Layer
from loraclr.formats.change import in_words
from loraclr.hosts import Host
from loraclr.keys import kernel
from loraclr.lora import LoRA
from loraclr.merging import Fit, Progress
from loraclr.plan import Settings
from loraclr.precision import in_float64
from loraclr.result import Merge, begun
from loraclr.solve import Factors


@dataclass(frozen=True)
class Options:
    """How to merge by weights alone.

    Attributes:
        rank: largest rank; None: the sum of the LoRAs' ranks (for svd the largest of them), which keeps a sum exact;
            "auto": in each layer the smallest that keeps 99.5 % of ‖ΔW‖².
        density: share of the entries that ties, dare and magnitude-prune keep.
        scale: the merged change times this.
        seed: of what dare drops.
    """

    rank: Rank = None
    density: float = 0.5
    scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Layerwise:
    """What a method by weights is told of one layer: options, the number of all LoRAs, and its randomness."""

    options: Options
    count: int
    generator: torch.Generator


#: The changes that LoRAs make to one layer → the merged one, as factors or dense (o, d).
Arithmetic = Callable[[Sequence[Factors], Layerwise], Factors | Tensor]


@dataclass(frozen=True)
class Method:
    """A way of merging.

    Attributes:
        text: one sentence for users.
        arithmetic: how it merges a layer by weights alone; None: it looks at the model.
        fit: how it solves a layer that it has looked at, by the settings; None: the closed form.
        settings: what it needs otherwise than usual, if it looks at the model.
        uses_density: whether `Options.density` means anything to it.
        offered: whether users are offered it; the others are there to be compared with.
    """

    name: str
    text: str
    arithmetic: Arithmetic | None = None
    fit: Callable[[Settings], Fit] | None = None
    settings: dict = field(default_factory=dict)
    uses_density: bool = False
    offered: bool = True

    @property
    def needs_model(self) -> bool:
        return self.arithmetic is None


def _loop(settings: Settings) -> Loop:
    """The paper's loop as the settings have it."""
    return Loop(settings.iterations, settings.rate, settings.margin, settings.penalty, settings.distance)


def _on_dense(merge: Callable[[Sequence[Tensor], Layerwise], Tensor]) -> Arithmetic:
    return lambda changes, layer: merge([arithmetic.dense(change) for change in changes], layer)


_ALL = (
    Method("loraclr", "Fits one LoRA to what each LoRA does in the model on its own prompts, then polishes it."),
    Method("sum", "Adds the LoRAs up, exactly as if all were stacked in the prompt.",
           lambda changes, _: arithmetic.concat(changes)),
    Method("average", "Adds the LoRAs up and divides by their number.",
           lambda changes, layer: arithmetic.average(changes, layer.count)),
    Method("concat", "Keeps the LoRAs' factors side by side: the exact sum, whatever their ranks, without a limit.",
           lambda changes, _: arithmetic.concat(changes)),
    Method("svd", "Adds the LoRAs up and cuts the sum to the rank that is asked for (else the largest of theirs).",
           lambda changes, _: arithmetic.concat(changes)),
    Method("ties", "Keeps each LoRA's largest weights, and where LoRAs disagree in sign only the stronger side.",
           _on_dense(lambda deltas, layer: arithmetic.ties(deltas, layer.options.density)), uses_density=True),
    Method("dare-ties", "Drops weights at random and scales the rest up, then settles signs as ties does.",
           _on_dense(lambda deltas, layer: arithmetic.dare_ties(deltas, layer.options.density, layer.generator)),
           uses_density=True),
    Method("dare-linear", "Drops weights at random, scales the rest up, and adds the LoRAs up.",
           _on_dense(lambda deltas, layer: arithmetic.dare_linear(deltas, layer.options.density, layer.generator)),
           uses_density=True),
    Method("magnitude-prune", "Adds up only the largest weights of each LoRA.",
           _on_dense(lambda deltas, layer: arithmetic.magnitude_prune(deltas, layer.options.density)),
           uses_density=True),
    Method("orthogonal", "Adds the LoRAs up after giving each inputs of its own, where few enough of them allow it.",
           lambda changes, _: arithmetic.orthogonal(changes)),
    Method("gradient-fusion", "Fits one LoRA layer by layer as Mix-of-Show does, by L-BFGS with its iterations.",
           fit=lambda _: by_gradient_fusion, settings={"speed": "closed"}),
    Method("factor-sum", "Adds the factors instead of the changes, as some tools do: LoRAs of one rank only.",
           lambda changes, _: arithmetic.factor_sum(changes), offered=False),
    Method("reference", "Minimises the paper's contrastive objective layer by layer, as its authors' code does.",
           fit=lambda settings: partial(by_reference, loop=_loop(settings)),
           settings={"speed": "closed", "guidance": 1.0, "steps": 20}),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def merge(
    host: Host,
    concepts: Sequence[Concept],
    method: str = "loraclr",
    settings: Settings | None = None,
    progress: Progress = lambda *_: None,
) -> Merge:
    """Merge with a method that looks at the model; errors as `loraclr.merging.merge`."""
    chosen = METHODS[method]
    settings = replace(settings or Settings(), **chosen.settings)
    fit = {} if chosen.fit is None else {"fit": chosen.fit(settings)}
    result = merging.merge(host, concepts, settings, progress, **fit)
    result.method = method
    return result


def combine(
    concepts: Sequence[Concept],
    method: str,
    options: Options | None = None,
    progress: Progress = lambda *_: None,
    modules: Mapping[str, nn.Module] | None = None,
) -> Merge:
    """Merge by weights alone: no model is needed, nor trigger words. One layer is dense at a time.

    modules: a model's layers by canonical name, for kinds of LoRA whose change depends on the model's weights.

    Raises:
        ValueError: see `check`, or the method cannot merge these LoRAs; one sentence.
        Cancelled: `progress` may raise it to stop.
    """
    chosen, options = METHODS[method], options or Options()
    if chosen.arithmetic is None:
        raise ValueError(f"The method {method} looks at the model: give a checkpoint.")
    if method == "concat" and options.rank is not None:
        raise ValueError("The method concat keeps every rank: choose svd to limit it.")
    check(concepts, modules)
    started = time.monotonic()
    result = begun(concepts, options)
    result.method, concepts = method, result.concepts
    layerwise = Layerwise(options, len(concepts), torch.Generator().manual_seed(options.seed))
    names = list(dict.fromkeys(name for concept in concepts for name in concept.lora.layers if concept.strength(name)))
    for place, name in enumerate(names):
        progress("Merging layers", place / len(names), None)
        weight = None if modules is None else modules[name].weight
        there = [concept for concept in concepts if name in concept.lora.layers and concept.strength(name)]
        present = [factors_of(one.lora.layers[name], one.strength(name), weight) for one in there]
        shape = _shape(name, [concept.lora for concept in there]) if weight is None else tuple(weight.shape)
        try:
            merged, share = _merged(chosen, aligned(present), layerwise)
        except ValueError as error:
            raise ValueError(f"The method {method} cannot merge these LoRAs: in {name}, {error}") from error
        result.layers[name] = layer_of(merged, shape)
        if share is not None:
            result.kept[name] = share
    result.seconds["merge"] = time.monotonic() - started
    progress("Done", 1.0, 0.0)
    return result


def check(concepts: Sequence[Concept], modules: Mapping[str, nn.Module] | None = None) -> None:
    """Refuse LoRAs that do not belong together, as far as their files and, if it is given, the model tell.

    Raises:
        ValueError: one sentence that names the LoRA and says what to do.
    """
    if not concepts:
        raise ValueError("No LoRA is chosen: choose at least one.")
    check_family([concept.lora for concept in concepts])
    first: dict[str, tuple[str, tuple[int | None, int | None]]] = {}
    for concept in concepts:
        check_weights(concept)
        if modules is not None:
            check_layers(concept.lora, modules)
            continue
        for name, layer in concept.lora.layers.items():
            if layer.needs_base:
                raise ValueError(
                    f"What {concept.lora.name} changes depends on the model ({name}, {layer.format}): give the "
                    "checkpoint that it is for."
                )
            other, known = first.setdefault(name, (concept.lora.name, layer.size))
            if layer.size != known:
                raise ValueError(
                    f"{concept.lora.name} does not fit {other}: its {name} is {in_words(layer.size)}, the other's "
                    f"{in_words(known)}; they were made for different models."
                )


def check_family(loras: Sequence[LoRA]) -> None:
    """Refuse LoRAs of different model families.

    Raises:
        ValueError: one sentence that names two of them.
    """
    for lora in loras:
        if lora.family != loras[0].family:
            raise ValueError(
                f"{loras[0].name} is for {loras[0].family.upper()} and {lora.name} for {lora.family.upper()}: "
                "only LoRAs of one model family can be merged."
            )


def _merged(method: Method, present: Sequence[Factors], layer: Layerwise) -> tuple[Factors, float | None]:
    """One layer's changes merged, at the scale and rank asked for, and what share of ‖ΔW‖² a rank keeps that cuts."""
    options = layer.options
    if present[0][0].ndim == 1:  # a norm layer: has no inputs to be looked at or cut
        share = options.scale / (layer.count if method.name == "average" else 1)
        scale, shift = _sum(present)
        return (share * scale, share * shift), None
    merged, ranks = method.arithmetic(present, layer), [down.shape[0] for _, down in present]
    most = min(present[0][0].shape[0], present[0][1].shape[1])
    rank = options.rank or min(max(ranks) if method.name == "svd" else sum(ranks), most)
    if isinstance(merged, Tensor):
        dense = options.scale * merged
        merged = decompose(dense, None if rank == "auto" else rank)
        if rank != "auto":
            whole = float(in_float64(dense).square().sum())
            return merged, energy(*merged) / whole if whole else 1.0  # as `kept`, whose d×d matrix would be large
    else:
        merged = options.scale * merged[0], merged[1]
        if rank != "auto" and merged[1].shape[0] <= rank:
            return merged, None
    cut = truncate(*merged, rank)
    return cut, kept(*merged, *cut)


def _shape(name: str, loras: Sequence[LoRA]) -> tuple[int, ...]:
    """The shape of a layer's weight, from the files that change it."""
    layers = [lora.layers[name] for lora in loras]
    plain = [layer for layer in layers if isinstance(layer, Layer)]  # the others' files do not tell the kernel
    size = (plain[0].kernel if plain[0].conv else None) if plain else kernel(name, loras[0].family)
    outputs, inputs = layers[0].size
    return (outputs, inputs) if size is None else (outputs, inputs // prod(size), *size)


def stacked(changes: Sequence[Changes]) -> Changes:
    """All LoRAs at once, as stacking them in the prompt does: the exact sum of every layer."""
    names = dict.fromkeys(name for change in changes for name in change)
    return {name: _sum(aligned([change[name] for change in changes if name in change])) for name in names}


def _sum(present: Sequence[Factors]) -> Factors:
    """One layer's changes added up, exactly; a norm layer's are no factors."""
    if present[0][0].ndim > 1:
        return arithmetic.concat(present)
    scales, shifts = zip(*present, strict=True)
    return torch.stack(scales).sum(0), torch.stack(shifts).sum(0)
