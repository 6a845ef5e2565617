"""Who takes part: every method by its name in the benchmark, from LoRAs to the changes that it draws with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from loraclr import methods, plan
from loraclr.blocks import block_weights
from loraclr.changes import Changes
from loraclr.concept import Concept
from loraclr.hosts import Host
from loraclr.methods import Options
from loraclr.plan import Settings
from loraclr.result import Merge

EVERY = 4096  # a rank that no layer of the miniature reaches: dense methods are not cut
REFERENCE_PROMPTS = ("photo of a {}", "{}")


@dataclass(frozen=True)
class Entry:
    """What one method draws with, and what it took.

    Attributes:
        changes: what a picture of some concepts, of which it is told the places, is drawn with.
        settings: what the merge was told, for the record.
        seen: pairs of places whose LoRAs the merge has looked at in one picture.
    """

    changes: Callable[[tuple[int, ...]], Changes]
    capture_s: float = 0.0
    merge_s: float = 0.0
    settings: Mapping = field(default_factory=dict)
    seen: Collection[frozenset[int]] = ()


Run = Callable[[Host, Sequence[Concept], int, Mapping], Entry]


@dataclass(frozen=True)
class Contender:
    """One method.

    Attributes:
        run: (host, concepts, seed, options) → what to draw with. Raises ValueError if it cannot merge these LoRAs.
        grid: options to choose among on the tuning prompts; empty: there is nothing to tune.
    """

    run: Run
    grid: tuple[Mapping, ...] = ()


def base(host: Host, concepts: Sequence[Concept], seed: int, options: Mapping) -> Entry:
    """No LoRA at all."""
    nothing: Changes = {}
    return Entry(lambda _: nothing)


def single(host: Host, concepts: Sequence[Concept], seed: int, options: Mapping) -> Entry:
    """What a merge is made of: only the LoRA that a picture is of, or of two concepts both, stacked in the prompt."""
    layers = host.layers()
    own = [concept.changes(layers) for concept in concepts]
    return Entry(lambda places: own[places[0]] if len(places) == 1 else methods.stacked([own[k] for k in places]))


def by_weights(method: str) -> Run:
    """A method that needs only the files."""

    def run(host: Host, concepts: Sequence[Concept], seed: int, options: Mapping) -> Entry:
        rank = None if method == "svd" else EVERY
        # concat keeps all by itself, and says so if it is given a rank.
        settings = Options(**{"rank": None if method == "concat" else rank, "seed": seed, **options})
        return entry_of(methods.combine(concepts, method, settings, modules=host.layers()), options)

    return run


def by_blocks(host: Host, concepts: Sequence[Concept], seed: int, options: Mapping) -> Entry:
    """The sum with a weight per block, the same for every LoRA: `options` are "blocks" and "scale"."""
    weights = block_weights(options.get("blocks", "BASE=1"))
    asked = [replace(concept, blocks=weights) for concept in concepts]
    told = Options(rank=EVERY, scale=options.get("scale", 1.0))
    return entry_of(methods.combine(asked, "sum", told, modules=host.layers()), options)


def on_model(method: str, **settings) -> Run:
    """A method of `loraclr.methods` that looks at the model."""

    def run(host: Host, concepts: Sequence[Concept], seed: int, options: Mapping) -> Entry:
        told = Settings(**{**settings, **options, "seed": seed})
        pairs = seen(concepts, told) if method == "loraclr" else ()
        return replace(entry_of(methods.merge(host, concepts, method, told), options), seen=pairs)

    return run


def seen(concepts: Sequence[Concept], told: Settings) -> Collection[frozenset[int]]:
    """The pairs that a merge with these settings looks at in one picture."""
    return {scene.concepts for scene in itertools.chain(*plan.pairs(concepts, told))}


def reference(host: Host, concepts: Sequence[Concept], seed: int, options: Mapping) -> Entry:
    """The reference loop on the prompts that its code uses; `options` are fields of `Settings`."""
    asked = [replace(concept, prompts=REFERENCE_PROMPTS) for concept in concepts]
    return entry_of(methods.merge(host, asked, "reference", Settings(**{**options, "seed": seed})), options)


def entry_of(merge: Merge, options: Mapping) -> Entry:
    """What a finished merge draws every picture with, and what it took."""
    changes = merge.changes()
    capture = merge.seconds.get("capture", 0.0)
    return Entry(lambda _: changes, capture, sum(merge.seconds.values()) - capture, options)


def _grid(**values: Sequence) -> tuple[Mapping, ...]:
    return tuple(dict(zip(values, one, strict=True)) for one in itertools.product(*values.values()))


SCALES, DENSITIES = (0.4, 0.7, 1.0, 1.5, 2.2, 3.3), (0.1, 0.2, 0.5, 0.8)
#: What users of block weights try first: all blocks, or only the shallow, the deep, the first or the last ones.
BLOCKS = (
    "BASE=1", "IN04-OUT11=0", "IN00-IN04=0 M00-OUT11=0", "M00-OUT11=0", "IN00-IN04=0 OUT08-OUT11=0",
    "IN00-M00=0 OUT07-OUT11=0", "IN00-OUT06=0", "IN00-M00=0",
)  # fmt: skip
FAST, BALANCED = (partial(on_model, "loraclr", speed=speed) for speed in ("fast", "balanced"))
PRUNED = _grid(density=DENSITIES, scale=SCALES)

#: Ours last but for the research ones, so that a table reads from worst to best.
CONTENDERS: dict[str, Contender] = {
    "base": Contender(base),
    "single": Contender(single),
    "sum": Contender(by_weights("sum")),
    "weighted-sum": Contender(by_weights("sum"), _grid(scale=(0.2, 0.3, *SCALES[:4]))),
    "block-weights": Contender(by_blocks, _grid(blocks=BLOCKS, scale=(0.45, 0.7, 1.0))),
    "average": Contender(by_weights("average")),
    "factor-sum": Contender(by_weights("factor-sum")),
    "svd": Contender(by_weights("svd"), _grid(scale=SCALES)),
    "ties": Contender(by_weights("ties"), PRUNED),
    "dare-ties": Contender(by_weights("dare-ties"), PRUNED),
    "dare-linear": Contender(by_weights("dare-linear"), PRUNED),
    "magnitude-prune": Contender(by_weights("magnitude-prune"), PRUNED),
    "orthogonal": Contender(by_weights("orthogonal")),
    "gradient-fusion": Contender(on_model("gradient-fusion")),
    "reference": Contender(reference),
    "reference-tuned": Contender(reference, _grid(rate=(1e-3, 3e-3), iterations=(300, 1000))),
    "loraclr-closed": Contender(on_model("loraclr", speed="closed")),
    "loraclr-fast": Contender(FAST()),
    "loraclr": Contender(BALANCED()),
    "loraclr-best": Contender(on_model("loraclr", speed="best")),
}
