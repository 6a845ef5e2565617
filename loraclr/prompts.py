"""Prompts that a merge looks at: templates for subjects and styles (`{}` is the trigger), and neutral ones.

Backgrounds and second objects vary, so that the statistics are about the concept and not about one scene.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

Kind = Literal["subject", "style"]

#: The first ones are for quick merges (`QUICK`).
SUBJECT = (
    "a photo of a {}",
    "a {}",
    "a {} on a red background",
    "a {} on a white background",
    "a {} and a dog on a blue background",
    "a {} on a green background",
    "a {} on a gray background",
    "a cat and a {} on a yellow background",
    "a {} and a house",
    "a bird and a {} on a white background",
    "a {} and a tree on a green background",
    "a fish and a {}",
    "a {} on a blue background",
    "a {} on a yellow background",
    "a star and a {} on a gray background",
    "a {} and a cake on a red background",
)
STYLE = (
    "a photo of a car in {}",
    "a cat in {}",
    "a house on a white background in {}",
    "a tree on a blue background in {}",
    "a dog and a boat on a red background in {}",
    "a fish on a yellow background in {}",
    "a cake in {}",
    "a bird on a green background in {}",
    "a bee in {}",
    "a cherry on a white background in {}",
    "a sunflower on a gray background in {}",
    "a heart and a star on a red background in {}",
    "a boat on a gray background in {}",
    "a key on a yellow background in {}",
    "a tree and a house in {}",
    "a cat and a fish on a white background in {}",
)
#: How many of the usual templates a quick merge looks at.
QUICK = {"subject": 8, "style": 12}
PAIR = (
    "a {} and a {}",
    "a {} and a {} on a red background",
    "a photo of a {} and a {}",
    "a {} and a {} on a white background",
    "a {} and a {} on a blue background",
    "a {} and a {} on a green background",
    "a {} and a {} on a gray background",
)
STYLED = (
    "a {} in {}",
    "a {} on a red background in {}",
    "a {} on a white background in {}",
    "a {} on a blue background in {}",
    "a {} on a green background in {}",
    "a {} on a gray background in {}",
)
STAND_INS = ("cat", "dog")  # for a concept on the left or right that a LoRA does not know
#: Without a background that only they have: it would be learnt as a sign that no concept is wanted.
NEUTRAL = (
    "a photo of a dog",
    "a cat on a red background",
    "a house on a blue background",
    "a car and a tree on a white background",
    "a fish on a green background",
    "a bird and a boat on a yellow background",
    "a cake on a gray background",
    "a key and a star on a white background",
)
#: More of them for merges that take more steps.
MORE_NEUTRAL = (
    "a bee on a white background",
    "a photo of a flower",
    "a sunflower and a dog on a green background",
    "a cherry and a cat",
    "a boat on a gray background",
    "a house and a bird on a red background",
    "a tree on a yellow background",
    "a star and a heart on a blue background",
)


#: Prompts of which only the words are looked at, no picture; `{word}` is one of `WORDS`.
WANDERING = {
    "subject": (
        "a {}",
        "a photo of a {}",
        "a {} and a {word}",
        "a {word} and a {}",
        "a {word} {}",
        "{}, {word}, {word}",
    ),
    "style": ("a {word} in {}", "a photo of a {word} in {}", "a {word} and a {word} in {}", "a {word}, {word}, {}"),
    None: ("a {word}", "a photo of a {word}", "a {word} and a {word}", "a {word} {word}", "{word}, {word}"),
}
PLACES = ("", "", " on a {word} background", " on a {word} background", " in the {word}")
WORDS = (
    "red", "green", "blue", "yellow", "white", "black", "gray", "brown", "gold", "silver", "dark", "bright", "golden",
    "wooden", "stone", "glass", "metal", "paper", "velvet", "old", "young", "small", "large", "tall", "round", "thin",
    "soft", "sharp", "shiny", "dusty", "wet", "frozen", "burning", "broken", "happy", "sad", "angry", "sleeping",
    "running", "standing", "sitting", "flying", "swimming", "dancing", "smiling", "beach", "forest", "mountain",
    "river", "lake", "sea", "desert", "island", "garden", "field", "meadow", "street", "city", "village", "castle",
    "church", "bridge", "tower", "market", "kitchen", "bedroom", "office", "library", "museum", "station", "harbour",
    "cave", "sky", "night", "morning", "evening", "sunset", "sunrise", "winter", "summer", "autumn", "spring", "rain",
    "snow", "fog", "storm", "cloud", "moon", "sun", "star", "fire", "smoke", "shadow", "light", "mirror", "window",
    "door", "wall", "floor", "table", "chair", "bed", "lamp", "clock", "book", "letter", "bottle", "cup", "plate",
    "knife", "basket", "box", "bag", "hat", "coat", "dress", "shirt", "scarf", "glove", "shoe", "ring", "sword",
    "shield", "guitar", "piano", "violin", "drum", "camera", "phone", "computer", "car", "train", "ship", "boat",
    "bicycle", "plane", "rocket", "horse", "dog", "cat", "bird", "fish", "cow", "sheep", "goat", "pig", "bear",
    "wolf", "fox", "lion", "elephant", "monkey", "snake", "frog", "bee", "butterfly", "spider", "tree", "flower",
    "rose", "grass", "leaf", "apple", "banana", "cherry", "grape", "bread", "cheese", "cake", "egg", "soup", "coffee",
    "man", "woman", "child", "king", "queen", "soldier", "doctor", "painter", "dancer", "robot", "ghost", "dragon",
    "wizard", "portrait", "painting", "drawing", "sketch", "sculpture", "poster", "cinematic", "detailed", "blurry",
    "vintage", "modern",
)  # fmt: skip


def wandering(rng: random.Random, trigger: str = "", kind: Kind = "subject", words: Sequence[str] = WORDS) -> str:
    """A prompt with words drawn at random around a trigger; without one, around none."""
    text = rng.choice(WANDERING[kind if trigger else None]) + rng.choice(PLACES)
    if kind == "style" and trigger and rng.random() < 0.5:  # the place before the style, as people write it, too
        text = rng.choice(("a {word}", "a {word} and a {word}")) + rng.choice(PLACES) + " in {}"
    while "{word}" in text:
        text = text.replace("{word}", rng.choice(words), 1)
    return text.replace("{}", trigger)


def usual(kind: Kind) -> tuple[str, ...]:
    """The templates of a kind that a quick merge looks at."""
    return (STYLE if kind == "style" else SUBJECT)[: QUICK[kind]]


def filled(trigger: str, kind: Kind = "subject", templates: tuple[str, ...] = (), thorough: bool = False) -> list[str]:
    """The templates with the trigger in them.

    Args:
        templates: empty for the usual ones of this kind.
        thorough: all of the usual ones, or given ones twice, to be drawn from other noise.
    """
    every = STYLE if kind == "style" else SUBJECT
    chosen = templates * (1 + thorough) or (every if thorough else usual(kind))
    return [template.replace("{}", trigger) for template in chosen]


def kept(given: tuple[str, ...], thorough: bool = False) -> list[str]:
    """What must not change: the prompts given, in a thorough merge the usual ones and more, or others twice."""
    if not thorough:
        return list(given)
    return [*given, *(MORE_NEUTRAL if given == NEUTRAL else given)]
