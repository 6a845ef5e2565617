"""Our own methods with one ingredient left out or changed: what each of them adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.contenders import BALANCED, FAST, Contender, Entry, Run, entry_of, seen
from loraclr import factor, merging
from loraclr.concept import Concept
from loraclr.hosts import Host
from loraclr.plan import Settings
from loraclr.solve import Factors, Statistics, width


class Summed(Statistics):
    """Instead of the closed form the plain sum of the changes."""

    def solve(self, ridge: float = 1e-3) -> Factors:
        ups, downs = ([each.to(self.device) for each in side if each is not None] for side in (self.ups, self.downs))
        return torch.cat(ups, 1), torch.cat(downs)


def from_the_sum(host: Host, concepts: Sequence[Concept], seed: int, options: Mapping) -> Entry:
    """A fast merge whose stages, and so its polish too, begin with the sum of the LoRAs instead of the closed form."""

    def fit(name: str, module: nn.Module, asked: Sequence[Factors | None], device: torch.device) -> Summed:
        return Summed(width(asked), asked, device=device)

    told = Settings(seed=seed)
    return replace(entry_of(merging.merge(host, concepts, told, fit=fit), options), seen=seen(concepts, told))


def changed(part: str, other: Callable, run: Run) -> Run:
    """A method with another function in the place of one that no setting changes, by its full name."""

    def changed_run(host: Host, concepts: Sequence[Concept], seed: int, options: Mapping) -> Entry:
        with mock.patch(part, other):
            return run(host, concepts, seed, options)

    return changed_run


def as_predicted(host: Host, t: Tensor) -> Tensor:
    """In the place of `polish.in_v`: differences as they are, of a model that predicts ε in ε."""
    return torch.ones(len(t))


def by_weights_alone(up: Tensor, down: Tensor, rank: factor.Rank = None, gram: Tensor | None = None) -> Factors:
    """In the place of `factor.truncate`: the best factors of ΔW itself, whatever the layer reads."""
    return factor.truncate(up, down, rank)


#: By their names in the benchmark, which measures them only if asked to.
INGREDIENTS: dict[str, Contender] = {
    # The same once more: how much a merge differs by itself, on another processor for example.
    "fast-again": Contender(FAST()),
    "fast-unwhitened": Contender(FAST(directions=0)),
    "balanced-unguided": Contender(BALANCED(guided=0.0)),
    "fast-no-scenes": Contender(FAST(scenes=0)),
    "fast-no-styled": Contender(FAST(styled=0.0)),
    "fast-no-neutral": Contender(FAST(neutral=0.0)),
    "fast-no-words": Contender(FAST(reading=0.0)),
    "fast-no-astray": Contender(FAST(astray=0.0)),
    "fast-no-look": Contender(FAST(again=0.0)),
    "fast-no-care": Contender(FAST(care=0.0)),
    "fast-from-sum": Contender(from_the_sum),
    "fast-as-predicted": Contender(changed("loraclr.polish.in_v", as_predicted, FAST())),
    "fast-rank-8": Contender(FAST(rank=8)),
    "fast-rank-8-by-weights": Contender(changed("loraclr.merging.truncate", by_weights_alone, FAST(rank=8))),
    "balanced-no-look": Contender(BALANCED(again=0.0)),
}
