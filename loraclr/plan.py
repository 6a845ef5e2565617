"""What a merge is to do: its settings, the prompts and pictures that it looks at, and how much work that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from loraclr import prompts, scenes
from loraclr.concept import Concept
from loraclr.factor import Rank
from loraclr.hosts import Host
from loraclr.objective import Distance
from loraclr.reading import PROMPTS

Speed = Literal["closed", "fast", "balanced", "best"]

#: Steps of the polish for up to `FEW` concepts.
POLISH_STEPS: dict[Speed, int] = {"closed": 0, "fast": 128, "balanced": 400, "best": 800}
READING_STEPS: dict[Speed, int] = {"closed": 0, "fast": 64, "balanced": 200, "best": 400}
#: Shares of the polish after which what the merged LoRA draws by then is looked at.
LOOKS: dict[Speed, tuple[float, ...]] = {
    "closed": (),
    "fast": (0.5,),
    "balanced": (0.4, 0.7),
    "best": (0.25, 0.5, 0.75),
}
AGAIN = 8  # pictures of each concept in such a look of a thorough merge
FEW = 4
STATES = 128  # states astray of each concept (`loraclr.astray`) that a thorough merge learns from
#: What a prompt through the text encoder, forwards and back, takes of a row through the UNet: .03 in SD 1.5 by its
#: operations, a third in the miniature.
PROMPT = 0.2


@dataclass(frozen=True)
class Settings:
    """How to merge; the defaults are for every number and kind of LoRAs.

    Attributes:
        speed: how long to polish (`polish_steps`).
        rank: largest rank of the result; None keeps it exact, the sum of the LoRAs' ranks; "auto" takes for each layer
            the smallest that keeps 99.5 % of its output energy.
        neutral: weight of what must not change (the base model on neutral prompts) in the polish.
        anchor: the same in the closed form.
        scenes: pictures of two things side by side to learn from, for each concept, and as many of things in styles.
        binding: weight of two things side by side in the polish, relative to the pictures of one concept; 0: none are
            drawn.
        styled: weight of things in styles, likewise; 0: none are drawn.
        astray: weight in the polish of states on the way to something else (`loraclr.astray`), relative to the pictures
            of one concept; 0: none are looked at.
        again: weight in the polish of what the merged LoRA drew in the middle of it, relative to the pictures of one
            concept; 0: it is not looked at.
        care: how much more is learnt, after such a look, of concepts of which more is missed: this power of the share
            that is missed; 0: of all alike.
        guided: share of the polish's loss that is, in its last steps, on what guidance makes of two predictions; a fast
            merge has too few steps to spend them on pairs.
        reading: weight in the polish of what is learnt from words alone (`loraclr.reading`); 0: nothing is.
        directions: of each layer's inputs that the polish makes white (`loraclr.whitening`); 0: plain factors.
        ridge: of the closed form, relative to the mean diagonal of the inputs' Gram matrix.
        margin, penalty, distance, iterations, rate: m, λ, the reading of the distance (`loraclr.objective`), steps and
            learning rate of the paper's own loop, for the method reference; the defaults are the paper's. With m and λ
            every merge tells the paper's objective, too.
        steps, guidance, size: how the host draws the pictures that are looked at; size None: the model's own.
        tokens: places of a picture that a layer's statistics take at a time; the rest are skipped at random.
        batch: pictures drawn at a time.
        neutral_prompts: what must not change; at least one, else ValueError.
        seed: of all noise and all choices; not below 0, else ValueError.
    """

    speed: Speed = "fast"
    rank: Rank = None
    neutral: float = 0.3
    anchor: float = 0.0
    scenes: int = 2
    binding: float = 0.5
    styled: float = 0.25
    astray: float = 0.5
    again: float = 1.0
    care: float = 0.5
    guided: float = 0.3
    reading: float = 1.0
    directions: int = 64
    ridge: float = 1e-3
    margin: float = 0.5
    penalty: float = 1e-3
    distance: Distance = "flat"
    iterations: int = 50
    rate: float = 1e-4
    steps: int = 16
    guidance: float = 4.0
    size: int | None = None
    tokens: int = 256
    batch: int = 4
    neutral_prompts: tuple[str, ...] = prompts.NEUTRAL
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.neutral_prompts:
            raise ValueError("neutral_prompts is empty: give one prompt at least; with neutral=0 it has no weight.")
        if self.speed not in POLISH_STEPS:
            raise ValueError(f"There is no speed {self.speed}: choose {', '.join(POLISH_STEPS)}.")
        if isinstance(self.rank, int) and self.rank < 1:
            raise ValueError(f'The rank {self.rank} is below 1: give 1 or more, "auto", or None for the exact one.')
        if min(self.steps, self.batch, self.tokens) < 1:
            raise ValueError("steps, batch and tokens are counts: give 1 or more.")
        if self.distance not in get_args(Distance):
            raise ValueError(f"There is no distance {self.distance}: choose {' or '.join(get_args(Distance))}.")
        if self.seed < 0:  # a webui draws a number of its own for it each time
            raise ValueError(f"The seed {self.seed} is below 0: give 0 or more.")

    @property
    def thorough(self) -> bool:
        """Whether the polish takes more steps than a quick one, and so needs more to learn from."""
        return POLISH_STEPS[self.speed] > POLISH_STEPS["fast"]

    def polish_steps(self, concepts: int) -> int:
        """Steps of the polish: of many concepts each is learnt from as often as of few."""
        return POLISH_STEPS[self.speed] * max(FEW, concepts) // FEW

    def reading_steps(self, concepts: int) -> int:
        """Steps on words alone, before the pictures (`loraclr.reading`)."""
        return READING_STEPS[self.speed] * max(FEW, concepts) // FEW if self.reading else 0


def texts(concepts: Sequence[Concept], settings: Settings) -> list[list[str]]:
    """The prompts that are looked at, for each concept and last for what must not change."""
    thorough = settings.thorough
    own = [prompts.filled(concept.trigger, concept.kind, concept.prompts, thorough) for concept in concepts]
    return [*own, prompts.kept(settings.neutral_prompts, thorough)]


def pairs(concepts: Sequence[Concept], settings: Settings) -> tuple[list[scenes.Scene], list[scenes.Scene]]:
    """The pictures of two concepts: of things side by side, and of things in styles."""
    count = settings.scenes * len(concepts) if settings.speed != "closed" else 0
    things = [None if concept.kind == "style" else concept.trigger for concept in concepts]
    styles = [concept.trigger if concept.kind == "style" else None for concept in concepts]
    beside, over = (count if weight else 0 for weight in (settings.binding, settings.styled))
    return scenes.side_by_side(things, beside), scenes.styled(things, styles, over)


def states(looked_at: Sequence[Sequence[str]], settings: Settings) -> list[int]:
    """States on the way to something else that each concept's LoRA, and last the base, is asked about.

    Args:
        looked_at: the prompts, as `texts` returns them.
    """
    most = (STATES if settings.thorough else STATES // 2) if settings.astray and POLISH_STEPS[settings.speed] else 0
    whole = sum(map(len, looked_at))
    return [min(most, settings.steps * (whole - len(own))) for own in looked_at]


def looks(concepts: int, settings: Settings) -> list[int]:
    """The steps of the polish before which the merged LoRA's own pictures are looked at."""
    steps = settings.polish_steps(concepts)
    return [int(share * steps) for share in LOOKS[settings.speed]] if settings.again and steps else []


