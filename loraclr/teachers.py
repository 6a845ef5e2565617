"""Teachers: each concept's own LoRA draws pictures, and says what it would do in others; banks keep what it said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from loraclr import capture, folding, plan, scenes
from loraclr.astray import answer, astray
from loraclr.capture import Bank
from loraclr.changes import Changes
from loraclr.concept import Concept
from loraclr.hosts import Context, Host
from loraclr.plan import Settings

#: Where the numbers of noises begin: of scenes, and of what is drawn in the middle of the polish.
SCENE_NOISE, LOOK_NOISE = 1000, 3000


class Teachers:
    """The concepts' own LoRAs, and what they have said so far.

    Number `len(concepts)`, behind the last concept, stands for what must not change: the base on neutral prompts.

    Attributes:
        names: for messages.
        texts: the prompts that are looked at.
        asked: the changes that a merge is to come near to.
        modules: the layers that any of these touches, by name.
        scenes: the pictures of two concepts.
        own: what each teacher said on the way to its own pictures.
        held: the same of one more picture each, not to be learnt from but to be measured on.
        joint: of scenes, some in each bank.
        stray: in states of the others' ways.
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
                drawn = [*texts, *scenes.asked_of(place, self.scenes), ""]
                self.trained[place] = own, folding.read(host, live, lora, own, drawn)
                self.asked[place] = folding.folded(host, live, lora, own, texts)
        touched = {name for changes in self.asked for name in changes}
        self.modules = {name: module for name, module in live.items() if name in touched}
        self.size = settings.size or host.size
        self.own: list[Bank] = []
        self.held: list[Bank] = []
        self.joint: list[Bank] = []
        self.stray: list[Bank] = []
        self.looked = 0  # pictures of each concept that a merged LoRA has drawn

    @contextmanager
    def acting(self, place: int) -> Iterator[None]:
        """Inside, one concept's own LoRA acts as it was trained to."""
        changes, texts = self.trained.get(place, (self.asked[place], None))
        with capture.applied(self.modules, changes), folding.layered(self.modules, texts) if texts else nullcontext():
            yield

    @torch.no_grad()
    def look(self, place: int, watching: AbstractContextManager) -> None:
        """Draw one concept's pictures, inside `watching`; once more draws the same."""
        texts, stage = self.texts[place], f"Looking at {self.names[place]}"
        with self.acting(place):
            with watching:
                bank = self._draw(stage, texts, 0)
            if len(self.own) == place:
                self.own.append(bank)
                self.held.append(self._draw(stage, texts[:1], len(texts)))

    def compose(self) -> None:
        """Draw two concepts in one picture, each half by its own LoRA."""
        settings, stage = self.settings, "Looking at two in one picture"
        for begin in range(0, len(self.scenes), settings.batch):
            part, seed = self.scenes[begin : begin + settings.batch], settings.seed + SCENE_NOISE + begin
            self.tick(stage, 0)
            bank, _ = scenes.draw(
                self.host, self.acting, part, seed, settings.steps, settings.guidance, self.size,
                lambda rows: self.tick(stage, rows),
            )  # fmt: skip
            self.joint.append(bank)

    def look_astray(self) -> None:
        """Ask each concept's own LoRA, and the base, what to make of pictures on their way to something else."""
        stage, states = "Looking at what could go wrong", plan.states(self.texts, self.settings)
        for place, count in enumerate(states if any(states) else ()):
            self.tick(stage, 0)
            with self.acting(place):
                bank = astray(
                    self.host, self.own, place, count, self.settings.batch, self.settings.seed,
                    lambda rows: self.tick(stage, rows),
                )  # fmt: skip
            self.stray.append(bank)

    def look_again(self, merged: Changes) -> list[Bank]:
        """Draw pictures with what is merged by now, and ask each concept's own LoRA what it would have done there."""
        stage, first = "Looking at what it draws so far", self.looked
        self.looked += plan.drawn_again(self.settings)
        found = []
        for place, texts in enumerate(self.texts):
            some = [texts[number % len(texts)] for number in range(first, self.looked)]
            with capture.applied(self.modules, merged), torch.no_grad():
                bank = self._draw(stage, some, LOOK_NOISE + first)
            with self.acting(place):
                answer(self.host, bank, self.settings.batch, lambda rows: self.tick(stage, rows))
            found.append(bank)
        return found

    def _draw(self, stage: str, texts: list[str], first: int) -> Bank:
        """Pictures of `texts`, from noise number `first` on, as the UNet's predictions on the way to them."""
        settings = self.settings
        bank = Bank([*texts, ""])
        record = capture.filing(bank, self.host.encode(bank.prompts))

        def tell(x: Tensor, t: Tensor, context: Context, prediction: Tensor) -> None:
            record(x, t, context, prediction)
            self.tick(stage, x.shape[0])

        with self.host.watch(tell):
            for begin in range(0, len(texts), settings.batch):
                self.tick(stage, 0)
                part, seed = texts[begin : begin + settings.batch], settings.seed + first + begin
                self.host.sample(part, seed, settings.steps, settings.guidance, self.size, self.size)
        return bank
