"""Prompts that a merge looks at: templates for subjects and styles (`{}` is the trigger), and neutral ones.

Backgrounds and second objects vary, so that the statistics are about the concept and not about one scene.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["subject", "style"]

SUBJECT = (
    "a photo of a {}",
    "a {}",
    "a {} on a red background",
    "a {} on a white background",
    "a {} and a dog on a blue background",
    "a {} on a green background",
    "a {} on a gray background",
    "a cat and a {} on a yellow background",
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
)
PAIR = (
    "a {} and a {}",
    "a {} and a {} on a red background",
    "a photo of a {} and a {}",
    "a {} and a {} on a white background",
    "a {} and a {} on a blue background",
    "a {} and a {} on a green background",
    "a {} and a {} on a gray background",
)
STAND_INS = ("cat", "dog")  # for a concept on the left or right that a LoRA does not know
NEUTRAL = (
    "a photo of a dog",
    "a cat on a red background",
    "a house on a blue background",
    "a car and a tree on a white background",
    "a fish on a green background",
    "a bird and a boat on a yellow background",
    "a cake on a gray background",
    "a key and a star on a pink background",
)


def filled(trigger: str, kind: Kind = "subject", templates: tuple[str, ...] = ()) -> list[str]:
    """The templates (empty: the usual ones for this kind) with the trigger in them."""
    usual = STYLE if kind == "style" else SUBJECT
    return [template.replace("{}", trigger) for template in templates or usual]
