"""Teachers: each concept's own LoRA draws pictures, and says what it would do in others; banks keep what it said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor

from loraclr import capture, folding, plan, scenes
from loraclr.astray import answer, astray
from loraclr.bank import Bank, filing
from loraclr.changes import Changes
from loraclr.concept import Concept
from loraclr.hosts import Context, Host
from loraclr.plan import Settings

#: Where the numbers of noises begin: of both kinds of scenes, and of what is drawn in the middle of the polish.
SCENE_NOISE, LOOK_NOISE = (1000, 2000), 3000


class Teachers:
    """The concepts' own LoRAs, and what they have said so far.

    Number `len(concepts)`, behind the last concept, stands for what must not change: the base on neutral prompts.

    Attributes:
        names: for messages.
        texts: the prompts that are looked at.
        asked: the changes that a merge is to come near to.
        modules: the layers that any of these touches, by name.
        scenes: the pictures of two concepts, by kind: side by side, and things in styles.
        own: what each teacher said on the way to its own pictures.
        held: the same of one more picture each, not to be learnt from but to be measured on.
        joint: of scenes, by kind, some in each bank.
        stray: in states of the others' ways.
        again: of pictures that the merged LoRA has drawn, once for each look.
    """

    def __init__(
        self, host: Host, concepts: Sequence[Concept], settings: Settings, tick: Callable[[str, float], None]
    ) -> None:
        """`tick`: told the stage in words, and how many rows went through the UNet; may raise to cancel."""
        self.host, self.settings, self.tick = host, settings, tick
        self.names = [concept.lora.name for concept in concepts] + ["what must not change"]
        live = host.layers()
        self.texts = plan.texts(concepts, settings)
        self.scenes = plan.pairs(concepts, settings)
        self.asked: list[Changes] = [*(concept.changes(live) for concept in concepts), {}]
        self.trained: dict[int, tuple[Changes, folding.Texts]] = {}  # of ED-LoRAs: what they are in their own pictures
        for place, lora in enumerate(concept.lora for concept in concepts):
            if lora.layer_embeddings:
                own, texts = self.asked[place], self.texts[place]
                drawn = [*texts, *scenes.asked_of(place, self.scenes[0]), ""]
                self.trained[place] = own, folding.read(host, live, lora, own, drawn)
                self.asked[place] = folding.folded(host, live, lora, own, texts)
        touched = {name for changes in self.asked for name in changes}
        self.modules = {name: module for name, module in live.items() if name in touched}
        self.size = settings.size or host.size
        self.own: list[Bank] = []
        self.held: list[Bank] = []
        self.joint: list[list[Bank]] = []
        self.stray: list[Bank] = []
        self.again: list[list[Bank]] = []

    @contextmanager
    def acting(self, places: Sequence[int]) -> Iterator[None]:
        """Inside, one concept's own LoRA acts as it was trained to; several act together."""
        alone = len(places) == 1  # an ED-LoRA's texts for single layers would leave none for another LoRA
        with ExitStack() as stack:
            for place in places:
                own = self.asked[place], None
                changes, texts = self.trained.get(place, own) if alone else own
                stack.enter_context(capture.applied(self.modules, changes))
                if texts:
                    stack.enter_context(folding.layered(self.modules, texts))
            yield

    @torch.no_grad()
    def look(self, place: int, watching: AbstractContextManager) -> None:
        """Draw one concept's pictures, inside `watching`; once more draws the same."""
        texts, stage = self.texts[place], f"Looking at {self.names[place]}"
        with self.acting([place]):
            with watching:
                bank = self._draw(stage, texts, 0)
            if len(self.own) == place:
                self.own.append(bank)
                self.held.append(self._draw(stage, texts[:1], len(texts)))

    def compose(self) -> None:
        """Draw two concepts in one picture, each part by its own LoRAs."""
        settings, stage = self.settings, "Looking at two in one picture"
        for kind, every in enumerate(self.scenes):
            self.joint.append([])
            for begin in range(0, len(every), settings.batch):
                part, seed = every[begin : begin + settings.batch], settings.seed + SCENE_NOISE[kind] + begin
                self.tick(stage, 0)
                bank, _ = scenes.draw(
                    self.host, self.acting, part, seed, settings.steps, settings.guidance, self.size,
                    lambda rows: self.tick(stage, rows),
                )  # fmt: skip
                self.joint[kind].append(bank)

    def look_astray(self) -> None:
        """Ask each concept's own LoRA, and the base, what to make of pictures on their way to something else."""
        stage, states = "Looking at what could go wrong", plan.states(self.texts, self.settings)
        for place, count in enumerate(states if any(states) else ()):
            self.tick(stage, 0)
            with self.acting([place]):
                bank = astray(
                    self.host, self.own, place, count, self.settings.batch, self.settings.seed,
                    lambda rows: self.tick(stage, rows),
                )  # fmt: skip
            self.stray.append(bank)

    def look_again(self, merged: Changes) -> None:
        """Draw pictures with what is merged by now, and ask each concept's own LoRA what it would have done there."""
        stage, count = "Looking at what it draws so far", plan.pictures_in_look(self.settings)
        first, found = count * len(self.again), []
        for place, texts in enumerate(self.texts):
            some = [texts[number % len(texts)] for number in range(first, first + count)]
            with capture.applied(self.modules, merged), torch.no_grad():
                bank = self._draw(stage, some, LOOK_NOISE + first)
            with self.acting([place]):
                answer(self.host, bank, self.settings.batch, lambda rows: self.tick(stage, rows))
            found.append(bank)
        self.again.append(found)

    def lessons(self, care: Sequence[float]) -> tuple[list[Bank], list[float]]:
        """All that was said so far, as banks, and how much of the polish is to be about each, relative.

        Args:
            care: how much is to be about each concept, 1 for all if they are alike.
        """
        settings, concepts, lessons = self.settings, len(care), []
        each = [*care, settings.neutral * concepts]
        kinds = [(self.own, 1.0), (self.stray, settings.astray), *((found, settings.again) for found in self.again)]
        for banks, weight in kinds:
            # What was not looked at has no banks.
            lessons += [(bank, weight * share) for bank, share in zip(banks, each, strict=bool(banks))]
        for banks, weight in zip(self.joint, (settings.binding, settings.styled), strict=bool(self.joint)):
            states = sum(map(len, banks))
            lessons += [(bank, weight * concepts * len(bank) / states) for bank in banks]
        return [bank for bank, _ in lessons], [share for _, share in lessons]

    def _draw(self, stage: str, texts: list[str], first: int) -> Bank:
        """Pictures of `texts`, from noise number `first` on, as the UNet's predictions on the way to them."""
        settings = self.settings
        bank = Bank([*texts, ""])
        record = filing(bank, self.host.encode(bank.prompts))

        def tell(x: Tensor, t: Tensor, context: Context, prediction: Tensor) -> None:
            record(x, t, context, prediction)
            self.tick(stage, x.shape[0])

        with self.host.watch(tell):
            for begin in range(0, len(texts), settings.batch):
                self.tick(stage, 0)
                part, seed = texts[begin : begin + settings.batch], settings.seed + first + begin
                self.host.sample(part, seed, settings.steps, settings.guidance, self.size, self.size)
        self.tick(stage, 0)  # a host's own bar shows the picture's, or where the merge was before it
        return bank
