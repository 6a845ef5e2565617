"""Pictures to compare: concepts, and two together, by their own LoRAs, by the merged one and by the sum; same noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import nn

from loraclr import capture, methods, prompts
from loraclr.bank import Bank, filing
from loraclr.changes import Changes
from loraclr.concept import Concept
from loraclr.crosstalk import crosstalk
from loraclr.hosts import Cancelled, Host
from loraclr.plan import Settings
from loraclr.result import Merge

_SEEDS = 2  # pictures of each concept
_SCENES = 3  # pairs of concepts, at most
_FIRST_SEED = 10_000  # noise that the merge has not seen


@dataclass(frozen=True)
class Row:
    """A prompt drawn with the same seeds: `before` by its own LoRAs, `after` by the merged one.

    `by_sum`: by the weighted sum of all LoRAs of the merge; empty if that was not asked for.
    """

    label: str
    prompt: str
    before: Sequence[Image.Image]
    after: Sequence[Image.Image]
    by_sum: Sequence[Image.Image] = ()


@dataclass(frozen=True)
class Comparison:
    """What was drawn.

    Attributes:
        crosstalk: for each of the concepts that were drawn, see `loraclr.crosstalk`.
        complete: False if it ended early.
    """

    concepts: list[Row] = field(default_factory=list)
    scenes: list[Row] = field(default_factory=list)
    crosstalk: list[list[float]] = field(default_factory=list)
    complete: bool = True


def rows_through_unet(concepts: Sequence[Concept], settings: Settings, against_sum: bool = False) -> int:
    """How much work `compare` is, counted as the merge counts its own."""
    return 2 * settings.steps * (2 + against_sum) * _SEEDS * (len(concepts) + len(_pairs(concepts)))


def compare(
    host: Host, merge: Merge, settings: Settings, tell: Callable[[str, float], None], against_sum: bool = False
) -> Comparison:
    """Draw the concepts of a merge and some pairs of them, with the steps, guidance and size of `settings`.

    `tell(what, share done)` may raise Cancelled to stop it. With `against_sum` they are drawn by the weighted sum, too.

    What was finished until then, or until the graphics card ran out of memory, is returned.
    """
    result = Comparison()
    with ExitStack() as inside:
        inside.enter_context(suppress(Cancelled, torch.cuda.OutOfMemoryError))
        inside.enter_context(host.session())
        if merge.words:
            inside.enter_context(host.words(merge.words))
        artist = _Artist(host, merge, settings, tell, against_sum)
        for place, concept in enumerate(merge.concepts):
            prompt = prompts.filled(concept.trigger, concept.kind, concept.prompts)[0]
            bank = Bank([prompt, ""])
            result.concepts.append(artist.row(concept.lora.name, prompt, [place], bank))
            result.crosstalk.append(crosstalk(host, artist.modules, artist.asked, artist.merged, place, bank))
        for places in _pairs(merge.concepts):
            first, second = (merge.concepts[place] for place in places)
            both = f"{first.lora.name} and {second.lora.name}"
            result.scenes.append(artist.row(both, _together(first, second), places))
        return result
    return Comparison(result.concepts, result.scenes, result.crosstalk, complete=False)


class _Artist:
    """Draws with a host, and counts what is done."""

    def __init__(
        self, host: Host, merge: Merge, settings: Settings, tell: Callable[[str, float], None], against_sum: bool
    ) -> None:
        self.host, self.settings, self.tell = host, settings, tell
        self.modules: Mapping[str, nn.Module] = host.layers()
        self.asked = [concept.changes(self.modules) for concept in merge.concepts]
        self.merged: Changes = merge.changes(self.modules)
        self.sum = methods.stacked(self.asked) if against_sum else None
        self.whole, self.done = (2 + against_sum) * (len(merge.concepts) + len(_pairs(merge.concepts))), 0

    def row(self, label: str, prompt: str, places: Sequence[int], bank: Bank | None = None) -> Row:
        """One prompt, by the LoRAs at these places and by the merged one; `bank` gets what the former see."""
        changes = self.asked[places[0]] if len(places) == 1 else methods.stacked([self.asked[p] for p in places])
        before, after = self._drawn(label, prompt, changes, bank), self._drawn(label, prompt, self.merged)
        return Row(label, prompt, before, after, [] if self.sum is None else self._drawn(label, prompt, self.sum))

    def _drawn(self, label: str, prompt: str, changes: Changes, bank: Bank | None = None) -> list[Image.Image]:
        self.tell(f"Drawing {label}", self.done / self.whole)
        size = self.settings.size or self.host.size
        seed = _FIRST_SEED + self.settings.seed
        with ExitStack() as inside, torch.no_grad():
            inside.enter_context(capture.applied(self.modules, changes))
            if bank is not None:
                inside.enter_context(self.host.watch(filing(bank, self.host.encode(bank.prompts))))
            pictures = self.host.sample(
                [prompt] * _SEEDS, seed, self.settings.steps, self.settings.guidance, size, size
            )
        self.done += 1
        return pictures


def _pairs(concepts: Sequence[Concept]) -> list[tuple[int, int]]:
    """Concepts to draw together: neighbours first, two styles never."""
    count = len(concepts)
    every = [(a, a + step) for step in range(1, count) for a in range(count - step)]
    return [(a, b) for a, b in every if "subject" in (concepts[a].kind, concepts[b].kind)][:_SCENES]


def _together(first: Concept, second: Concept) -> str:
    """A prompt that asks for both."""
    if "style" not in (first.kind, second.kind):
        return prompts.PAIR[0].format(first.trigger, second.trigger)
    subject, style = (first, second) if second.kind == "style" else (second, first)
    return f"a {subject.trigger} in {style.trigger}"
