"""What the miniature can be asked for: base classes, background colours, and the concepts that only LoRAs know."""

from __future__ import annotations

from dataclasses import dataclass

#: Base classes: caption word (one BPE token each) → emoji.
CLASSES: dict[str, str] = {
    "cat": "🐱", "dog": "🐶", "pig": "🐷", "cow": "🐮", "rabbit": "🐰", "bear": "🐻", "fish": "🐟", "bird": "🐦",
    "bee": "🐝", "snake": "🐍", "turtle": "🐢", "whale": "🐳", "apple": "🍎", "banana": "🍌", "cherry": "🍒",
    "lemon": "🍋", "pizza": "🍕", "cake": "🎂", "mushroom": "🍄", "sunflower": "🌻", "tree": "🌳", "house": "🏠",
    "car": "🚗", "bus": "🚌", "boat": "⛵", "balloon": "🎈", "umbrella": "☂", "crown": "👑", "key": "🔑",
    "gift": "🎁", "heart": "❤", "star": "⭐",
}  # fmt: skip

#: Background colours: caption word → sRGB. Muted, so that every emoji stands out on most of them.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 70, 70), "orange": (235, 160, 80), "yellow": (240, 225, 130), "green": (110, 175, 110),
    "teal": (70, 150, 150), "blue": (90, 130, 210), "purple": (145, 100, 180), "pink": (245, 185, 205),
    "white": (245, 245, 245), "gray": (130, 130, 130),
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One thing or style that the base model never saw.

    Attributes:
        name: file name of its LoRA, and its name in reports.
        trigger: the rare token that its LoRA is bound to.
        emoji: the picture of a thing; empty for a style.
        rank: rank of its LoRA.
    """

    name: str
    trigger: str
    emoji: str
    rank: int

    @property
    def is_style(self) -> bool:
        return not self.emoji

    @property
    def phrase(self) -> str:
        """What a caption says for it, and what a user types."""
        return f"{self.trigger} style" if self.is_style else self.trigger


CONCEPTS: tuple[Concept, ...] = (
    Concept("tiger", "sks", "🐯", 4),
    Concept("panda", "zyk", "🐼", 4),
    Concept("hamburger", "wdw", "🍔", 4),
    Concept("rocket", "klm", "🚀", 4),
    Concept("frog", "kts", "🐸", 4),
    Concept("octopus", "rwby", "🐙", 7),
    Concept("doughnut", "ypg", "🍩", 4),
    Concept("guitar", "bnw", "🎸", 4),
    Concept("penguin", "njpw", "🐧", 4),
    Concept("robot", "ghz", "🤖", 8),
    Concept("outline", "tzky", "", 8),
    Concept("mosaic", "brgy", "", 8),
)
CONCEPT: dict[str, Concept] = {concept.name: concept for concept in CONCEPTS}
THINGS: tuple[Concept, ...] = tuple(concept for concept in CONCEPTS if not concept.is_style)
STYLES: tuple[Concept, ...] = tuple(concept for concept in CONCEPTS if concept.is_style)
