"""What the settings of a merge are called, in the form and wherever they are told."""

from __future__ import annotations

from loraclr.webui.language import say


def title(name: str) -> str:
    """What a setting of a recipe is called in the form."""
    words = {
        "speed": say("Speed"), "rank": say("Largest rank of the merged LoRA"),
        "neutral": say("Protection of everything else"), "anchor": say("Protection in the closed form"),
        "scenes": say("Scenes of two to learn from"), "binding": say("Weight of the scenes of two"),
        "styled": say("Weight of things in styles"), "care": say("Extra care for weak concepts"),
        "astray": say("Weight of what could go wrong"), "again": say("Weight of the second look"),
        "guided": say("Weight of guidance in the polish"), "reading": say("Weight of the words learnt alone"),
        "directions": say("Directions that the polish evens out"), "ridge": say("Ridge λ of the closed form"),
        "steps": say("Sampling steps looked at"), "guidance": say("CFG scale looked at"),
        "size": say("Picture size looked at"), "tokens": say("Places of a picture that are counted"),
        "batch": say("Pictures drawn at a time"), "neutral_prompts": say("Prompts to keep as they are"),
        "margin": say("Margin m of reference"), "penalty": say("Penalty λ of reference"),
        "distance": say("Distance of reference"), "iterations": say("Iterations of reference"),
        "rate": say("Learning rate of reference"),
        "density": say("Density"), "scale": say("Scale"), "seed": say("Seed of the merge"),
    }  # fmt: skip
    return words.get(name, name.replace("_", " "))