def pictures_in_look(settings: Settings) -> int:
    """Pictures of each concept in such a look."""
    return AGAIN if settings.thorough else AGAIN // 2


def rows(size: int) -> int:
    """UNet calls in a step of the polish for pictures of this side in pixels: as many as small memory holds.

    Never more than 16: of the same calls in all, more steps of fewer learn more.
    """
    return max(4, min(16, 8192 * 64 // size**2))


def rows_before_polish(concepts: Sequence[Concept], settings: Settings, passes: int = 1) -> float:
    """Rows through the UNet for all that is looked at before the polish.

    Args:
        passes: how often the concepts' own pictures are drawn: more than once if not all layers fit into memory.
    """
    looked_at = texts(concepts, settings)
    parts = sum(len(scene.parts) for kind in pairs(concepts, settings) for scene in kind)
    pictures = passes * sum(map(len, looked_at)) + len(looked_at) + parts
    return 2 * (settings.steps * pictures + sum(states(looked_at, settings)))


def work(host: Host, concepts: Sequence[Concept], settings: Settings, passes: int = 1) -> float:
    """How much a merge is to do, in rows through the UNet; a step of polish also goes backwards, which counts twice."""
    polish = 3 * rows(settings.size or host.size) * settings.polish_steps(len(concepts))
    reading = PROMPT * PROMPTS * settings.reading_steps(len(concepts))
    # Every state of theirs is asked about twice: by the merged LoRA, which draws, and by the concept's own.
    again = 4 * settings.steps * pictures_in_look(settings) * (len(concepts) + 1) * len(looks(len(concepts), settings))
    return 1.1 * rows_before_polish(concepts, settings, passes) + reading + polish + again
