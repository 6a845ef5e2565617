"""Reading: what cross-attention's keys and values make of prompts, trained on words alone.

What the text encoder puts out for two concepts on one background differs in few directions, and keys and values are
linear in it. The closed form takes the text encoder as it is, and so fits few words and misses the effect of each LoRA
on others. Here the text encoder's factors and those of keys and values are trained together, so that the one learns to
tell apart what the others must treat apart: over prompts p with words drawn at random, in every layer,

    ‖k_merged(p) − k_i(p)‖² / E ‖k_base(p) − k_i(p)‖²

with k_i what concept i's own text encoder and layer make of p, and the base's for prompts without a trigger. No picture
is needed, and a prompt costs a call of the text encoder or two.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraclr import prompts
from loraclr.capture import NORMS, applied, is_cross_kv, reads_text
from loraclr.changes import Changes, is_text, through
from loraclr.concept import Concept
from loraclr.hosts import Context, Host
from loraclr.precision import without_autocast
from loraclr.solve import Factors
from loraclr.training import LOSS_SCALE, Trained, schedule
from loraclr.whitening import Whitening

PROMPTS = 20  # in a step
USUAL = 0.2  # share of them that are the concept's own prompts as they are; the others hold words drawn at random
SCALED = 4  # prompts of each concept that tell how large the effects are


@dataclass(frozen=True)
class Lesson:
    """Prompts, whose they are, and what their own text encoders make of them; of one concept they are in a row."""

    texts: list[str]
    places: list[int]
    own: Context


class Reading:
    """What is to be read of prompts, and how far a merge is from it.

    Args:
        modules: the layers that are changed.
        asked: the changes of each concept, and last none, for what must not change.
        concepts: whose words are among the random ones.
        usual: prompts of each concept, and of what must not change.
        neutral: the weight of what must not change.
    """

    def __init__(
        self,
        host: Host,
        modules: Mapping[str, nn.Module],
        asked: Sequence[Changes],
        concepts: Sequence[Concept],
        usual: Sequence[Sequence[str]],
        neutral: float,
        seed: int,
    ) -> None:
        self.host, self.modules = host, modules
        self.asked = [_on(host.device, changes) for changes in asked]  # once, not in every step
        self.concepts, self.usual = concepts, usual
        # All of them: those that no LoRA changes still read what a changed text encoder says.
        self.readers = {name: module for name, module in host.layers().items() if is_cross_kv(name)}
        self.weights = [1.0] * len(concepts) + [neutral * len(concepts)]
        # A word that calls a concept says something else with that concept's LoRA than with another's, or with none.
        taken = {word for concept in concepts for word in re.findall(r"\w+", concept.trigger.lower())}
        self.words = [word for word in prompts.WORDS if word not in taken]
        self.random = random.Random(seed)
        self.scales = self._scales()

    @property
    def has_any(self) -> bool:
        """Whether any concept changes what is read."""
        return any(scale > 0 for scale in self.scales.values())

    def lesson(self, count: int = PROMPTS) -> Lesson:
        """Prompts for a step, as their own LoRAs read them."""
        places = sorted(self.random.choices(range(len(self.weights)), self.weights, k=count))
        return self.read([(place, self._text(place)) for place in places])

    def _text(self, place: int) -> str:
        neutral = place == len(self.concepts)
        trigger, kind = ("", "subject") if neutral else (self.concepts[place].trigger, self.concepts[place].kind)
        # What has no trigger cannot be told from what must not change, but by its own prompts.
        if self.random.random() < USUAL or not (trigger or neutral):
            return self.random.choice(list(self.usual[place]))
        return prompts.wandering(self.random, trigger, kind, self.words)

    def read(self, asked: Sequence[tuple[int, str]]) -> Lesson:
        """Prompts (whose, text), of one concept in a row, as their own LoRAs read them."""
        own: dict[int, list[str]] = {}
        for place, text in asked:
            own.setdefault(place, []).append(text)
        parts = {place: self._own(place, texts) for place, texts in own.items()}
        # A host may make prompts as long as the longest beside them (the webui: 77 tokens for every 75 of it).
        longest = max(parts, key=lambda place: parts[place].tokens.shape[1])
        for place, texts in own.items():
            if parts[place].tokens.shape[1] < parts[longest].tokens.shape[1]:
                parts[place] = self._own(place, [*texts, *own[longest]])[list(range(len(texts)))]
        pooled = None if parts[longest].pooled is None else torch.cat([part.pooled for part in parts.values()])
        tokens = torch.cat([part.tokens for part in parts.values()])
        return Lesson([text for _, text in asked], [place for place, _ in asked], Context(tokens, pooled))

    @torch.no_grad()
    def _own(self, place: int, texts: list[str]) -> Context:
        """Prompts as one concept's own LoRA reads them."""
        with applied(self.modules, {name: pair for name, pair in self.asked[place].items() if is_text(name)}):
            return self.host.encode(texts)

    def learn(self, lesson: Lesson, live: Changes, share: float = 1.0, scale: float = LOSS_SCALE) -> float:
        """Add `share` times the gradients of what is misread to those of the factors, whose hooks must be there.

        Returns what is misread, relative to the base: 1 is no LoRA at all. Layer by layer, so that the keys and values
        of one layer are held at a time.
        """
        with torch.enable_grad():
            context = self.host.encode(lesson.texts)
        outputs = [value for value in (context.tokens, context.pooled) if value is not None]
        ends = [value.detach().float().requires_grad_() for value in outputs]
        gradients = [torch.zeros_like(end) for end in ends]
        parts = [name for name, size in self.scales.items() if size > 0]
        whole = 0.0
        for name in parts:
            pair = live.get(name) if name else None
            leaves = [ends[1]] if not name else [ends[0], *(pair or ())]
            with torch.enable_grad(), without_autocast(ends[0].device):
                loss = self._misread(name, lesson, ends, pair) / len(parts)
                found = torch.autograd.grad(loss * share, leaves)
            gradients[0 if name else 1] += found[0]
            for value, gradient in zip(leaves[1:], found[1:], strict=True):
                value.grad += gradient
            whole += loss.item()
        inner = [value for name, pair in live.items() if is_text(name) for value in pair]
        into = [(out, scale * grad) for out, grad in zip(outputs, gradients, strict=True) if out.requires_grad]
        if inner and into:
            tops, seeds = zip(*into, strict=True)
            seeds = [seed.to(top) for top, seed in zip(tops, seeds, strict=True)]
            for value, gradient in zip(inner, torch.autograd.grad(tops, inner, seeds, allow_unused=True), strict=True):
                if gradient is not None:
                    value.grad += gradient / scale
        return whole

    def _misread(self, name: str, lesson: Lesson, tokens: Sequence[Tensor], change: Factors | None) -> Tensor:
        """The mean squared difference of a layer's output ("": of the pooled text) to what is asked for, relative."""
        if not name:
            return (tokens[1] - lesson.own.pooled.float()).square().mean() / self.scales[name]
        own = lesson.own.tokens.float()
        weight = self.readers[name].weight.to(own)
        output = F.linear(tokens[0] - own, weight)
        if change is not None:
            output = output + through(tokens[0], change)
        wanted = torch.zeros_like(output)
        for place in set(lesson.places):
            if name in self.asked[place]:
                first, count = lesson.places.index(place), lesson.places.count(place)
                wanted[first : first + count] = through(own[first : first + count], self.asked[place][name])
        return (output - wanted).square().mean() / self.scales[name]

    @torch.no_grad()
    def _scales(self) -> dict[str, float]:
        """For each layer, and "" for the pooled text, the mean square of what the concepts change there."""
        asked = [(place, self._text(place)) for place in range(len(self.concepts)) for _ in range(SCALED)]
        lesson, base = self.read(asked), self.host.encode([text for _, text in asked])
        tokens = [value.float() for value in (base.tokens, base.pooled) if value is not None]
        self.scales = dict.fromkeys(self.readers if base.pooled is None else [*self.readers, ""], 1.0)
        with without_autocast(tokens[0].device):
            return {name: self._misread(name, lesson, tokens, None).item() for name in self.scales}


def practise(
    reading: Reading, changes: Changes, whitenings: Mapping[str, Whitening], steps: int, tick: Callable[[int], None]
) -> dict[str, Factors]:
    """Train the factors that read text for `steps` steps on words alone, and return all; `tick` is told each step.

    Norm layers act as they are.
    """
    text = {name: pair for name, pair in changes.items() if reads_text(name)}
    norms = {name: pair for name, pair in text.items() if isinstance(reading.modules[name], NORMS)}
    factors = {name: pair for name, pair in text.items() if name not in norms}
    if not factors:
        return dict(changes)
    trained = Trained(factors, whitenings, reading.host.device)
    scale = LOSS_SCALE
    for step in range(steps):
        lesson, live = reading.lesson(), trained.live()
        with applied(reading.modules, {**live, **norms}):
            reading.learn(lesson, live, scale=scale)
        if not trained.descend(live, schedule(step, steps)):
            scale = max(1.0, scale / 8)
        tick(step + 1)
    return {**changes, **trained.found()}


def _on(device: torch.device, changes: Changes) -> Changes:
    """The changes of what reads text, in float32 on a device."""
    return {
        name: tuple(factor.to(device, torch.float32) for factor in pair)
        for name, pair in changes.items()
        if reads_text(name)
    }
